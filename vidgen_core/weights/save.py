"""Writing files so that a reader never sees half of one, and safetensors that say what they hold."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FileError
from .config import config_to_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = "1"
"""version of our metadata keys (``vidgen.*``)"""

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it becomes ``path`` in one step, else it goes away.

    The temporary file keeps the suffix of ``path``, for writers that read the format from it.

    Raises:
        FileError: no permission, full disk, missing folder. The old file, if any, is untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        if path.is_dir():
            raise FileError("The output is a folder", given=path, do="name a file inside it")
        with _named_temporary(path) as temporary:
            yield temporary
            _usual_permissions(temporary)
            _flush_to_disk(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error


@contextlib.contextmanager
def _named_temporary(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _usual_permissions(path: Path) -> None:
    """mkstemp, and safetensors' own writer, make the file private; the result should be as any other new file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_error(path: Path, error: OSError) -> FileError:
    """The :class:`FileError` that tells a user why ``path`` was not written."""
    if error.errno in _FULL_DISK:
        return FileError("The disk is full", given=path, do="free some space or write to another disk")
    if error.errno in _NO_PERMISSION:
        return FileError("This file may not be written", given=path, do="choose another folder or mend permissions")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return FileError("The folder does not exist", given=path.parent, do="create it or choose another folder")
    return FileError(f"The file could not be written ({error.strerror or error})", given=path)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Tensors that share memory are written once each."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(own, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            # The library tells the system's error number in its text only.
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def save_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    family: str,
    part: str,
    config: DataclassInstance,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one part of a model (network, codec or text) with everything needed to build it again.

    Args:
        tensors: the state dict, in the family's native names.
        family: e.g. ``"hunyuan"``.
        part: ``"network"``, ``"codec"`` or ``"text"``.
        config: the part's frozen dataclass.
        metadata: more keys, e.g. ``vidgen.defaults`` or ``modelspec.title``; they win over ours.
        dtype: floating tensors are cast to it; None keeps them.
    """
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    keys = {
        "vidgen.format": FORMAT,
        "vidgen.family": family,
        "vidgen.part": part,
        "vidgen.config": config_to_json(config),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{family}-video/{part}",
        "modelspec.implementation": "vidgen",
        "modelspec.title": f"{family} {part}",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "modelspec.license": "Apache-2.0",
    }
    save_tensors(path, tensors, {**keys, **(metadata or {})})


def save_json(path: str | Path, value: object) -> None:
    """Write indented JSON atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
