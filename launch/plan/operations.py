"""Counts operations and allocated bytes of a program that runs on fake tensors.

The bytes are those that the device's allocator would have allocated. Operations follow torch's formulas
(`torch.utils.flop_counter`): two for each multiply-add in matrix products, convolutions and attention. Other
operators are not counted.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _attention_forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


#: Operator -> its formula. torch has formulas for CUDA's fused attention, but not for the CPU's: forward 4 B h N^2 d,
#: backward 10 B h N^2 d, since a fused kernel computes Q K^T again.
FORMULAS: dict[Any, Any] = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

#: Part for all storages that are not assigned to another part.
REST = "activations"


@dataclass(frozen=True)
class Allocation:
    """Memory in use right after a tensor was allocated.

    Args:
        stage: stage of the step.
        gradients: bytes of complete gradients.
        rest: bytes of everything else except weights, optimiser state and averages.
    """

    stage: str
    gradients: int
    rest: int


class UsageCounter(TorchDispatchMode):
    """Counts, inside the context, operations by stage, and each storage that an operator returns until it is freed.

    Temporary memory within an operator is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, int] = {}
        self.allocations: list[Allocation] = []
        self.flops: dict[str, int] = {}
        self._stage = ""
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._part: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None:
            operations = formula(*args, **(kwargs or {}), out_val=found)
            self.flops[self._stage] = self.flops.get(self._stage, 0) + operations
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return found

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: weakref.ref) -> None:
            self.parts[self._part.pop(key)] -= size
            del self._alive[key]

        self._alive[key] = (weakref.ref(storage, freed), size)
        self._part[key] = REST
        self.parts[REST] = self.parts.get(REST, 0) + size
        if self._stage:
            self.allocations.append(Allocation(self._stage, self.parts.get("gradients", 0), self.parts[REST]))

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Counts the storages of `tensors` under `part` from now on."""
        for tensor in tensors:
            self._count(tensor)
            key = tensor.untyped_storage()._cdata
            size = self._alive[key][1]
            self.parts[self._part[key]] -= size
            self._part[key] = part
            self.parts[part] = self.parts.get(part, 0) + size

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside the context, allocations and operations count for this stage."""
        before, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = before

    def peak(self, *stages: str) -> int:
        """Largest sum of gradients and rest in bytes, in the given stages or in all."""
        return max((m.gradients + m.rest for m in self.allocations if not stages or m.stage in stages), default=0)


def make_empty(module: torch.nn.Module) -> None:
    """Replaces the meta tensors of a module by empty tensors, which are created in the active dispatch mode."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                made = torch.empty(p.shape, dtype=p.dtype)
                part._parameters[name] = torch.nn.Parameter(made, requires_grad=p.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
