"""Memory straight from the system: what is given back is gone, and what is used again need not be asked for again.

An allocator keeps pieces of many sizes in holes. Asking the system for each piece anew is no better: it empties every
page that is touched for the first time, which takes as long as normalising what is written there.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor; on the CPU in pages of its own, which the process has again when the tensor is gone."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    num_bytes = max(1, count * dtype.itemsize)
    private = hasattr(mmap, "MAP_PRIVATE")  # not on Windows, where memory without a name is private anyway
    block = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if private else mmap.mmap(-1, num_bytes)
    return torch.frombuffer(block, dtype=dtype, count=count).view(shape)


class Scratch:
    """Buffers that are used again and again, each for one purpose at a time."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.buffers: dict[Hashable, Tensor] = {}
        self.known: dict[Hashable, Any] = {}

    def take(self, purpose: Hashable, shape: tuple[int, ...]) -> Tensor:
        """A contiguous tensor that begins with what the one before of this purpose begins with."""
        count = math.prod(shape)
        known = self.buffers.get(purpose)
        if known is None or known.numel() < count:
            larger = pages((count,), self.dtype, self.device)
            if known is not None:
                larger[: known.numel()] = known
            known = self.buffers[purpose] = larger
        return known[:count].view(shape)

    def once(self, purpose: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives, which is called the first time only."""
        if purpose not in self.known:
            self.known[purpose] = make()
        return self.known[purpose]

    def clear(self) -> None:
        self.buffers.clear()
        self.known.clear()
