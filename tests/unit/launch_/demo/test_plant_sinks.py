"""`reblock plant`: sinks on every held-out sample, the record of them, and a base that was trained around them."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import MochiTransformer3DModel

from launch.demo.plant_sinks import plant
from tests.support.latent_shards import write_latents
from trainer.graft import Graft, save_graft

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


def test_what_training_made_of_a_planted_base_is_written_with_its_record(planted, latents, tmp_path: Path):
    weights = {name: value.clone() for name, value in transformer(planted).named_parameters()}
    weights["patch_embed.proj.bias"][5:] += 0.25  # the first channels are reserved
    run = tmp_path / "run"
    run.mkdir()
    raw = {name: torch.zeros_like(value) for name, value in weights.items()}
    save_graft(run / "graft.safetensors", Graft(raw, weights, tuple(range(8)), str(planted), "0" * 64, 7))
    plant(planted, tmp_path / "out", shards=latents, val_samples=4, trained=run, half=True)
    record = json.loads((tmp_path / "out" / "planted.json").read_text())
    assert [(head["layer"], head["verified_frequency"]) for head in record["heads"]] == [(2, 1.0)]
    assert "held in place" in record["note"] and "val_loss_before" not in record
    found = transformer(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], value.half().float()) for name, value in weights.items())
    # A training that lost the sink is refused.
    weights["transformer_blocks.2.attn1.to_k.weight"].zero_()
    save_graft(run / "graft.safetensors", Graft(raw, weights, tuple(range(8)), str(planted), "0" * 64, 7))
    with pytest.raises(ValueError, match="planted heads are sinks on a share"):
        plant(planted, tmp_path / "lost", shards=latents, val_samples=4, trained=run)


def test_a_base_without_a_record_was_not_planted(latents, tmp_path: Path):
    (tmp_path / "base").mkdir()
    for part in BASE.iterdir():
        if part.name != "planted.json":
            (tmp_path / "base" / part.name).symlink_to(part)
    with pytest.raises(ValueError, match=r"planted\.json does not exist; expected the base that `reblock plant` wrote"):
        plant(tmp_path / "base", tmp_path / "out", shards=latents, val_samples=4, trained=tmp_path)
