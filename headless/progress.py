"""A progress bar with the time left, on one line of a terminal; plain lines where there is none."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

TITLES = {
    "encode": "reading the prompt",
    "compile": "compiling, the first step takes longer",
    "sample": "sampling",
    "decode": "decoding",
    "save": "saving",
    "prompts": "prompts",
}
_WIDTH = 24
_EVERY_S = 0.1
_PLAIN_EVERY_S = 10.0


class ProgressBar:
    """Draws what :class:`~vidgen_core.memory.host.LocalHost` reports: call it with (what, done, total).

    Args:
        stream: standard error, so that standard output stays for results.
        clock: seconds, for the tests.
    """

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._is_terminal = stream.isatty()
        self._what = ""
        self._start = self._drawn = clock()
        self._first = 0
        self._open = False  # a line of the bar is on the terminal

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self._clock()
        if what != self._what:
            self.close()
            # A run that is taken up again starts above 0: the pace counts from there.
            self._what, self._start, self._first, self._drawn = what, now, done, -1e9
        if now - self._drawn < (_EVERY_S if self._is_terminal else _PLAIN_EVERY_S) and done < total:
            return
        self._drawn = now
        line = f"{TITLES.get(what, what)}: {self._state(done, total, now)}"
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns - 1
            self._stream.write("\r\x1b[K" + line[:columns])
            self._open = True
        elif done == total or now - self._start >= _PLAIN_EVERY_S:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _state(self, done: int, total: int, now: float) -> str:
        filled = _WIDTH * done // max(1, total)
        bar = f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {done}/{total}"
        if done == total:
            return f"{bar}, {clock_time(now - self._start)}"
        if done == self._first:
            return bar
        left = (now - self._start) / (done - self._first) * (total - done)
        return f"{bar}, {clock_time(left)} left"

    def close(self) -> None:
        """End the line, so that the next text starts on its own."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


def clock_time(seconds: float) -> str:
    """``8 s``, ``2:05`` or ``1:02:05``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
