"""The analysis of docs/experiments: its interval, and that the document holds the table of its committed figures."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.graft import load_graft

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "experiments"
PIECES = {name: json.loads((FOLDER / name).read_text()) for name in ("natural-defects.json", "natural-defects-2.json")}


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def analysis():
    return script("natural_defects")


def masking(increase: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays of one scope and two ratios; the dense loss is 2 everywhere, `increase` (P, S) comes on top at 0.9."""
    dense = np.full(increase.shape, 2.0)
    loss = np.stack([dense, dense + increase], axis=-1)[:, :, None]
    ratios, scopes = np.array([0.5, 0.9]), np.array(["all"])
    return {"ratios": ratios, "scopes": scopes, "dense_loss_by_probe": dense, "loss_by_probe": loss}


def test_what_is_the_same_for_every_prompt_has_no_interval(analysis):
    # Sigmas of one prompt are drawn together, so that a spread over sigmas alone adds none.
    arrays = masking(np.tile([0.0, 0.2], (8, 1)))
    assert analysis.relative_increase(arrays, "all", 0.9) == pytest.approx((0.05, 0.05, 0.05))
    assert analysis.relative_increase(arrays, "all", 0.5) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_a_mean_over_prompts(analysis):
    increase = np.random.default_rng(1).normal(0.1, 0.04, size=(400, 1)).repeat(2, axis=1)
    value, low, high = analysis.relative_increase(masking(increase), "all", 0.9)
    assert value == pytest.approx(increase.mean() / 2)
    half = 1.96 * increase[:, 0].std() / 20 / 2
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.1)


@pytest.mark.parametrize("runs", PIECES.values(), ids=PIECES)
def test_the_document_holds_the_table_of_the_committed_figures(analysis, runs):
    assert analysis.table(runs) in (FOLDER / "natural-defects.md").read_text()


@pytest.mark.parametrize("runs", PIECES.values(), ids=PIECES)
def test_the_figure_shows_every_run(analysis, runs):
    drawn = analysis.figure(runs)
    assert len(drawn.axes) == 4
    names = {text.get_text().split(",")[0] for axes in drawn.axes for text in axes.get_legend().get_texts()}
    assert names == {run["run"] for run in runs}


def test_the_document_holds_the_distances_of_the_committed_samples():
    samples = script("natural_samples")
    table = samples.table(samples.read(FOLDER / "natural-samples-2.json"))
    assert table in (FOLDER / "natural-defects.md").read_text()


def test_averaged_weights_survive_the_way_through_a_file(tmp_path):
    weights = script("natural_weights")
    average = {"transformer_blocks.3.ff.net.2.weight": torch.tensor([[1.0, -0.5]])}
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save({"global_step": 7, "reblock": {"ema": {"average": average}}}, checkpoints / "last.ckpt")
    weights.store(tmp_path / "run", tmp_path / "weights.safetensors")
    weights.restore(tmp_path / "weights.safetensors", tmp_path / "again")
    graft = load_graft(tmp_path / "again" / "graft.safetensors")
    assert (graft.step, graft.blocks) == (7, (3,))
    torch.testing.assert_close(dict(graft.ema), average)
