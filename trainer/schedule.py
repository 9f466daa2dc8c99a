"""The length of a run against what its recipe schedules: phases of the objective, warmup and decay of the rate."""

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from trainer.distillation import ObjectivePhase
from trainer.optimizer import OptimConfig


def check_end(optim: OptimConfig, trainer: Trainer) -> None:
    """Checks that a run whose rate decays has an end.

    Raises:
        ValueError: if it has none.
    """
    if optim.decay_steps and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ValueError(
            f"got model.optim.decay_steps {optim.decay_steps} in a run without end, expected "
            "trainer.max_epochs or trainer.max_steps: the rate is to fall until the end."
        )


def warn_of_unreached(phases: Sequence[ObjectivePhase], optim: OptimConfig, run_steps: float) -> None:
    """Warns of a phase that the run does not come to, and of a learning rate that it does not reach.

    No error, since a run may be extended later.

    Args:
        phases: of the objective.
        optim: the schedule of the learning rate.
        run_steps: optimiser steps of the whole run.
    """
    before_last = sum(phase.steps or 0 for phase in phases)
    if before_last >= run_steps:
        rank_zero_warn(
            f"got model.objective with {before_last} steps before its last phase in a run of {run_steps:.0f} steps: "
            "the last phase is not reached. Shorten the phases before it, or train longer."
        )
    if optim.decay_steps and optim.warmup_steps + optim.decay_steps > run_steps:
        rank_zero_warn(
            f"got model.optim.warmup_steps {optim.warmup_steps} and decay_steps {optim.decay_steps} in a run of "
            f"{run_steps:.0f} steps: the rate falls before it has reached lr {optim.lr:g}. Shorten them, or train "
            "longer."
        )
