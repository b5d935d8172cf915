"""Video files: frames streamed to and from ffmpeg, and the workflow that travels inside the file.

``imageio-ffmpeg`` brings the ffmpeg program; it is started when a video is written or read, never at
import. Metadata goes into ``moov/udta/meta`` as ``keys`` + ``ilst`` (ffmpeg's ``use_metadata_tags``) in
front of the frames (``faststart``), because that is where ComfyUI's frontend looks when a video is
dropped onto the canvas: https://developer.apple.com/documentation/quicktime-file-format/metadata_atoms_and_types
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from torch import Tensor

from .errors import FileError, MissingLibraryError, SettingsError, UserError
from .memory.cancel import WAIT_S, check_cancelled
from .memory.host import available_memory
from .types import Grid
from .weights.save import atomic_path, write_error

log = logging.getLogger("vidgen")

if TYPE_CHECKING:
    import numpy as np
    from PIL.ImageFile import ImageFile

# RGB is turned into BT.709 and tagged so: without the tag a player guesses from the size and shifts the colours.
_TO_YUV = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp"
_TAGS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"
_YUV = f"-vf {_TO_YUV} -pix_fmt yuv420p -crf {{crf}} {_TAGS}"
_MP4 = f"{_YUV} -c:v libx264 -preset medium -movflags use_metadata_tags+faststart -f mp4"
_WEBM = f"{_YUV} -c:v libvpx-vp9 -b:v 0 -f webm"
_GIF = "-vf split[a][b];[a]palettegen=stats_mode=diff[p];[b][p]paletteuse=dither=sierra2_4a -f gif"
_WEBP = "-c:v libwebp -lossless 1 -loop 0 -f webp"
FORMATS = {".mp4": _MP4, ".m4v": _MP4, ".mov": _MP4, ".webm": _WEBM, ".gif": _GIF, ".webp": _WEBP}
"""File ending -> ffmpeg's output options. The mp4 group and webm carry metadata, gif and webp do not."""

_NUM_ERRNO = 40  # the file-related ones are all below
_SIGXFSZ = getattr(signal, "SIGXFSZ", 0)  # a file grew past the limit of the process (ulimit -f)
_EVEN_SIDES = (".mp4", ".m4v", ".mov", ".webm")  # 4:2:0 chroma covers 2x2 px


