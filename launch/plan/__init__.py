"""What a run will take, before a GPU is asked for. How each figure is reached: docs/plan.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.plan.estimates import Estimate, estimate

__all__ = ["Estimate", "estimate"]


def __getattr__(name: str) -> Any:
    # Late: `launch.plan.hardware` serves commands that need no torch, which takes seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from launch.plan import estimates

    return getattr(estimates, name)
