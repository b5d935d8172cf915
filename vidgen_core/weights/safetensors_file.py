"""The table of contents of a safetensors file.

The format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes. The JSON maps a
name to ``{"dtype", "shape", "data_offsets"}`` and ``__metadata__`` to a dict of strings
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from .records import Contents, Place, TensorInfo, damaged, truncated

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


def read_safetensors(path: Path, file: BinaryIO, num_bytes: int) -> Contents:
    """Parse the header of an open file.

    Raises:
        CheckpointError: it is another kind of file, damaged, or cut short.
    """
    file.seek(0)
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise _another_kind(path)
    if 8 + length > num_bytes:
        raise truncated(path, have=num_bytes, need=8 + length)
    raw = file.read(length)
    entries = _decode_json(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise damaged(path, "its metadata is not a table")
    tensors, places, end = _tensor_table(path, entries, 8 + length)
    if end != num_bytes:
        if end > num_bytes:
            raise truncated(path, have=num_bytes, need=end)
        raise damaged(path, f"it has {num_bytes - end} bytes more than its header lists")
    return Contents(
        tensors=tensors,
        places=places,
        metadata={str(key): str(value) for key, value in metadata.items()},
        head=raw,
        data_start=8 + length,
    )


def _another_kind(path: Path) -> CheckpointError:
    return CheckpointError(
        "This is not a checkpoint",
        given=path,
        expected="a .safetensors, .pt, .ckpt, .bin or .gguf file",
        do="pick the checkpoint itself",
    )


def _decode_json(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        if not raw.lstrip().startswith(b"{"):
            raise _another_kind(path) from None
        raise damaged(path, "its header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise damaged(path, "its header is not a table")
    return entries


def _tensor_table(
    path: Path, entries: Mapping[str, Any], data_start: int
) -> tuple[dict[str, TensorInfo], dict[str, Place], int]:
    """(name -> shape and dtype, name -> where it lies, where the data end)."""
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    end = data_start
    for name, entry in entries.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            valid = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
        except (TypeError, KeyError, ValueError):
            raise damaged(path, f"the entry of {name!r} is malformed") from None
        if dtype not in DTYPES:
            raise CheckpointError(
                f"The tensor {name!r} has a number format that is not supported",
                given=f"{dtype} in {path}",
                expected=", ".join(DTYPES),
            )
        info = TensorInfo(shape, DTYPES[dtype])
        if not valid or last - first != info.num_bytes:
            raise damaged(path, f"the size of {name!r} does not fit its shape")
        tensors[name] = info
        places[name] = Place(path, data_start + first, info.shape, info.dtype)
        end = max(end, data_start + last)
    return tensors, places, end
