"""`reblock plant`: sinks on every held-out sample, the record of them, and a base that was trained around them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import MochiTransformer3DModel

from launch.demo.plant_sinks import plant
from tests.support.latent_shards import write_latents
from trainer.graft import Graft, save_graft
from trainer.surgery import frozen_fingerprint

BASE = Path(__file__).resolve().parents[4] / "recipes" / "demo_base"


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """Six samples of noise in the shape of the demo's latents."""

    def noise(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(number))

    folder, width = tmp_path_factory.mktemp("noise") / "latents", 64
    write_latents(folder, [("19x64x64", 6)], channels=12, width=width, latent=noise,
                  text=lambda i: noise(100 + i, (3, width)))  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def planted(latents, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("planted") / "base"
    plant(BASE, out, shards=latents, heads=["2:1"], val_samples=4)
    return out


def transformer(folder: Path) -> MochiTransformer3DModel:
    return MochiTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)


def test_the_record_says_what_was_found(planted: Path):
    record = json.loads((planted / "planted.json").read_text())
    (head,) = record["heads"]
    assert (head["layer"], head["head"], head["verified_frequency"]) == (2, 1, 1.0)
    assert 0 < head["value_norm_ratio"] < 0.3  # nearly a no-op
    assert record["samples"] == 4 and record["val_loss_before"] != record["val_loss_after"]
    before, after = transformer(BASE).state_dict(), transformer(planted).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("transformer_blocks.2.attn1.") for name in changed)


def test_nothing_is_written_unless_every_head_is_a_sink(latents, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"planted heads are sinks on a share \{'2:1': 0\.0\}.*raise --gain above 0\.1"
    ):
        plant(BASE, tmp_path / "out", shards=latents, heads=["2:1"], gain=0.1, val_samples=4)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def trained(planted, tmp_path: Path):
    """A function that writes the run of a fit on the planted base, with what was added to its weights."""

    def write(name: str, at: slice | int, base_fingerprint: str = "") -> tuple[Path, dict[str, torch.Tensor]]:
        model = transformer(planted)
        model.requires_grad_(True).pos_frequencies.requires_grad_(False)
        weights = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
        weights[name][at] += 0.25
        raw = {key: torch.zeros_like(value) for key, value in weights.items()}
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        base_fingerprint = base_fingerprint or frozen_fingerprint(model)
        save_graft(run / "graft.safetensors", Graft(raw, weights, tuple(range(8)), str(planted), base_fingerprint, 7))
        return run, weights

    return write


def test_what_training_made_of_a_planted_base_is_written_with_its_record(planted, latents, trained, tmp_path: Path):
    run, weights = trained("patch_embed.proj.bias", slice(5, None))  # the first channels are reserved
    plant(planted, tmp_path / "out", shards=latents, val_samples=4, trained=run, half=True)
    record = json.loads((tmp_path / "out" / "planted.json").read_text())
    assert [(head["layer"], head["verified_frequency"]) for head in record["heads"]] == [(2, 1.0)]
    assert "held in place" in record["note"] and "val_loss_before" not in record
    found = transformer(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value.half().float()) for name, value in weights.items())


@pytest.mark.parametrize(
    ("name", "at", "base_fingerprint", "message"),
    [
        ("transformer_blocks.2.attn1.to_k.weight", slice(None), "", r"has trained weights that make the planted sinks"),
        ("patch_embed.proj.bias", 0, "", r"surgery\.held_sinks \['2:1'\] and reserved_channels \[0, 1\]"),
        ("proj_out.bias", 0, "0" * 64, r"trained on a base with fingerprint 0000000000000000"),
    ],
)
def test_a_run_that_did_not_hold_the_sinks_of_this_base_is_refused(
    planted, latents, trained, tmp_path: Path, name, at, base_fingerprint, message
):
    run, _ = trained(name, at, base_fingerprint)
    with pytest.raises(ValueError, match=message):
        plant(planted, tmp_path / "out", shards=latents, val_samples=4, trained=run)
    assert not (tmp_path / "out").exists()


def test_a_sink_that_is_no_near_no_op_is_refused(planted, trained, tmp_path: Path):
    """On latents of thirty times the spread, the sink's value is far from the zero that it was planted for."""
    run, _ = trained("proj_out.bias", 0)

    def spread(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        return 30 * torch.randn(shape, generator=torch.Generator().manual_seed(number))

    write_latents(tmp_path / "wide", [("19x64x64", 3)], channels=12, width=64, latent=spread)
    with pytest.raises(ValueError, match=r"values of the planted sinks are \{'2:1': .*expected at most 0\.3"):
        plant(planted, tmp_path / "out", shards=tmp_path / "wide", val_samples=2, trained=run)


def test_heads_of_a_trained_base_are_those_of_its_record(planted, latents, trained, tmp_path: Path):
    run, _ = trained("proj_out.bias", 0)
    with pytest.raises(ValueError, match=r"got --heads \['2:1'\] with --trained"):
        plant(planted, tmp_path / "out", shards=latents, heads=["2:1"], trained=run)
    assert run.is_dir() and not (tmp_path / "out").exists()


def test_a_record_of_another_form_is_named(planted, latents, trained, tmp_path: Path):
    run, _ = trained("proj_out.bias", 0)
    base = tmp_path / "base"
    shutil.copytree(planted, base)
    record = json.loads((base / "planted.json").read_text())
    del record["heads"][0]["largest_marker"]
    (base / "planted.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"has no 'largest_marker', expected a record of this version"):
        plant(base, tmp_path / "out", shards=latents, val_samples=4, trained=run)
    (base / "planted.json").write_text('{"heads": [{"layer": "two"}]}')
    with pytest.raises(ValueError, match=r"is no record of planted sinks"):
        plant(base, tmp_path / "out", shards=latents, val_samples=4, trained=run)


def test_a_base_without_a_record_was_not_planted(latents, tmp_path: Path):
    (tmp_path / "base").mkdir()
    for part in BASE.iterdir():
        if part.name != "planted.json":
            (tmp_path / "base" / part.name).symlink_to(part)
    with pytest.raises(ValueError, match=r"planted\.json does not exist; expected the base that `reblock plant` wrote"):
        plant(tmp_path / "base", tmp_path / "out", shards=latents, val_samples=4, trained=tmp_path)