MAX_IMAGE_PX = 8192**2
"""of a picture: 1 GB as numbers"""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_DEMUXERS = "mov,matroska,avi,gif,webp_anim,webp_pipe,mpegts,mpeg,flv,asf,ogg,wav,mp3,flac,aac"
READ_ONLY_ITSELF = ["-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS]
"""ffmpeg's options before an input file: no playlists, which name other files and other hosts"""
_COPIES = 6
"""a frame of bytes becomes one of float32, and the bytes are there twice"""

# --- tensors <-> frames ---------------------------------------------------------------------------------------------


def video_to_images(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> ComfyUI's IMAGE: (B * T, H, W, 3) float32 in [0, 1], on the CPU."""
    images = video.detach().to("cpu", torch.float32).permute(0, 2, 3, 4, 1).flatten(0, 1)
    return images.add(1.0).div_(2.0).clamp_(0.0, 1.0)


def images_to_video(images: Tensor) -> Tensor:
    """ComfyUI's IMAGE (T, H, W, 3 or more) in [0, 1] -> (1, 3, T, H, W) in [-1, 1]; an alpha channel is dropped."""
    if images.ndim != 4 or images.shape[-1] < 3:
        raise SettingsError(
            "The images cannot be used as a video",
            given=f"shape {tuple(images.shape)}",
            expected="(frames, height, width, 3)",
        )
    return images[..., :3].permute(3, 0, 1, 2).unsqueeze(0).mul(2.0).sub(1.0)


def images_to_frames(images: Tensor) -> Iterator[np.ndarray]:
    """IMAGE (T, H, W, 3) in [0, 1] -> uint8 frames (H, W, 3), one at a time so that long videos need no copy."""
    for image in images:
        yield image[..., :3].float().mul(255.0).round().clamp(0, 255).to("cpu", torch.uint8).numpy()


def frames_to_images(frames: np.ndarray) -> Tensor:
    """uint8 frames (T, H, W, 3) -> IMAGE, float32 in [0, 1]."""
    return torch.tensor(frames, dtype=torch.float32).div_(255.0)


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[ImageFile]:
    """A picture file by Pillow, whose pixels are not read yet. Errors while they are read are told here, too.

    Raises:
        FileError: it cannot be read, is damaged, is no picture, or is larger than :data:`MAX_IMAGE_PX`.
    """
    from PIL import Image

    try:
        # Named kinds only: for some others Pillow would start a program.
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            # Before a pixel is read: a few bytes can stand for gigabytes.
            if file.width * file.height > MAX_IMAGE_PX:
                raise FileError(
                    "The image is too large",
                    given=f"{Path(path).name} of {file.width} x {file.height} px",
                    expected=f"at most {MAX_IMAGE_PX // 10**6} million px",
                    do="make it smaller first",
                )
            yield file
    except UserError:
        raise
    # SyntaxError is what Pillow raises for some damaged PNGs.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(
            "The image cannot be read", given=path, expected="a PNG, JPEG, WebP or BMP file", do=f"check it ({error})"
        ) from error


def read_image(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """A picture file, upright: (IMAGE (1, H, W, 3) in [0, 1], MASK (1, H, W), 1 where it is transparent).

    Raises:
        FileError: it cannot be read, is damaged, or is no picture.
    """
    import numpy as np
    from PIL import ImageOps

    with open_image(path) as file:
        pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGBA"), dtype=np.float32) / 255
    rgba = torch.from_numpy(pixels)[None]
    return rgba[..., :3].contiguous(), 1 - rgba[..., 3]


def crop_to_grid(images: Tensor, grid: Grid, *, multiple_px: int) -> Tensor:
    """The middle of the frames with sides that are multiples of ``multiple_px``, without the last frames that the
    codec cannot take. What is cut off is logged; too small a video is a SettingsError."""
    num_frames, height, width = images.shape[:3]
    kept_frames = grid.num_frames(grid.num_latent_frames(num_frames))
    kept_height, kept_width = height // multiple_px * multiple_px, width // multiple_px * multiple_px
    if 0 in (kept_frames, kept_height, kept_width):
        raise SettingsError(
            "The video is too small to encode",
            given=f"{num_frames} frames of {width} x {height} px",
            expected=f"at least {grid.num_frames(1)} frames of {multiple_px} x {multiple_px} px",
        )
    if (kept_frames, kept_height, kept_width) != (num_frames, height, width):
        log.warning(
            "cropped %d frames of %d x %d px to %d frames of %d x %d px, which the VAE can encode",
            *(num_frames, width, height, kept_frames, kept_width, kept_height),
        )
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return images[:kept_frames, top : top + kept_height, left : left + kept_width]


# --- writing --------------------------------------------------------------------------------------------------------


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    *,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
) -> Path:
    """Stream ``frames`` (H, W, 3) uint8 to ``path``; the ending chooses the format (see :data:`FORMATS`).

    The file appears under its name only when it is complete: it is written under a hidden name beside it,
    read back, and renamed. Odd sides are padded by one px (a copy of the edge) where the format needs even ones.

    Args:
        fps: frames per second, above 0.
        metadata: tag -> text; ComfyUI restores a workflow from the tags ``prompt`` and ``workflow``.
        crf: quality of mp4 and webm, 0 (lossless) to 51; lower is better and larger.

    Raises:
        FileError: the folder is missing or closed to us, the disk is full, or ffmpeg failed.
        SettingsError: no frames, frames of unequal size, an unknown ending, or fps not above 0.
    """
    path = check_writable(path)
    if not fps > 0:
        raise SettingsError("The frame rate cannot be used", given=f"{fps} fps", expected="more than 0")
    first, frames = _peek(frames)
    tags = dict(metadata or {})
    with atomic_path(path) as unfinished:
        _encode(unfinished, first, frames, fps=fps, tags=tags, crf=crf)
        _verify(unfinished, tags)
    return path


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise :class:`FileError` if a video cannot be written to ``path``: asked before hours of work, not after."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise SettingsError(
            "The video format is not known",
            given=path.name,
            expected="a name that ends in " + ", ".join(FORMATS),
            do=f"use {path.name}.mp4",
        )
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


