"""A copy of a checkpoint in host memory, taken between two steps and written later, while training goes on."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


@dataclass
class Snapshot:
    """A checkpoint whose tensors lie in host memory of their own.

    Copies from a device may still be under way: `content` waits for them.
    """

    _content: dict[str, Any]
    _buffers: list[Tensor] = field(default_factory=list)
    _copied: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def content(self) -> dict[str, Any]:
        """The checkpoint, complete; any thread may ask for it."""
        for event in self._copied:
            event.synchronize()
        return self._content


class SnapshotBuffers:
    """Takes snapshots into buffers that are used again: fresh memory costs many times what copying into it does.

    A copy from a CUDA device goes into pinned memory on the device's current stream: what the stream does later, such
    as the next optimiser step, comes after it, so neither the host nor the snapshot has to wait.
    """

    def __init__(self) -> None:
        self._free: dict[tuple, list[Tensor]] = defaultdict(list)

    def take(self, checkpoint: dict[str, Any]) -> Snapshot:
        """A snapshot of `checkpoint`: its tensors copied, its dicts and lists made anew.

        Args:
            checkpoint: nested dicts, lists and tuples of tensors and plain values.
        """
        snapshot = Snapshot({})
        devices: set[torch.device] = set()

        def copy(tensor: Tensor) -> Tensor:
            buffer = self._buffer(tensor)
            buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            snapshot._buffers.append(buffer)
            if tensor.is_cuda:
                devices.add(tensor.device)
            return buffer

        snapshot._content = apply_to_collection(checkpoint, Tensor, copy)
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            snapshot._copied.append(event)
        return snapshot

    def give_back(self, snapshot: Snapshot) -> None:
        """The snapshot's memory is free for the next one."""
        for buffer in snapshot._buffers:
            self._free[_kind(buffer, buffer.is_pinned())].append(buffer)
        snapshot._buffers, snapshot._content = [], {}

    def release(self) -> None:
        """Gives free memory back to the system."""
        self._free.clear()

    def _buffer(self, tensor: Tensor) -> Tensor:
        pinned = tensor.is_cuda
        free = self._free[_kind(tensor, pinned)]
        # Two threads: one takes, one gives back; pop and append are atomic.
        return free.pop() if free else torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)


def _kind(tensor: Tensor, pinned: bool) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), pinned
