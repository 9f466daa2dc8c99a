"""Attention weights A = softmax(Q K^T / sqrt(d)) of the chunked back end: a chunk of query rows at a time, float32.

All chunked passes read their weights here, in the same chunks, so a weight equals, bit for bit, a threshold that was
taken from it.

Legend: B batch, N queries, M keys, h heads, d head width, c query rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.attention.float32 import float32_matmul
from trainer.attention.inputs import Inputs

#: Default size of one chunk, in weights: 128 MiB of float32.
CHUNK_WEIGHTS = 2**25
#: The same on a CPU: 16 MiB, which its caches hold between the steps of a pass; half the time of 128 MiB.
CPU_CHUNK_WEIGHTS = 2**22


def rows_per_chunk(x: Inputs) -> int:
    """Query rows c of a chunk: `x.chunk` if given, else as many as the constants above allow; never above N."""
    chunk = x.chunk
    if chunk is None:
        weights = CPU_CHUNK_WEIGHTS if x.q.device.type == "cpu" else CHUNK_WEIGHTS
        chunk = max(1, weights // max(1, x.q.shape[0] * x.q.shape[1] * x.k.shape[2]))
    return min(chunk, x.q.shape[2])


def weight_chunks(x: Inputs) -> Iterator[tuple[int, Tensor]]:
    """Yields each chunk's first row and its weights (B, h, c, M), in order of rows.

    The caller may write into the weights. Rows and columns of padded tokens are 0.
    """
    for start, logits, weights in logit_and_weight_chunks(x):
        del logits
        yield start, weights
        del weights


def logit_and_weight_chunks(x: Inputs) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `weight_chunks`, with the logits Q K^T / sqrt(d), (B, h, c, M), between: -inf at padded keys."""
    rows, padding = rows_per_chunk(x), x.padding()
    q = x.q.float() * x.q.shape[-1] ** -0.5
    k = x.k.float().transpose(-1, -2)
    for start in range(0, q.shape[2], rows):
        logits = float32_matmul(q[:, :, start : start + rows], k)
        if padding is not None:
            logits.masked_fill_(padding[:, None, None, :], -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        if padding is not None:
            weights.masked_fill_(padding[:, None, start : start + rows, None], 0.0)
        yield start, logits, weights
        del logits, weights  # before the next chunk is made, so that it takes the memory that caches still hold
