"""The texts inside media files, where ComfyUI's frontend looks for the workflow that made them.

mp4 and mov: ``moov/udta/meta`` with ``keys`` and ``ilst`` (ffmpeg's ``use_metadata_tags``), in front of the frames
(https://developer.apple.com/documentation/quicktime-file-format/metadata_atoms_and_types); webm and mkv: ``SimpleTag``
(https://www.rfc-editor.org/rfc/rfc9559.html#name-tags-element); PNG: ``tEXt`` and ``iTXt``
(https://www.w3.org/TR/png-3/#11textinfo); WebP: texts ``key:value`` in its Exif chunk
(https://developers.google.com/speed/webp/docs/riff_container). What a file is, its first bytes say.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import FileError

PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 256 << 20
"""of one text: a file may say anything of its sizes"""


@dataclass(frozen=True, slots=True)
class _Box:
    """A piece of a file: its name and where its content lies."""

    name: bytes
    start: int
    end: int


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts of an mp4, mov, webm, mkv, PNG or WebP file, read the way ComfyUI's frontend does.

    A file of another kind, or one without texts, gives an empty dict. The keys of webm and mkv, which are in capitals
    there, are in small letters.

    Raises:
        FileError: the file is missing, or cannot be read.
    """
    path = existing(path)
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            return _reader(file.read(12))(file, end)
    except OSError as error:
        raise FileError(f"The file cannot be read: {error.strerror}", given=path) from error


def existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileError("There is no such video file", given=path, do="check the path")
    return path


def _reader(begin: bytes) -> Callable[[IO[bytes], int], dict[str, str]]:
    if begin.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_tags
    if begin.startswith(PNG_BEGIN):
        return _png_tags
    if begin[:4] == b"RIFF" and begin[8:] == b"WEBP":
        return _webp_tags
    return _mp4_tags


def _content(file: IO[bytes], box: _Box) -> bytes:
    file.seek(box.start)
    return file.read(min(box.end - box.start, MAX_TEXT_BYTES))


def ffmetadata(tags: Mapping[str, str]) -> str:
    """ffmpeg's metadata file: https://ffmpeg.org/ffmpeg-formats.html#Metadata-2"""

    def escape(text: str) -> str:
        return "".join("\\" + char if char in "=;#\\\n" else char for char in text)

    return ";FFMETADATA1\n" + "".join(f"{escape(key)}={escape(value)}\n" for key, value in tags.items())


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def without_braces(text: str) -> str:
    """The same JSON, with braces inside its strings written as escapes.

    ComfyUI's frontend looks for the end of a webm's workflow by counting braces, those of a prompt too.
    """
    return _STRING.sub(lambda found: found[0].replace("{", "\\u007b").replace("}", "\\u007d"), text)


# --- mp4 --------------------------------------------------------------------------------------------------------------


def _mp4_tags(file: IO[bytes], end: int) -> dict[str, str]:
    tags: dict[str, str] = {}
    for moov in _boxes(file, 0, end, b"moov"):
        for udta in _boxes(file, moov.start, moov.end, b"udta"):
            for meta in _boxes(file, udta.start, udta.end, b"meta"):
                tags |= _meta_tags(file, meta)
        for meta in _boxes(file, moov.start, moov.end, b"meta"):  # where QuickTime itself puts it
            tags = _meta_tags(file, meta) | tags
    return tags


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
                text = _content(file, _Box(data.name, data.start + 8, data.end))
                tags[names[index - 1]] = text.decode("utf-8", "replace")
    return tags


def _key_names(file: IO[bytes], keys: _Box) -> list[str]:
    """The tag names in ``keys``: version, count, then (size, namespace, name) each."""
    names = []
    for box in _boxes(file, keys.start + 8, keys.end):
        file.seek(box.start)
        names.append(file.read(box.end - box.start).decode("utf-8", "replace"))
    return names


# --- webm and mkv -----------------------------------------------------------------------------------------------------

_SEGMENT, _TAGS, _TAG, _SIMPLE = b"\x18\x53\x80\x67", b"\x12\x54\xc3\x67", b"\x73\x73", b"\x67\xc8"
_NAME, _STRING_VALUE, _TARGETS = b"\x45\xa3", b"\x44\x87", b"\x63\xc0"


def _matroska_tags(file: IO[bytes], end: int) -> dict[str, str]:
    """The tags of the whole file; those of one of its streams (its length, its encoder) are left out."""
    tags: dict[str, str] = {}
    for segment in _elements(file, 0, end, _SEGMENT):
        for table in _elements(file, segment.start, segment.end, _TAGS):
            for tag in _elements(file, table.start, table.end, _TAG):
                if not any(target.end > target.start for target in _elements(file, tag.start, tag.end, _TARGETS)):
                    tags |= _simple_tags(file, tag)
    return tags


def _simple_tags(file: IO[bytes], tag: _Box) -> dict[str, str]:
    tags = {}
    for simple in _elements(file, tag.start, tag.end, _SIMPLE):
        parts = {part.name: part for part in _elements(file, simple.start, simple.end)}
        if _NAME in parts and _STRING_VALUE in parts:
            name, value = (_content(file, parts[kind]).rstrip(b"\0") for kind in (_NAME, _STRING_VALUE))
            tags[name.decode("utf-8", "replace").lower()] = value.decode("utf-8", "replace")
    return tags


