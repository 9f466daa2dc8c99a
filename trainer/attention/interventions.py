"""Attention functions that change what attention does: heads skipped, temperature, another map, one text token.

Each builder returns a function (q, k, v, call) -> out that replaces a model's own attention in chosen layers. The
model's context manager sets the functions and removes them, also when something raises:

    with model.attention({46: skip_heads([3, 7]), 47: temperature(0.5)}):
        ...

They compose: `attend` computes what the intervention does not, and `heads` leaves the other heads to it. `at_steps`
limits any of them to chosen denoising steps. Gradients pass through all of them.

Legend: B batch, N vision tokens, L text tokens, h heads, d head width.
"""

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class TokenLayoutLike(Protocol):
    """What an intervention reads of a batch's token layout, [vision | text]."""

    @property
    def text_tokens(self) -> int:
        """Text tokens among the keys, with padding; 0 in self-attention of vision."""
        ...

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Valid text tokens of each sample."""
        ...

    @property
    def key_mask(self) -> Tensor | None:
        """(B, N + L) bool, true on tokens that may be attended to; None: all may be."""
        ...


class AttentionCallLike(Protocol):
    """What an intervention reads of the call that a model makes, besides q, k and v."""

    @property
    def layer(self) -> int:
        """Index of the block."""
        ...

    @property
    def layout(self) -> TokenLayoutLike:
        """Token order of the batch."""
        ...

    @property
    def site(self) -> str:
        """Where in the block: `joint`, `self` or `cross`."""
        ...


#: (q, k, v each (B, h, N + L, d), call) -> (B, h, N + L, d). N + L is N in self-attention of vision; in cross-attention
#: q and the result have N tokens, k and v have L.
Attend = Callable[[Tensor, Tensor, Tensor, AttentionCallLike], Tensor]


def unmodified_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
    """torch's fused attention; 0 at padded text queries, as in the model itself."""
    return _softmax_attention(q, k, v, call.layout.key_mask, call.layout.key_mask, None)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, queries: Tensor | None, scale: float | None
) -> Tensor:
    """softmax(scale Q K^T) V over the keys that `keys` (B, M) allows, 0 at queries that `queries` (B, N) does not."""
    mask = None if keys is None else keys[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out if queries is None else out * queries[:, None, :, None].to(out.dtype)


def _sorted_heads(heads: Collection[int], available: int) -> list[int]:
    unknown = sorted(head for head in heads if not 0 <= head < available)
    if unknown:
        raise ValueError(f"got heads {unknown}, expected 0 .. {available - 1}.")
    return sorted(set(heads))


def _on_heads(function: Attend, heads: Collection[int] | None, otherwise: Attend) -> Attend:
    """`function` on `heads`, `otherwise` on the others; None: `function` on all."""
    if heads is None:
        return function

    def split(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        inside = _sorted_heads(heads, q.shape[1])
        outside = [head for head in range(q.shape[1]) if head not in inside]
        if not inside or not outside:
            return (function if inside else otherwise)(q, k, v, call)
        parts = [
            used(q[:, own], k[:, own], v[:, own], call) for used, own in ((function, inside), (otherwise, outside))
        ]
        order = torch.tensor(inside + outside, device=q.device).argsort()
        return torch.cat(parts, dim=1)[:, order]

    return split


def skip_heads(heads: Collection[int], *, attend: Attend = unmodified_attention) -> Attend:
    """The outputs of these heads are 0 before the output projection. The others are unchanged.

    Raises:
        ValueError: when called with fewer heads than named.
    """

    def skipped(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        own = torch.tensor(_sorted_heads(heads, q.shape[1]), dtype=torch.int64, device=q.device)
        return attend(q, k, v, call).index_fill(1, own, 0.0)

    return skipped


def temperature(value: float, *, heads: Collection[int] | None = None, attend: Attend = unmodified_attention) -> Attend:
    """softmax(Q K^T / (T sqrt(d))) V; below 1 sharper, above 1 flatter.

    The factor goes into the softmax's scale: no input is rounded again.

    Args:
        value: T, above 0.
        heads: only these; None: all.
        attend: the attention of the other heads.

    Raises:
        ValueError: if T is not a positive number.
    """
    if not 0.0 < value < math.inf:
        raise ValueError(f"got temperature {value}, expected a positive number; 1 changes nothing.")

    def tempered(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        mask = call.layout.key_mask
        return _softmax_attention(q, k, v, mask, mask, 1 / (value * math.sqrt(q.shape[-1])))

    return _on_heads(tempered, heads, attend)


def transfer(
    source_q: Tensor,
    source_k: Tensor,
    *,
    text_lengths: tuple[int, ...] | None = None,
    heads: Collection[int] | None = None,
    attend: Attend = unmodified_attention,
) -> Attend:
    """The map A of a source, from its q and k, on the target's own values: A itself is never stored.

    Args:
        source_q: (B, h, N + L, d) of the source at the same layer, site and step; all h heads, also where `heads` is
            given.
        source_k: (B, h, N + L, d).
        text_lengths: valid text tokens of each sample of the source, to be compared with the target's where text is
            among the keys: a map's text keys must be the target's too. None: they are known to be equal.
        heads: only these; None: all. The others keep their own map.
        attend: applied to the source's q and k with the target's v, and to the other heads' own q, k and v.

    Raises:
        ValueError: when called on another number of tokens, heads or valid text tokens than the source's.
    """

    def transferred(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        if source_q.shape != q.shape or source_k.shape != k.shape:
            raise ValueError(
                f"got a map from q of shape {tuple(source_q.shape)} and k of shape {tuple(source_k.shape)} for "
                f"{tuple(q.shape)} and {tuple(k.shape)}, expected equal shapes: use the same batch size and grid, and "
                "captions of as many tokens."
            )
        if call.layout.text_tokens and text_lengths not in (None, call.layout.text_lengths):
            raise ValueError(
                f"got a map from captions of {text_lengths} tokens for captions of {call.layout.text_lengths}, "
                "expected equal lengths sample by sample: a map's text keys must be the target's too."
            )
        foreign_q, foreign_k = (t.to(q.device, q.dtype) for t in (source_q, source_k))
        if heads is not None:
            own = torch.tensor(_sorted_heads(heads, q.shape[1]), dtype=torch.int64, device=q.device)
            foreign_q, foreign_k = (t.index_copy(1, own, f[:, own]) for t, f in ((q, foreign_q), (k, foreign_k)))
        return attend(foreign_q, foreign_k, v, call)

    return transferred


def transfer_within_batch(
    source: Sequence[int], *, heads: Collection[int] | None = None, attend: Attend = unmodified_attention
) -> Attend:
    """Like `transfer` where source and target are generated in one batch: nothing is stored between passes.

    Args:
        source: for every sample of the batch, the sample whose map it uses; itself where it keeps its own.
        heads: only these; None: all.
        attend: as in `transfer`.

    Raises:
        ValueError: when called on a batch of another size, or where caption lengths of a pair differ and text is
            among the keys.
    """

    def transferred(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        lengths = call.layout.text_lengths
        if len(source) != q.shape[0] or not all(0 <= row < q.shape[0] for row in source):
            raise ValueError(f"got sources {tuple(source)}, expected one sample of the batch for each of {q.shape[0]}.")
        rows = torch.tensor(source, device=q.device)
        of_source = tuple(lengths[row] for row in source)
        return transfer(q[rows], k[rows], text_lengths=of_source, heads=heads, attend=attend)(q, k, v, call)

    return transferred


class AttentionMapRecorder:
    """q and k of a source generation by (layer, site, step), and their transfer into a target generation.

    Costs the numbers of q and k, 2 B h (N + L) d in joint attention, for each layer, site and step recorded.

    Args:
        step: returns the current denoising step; the same steps must come in both generations.
        device: where the source's q and k are kept, e.g. `cpu`; None: where they are.
    """

    def __init__(self, step: Callable[[], Hashable], *, device: torch.device | str | None = None) -> None:
        self.step = step
        self.device = device
        self._recorded: dict[tuple[int, str, Hashable], tuple[Tensor, Tensor, tuple[int, ...]]] = {}

    def record(self, *, attend: Attend = unmodified_attention) -> Attend:
        """Attention that changes nothing and keeps q and k; of what is seen twice, the last ones."""

        def recording(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
            device = q.device if self.device is None else self.device
            self._recorded[call.layer, call.site, self.step()] = (
                q.detach().to(device, copy=True),
                k.detach().to(device, copy=True),
                call.layout.text_lengths,
            )
            return attend(q, k, v, call)

        return recording

    def inject(self, *, heads: Collection[int] | None = None, attend: Attend = unmodified_attention) -> Attend:
        """`transfer` from what was recorded at the same layer, site and step.

        Raises:
            ValueError: when called at a layer, site and step that were not recorded.
        """

        def injecting(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
            at = (call.layer, call.site, self.step())
            if at not in self._recorded:
                raise ValueError(
                    f"got layer {at[0]}, {at[1]} attention, at step {at[2]}, expected one that was recorded: "
                    f"{sorted(self._recorded, key=str)}. Record the same layers, sites and steps in the source "
                    "generation."
                )
            source_q, source_k, lengths = self._recorded[at]
            return transfer(source_q, source_k, text_lengths=lengths, heads=heads, attend=attend)(q, k, v, call)

        return injecting


def first_text_token(
    num_vision: int,
    keep: int | None = 0,
    *,
    heads: Collection[int] | None = None,
    attend: Attend = unmodified_attention,
) -> Attend:
    """Attention in which one text token is left as key and value; all queries stay, text included.

    At the site `cross` the keys are text alone, padding among them: without a token that stays the result is 0.

    Args:
        num_vision: N, vision tokens before the text in joint attention; it does not matter at the site `cross`.
        keep: index of the text token that stays, 0 the first; None: none stays. A caption that is shorter keeps none.
        heads: only these; None: all.
        attend: the attention of the other heads.

    Raises:
        ValueError: if `keep` is negative, or when called with fewer than `num_vision` tokens or in self-attention.
    """
    if num_vision < 1 or (keep is not None and keep < 0):
        raise ValueError(f"got num_vision {num_vision} and keep {keep}, expected at least 1, and 0 or more, or None.")

    def reduced(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        tokens, layout, vision = k.shape[2], call.layout, 0 if call.site == "cross" else num_vision
        if call.site == "self":
            raise ValueError(f"got self attention in layer {call.layer}, expected joint or cross attention, with text.")
        if tokens < vision:
            raise ValueError(f"got {tokens} tokens, expected {vision} vision tokens first.")
        stays = [] if keep is None or vision + keep >= tokens else [vision + keep]
        if not vision and not stays:
            return q.new_zeros(*q.shape[:3], v.shape[-1])
        used = torch.tensor([*range(vision), *stays], device=k.device)
        keys = None if layout.key_mask is None or not stays else layout.key_mask[:, used]
        return _softmax_attention(q, k[:, :, used], v[:, :, used], keys, layout.key_mask, None)

    return _on_heads(reduced, heads, attend)


def at_steps(
    steps: Collection[Hashable], step: Callable[[], Hashable], inside: Attend, *, attend: Attend = unmodified_attention
) -> Attend:
    """`inside` at the chosen denoising steps, `attend` at all others.

    Args:
        steps: the chosen steps.
        step: returns the current step, e.g. `lambda: scheduler.step_index`.
        inside: the intervention.
        attend: the attention at the other steps.
    """

    def timed(q: Tensor, k: Tensor, v: Tensor, call: AttentionCallLike) -> Tensor:
        return (inside if step() in steps else attend)(q, k, v, call)

    return timed
