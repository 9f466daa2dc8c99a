"""Attention maps averaged over cells and over frame offsets; always from chunks of query rows.

Legend: B batch, N queries, M keys, h heads, F latent frames, S side of a pooled map, c query rows of a chunk.
"""

import torch
from torch import Tensor

from trainer.attention.chunked_weights import weight_chunks
from trainer.attention.inputs import Inputs


def pooled_map(x: Inputs, size: int) -> Tensor:
    """As `api.pooled_map`, (B, h, S, S) float32."""
    q, keys = x.q, x.k.shape[2]
    cell, token, share = _overlaps(keys, size)
    place = torch.stack([cell, token]).to(q.device)
    key_cells = torch.sparse_coo_tensor(place, share.to(q.device), (size, keys), check_invariants=True).coalesce()
    cell, token, share = (t.to(q.device) for t in _overlaps(q.shape[2], size))
    pooled = torch.zeros(*q.shape[:2], size, size, device=q.device)
    for start, weights in weight_chunks(x):
        rows = weights.shape[2]
        with torch.autocast(q.device.type, enabled=False):
            narrow = torch.sparse.mm(key_cells, weights.reshape(-1, keys).T).T.view(*weights.shape[:3], size)
        first, last = torch.searchsorted(token, torch.tensor([start, start + rows], device=q.device)).tolist()
        own = slice(first, last)
        pooled.index_add_(2, cell[own], narrow[:, :, token[own] - start] * share[own, None])
    return pooled


def _overlaps(tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens lie in which of `size` equal cells: cell, token (ascending) and the token's share of the cell."""
    # In units of 1 / size of a token: token t covers t * size to (t + 1) * size, cell c covers c * tokens onwards.
    cuts = torch.cat([torch.arange(tokens) * size, torch.arange(size) * tokens]).unique()
    width = torch.diff(cuts, append=torch.tensor([tokens * size]))
    return cuts // tokens, cuts // size, width.float() / tokens


def frame_offset_mass(x: Inputs, frames: int, tokens_per_frame: int) -> Tensor:
    """As `api.frame_offset_mass`, (B, h, 2 F - 1) float32."""
    vision = frames * tokens_per_frame
    mass = torch.zeros(*x.q.shape[:2], 2 * frames - 1, device=x.q.device)
    key_frame = torch.arange(frames, device=x.q.device) + frames - 1
    for start, weights in weight_chunks(x):
        if start >= vision:
            break
        weights = weights[:, :, : vision - start]
        by_frame = weights[..., :vision].unflatten(-1, (frames, tokens_per_frame)).sum(dim=-1)  # (B, h, c, F)
        query_frame = torch.arange(start, start + weights.shape[2], device=x.q.device) // tokens_per_frame
        offset = (key_frame - query_frame[:, None]).flatten()
        mass.index_add_(2, offset, by_frame.flatten(2))
    return mass / vision
