"""Figures of an optimiser step, over its micro-batches and all ranks.

Legend: B batch.
"""

import torch
from torch import Tensor

from data.batch import Batch
from trainer.rank_sums import RankSums

#: Edges of the sigma bands that the loss is reported in.
SIGMA_BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)

_BANDS = tuple(zip(SIGMA_BANDS[:-1], SIGMA_BANDS[1:], strict=True))
#: Names of the losses: over all samples, and over those of each sigma band.
LOSSES = ("train/loss", *(f"train/loss_sigma_{low:.2f}-{high:.2f}" for low, high in _BANDS))
#: Names of the counts: samples, tokens that pass through the blocks, damaged samples that were skipped.
COUNTS = ("samples", "tokens", "faults")


def tokens_of(batch: Batch, patch: tuple[int, int, int]) -> int:
    """Number of tokens of a batch that pass through the blocks: vision tokens and valid text tokens."""
    _, frames, height, width = batch.latents.shape[1:]
    return len(batch) * (frames // patch[0]) * (height // patch[1]) * (width // patch[2]) + sum(batch.text_lengths)


class StepFigures:
    """Adds up the micro-batches of an optimiser step. No method waits for the device."""

    def __init__(self) -> None:
        self._sums = RankSums((*COUNTS, *(f"samples of {name}" for name in LOSSES), *LOSSES))
        #: Number of micro-batches that were added since the last step.
        self.micro_batches = 0

    def restart(self) -> None:
        """Drops what was added, after a step that was interrupted."""
        self._sums.reset()
        self.micro_batches = 0

    def add(self, losses: Tensor, sigma: Tensor, *, tokens: int, faults: int) -> None:
        """Adds a micro-batch.

        Args:
            losses: (B,) loss of each sample.
            sigma: (B,) noise levels, on the host.
            tokens: number of tokens of the batch.
            faults: number of damaged samples that were skipped for the batch.
        """
        bands = [(sigma >= low) & (sigma < high) for low, high in _BANDS]
        inside = torch.stack([torch.ones_like(sigma, dtype=torch.bool), *bands])
        counts = torch.tensor([len(sigma), tokens, faults, *inside.sum(dim=1).tolist()], dtype=torch.float64)
        # Infinity times zero is NaN, which would spoil the other bands.
        sums = torch.where(inside.to(losses.device, non_blocking=True), losses.double(), 0.0).sum(dim=1)
        self._sums.add(torch.cat([counts.to(losses.device, non_blocking=True), sums]))
        self.micro_batches += 1

    def finish(self, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean losses and counts of the step, the same on every rank; starts the next step. Collective.

        Returns:
            Losses by the names of `LOSSES`, each () float32, NaN if the band has no sample; counts by the names of
            `COUNTS`, each () float64.
        """
        sums = self._sums.over_ranks(device)
        self.micro_batches = 0
        losses = {name: (sums[name] / sums[f"samples of {name}"]).float() for name in LOSSES}
        return losses, {name: sums[name] for name in COUNTS}
