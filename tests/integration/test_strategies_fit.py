"""DDP and FSDP2 on real ranks over gloo, through whole commands: the run that one process makes.

Batches are the same samples, sigma and noise on any number of ranks, so that losses and gradient norms differ by the
order of float32 sums only: 2e-6 of the largest, a few times the rounding of one sum. A single weight may differ by
more, since Adam takes a whole step of the rate where a gradient is nothing but rounding: a tensor is held to 1e-5 of
its norm.
Attention statistics, shares and means of what these weights do, are held to 1e-4.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.export import export
from tests.support.fork_server import popen
from trainer.graft import load_graft

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which ranks count as waiting for each other for ever; a run takes about twenty.
DEADLINE = 240
#: The run's steps, and where it is stopped to go on under another strategy: within the second epoch.
STEPS, STOP = 16, 11
#: No measurements.
UNMEASURED = "--trainer.callbacks=[{class_path: tests.support.step_rows.Steps}]"


def launch(
    folder: Path, arguments: list, *, devices: int = 1, nodes: int = 1, places: tuple[Path, ...] = ()
) -> list[tuple[int, str]]:
    """Exit status and output of `reblock ARGUMENTS` on devices * nodes ranks, each in its own of `places` if given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks, logs = [], [folder / f"rank{rank}.log" for rank in range(devices * nodes)]
    for rank, log in enumerate(logs):
        node, place = divmod(rank, devices)
        # With LOCAL_RANK set, Lightning starts no further process: no launcher ends a rank that waits.
        own = {"WORLD_SIZE": str(len(logs)), "LOCAL_RANK": str(place), "NODE_RANK": str(node)}
        with log.open("w") as out:
            ranks.append(
                popen(
                    [sys.executable, "-c", "from launch.main import main; main()", *map(str, arguments)],
                    env=os.environ | shared | (own if len(logs) > 1 else {}), cwd=places[rank] if places else ROOT,
                    stdout=out, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        status = [process.wait(DEADLINE) for process in ranks]
    except subprocess.TimeoutExpired:
        pytest.fail("the ranks wait for each other:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [(code, log.read_text()) for code, log in zip(status, logs, strict=True)]


class Runs:
    """Runs of one recipe, each made when it is first asked for."""

    def __init__(self, recipe: Path):
        self.recipe, self.folder = recipe, recipe.parent

    def fit(self, name: str, *options, overlays=(), devices=1, nodes=1, places=()) -> list[tuple[int, str]]:
        configs = [
            f"--config={path}" for path in (self.recipe, *(ROOT / f"recipes/cluster/{o}.yaml" for o in overlays))
        ]
        size = ["--run.name", name, "--trainer.devices", devices, "--trainer.num_nodes", nodes]
        return launch(self.folder, ["fit", *configs, *size, *options], devices=devices, nodes=nodes, places=places)

    def __call__(self, name: str, *options, **how) -> Path:
        run = self.folder / "runs" / name
        if not run.exists():
            for status, said in self.fit(name, *options, **how):
                assert status == 0, said[-4000:]
        return run

    def one(self) -> Path:
        """One process."""
        return self("one")

    def ranks(self, strategy: str) -> Path:
        """Two ranks, from start to end."""
        return self(strategy, overlays=(strategy,), devices=2)

    def handed_over(self, first: str, second: str) -> Path:
        """Two ranks under one strategy, which go on under another. Runs that begin alike share their first part."""
        part, kept, done = (self.folder / place for place in (f"runs/{first}-", f"kept/{first}", f"{first}-{second}"))
        if not done.exists():
            if not kept.exists():
                self(part.name, UNMEASURED, "--trainer.max_steps", STOP, overlays=(first,), devices=2)
                shutil.copytree(part, kept)
            if not part.exists():
                shutil.copytree(kept, part)  # to where it was made: checkpoints name their own folder
            options = () if first == second else (UNMEASURED,)
            resumed = self.fit(part.name, "--run.resume", "true", *options, overlays=(second,), devices=2)
            for status, said in resumed:
                assert status == 0, said[-4000:]
            assert any(f"after step {STOP}" in said for _, said in resumed)
            part.rename(done)
        return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_recipe) -> Runs:
    """The tiny run on four samples a step, however many ranks share them, with measurements."""
    path = write_recipe(tmp_path_factory.mktemp("strategies"), epochs=2)
    content = yaml.safe_load(path.read_text())
    del content["data"]["init_args"]["batch_size"]
    content["data"]["init_args"]["global_batch_size"] = 4
    content["model"]["init_args"]["objective"] = [{"steps": 6, "blocks": 1.0, "flow": 1.0}, {"velocity": 1.0}]
    content["run"]["save_every"] = 6  # under FSDP2 a checkpoint takes as long as three steps
    content["trainer"]["callbacks"].append({"class_path": "tests.support.step_rows.Steps"})
    path.write_text(yaml.safe_dump(content))
    return Runs(path)


def steps(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def close(got: Tensor | np.ndarray, want: Tensor | np.ndarray, *, rel: float = 2e-6) -> bool:
    """Equal within `rel` of the largest entry: what the order of sums can do to any of them."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    if got.shape != want.shape or not np.array_equal(np.isnan(got), np.isnan(want)):
        return False
    top = np.nanmax(np.abs(want), initial=0.0, where=np.isfinite(want))
    return np.allclose(got, want, rtol=rel, atol=rel * top, equal_nan=True)


def near(got: Tensor, want: Tensor) -> bool:
    """The difference's norm is within 1e-5 of the tensor's."""
    return got.shape == want.shape and float((got - want).norm()) <= 1e-5 * float(want.norm())


def same_steps(got: Path, want: Path) -> bool:
    a, b = steps(got), steps(want)
    counted = all([x[k] for x in a] == [x[k] for x in b] for k in ("step", "updates", "skipped"))
    return counted and all(close([x[k] for x in a], [x[k] for x in b]) for k in ("loss", "norm"))


def content(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same_content(got: dict, want: dict) -> None:
    """Weights, averages, optimiser: the same names, numbers and kinds, and nothing but plain tensors on the CPU."""
    assert got["state_dict"].keys() == want["state_dict"].keys()
    pairs = [(name, got["state_dict"][name], want["state_dict"][name]) for name in want["state_dict"]]
    assert got["reblock"]["ema"]["updates"] == want["reblock"]["ema"]["updates"]
    averages = [part["reblock"]["ema"]["average"] for part in (got, want)]
    assert averages[0].keys() == averages[1].keys()
    pairs += [(f"average of {name}", averages[0][name], averages[1][name]) for name in averages[1]]
    adam = [part["optimizer_states"][0] for part in (got, want)]
    assert adam[0]["param_groups"] == adam[1]["param_groups"] and adam[0]["state"].keys() == adam[1]["state"].keys()
    for index, state in adam[1]["state"].items():
        pairs += [(f"{key} of {index}", adam[0]["state"][index][key], value) for key, value in state.items()]
    assert len(pairs) > 3 * len(want["state_dict"])
    for name, a, b in pairs:
        assert type(a) is torch.Tensor and a.device.type == "cpu" and a.dtype == b.dtype, name
        assert near(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_take_the_steps_of_one_process(runs, strategy):
    run = runs.ranks(strategy)
    assert [line["step"] for line in steps(run)] == list(range(1, STEPS + 1))
    assert max(line["norm"] for line in steps(run)) > 1.0  # the recipe's clip_norm: some were clipped
    assert same_steps(run, runs.one())
    same_content(content(run), content(runs.one()))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_measure_what_one_process_measures(runs, strategy):
    run, one = runs.ranks(strategy) / "measurements", runs.one() / "measurements"
    names = sorted(path.name for path in one.iterdir())
    assert len(names) == 8 and sorted(path.name for path in run.iterdir()) == names
    for name in names:
        got, want = np.load(run / name), np.load(one / name)
        assert got.files == want.files
        for key in want.files:
            if want[key].dtype.kind == "f":
                assert close(got[key], want[key], rel=1e-4), (name, key)
            else:
                assert np.array_equal(got[key], want[key]), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_frozen_weights_and_graft_are_those_of_one_process(runs, strategy, tmp_path):
    run, one = runs.ranks(strategy), runs.one()
    assert json.loads((run / "fingerprint.json").read_text()) == json.loads((one / "fingerprint.json").read_text())
    got, want = load_graft(run / "graft.safetensors"), load_graft(one / "graft.safetensors")
    assert (got.step, got.blocks, got.base_fingerprint) == (want.step, want.blocks, want.base_fingerprint)
    assert got.raw.keys() == want.raw.keys() and got.ema.keys() == want.ema.keys()
    assert all(near(got.raw[name], want.raw[name]) and near(got.ema[name], want.ema[name]) for name in want.raw)
    saved = content(run)
    assert all(torch.equal(got.raw[name], saved["state_dict"][f"room.model.{name}"]) for name in got.raw)
    assert all(torch.equal(got.ema[name], saved["reblock"]["ema"]["average"][name]) for name in got.ema)
    export(run, tmp_path / "out")
    exported = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in got.ema.items())


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("ddp", "fsdp2"), ("fsdp2", "ddp")])
def test_a_checkpoint_of_one_strategy_goes_on_under_another(runs, first, second):
    run = runs.handed_over(first, second)
    assert same_steps(run, runs.one())
    same_content(content(run), content(runs.one()))


@pytest.mark.slow
def test_fsdp2_resumes_its_own_checkpoint_bit_for_bit(runs):
    run = runs.handed_over("fsdp2", "fsdp2")
    assert steps(run) == steps(runs.ranks("fsdp2"))
    got, want = load_graft(run / "graft.safetensors"), load_graft(runs.ranks("fsdp2") / "graft.safetensors")
    assert all(torch.equal(got.raw[name], want.raw[name]) for name in want.raw)


#: No measurements, four steps of two batches each, head recomputed; the second batch of the last rank is not finite.
HARD = (
    "--trainer.callbacks=[{class_path: tests.support.step_rows.Steps},"
    "{class_path: tests.support.step_rows.Spoil, init_args: {batch: 1}}]",
    "--trainer.accumulate_grad_batches=2", "--model.init_args.checkpoint_head=true", "--trainer.max_steps=4",
    # `blocks` has gradients of rounding alone in the first steps, of which Adam makes whole steps of the rate.
    "--model.init_args.objective=[{flow: 1.0}]",
)  # fmt: skip


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_by_all_ranks_together(runs):
    ddp = runs("hard-ddp", *HARD, overlays=("ddp",), devices=2)
    sharded = runs("hard-fsdp2", *HARD, overlays=("fsdp2",), devices=2)
    taken = [(line["step"], line["updates"], line["skipped"]) for line in steps(sharded) if line["batch"] % 2]
    assert taken == [(1, 0, 1), (2, 1, 1), (3, 2, 1), (4, 3, 1)]
    assert same_steps(sharded, ddp)
    same_content(content(sharded), content(ddp))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, overlay, more, devices, nodes",
    [
        ("copies", "fsdp2", (), 2, 2),  # each node holds a sharded copy
        ("spread", "fsdp2", ("--trainer.strategy.init_args.shard_over=all",), 1, 2),
        ("head", "fsdp2_head", (), 2, 1),
    ],
)
def test_other_ways_to_shard_take_the_steps_of_one_process(runs, name, overlay, more, devices, nodes):
    options = (UNMEASURED, f"--trainer.max_steps={STOP}")
    run = runs(name, *options, *more, overlays=(overlay,), devices=devices, nodes=nodes)
    assert same_steps(run, runs("stopped", *options))
    same_content(content(run), content(runs("stopped", *options)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_with_different_bases_are_refused(runs, strategy, whole_base):
    """Both ranks name the base alike, as a path that each finds in its own folder."""
    places = tuple(runs.folder / f"node{rank}" for rank in range(2))
    for place in places:
        shutil.copytree(whole_base, place / "base", dirs_exist_ok=True)
    path = places[1] / "base/transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["transformer_blocks.0.attn1.to_q.weight"][0, 0] += 1.0
    save_file(weights, path, metadata={"format": "pt"})
    odd = runs.fit(
        f"odd-{strategy}", "--model.init_args.base=base", overlays=(strategy,), devices=2, places=places
    )  # fmt: skip
    for status, said in odd:
        assert status == 2, said[-4000:]
        assert "is another one on ranks [1]" in said, said[-4000:]
