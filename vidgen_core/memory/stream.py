"""Blocks that live in a file: each one gets its weights before it runs and loses them after it.

A network that repeats a block many times then needs the memory of two blocks only: the one that runs, and the next one,
which a thread reads meanwhile. What is computed does not change by a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from .cancel import result_of

Tensors = dict[str, Tensor]


class BlockStream:
    """Gives blocks their weights while they run.

    It stands around the ``forward`` of each block, so the network's own knows nothing of it. Weights are put into the
    modules that had them at the start, also when a layer was wrapped since.

    Args:
        blocks: in the order they run, with all weights on the meta device.
        read: number of a block -> its tensors in main memory; called in a thread of its own.
        finish: number and what ``read`` gave -> the block's state dict on the device.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        read: Callable[[int], Tensors],
        finish: Callable[[int, Tensors], Tensors],
    ) -> None:
        self._read, self._finish = read, finish
        self._slots = [_slots(block) for block in blocks]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="vidgen-blocks")
        self._coming: tuple[int, Future[Tensors]] | None = None
        for number, block in enumerate(blocks):
            # Not hooks: torch does not call them for a KeyboardInterrupt, and then the weights would stay.
            block.forward = _between(block.forward, partial(self._fill, number), partial(self._empty, number))

    def end_with(self, modules: Iterable[nn.Module]) -> None:
        """What was read ahead goes when one of these is done, also when it fails between two blocks."""
        for module in modules:
            module.forward = _between(module.forward, self._forget, self._forget)

    def _fill(self, number: int) -> None:
        tensors = self._take(number)
        if number + 1 < len(self._slots):
            self._coming = number + 1, self._reader.submit(self._read, number + 1)
        state = self._finish(number, tensors)
        del tensors
        for name, (owner, leaf, _) in self._slots[number].items():
            _put(owner, leaf, state.pop(name))
        assert not state, f"block {number} has no place for {list(state)}"

    def _take(self, number: int) -> Tensors:
        """The block's tensors: read ahead, else read now."""
        coming, self._coming = self._coming, None
        if coming is None or coming[0] != number:
            coming = number, self._reader.submit(self._read, number)
        return result_of(coming[1])

    def _empty(self, number: int) -> None:
        for owner, leaf, empty in self._slots[number].values():
            _put(owner, leaf, empty)

    def _forget(self) -> None:
        self._coming = None


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
