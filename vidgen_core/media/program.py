"""The ffmpeg program: found, asked what it can write, and run so that none is left behind."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import FileError, MissingLibraryError
from ..memory.cancel import WAIT_S, check_cancelled

_NUM_ERRNO = 40  # the file-related ones are all below
_SIGXFSZ = getattr(signal, "SIGXFSZ", 0)  # a file grew past the limit of the process (ulimit -f)
_PICTURES = "gif,webp_anim,webp_pipe,png_pipe,jpeg_pipe,bmp_pipe"
_DEMUXERS = f"mov,matroska,avi,{_PICTURES},mpegts,mpeg,flv,asf,ogg,wav,au,aiff,mp3,flac,aac"
READ_ONLY_ITSELF = ["-protocol_whitelist", "file", "-format_whitelist", _DEMUXERS]
"""options before an input file: no playlists, which name other files and other hosts"""
_QUIET = {"SVT_LOG": "1"}  # SVT-AV1 has a voice of its own; 1 is errors


def ffmpeg() -> str:
    """The path of the program; MissingLibraryError where there is none."""
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


def encoders() -> frozenset[str]:
    """The names of the encoders in this ffmpeg."""
    _, _, listed = _said(ffmpeg(), "-encoders").partition("------")
    return frozenset(re.findall(r"^ \S{6} (\S+)", listed, re.MULTILINE))


def pixel_formats(encoder: str) -> frozenset[str]:
    """What an encoder of this ffmpeg takes: an x264 may be built for 8 bits alone."""
    found = re.search(r"Supported pixel formats: (.*)", _said(ffmpeg(), "-h", f"encoder={encoder}"))
    return frozenset(found[1].split()) if found else frozenset()


def version() -> str:
    """As the program says it, such as ``7.1``."""
    words = _said(ffmpeg(), "-version").split()
    return words[2] if len(words) > 2 else "of no version"


@functools.lru_cache(maxsize=64)  # the program stays the same while we run
def _said(program: str, *words: str) -> str:
    try:
        asked = subprocess.run(
            [program, "-hide_banner", *words], capture_output=True, stdin=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingLibraryError(f"ffmpeg does not run ({error})", given=program, do="see `vidgen doctor`") from error
    return asked.stdout.decode("utf-8", "replace")


@contextmanager
def running(
    command: list[str], errors: IO[bytes], *, speaks: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A child process and its standard input, or where it ``speaks`` its standard output.

    ctrl-C in the terminal does not reach it, we end it on the way out.
    """
    # A session of its own, or on Windows a process group (CREATE_NEW_PROCESS_GROUP).
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if speaks else subprocess.PIPE,
        stdout=subprocess.PIPE if speaks else subprocess.DEVNULL,
        stderr=errors,
        start_new_session=os.name == "posix",
        creationflags=0 if os.name == "posix" else 0x200,
        env={**os.environ, **_QUIET},
    )
    pipe = process.stdout if speaks else process.stdin
    assert pipe is not None
    try:
        yield process, pipe
    finally:
        if process.poll() is None:
            process.kill()
        with suppress(OSError):  # bytes still buffered for a killed process
            pipe.close()
        process.wait()


def ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that has everything it needs; the last frames may take it a while."""
    while True:
        try:
            return process.wait(timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            check_cancelled()


def failure(path: Path, errors: IO[bytes], code: int) -> Exception:
    """What to raise for ffmpeg's exit code; OSError where the file system said no."""
    if code == -_SIGXFSZ:
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if code > 255 - _NUM_ERRNO:  # ffmpeg exits with minus the errno, of which 8 bits remain
        return OSError(256 - code, os.strerror(256 - code))
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    why = lines[-1] if lines else f"exit code {code}"
    return FileError(f"ffmpeg failed: {why}", given=path, do="see `vidgen doctor`, or try another format")
