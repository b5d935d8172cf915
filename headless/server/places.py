"""The folders of a server, and the only way from a name that came over the network to a file in them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...vidgen_core.errors import FileError

KINDS = ("input", "output", "temp")
"""what ``type`` may be in ComfyUI's requests"""

_RESERVED = frozenset('<>:"|?*') | {chr(code) for code in range(32)}
_MAX_NAME_BYTES = 230
"""file systems take 255; a number and an ending may come behind"""
_MAX_PATH = 1000
_DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(1, 10))})


@dataclass(frozen=True, slots=True)
class Places:
    """Everything a server reads from strangers or writes lies below one folder."""

    root: Path

    def folder(self, kind: str) -> Path:
        """``input``, ``output``, ``temp`` or ``user``; made when it is not there."""
        folder = self.root / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def find(self, kind: str, subfolder: str, filename: str) -> Path:
        """A file that exists.

        Raises:
            FileError: it does not, or the name leads out of the folder.
        """
        path = self.place(kind, f"{subfolder}/{filename}" if subfolder else filename)
        if not path.is_file():
            raise FileError("There is no such file", given=f"{kind}/{subfolder}/{filename}".replace("//", "/"))
        return path

    def place(self, kind: str, name: str) -> Path:
        """The path for ``name`` (with ``/`` or ``\\``) in the folder of ``kind``; it need not exist.

        Raises:
            FileError: the name leads out of the folder, also through a link, or no system could write it.
        """
        if kind not in (*KINDS, "user"):
            raise FileError("There is no such kind of folder", given=kind, expected="one of " + ", ".join(KINDS))
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or len(name) > _MAX_PATH or any(not _is_plain(part) for part in parts):
            raise _outside(kind, name)
        folder = self.folder(kind).resolve()
        path = folder.joinpath(*parts)
        # resolve follows links: one that leads out of the folder is as bad as "..".
        if not Path(os.path.realpath(path)).is_relative_to(folder):
            raise _outside(kind, name)
        return path


def without_mark(name: str, kind: str) -> tuple[str, str]:
    """(file name, kind of folder) of a name with or without ComfyUI's mark behind, such as ``a.png [output]``.

    Args:
        kind: of a name without one.
    """
    for marked in KINDS:
        if name.endswith(f" [{marked}]"):
            return name.removesuffix(f" [{marked}]"), marked
    return name, kind


def _is_plain(part: str) -> bool:
    """A name that is the same file on every system."""
    stem = part.partition(".")[0].rstrip(" ").lower()
    return (
        part not in ("", ".", "..", "/")
        and len(part.encode("utf-8", "surrogatepass")) <= _MAX_NAME_BYTES
        and not _RESERVED & set(part)
        and part == part.rstrip(" .")
        and stem not in _DEVICES
        and part.isprintable()
    )


def _outside(kind: str, name: str) -> FileError:
    return FileError(
        f"This name cannot be used in the {kind} folder",
        given=repr(name[:200]),
        expected="a plain file name, with / between folders",
        do="leave out .., drive letters, a beginning slash and special characters",
    )
