"""The random parts of the objective: sigma, noise, and which captions are left out.

What noise does to a latent and what is predicted of it are the family's: `trainer.models.process`. Everything random is
keyed by (seed, epoch, sample), never by rank or worker, and drawn on the CPU, so that it is the same whatever the
layout or device.

Legend: B batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainer.models.schedules import linear_quadratic

SigmaSampler = Literal["uniform", "logit_normal", "linear_quadratic"]


def _generator(purpose: str, seed: int, epoch: int, uid: int) -> np.random.Generator:
    """A generator of its own for each (purpose, seed, epoch, sample).

    Philox takes a key of 128 bits. torch's CPU generator keeps 32 bits of its seed, so that among a million samples
    over a hundred pairs would share their noise.
    """
    digest = hashlib.blake2b(f"{purpose}/{seed}/{epoch}/{uid}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def keyed_noise(seed: int, epoch: int, uids: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), float32 on the CPU, one generator per sample."""
    rows = [_generator("noise", seed, epoch, uid).standard_normal(tuple(shape), dtype=np.float32) for uid in uids]
    return torch.from_numpy(np.stack(rows))


def keyed_uniform(purpose: str, seed: int, epoch: int, uids: Sequence[int]) -> Tensor:
    """One draw from U(0, 1) per sample, (B,) float32 on the CPU."""
    return torch.tensor([_generator(purpose, seed, epoch, uid).random(dtype=np.float32) for uid in uids])


def _uniform(u: Tensor) -> Tensor:
    return u


def _logit_normal(u: Tensor) -> Tensor:
    # u -> standard normal by its quantile function, so that every sampler maps one uniform draw.
    return torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


_SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "linear_quadratic": linear_quadratic,
}


class Flow:
    """The objective's random parts.

    Args:
        sigma: distribution of sigma: `uniform` on (0, 1), `logit_normal` (sigmoid of a standard normal), or
            `linear_quadratic` (Mochi's 64-step sampling schedule, threshold 0.025).
        sigma_shift: c > 0 of s <- c s / (1 + (c - 1) s), applied to what `sigma` draws: the time shift of Esser et al.,
            "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024), eq. 23. 1 changes nothing.
        caption_dropout: share of samples trained without their caption.
        seed: for sigma, noise and dropout.
    """

    def __init__(
        self,
        *,
        sigma: SigmaSampler = "uniform",
        sigma_shift: float = 1.0,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        if sigma not in _SAMPLERS:
            raise ValueError(f"got sigma sampler {sigma!r}, expected one of {sorted(_SAMPLERS)}.")
        if not 0.0 <= caption_dropout <= 1.0:
            raise ValueError(f"got caption_dropout {caption_dropout}, expected a share from 0 to 1.")
        if not 0.0 < sigma_shift < float("inf"):
            raise ValueError(f"got sigma_shift {sigma_shift}, expected a number above 0; 1 shifts nothing.")
        self.sampler = _SAMPLERS[sigma]
        self.sigma_shift = sigma_shift
        self.caption_dropout = caption_dropout
        self.seed = seed

    def sigma(self, epoch: int, uids: Sequence[int]) -> Tensor:
        """Sigma per sample, (B,) float32 on the CPU."""
        sigma = self.sampler(keyed_uniform("sigma", self.seed, epoch, uids))
        return self.sigma_shift * sigma / (1 + (self.sigma_shift - 1) * sigma)

    def noise(self, epoch: int, uids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Noise (B, *shape), float32 on the CPU."""
        return keyed_noise(self.seed, epoch, uids, shape)

    @staticmethod
    def held_out_noise(uids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Noise of validation, (B, *shape): the same in every epoch and in runs of all seeds, which it compares."""
        return keyed_noise(0, 0, uids, shape)

    def dropped(self, epoch: int, uids: Sequence[int]) -> list[bool]:
        """Which samples lose their caption, on the host."""
        return (keyed_uniform("caption", self.seed, epoch, uids) < self.caption_dropout).tolist()
