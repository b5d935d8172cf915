"""Which files make up a checkpoint: one file, a set of shards, or a folder that holds either."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import CheckpointError, FileError
from .records import damaged

ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".gguf")
"""of the files that are offered; what a file is does not depend on it"""
INDEX = ".index.json"
CONFIG_KEY = "config.json"
"""metadata key under which the text of a folder's config.json is found"""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.\w+")


def complete_set(path: Path) -> list[Path]:
    """The files of the checkpoint at ``path``: a file, a shard, an index, or a folder.

    Raises:
        FileError: there is no checkpoint in the folder.
        CheckpointError: shards are missing, or a folder holds several checkpoints.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(INDEX):
        return _indexed(path)
    if _SHARD.fullmatch(path.name):
        for index in sorted(path.parent.glob(f"*{INDEX}")):
            files = _listed(index)
            if path.name in files:
                return _all_there(path, path.parent, files)
        return _numbered(path)
    return [path]


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, sorted: files, and a set of shards once (its index, or its first shard)."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    listed = {path.name for index in indices for path in shards_of(index)}
    found = [*indices]
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() not in ENDINGS or path.name in listed or not path.is_file():
            continue
        shard = _SHARD.fullmatch(path.name)
        first = min(folder.glob(f"{shard[1]}-*-of-{shard[3]}{path.suffix}")) if shard else path
        if path == first and not _is_companion(path):
            found.append(path)
    return sorted(found)


def _is_companion(path: Path) -> bool:
    """The scales of a float8 checkpoint beside it, which are no checkpoint."""
    stem = path.stem.removesuffix("_map")
    return stem != path.stem and path.with_name(stem + path.suffix).is_file()


def config_text(folder: Path) -> str | None:
    """The text of the folder's config.json, if it has one."""
    path = folder / "config.json"
    return path.read_text("utf-8") if path.is_file() else None


def _in_folder(folder: Path) -> list[Path]:
    found = checkpoints_in(folder)
    if not found:
        raise FileError(
            "There is no checkpoint in this folder",
            given=folder,
            expected="one file ending in " + ", ".join(ENDINGS) + f", or an {INDEX} with its shards",
            do="name the file, or the folder that holds it",
        )
    if len(found) > 1:
        raise CheckpointError(
            "There are several checkpoints in this folder",
            given=f"{folder} with " + ", ".join(path.name for path in found[:4]),
            expected="one",
            do="name the file to use",
        )
    return complete_set(found[0])


def shards_of(index: Path) -> list[Path]:
    """The files that an index lists; none for a damaged one, which says so when it is opened."""
    try:
        return [index.with_name(name) for name in _listed(index)]
    except CheckpointError:
        return []


def _listed(index: Path) -> list[str]:
    """The names of the shards in an index."""
    try:
        entries = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted({str(name) for name in entries.values()})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise damaged(index, "this index has no table of shards") from None
    if not names or any(Path(name).name != name for name in names):
        raise damaged(index, "its shards are not files beside it")
    return names


def _indexed(index: Path) -> list[Path]:
    return _all_there(index, index.parent, _listed(index))


def _numbered(path: Path) -> list[Path]:
    """The set of a shard without an index: ``NAME-00001-of-00003.END`` and so on."""
    match = _SHARD.fullmatch(path.name)
    assert match
    names = [f"{match[1]}-{number:05d}-of-{match[3]}{path.suffix}" for number in range(1, int(match[3]) + 1)]
    return _all_there(path, path.parent, names)


def _all_there(given: Path, folder: Path, names: list[str]) -> list[Path]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(names)} shards of this checkpoint are missing",
            given=f"{given} without " + ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else ""),
            expected="all shards in one folder",
            do="download the missing ones into " + str(folder),
        )
    return [folder / name for name in names]
