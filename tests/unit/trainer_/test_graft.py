"""Grafts: round trip, refusal of what does not fit, and reading a base's own blocks."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from trainer.graft import Graft, apply_graft, base_block_weights, load_graft, save_graft
from trainer.models.load import load_transformer


def block(model, index):
    prefix = f"transformer_blocks.{index}."
    return {name: p for name, p in model.named_parameters() if name.startswith(prefix)}


@pytest.fixture
def graft(make_transformer):
    return Graft(
        raw=block(make_transformer(1), 2), ema=block(make_transformer(2), 2), blocks=(2,), base="some/base",
        base_fingerprint="f" * 64, step=12, trunk_dtype="bfloat16",
    )  # fmt: skip


def test_round_trip(graft, tmp_path):
    path = tmp_path / "graft.safetensors"
    save_graft(path, graft)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    got = load_graft(path)
    for part in ("raw", "ema"):
        assert getattr(got, part).keys() == getattr(graft, part).keys()
        assert all(torch.equal(value, getattr(graft, part)[name]) for name, value in getattr(got, part).items())
    plain = [f.name for f in dataclasses.fields(Graft) if f.name not in ("raw", "ema")]
    assert [getattr(got, name) for name in plain] == [getattr(graft, name) for name in plain]


def test_a_failed_write_leaves_the_old_graft(graft, tmp_path, monkeypatch):
    path = tmp_path / "graft.safetensors"
    save_graft(path, graft)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("trainer.graft.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_graft(path, dataclasses.replace(graft, step=13))
    assert path.read_bytes() == before


def test_applying_changes_those_blocks_only(graft, make_transformer):
    model, before = make_transformer(0), dict(make_transformer(0).named_parameters())
    apply_graft(model, graft.ema)
    for name, value in model.named_parameters():
        assert torch.equal(value, graft.ema.get(name, before[name])), name


def test_what_does_not_fit_is_refused_and_nothing_is_copied(graft, make_transformer):
    model = make_transformer(0, num_layers=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mixed = {**block(make_transformer(5), 0), **graft.raw}
    with pytest.raises(ValueError, match=r"transformer_blocks\.2\..*no such parameter"):
        apply_graft(model, mixed)
    other = make_transformer(0, pooled_projection_dim=12)
    with pytest.raises(ValueError, match=r"does not fit the base .shape"):
        apply_graft(other, graft.raw)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_files_that_are_no_graft(graft, tmp_path):
    path = tmp_path / "graft.safetensors"
    with pytest.raises(ValueError, match=r"does not exist; expected the graft\.safetensors"):
        load_graft(path)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"is not a graft .format None"):
        load_graft(path)
    save_graft(path, graft)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_graft(path)


def test_own_blocks_of_a_base(base_folder, config_json, make_transformer, tmp_path):
    names = block(make_transformer(), 1)
    make_transformer(seed=7).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    for base in (base_folder, tmp_path / "sharded"):
        got = base_block_weights(str(base), names)
        want = block(load_transformer(str(base)), 1)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for dtype in (torch.float32, torch.bfloat16):
        got = base_block_weights(str(config_json), names, seed=4, dtype=dtype)
        want = block(load_transformer(str(config_json), seed=4, dtype=dtype), 1)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
