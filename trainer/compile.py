"""Blocks whose forward is compiled while they train, and runs as it is wherever something is measured."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch._dynamo

from trainer.models.layout import dense_attention

CompiledPart = Literal["none", "trunk", "head", "both"]

#: Variants of the blocks' code that are compiled before dynamo gives up and runs them eagerly. Trunk, head and last
#: block, with and without a key mask, with no, one or more text tokens make 18; torch's own limit is 8.
_VARIANTS = 64


class _WhileTraining:
    """The forward of one block: compiled in a training step, eager in evaluation or under another attention.

    Validation and measurements thus give the same figures whether or not a run is compiled, and the functions that a
    measurement puts into the attention are never traced.
    """

    def __init__(self, block: Any) -> None:
        self._block = block
        self._eager = type(block).forward
        # Sizes as torch has it: the first are compiled as they are, those that change become symbols. All of them
        # symbols from the start took minutes a graph to trace.
        self._compiled = torch.compile(type(block).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._block.training and self._block.attn1.processor.attend is dense_attention
        return (self._compiled if own else self._eager)(self._block, *args, **kwargs)


def compile_blocks(blocks: Iterable[Any]) -> None:
    """Compiles the blocks' forward in place, at its first use; names of parameters stay as they are.

    Args:
        blocks: each with a `JointAttention` as the processor of its `attn1`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    for block in blocks:
        block.forward = _WhileTraining(block)
