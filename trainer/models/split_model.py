"""A video diffusion transformer in three parts (embed, run blocks i..j, finish), whatever its family.

The composition `finish(run(embed(...), 0, num_blocks))` is the forward of diffusers' class, cut into three so that the
trunk can run without autograd and apart from the head. A family is a subclass of `SplitModel`; it also says where
attention is observed and changed, what it is trained to predict (`process`), and how a fresh block starts.

Legend: B batch, C channels, F latent frames, H W latent grid, N vision tokens, L text tokens, D width, h heads,
d head width.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from trainer.models.captions import Captions
from trainer.models.facts import ModelFacts
from trainer.models.layout import AttentionCall, AttentionFunction, Site, TokenLayout, dense_attention, fused_attention
from trainer.models.process import Process
from trainer.models.state import State


class ObservedAttention:
    """Base of the attention processors: attention that can be observed and replaced.

    Args:
        layer: index of the block.
        site: where in the block.
    """

    def __init__(self, layer: int, site: Site) -> None:
        self.layer = layer
        self.site: Site = site
        self.attend: AttentionFunction = dense_attention

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """What the softmax makes of q, k and v in the order of `layout`; shapes as of `AttentionFunction`."""
        if self.attend is dense_attention:
            # Without the layer's number: a constant that differs would have torch.compile make a graph of every block.
            return fused_attention(q, k, v, layout.key_mask)
        return self.attend(q, k, v, AttentionCall(self.layer, layout, self.site))


class SplitModel(nn.Module, ABC):
    """A transformer that can be run in parts.

    Args:
        transformer: diffusers' model; its weights are used in place, never copied.
        scheduler: config of the base's scheduler, where it is known; for a family whose noise differs between bases.
        stock_attention: keep diffusers' own attention processor (bit-equal to its forward; slower, cannot be observed).
        checkpoint_blocks: recompute a block's activations in the backward pass instead of keeping them.
    """

    #: What the family is called in messages.
    family: ClassVar[str]
    #: diffusers' class of the transformer.
    transformer_class: ClassVar[Any]
    #: Where a block has attention -> its module's name. The first site is where measurements look.
    attention_sites: ClassVar[Mapping[Site, str]] = {"joint": "attn1"}
    #: The processor that observes attention.
    processor_class: ClassVar[type[ObservedAttention]]
    #: diffusers' own processor, which `stock_attention` keeps.
    stock_processor_class: ClassVar[Any]
    #: Names of parameters outside the blocks that are never trained.
    never_trained: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        transformer: Any,
        *,
        scheduler: Mapping[str, Any] | None = None,
        stock_attention: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.checkpoint_blocks = checkpoint_blocks
        self.stock_attention = stock_attention
        self._processors: dict[tuple[Site, int], ObservedAttention] = {}
        for layer, block in enumerate(self.blocks):
            for site in self.attention_sites:
                module = self.attention_module(block, site)
                if stock_attention:
                    module.processor = self.stock_processor_class()
                else:
                    module.processor = self._processors[site, layer] = self.processor_class(layer, site)

    # -- what a family says ----------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def facts(config: Mapping[str, Any]) -> ModelFacts:
        """What a config of `transformer_class` says."""

    @property
    @abstractmethod
    def process(self) -> Process:
        """What noise does to a latent, and what the model predicts of it."""

    @staticmethod
    def check_scheduler(scheduler: Mapping[str, Any]) -> None:
        """Checks that `process` can be what a base's scheduler is for; for most families its config says nothing of it.

        Raises:
            ValueError: if it cannot.
        """

    @staticmethod
    @abstractmethod
    def blocks_of(transformer: Any) -> Sequence[nn.Module]:
        """The blocks of a transformer of this family, in the order in which they run."""

    @staticmethod
    @abstractmethod
    def output_parts(transformer: Any) -> Sequence[nn.Module | nn.Parameter]:
        """What follows the last block."""

    @staticmethod
    @abstractmethod
    def starts_at_zero(block: nn.Module, name: str) -> bool:
        """Whether a linear layer of a block is zero in a fresh one, so that the block starts as the identity."""

    @abstractmethod
    def embed(self, x: Tensor, timestep: Tensor, captions: Captions) -> State:
        """Embeds patches, timestep and captions, and makes the rotary tables.

        Args:
            x: (B, C, F, H, W) noisy latents.
            timestep: (B,) float32, as `process.timestep` gives it.
            captions: of the family's text encoders.

        Raises:
            ValueError: if captions or latent do not fit the model.
        """

    @abstractmethod
    def run_block(self, block: Callable[..., Any], state: State) -> State:
        """Runs one block, of this model or of another of its class."""

    @abstractmethod
    def finish(self, state: State) -> Tensor:
        """The prediction, (B, C, F, H, W)."""

    # -- the same for all ------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks, in the order in which they run."""
        return self.blocks_of(self.transformer)

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the model."""
        return len(self.blocks)

    @property
    def num_heads(self) -> int:
        """Attention heads per block."""
        return self.transformer.config.num_attention_heads

    @property
    def own_facts(self) -> ModelFacts:
        """What the transformer's config says."""
        return self.facts(self.transformer.config)

    @property
    def patch(self) -> tuple[int, int, int]:
        """(t, h, w) latent cells of a token."""
        return self.own_facts.patch

    @property
    def latent_channels(self) -> int:
        """C, channels of the latents that the model takes."""
        return self.own_facts.channels

    @property
    def text_width(self) -> int:
        """Width of the caption embeddings that the model takes."""
        return self.own_facts.text_width

    def draw_positions(self, seed: int) -> None:
        """Gives a model made from scratch the positions that training would not; most families have nothing to draw."""

    @staticmethod
    def fresh_parameters(block: nn.Module) -> Mapping[str, Callable[[torch.Generator], Tensor]]:
        """Of a block's parameters that belong to neither a linear layer nor a norm: name -> its fresh float32 value."""
        return {}

    @classmethod
    def keeps_float32(cls, name: str) -> bool:
        """Whether diffusers loads a parameter, named within the model or within a block, in float32 in any case."""
        return not set(cls.transformer_class._keep_in_fp32_modules or ()).isdisjoint(name.split("."))

    def changes_text(self, layer: int) -> bool:
        """Whether a block changes the text stream."""
        return True

    def check_sizes(self, x: Tensor, captions: Captions) -> None:
        """Checks the arguments of `embed`.

        Raises:
            ValueError: if a length does not fit the batch, patches do not divide the latent, or the captions are not
                those of the family's encoder.
        """
        facts, lengths, pooled = self.own_facts, captions.lengths, captions.pooled
        batch, _, frames, height, width = x.shape
        if len(lengths) != batch or max(lengths) > captions.text.shape[1]:
            raise ValueError(
                f"got text lengths {lengths} for {batch} samples of {captions.text.shape[1]} text tokens; "
                "expected one length per sample, none above the padded length."
            )
        facts.check_latent(frames, height, width)
        if facts.text_tokens is not None and set(lengths) != {facts.text_tokens}:
            raise ValueError(
                f"got captions of {sorted(set(lengths))} tokens, expected {facts.text_tokens} each: {self.family} "
                "attends to padded tokens too, so captions are encoded with their padding."
            )
        if facts.pooled_width is not None and (pooled is None or pooled.shape[1] != facts.pooled_width):
            got = "none" if pooled is None else str(pooled.shape[1])
            raise ValueError(
                f"got pooled captions of width {got}, expected {facts.pooled_width}: {self.family} takes the pooled "
                "embedding of a second text encoder."
            )

    def run(self, state: State, start: int, stop: int) -> State:
        """Runs the blocks start .. stop - 1."""
        for layer, block in enumerate(self.blocks[start:stop], start):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                contexts = functools.partial(self._checkpoint_contexts, layer)
                call = functools.partial(
                    torch.utils.checkpoint.checkpoint, block, use_reentrant=False, context_fn=contexts
                )
                state = self.run_block(call, state)
            else:
                state = self.run_block(block, state)
        return state

    def _checkpoint_contexts(self, layer: int) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a block's forward pass and of its recomputation.

        The backward pass may come after `attention` has ended; it must use the functions of the forward pass.
        """
        if self.stock_attention:
            return contextlib.nullcontext(), contextlib.nullcontext()
        own = {(site, layer): self._processors[site, layer].attend for site in self.attention_sites}
        return contextlib.nullcontext(), self._attending(own)

    def forward(self, x: Tensor, timestep: Tensor, captions: Captions) -> Tensor:
        """Runs the whole model: embed, every block, finish; gives the prediction (B, C, F, H, W)."""
        state = self.embed(x, timestep, captions)
        return self.finish(self.run(state, 0, self.num_blocks))

    def attention(
        self, functions: Mapping[int, AttentionFunction], *, site: Site | None = None
    ) -> AbstractContextManager[None]:
        """Inside, the blocks named by `functions` use them as their attention.

        Afterwards, also when something raises, they use what they had before.

        Args:
            functions: by layer.
            site: one of `attention_sites`; None: the first of them, joint attention or self-attention.

        Raises:
            ValueError: if the family has no such site, a layer does not exist, or the stock processor is in place.
        """
        chosen = next(iter(self.attention_sites)) if site is None else site
        if chosen not in self.attention_sites:
            raise ValueError(
                f"got attention site {site!r} for the family {self.family}, expected one of "
                f"{list(self.attention_sites)}."
            )
        if self.stock_attention:
            raise ValueError("attention cannot be observed with stock_attention=True; build the SplitModel without it.")
        unknown = sorted(set(functions) - set(range(self.num_blocks)))
        if unknown:
            raise ValueError(f"got attention functions for layers {unknown}, expected 0 .. {self.num_blocks - 1}.")
        return self._attending({(chosen, layer): function for layer, function in functions.items()})

    @contextlib.contextmanager
    def _attending(self, functions: Mapping[tuple[Site, int], AttentionFunction]) -> Iterator[None]:
        """`attention` by (site, layer), unchecked."""
        before = {where: self._processors[where].attend for where in functions}
        try:
            for where, function in functions.items():
                self._processors[where].attend = function
            yield
        finally:
            for where, function in before.items():
                self._processors[where].attend = function

    @classmethod
    def attention_module(cls, block: Any, site: Site | None = None) -> Any:
        """diffusers' attention module of a block at a site; None: the first of `attention_sites`."""
        names = cls.attention_sites
        return getattr(block, names[next(iter(names)) if site is None else site])

    def output_projection(self, layer: int) -> Tensor:
        """The vision output projection split by head, (h, d, D): the attention output is sum_h v_h @ W_h + bias."""
        weight = self.vision_output(self.blocks[layer]).weight  # (D, h * d)
        return weight.detach().T.unflatten(0, (self.num_heads, -1))

    @classmethod
    def vision_output(cls, block: Any) -> nn.Linear:
        """The linear layer that takes a block's attention output of vision tokens."""
        return cls.attention_module(block).to_out[0]
