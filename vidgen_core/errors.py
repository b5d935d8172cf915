"""The errors a user may see: one small tree, and one exception for a cancelled run.

Each message says what was given, what is expected and what to do about it. A bug of ours is an
``assert`` or an ordinary exception; a :class:`UserError` means that the input can be mended.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: what happened, what was given, what is expected and what to do.

    Args:
        what: one sentence on what went wrong.
        given: the offending value, in the user's own words.
        expected: what would have been accepted.
        do: the next thing to try.
    """

    def __init__(self, what: str, *, given: object = None, expected: str | None = None, do: str | None = None) -> None:
        self.what = what
        self.given = None if given is None else str(given)
        self.expected = expected
        self.do = do
        parts = [what.rstrip(".") + "."]
        if self.given is not None:
            parts.append(f"Given: {self.given}.")
        if expected is not None:
            parts.append(f"Expected: {expected.rstrip('.')}.")
        if do is not None:
            parts.append(f"What to do: {do.rstrip('.')}.")
        super().__init__(" ".join(parts))

    def parts(self) -> dict[str, str | None]:
        """For programs: each of the four parts by its name."""
        return {"what": self.what, "given": self.given, "expected": self.expected, "do": self.do}


class SettingsError(UserError):
    """A number, size or option that cannot be used (0 frames, negative width, unknown sampler)."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> SettingsError:
    """The error for a name that is in no table, with the closest one that is. ``kind``: "sampler", "schedule"."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    do = f'did you mean "{close[0]}"?' if close else "choose one of these names"
    return SettingsError(f"There is no such {kind}", given=repr(name), expected="one of " + ", ".join(names), do=do)


class FileError(UserError):
    """A file that is missing, unreadable, unwritable, or for which the disk is full."""


class CheckpointError(UserError):
    """A file that is there but is not the checkpoint it should be (wrong family, missing keys, damaged)."""


class RecipeError(UserError):
    """A training recipe with an unknown key or a value that cannot work."""


class MissingLibraryError(UserError):
    """An optional library is needed for what was asked and is not installed."""


class NumericsError(UserError):
    """Non-finite numbers appeared while computing."""


class MemoryLimitError(UserError):
    """What was asked for does not fit the memory, also after everything was made smaller that can be."""


class Cancelled(Exception):
    """The user asked to stop. Not an error: partial results stay, hosts turn it into their own signal."""
