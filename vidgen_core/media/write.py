"""Frames into one file, streamed through ffmpeg: written beside its place, read back, renamed."""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import FileError, SettingsError
from ..memory.cancel import check_cancelled
from ..weights.save import atomic_path, write_error
from .formats import Way, way_of
from .program import ended, failure, ffmpeg, running
from .sound import Sound, fitted, write_au
from .tags import add_webp_tags, ffmetadata, read_metadata, without_braces

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("vidgen")

_PALETTE = "palettegen=stats_mode=diff"
_IN_COLOURS = "paletteuse=dither=sierra2_4a"


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    *,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
    codec: str = "auto",
    bits: int = 0,
    sound: Sound | None = None,
) -> Path:
    """Stream ``frames`` (H, W, 3), uint8 or uint16, to ``path``; the ending chooses the kind of file.

    The file appears under its name only when it is complete: it is written under a hidden name beside it, read back
    to its last frame, and renamed. Only a few frames are in memory at a time. Odd sides are padded at the right and at
    the bottom by one px (a copy of the edge) where the codec needs even ones. Sound begins with the first frame; it is
    cut where the video ends, or filled up with silence. gif and webp are silent, there it is left out with a warning.

    Args:
        fps: frames per second, above 0.
        metadata: tag -> text; ComfyUI restores a workflow from the tags ``prompt`` and ``workflow``. gif has none.
        crf: quality of h264, h265, vp9 and av1, 0 (lossless or nearly so) to 51; lower is better and larger.
        codec, bits: as for :func:`way_of`.

    Raises:
        FileError: the folder is missing or closed to us, the disk is full, or ffmpeg failed.
        MissingLibraryError: no ffmpeg, or one without this codec.
        SettingsError: no frames, frames of unequal size, an unknown ending, or fps not above 0.
    """
    way = way_of(path, codec, bits)
    path = check_writable(path)
    check_rate(fps)
    first, frames = opened(frames)
    tags = dict(metadata or {}) if way.format.has_tags else {}
    if way.ending == ".webm":
        tags = {key: without_braces(value) for key, value in tags.items()}
    if sound is not None and not way.format.sound:
        log.warning("%s files are silent: the sound is left out", way.ending[1:])
        sound = None
    with atomic_path(path) as unfinished:
        count = _encode(unfinished, way, first, frames, fps=fps, tags={} if sound else tags, crf=crf)
        if sound is not None:
            _add_sound(unfinished, way, fitted(sound, count / fps), tags)
        height, width = way.size(*first.shape[:2])
        if way.ending == ".webp":
            add_webp_tags(unfinished, tags, height=height, width=width)
        _verify(unfinished, way, tags, _Decoded(count, width, height, sound is not None))
    return path


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise :class:`FileError` if a video cannot be written to ``path``: asked before hours of work, not after."""
    path = Path(path)
    way_of(path)
    if not path.parent.is_dir():
        raise FileError("The folder for the video does not exist", given=path.parent, do=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise FileError("The video would replace a folder", given=path, do="give a file name")
    # Asking the file system is surer than os.access: read-only mounts, ACLs and root are all answered by trying.
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise write_error(path, error) from error
    return path


# --- frames -----------------------------------------------------------------------------------------------------------


def check_rate(fps: float) -> None:
    if not 0 < fps < float("inf"):
        raise SettingsError("The frame rate cannot be used", given=f"{fps} fps", expected="more than 0")


@dataclass(frozen=True, slots=True)
class _Like:
    """What all frames must be."""

    shape: tuple[int, ...]
    dtype: np.dtype


def opened(frames: Iterable[np.ndarray]) -> tuple[_Like, Iterator[np.ndarray]]:
    """What the first frame is, and an iterator over all of them."""
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise SettingsError("There are no frames to write", given="0 frames", expected="at least 1 frame")
    like = _Like(first.shape, first.dtype)
    check_frame(first, like)
    return like, itertools.chain([first], iterator)


def check_frame(frame: np.ndarray, like: _Like) -> None:
    import numpy as np

    known = frame.dtype in (np.uint8, np.uint16) and frame.ndim == 3 and frame.shape[2] == 3 and frame.size > 0
    if not known or (frame.shape, frame.dtype) != (like.shape, like.dtype):
        raise SettingsError(
            "A frame cannot be written",
            given=f"{frame.dtype} {frame.shape}",
            expected=f"uint8 or uint16 (height, width, 3), all as the first: {like.dtype} {like.shape[:2]}",
        )


def _frame_bytes(frame: np.ndarray, like: _Like, size: tuple[int, int]) -> bytes:
    import numpy as np

    check_frame(frame, like)
    pad = ((0, size[0] - like.shape[0]), (0, size[1] - like.shape[1]), (0, 0))
    padded = np.pad(frame, pad, mode="edge")
    return padded.astype("<u2", copy=False).tobytes() if padded.dtype.itemsize == 2 else padded.tobytes()


# --- ffmpeg -----------------------------------------------------------------------------------------------------------


def _encode(
    path: Path,
    way: Way,
    first: _Like,
    frames: Iterator[np.ndarray],
    *,
    fps: float,
    tags: Mapping[str, str],
    crf: int,
) -> int:
    """Run ffmpeg over the frames, and say how many there were; whatever happens, no ffmpeg is left running."""
    if way.ending == ".gif":
        return _encode_gif(path, first, frames, fps=fps)
    size = way.size(*first.shape[:2])
    pixels = "rgb48le" if first.dtype.itemsize == 2 else "rgb24"
    count = 0
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "errors.txt").open("w+b") as errors:
        command = [*_begin(), *f"-f rawvideo -pix_fmt {pixels} -s {size[1]}x{size[0]} -r {float(fps)!r}".split()]
        command += ["-i", "pipe:0", *_tags_input(scratch, {} if way.ending == ".webp" else tags)]
        command += ["-map", "0:v", "-map_metadata", "1", *way.video_options(*size, crf=crf)]
        with running([*command, str(path)], errors) as (process, stdin):
            # A broken pipe means that ffmpeg gave up: its own words, read below, say why.
            with suppress(BrokenPipeError):
                for frame in frames:
                    stdin.write(_frame_bytes(frame, first, size))
                    count += 1
            with suppress(BrokenPipeError):
                stdin.close()
            code = ended(process)
        if code != 0:
            raise failure(path, errors, code)
    return count


def _add_sound(path: Path, way: Way, sound: Sound, tags: Mapping[str, str]) -> None:
    """Put sound and tags beside the frames, which are copied as they are: how long a video is, is known at its end."""
    with _beside(path, path.suffix) as mixed, tempfile.TemporaryDirectory() as scratch:
        heard = Path(scratch) / "sound.au"
        write_au(heard, sound)
        command = [*_begin(), "-i", str(path), *_tags_input(scratch, tags), "-f", "au", "-i", str(heard)]
        command += ["-map", "0:v", "-map", "2:a", "-map_metadata", "1", "-c:v", "copy", *way.sound_options()]
        _run(path, [*command, *way.file_options(), str(mixed)])
        os.replace(mixed, path)


def _encode_gif(path: Path, first: _Like, frames: Iterator[np.ndarray], *, fps: float) -> int:
    """By way of a lossless file: the palette is known after the last frame, and ffmpeg would hold them all until
    then."""
    with _beside(path, ".mkv") as kept, tempfile.TemporaryDirectory() as scratch:
        count = _encode(kept, way_of(kept, "ffv1", 8), first, frames, fps=fps, tags={}, crf=0)
        palette = str(Path(scratch) / "palette.png")
        _run(path, [*_begin(), "-i", str(kept), "-vf", _PALETTE, "-frames:v", "1", "-update", "1", palette])
        _run(path, [*_begin(), "-i", str(kept), "-i", palette, "-lavfi", _IN_COLOURS, "-f", "gif", str(path)])
    return count


@contextmanager
def _beside(path: Path, suffix: str) -> Iterator[Path]:
    """A hidden file in the folder of ``path``, which has the room for a video; gone afterwards."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem.lstrip('.')[:40]}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _tags_input(scratch: str, tags: Mapping[str, str]) -> list[str]:
    """A file and not the command line: Windows allows 32 kB of arguments, and a graph can be larger."""
    path = Path(scratch) / "tags.txt"
    path.write_text(ffmetadata(tags), encoding="utf-8")
    return ["-f", "ffmetadata", "-i", str(path)]


