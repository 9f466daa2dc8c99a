"""What a recipe schedules against the length of the run."""

import warnings

import pytest

from trainer.distillation import FLOW_ALONE, ObjectivePhase
from trainer.optimizer import OptimConfig
from trainer.schedule import warn_of_unreached

PHASES = (ObjectivePhase(blocks=1.0, steps=6), ObjectivePhase(flow=1.0))


@pytest.mark.parametrize(
    ("phases", "optim", "steps", "said"),
    [
        (PHASES, {}, 6, "got model.objective with 6 steps before its last phase in a run of 6 steps"),
        (PHASES, {}, 7, ""),
        (PHASES, {}, float("inf"), ""),
        (FLOW_ALONE, {}, 1, ""),
        (FLOW_ALONE, {"warmup_steps": 50}, 10, ""),
        (FLOW_ALONE, {"warmup_steps": 4, "decay_steps": 7}, 10, "warmup_steps 4 and decay_steps 7 in a run of 10"),
        (FLOW_ALONE, {"warmup_steps": 4, "decay_steps": 6}, 10, ""),
    ],
)
def test_what_a_run_does_not_reach_is_said(phases, optim, steps, said):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_unreached(phases, OptimConfig(**optim), steps)
    assert [said in str(warning.message) for warning in seen] == [True] * bool(said)


def test_a_fit_says_so(make_module, make_batch, fit):
    with pytest.warns(UserWarning, match="6 steps before its last phase in a run of 2 steps"):
        fit(make_module(objective=PHASES), [make_batch()] * 2)