def _peek(frames: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """The first frame (for its size) and an iterator over all of them."""
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise SettingsError("There are no frames to write", given="0 frames", expected="at least 1 frame")
    return first, itertools.chain([first], iterator)


def _encode(
    path: Path, first: np.ndarray, frames: Iterator[np.ndarray], *, fps: float, tags: Mapping[str, str], crf: int
) -> None:
    """Run ffmpeg over the frames; whatever happens, no ffmpeg is left running."""
    suffix = path.suffix.lower()
    height, width = _padded_size(first.shape, suffix)
    command = [_ffmpeg(), "-y", "-hide_banner", "-loglevel", "error"]
    command += f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {float(fps)!r} -i pipe:0".split()
    command += ["-f", "ffmetadata", "-i", "{tags}", "-map", "0:v", "-map_metadata", "1"]
    command += [*FORMATS[suffix].format(crf=crf).split(), str(path)]
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "errors.txt").open("w+b") as errors:
        # A file and not the command line: Windows allows 32 kB of arguments, and a graph can be larger.
        tag_file = Path(scratch) / "tags.txt"
        tag_file.write_text(_ffmetadata(tags), encoding="utf-8")
        command[command.index("{tags}")] = str(tag_file)
        with _running(command, errors) as (ffmpeg, stdin):
            # A broken pipe means that ffmpeg gave up: its own words, read below, say why.
            with suppress(BrokenPipeError):
                for frame in frames:
                    stdin.write(_frame_bytes(frame, first.shape, (height, width)))
            with suppress(BrokenPipeError):
                stdin.close()
            code = _ended(ffmpeg)
        if code != 0:
            raise _failure(path, errors, code)


