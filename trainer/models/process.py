"""What noise does to a latent, and what a model predicts of it: one class for each way in which families are trained.

Legend: B batch.
"""

from typing import Protocol

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor


class Process(Protocol):
    """Noise level sigma runs from 0, the data or the least noise of the family, to 1, pure noise."""

    def mix(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noisy latent (B, ...) at sigma (B,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """What the model is trained to predict at sigma (B,), (B, ...)."""
        ...

    def timestep(self, sigma: Tensor) -> Tensor:
        """What the model is told of sigma (B,), in float32: bfloat16 would round it to multiples of 4 near 1000."""
        ...


def _over(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma (B,), to be broadcast over the other axes of `like` (B, ...)."""
    return sigma.view(-1, *[1] * (like.ndim - 1))


class RectifiedFlow:
    """x_sigma = (1 - sigma) z + sigma eps.

    Args:
        towards_data: whether the model predicts z - eps and is told 1000 (1 - sigma), as Mochi; otherwise it predicts
            eps - z and is told 1000 sigma.
    """

    def __init__(self, *, towards_data: bool) -> None:
        self.towards_data = towards_data

    def mix(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x_sigma = (1 - sigma) z + sigma eps."""
        sigma = _over(sigma, latents)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The velocity: data minus noise, or noise minus data."""
        return latents - noise if self.towards_data else noise - latents

    def timestep(self, sigma: Tensor) -> Tensor:
        """1000 (1 - sigma), or 1000 sigma."""
        return 1000.0 * (1.0 - sigma.float()) if self.towards_data else 1000.0 * sigma.float()


class DiscreteVelocity:
    """x = sqrt(a) z + sqrt(1 - a) eps on 1,000 levels t, the last of which is pure noise; v-prediction (CogVideoX).

    sigma stands for the level t = floor(1000 sigma), at most 999. Level 0 is not the data: its noise has a standard
    deviation of 0.050 at a shift of 3, of 0.029 at 1. The authors' loss, that of x0 weighted by 1 / (1 - a), is the
    mean squared error of v.

    Args:
        shift: divides the signal-to-noise ratio of the schedule (`snr_shift_scale`).
    """

    def __init__(self, shift: float) -> None:
        schedule = CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
            snr_shift_scale=shift,
        )  # fmt: skip
        #: a of each level. Numbers: a tensor that was made under a fake or inference mode would stay of that mode.
        self.signal: list[float] = schedule.alphas_cumprod.tolist()

    def _level(self, sigma: Tensor) -> Tensor:
        return (1000.0 * sigma.float()).long().clamp(max=999)

    def _roots(self, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a), to be broadcast over `like`."""
        signal = torch.tensor(self.signal).to(sigma.device, non_blocking=True)[self._level(sigma)]
        return _over(signal.sqrt(), like), _over((1 - signal).sqrt(), like)

    def mix(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """sqrt(a) z + sqrt(1 - a) eps."""
        signal, spread = self._roots(sigma, latents)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """v = sqrt(a) eps - sqrt(1 - a) z."""
        signal, spread = self._roots(sigma, latents)
        return signal * noise - spread * latents

    def timestep(self, sigma: Tensor) -> Tensor:
        """t, as float32."""
        return self._level(sigma).float()
