"""Sharded tensors (DTensor): the full tensor, or this rank's part. Plain tensors pass through unchanged."""

from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full plain tensor. Collective for a sharded tensor: every rank that holds a part calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as a view: writing into it writes into the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full `tensor`, sharded as `like` is and on its device; nothing is communicated."""
    if not isinstance(like, DTensor):
        return tensor
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def gather_full(tree: Any, *, keep: bool) -> Any:
    """Nested dicts and lists with every tensor full and plain. Collective: all ranks call it.

    Sharded tensors are gathered one after the other, so that only one is full on the device at a time, and come back on
    the CPU. Plain tensors come back as they are, not copied.

    Args:
        tree: nested dicts and lists of tensors and other values.
        keep: whether this rank needs the result; elsewhere all tensors come back empty.
    """

    def fetch(tensor: Tensor) -> Tensor:
        full = full_tensor(tensor.detach())
        if not keep:
            return torch.empty(0, dtype=full.dtype)
        return full.cpu() if isinstance(tensor, DTensor) else full

    return apply_to_collection(tree, Tensor, fetch)
