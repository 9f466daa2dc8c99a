"""Drawn heads for the attention tests: shapes, dtypes and the distributions that break measurements.

Legend: B batch, h heads, N tokens, d head width.
"""

import math

import torch
from hypothesis import strategies as st

from trainer.attention import dense as reference
from trainer.attention.chunked_weights import weight_chunks
from trainer.attention.inputs import checked

KINDS = ("random", "sharp", "peaked", "uniform", "sink", "diagonal")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw_heads(
    kind: str, seed: int, batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (B, h, N, d) of `dtype`, with an attention map of the named kind."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3))
    signs = torch.where(k > 0, 1.0, -1.0)  # exact in every dtype; two that differ are at least 2 apart in q . k
    if kind == "sharp":
        q = q * 4
    elif kind == "peaked":  # its own key is so far ahead that the rest underflows; equal keys share the 1.0
        q, k = signs * 1024, signs
    elif kind == "uniform":
        q = torch.zeros_like(q)
    elif kind == "sink":
        q, k = planted_sink(batch, heads, tokens, width, sink=seed % tokens, logit=4.0)
    elif kind == "diagonal":
        q, k = signs * (8 / math.sqrt(width)), signs
    return q.to(dtype), k.to(dtype), v.to(dtype)


def planted_sink(batch: int, heads: int, tokens: int, width: int, *, sink: int, logit: float):
    """q, k with weight e^L / (e^L + N - 1) on key `sink` from every query, and equal weights elsewhere."""
    q, k = torch.zeros(batch, heads, tokens, width), torch.zeros(batch, heads, tokens, width)
    q[..., 0] = math.sqrt(width)
    k[..., 1] = 1.0
    k[:, :, sink, :2] = torch.tensor([logit, 0.0])
    return q, k


#: (kind, seed, B, h, N, d, dtype)
heads_strategy = st.tuples(
    st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(1, 2), st.integers(1, 3), st.integers(1, 45),
    st.sampled_from([16, 64, 128]), st.sampled_from(DTYPES),
)  # fmt: skip


def lengths_of(seed: int, batch: int, tokens: int) -> list[int]:
    """Valid tokens per sample, from 1 to N."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(1, tokens + 1, (batch,), generator=generator).tolist()


def reduced_attention(q, k, v, lengths, vision, *, value=1.0, keys=None):
    """Dense float64 attention over the valid tokens (of which only `keys`, if given); 0 at padded queries."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for sample, length in enumerate(lengths):
        valid = vision + length
        used = list(range(valid)) if keys is None else [key for key in keys if key < valid]
        own = slice(sample, sample + 1)
        weights = reference.attention_weights(q[own, :, :valid].double() / value, k[own][:, :, used])
        out[own, :, :valid] = weights @ v[own][:, :, used].double()
    return out


def chunked_weights(q, k, *, chunk=None, lengths=None):
    """The weights A (B, h, N, M) that the chunked back end computes, float32."""
    return torch.cat([weights for _, weights in weight_chunks(checked(q, k, chunk=chunk, lengths=lengths))], dim=2)
