"""The commands on a base of another family: fit, killed and resumed, then export, sample and report."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from data.base_facts import read_base
from launch.main import main
from launch.run_folder import RunFolder
from tests.support.family_bases import COGVIDEOX_TOKENS, make_pipeline
from tests.support.latent_shards import write_latents
from tests.support.run_rows import assert_same_run, rows_of
from tests.support.tiny_families import TINY, inputs
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
    generator = torch.Generator().manual_seed(0)
    empty = {"text": torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), "pooled": torch.full((8,), -1.0)}
    needed = {"wan": ["text"], "hunyuan": ["text", "pooled"]}.get(family)
    name, bucket = SHARDS[family]
    make_pipeline(name, 3).save_pretrained(tmp_path / "base")
    facts = read_base(tmp_path / "base")
    tokens = COGVIDEOX_TOKENS if name == "cogvideox" else None
    shards = write_latents(
        tmp_path / "latents", [(bucket, 8)] * 5, channels=16, width=16, family=name,
        pooled=(lambda i: torch.full((8,), i / 40)) if family == "hunyuan" else None,
        latent=lambda i, shape: torch.randn(shape, generator=generator),
        text=lambda i: torch.randn(tokens or 1 + i % 4, 16, generator=generator),
        empty=None if needed is None else {name: empty[name] for name in needed}, latents_mean=facts.mean,
        latents_std=facts.std,
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
    exported, own, base = (
        TINY[family][0].from_pretrained(folder / "transformer").eval()
        for folder in (tmp_path / "out", tmp_path / "base", tmp_path / "base")
    )
    own.load_state_dict(own.state_dict() | dict(graft.ema))
    arguments = inputs(own, (3, 3))
    with torch.no_grad():
        assert torch.equal(split_model_of(exported)(**arguments), split_model_of(own)(**arguments))
        assert not torch.equal(split_model_of(own)(**arguments), split_model_of(base)(**arguments))

    size = ("--steps", "2", "--frames", "9", "--height", "32", "--width", "32", "--mask_ratio", "0.9")
    folders = ("--base", str(tmp_path / "base"), "--retrained", str(tmp_path / "out"))
    main(["sample", str(RunFolder(run).samples), *folders, "--captions", "[a red circle]", *size])
    drawn = {entry["variant"]: entry for entry in json.loads((RunFolder(run).samples / "samples.json").read_text())}
    assert list(drawn) == ["base", "base-masked", "base-other-seed", "retrained", "retrained-masked"]
    assert all(drawn[name]["psnr_to_base"] < 60 for name in ("base-other-seed", "retrained"))
    assert all(drawn[name]["psnr_to_dense"] < 80 for name in ("base-masked", "retrained-masked"))
    guidance = 5.0 if family == "wan" else 6.0
    assert {entry["settings"]["guidance"] for entry in drawn.values()} == {guidance}
    assert (RunFolder(run).samples / "contact-sheet.png").stat().st_size > 10_000
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
