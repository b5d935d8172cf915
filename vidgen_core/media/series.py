"""Numbered PNG pictures in a folder of their own: what compositing programs read, without any loss."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError
from ..memory.cancel import check_cancelled
from ..weights.save import write_error
from .read import FPS_KEY
from .sound import Sound, write_au
from .tags import PNG_BEGIN, png_chunk, png_texts
from .write import check_frame, check_rate, opened

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("vidgen")

SOUND_NAME = "sound.au"
_LEVEL = 4
"""zlib's: a third of the time of its usual 6, for a hundredth of the size"""


def write_series(
    folder: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    *,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    sound: Sound | None = None,
) -> list[Path]:
    """Stream ``frames`` (H, W, 3), uint8 or uint16, to ``folder/00001.png`` and so on; the files in order.

    The folder appears under its name only when it is complete: it is filled under a hidden name beside it, each
    picture is read back, and the whole is renamed. Every picture carries the metadata and the frame rate, so that any
    of them brings the workflow back. Sound goes to ``sound.au``, as long as the sound is.

    Raises:
        FileError: the folder is there already, its own folder is missing or closed to us, or the disk is full.
        SettingsError: no frames, frames of unequal size, or fps not above 0.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileError("The folder for the pictures is there already", given=folder, do="give another name")
    check_rate(fps)
    first, frames = opened(frames)
    texts = png_texts({**dict(metadata or {}), FPS_KEY: repr(float(fps))})
    with _whole_folder(folder) as unfinished:
        count = 0
        for count, frame in enumerate(frames, 1):
            check_cancelled()
            check_frame(frame, first)
            path = unfinished / f"{count:05d}.png"
            path.write_bytes(png(frame, texts))
            _check_picture(path, frame)
        if sound is not None:
            write_au(unfinished / SOUND_NAME, sound)
    return [folder / f"{number:05d}.png" for number in range(1, count + 1)]


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` that becomes it in one step, or goes away with all that is in it."""
    unfinished = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(4)}")
    try:
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise write_error(folder, error) from error


def png(frame: np.ndarray, texts: bytes = b"") -> bytes:
    """A PNG file of one frame (H, W, 3), 8 or 16 bits a channel: https://www.w3.org/TR/png-3/

    Pillow writes no more than 8 bits. Each row is the difference to the one above it (filter 2), which is what most
    videos pack best with.
    """
    import numpy as np

    height, width, _ = frame.shape
    bits = 8 * frame.dtype.itemsize
    rows = np.ascontiguousarray(frame, dtype=f">u{frame.dtype.itemsize}").view(np.uint8).reshape(height, -1)
    filtered = np.full((height, 1 + rows.shape[1]), 2, dtype=np.uint8)
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the format wants
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, 2, 0, 0, 0])
    packed = zlib.compress(filtered.tobytes(), _LEVEL)
    return PNG_BEGIN + png_chunk(b"IHDR", header) + texts + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


def _check_picture(path: Path, frame: np.ndarray) -> None:
    """Read it back as others will."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            size = picture.size
    except (SyntaxError, ValueError) as error:
        raise FileError(f"A picture cannot be read back ({error})", given=path, do="check the disk") from error
    if size != (frame.shape[1], frame.shape[0]):
        raise FileError("A picture was not written as it is", given=f"{path}, {size[0]} x {size[1]} px")
