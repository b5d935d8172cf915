"""Where a whole layer lies between two passes: rows of all frames, in memory or in a nameless file."""

from __future__ import annotations

import ctypes
import mmap
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import FileError
from ..nn.scratch import Scratch, pages
from ..nn.strips import Rows, Size

Spill = Path | Literal["ram"] | None
"""Where layers go that the bound has no room for: a folder, main memory (for codecs on a GPU), or nowhere."""
PAGE = mmap.PAGESIZE


class Source(Protocol):
    """What a pass reads."""

    def read(self, rows: Rows, frames: Rows, scratch: Scratch) -> Tensor:
        """(n, rows, W, C), contiguous, on the codec's device; in scratch memory, until the next time."""
        ...

    def release(self, row: int) -> None:
        """The rows before this one are not needed any more."""
        ...


class Sink(Protocol):
    """What a pass writes."""

    def write(self, rows: Rows, first: int, frames: Tensor) -> None:
        """(n, rows, W, C) from frame ``first`` on."""
        ...


class Input:
    """A tensor of the caller: (C, T, H, W)."""

    def __init__(self, video: Tensor, before: Callable[[Tensor], Tensor]) -> None:
        self.video, self.before = video, before

    def read(self, rows: Rows, frames: Rows, scratch: Scratch) -> Tensor:
        part = self.video[:, slice(*frames), slice(*rows)]
        return self.before(part).permute(1, 2, 3, 0).contiguous()

    def release(self, row: int) -> None:
        """The caller's stays the caller's."""


class Output:
    """A tensor for the caller: (C, T, H, W)."""

    def __init__(self, video: Tensor) -> None:
        self.video = video

    def write(self, rows: Rows, first: int, frames: Tensor) -> None:
        self.video[:, first : first + len(frames), slice(*rows)] = frames.permute(3, 0, 1, 2)


def row_bytes(size: Size, itemsize: int) -> int:
    """What one row of all frames takes, whole pages."""
    return -(-size.row_count * itemsize // PAGE) * PAGE


class Volume:
    """One layer of a whole video, a piece of memory or of a file for each row: (T, W, C).

    A row exists from its first write until it is released, so that a layer that is read while the next is written
    takes hardly more than the larger of the two.
    """

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, pieces: Pieces) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.pieces = pieces
        self.rows: dict[int, int] = {}

    def write(self, rows: Rows, first: int, frames: Tensor) -> None:
        for row, part in zip(range(*rows), frames.unbind(1), strict=True):
            if row not in self.rows:
                self.rows[row] = self.pieces.take()
            self.pieces.write(self.rows[row], first, part)

    def read(self, rows: Rows, frames: Rows, scratch: Scratch) -> Tensor:
        length, height = frames[1] - frames[0], rows[1] - rows[0]
        out = scratch.take(self, (length, height, self.size.columns, self.size.channels))
        for number, row in enumerate(range(*rows)):
            out[:, number] = self.pieces.read(self.rows[row], frames)
        return out

    def release(self, row: int) -> None:
        for old in [known for known in self.rows if known < row]:
            self.pieces.give_back(self.rows.pop(old))

    def close(self) -> None:
        self.release(self.size.rows)


class Pieces(Protocol):
    """Room for rows of one size, each (T, W, C)."""

    def take(self) -> int: ...

    def give_back(self, piece: int) -> None: ...

    def write(self, piece: int, first: int, frames: Tensor) -> None: ...

    def read(self, piece: int, frames: Rows) -> Tensor: ...


