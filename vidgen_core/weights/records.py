"""What is known of a checkpoint before a tensor is read: names, shapes, dtypes, and where the bytes lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .packing import PACKINGS

SCALE = "scale_weight"
"""last part of the name of a float8 weight's scale, here and in ComfyUI's files"""
FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    packing: str | None = None
    """the GGUF type of weights packed in blocks ("Q4_K", ...); ``dtype`` is uint8 then"""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        if self.packing is None:
            return self.num_elements * self.dtype.itemsize
        return PACKINGS[self.packing].num_bytes(self.num_elements)


class Place(NamedTuple):
    """Where the bytes of a tensor lie, and what they are."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...] | None = None
    """in elements; None for rows one after another"""

    @property
    def num_bytes(self) -> int:
        """From the first element to the last one."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return math.prod(self.shape) * self.dtype.itemsize
        span = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (span + 1) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a reader of one kind of file found."""

    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, Place]
    metadata: Mapping[str, str]
    head: bytes = b""
    """what goes into the fingerprint besides probes of the data"""
    data_start: int = 0


def packed_name(name: str, packing: str) -> str:
    """The name under which packed bytes travel through a key map: ``a.weight`` -> ``a.packed.Q4_K``."""
    return f"{name.removesuffix('.weight')}.packed.{packing}"


def scale_name(weight: str) -> str:
    """``a.weight`` -> ``a.scale_weight``."""
    return weight.removesuffix("weight") + SCALE


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The table of contents of one checkpoint: a file, or a set of shards."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    """the weights; scales of float8 weights are not among them"""
    metadata: Mapping[str, str]
    num_bytes: int
    """size of the file, or of all shards"""
    digest: str
    """fingerprint of the checkpoint: its header and probes of its data (not a full hash: files have 26 GB)"""
    container: str = "safetensors"
    """``"safetensors"``, ``"torch"`` or ``"gguf"``"""
    places: Mapping[str, Place] = field(default_factory=dict)
    """where each of ``tensors`` lies"""
    scales: Mapping[str, Place] = field(default_factory=dict)
    """weight -> where its scale lies"""
    scale_file: Path | None = None
    """where the scales of float8 weights are expected when they are not in the checkpoint itself"""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def is_quantised(self) -> bool:
        """Some weights are float8 or packed."""
        return any(info.packing is not None or info.dtype in FLOAT8 for info in self.tensors.values())

    def meta_tensors(self) -> dict[str, Tensor]:
        """Tensors without data, to try a translation of names on."""
        return {n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in self.tensors.items()}

    def stored_names(self, name: str) -> list[str]:
        """The names under which ``read_tensors`` gives a weight: its own or its packed one, and its scale's."""
        packing = self.tensors[name].packing
        names = [name if packing is None else packed_name(name, packing)]
        return [*names, scale_name(name)] if name in self.scales else names

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())


def damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint is damaged: {why}", given=path, do="download or export it again")


def truncated(path: Path, *, have: int, need: int) -> CheckpointError:
    return CheckpointError(
        "The checkpoint is cut short",
        given=f"{path} with {have:,} bytes",
        expected=f"{need:,} bytes",
        do="the download or copy did not finish: fetch it again",
    )
