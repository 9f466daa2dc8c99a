"""Inputs of the attention benchmark, and errors of its results against attention weights in float64.

The reference computes the weights of one slice of queries at a time, so it supports any number of tokens.

Legend: N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention import EPS
from trainer.attention import dense as reference

RATIOS = tuple(tenth / 10 for tenth in range(1, 10))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Number of float64 weights in a slice: 32 MiB on a CPU, 256 MiB on CUDA.
_SLICE = {"cpu": 2**22, "cuda": 2**25}
#: Range of the standard deviations of the heads' logits, evenly spaced; the first head is the flattest.
_SPREAD = (1.0, 5.0)


@dataclass(frozen=True)
class AttentionInputs:
    """q, k, v (1, h, N, d), and the thresholds (1, h) for masking."""

    q: Tensor
    k: Tensor
    v: Tensor
    thresholds: Tensor


def make_inputs(tokens: int, heads: int, head_dim: int, dtype: str, device: str) -> AttentionInputs:
    """Creates random heads from flat to peaked; the thresholds are the expected medians of their weights."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, head_dim, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(3)
    )
    spread = torch.linspace(*_SPREAD, heads + 2, device=device)[1:-1]
    q *= spread[:, None, None]
    # The weights of a row are log-normal: exp(x) divided by a sum of N values with mean exp(spread^2 / 2).
    return AttentionInputs(q, k, v, (-spread.square() / 2).exp()[None] / tokens)


def errors(
    x: AttentionInputs, mass: Tensor, counts: Tensor, thresholds: Tensor, out: Tensor, dense: Tensor
) -> dict[str, float]:
    """Errors of results against those of float64 weights.

    Args:
        x: inputs of the results.
        mass: column sums, (1, h, N).
        counts: counts for each of `EPS`, (1, h, E, N).
        thresholds: thresholds at `RATIOS`, (1, h, R).
        out: attention output masked at x.thresholds, (1, h, N, d).
        dense: dense attention output, (1, h, N, d).

    Returns:
        `sums`: largest relative error of a column sum. `counts`: sum of the differences in counts, without weights
        within 1e-6 of an eps. `rank`: realised minus wanted share below a threshold, the value furthest from 0.
        `output`: largest absolute error of the masked output, without rows that have a weight within a relative 1e-6
        of the threshold, where rounding decides. `dense`: largest absolute error of the dense output, over all rows.
    """
    _, heads, tokens, _ = x.q.shape
    rows = max(1, _SLICE[x.q.device.type] // (heads * tokens))
    true_mass, true_counts = torch.zeros_like(mass, dtype=torch.float64), torch.zeros_like(counts)
    near, below = torch.zeros_like(counts), torch.zeros_like(thresholds, dtype=torch.float64)
    worst, worst_dense = torch.zeros(2, dtype=torch.float64, device=x.q.device)
    limit = x.thresholds.double()[..., None, None]
    for start in range(0, tokens, rows):
        here = slice(start, start + rows)
        weights = reference.attention_weights(x.q[:, :, here], x.k)
        part, above = reference.key_statistics(weights, EPS)
        true_mass += part
        true_counts += above
        for index, eps in enumerate(EPS):
            near[:, :, index] += ((weights - eps).abs() <= 1e-6).sum(dim=-2, dtype=torch.int32)
        for index in range(len(RATIOS)):
            below[..., index] += (weights < thresholds[..., index, None, None].double()).sum(dim=(-1, -2))
        wanted = reference.masked_attention(weights, x.v, x.thresholds)[0]
        clear = ((weights - limit).abs() > 1e-6 * limit).all(dim=-1, keepdim=True)
        worst = torch.maximum(worst, torch.where(clear, (out[:, :, here] - wanted).abs(), 0.0).amax())
        worst_dense = torch.maximum(worst_dense, (dense[:, :, here] - weights @ x.v.double()).abs().amax())
    share = (below / tokens**2 - torch.tensor(RATIOS, dtype=torch.float64, device=below.device)).flatten()
    return {
        "sums": float(((mass - true_mass) / true_mass).abs().amax()),
        "counts": float(((counts - true_counts).abs() - near).clamp(min=0).sum()),
        "rank": float(share[share.abs().argmax()]),
        "output": float(worst),
        "dense": float(worst_dense),
    }