def _elements(file: IO[bytes], start: int, end: int, name: bytes | None = None) -> Iterator[_Box]:
    """The EBML elements between ``start`` and ``end``; garbage ends the walk."""
    while start < end:
        file.seek(start)
        head = file.read(12)
        id_length = _vint_length(head[:1], 4)
        size_length = _vint_length(head[id_length : id_length + 1], 8)
        content = start + id_length + size_length
        if not id_length or not size_length or content > end:
            return
        raw = head[id_length : id_length + size_length]
        size = int.from_bytes(raw, "big") - (1 << (7 * size_length))  # without the bit that tells the length
        # All ones is a size that was not known when it was written: up to the end.
        stop = end if size == (1 << (7 * size_length)) - 1 else content + size
        if stop > end:
            return
        if name is None or head[:id_length] == name:
            yield _Box(head[:id_length], content, stop)
        start = stop


def _vint_length(first: bytes, longest: int) -> int:
    """How many bytes a number of EBML has, told by the zeros in front of its first one; 0 for garbage."""
    length = 9 - first[0].bit_length() if first else 0
    return length if 1 <= length <= longest else 0


# --- PNG --------------------------------------------------------------------------------------------------------------


def png_chunk(name: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file, with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_texts(tags: Mapping[str, str]) -> bytes:
    """Chunks with the tags, as ComfyUI's own nodes write them: plain where they are plain, else as UTF-8."""
    chunks = b""
    for key, value in tags.items():
        if value.isascii():
            chunks += png_chunk(b"tEXt", key.encode("latin-1") + b"\0" + value.encode("ascii"))
        else:
            chunks += png_chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode("utf-8"))
    return chunks


def _png_tags(file: IO[bytes], end: int) -> dict[str, str]:
    tags: dict[str, str] = {}
    start = len(PNG_BEGIN)
    while start + 12 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        if start + 12 + size > end:
            break
        if name in (b"tEXt", b"iTXt"):
            key, _, rest = _content(file, _Box(name, start + 8, start + 8 + size)).partition(b"\0")
            text = rest.decode("latin-1") if name == b"tEXt" else _international_text(rest)
            if text is not None:
                tags[key.decode("latin-1")] = text
        start += 12 + size
    return tags


def _international_text(rest: bytes) -> str | None:
    """What follows the key of an iTXt chunk: two flags, a language, the key in it, the text; None for garbage."""
    parts = rest[2:].split(b"\0", 2)
    if len(rest) < 2 or len(parts) < 3:
        return None
    if rest[0] == 0:
        return parts[2].decode("utf-8", "replace")
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(parts[2], MAX_TEXT_BYTES).decode("utf-8", "replace")
    return None


# --- WebP -------------------------------------------------------------------------------------------------------------

_MODEL = 0x0110
"""the number of Exif's field for ``prompt``; the others are in those before it"""
_ASCII = 2
_HAS_EXIF, _HAS_ALPHA = 0x08, 0x10


def add_webp_tags(path: Path, tags: Mapping[str, str], *, height: int, width: int) -> None:
    """Put the tags behind the frames of a WebP file that has none yet."""
    if not tags:
        return
    exif = _exif(tags)
    chunk = b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    with path.open("r+b") as file:
        file.seek(12)
        begin = file.read(14)
        if begin[:4] != b"VP8X":  # a single picture has no header that could announce them
            has_alpha = begin[:4] == b"VP8L" and begin[12] & 0x10
            sides = b"".join(struct.pack("<I", side - 1)[:3] for side in (width, height))
            flags = _HAS_EXIF | (_HAS_ALPHA if has_alpha else 0)
            file.seek(12)
            picture = file.read()
            file.seek(12)
            file.write(b"VP8X" + struct.pack("<II", 10, flags) + sides + picture)
        else:
            file.seek(20)
            file.write(bytes([begin[8] | _HAS_EXIF]))
        end = file.seek(0, os.SEEK_END)
        file.write(chunk)
        file.seek(4)
        file.write(struct.pack("<I", end + len(chunk) - 8))


def _exif(tags: Mapping[str, str]) -> bytes:
    """TIFF's header and one table of texts."""
    ordered = sorted(tags.items(), key=lambda item: item[0] != "prompt")
    texts = [f"{key}:{value}".encode() + b"\0" for key, value in ordered]
    table, place = [], 8 + 2 + 12 * len(texts) + 4
    for number, text in enumerate(texts):
        inline = text.ljust(4, b"\0") if len(text) <= 4 else struct.pack("<I", place)
        table.append(struct.pack("<HHI", _MODEL - number, _ASCII, len(text)) + inline)
        place += len(text) if len(text) > 4 else 0
    head = b"II*\0" + struct.pack("<IH", 8, len(texts)) + b"".join(reversed(table)) + bytes(4)
    return head + b"".join(text for text in texts if len(text) > 4)


def _webp_tags(file: IO[bytes], end: int) -> dict[str, str]:
    start = 12
    while start + 8 <= end:
        file.seek(start)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"EXIF" and start + 8 + size <= end:
            return _exif_texts(_content(file, _Box(name, start + 8, start + 8 + size)).removeprefix(b"Exif\0\0"))
        start += 8 + size + size % 2
    return {}


def _exif_texts(exif: bytes) -> dict[str, str]:
    """The texts ``key:value`` of the first table; {} for garbage."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    tags = {}
    with suppress(struct.error):
        if order is None:
            return {}
        (table,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, table)
        for entry in range(table + 2, table + 2 + 12 * count, 12):
            _, kind, size, place = struct.unpack_from(f"{order}HHII", exif, entry)
            text = exif[place : place + size] if size > 4 else exif[entry + 8 : entry + 8 + size]
            key, colon, value = text.rstrip(b"\0").partition(b":")
            if kind == _ASCII and colon:
                tags[key.decode("utf-8", "replace").lower()] = value.decode("utf-8", "replace")
    return tags
