"""The table of contents of a GGUF file, read with the ``gguf`` library; see ``packing`` for what its blocks hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, MissingLibraryError
from .packing import PACKINGS
from .records import Contents, Place, TensorInfo, truncated

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
_SHAPE_KEY = "comfy.gguf.orig_shape."
"""GGUF has four dimensions at most; files of video models tell the shape of a larger weight here"""


def read_gguf(path: Path, num_bytes: int) -> Contents:
    """Names, shapes, places and short metadata (``gguf.NAME``) of a GGUF file.

    Raises:
        CheckpointError: it is damaged, cut short, or packed in a way that is not known.
        MissingLibraryError: ``gguf`` is not installed.
    """
    reader = _open(path)
    tensors, places = {}, {}
    for item in reader.tensors:
        info, place = _tensor(path, reader, item)
        if place.offset + place.num_bytes > num_bytes:
            raise truncated(path, have=num_bytes, need=place.offset + place.num_bytes)
        tensors[item.name], places[item.name] = info, place
    metadata = {
        f"gguf.{name}": str(field.contents())
        for name, field in reader.fields.items()
        if len(field.types) == 1 and not name.startswith("GGUF.")
    }
    head = repr(sorted(metadata.items()) + [(n, info.shape, info.packing) for n, info in tensors.items()]).encode()
    return Contents(
        tensors=tensors, places=places, metadata=metadata, head=head, data_start=min(reader.data_offset, num_bytes)
    )


def read_fields(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Those of these fields that a GGUF file has, lists among them.

    Raises:
        CheckpointError, MissingLibraryError: as :func:`read_gguf`.
    """
    fields = _open(path).fields
    return {name: fields[name].contents() for name in names if name in fields}


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "GGUF files are read with the gguf library", given=path, do="pip install gguf"
        ) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(
            "The GGUF file is damaged or cut short", given=f"{path} ({error})", do="download or export it again"
        ) from error


def _tensor(path: Path, reader: GGUFReader, item: ReaderTensor) -> tuple[TensorInfo, Place]:
    packing = item.tensor_type.name
    shape = tuple(int(size) for size in reversed(item.shape.tolist()))
    offset = int(item.data_offset)
    original = reader.fields.get(_SHAPE_KEY + item.name)
    if packing in _PLAIN:
        if original is not None:
            shape = tuple(int(size) for size in original.contents())
        return TensorInfo(shape, _PLAIN[packing]), Place(path, offset, shape, _PLAIN[packing])
    if packing not in PACKINGS:
        raise CheckpointError(
            f"The weight {item.name!r} is packed in a way that is not supported",
            given=f"{packing} in {path}",
            expected=", ".join([*_PLAIN, *PACKINGS]),
            do="use another quantisation of this model, e.g. Q8_0 or Q4_K",
        )
    if len(shape) != 2 or original is not None:
        raise CheckpointError(
            f"The weight {item.name!r} is packed but is no matrix",
            given=f"shape {shape} in {path}",
            do="use another file",
        )
    row_bytes = PACKINGS[packing].num_bytes(shape[1])
    return TensorInfo(shape, torch.uint8, packing), Place(path, offset, (shape[0], row_bytes), torch.uint8)
