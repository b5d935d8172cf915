"""What a checkpoint holds, read without loading a tensor: names, shapes, dtypes, metadata.

One file of any kind, a set of shards, or a folder with either. What a file is follows from its first bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, FileError
from .gguf_file import read_gguf
from .records import FLOAT8, SCALE, Header, Place, TensorInfo
from .safetensors_file import DTYPES, read_safetensors
from .shards import CONFIG_KEY, complete_set, config_text
from .torch_file import map_file, read_scale_map, read_torch

__all__ = ["DTYPES", "Header", "TensorInfo", "read_header"]

_PROBE_BYTES = 65_536
_SCALES = (SCALE, "weight_scale")
"""last part of the name of a weight's scale in ComfyUI's files: the older and the newer way"""
_NOTES = ("scaled_fp8", ".comfy_quant", ".scale_input", ".input_scale")
"""ends of the names of tensors that say that there are scales, and of the scales of activations for multiplying in
float8; here weights are widened instead"""

# How other files begin, what they are, and what to do about them.
_OTHER_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x80\x02", "a pickled PyTorch checkpoint of the old kind", "save it again with a current torch"),
    (b"\x80\x04", "a pickle file", "convert it to safetensors first"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run `git lfs pull` or download the file"),
    (b"<!doctype", "a web page saved in place of the file", "download the file itself, not its page"),
    (b"<html", "a web page saved in place of the file", "download the file itself, not its page"),
    (b"\x93NUMPY", "a NumPy array", "pick the checkpoint itself"),
    (b"\x89PNG", "a PNG picture", "pick the checkpoint itself"),
    (b"\xff\xd8\xff", "a JPEG picture", "pick the checkpoint itself"),
)


def read_header(path: str | Path) -> Header:
    """Read what a checkpoint holds; no tensor is read.

    Args:
        path: a .safetensors, a torch file (.pt, .ckpt, .bin), a GGUF file, the index of a set of shards, one of the
            shards, or a folder that holds one of these (as diffusers' ``transformer/``).

    Raises:
        FileError: the file is missing, a folder without a checkpoint, or cannot be read.
        CheckpointError: it is another kind of file, it is damaged or cut short, or shards are missing.
    """
    path = Path(path)
    with _readable(path):
        files = complete_set(path)
        headers = [_read_file(file) for file in files]
        config = config_text(files[0].parent) if path.is_dir() or len(files) > 1 else None
    header = _with_scales(headers[0] if len(headers) == 1 else _union(path, headers))
    if config is None:
        return header
    return replace(header, metadata={CONFIG_KEY: config, **header.metadata})


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of the file system as ours."""
    try:
        yield
    except FileNotFoundError:
        raise FileError("The checkpoint does not exist", given=path, do="check the path") from None
    except PermissionError:
        raise FileError("The checkpoint may not be read", given=path, do="check the file's permissions") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise FileError("This is not a usable path", given=path) from error
        raise FileError(f"The checkpoint cannot be read ({error.strerror})", given=path) from error


def _read_file(path: Path) -> Header:
    with path.open("rb") as file:
        num_bytes = file.seek(0, 2)
        file.seek(0)
        start = file.read(64)
        if num_bytes == 0:
            raise CheckpointError("The file is empty", given=path, do="download or export it again")
        _refuse_other_formats(path, start)
        if start.startswith(b"PK\x03\x04"):
            container, contents = "torch", read_torch(path, num_bytes)
        elif start.startswith(b"GGUF"):
            container, contents = "gguf", read_gguf(path, num_bytes)
        else:
            container, contents = "safetensors", read_safetensors(path, file, num_bytes)
        digest = _digest(contents.head, file, contents.data_start, num_bytes)
    return Header(
        path=path,
        tensors=contents.tensors,
        metadata=contents.metadata,
        num_bytes=num_bytes,
        digest=digest,
        container=container,
        places=contents.places,
    )


def _refuse_other_formats(path: Path, start: bytes) -> None:
    expected = "a .safetensors, .pt, .ckpt, .bin or .gguf checkpoint"
    for magic, what, do in _OTHER_FORMATS:
        if start.startswith(magic) or (magic.startswith(b"<") and start.lstrip().lower().startswith(magic)):
            raise CheckpointError(f"The file is {what}", given=path, expected=expected, do=do)


def _with_scales(header: Header) -> Header:
    """Set the scales of float8 weights apart from the weights.

    ComfyUI's files hold them beside each weight, Tencent's in a second file; a file with neither is a plain cast.
    """
    float8 = {name for name, info in header.tensors.items() if info.dtype in FLOAT8}
    if not float8:
        return header
    named = {name: [name.removesuffix("weight") + scale for scale in _SCALES] for name in float8}
    inside = {name: scale for name, scales in named.items() for scale in scales if scale in header.tensors}
    beside = {name for name in header.tensors if name.endswith((*_NOTES, *(f".{scale}" for scale in _SCALES)))}
    scales: Mapping[str, Place] = {name: header.places[scale] for name, scale in inside.items()}
    scale_file = None
    is_single = all(place.file == header.path for place in header.places.values())
    if header.container == "torch" and not scales and is_single:
        scale_file = map_file(header.path)
        scales = read_scale_map(scale_file, sorted(float8)) if scale_file.is_file() else {}
    return replace(
        header,
        tensors={name: info for name, info in header.tensors.items() if name not in beside},
        places={name: place for name, place in header.places.items() if name not in beside},
        scales=scales,
        scale_file=scale_file,
    )


def _union(path: Path, headers: list[Header]) -> Header:
    """One header of a set of shards."""
    first = headers[0]
    digest = hashlib.sha256("".join(header.digest for header in headers).encode()).hexdigest()[:32]
    return replace(
        first,
        path=path,
        tensors={name: info for header in headers for name, info in header.tensors.items()},
        metadata={key: value for header in reversed(headers) for key, value in header.metadata.items()},
        num_bytes=sum(header.num_bytes for header in headers),
        digest=digest,
        places={name: place for header in headers for name, place in header.places.items()},
    )


def _digest(head: bytes, file: BinaryIO, data_start: int, num_bytes: int) -> str:
    """Hash of the header and of probes at the start, the quarters and the end of the data."""
    hasher = hashlib.sha256(head)
    span = max(0, num_bytes - data_start - _PROBE_BYTES)
    for quarter in range(5):
        file.seek(data_start + span * quarter // 4)
        hasher.update(file.read(_PROBE_BYTES))
    return hasher.hexdigest()[:32]
