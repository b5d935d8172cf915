"""Frames out of video files, animated WebP and numbered pictures."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FileError, UserError
from ..memory.cancel import check_cancelled
from ..memory.host import available_memory
from .program import READ_ONLY_ITSELF, ffmpeg
from .tags import existing, read_metadata

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as ImageFile

FPS_KEY = "fps"
"""the text in a numbered picture that tells the frame rate of its series"""
_COPIES = 6
"""a frame of bytes becomes one of float32, and the bytes are there twice"""
_USUAL_FPS = 8.0
"""of a series that does not tell"""
_MORE_THAN_8 = re.compile(r"(9|10|12|14|16|48|64)(le|be)")


def read_video(
    path: str | os.PathLike[str], *, start: int = 0, num_frames: int | None = None, all_bits: bool = False
) -> tuple[np.ndarray, float]:
    """The frames (T, H, W, 3) of a video file and its frames per second.

    A picture whose name is a number, such as ``00001.png``, stands for itself and all that follow it without a gap.

    Args:
        start: frames to leave out in front.
        num_frames: how many frames to read at most; None reads to the end.
        all_bits: give uint16 frames where the file has more than 8 bits a channel; else they are always uint8.

    Raises:
        FileError: the file is missing, holds no video, ends before ``start``, or does not fit into memory.
    """
    import numpy as np

    path = existing(path)
    opened = _webp(path) if _is_webp(path) else _through_ffmpeg(path, all_bits)
    stop = None if num_frames is None else start + num_frames
    room = available_memory()
    pixels, count = bytearray(), 0  # grows in place: a list of frames and their sum would be there at once
    try:
        about = next(opened)
        assert isinstance(about, _About)
        for frame in itertools.islice(opened, start, stop):
            check_cancelled()
            assert isinstance(frame, bytes)
            pixels += frame
            count += 1
            if len(pixels) * _COPIES > room:
                raise FileError(
                    "The video does not fit into memory",
                    given=f"{path.name}, {count} frames or more of {about.width} x {about.height} px",
                    do="read fewer frames of it, or make it smaller",
                )
    except UserError:
        raise
    except (OSError, RuntimeError, StopIteration, SyntaxError, ValueError) as error:
        raise FileError(
            "The file holds no video that ffmpeg can read", given=path, expected="mp4, webm, mov, gif, ..."
        ) from error
    finally:
        opened.close()
    if not count:
        raise FileError("The video has no frames there", given=f"{path} from frame {start}", do="start earlier")
    frames = np.frombuffer(pixels, dtype=np.uint16 if about.bits == 16 else np.uint8)
    return frames.reshape(count, about.height, about.width, 3), about.fps


@dataclass(frozen=True, slots=True)
class _About:
    width: int
    height: int
    fps: float
    bits: int


_Reader = Generator["_About | bytes", None, None]
"""what a file is, then the bytes of its frames"""


def _through_ffmpeg(path: Path, all_bits: bool) -> _Reader:
    ffmpeg()
    import imageio_ffmpeg

    name, fps = str(path), None
    options = READ_ONLY_ITSELF
    if (number := re.fullmatch(r"\d+", path.stem)) and path.suffix.lower() == ".png":
        told = read_metadata(path).get(FPS_KEY)
        fps = _USUAL_FPS if told is None else float(told)
        pattern = f"%0{len(number[0])}d{path.suffix}"
        name = str(path.parent).replace("%", "%%") + os.sep + pattern
        options = ["-protocol_whitelist", "file", "-f", "image2", "-framerate", repr(fps)]
        options += ["-start_number", str(int(number[0]))]
    bits = 16 if all_bits and _is_deep(name, options) else 8
    pixels = "rgb24" if bits == 8 else "rgb48le"
    reader = imageio_ffmpeg.read_frames(name, pix_fmt=pixels, bits_per_pixel=3 * bits, input_params=options)
    try:
        info = next(reader)
        width, height = info["size"]
        yield _About(width, height, float(info["fps"]) if fps is None else fps, bits)
        yield from reader
    finally:
        reader.close()


def _is_deep(name: str, options: list[str]) -> bool:
    """Whether a pixel of the file has more than 8 bits a channel."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(name, input_params=options)
    try:
        return _MORE_THAN_8.search(next(reader).get("pix_fmt", "")) is not None
    finally:
        reader.close()


def _is_webp(path: Path) -> bool:
    with path.open("rb") as file:
        begin = file.read(12)
    return begin[:4] == b"RIFF" and begin[8:] == b"WEBP"


def _webp(path: Path) -> _Reader:
    """By Pillow: many an ffmpeg does not read WebP that moves."""
    from PIL import Image

    with Image.open(path) as file:
        count = getattr(file, "n_frames", 1)
        yield _About(file.width, file.height, _webp_fps(file, count), 8)
        for number in range(count):
            file.seek(number)
            yield file.convert("RGB").tobytes()


def _webp_fps(file: ImageFile, count: int) -> float:
    """From the time that all its frames take."""
    lasting_ms = 0
    for number in range(count):
        file.seek(number)
        file.load()
        lasting_ms += file.info.get("duration", 0)
    return round(1000 * count / lasting_ms, 3) if lasting_ms else _USUAL_FPS
