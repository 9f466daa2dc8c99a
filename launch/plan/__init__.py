"""What a run will take, before a GPU is asked for. How each figure is reached: docs/plan.md."""

from launch.plan.result import Estimate, estimate

__all__ = ["Estimate", "estimate"]
