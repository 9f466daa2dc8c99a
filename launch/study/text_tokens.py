"""Which text tokens a model reads: one token left, in attention and in the pooled caption, and the mass on each.

Legend: B rows, N vision tokens, L text tokens among the keys, h heads, d head width.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from random import Random
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.families import COGVIDEOX, HUNYUAN_VIDEO, MOCHI, WAN, VideoFamily
from launch.study.denoising import UNCONDITIONAL, Denoiser, ModelCall
from launch.study.workbench import Workbench
from trainer.attention import key_statistics
from trainer.attention.interventions import first_text_token
from trainer.models.layout import AttentionCall, Site, dense_attention

#: Every text token stays.
ALL: Literal["all"] = "all"
#: Index of the text token that stays, None for none, or `ALL`.
Kept = int | None | Literal["all"]
#: Families whose model gets a pooled caption besides the text tokens.
POOLED: tuple[VideoFamily, ...] = (MOCHI, HUNYUAN_VIDEO)
#: Name of a family -> what cutting its text leaves, or changes besides.
NOTES = {
    HUNYUAN_VIDEO.name: "The token refiner, and its mean over tokens, still see the whole caption: only the blocks "
    "read one token. Where the pooled caption is cut too, it is that of the empty caption, whichever token stays.",
    MOCHI.name: "Where the pooled caption is cut too, the pooler sees the one token, or none. What it makes of one "
    "token may lie far from what it was trained on.",
    WAN.name: "Padding to 512 tokens takes part in the dense softmax; of all 512 keys only the one token stays. With a "
    "single key every query gets the same value. Without text, cross-attention is 0 before its output projection.",
    COGVIDEOX.name: "Padding takes part in the dense softmax, and is dropped with the other tokens.",
}


def text_site(denoiser: Denoiser) -> Site:
    """Where a block of the model reads text."""
    return "cross" if "cross" in denoiser.split_model.attention_sites else "joint"


def caption_lengths(work: Workbench, prompt: int, seed: int) -> dict[str, int]:
    """The tokens of the caption in each pass, without padding."""
    found: dict[str, int] = {}
    for call in work.dense(prompt, seed).calls:
        for row, name in enumerate(call.passes):
            caption = "" if name == UNCONDITIONAL else work.prompts[prompt]
            found[name] = _caption_length(work, call, row, caption)
    return found


def _caption_length(work: Workbench, call: ModelCall, row: int, caption: str) -> int:
    family, inputs = work.use.family, call.inputs
    if family is COGVIDEOX:  # neither mask nor embeddings tell padding
        pipe: Any = work.denoiser.sampler.pipe
        longest = pipe.transformer.config.max_text_seq_length
        return len(pipe.tokenizer(caption, truncation=True, max_length=longest).input_ids)
    if family is WAN:  # the pipeline pads with zeros, which stay keys
        used = inputs["encoder_hidden_states"][row].abs().amax(dim=-1).nonzero()
        return int(used.max()) + 1
    return int(inputs["encoder_attention_mask"][row].sum())


def kept_token(kind: str, length: int, seed: str) -> Kept:
    """The token of a caption that stays.

    Args:
        kind: `first`, `last` (of the caption, before padding), `random` (another one, where there is one), `none` or
            `all`.
        length: tokens of the caption.
        seed: of the random one.
    """
    if kind == "all":
        return ALL
    if kind == "none" or length == 0:
        return None
    others = range(1, length - 1) or range(length)
    return {"first": 0, "last": length - 1, "random": Random(seed).choice(others)}[kind]


class OneTextToken:
    """Attention that reads one text token, chosen by pass, or none; all other keys stay.

    Padding is dropped with the rest: of all text keys the one token is left. A row that loses no key keeps the model's
    own attention, bit for bit.

    Args:
        denoiser: tells the pass of each row.
        tokens: pass -> what stays.
    """

    def __init__(self, denoiser: Denoiser, tokens: Mapping[str, Kept]) -> None:
        self.denoiser, self.tokens = denoiser, tokens

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The attention function of joint and cross-attention."""
        out = dense_attention(q, k, v, call).clone()
        for row, name in enumerate(self.denoiser.passes):
            token, length = self.tokens[name], call.layout.text_lengths[row]
            if isinstance(token, str) or length == 0 or (length == 1 and token == 0):
                continue
            own_q, own_k, own_v = _row(q, k, v, call, row)
            layout = replace(call.layout, text_lengths=(length,), text_tokens=length, key_mask=None)
            reduced = first_text_token(call.layout.num_vision, token)
            out[row, :, : own_q.shape[2]] = reduced(own_q, own_k, own_v, replace(call, layout=layout))[0]
        return out

    @contextlib.contextmanager
    def pooled(self) -> Iterator[None]:
        """Inside, the pooled caption of each row is that of the token that stays.

        Mochi pools over this token alone, or over none; HunyuanVideo gets the pooled vector of an empty caption, since
        its own encoder's vector is of no single token.
        """
        transformer = self.denoiser.split_model.transformer
        mochi = self.denoiser.sampler.use.family is MOCHI
        module = transformer.time_embed.pooler if mochi else transformer.time_text_embed.text_embedder
        handle = module.register_forward_pre_hook(self._pool_token if mochi else self._empty_pooled)
        try:
            yield
        finally:
            handle.remove()

    def _pool_token(self, module: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        text, mask = inputs
        reduced = mask.clone()
        for row, name in enumerate(self.denoiser.passes):
            token = self.tokens[name]
            if token != ALL:
                reduced[row] = 0
                if token is not None:
                    reduced[row, token] = mask[row, token]
        return text, reduced

    def _empty_pooled(self, module: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        rows = [row for row, name in enumerate(self.denoiser.passes) if self.tokens[name] != ALL]
        pooled = inputs[0].clone()
        pooled[rows] = self._empty.to(pooled)
        return (pooled,)

    @cached_property
    def _empty(self) -> Tensor:
        """HunyuanVideo's pooled vector of an empty caption, (1, D_pooled)."""
        pipe: Any = self.denoiser.sampler.pipe
        with torch.no_grad():
            _, pooled, _ = pipe.encode_prompt("")
        return pooled


class TextMass:
    """Keeps how much attention the vision queries give to every text key; changes nothing.

    Args:
        denoiser: tells the pass of each row.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        #: (Pass, layer) -> of every row seen, the weight on each text key, mean over heads and vision queries, (L,).
        self.seen: dict[tuple[str, int], list[NDArray]] = defaultdict(list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The attention function of joint and cross-attention."""
        vision, first = call.layout.num_vision, 0 if call.site == "cross" else call.layout.num_vision
        for row, name in enumerate(self.denoiser.passes):
            own_q, own_k, _ = _row(q, k, v, call, row)
            mass, _ = key_statistics(own_q[:, :, :vision], own_k, eps=())
            self.seen[name, call.layer].append((mass[0, :, first:].double().mean(dim=0) / vision).cpu().numpy())
        return dense_attention(q, k, v, call)

    def mean(self, name: str, layer: int) -> NDArray:
        """Mean over rows and calls of a pass, (L,)."""
        return np.mean(self.seen[name, layer], axis=0)


def _row(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one row, without padded text that is no key."""
    vision, length = call.layout.num_vision, call.layout.text_lengths[row]
    keys = length if call.site == "cross" else vision + length
    queries = vision if call.site == "cross" else keys
    own = slice(row, row + 1)
    return q[own, :, :queries], k[own, :, :keys], v[own, :, :keys]
