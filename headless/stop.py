"""Ctrl-C: noticed at any moment, obeyed at a good one."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

from ..vidgen_core.errors import Cancelled


class Stop:
    """Ctrl-C and SIGTERM: the first asks the run to stop at its next look, the second stops at once.

    A handler and not KeyboardInterrupt: an exception out of nowhere could fall between two lines that belong together.
    """

    def __init__(self) -> None:
        self.event = threading.Event()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        # Python delivers signals to the main thread only, and lets no other one ask for them.
        in_main = threading.current_thread() is threading.main_thread()
        signals = [signal.SIGINT, signal.SIGTERM] if in_main else []
        before = {number: signal.signal(number, self._ask) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()
        sys.stderr.write("\nstopping; once more to stop at once\n")

    def check(self) -> None:
        """Raise Cancelled if someone asked."""
        if self.event.is_set():
            raise Cancelled("stopped by the user")
