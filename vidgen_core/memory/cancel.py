"""Asking whether to stop, often enough that a stop is heard within a second.

A host answers; who computes for long asks. Loops (reading weights, writing frames) call :func:`check_cancelled`.
Networks are not touched: :func:`watched` asks before each of their layers, from outside.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

from ..stop import asking, check_cancelled
from .host import Host

__all__ = ["check_cancelled", "listening", "result_of", "watched"]

T = TypeVar("T")

WAIT_S = 0.1
"""the longest wait for something else (a disk, another process) between two questions"""
BLOCKS_AHEAD = 2
"""blocks that may be queued on a GPU: a stop ends the queue, it does not empty it"""


def listening(host: Host) -> AbstractContextManager[None]:
    """:func:`check_cancelled` asks ``host`` inside the block."""
    return asking(host.check_cancelled)


def result_of(future: Future[T]) -> T:
    """What ``future`` gives, asking while it is on its way."""
    while True:
        try:
            return future.result(timeout=WAIT_S)
        except NotYet:
            if future.done():  # the work itself ran into a time limit
                raise
            check_cancelled()


@contextlib.contextmanager
def watched(host: Host, *modules: object) -> Iterator[None]:
    """Ask ``host`` before every layer of ``modules``, and in the loops that listen; what is no module is left alone.

    On a CPU that is every layer. A GPU works behind the program, so there it is every block, and the program does not
    run further ahead than :data:`BLOCKS_AHEAD` of them: the GPU never waits for it, and a stop is heard at once.
    """
    on_gpu = host.device().type == "cuda" and torch.cuda.is_available()
    ask = _Pace(host) if on_gpu else _Question(host)
    hooks: list[Any] = []
    try:
        for module in modules:
            if isinstance(module, nn.Module):
                hooks += [place.register_forward_pre_hook(ask) for place in _places(module, layers=not on_gpu)]
        with listening(host):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(module: nn.Module, *, layers: bool) -> Iterator[nn.Module]:
    """The blocks of a module, and the layers in them; a compiled block is one piece."""
    blocks = {id(child) for item in module.modules() if isinstance(item, nn.ModuleList) for child in item}

    def walk(item: nn.Module) -> Iterator[nn.Module]:
        children = list(item.children())
        if id(item) in blocks or (layers and not children):
            yield item
        if not is_compiled(item):
            for child in children:
                yield from walk(child)

    # A module that stands in two places is asked once.
    return iter(dict.fromkeys(walk(module)))


def is_compiled(module: nn.Module) -> bool:
    """Whether the module's insides are one compiled piece, in which nobody may ask."""
    return module._compiled_call_impl is not None or hasattr(vars(module).get("forward"), "compiled_forward")


class _Question:
    def __init__(self, host: Host) -> None:
        self._host = host

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self._host.check_cancelled()


class _Pace:
    """A question that also waits until the GPU has come near."""

    def __init__(self, host: Host, event: Callable[[], Any] = torch.cuda.Event) -> None:
        self._host, self._event = host, event
        self._queued: deque[Any] = deque()

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self._host.check_cancelled()
        event = self._event()
        event.record()
        self._queued.append(event)
        while len(self._queued) > BLOCKS_AHEAD:
            while not self._queued[0].query():
                time.sleep(0.001)
                self._host.check_cancelled()
            self._queued.popleft()
