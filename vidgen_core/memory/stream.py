"""Blocks that are brought when they run: each one gets its weights before it runs and loses them after it.

A network that repeats a block many times then needs the memory of two blocks only: the one that runs, and the next one,
which comes meanwhile. A :class:`Feed` brings them: from the file by a thread, or to a device with memory of its own by
a copy stream, out of one pinned buffer for each block. What is computed does not change by a bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .host import available_memory

log = logging.getLogger("vidgen")

Tensors = dict[str, Tensor]
Watch = Callable[[str, int, float, float], None]
"""told of a piece of work: "read", "wait" or "run", number of the block, begin and end (``time.perf_counter``)"""


class Feed(Protocol):
    """Where the weights of blocks come from. Called by one thread."""

    watch: Watch | None
    """told of "read" where blocks are read from a file"""

    def start(self, number: int) -> None:
        """Begin to bring a block that will be taken soon."""
        ...

    def take(self, number: int) -> Callable[[], Tensors]:
        """Wait for the block, or bring it now; what is given makes the state dict of it, on the device."""
        ...

    def done(self, number: int) -> None:
        """The block has run, or failed: its memory may be used again."""
        ...

    def forget(self) -> None:
        """The run is over, however it ended: keep nothing that came for it."""
        ...


class BlockStream:
    """Gives blocks their weights while they run.

    It stands around the ``forward`` of each block, so the network's own knows nothing of it. Weights are put into the
    modules that had them at the start, also when a layer was wrapped since.

    Args:
        blocks: in the order they run, with all weights on the meta device. Blocks that stay in memory may run between.
    """

    def __init__(self, blocks: Sequence[nn.Module], feed: Feed) -> None:
        self._feed = feed
        self._slots = [_slots(block) for block in blocks]
        self._running_since = 0.0
        for number, block in enumerate(blocks):
            # Not hooks: torch does not call them for a KeyboardInterrupt, and then the weights would stay.
            block.forward = _between(block.forward, partial(self._fill, number), partial(self._empty, number))

    @property
    def watch(self) -> Watch | None:
        """For profiles: told of every piece of work."""
        return self._feed.watch

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self._feed.watch = watch

    def end_with(self, modules: Iterable[nn.Module]) -> None:
        """What was brought ahead goes when one of these is done, also when it fails between two blocks."""
        for module in modules:
            module.forward = _between(module.forward, self._begin, self._feed.forget)
            module.block_stream = self

    def _begin(self) -> None:
        self._feed.forget()
        self._feed.start(0)

    def _fill(self, number: int) -> None:
        started = time.perf_counter()
        taken = self._feed.take(number)
        if number + 1 < len(self._slots):
            self._feed.start(number + 1)
        state = taken()
        for name, (owner, leaf, _) in self._slots[number].items():
            _put(owner, leaf, state.pop(name))
        assert not state, f"block {number} has no place for {list(state)}"
        self._running_since = time.perf_counter()
        if self.watch is not None:
            self.watch("wait", number, started, self._running_since)

    def _empty(self, number: int) -> None:
        if self.watch is not None:
            self.watch("run", number, self._running_since, time.perf_counter())
        for owner, leaf, empty in self._slots[number].values():
            _put(owner, leaf, empty)
        self._feed.done(number)


def stream_of(module: nn.Module) -> BlockStream | None:
    """The stream that brings the blocks of a module, if there is one."""
    return getattr(module, "block_stream", None)


# --- from the file ----------------------------------------------------------------------------------------------------


class FileFeed:
    """Reads the next block in a thread while one runs.

    Args:
        read: number of a block -> its tensors in main memory; called in the thread.
        finish: number and what ``read`` gave -> the block's state dict; called when the block runs. None where ``read``
            gives that.
    """

    def __init__(self, read: Callable[[int], Tensors], finish: Callable[[int, Tensors], Tensors] | None = None) -> None:
        self.watch: Watch | None = None
        self._read, self._finish = read, finish
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="vidgen-blocks")
        self._coming: dict[int, Future[Tensors]] = {}

    def start(self, number: int) -> None:
        if number not in self._coming:
            self._coming[number] = self._reader.submit(_told, self.watch, self._read, number)

    def take(self, number: int) -> Callable[[], Tensors]:
        coming = self._coming.pop(number, None)
        self.forget()  # what else came is for a block out of turn
        tensors = _told(self.watch, self._read, number) if coming is None else coming.result()
        return partial(self._finished, number, tensors)

    def _finished(self, number: int, tensors: Tensors) -> Tensors:
        return tensors if self._finish is None else self._finish(number, tensors)

    def done(self, number: int) -> None:
        pass

    def forget(self) -> None:
        for coming in self._coming.values():
            coming.cancel()
        self._coming.clear()


def _told(watch: Watch | None, read: Callable[[int], Tensors], number: int) -> Tensors:
    started = time.perf_counter()
    tensors = read(number)
    if watch is not None:
        watch("read", number, started, time.perf_counter())
    return tensors


# --- to a device with memory of its own -------------------------------------------------------------------------------

_ALIGNMENT = 256
"""bytes; as torch aligns what it allocates on a GPU, so that the same kernels are chosen as for resident weights"""
_PIN_SHARE = 0.5
"""of the free main memory that may be pinned; the system cannot take it back"""


def flat_bytes(sizes: Iterable[int]) -> int:
    """Bytes of tensors of these sizes one after the other, each at an aligned place."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


