"""Estimates memory, operations, communication and time of a run without a GPU. docs/plan.md explains each figure."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.plan.estimates import Estimate, estimate

__all__ = ["Estimate", "estimate"]


def __getattr__(name: str) -> Any:
    # Imported late: commands without torch use `launch.plan.hardware`, and torch takes seconds to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from launch.plan import estimates

    return getattr(estimates, name)
