"""What can be written: file endings, the codecs that go into them, and how ffmpeg is told.

The first codec of an ending is its usual one. Whether the ffmpeg at hand has an encoder is asked before anything long
begins, and the refusal lists what it has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingLibraryError, SettingsError, unknown_name
from . import program

# RGB is turned into BT.709 and tagged so: without the tag a player guesses from the size and shifts the colours.
_TO_YUV = "-vf scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+full_chroma_inp"
_TAGS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv"
_YUV = f"{_TO_YUV} {_TAGS}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One of ffmpeg's encoders."""

    name: str
    options: str
    """``{crf}`` is the quality"""
    min_side_px: int = 1
    """below it the encoder fails, or is not to be trusted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoCodec:
    """A way to compress frames."""

    encoders: tuple[Encoder, ...]
    """the best first"""
    pixels: Mapping[int, str]
    """bits of a channel -> ffmpeg's pixel format, the usual first"""
    even_sides: bool = True
    """chroma at half the size covers 2 px"""


CODECS: dict[str, VideoCodec] = {
    "h264": VideoCodec(
        encoders=(Encoder(name="libx264", options=f"{_YUV} -crf {{crf}} -preset medium"),),
        pixels={8: "yuv420p", 10: "yuv420p10le"},
    ),
    "h265": VideoCodec(
        # Some x265 overwrite their own memory in frames of less than one coding unit of 64 px, and crash.
        encoders=(
            Encoder(
                name="libx265",
                options=f"{_YUV} -crf {{crf}} -preset medium -x265-params log-level=error -tag:v hvc1",
                min_side_px=64,
            ),
        ),
        pixels={8: "yuv420p", 10: "yuv420p10le"},
    ),
    "vp9": VideoCodec(
        encoders=(Encoder(name="libvpx-vp9", options=f"{_YUV} -crf {{crf}} -b:v 0"),),
        pixels={8: "yuv420p", 10: "yuv420p10le"},
    ),
    "av1": VideoCodec(
        encoders=(
            Encoder(name="libsvtav1", options=f"{_YUV} -crf {{crf}} -preset 6", min_side_px=64),
            Encoder(name="libaom-av1", options=f"{_YUV} -crf {{crf}} -b:v 0 -cpu-used 6 -row-mt 1"),
        ),
        pixels={8: "yuv420p", 10: "yuv420p10le"},
    ),
    "prores": VideoCodec(
        encoders=(Encoder(name="prores_ks", options=f"{_YUV} -profile:v hq -vendor apl0"),),
        pixels={10: "yuv422p10le"},
    ),
    "ffv1": VideoCodec(
        encoders=(Encoder(name="ffv1", options="-level 3 -g 1 -slicecrc 1"),),
        pixels={8: "bgr0", 10: "gbrp10le", 16: "gbrp16le"},
        even_sides=False,
    ),
    "gif": VideoCodec(encoders=(Encoder(name="gif", options=""),), pixels={8: "pal8"}, even_sides=False),
    "webp": VideoCodec(
        encoders=(Encoder(name="libwebp", options="-lossless 1 -loop 0"),), pixels={8: "bgra"}, even_sides=False
    ),
}
"""gif and webp are both, a codec and a file"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of file."""

    codecs: tuple[str, ...]
    """the usual first"""
    muxer: str
    sound: tuple[Encoder, ...] = ()
    """the best first; none: a silent kind of file"""
    has_tags: bool = True
    """whether it carries a workflow"""


# ffmpeg's usual search for the best AAC puts a click as loud as the sound itself where a tone sets in.
_AAC = Encoder(name="aac", options="-aac_coder fast -b:a 192k")
_MP4 = Format(codecs=("h264", "h265", "av1", "vp9"), muxer="mp4", sound=(_AAC,))
FORMATS: dict[str, Format] = {
    ".mp4": _MP4,
    ".m4v": _MP4,
    ".mov": Format(codecs=("h264", "h265", "prores"), muxer="mp4", sound=(_AAC,)),
    ".webm": Format(
        codecs=("vp9", "av1"),
        muxer="webm",
        sound=(Encoder(name="libopus", options="-b:a 160k"), Encoder(name="libvorbis", options="-q:a 6")),
    ),
    ".mkv": Format(
        codecs=("ffv1", "h264", "h265", "av1", "vp9", "prores"),
        muxer="matroska",
        sound=(Encoder(name="flac", options=""),),
    ),
    ".gif": Format(codecs=("gif",), muxer="gif", has_tags=False),
    ".webp": Format(codecs=("webp",), muxer="webp"),
}
"""file ending -> what may be in it"""

