"""Sound: ComfyUI's AUDIO to what ffmpeg reads, and sound files back.

Both ways it passes as .au, a header of 24 bytes and the samples: https://pubs.opengroup.org/external/auformat.html
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import FileError, SettingsError
from ..memory.cancel import check_cancelled
from . import program

MAX_CHANNELS = 8
MAX_BYTES = 2 * 10**9
"""of a sound as float32, about two hours: silence of a year packs into a small file"""
_HEADER = struct.Struct(">4s5I")
_UNKNOWN_SIZE, _FLOAT32 = 0xFFFFFFFF, 6
_AT_ONCE = 1 << 20
"""samples written, or bytes read, between two questions whether to stop"""


@dataclass(frozen=True, slots=True)
class Sound:
    """What a video sounds like."""

    waveform: Tensor
    """(channels, samples) float32, in [-1, 1]"""
    rate_hz: int

    def as_audio(self) -> dict[str, Any]:
        """ComfyUI's AUDIO."""
        return {"waveform": self.waveform[None], "sample_rate": self.rate_hz}


def sound_of(audio: object) -> Sound | None:
    """The sound of ComfyUI's AUDIO, ``{"waveform": (1, channels, samples), "sample_rate"}``; None has none.

    Raises:
        SettingsError: it is something else, a batch of several, empty, or not finite.
    """
    if audio is None:
        return None
    waveform = audio.get("waveform") if isinstance(audio, Mapping) else None
    rate = audio.get("sample_rate") if isinstance(audio, Mapping) else None
    if not isinstance(waveform, Tensor) or not isinstance(rate, int) or not 1000 <= rate <= 1_000_000:
        raise SettingsError(
            "The sound cannot be used", given=f"{type(audio).__name__}", expected="AUDIO: a waveform and a sample rate"
        )
    shape = tuple(waveform.shape)
    if len(shape) != 3 or shape[0] != 1 or not 1 <= shape[1] <= MAX_CHANNELS or not shape[2]:
        raise SettingsError(
            "The sound cannot be used",
            given=f"a waveform of shape {shape}",
            expected=f"(1, channels, samples), with 1 to {MAX_CHANNELS} channels",
            do="take one of the batch" if len(shape) == 3 and shape[0] > 1 else None,
        )
    samples = waveform[0].detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(samples).all()):
        raise SettingsError("The sound has numbers in it that are not finite", expected="numbers from -1 to 1")
    return Sound(samples.clamp(-1, 1), rate)


def span(sound: Sound, start_s: float, length_s: float) -> Sound:
    """``length_s`` seconds of it from ``start_s`` on, or what there is of them."""
    first, last = (round(second * sound.rate_hz) for second in (start_s, start_s + length_s))
    return Sound(sound.waveform[:, first:last], sound.rate_hz)


def fitted(sound: Sound, length_s: float) -> Sound:
    """Just so long: cut at the end, or filled up with silence."""
    kept = span(sound, 0, length_s)
    missing = max(1, round(length_s * sound.rate_hz)) - kept.waveform.shape[1]
    return Sound(functional.pad(kept.waveform, (0, missing)), sound.rate_hz)


def write_au(path: Path, sound: Sound) -> None:
    """For ffmpeg to read: uncompressed, with its rate and channels in front."""
    channels = len(sound.waveform)
    with path.open("wb") as file:
        file.write(_HEADER.pack(b".snd", _HEADER.size, _UNKNOWN_SIZE, _FLOAT32, sound.rate_hz, channels))
        for part in sound.waveform.split(_AT_ONCE, dim=1):
            check_cancelled()
            file.write(part.T.contiguous().numpy().astype(">f4").tobytes())


def read_sound(path: str | os.PathLike[str]) -> Sound | None:
    """The sound of a sound file or a video, at its own rate; None for a file that ffmpeg reads and that has none.

    Raises:
        FileError: the file is missing, damaged, of no kind that ffmpeg reads, or longer than :data:`MAX_BYTES`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError("There is no such sound file", given=path, do="check the path")
    command = [program.ffmpeg(), "-v", "error", "-nostdin", *program.READ_ONLY_ITSELF, "-i", str(path), "-map", "0:a:0"]
    content = bytearray()
    with tempfile.TemporaryFile() as errors:
        with program.running([*command, "-f", "au", "-c:a", "pcm_f32be", "-"], errors, speaks=True) as (process, pipe):
            while part := pipe.read(_AT_ONCE):
                check_cancelled()
                content += part
                if len(content) > MAX_BYTES:
                    raise FileError(
                        "The sound is too long", given=path.name, expected=f"at most {MAX_BYTES // 10**9} GB as numbers"
                    )
            code = program.ended(process)
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    if code and "matches no streams" in said:
        return None
    if code or len(content) < _HEADER.size:
        raise FileError("The sound cannot be read", given=path.name, expected="a file with sound that ffmpeg reads")
    _, start, _, _, rate, channels = _HEADER.unpack_from(content)
    del content[:start]
    del content[len(content) // (4 * channels) * 4 * channels :]
    if not content:
        return None
    samples = torch.frombuffer(content, dtype=torch.int32)
    if sys.byteorder == "little":  # turn the four bytes of each number around
        samples = samples.view(torch.uint8).view(-1, 4).flip(1).contiguous().view(torch.int32).flatten()
    return Sound(samples.view(torch.float32).view(-1, channels).T.contiguous(), rate)
