"""Logged figures are those of all ranks and micro-batches: the same on any number of either."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from launch.run_folder import RunFolder
from tests.support.fitted_runs import fit
from tests.support.latent_shards import write_latents
from tests.support.ranks import Ranks
from tests.support.validations import HELD_OUT, validated

VALIDATIONS = Path(__file__).parents[1] / "support" / "validations.py"


# -- validation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(whole_base, shards) -> dict[str, dict[str, float]]:
    """What one process logs, by number of held-out samples."""
    return validated(str(whole_base), str(shards), devices=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_validation_losses_are_those_of_one_process(tmp_path, whole_base, shards, alone, ranks):
    """Also where the ranks do not divide the held-out samples, or are more than these."""
    arguments = [VALIDATIONS, tmp_path, whole_base, shards, ranks]
    with Ranks(tmp_path, *[arguments] * ranks) as processes:
        assert processes.statuses() == [0] * ranks, processes.output()
        assert "It is recommended to use" not in processes.output()
    for rank in range(ranks):
        found = json.loads((tmp_path / f"validations-{rank}.json").read_text())
        assert list(found) == [str(samples) for samples in HELD_OUT]
        for samples, figures in found.items():
            assert set(figures) == {"val/loss", "val/loss_sigma_0.250", "val/loss_sigma_0.750"}
            assert figures == pytest.approx(alone[samples], rel=1e-6), samples


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, write_recipe) -> Path:
    """Six samples a step and two held-out ones, the best three checkpoints kept."""
    path = write_recipe(tmp_path_factory.mktemp("figures"), measure=False, epochs=3)
    content = yaml.safe_load(path.read_text())
    data = content["data"]["init_args"]
    del data["batch_size"]
    content["data"]["init_args"] = data | {"global_batch_size": 6, "val_samples": 2}
    content["run"] |= {"keep_best": 3, "save_every": 100}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_the_best_checkpoints_are_chosen_by_the_same_losses_on_other_ranks(recipe):
    """One epoch each on three ranks, on two and on one, with two held-out samples."""
    one = fit(recipe, "one")
    for epochs, ranks in enumerate((3, 2, 1), start=1):
        several = fit(recipe, "several", f"--trainer.max_epochs={epochs}", "--run.resume=true", ranks=ranks)

    def losses(run: RunFolder) -> list[float]:
        return [float(row["val/loss"]) for row in run.read_metrics()[1] if row.get("val/loss")]

    def best(run: RunFolder) -> dict[str, float]:
        callbacks = torch.load(run.last_checkpoint, weights_only=True)["callbacks"]
        (state,) = (state for name, state in callbacks.items() if "BestCheckpoints" in name)
        return {Path(path).name: float(score) for path, score in state["best_k_models"].items()}

    assert len(losses(several)) == 3 and len(best(several)) == 3
    assert losses(several) == pytest.approx(losses(one), rel=2e-6)
    assert sorted(best(several).values()) == pytest.approx(sorted(losses(several)), rel=1e-6)
    assert best(several) == pytest.approx(best(one), rel=2e-6)


# -- every figure of a step ------------------------------------------------------------------------------------------

STEPS, SAMPLES = 24, 4


@pytest.fixture(scope="module")
def steps_recipe(tmp_path_factory, write_recipe) -> Path:
    """32 samples to train on, three times each, one of them damaged; captions of 0 to 3 tokens."""
    folder = tmp_path_factory.mktemp("steps")
    generator = torch.Generator().manual_seed(0)
    write_latents(
        folder / "latents", [("7x32x32", 8)] * 5, channels=4, width=16,
        latent=lambda i, shape: torch.randn(shape, generator=generator),
        text=lambda i: torch.randn(i % 4, 16, generator=generator),
        spoil={5: lambda entry: entry | {"safetensors": b"damaged"}},
    )  # fmt: skip
    path = write_recipe(folder, measure=False, epochs=1)
    content = yaml.safe_load(path.read_text())
    data = content["data"]["init_args"]
    del data["batch_size"]
    data |= {"shards": str(folder / "latents"), "passes": 3, "max_fault_share": 0.5, "val_batch_size": 3}
    content["run"]["save_every"] = 100
    content["trainer"]["callbacks"] = [{"class_path": "tests.support.step_rows.StepClock"}]
    path.write_text(yaml.safe_dump(content))
    return path


def rows(recipe: Path, *, ranks: int, accumulate: int, strategy: str = "ddp") -> list[dict[str, float]]:
    """metrics.csv of a fit whose steps take `SAMPLES` samples."""
    batch = f"--data.init_args.global_batch_size={SAMPLES // accumulate}"
    accumulation = f"--trainer.accumulate_grad_batches={accumulate}"
    run = fit(recipe, f"{strategy}-{ranks}x{accumulate}", batch, accumulation, ranks=ranks, strategy=strategy)
    return [{name: float(value) for name, value in row.items() if value} for row in run.read_metrics()[1]]


@pytest.fixture(scope="module")
def accumulated(steps_recipe) -> list[dict[str, float]]:
    """The rows of one process that adds up four micro-batches of one sample."""
    return rows(steps_recipe, ranks=1, accumulate=4)


@pytest.mark.slow
def test_one_process_counts_what_its_steps_take(accumulated):
    *steps, validation = accumulated
    assert [row["step"] for row in steps] == list(range(STEPS)) and "val/loss" in validation
    assert sum(row["data/faults"] for row in steps) == 3
    bands = [sum("loss_sigma" in name for name in row) for row in steps]
    assert min(bands) < 4 and max(bands) > 1, "some bands are empty, and steps have several"
    assert steps[-1]["train/samples_per_s"] == SAMPLES  # by a clock of one second per step
    assert 2 * 2 * 2 * SAMPLES < steps[-1]["train/tokens_per_s"] < 2 * 2 * 2 * SAMPLES + 3 * SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "accumulate", "strategy"), [(2, 2, "ddp"), (4, 1, "ddp"), (2, 2, "fsdp2")], ids=["2x2", "4x1", "fsdp2"]
)
def test_figures_are_the_same_on_ranks_and_micro_batches(steps_recipe, accumulated, ranks, accumulate, strategy):
    """Every scalar of every row; rates by a clock of one second per step."""
    found = rows(steps_recipe, ranks=ranks, accumulate=accumulate, strategy=strategy)
    assert len(found) == len(accumulated)
    for row, expected in zip(found, accumulated, strict=True):
        assert row == pytest.approx(expected, rel=1e-4), expected["step"]
