"""Sampling schedules of families, as distributions of sigma."""

import torch
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from torch import Tensor


def linear_quadratic(u: Tensor, steps: int = 64, threshold: float = 0.025) -> Tensor:
    """Sigma at places u in [0, 1] along Mochi's own sampling steps, from 1 at u = 0.

    It is linear between the steps, so that every sigma can be met.
    """
    knots = torch.tensor([*linear_quadratic_schedule(steps, threshold), 0.0], dtype=torch.float32)
    position = u * steps
    left = position.long().clamp(max=steps - 1)
    return torch.lerp(knots[left], knots[left + 1], position - left)
