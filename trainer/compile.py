"""Blocks whose forward is compiled in training steps, and eager in validation and measurements."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch._dynamo
from torch import nn

from trainer.models.layout import dense_attention
from trainer.models.split_model import ObservedAttention

CompiledPart = Literal["none", "trunk", "head", "both"]

#: Variants of the blocks' code that are compiled before dynamo gives up and runs them eagerly. Trunk, head and last
#: block, with and without a key mask, with no, one or more text tokens make 18; torch's own limit is 8.
_VARIANTS = 64


class _CompiledInTraining:
    """The forward of one block: compiled in a training step, eager in evaluation or under another attention.

    Validation and measurements thus give the same figures whether or not a run is compiled, and the functions that a
    measurement puts into the attention are never traced.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        self._attention = [
            module for module in block.modules() if isinstance(getattr(module, "processor", None), ObservedAttention)
        ]
        self._eager = type(block).forward
        # Sizes as torch has it: the first are compiled as they are, those that change become symbols. All of them
        # symbols from the start took minutes a graph to trace. So a run that is resumed at another size than it began
        # with may compile other kernels, which round otherwise; with one size it computes the same bits.
        self._compiled = torch.compile(type(block).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._block.training and all(each.processor.attend is dense_attention for each in self._attention)
        return (self._compiled if own else self._eager)(self._block, *args, **kwargs)


def compile_blocks(blocks: Sequence[Any] | nn.ModuleList, first: int, part: CompiledPart) -> None:
    """Compiles the forward of blocks in place, at its first use; names of parameters stay as they are.

    Args:
        blocks: of the whole model, each with an `ObservedAttention` at every attention site.
        first: index of the first retrained block: the trunk is before it, the head begins there.
        part: which of them are compiled.
    """
    chosen = {"none": (), "trunk": blocks[:first], "head": blocks[first:], "both": blocks}[part]
    if chosen:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for block in chosen:
        block.forward = _CompiledInTraining(block)
