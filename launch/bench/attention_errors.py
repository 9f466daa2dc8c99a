"""Inputs of the attention benchmark, and how far its results are from attention weights in float64.

The reference holds the weights of a slice of queries at a time, so that any number of tokens can be compared.

Legend: N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention import EPS
from trainer.attention import dense as reference

RATIOS = tuple(tenth / 10 for tenth in range(1, 10))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Weights of a slice of the float64 comparison: 32 MiB on a CPU, 256 MiB on CUDA.
_SLICE = {"cpu": 2**22, "cuda": 2**25}
#: Standard deviations of the heads' logits lie between these, evenly spaced: the first head is the flattest.
_SPREAD = (1.0, 5.0)


@dataclass(frozen=True)
class AttentionInputs:
    """q, k, v (1, h, N, d), and the thresholds (1, h) of the masking."""

    q: Tensor
    k: Tensor
    v: Tensor
    thresholds: Tensor


def make_inputs(tokens: int, heads: int, head_dim: int, dtype: str, device: str) -> AttentionInputs:
    """Random heads from flat to peaked; the thresholds are the expected medians of their weights."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, tokens, head_dim, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(3)
    )
    spread = torch.linspace(*_SPREAD, heads + 2, device=device)[1:-1]
    q *= spread[:, None, None]
    # The weights of a row are log-normal: exp(x) over a sum of N whose mean is exp(spread^2 / 2).
    return AttentionInputs(q, k, v, (-spread.square() / 2).exp()[None] / tokens)


def errors(
    x: AttentionInputs, mass: Tensor, counts: Tensor, thresholds: Tensor, out: Tensor, dense: Tensor
) -> dict[str, float]:
    """How far results are from those of weights in float64.

    Args:
        x: what they were computed from.
        mass: (1, h, N) column sums.
        counts: (1, h, E, N) of `EPS`.
        thresholds: (1, h, R) of `RATIOS`.
        out: (1, h, N, d) attention masked at x.thresholds.
        dense: (1, h, N, d) attention.

    Returns:
        `sums`, largest relative error of a column sum; `counts`, sum of the differences in counts beyond the weights
        within 1e-6 of an eps; `rank`, realised minus wanted share below a threshold, the one furthest from 0;
        `output`, largest absolute error of an entry of the masked output, over rows of which no weight lies within
        1e-6, relative, of the threshold: rounding decides there; `dense`, that of the dense output, over all rows.
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
