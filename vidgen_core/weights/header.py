"""What a safetensors file holds, read without loading a tensor: names, shapes, dtypes, metadata.

The format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes. The JSON maps a
name to ``{"dtype", "shape", "data_offsets"}`` and ``__metadata__`` to a dict of strings
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PROBE_BYTES = 65_536

# How other files begin, what they are, and what to do about them.
_OTHER_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, most likely a PyTorch .pt/.ckpt checkpoint", "convert it to safetensors first"),
    (b"\x80\x02", "a pickled PyTorch checkpoint (.pt, .ckpt, .bin)", "convert it to safetensors first"),
    (b"\x80\x04", "a pickle file", "convert it to safetensors first"),
    (b"GGUF", "a GGUF file", "use the safetensors version of this checkpoint"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull` or download the file"),
    (b"<!doctype", "a web page saved in place of the file", "download the file itself, not its page"),
    (b"<html", "a web page saved in place of the file", "download the file itself, not its page"),
    (b"\x93NUMPY", "a NumPy array", "pick the .safetensors checkpoint"),
    (b"\x89PNG", "a PNG picture", "pick the .safetensors checkpoint"),
    (b"\xff\xd8\xff", "a JPEG picture", "pick the .safetensors checkpoint"),
)


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The table of contents of one checkpoint file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    num_bytes: int
    """size of the file"""
    digest: str
    """fingerprint of the checkpoint: its header and probes of its data (not a full hash: files have 26 GB)"""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def meta_tensors(self) -> dict[str, Tensor]:
        """Tensors without data, to try a translation of names on."""
        return {n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        FileError: the file is missing, a folder, or cannot be read.
        CheckpointError: it is another kind of file, or it is damaged or cut short.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _parse(path, file)
    except FileNotFoundError:
        raise FileError("The checkpoint does not exist", given=path, do="check the path") from None
    except IsADirectoryError:
        raise FileError("A folder was given where one file is needed", given=path, do="name a file inside it") from None
    except PermissionError:
        raise FileError("The checkpoint may not be read", given=path, do="check the file's permissions") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise FileError("This is not a usable path", given=path) from error
        raise FileError(f"The checkpoint cannot be read ({error.strerror})", given=path) from error


def _parse(path: Path, file: BinaryIO) -> Header:
    num_bytes = file.seek(0, 2)
    file.seek(0)
    start = file.read(8)
    if num_bytes == 0:
        raise CheckpointError("The file is empty", given=path, do="download or export it again")
    _refuse_other_formats(path, start + file.read(56))
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise CheckpointError("This is not a safetensors file", given=path, expected="a .safetensors checkpoint")
    if 8 + length > num_bytes:
        raise _truncated(path, have=num_bytes, need=8 + length)
    file.seek(8)
    raw = file.read(length)
    entries = _decode_json(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "its metadata is not a table")
    tensors, end = _tensor_table(path, entries)
    if 8 + length + end != num_bytes:
        if 8 + length + end > num_bytes:
            raise _truncated(path, have=num_bytes, need=8 + length + end)
        raise _damaged(path, f"it has {num_bytes - 8 - length - end} bytes more than its header lists")
    return Header(
        path=path,
        tensors=tensors,
        metadata={str(key): str(value) for key, value in metadata.items()},
        num_bytes=num_bytes,
        digest=_digest(raw, file, 8 + length, num_bytes),
    )


def _refuse_other_formats(path: Path, start: bytes) -> None:
    for magic, what, do in _OTHER_FORMATS:
        if start.startswith(magic) or (magic.startswith(b"<") and start.lstrip().lower().startswith(magic)):
            raise CheckpointError(f"The file is {what}", given=path, expected="a .safetensors checkpoint", do=do)


def _decode_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        if not raw.lstrip().startswith(b"{"):
            raise CheckpointError(
                "This is not a safetensors file", given=path, expected="a .safetensors checkpoint"
            ) from None
        raise _damaged(path, "its header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a table")
    return entries


def _tensor_table(path: Path, entries: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], int]:
    """(name -> shape and dtype, number of bytes of data)."""
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, entry in entries.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            valid = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
        except (TypeError, KeyError, ValueError):
            raise _damaged(path, f"the entry of {name!r} is malformed") from None
        if dtype not in DTYPES:
            raise CheckpointError(
                f"The tensor {name!r} has a number format that is not supported",
                given=f"{dtype} in {path}",
                expected=", ".join(DTYPES),
            )
        info = TensorInfo(shape, DTYPES[dtype])
        if not valid or last - first != info.num_bytes:
            raise _damaged(path, f"the size of {name!r} does not fit its shape")
        tensors[name] = info
        end = max(end, last)
    return tensors, end


def _digest(header: bytes, file: BinaryIO, data_start: int, num_bytes: int) -> str:
    """Hash of the header and of probes at the start, the quarters and the end of the data."""
    hasher = hashlib.sha256(header)
    span = max(0, num_bytes - data_start - _PROBE_BYTES)
    for quarter in range(5):
        file.seek(data_start + span * quarter // 4)
        hasher.update(file.read(_PROBE_BYTES))
    return hasher.hexdigest()[:32]


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint is damaged: {why}", given=path, do="download or export it again")


def _truncated(path: Path, *, have: int, need: int) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is cut short",
        given=f"{path} with {have:,} bytes",
        expected=f"{need:,} bytes",
        do="the download or copy did not finish: fetch it again",
    )