@contextmanager
def _running(command: list[str], errors: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A child process and its standard input; ctrl-C in the terminal does not reach it, we end it on the way out."""
    # A session of its own, or on Windows a process group (CREATE_NEW_PROCESS_GROUP).
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=os.name == "posix",
        creationflags=0 if os.name == "posix" else 0x200,
    )
    assert process.stdin is not None
    try:
        yield process, process.stdin
    finally:
        if process.poll() is None:
            process.kill()
        with suppress(OSError):  # bytes still buffered for a killed process
            process.stdin.close()
        process.wait()


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that has everything it needs; the last frames may take it a while."""
    while True:
        try:
            return process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            check_cancelled()


def _padded_size(shape: tuple[int, ...], suffix: str) -> tuple[int, int]:
    step = 2 if suffix in _EVEN_SIDES else 1
    return -(-shape[0] // step) * step, -(-shape[1] // step) * step


def _frame_bytes(frame: np.ndarray, shape: tuple[int, ...], size: tuple[int, int]) -> bytes:
    import numpy as np

    if frame.shape != shape or frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise SettingsError(
            "A frame cannot be written",
            given=f"{frame.dtype} {frame.shape}",
            expected=f"uint8 (height, width, 3), all of the size of the first: {shape[:2]}",
        )
    pad = ((0, size[0] - shape[0]), (0, size[1] - shape[1]), (0, 0))
    return np.pad(frame, pad, mode="edge").tobytes()


def _ffmetadata(tags: Mapping[str, str]) -> str:
    """ffmpeg's metadata file: https://ffmpeg.org/ffmpeg-formats.html#Metadata-2"""

    def escape(text: str) -> str:
        return "".join("\\" + char if char in "=;#\\\n" else char for char in text)

    return ";FFMETADATA1\n" + "".join(f"{escape(key)}={escape(value)}\n" for key, value in tags.items())


def _failure(path: Path, errors: IO[bytes], code: int) -> Exception:
    """What to raise for ffmpeg's exit code; OSError where the file system said no."""
    if code == -_SIGXFSZ:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if code > 255 - _NUM_ERRNO:  # ffmpeg exits with minus the errno, of which 8 bits remain
        return OSError(256 - code, os.strerror(256 - code))
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    why = lines[-1] if lines else f"exit code {code}"
    return FileError(f"ffmpeg failed: {why}", given=path, do="see `vidgen doctor`, or try another format")


def _verify(path: Path, tags: Mapping[str, str]) -> None:
    """A file that lost its workflow on the way, or its end, must not replace a good one."""
    if path.stat().st_size == 0:
        raise FileError("ffmpeg wrote an empty file", given=path, do="try another format or folder")
    if FORMATS[path.suffix.lower()] is _MP4:
        found = read_metadata(path)
        lost = [key for key, value in tags.items() if found.get(key) != value]
        if lost:
            raise FileError(
                f"The metadata {', '.join(lost)} did not reach the video", given=path, do="see `vidgen doctor`"
            )


def _ffmpeg() -> str:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise MissingLibraryError(
            "Writing and reading videos needs imageio-ffmpeg", do="pip install imageio-ffmpeg"
        ) from error
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise MissingLibraryError(
            "No ffmpeg program was found", do="install ffmpeg, or set IMAGEIO_FFMPEG_EXE to its path"
        ) from error


# --- reading --------------------------------------------------------------------------------------------------------


def read_video(
    path: str | os.PathLike[str], *, start: int = 0, num_frames: int | None = None
) -> tuple[np.ndarray, float]:
    """The frames (T, H, W, 3) uint8 of a video file and its frames per second.

    Args:
        start: frames to leave out in front.
        num_frames: how many frames to read at most; None reads to the end.

    Raises:
        FileError: the file is missing, holds no video, or ends before ``start``.
    """
    path = _existing(path)
    _ffmpeg()
    import imageio_ffmpeg
    import numpy as np

    room = available_memory()
    reader = imageio_ffmpeg.read_frames(str(path), input_params=READ_ONLY_ITSELF)
    try:
        info = next(reader)
        stop = None if num_frames is None else start + num_frames
        raw = []
        width, height = info["size"]
        for number, frame in enumerate(itertools.islice(reader, start, stop), 1):
            check_cancelled()
            if number * width * height * 3 * _COPIES > room:
                raise FileError(
                    "The video does not fit into memory",
                    given=f"{path.name}, {number} frames or more of {width} x {height} px",
                    do="read fewer frames of it, or make it smaller",
                )
            raw.append(frame)
    except (OSError, RuntimeError, StopIteration) as error:
        raise FileError(
            "The file holds no video that ffmpeg can read", given=path, expected="mp4, webm, mov, gif, ..."
        ) from error
    finally:
        reader.close()
    if not raw:
        raise FileError("The video has no frames there", given=f"{path} from frame {start}", do="start earlier")
    return np.frombuffer(b"".join(raw), dtype=np.uint8).reshape(len(raw), height, width, 3), float(info["fps"])


@dataclass(frozen=True, slots=True)
class _Box:
    """One box of the file: its four-letter name and where its content lies."""

    name: bytes
    start: int
    end: int


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text tags of an mp4, mov or m4v, read the way ComfyUI's frontend does: udta/meta, keys + ilst.

    A file of another kind, or one without tags, gives an empty dict.

    Raises:
        FileError: the file is missing, or cannot be read.
    """
    path = _existing(path)
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            tags: dict[str, str] = {}
            for moov in _boxes(file, 0, end, b"moov"):
                for udta in _boxes(file, moov.start, moov.end, b"udta"):
                    for meta in _boxes(file, udta.start, udta.end, b"meta"):
                        tags |= _meta_tags(file, meta)
                for meta in _boxes(file, moov.start, moov.end, b"meta"):  # where QuickTime itself puts it
                    tags = _meta_tags(file, meta) | tags
            return tags
    except OSError as error:
        raise FileError(f"The file cannot be read: {error.strerror}", given=path) from error


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileError("There is no such video file", given=path, do="check the path")
    return path


def _boxes(file: IO[bytes], start: int, end: int, name: bytes | None = None) -> Iterator[_Box]:
    """The boxes between ``start`` and ``end``; garbage ends the walk."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        content = start + 8
        if size == 1:  # a 64-bit size follows
            if start + 16 > end:
                return
            size, content = struct.unpack(">Q", file.read(8))[0], start + 16
        stop = end if size == 0 else start + size
        if stop < content or stop > end:
            return
        if name is None or kind == name:
            yield _Box(kind, content, stop)
        start = stop


def _meta_tags(file: IO[bytes], meta: _Box) -> dict[str, str]:
    # ISO says `meta` opens with 4 bytes of version and flags, QuickTime's own has none: see which one it is.
    file.seek(meta.start)
    start = meta.start if file.read(8)[4:] == b"hdlr" else meta.start + 4
    children = {box.name: box for box in _boxes(file, start, meta.end)}
    if b"keys" not in children or b"ilst" not in children:
        return {}
    names = _key_names(file, children[b"keys"])
    tags: dict[str, str] = {}
    for item in _boxes(file, children[b"ilst"].start, children[b"ilst"].end):
        index = int.from_bytes(item.name, "big")  # counted from 1
        for data in _boxes(file, item.start, item.end, b"data"):
            file.seek(data.start)
            kind, _locale = struct.unpack(">II", file.read(8))
            if kind == 1 and 1 <= index <= len(names):  # 1 is UTF-8 text
                tags[names[index - 1]] = file.read(data.end - data.start - 8).decode("utf-8", "replace")
    return tags


def _key_names(file: IO[bytes], keys: _Box) -> list[str]:
    """The tag names in ``keys``: version, count, then (size, namespace, name) each."""
    names = []
    for box in _boxes(file, keys.start + 8, keys.end):
        file.seek(box.start)
        names.append(file.read(box.end - box.start).decode("utf-8", "replace"))
    return names