def _begin() -> list[str]:
    return [ffmpeg(), "-y", "-hide_banner", "-loglevel", "error"]


def _run(path: Path, command: list[str]) -> None:
    """ffmpeg from file to file."""
    with tempfile.TemporaryFile() as errors:
        with running(command, errors) as (process, stdin):
            stdin.close()
            code = ended(process)
        if code != 0:
            raise failure(path, errors, code)


# --- reading back -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Decoded:
    """What is in a file."""

    num_frames: int
    width: int
    height: int
    has_sound: bool

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {self.width} x {self.height} px{' with sound' if self.has_sound else ''}"


def _verify(path: Path, way: Way, tags: Mapping[str, str], expected: _Decoded) -> None:
    """A file that lost its workflow on the way, or its end, must not replace a good one."""
    if path.stat().st_size == 0:
        raise FileError("ffmpeg wrote an empty file", given=path, do="try another format or folder")
    found = read_metadata(path) if tags else {}
    lost = [key for key, value in tags.items() if key not in found and found.get(_stored(key)) != value]
    lost += [key for key, value in tags.items() if key in found and found[key] != value]
    if lost:
        raise FileError(f"The metadata {', '.join(lost)} did not reach the video", given=path, do="see `vidgen doctor`")
    read = _decode_webp(path) if way.ending == ".webp" else _decode(path, expected.has_sound)
    if read != expected:
        raise FileError(
            "What was written cannot be read back", given=f"{path}, {read}", expected=str(expected), do="try again"
        )