class MemoryPieces:
    """In memory. On the CPU straight from the system, to which a row goes back when it is released."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.rows: dict[int, Tensor] = {}
        self.next = 0

    def take(self) -> int:
        self.next += 1
        self.rows[self.next] = pages(self.shape, self.dtype, self.device)
        return self.next

    def give_back(self, piece: int) -> None:
        del self.rows[piece]

    def write(self, piece: int, first: int, frames: Tensor) -> None:
        self.rows[piece][first : first + len(frames)] = frames

    def read(self, piece: int, frames: Rows) -> Tensor:
        return self.rows[piece][slice(*frames)]


class FilePieces:
    """In a file without a name, which is gone with the process that holds it.

    Read and written rather than mapped: pages of a mapping would count as the process's memory.
    """

    def __init__(self, file: IO[bytes], folder: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.file, self.folder, self.dtype = file, folder, dtype
        self.frame_shape = shape[1:]
        self.frame_bytes = shape[1] * shape[2] * dtype.itemsize
        self.piece_bytes = shape[0] * self.frame_bytes
        self.free: list[int] = []
        self.count = 0

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1

    def give_back(self, piece: int) -> None:
        self.free.append(piece)
        if len(self.free) == self.count:
            self.file.truncate(0)
            self.free.clear()
            self.count = 0

    def write(self, piece: int, first: int, frames: Tensor) -> None:
        pixels: Any = frames.contiguous().cpu().view(torch.uint8).numpy()
        data = memoryview(pixels).cast("B")
        self.file.seek(piece * self.piece_bytes + first * self.frame_bytes)
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise no_room(self.folder, str(error.strerror)) from error

    def read(self, piece: int, frames: Rows) -> Tensor:
        length = frames[1] - frames[0]
        out = torch.empty(length * self.frame_bytes, dtype=torch.uint8)
        bytes_of: Any = out.numpy()
        view, start = memoryview(bytes_of), 0
        self.file.seek(piece * self.piece_bytes + frames[0] * self.frame_bytes)
        while start < len(view):
            count = self.file.readinto(view[start:])  # type: ignore[attr-defined]  # an unbuffered file has it
            assert count, "a row is written before it is read"
            start += count
        return out.view(self.dtype).view(length, *self.frame_shape)


def no_room(folder: Path, why: str) -> FileError:
    """The error for a folder that does not take the file for spilled layers."""
    return FileError(
        f"The file for intermediate results cannot be written ({why})",
        given=folder,
        do="free some space, name another folder, or give more memory instead",
    )


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's, which keeps what is freed; None where another allocator is at work."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


class Store:
    """Makes volumes and holds their files; all of it is gone after :meth:`close`."""

    def __init__(self, dtype: torch.dtype, device: torch.device, spill: Spill) -> None:
        self.dtype, self.device, self.spill = dtype, device, spill
        self.files: dict[tuple[int, int, int], FilePieces] = {}
        self.open: list[IO[bytes]] = []

    def check_room(self, num_bytes: int) -> None:
        """Raise FileError where the disk cannot take as much, or the folder nothing at all."""
        if not isinstance(self.spill, Path) or not num_bytes:
            return
        try:
            free = shutil.disk_usage(self.spill).free
        except OSError as error:
            raise no_room(self.spill, str(error.strerror)) from error
        if free < num_bytes:
            raise FileError(
                "The disk has no room for intermediate results",
                given=f"{free / 1e9:.1f} GB free in {self.spill}",
                expected=f"{num_bytes / 1e9:.1f} GB",
                do="free some space, name another folder, or give more memory instead",
            )

    def volume(self, size: Size, *, spilled: bool) -> Volume:
        return Volume(size, self.dtype, self.device, self._pieces(size, spilled=spilled))

    def _pieces(self, size: Size, *, spilled: bool) -> Pieces:
        shape = (size.frames, size.columns, size.channels)
        if not spilled or self.spill is None:
            return MemoryPieces(shape, self.dtype, self.device)
        if self.spill == "ram":
            return MemoryPieces(shape, self.dtype, torch.device("cpu"))
        if shape not in self.files:
            folder = Path(self.spill)
            try:
                file = tempfile.TemporaryFile(prefix="vidgen-", dir=folder, buffering=0)  # noqa: SIM115
            except OSError as error:
                raise no_room(folder, str(error.strerror)) from error
            self.open.append(file)
            self.files[shape] = FilePieces(file, folder, shape, self.dtype)
        return self.files[shape]

    def tidy(self) -> None:
        """Give the holes of the allocator back to the system: results of convolutions leave as much again in them,
        because small things that stay move into the place of the last one before the next one needs it."""
        trim = _malloc_trim()
        if self.device.type == "cpu" and trim is not None:
            trim(0)

    def close(self) -> None:
        for file in self.open:
            file.close()
        self.open.clear()
        self.files.clear()