@dataclass(frozen=True, slots=True)
class FlatBlock:
    """A block's weights one after the other in a single buffer, so that one copy moves them all."""

    flat: Tensor
    """(bytes,) uint8"""
    layout: dict[str, tuple[int, torch.Size, torch.dtype]]
    """name -> first byte, shape and dtype"""

    @classmethod
    def of(cls, tensors: Tensors, buffer: Callable[[int], Tensor]) -> FlatBlock:
        """Copies of ``tensors`` in ``buffer(bytes)``, which may be longer."""
        layout, end = {}, 0
        for name, tensor in tensors.items():
            layout[name] = end, tensor.shape, tensor.dtype
            end += flat_bytes([tensor.nbytes])
        block = cls(buffer(end)[:end], layout)
        for name, view in block.views(block.flat).items():
            view.copy_(tensors[name])
        return block

    def views(self, flat: Tensor) -> Tensors:
        """The tensors in a copy of :attr:`flat`."""
        views = {}
        for name, (start, shape, dtype) in self.layout.items():
            num_bytes = shape.numel() * dtype.itemsize
            views[name] = flat[start : start + num_bytes].view(dtype).view(shape)
        return views


class DeviceFeed:
    """Copies blocks to a device beside the computing: one copy for each, by a stream of its own, into two slots.

    Streams wait for each other through events, so this thread never waits for the device. As many blocks as main memory
    has room for are held there, pinned; the others come from the file through a pinned buffer for each slot.

    Args:
        read: number of a block -> its state dict in main memory; called in a thread where the block is not held.
        num_bytes: :func:`flat_bytes` of each block.
        held: how many bytes may be held in main memory; None: half of what is free.
    """

    def __init__(
        self,
        read: Callable[[int], Tensors],
        num_bytes: Sequence[int],
        device: torch.device,
        *,
        held: int | None = None,
        num_slots: int = 2,
    ) -> None:
        self.watch: Watch | None = None
        self._read, self._device = read, device
        self._pins = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if self._pins else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="vidgen-blocks")
        self._largest = max(num_bytes)
        self._held: dict[int, FlatBlock] = {}
        self._hold(num_bytes, _PIN_SHARE * available_memory() if held is None else held)
        self._bounces: list[Tensor | None] = [None] * num_slots
        self._slots: list[Tensor | None] = [None] * num_slots
        self._copied: list[Any] = [None] * num_slots
        """event after the last copy into a slot; while it has not come, the pinned buffer must not be written to"""
        self._free: list[Any] = [None] * num_slots
        """event after the last block that ran from a slot"""
        self._coming: dict[int, Future[Tensors] | Tensors] = {}

    def _hold(self, num_bytes: Sequence[int], room: float) -> None:
        for number, size in enumerate(num_bytes):
            if size > room:
                rest = len(num_bytes) - number
                log.info("%d of %d blocks are read from the file as they run.", rest, len(num_bytes))
                return
            room -= size
            self._held[number] = FlatBlock.of(self._read(number), partial(_buffer, pinned=self._pins))

    def start(self, number: int) -> None:
        if number in self._coming:
            return
        slot = number % len(self._slots)
        if self._slots[slot] is None:
            with torch.inference_mode(False):  # or the thread, which is in no such mode, could not write to it
                self._slots[slot] = torch.empty(self._largest, dtype=torch.uint8, device=self._device)
            if self._copies is not None:  # what used this memory before must be over
                self._copies.wait_stream(torch.cuda.current_stream(self._device))
        if number in self._held:
            self._coming[number] = self._copy(number, self._held[number])
        else:
            self._coming[number] = self._reader.submit(self._read_and_copy, number)

    def _read_and_copy(self, number: int) -> Tensors:
        tensors, slot = _told(self.watch, self._read, number), number % len(self._slots)
        if self._copied[slot] is not None:
            self._copied[slot].synchronize()  # this thread only: the buffer is still being copied from
        if self._bounces[slot] is None:
            self._bounces[slot] = _buffer(self._largest, pinned=self._pins)
        bounce = self._bounces[slot]
        assert bounce is not None
        return self._copy(number, FlatBlock.of(tensors, lambda num_bytes: bounce))

    def _copy(self, number: int, block: FlatBlock) -> Tensors:
        slot = number % len(self._slots)
        place = self._slots[slot]
        assert place is not None
        place = place[: len(block.flat)]
        if self._copies is None:
            place.copy_(block.flat)
            return block.views(place)
        if self._free[slot] is not None:
            self._copies.wait_event(self._free[slot])
        with torch.cuda.stream(self._copies):
            place.copy_(block.flat, non_blocking=True)
        self._copied[slot] = self._copies.record_event()
        return block.views(place)

    def take(self, number: int) -> Callable[[], Tensors]:
        if number not in self._coming:  # a block out of turn
            self.forget()
            self.start(number)
        coming = self._coming.pop(number)
        tensors = coming.result() if isinstance(coming, Future) else coming
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied[number % len(self._slots)])
        return lambda: tensors

    def done(self, number: int) -> None:
        if self._copies is not None:
            self._free[number % len(self._slots)] = torch.cuda.current_stream(self._device).record_event()

    def forget(self) -> None:
        """The slots are given back; what is held in main memory stays."""
        wait([coming for coming in self._coming.values() if isinstance(coming, Future) and not coming.cancel()])
        self._coming.clear()
        if self._copies is not None and any(slot is not None for slot in self._slots):
            # Whoever gets this memory next must not be overtaken by a copy into it.
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        self._slots = [None] * len(self._slots)
        self._free = [None] * len(self._free)
        self._bounces = [None] * len(self._bounces)


def _buffer(num_bytes: int, *, pinned: bool) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)


# --- around blocks ----------------------------------------------------------------------------------------------------


def _between(forward: Callable[..., Any], before: Callable[[], None], after: Callable[[], None]) -> Callable[..., Any]:
    """``forward`` with something done before it, and after it however it ends."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            before()
            return forward(*args, **kwargs)
        finally:
            after()

    return run


def _slots(block: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """name in the state dict -> (module, name in it, its empty tensor)."""
    slots = {}
    for name, tensor in block.state_dict().items():
        path, _, leaf = name.rpartition(".")
        assert tensor.is_meta, f"{name} of a streamed block has a weight already"
        slots[name] = block.get_submodule(path), leaf, tensor
    return slots


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)