def _stored(key: str) -> str:
    """A tag's name as matroska keeps it."""
    return key.lower().replace(" ", "_")


def _decode(path: Path, with_sound: bool) -> _Decoded:
    """Every frame decoded and counted by ffmpeg, none kept: a line for each begins with the number of its stream."""
    streams = ["-map", "0:v:0", *(["-map", "0:a:0"] if with_sound else [])]
    frames = packets = width = height = 0
    with tempfile.TemporaryFile() as errors:
        command = [ffmpeg(), "-nostdin", "-v", "error", "-i", str(path), *streams, "-f", "framecrc", "-"]
        with running(command, errors, speaks=True) as (process, lines):
            for line in lines:
                check_cancelled()
                if line.startswith(b"#dimensions 0:"):
                    width, height = map(int, line.split(b":")[1].split(b"x"))
                frames += line.startswith(b"0,")
                packets += line.startswith(b"1,")
            code = ended(process)
        if code != 0:
            raise failure(path, errors, code)
        if _said_something(errors):
            raise failure(path, errors, 1)
    return _Decoded(frames, width, height, packets > 0)


def _said_something(errors: IO[bytes]) -> bool:
    """ffmpeg decodes damaged files as well as it can, and says so."""
    return errors.seek(0, os.SEEK_END) > 0


def _decode_webp(path: Path) -> _Decoded:
    """By Pillow: many an ffmpeg does not read WebP that moves."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            count = getattr(file, "n_frames", 1)
            for number in range(count):
                check_cancelled()
                file.seek(number)
                file.load()
            return _Decoded(count, file.width, file.height, False)
    except (SyntaxError, ValueError) as error:
        raise FileError(f"What was written cannot be read back ({error})", given=path, do="try again") from error
