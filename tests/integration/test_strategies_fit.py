"""DDP and FSDP2 on two real ranks over gloo, through whole commands: the same run as one process makes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.integration.conftest import EPOCHS, STEPS

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which ranks count as waiting for each other for ever; a run takes about twenty.
DEADLINE = 240


def launch(folder: Path, arguments: list, *, devices: int = 1, nodes: int = 1) -> None:
    """`reblock ARGUMENTS` on devices * nodes ranks, which nobody ends but themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks, logs = [], []
    for rank in range(devices * nodes):
        node, place = divmod(rank, devices)
        # With LOCAL_RANK set, Lightning starts no further process: no launcher ends a rank that waits.
        own = {"WORLD_SIZE": str(devices * nodes), "LOCAL_RANK": str(place), "NODE_RANK": str(node)}
        logs.append(folder / f"rank{rank}.log")
        with logs[-1].open("w") as out:
            command = [sys.executable, "-c", "from launch.main import main; main()", *map(str, arguments)]
            environment = os.environ | shared | (own if devices * nodes > 1 else {})
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        status = [process.wait(DEADLINE) for process in ranks]
    except subprocess.TimeoutExpired:
        status = ["waits"]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert set(status) == {0}, "\n".join(log.read_text()[-4000:] for log in logs)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_recipe) -> Path:
    """The tiny run on four samples a step, however many ranks share them, with measurements."""
    folder = tmp_path_factory.mktemp("strategies")
    path = write_recipe(folder)
    content = yaml.safe_load(path.read_text())
    del content["data"]["init_args"]["batch_size"]
    content["data"]["init_args"]["global_batch_size"] = 4
    content["trainer"]["callbacks"].append({"class_path": "tests.steps.Steps"})
    path.write_text(yaml.safe_dump(content))
    return path


def test_explore(recipe):
    folder = recipe.parent
    import time
    for name, overlay, devices in (("one", None, 1), ("ddp", "ddp", 2), ("fsdp2", "fsdp2", 2)):
        start = time.time()
        more = [] if overlay is None else ["--config", ROOT / f"recipes/cluster/{overlay}.yaml"]
        launch(folder, ["fit", "--config", recipe, *more, "--run.name", name, "--trainer.devices", devices], devices=devices)
        print(name, time.time() - start)
        print((folder / "runs" / name / "steps.jsonl").read_text())
    print(folder)
