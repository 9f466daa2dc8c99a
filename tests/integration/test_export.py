"""From a fit to a pipeline folder: the same weights give the same numbers, through diffusers' own loader."""

import contextlib
import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import MochiPipeline
from diffusers.models.transformers.transformer_mochi import MochiAttnProcessor2_0

from launch.export import export
from launch.fit.cli import recipe_cli
from trainer.graft import load_graft
from trainer.models.captions import Captions
from trainer.models.load import load_transformer
from trainer.models.mochi import SplitMochi


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, write_recipe):
    """(module after a tiny fit, its run folder)."""
    folder = tmp_path_factory.mktemp("fitted")
    recipe = write_recipe(folder, measure=False, epochs=1)
    cli = recipe_cli(["fit", "--config", str(recipe)], run=True)
    return cli.model, folder / "runs" / "tiny"


def stock(model, batch):
    """Velocity by diffusers' own forward."""
    with torch.no_grad():
        return model(
            hidden_states=batch.latents, encoder_hidden_states=batch.text, timestep=torch.tensor([100.0, 700.0]),
            encoder_attention_mask=batch.text_mask, return_dict=False,
        )[0]  # fmt: skip


def velocity(split_model: SplitMochi, batch):
    """Velocity by a `SplitMochi`."""
    with torch.no_grad():
        state = split_model.embed(batch.latents, torch.tensor([100.0, 700.0]), Captions.of(batch))
        return split_model.finish(split_model.run(state, 0, split_model.num_blocks))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_diffusers_loads_exactly_what_was_trained(fitted, whole_base, make_batch, tmp_path, weights):
    module, run = copy.deepcopy(fitted[0]), fitted[1]
    live = module.retrained_parameters()
    export(run, tmp_path / "out", weights=weights)
    whole = MochiPipeline.from_pretrained(tmp_path / "out")
    # torch's CPU kernels may add in another order for weights at other offsets, or that take no gradient.
    module.split_model.transformer.requires_grad_(False)
    whole.transformer.requires_grad_(False)
    for p in (*whole.transformer.parameters(), *module.split_model.transformer.parameters()):
        p.data = p.data.clone()
    trained = module.ema.average if weights == "ema" else live
    exported = whole.transformer.state_dict()
    base = load_transformer(str(whole_base)).state_dict()
    assert {n for n, value in exported.items() if not torch.equal(value, base[n])} <= set(trained)
    assert all(torch.equal(exported[name], value) for name, value in trained.items())
    assert any(not torch.equal(value, base[name]) for name, value in trained.items())
    batch = make_batch([3, 2], grid=(2, 4, 4))
    expected = stock(whole.transformer, batch)
    module.eval()
    with module.evaluation_weights() if weights == "ema" else contextlib.nullcontext():
        own = velocity(module.split_model, batch)
        model = copy.deepcopy(module.split_model.transformer)
        for block in model.transformer_blocks:
            block.attn1.processor = MochiAttnProcessor2_0()
        got = velocity(SplitMochi(model, stock_attention=True), batch)
        assert torch.equal(got, expected), "diffusers' own attention on both sides"
    assert torch.equal(velocity(SplitMochi(whole.transformer), batch), own), "ours on both sides"
    other = module.ema.average if weights == "raw" else live
    assert any(not torch.equal(exported[name], value) for name, value in other.items())
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (whole_base / part).rglob("*"):
            assert (tmp_path / "out" / file.relative_to(whole_base)).read_bytes() == file.read_bytes()


def test_another_base_is_refused(fitted, whole_base, make_transformer, tmp_path):
    make_transformer(11).save_pretrained(tmp_path / "other" / "transformer")
    with pytest.raises(ValueError, match=r"trained on a base with fingerprint .* give its own base with --base"):
        export(fitted[1], tmp_path / "out", base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(fitted, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out exists; expected a new folder"):
        export(fitted[1], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_run_without_a_graft_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"graft\.safetensors"):
        export(tmp_path, tmp_path / "out")


def test_what_an_interrupted_export_left_is_replaced(fitted, tmp_path):
    left = tmp_path / "out.partial" / "transformer"
    left.mkdir(parents=True)
    (left / "stale.safetensors").write_bytes(b"half")
    export(fitted[1], tmp_path / "out")
    assert not (tmp_path / "out.partial").exists() and not list((tmp_path / "out").rglob("stale*"))
    shutil.rmtree(tmp_path / "out")


def test_the_graft_holds_both_weights_of_every_retrained_parameter(fitted):
    module, run = fitted
    graft = load_graft(run / "graft.safetensors")
    assert set(graft.raw) == set(graft.ema) == set(module.retrained_parameters())
    assert graft.blocks == (1, 2) and graft.step == 8
    assert Path(graft.base).is_dir()
