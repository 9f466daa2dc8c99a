"""Attention functions that keep or change what a study looks at, row by row of a call.

Rows of a batch may have captions of several lengths, and be of the conditional or the unconditional pass. Each is
handed over by itself, without padded text that is no key.

Legend: B rows, N vision tokens, L valid text tokens, h heads, d head width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.attention import masked_attention, pooled_quantiles
from trainer.models.layout import AttentionCall, AttentionFunction, dense_attention

#: (q, k, v each (1, h, N + L, d), row) -> output of the row, or None for the model's own.
RowFunction = Callable[[Tensor, Tensor, Tensor, int], Tensor | None]


def row_by_row(function: RowFunction) -> AttentionFunction:
    """Attention that hands every row over by itself, without padding; dense where `function` gives None."""

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        out = dense_attention(q, k, v, call)
        for row, length in enumerate(call.layout.text_lengths):
            valid = call.layout.num_vision + length
            found = function(q[row : row + 1, :, :valid], k[row : row + 1, :, :valid], v[row : row + 1, :, :valid], row)
            if found is not None:
                out = out.clone()
                out[row, :, :valid] = found[0]
        return out

    return attend


class BottomMask:
    """Removes the smallest weights of each head, and keeps what was removed.

    Args:
        ratio: share of a head's weights, pooled over its queries and keys.
        heads: only these; None: all.
        renormalise: rows sum to one again.
    """

    def __init__(self, ratio: float, *, heads: Sequence[int] | None = None, renormalise: bool = True) -> None:
        self.ratio, self.heads, self.renormalise = ratio, heads, renormalise
        #: Realised ratio and dropped mass of every row seen, means over the masked heads.
        self.seen: dict[str, list[float]] = defaultdict(list)

    @property
    def attend(self) -> AttentionFunction:
        """The attention function."""
        return row_by_row(self._masked)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, row: int) -> Tensor:
        thresholds = pooled_quantiles(q, k, [self.ratio])[..., 0]  # (1, h)
        chosen = list(range(q.shape[1])) if self.heads is None else list(self.heads)
        others = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
        others[chosen] = False
        thresholds = thresholds.masked_fill(others, 0.0)
        out, ratio, mass = masked_attention(q, k, v, thresholds, renormalise=self.renormalise)
        self.seen["realised"].append(float(ratio[0, chosen].double().mean()))
        self.seen["dropped"].append(float(mass[0, chosen].double().mean()))
        return out

    def means(self) -> dict[str, float]:
        """Means over rows, layers and calls since the last call of this."""
        found = {name: sum(values) / len(values) for name, values in self.seen.items()}
        self.seen.clear()
        return found
