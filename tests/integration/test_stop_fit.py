"""A `reblock fit` that is signalled: it ends between two steps, and goes on to the losses it would have had."""

import signal
from pathlib import Path

import pytest
import torch

from tests.integration.test_fit_resume import rows_of, same
from tests.ranks import Ranks, reblock

pytestmark = pytest.mark.slow


def start(folder: Path, write_recipe, *options: str, ranks: int = 1, workers: int = 0, **how) -> Ranks:
    recipe = write_recipe(folder, workers=workers)
    batch = ["--data.batch_size", str(4 // ranks)]
    return reblock(folder, "fit", "--config", recipe, "--run.resume", "true", *batch, *options, ranks=ranks, **how)


def has_step(run: Path, step: int) -> bool:
    return any(int(row["step"]) >= step for row in rows_of(run) if "train/loss" in row)


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, tmp_path_factory, write_recipe):
    """(number of ranks, run folder of a whole fit)"""
    folder = tmp_path_factory.mktemp("undisturbed")
    with start(folder, write_recipe, ranks=request.param) as ranks:
        assert ranks.statuses() == [0] * request.param, ranks.said()
    return request.param, folder / "runs" / "tiny"


@pytest.mark.parametrize("name, status", [("SIGUSR1", 75), ("SIGTERM", 143)])
def test_a_signalled_fit_goes_on_where_it_stopped(tmp_path, write_recipe, undisturbed, name, status):
    world, whole = undisturbed
    run = tmp_path / "runs" / "tiny"
    with start(tmp_path, write_recipe, ranks=world, workers=1) as ranks:
        ranks.until(lambda: has_step(run, 2))
        ranks.send(signal.Signals[name], world - 1)
        ranks.send(signal.Signals[name], world - 1)  # a second one changes nothing
        assert ranks.statuses() == [status] * world, ranks.said()
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"after step {step}" in ranks.said() or "older" in ranks.said(), (step, ranks.said())
    with start(tmp_path, write_recipe, ranks=world, workers=1) as ranks:
        assert ranks.statuses() == [0] * world, ranks.said()
    same(run, whole)
