"""Tensors that are spread over ranks: whole again, or only this rank's part. Plain tensors pass through unchanged."""

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full plain tensor. For a sharded one, every rank that holds a part calls this at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part, in the same memory: what is written into it is written into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a full `tensor` that is spread as `like` is, on its device; nothing is communicated."""
    if not isinstance(like, DTensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def gather_full(tree: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with every tensor whole and plain. All ranks call this together.

    What was spread comes back on the CPU, one tensor at a time whole on a device. Plain tensors are the given ones:
    whoever keeps them copies them.

    Args:
        tree: what is gathered.
        keep: whether this rank wants it; elsewhere the tensors come back empty.
    """

    def fetch(tensor: Tensor) -> Tensor:
        full = full_tensor(tensor.detach())
        if not keep:
            return torch.empty(0, dtype=full.dtype)
        return full.cpu() if isinstance(tensor, DTensor) else full

    return apply_to_collection(tree, Tensor, fetch)
