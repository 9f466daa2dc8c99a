"""What the study of structure keeps of attention: pooled maps, profiles over frame offsets, and shares of them.

Vision tokens lie frame by frame, in each frame row by row. All figures but the text's share are of attention among
vision tokens: rows are renormalised over vision keys, so that captions of any length compare.

Legend: F latent frames, N vision tokens, L text tokens, h heads, c cells of a frame, S = F c side of a pooled map.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from launch.study.recorders import row_by_row
from trainer.attention import frame_offset_mass, pooled_map
from trainer.models.layout import AttentionFunction

#: Shares of attention among vision tokens, which are disjoint, and the text's share.
SHARES = ("diagonal", "stripes", "own_frame", "text")


@dataclass(frozen=True)
class MapSizes:
    """Cells of the maps of a grid.

    Args:
        grid: (F, height, width) of the vision tokens.
        side: largest side of the maps that are kept and compared.
        fine: largest side of the maps that shares are read from.
    """

    grid: tuple[int, int, int]
    side: int
    fine: int

    def check(self) -> None:
        """Checks that every frame has a cell.

        Raises:
            ValueError: if it has none.
        """
        if not self.frames <= self.side <= self.fine:
            raise ValueError(
                f"got side {self.side} and fine {self.fine} for videos of {self.frames} latent frames, expected "
                f"{self.frames} <= side <= fine: every frame needs a cell."
            )

    @property
    def frames(self) -> int:
        """F."""
        return self.grid[0]

    @property
    def tokens_per_frame(self) -> int:
        """Vision tokens of a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def cells(self) -> int:
        """c, cells of a frame in the maps that are kept; each frame is cut into as many equal parts."""
        return min(self.side // self.frames, self.tokens_per_frame)

    @property
    def finer(self) -> int:
        """Into how many parts shares cut such a cell."""
        return max(1, min(self.fine // (self.frames * self.cells), self.tokens_per_frame // self.cells))


def shares(fine_map: Tensor, profile: Tensor, frames: int) -> dict[str, Tensor]:
    """Where attention among vision tokens goes, as shares of it.

    With R_ij the share of cell i's attention that goes to cell j (the map's rows, each divided by its sum), and j ~ i
    where j lies at the same place of a frame as i:

    - diagonal: the mean over i of R_ii; 1 / S if attention is uniform;
    - stripes: the mean over i of the sum of R_ij over j ~ i in other frames; (F - 1) / S if it is uniform;
    - own_frame: the profile at offset 0; 1 / F if it is uniform.

    Args:
        fine_map: (h, S, S) pooled map of vision tokens.
        profile: (h, 2 F - 1) mass by frame offset, of vision keys.
        frames: F.

    Returns:
        Each (h,).
    """
    rows = fine_map / fine_map.sum(dim=-1, keepdim=True)
    diagonal = rows.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    cells = rows.shape[-1] // frames
    by_frame = rows.unflatten(-1, (frames, cells)).unflatten(-3, (frames, cells))  # (h, F, c, F, c)
    same_place = by_frame.diagonal(dim1=-3, dim2=-1).sum(dim=(-3, -2, -1)) / rows.shape[-1]
    return {"diagonal": diagonal, "stripes": same_place - diagonal, "own_frame": profile[:, frames - 1]}


class MapRecorder:
    """Attention functions that change nothing and keep what they see of every layer and row.

    Args:
        sizes: of the maps.
        heads: those that are kept.
        shown: layers of which the whole map is kept, text included.
    """

    def __init__(self, sizes: MapSizes, heads: Sequence[int], shown: Sequence[int] = ()) -> None:
        self.sizes, self.heads, self.shown = sizes, list(heads), shown
        #: (row, name) -> layer -> array without the axis of rows.
        self.seen: dict[tuple[int, str], dict[int, Tensor]] = defaultdict(dict)

    def functions(self, layers: Sequence[int]) -> dict[int, AttentionFunction]:
        """One for each layer."""
        return {layer: self._function(layer) for layer in layers}

    def _function(self, layer: int) -> AttentionFunction:
        def see(q: Tensor, k: Tensor, v: Tensor, row: int) -> None:
            for name, value in self.measured(q[:, self.heads], k[:, self.heads], whole=layer in self.shown).items():
                self.seen[row, name][layer] = value.cpu()

        return row_by_row(see)

    def measured(self, q: Tensor, k: Tensor, *, whole: bool) -> dict[str, Tensor]:
        """Figures of one row's q and k (1, h, N + L, d) without padding.

        Returns:
            `map` (h, S, S) and `profile` (h, 2 F - 1), as multiples of what uniform attention gives; `SHARES`, each
            (h,); `text_tokens`, (); where `whole`, also `whole` (h, side, side), the map of all tokens, likewise.
        """
        sizes, frames = self.sizes, self.sizes.frames
        vision = frames * sizes.tokens_per_frame
        text = q.shape[2] - vision
        own_q, own_k = q[:, :, :vision], k[:, :, :vision]
        fine = pooled_map(own_q, own_k, frames * sizes.cells * sizes.finer)[0]
        mass = frame_offset_mass(own_q, own_k, frames, sizes.tokens_per_frame)[0]
        offsets = torch.arange(1 - frames, frames, device=mass.device).abs()
        found = {
            "map": functional.avg_pool2d(fine, sizes.finer) * vision,
            "profile": mass * frames**2 / (frames - offsets),
            "text": torch.zeros(len(self.heads)),
            "text_tokens": torch.tensor(text),
            **shares(fine, mass, frames),
        }
        if text:
            found["text"] = 1 - frame_offset_mass(q, k, frames, sizes.tokens_per_frame)[0].sum(dim=-1)
        if whole:
            found["whole"] = pooled_map(q, k, sizes.side)[0] * k.shape[2]
        return found

    def row(self, row: int, name: str) -> Tensor:
        """What was seen of a row, layer by layer, (Ly, ...)."""
        by_layer = self.seen[row, name]
        return torch.stack([by_layer[layer] for layer in sorted(by_layer)])
