"""Interrupted runs: the sampler's state on disk, with a note of what run it belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import CheckpointError, FileError, SettingsError
from .finite import is_finite
from .sampling import SamplerState

log = logging.getLogger("vidgen")

SAVE_EVERY_S = 30.0
"""a killed process loses at most this much, and a run shorter than this writes nothing unless it is interrupted"""


MAX_KEPT = 8
"""runs in a folder of them; the oldest go, as nobody has taken them up"""
ENDING = ".unfinished"


class RunFile:
    """One file per run: written when the run stops early, read when it starts again, removed when it is done."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, writes: bool = True) -> None:
        """
        Args:
            path: of the file; it need not exist.
            identity: everything the result depends on; JSON values.
            writes: false for processes that help another one, which keeps the run for all of them.

        Raises:
            FileError: nothing could be written there. Better told before the work than after it.
        """
        self.path = path
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self.is_asked_for = True
        """the user named this file; else a damaged one is no reason to stop"""
        self._writes = writes
        self._last: SamplerState | None = None
        self._begun_at = self._saved_at = time.monotonic()
        if path.is_dir() or not path.parent.is_dir():
            raise FileError("The run cannot be kept here", given=path, expected="a file in an existing folder")
        if not os.access(path.parent, os.W_OK):
            raise FileError("The run cannot be kept here", given=path, do="choose a folder that you may write to")
        for part in path.parent.glob(f"{path.name}.*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)

    @classmethod
    def at(cls, path: Path, identity: Mapping[str, Any], *, writes: bool = True) -> RunFile:
        """In a file, or in a folder where the name is made of the identity: the same inputs find it again."""
        if not path.is_dir():
            return cls(path, identity, writes=writes)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        run = cls(path / f"{digest}{ENDING}", identity, writes=writes)
        run.is_asked_for = False
        _forget_old(path, except_for=run.path)
        return run

    def load(self) -> SamplerState:
        """The state to go on from; an empty one when there is no file.

        Raises:
            SettingsError: the file is of a run with another prompt, seed, checkpoint or setting.
            CheckpointError, FileError: it is damaged or cannot be read.
        """
        note = json.dumps(self.identity)
        if not self.path.exists():
            return SamplerState(run=note)
        try:
            state = SamplerState.load(self.path)
        except CheckpointError as problem:
            if self.is_asked_for:
                raise
            log.warning("the run starts afresh: %s", problem)
            self.remove()
            return SamplerState(run=note)
        before = json.loads(state.run) if state.run else {}
        changed = [key for key in self.identity if before.get(key) != self.identity[key]]
        if changed:
            raise SettingsError(
                f"The saved run was made with another {' and '.join(changed)}",
                given="; ".join(f"{key} {_short(self.identity[key])}" for key in changed),
                expected="; ".join(f"{key} {_short(before.get(key))}" for key in changed),
                do=f"use the settings of the saved run, or delete {self.path} to start afresh",
            )
        log.info("taking up the run in %s after step %d", self.path, state.step)
        self._last = state
        return state

    def keep(self, state: SamplerState) -> None:
        """Remember the state after a step; now and then also on disk."""
        # A copy of the record: tensors are never changed in place, but an interrupt may fall between two fields.
        self._last = replace(state, memory=dict(state.memory))
        if time.monotonic() - self._saved_at > SAVE_EVERY_S:
            self.save()
            self._saved_at = time.monotonic()

    @contextlib.contextmanager
    def saved_on_failure(self) -> Iterator[None]:
        """Write the last state if the block is left by any exception: cancelled, interrupted, out of memory."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self.save()

    def save(self) -> None:
        """Write the last state; a finished run too, as long as its result is in no file: decoding may be stopped."""
        if self._last is None or self._last.step == 0 or self._last.x is None or not self._writes:
            return
        if not self.is_asked_for and time.monotonic() - self._begun_at < SAVE_EVERY_S:
            return  # it is as quickly made again
        if not is_finite(self._last.x):  # known late on a GPU; the file of the steps before stays
            return
        try:
            self._last.save(self.path)
            log.info("the run is kept in %s after step %d", self.path, self._last.step)
        except FileError as problem:  # neither the run nor the exception on its way out should be lost to it
            log.warning("%s", problem)

    def remove(self) -> None:
        """The run is done."""
        if self._writes:
            self.path.unlink(missing_ok=True)


def forget_finished(folder: Path) -> None:
    """Remove the runs in a folder that made all their steps: their videos are safe now."""
    for path in folder.glob(f"*{ENDING}"):
        with contextlib.suppress(CheckpointError, FileError):
            state = SamplerState.load(path)
            if state.ts is not None and state.step == len(state.ts) - 1:
                path.unlink(missing_ok=True)


def _forget_old(folder: Path, *, except_for: Path) -> None:
    others = [path for path in folder.glob(f"*{ENDING}") if path != except_for]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[MAX_KEPT - 1 :]:
        path.unlink(missing_ok=True)


def _short(value: object, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