_UNCOMPRESSED = Encoder(name="pcm_s24le", options="")
_MOVING_TAGS = "-movflags use_metadata_tags+faststart"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one file is written: see :func:`way_of`."""

    ending: str
    codec_name: str
    bits: int
    """of a channel of a pixel in the file"""

    @property
    def format(self) -> Format:
        return FORMATS[self.ending]

    @property
    def codec(self) -> VideoCodec:
        return CODECS[self.codec_name]

    @property
    def frame_bits(self) -> int:
        """8 or 16: what the frames given to the writer should have, so that nothing is lost before the codec."""
        return 8 if self.bits == 8 else 16

    @property
    def browsers_play(self) -> bool:
        """Whether a page may show the file."""
        return self.ending in (".mp4", ".m4v", ".webm", ".gif", ".webp")

    def check(self) -> None:
        """Raise :class:`MissingLibraryError` if the ffmpeg at hand cannot write this."""
        if next(self._encoders(), None) is None:
            raise MissingLibraryError(
                f"This ffmpeg cannot write {self.codec_name} with {self.bits} bits",
                given=f"ffmpeg {program.version()} ({program.ffmpeg()})",
                expected="what it can write: " + "; ".join(writable()),
                do="choose one of these, pip install -U imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to another ffmpeg",
            )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the file: odd sides grow by one px where the codec needs even ones."""
        step = 2 if self.codec.even_sides else 1
        return -(-height // step) * step, -(-width // step) * step

    def video_options(self, height: int, width: int, *, crf: int) -> list[str]:
        """ffmpeg's output options for frames of this size.

        Raises:
            MissingLibraryError: no encoder for it.
            SettingsError: too small for the encoder.
        """
        self.check()
        fitting = [encoder for encoder in self._encoders() if min(height, width) >= encoder.min_side_px]
        if not fitting:
            least = min(encoder.min_side_px for encoder in self._encoders())
            raise SettingsError(
                f"The frames are too small for {self.codec_name}",
                given=f"{width} x {height} px",
                expected=f"sides of at least {least} px",
                do="choose another codec",
            )
        encoder = fitting[0]
        options = f"{encoder.options.format(crf=crf)} -pix_fmt {self.codec.pixels[self.bits]} -c:v {encoder.name}"
        return [*options.split(), *self.file_options()]

    def file_options(self) -> list[str]:
        """ffmpeg's output options for the kind of file."""
        # QuickTime's own kind of file is what ProRes lives in; players of h264 take either.
        muxer = "mov" if (self.codec_name, self.ending) == ("prores", ".mov") else self.format.muxer
        return f"{_MOVING_TAGS if muxer in ('mp4', 'mov') else ''} -f {muxer}".split()

    def sound_options(self) -> list[str]:
        """ffmpeg's output options for the sound beside it; none for a silent kind of file."""
        if not self.format.sound:
            return []
        at_hand = program.encoders()
        known = [encoder for encoder in self.format.sound if encoder.name in at_hand]
        if not known:
            raise MissingLibraryError(
                f"This ffmpeg cannot write sound into {self.ending[1:]}",
                given=f"ffmpeg {program.version()} ({program.ffmpeg()})",
                expected="one of " + ", ".join(encoder.name for encoder in self.format.sound),
                do="pip install -U imageio-ffmpeg, or choose another format",
            )
        chosen = _UNCOMPRESSED if (self.codec_name, self.ending) == ("prores", ".mov") else known[0]
        return f"-c:a {chosen.name} {chosen.options}".split()

    def _encoders(self) -> Iterator[Encoder]:
        """Those of this ffmpeg that take the pixels."""
        at_hand, pixels = program.encoders(), self.codec.pixels[self.bits]
        for encoder in self.codec.encoders:
            # 8 bits they all know; asking costs a start of the program.
            if encoder.name in at_hand and (self.bits == 8 or pixels in program.pixel_formats(encoder.name)):
                yield encoder


def way_of(path: str | os.PathLike[str], codec: str = "auto", bits: int = 0) -> Way:
    """How to write ``path``: its ending chooses the kind of file.

    Args:
        codec: a key of :data:`CODECS`, or ``auto`` for the usual one of the ending.
        bits: of a channel; 0 is the usual number of the codec.

    Raises:
        SettingsError: an unknown ending, or a codec or a number of bits that does not go with it.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise SettingsError(
            "The video format is not known",
            given=path.name,
            expected="a name that ends in " + ", ".join(FORMATS),
            do=f"use {path.name}.mp4",
        )
    usual = FORMATS[ending].codecs
    if codec not in ("auto", *CODECS):
        raise unknown_name("codec", codec, ["auto", *CODECS])
    if codec != "auto" and codec not in usual:
        raise SettingsError(
            f"{ending[1:]} files do not hold this codec",
            given=f"{codec} in {ending[1:]}",
            expected=f"auto, {', '.join(usual)}",
            do=f"choose {' or '.join(other[1:] for other, one in FORMATS.items() if codec in one.codecs)}",
        )
    name = usual[0] if codec == "auto" else codec
    depths = tuple(CODECS[name].pixels)
    if bits not in (0, *depths):
        raise SettingsError(
            f"{name} is not written with this number of bits",
            given=f"{bits} bits",
            expected=f"auto, or {' or '.join(map(str, depths))}",
            do="choose another codec: ffv1 in mkv and png hold 16 bits" if bits == 16 else None,
        )
    return Way(ending=ending, codec_name=name, bits=bits or depths[0])


def writable() -> list[str]:
    """What the ffmpeg at hand can write, for people: ``mp4: h264 (8 or 10 bits), av1 (8 or 10 bits)``."""
    lines = []
    for ending, kind in FORMATS.items():
        if ending == ".m4v":
            continue
        told = []
        for name in kind.codecs:
            ways = [Way(ending=ending, codec_name=name, bits=bits) for bits in CODECS[name].pixels]
            known = [str(way.bits) for way in ways if next(way._encoders(), None) is not None]
            told += [f"{name} ({' or '.join(known)} bits)"] if known else []
        lines += [f"{ending[1:]}: {', '.join(told)}"] if told else []
    return [*lines, "png (8 or 16 bits)"]
