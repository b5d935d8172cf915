"""The table of contents of a file of ``torch.save`` (.pt, .ckpt, .bin), read without its tensors and without code.

``torch.load`` runs with ``weights_only`` under fake tensors: the pickle may name tensors and plain containers only, and
each tensor comes as a shape with the offset of its bytes. They are mapped or read later like any other file's.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .records import Contents, Place, TensorInfo, damaged

WRAPPERS = ("module", "ema", "state_dict", "model_state_dict", "model", "params")
"""keys under which trainers put the weights; the first one that holds tensors is taken"""


def read_torch(path: Path, num_bytes: int) -> Contents:
    """Names, shapes and places of the tensors in a torch file.

    Raises:
        CheckpointError: it is cut short, or no torch file, or holds more than weights.
    """
    weights = _state_dict(path, _load_fake(path))
    tensors, places = {}, {}
    for name, tensor in weights.items():
        place = _place(path, tensor)
        if place.offset + place.num_bytes > num_bytes:
            raise damaged(path, f"the tensor {name!r} lies behind its end")
        tensors[name], places[name] = TensorInfo(place.shape, place.dtype), place
    head = repr([(name, tuple(info.shape), str(info.dtype)) for name, info in tensors.items()]).encode()
    return Contents(tensors=tensors, places=places, metadata={}, head=head)


def map_file(path: Path) -> Path:
    """Where Tencent's float8 files have their scales: ``NAME_map.pt`` beside ``NAME.pt``."""
    return path.with_name(f"{path.stem}_map{path.suffix}")


def read_scale_map(path: Path, weights: list[str]) -> dict[str, Place]:
    """weight -> place of its scale, from a file ``{layer: scale}`` that names layers without ``.weight``.

    Raises:
        CheckpointError: the file is damaged, holds something else, or lacks the scale of a weight.
    """
    scales = _load_fake(path)
    if not isinstance(scales, Mapping) or not all(isinstance(scale, Tensor) for scale in scales.values()):
        raise CheckpointError("This is not a map of float8 scales", given=path, expected="{layer name: scale}")
    missing = [name for name in weights if name.removesuffix(".weight") not in scales]
    if missing:
        raise CheckpointError(
            f"The map of float8 scales lacks {len(missing)} of {len(weights)} layers",
            given=f"{path} without {missing[0].removesuffix('.weight')}",
            do="use the map that was published with this checkpoint",
        )
    return {name: _place(path, scales[name.removesuffix(".weight")]) for name in weights}


def _load_fake(path: Path) -> Any:
    try:
        # An open file: for a path, torch.load may take another way for another ending.
        with path.open("rb") as file:
            _check_archive(file)
            from torch._subclasses import FakeTensorMode  # seconds, which only a torch file is worth

            file.seek(0)
            with FakeTensorMode():
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "The file holds more than weights, and running what strangers saved is not safe",
            given=path,
            expected="a file that torch.load(weights_only=True) reads",
            do="get the .safetensors version, or convert it on a machine where you trust the file",
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            "The torch file is damaged, cut short, or another kind of zip archive",
            given=path,
            expected="a file of torch.save",
            do="download or export it again",
        ) from error


def _check_archive(file: BinaryIO) -> None:
    """torch.save packs nothing: an entry that is packed, or larger than the file, would only fill memory."""
    if not zipfile.is_zipfile(file):
        raise EOFError("no directory of a zip archive at the end")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise EOFError(str(error)) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise EOFError("it is packed")
    if sum(entry.file_size for entry in entries) > file.seek(0, 2):
        raise EOFError("its entries are larger than the file")


def _state_dict(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The names and tensors in what was saved, through at most two layers of wrapping."""
    for _ in range(2):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    tensors = {}
    if isinstance(loaded, Mapping):
        tensors = {name: t for name, t in loaded.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if not tensors:
        raise CheckpointError(
            "The torch file holds no weights by name",
            given=path,
            expected="a dictionary of tensors, alone or under " + ", ".join(map(repr, WRAPPERS)),
        )
    return tensors


def _place(path: Path, tensor: Tensor) -> Place:
    # Fake storages are told by torch.load where their bytes begin in the file.
    start: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[attr-defined]
    return Place(
        file=path,
        offset=start + int(tensor.storage_offset()) * tensor.dtype.itemsize,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        stride=None if tensor.is_contiguous() else tuple(tensor.stride()),
    )
