"""The bytes of a file as tensors: mapped into memory, or read piece by piece."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

_ALIGNMENT = 64
"""bytes; what torch allocates begins at a multiple of it, and so does a mapped file"""
_PIECE_BYTES = 1 << 18
"""read at a time where numbers are cast: they are still in the cache then"""
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0


class MappedFile:
    """A file mapped into memory: read when it is looked at, copied page by page where it is written to.

    Without a reservation, or Linux would refuse to map a file that is larger than its main memory.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            if sys.platform == "win32":
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            else:
                flags, allowed = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                data = mmap.mmap(file.fileno(), 0, flags=flags, prot=allowed)
        self._data = torch.frombuffer(data, dtype=torch.uint8)

    def read(self, offset: int, num_bytes: int) -> Tensor:
        """A view: (num_bytes,) uint8. It keeps the mapping. EOFError behind the end."""
        if offset + num_bytes > len(self._data):
            raise EOFError("the file became shorter")
        return self._data[offset : offset + num_bytes]

    def close(self) -> None:
        """The mapping goes with the last tensor that looks at it."""


class PlainFile:
    """A file read piece by piece into new memory."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def read(self, offset: int, num_bytes: int) -> Tensor:
        """A copy: (num_bytes,) uint8. EOFError behind the end."""
        # As far from a cache line as in the mapped file: a matrix product on the CPU rounds differently when its
        # operands are aligned differently, and a streamed block must give the bits of a resident one.
        start = offset % _ALIGNMENT
        data = torch.empty(num_bytes + start, dtype=torch.uint8)[start:]
        self._fill(data, offset)
        return data

    def read_as(self, offset: int, num_bytes: int, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
        """The numbers there, cast from ``stored``: (n,) of ``dtype``. Only a piece of the file is in memory besides.
        EOFError behind the end."""
        out = torch.empty(num_bytes // stored.itemsize, dtype=dtype)
        scratch = torch.empty(min(num_bytes, _PIECE_BYTES), dtype=torch.uint8)
        for start in range(0, num_bytes, _PIECE_BYTES):
            piece = scratch[: num_bytes - start]
            self._fill(piece, offset + start)
            begin = start // stored.itemsize
            out[begin : begin + len(piece) // stored.itemsize] = piece.view(stored)
        return out

    def _fill(self, data: Tensor, offset: int) -> None:
        view = data.numpy().data
        self._file.seek(offset)
        done = 0
        while done < len(data):
            count = self._file.readinto(view[done:])
            if not count:
                raise EOFError("the file became shorter")
            done += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PlainFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
