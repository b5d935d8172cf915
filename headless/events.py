"""What happens during a render or a batch, told in one way: as JSON for programs, as words and a bar for people.

The events and what each says stand in docs/BATCH.md.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, TypeAlias

from .progress import ProgressBar

Tell: TypeAlias = Callable[[str, Mapping[str, Any]], None]
"""told (event, about it); from any thread"""


class JsonEvents:
    """Each event is one line: ``{"event": ..., "time": seconds since 1970, ...}``."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def __call__(self, event: str, about: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **about}, default=str)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


class BatchWords:
    """A bar over the whole batch and what went wrong on ``err``; the paths of finished results on ``out``."""

    def __init__(self, out: TextIO, err: TextIO, *, is_quiet: bool) -> None:
        self._out, self._err, self._is_quiet = out, err, is_quiet
        self._bar = ProgressBar(err)
        self._lock = threading.Lock()
        self._done = self._total = 0

    def __call__(self, event: str, about: Mapping[str, Any]) -> None:
        with self._lock:
            if event == "batch":
                self._done, self._total = about["kept"], about["prompts"]
            elif event in ("finished", "kept"):
                self._bar.close()
                self._out.write("".join(f"{path}\n" for path in about["files"]))
                self._out.flush()
            elif event in ("failed", "lost"):
                self._bar.close()
                self._err.write(f"vidgen: {_where(about)}: {about['error']}\n")
            self._done += event in ("finished", "failed")
            if event in ("batch", "finished", "failed") and not self._is_quiet:
                self._bar("prompts", self._done, self._total)
            elif event == "end":
                self._bar.close()


def _where(about: Mapping[str, Any]) -> str:
    return f"line {about['line']} ({about['name']})" if "line" in about else str(about["name"])
