"""What attention looks like from afar: histograms, pooled maps, mass by frame offset. Streamed in row chunks;
histograms also by tiles.

Legend: B batch, N queries, M keys, h heads, d head width, F latent frames, S side of a pooled map, c rows of a chunk.
"""

import math

import torch
from torch import Tensor

from trainer.attention import reference
from trainer.attention.rows import Lengths, check_heads, check_lengths, choose_backend, counted_weights, weight_rows

#: Edges of a histogram that a Triton pass counts at a time: each holds registers.
_EDGES = 9


@torch.no_grad()
def log_histogram(
    q: Tensor,
    k: Tensor,
    *,
    bins: int = 64,
    lowest: float = 1e-12,
    lengths: Lengths | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> Tensor:
    """How many weights of each head lie in each of `bins` equal parts of log10 A, from log10 `lowest` to 0.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, M, d).
        bins: how many.
        lowest: lower edge of the first bin, which also counts all that is smaller, underflow to 0 included.
        lengths: (B,) valid tokens per sample: weights of others are not counted. None: all are.
        backend: `dense` (float64, small N), `chunked` or `triton`; None chooses by device.
        chunk: query rows at a time; None chooses by memory.

    Returns:
        (B, h, bins) int64, which sum to a head's number of weights. Weights within rounding of an edge may count on
        either side; those that are no number count in the first bin.

    Raises:
        ValueError: if shapes do not agree, `bins` is below 1 or `lowest` is not between 0 and 1.
    """
    if bins < 1 or not 0.0 < lowest < 1.0:
        raise ValueError(f"got {bins} bins from {lowest}, expected at least one, from a weight between 0 and 1.")
    check_heads(q, k)
    valid = check_lengths(lengths, q, k)
    chosen = choose_backend(backend, q, k)
    if chosen == "dense":
        weights = reference.attention_weights(q, k, valid)
        return reference.log_histogram(weights, bins=bins, lowest=lowest, lengths=valid)
    if chosen == "triton":
        return _triton_log_histogram(q, k, bins, lowest, valid)
    return _chunked_log_histogram(q, k, bins, lowest, valid, chunk)


def _chunked_log_histogram(
    q: Tensor, k: Tensor, bins: int, lowest: float, valid: Tensor | None, chunk: int | None
) -> Tensor:
    low = math.log10(lowest)
    counts = torch.zeros(q.shape[0] * q.shape[1], bins, dtype=torch.int64, device=q.device)
    for _, rows in weight_rows(q, k, chunk=chunk, lengths=valid):
        place = rows.log10_().sub_(low).mul_(bins / -low).clamp_(0, bins - 1).nan_to_num_(0.0).to(torch.int32)
        for head, own in enumerate(place.flatten(0, 1)):
            counts[head] += torch.bincount(own.flatten(), minlength=bins)
    counts = counts.view(*q.shape[:2], bins)
    # Weights of invalid queries and keys are 0 and were counted in the first bin.
    total = torch.tensor(counted_weights(q, k, k.shape[2], valid), device=q.device)
    counts[..., 0] -= q.shape[2] * k.shape[2] - total[:, None]
    return counts


def _triton_log_histogram(q: Tensor, k: Tensor, bins: int, lowest: float, valid: Tensor | None) -> Tensor:
    from trainer.attention import triton_backend

    lse = triton_backend.rows(q, k, valid, entropy=False)[0]
    edges = torch.linspace(math.log2(lowest), 0.0, bins + 1, dtype=torch.float64)[1:-1]
    edges = edges.float().to(q.device).expand(*q.shape[:2], -1)
    total = torch.tensor(counted_weights(q, k, k.shape[2], valid), device=q.device)[:, None, None]
    above = [total.expand(*q.shape[:2], 1)]  # counts of weights above each bin's lower edge: of the first, all
    for part in edges.split(_EDGES, dim=-1):
        above.append(triton_backend.keys(q, k, lse, valid, edges=part)[2])
    counted = torch.cat(above, dim=-1)
    return counted - torch.nn.functional.pad(counted[..., 1:], (0, 1))


@torch.no_grad()
def pooled_map(q: Tensor, k: Tensor, size: int = 512, *, chunk: int | None = None) -> Tensor:
    """The attention map of each head, averaged over `size` x `size` equal cells.

    Both token axes are cut into `size` equal parts. Where tokens do not divide evenly, one that lies across a cut
    counts in both parts by its overlap, so the map's mean is the mean weight 1 / M at any size.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, M, d).
        size: S; above the number of tokens, cells repeat.
        chunk: query rows at a time; None chooses by memory.

    Returns:
        (B, h, S, S) float32, queries first.

    Raises:
        ValueError: if shapes do not agree or `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"got size {size}, expected at least one cell.")
    check_heads(q, k)
    keys = k.shape[2]
    part, token, share = _overlaps(keys, size)
    place = torch.stack([part, token]).to(q.device)
    across = torch.sparse_coo_tensor(place, share.to(q.device), (size, keys), check_invariants=True).coalesce()
    part, token, share = (t.to(q.device) for t in _overlaps(q.shape[2], size))
    pooled = torch.zeros(*q.shape[:2], size, size, device=q.device)
    for start, rows in weight_rows(q, k, chunk=chunk):
        count = rows.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            narrow = torch.sparse.mm(across, rows.reshape(-1, keys).T).T.view(*rows.shape[:3], size)  # (B, h, c, S)
        first, last = torch.searchsorted(token, torch.tensor([start, start + count], device=q.device)).tolist()
        here = slice(first, last)
        pooled.index_add_(2, part[here], narrow[:, :, token[here] - start] * share[here, None])
    return pooled


def _overlaps(tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens lie in which of `size` equal parts: part, token (ascending) and the token's share of the part."""
    # In units of 1 / size of a token: token t covers t * size to (t + 1) * size, part p covers p * tokens onwards.
    cuts = torch.cat([torch.arange(tokens) * size, torch.arange(size) * tokens]).unique()
    width = torch.diff(cuts, append=torch.tensor([tokens * size]))
    return cuts // tokens, cuts // size, width.float() / tokens


@torch.no_grad()
def frame_offset_mass(
    q: Tensor,
    k: Tensor,
    frames: int,
    tokens_per_frame: int,
    *,
    lengths: Lengths | None = None,
    chunk: int | None = None,
) -> Tensor:
    """How much attention goes how many latent frames ahead or back, mean over vision queries.

    Args:
        q: (B, h, N, d) queries as the softmax sees them, vision tokens first, frame by frame.
        k: (B, h, M, d), the same.
        frames: F.
        tokens_per_frame: vision tokens of one frame.
        lengths: (B,) valid tokens per sample, all vision tokens among them; None: all.
        chunk: query rows at a time; None chooses by memory.

    Returns:
        (B, h, 2 F - 1) float32: place F - 1 + o holds the mass on keys that lie o frames after the query. With the
        mass on text keys they sum to 1.

    Raises:
        ValueError: if shapes do not agree or there are fewer (valid) tokens than F * tokens_per_frame.
    """
    check_heads(q, k)
    valid = check_lengths(lengths, q, k)
    vision = frames * tokens_per_frame
    tokens = min(q.shape[2], k.shape[2]) if valid is None else int(valid.min())
    if min(frames, tokens_per_frame) < 1 or vision > tokens:
        raise ValueError(
            f"got {frames} frames of {tokens_per_frame} tokens for {q.shape[2]} queries and {k.shape[2]} keys"
            f"{'' if valid is None else f', of which {valid.tolist()} are valid'}, "
            "expected at least one of each and no more than there are tokens, vision tokens first."
        )
    mass = torch.zeros(*q.shape[:2], 2 * frames - 1, device=q.device)
    ahead = torch.arange(frames, device=q.device) + frames - 1
    for start, rows in weight_rows(q, k, chunk=chunk, lengths=valid):
        if start >= vision:
            break
        rows = rows[:, :, : vision - start]
        to_frame = rows[..., :vision].unflatten(-1, (frames, tokens_per_frame)).sum(dim=-1)  # (B, h, c, F)
        of = torch.arange(start, start + rows.shape[2], device=q.device) // tokens_per_frame
        offset = (ahead - of[:, None]).flatten()
        mass.index_add_(2, offset, to_frame.flatten(2))
    return mass / vision
