"""Files that come as a form: of a bounded size, what their name says they are, and never in another one's place."""

from __future__ import annotations

import asyncio
import contextlib
import filecmp
import os
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import BodyPartReader, web

from ...nodes.host import IMAGE_ENDINGS, VIDEO_ENDINGS
from ...vidgen_core.errors import FileError
from ...vidgen_core.media import open_image
from ..core_nodes import AUDIO_ENDINGS
from . import messages
from .places import KINDS, Places
from .refusals import refused

MAX_UPLOAD_BYTES = messages.FEATURES["max_upload_size"]
MAX_FIELD_BYTES = 4096
MAX_PARTS = 20

_CHUNK_BYTES = 2**18
_MP4 = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"})
"""the first boxes of mp4, mov, m4v and m4a"""


@dataclass(slots=True)
class Form:
    """What an upload brought."""

    name: str
    """of the file, as the client calls it"""
    arrived: Path
    """the file itself, under a name of its own"""
    fields: Mapping[str, str]


@contextlib.asynccontextmanager
async def received(request: web.Request, places: Places) -> AsyncIterator[Form]:
    """The form of an upload; its file goes when it was not given a place.

    Raises:
        Refused: it is no such form, or larger than allowed.
        FileError: the disk does not take it.
    """
    if not request.content_type.startswith("multipart/"):
        raise _no_form()
    arrived = places.folder("temp") / f".upload-{secrets.token_hex(8)}"
    try:
        try:
            yield await _read(request, arrived)
        except OSError as error:
            raise FileError(f"The upload cannot be kept ({error.strerror})") from error
    finally:
        arrived.unlink(missing_ok=True)


async def _read(request: web.Request, arrived: Path) -> Form:
    fields: dict[str, str] = {}
    name: str | None = None
    num_parts = 0
    try:
        async for part in await request.multipart():
            num_parts += 1
            if not isinstance(part, BodyPartReader) or num_parts > MAX_PARTS:
                raise refused(400, "an upload is a plain form with one file and few fields")
            if part.name == "image" and part.filename is not None and name is None:
                name = part.filename
                with arrived.open("wb") as file:
                    async for chunk in _chunks(part, MAX_UPLOAD_BYTES):
                        file.write(chunk)
            else:
                text = b"".join([chunk async for chunk in _chunks(part, MAX_FIELD_BYTES)])
                fields[part.name or ""] = text.decode("utf-8", "replace")
    except (ValueError, AssertionError, RuntimeError, LookupError) as error:
        raise refused(400, "the form cannot be read") from error
    if name is None:
        raise _no_form()
    return Form(name, arrived, fields)


def _no_form() -> Exception:
    return refused(400, "an upload is a form with a file named image")


async def _chunks(part: BodyPartReader, most: int) -> AsyncIterator[bytes]:
    """What a part holds. What it says of its own length is not asked."""
    size = 0
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        size += len(chunk)
        if size > most:
            shown = f"{most // 2**20} MB" if most >= 2**20 else f"{most} bytes"
            raise refused(413, f"a part of the form is larger than {shown}", "too_large")
        yield chunk


async def keep(form: Form, places: Places) -> dict[str, str]:
    """Give an upload its place; ComfyUI's answer.

    Raises:
        Refused: the kind of folder is unknown.
        FileError: the name cannot be used, or the file is not what the name says.
    """
    kind = form.fields.get("type") or "input"
    if kind not in KINDS:
        raise refused(400, "the type of an upload is input, output or temp")
    subfolder = form.fields.get("subfolder", "")
    wanted = places.place(kind, f"{subfolder}/{form.name}" if subfolder else form.name)
    is_replacing = form.fields.get("overwrite", "").lower() in ("true", "1")
    await asyncio.to_thread(check_content, form.arrived, wanted.name)
    placed = await asyncio.to_thread(_place, form.arrived, wanted, is_replacing)
    folder = placed.parent.relative_to(places.folder(kind).resolve()).as_posix()
    return {"name": placed.name, "subfolder": "" if folder == "." else folder, "type": kind}


def check_content(path: Path, name: str) -> None:
    """Whether a file that is named like a picture, a video or a sound is one; other names promise nothing.

    Raises:
        FileError: it is not, or is a picture that is too large or damaged at its beginning.
    """
    with path.open("rb") as file:
        head = file.read(16)
    ending = Path(name).suffix.lower()
    for what, endings, is_it in _PROMISES:
        if ending in endings and is_it(head):
            if what == "picture":
                with open_image(path):
                    pass
            return
    promised = [what for what, endings, _ in _PROMISES if ending in endings]
    if promised:
        raise FileError(
            f"The file is no {promised[0]}, whatever its name says",
            given=name,
            expected=f"the content of a {' or '.join(promised)}",
        )


def _is_picture(head: bytes) -> bool:
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return is_webp or head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF8"))


def _is_video(head: bytes) -> bool:
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return is_avi or head[4:8] in _MP4 or head.startswith((b"\x1aE\xdf\xa3", b"GIF8"))


def _is_sound(head: bytes) -> bool:
    is_wave = head[:4] == b"RIFF" and head[8:12] == b"WAVE"
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return is_wave or is_mpeg or head[4:8] in _MP4 or head.startswith((b"ID3", b"fLaC", b"OggS"))


_PROMISES = (
    ("picture", IMAGE_ENDINGS, _is_picture),
    ("video", VIDEO_ENDINGS, _is_video),
    ("sound", AUDIO_ENDINGS, _is_sound),
)


def _place(arrived: Path, wanted: Path, is_replacing: bool) -> Path:
    """``wanted``, or ``name (1).png`` where another file has it; the same file is kept once."""
    place, number = wanted, 0
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while not is_replacing and place.exists():
            if place.is_file() and filecmp.cmp(place, arrived, shallow=False):
                return place
            number += 1
            place = wanted.with_name(f"{wanted.stem} ({number}){wanted.suffix}")
        os.replace(arrived, place)
    except OSError as error:
        raise FileError(f"The file cannot be kept ({error.strerror})", given=wanted.name) from error
    return place
