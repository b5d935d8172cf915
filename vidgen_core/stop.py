"""Whether the user asked to stop, for all that computes for long, however deep it lies.

Who knows says it for a while (:func:`asking`; a host by way of ``memory.cancel``); whose work takes more than a moment
asks in between (:func:`check_cancelled`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_ask: ContextVar[Callable[[], None] | None] = ContextVar("vidgen_stop", default=None)


@contextlib.contextmanager
def asking(ask: Callable[[], None]) -> Iterator[None]:
    """:func:`check_cancelled` calls ``ask`` inside the block."""
    token = _ask.set(ask)
    try:
        yield
    finally:
        _ask.reset(token)


def check_cancelled() -> None:
    """Raise what is raised when the user asked to stop; nothing where nobody knows."""
    ask = _ask.get()
    if ask is not None:
        ask()
