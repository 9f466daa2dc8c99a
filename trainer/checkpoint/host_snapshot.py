"""Copies of a checkpoint in host memory: taken between two steps, written to a file while training goes on."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


@dataclass
class Snapshot:
    """A checkpoint whose tensors are in host memory of their own.

    Copies from a device may not have finished yet: `content` waits for them.
    """

    _content: dict[str, Any]
    _buffers: list[Tensor] = field(default_factory=list)
    _copied: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def content(self) -> dict[str, Any]:
        """The checkpoint, when all copies have finished. May be called from any thread."""
        for event in self._copied:
            event.synchronize()
        return self._content


class SnapshotBuffers:
    """Takes snapshots into buffers that it uses again: allocating memory takes many times as long as copying into it.

    A tensor on a CUDA device is copied into pinned memory on the device's current stream. Work that is queued there
    afterwards, such as the next optimiser step, runs after the copy, so the host need not wait for it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple, list[Tensor]] = defaultdict(list)

    def take(self, checkpoint: dict[str, Any]) -> Snapshot:
        """A snapshot of `checkpoint`: copies of its tensors, in new dicts and lists.

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

    def reuse(self, snapshot: Snapshot) -> None:
        """Makes the buffers of a snapshot that is no longer needed available to the next one."""
        for buffer in snapshot._buffers:
            self._free[_kind(buffer, buffer.is_pinned())].append(buffer)
        snapshot._buffers, snapshot._content = [], {}

    def release(self) -> None:
        """Frees the buffers that no snapshot uses."""
        self._free.clear()

    def _buffer(self, tensor: Tensor) -> Tensor:
        pinned = tensor.is_cuda
        free = self._free[_kind(tensor, pinned)]
        # One thread takes buffers, another returns them: pop and append are atomic.
        return free.pop() if free else torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)


def _kind(tensor: Tensor, pinned: bool) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), pinned
