"""The commands on a base of another family: fit, killed and resumed, then validate, export and report."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from launch.main import main
from launch.run_folder import RunFolder
from tests.support.latent_shards import write_latents
from tests.support.run_rows import assert_same_run, rows_of
from tests.support.tiny_families import TINY, inputs, make
from trainer.models.families import FAMILIES, split_model_of

#: Family -> its name in shards, and a bucket of theirs.
SHARDS = {
    "cogvideox-5b": ("cogvideox", "9x32x32"), "hunyuan": ("hunyuan_video", "5x32x32"), "wan": ("wan", "5x32x32"),
}  # fmt: skip


@pytest.fixture(params=sorted(SHARDS))
def family(request) -> str:
    return request.param


@pytest.fixture
def recipe_of(family, tmp_path, write_recipe):
    """(folder) -> a recipe that retrains the last two blocks of the family's tiny base."""
    make(family, 3).save_pretrained(tmp_path / "base" / "transformer")
    generator = torch.Generator().manual_seed(0)
    empty = {"text": torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), "pooled": torch.full((8,), -1.0)}
    needed = {"wan": ["text"], "hunyuan": ["text", "pooled"]}.get(family)
    name, bucket = SHARDS[family]
    shards = write_latents(
        tmp_path / "latents", [(bucket, 8)] * 5, channels=4, width=16, family=name,
        pooled=(lambda i: torch.full((8,), i / 40)) if family == "hunyuan" else None,
        latent=lambda i, shape: torch.randn(shape, generator=generator),
        text=lambda i: torch.randn(5 if family.startswith("cogvideox") else 1 + i % 4, 16, generator=generator),
        empty=None if needed is None else {name: empty[name] for name in needed},
    )  # fmt: skip

    def write(folder: Path) -> Path:
        folder.mkdir()
        path = write_recipe(folder, base=tmp_path / "base", epochs=2)
        recipe = yaml.safe_load(path.read_text())
        recipe["data"]["init_args"]["shards"] = shards
        for callback in recipe["trainer"]["callbacks"]:
            callback["init_args"]["unconditional"] = True
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.mark.slow
def test_a_killed_run_of_another_family_goes_on_and_its_graft_is_exported(recipe_of, family, reblock, tmp_path):
    whole, cut = recipe_of(tmp_path / "whole"), recipe_of(tmp_path / "cut")
    log = tmp_path / "whole.log"
    assert reblock(log, "fit", "--config", whole).wait(timeout=240) == 0, log.read_text()[-3000:]
    run, other, log = tmp_path / "whole" / "runs" / "tiny", tmp_path / "cut" / "runs" / "tiny", tmp_path / "cut.log"
    process, deadline, pause = reblock(log, "fit", "--config", cut), time.monotonic() + 240, threading.Event()
    while not any(int(row["step"]) >= 9 for row in rows_of(other) if "train/loss" in row):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        pause.wait(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    status = reblock(log, "fit", "--config", cut, "--run.resume", "true").wait(timeout=240)
    assert status == 0, log.read_text()[-3000:]
    assert_same_run(other, run)
    measured = {path.name for path in (run / "measurements").iterdir()}
    assert {f"unconditional-{kind}-epoch-002.npz" for kind in ("sinks", "masking")} <= measured

    graft = RunFolder(run).read_graft()
    ended = RunFolder(other).read_graft()
    assert all(torch.equal(ended.ema[name], value) for name, value in graft.ema.items())
    main(["export", str(run), str(tmp_path / "out")])
    exported = TINY[family][0].from_pretrained(tmp_path / "out" / "transformer").eval()
    own = make(family, 3)
    own.load_state_dict(own.state_dict() | dict(graft.ema))
    arguments = inputs(own, (3, 3))
    with torch.no_grad():
        assert torch.equal(split_model_of(exported)(**arguments), split_model_of(own)(**arguments))
        assert not torch.equal(split_model_of(own)(**arguments), split_model_of(make(family, 3))(**arguments))
    main(["report", str(run)])
    assert (run / "report.html").stat().st_size > 10_000


def test_faults_name_the_family(recipe_of, family, tmp_path, capsys):
    path, index = recipe_of(tmp_path / "run"), tmp_path / "latents" / "index.json"
    fields = json.loads(index.read_text())
    fields.pop("empty_caption", None)
    index.write_text(json.dumps(fields))  # as an earlier version wrote it
    title = FAMILIES[TINY[family][0].__name__].family
    faults = {"--model.init_args.surgery.reserved_channels=[0,1]": ["sinks are planted in no other family"]}
    if not family.startswith("cogvideox"):
        mend = "holds no encoded empty caption. Run the `reblock encode` that made it once more"
        faults = {
            "--trainer.callbacks=[]": [f"got model.caption_dropout 0.3 with a base of {title}, whose empty", mend],
            "--model.init_args.caption_dropout=0": [f"got unconditional: true with a base of {title}, whose", mend],
        }
    for option, said in faults.items():
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", str(path), option])
        message = capsys.readouterr().err
        assert stop.value.code == 2 and all(part in message for part in said), message
