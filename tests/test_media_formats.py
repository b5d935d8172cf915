"""Every kind of file that is written: what comes back from it, what is refused, and that nothing half-done stays."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vidgen.vidgen_core import media
from vidgen.vidgen_core.errors import Cancelled, FileError, MissingLibraryError, SettingsError
from vidgen.vidgen_core.media import program, series, tags, write
from vidgen.vidgen_core.memory.cancel import listening
from vidgen.vidgen_core.memory.host import LocalHost

FPS, RATE_HZ = 8, 44100
TAGS = {
    # A brace in a prompt must not end the workflow of a webm, and not all the world writes ASCII.
    "prompt": json.dumps({"1": {"inputs": {"prompt": 'a { b } } \\ " c'}}}),
    "workflow": json.dumps({"nodes": [{"title": "漢 €"}]}, ensure_ascii=False),
}


def ramp(num_frames: int = 5, height: int = 65, width: int = 67, dtype: type = np.uint8) -> np.ndarray:
    """(T, H, W, 3): smooth colours that change over time; sides of odd length."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij")
    return (np.stack([x, y, t], axis=-1) * np.iinfo(dtype).max).round().astype(dtype)


def tone(length_s: float, channels: int = 2) -> media.Sound:
    time = torch.arange(round(length_s * RATE_HZ)) / RATE_HZ
    wave = 0.5 * (2 * torch.pi * 440 * time).sin()
    return media.Sound(torch.stack([wave * (1 - 0.5 * channel) for channel in range(channels)]), RATE_HZ)


def codec_in(path: Path) -> str:
    """What ffmpeg calls the stream; read here without the code under test."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    about = next(reader)
    reader.close()
    names = [re.match(r"\w+", about[key]) for key in ("codec", "pix_fmt")]
    return " ".join(name[0] for name in names if name)


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "bits", "stream", "sound_rate"),
    [
        ("a.mp4", "auto", 10, "h264 yuv420p10le", RATE_HZ),
        ("a.mp4", "h265", 0, "hevc yuv420p", RATE_HZ),
        ("a.webm", "av1", 10, "av1 yuv420p10le", 48000),  # Opus knows no 44.1 kHz
        ("a.mov", "prores", 0, "prores yuv422p10le", RATE_HZ),
        ("a.mkv", "auto", 16, "ffv1 gbrp16le", RATE_HZ),
    ],
)
def test_what_is_written_comes_back(
    tmp_path: Path, name: str, codec: str, bits: int, stream: str, sound_rate: int
) -> None:
    """Frames, sound and tags together; a codec that this ffmpeg lacks is refused."""
    way = media.way_of(name, codec, bits)
    given = ramp(dtype=np.uint8 if way.frame_bits == 8 else np.uint16)
    about = {"fps": FPS, "metadata": TAGS, "codec": codec, "bits": bits, "sound": tone(1.0)}
    if not list(way._encoders()):
        with pytest.raises(MissingLibraryError, match="cannot write"):
            media.write_video(tmp_path / name, given, **about)
        return
    path = media.write_video(tmp_path / name, given, **about)
    assert codec_in(path) == stream
    frames, fps = media.read_video(path, all_bits=True)
    assert fps == FPS
    assert frames.shape == (5, 65, 67, 3) if name == "a.mkv" else (5, 66, 68, 3)
    assert frames.dtype == given.dtype
    scale = 255 / np.iinfo(given.dtype).max
    wrong = np.abs(frames[:, :65, :67].astype(float) - given) * scale
    if name == "a.mkv":
        assert wrong.max() == 0
    # Chroma at half the size costs a step of the ramp or two (4 levels each), the rest is the quality.
    assert wrong.mean() < 3
    assert wrong.max() < 16
    sound = media.read_sound(path)
    assert sound is not None
    assert sound.rate_hz == sound_rate
    assert abs(sound.waveform.shape[1] - 5 / 8 * sound_rate) <= 1
    if sound_rate == RATE_HZ:
        error = (sound.waveform - tone(1.0).waveform[:, : sound.waveform.shape[1]]).abs()
        # 24 bits where nothing is lost; AAC smooths the sudden begin and end.
        assert float(error.max()) < (2**-22 if name in ("a.mov", "a.mkv") else 0.05)
        assert float(error.mean()) < 1e-3
    found = media.read_metadata(path)
    assert {key: json.loads(found[key]) for key in TAGS} == {key: json.loads(value) for key, value in TAGS.items()}
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_ten_bits_are_more_than_eight(tmp_path: Path) -> None:
    grey = np.repeat(np.linspace(0, 65535, 1024, dtype=np.uint16)[None, None, :, None], 16, axis=1).repeat(3, axis=3)
    shades = {}
    for bits in (8, 10):
        path = media.write_video(tmp_path / f"{bits}.mp4", grey, fps=FPS, crf=0, bits=bits)
        frames, _ = media.read_video(path, all_bits=True)
        shades[bits] = len(np.unique(frames[0, 8, :, 1]))
    assert shades[8] <= 256
    # The video range has 876 of 1024 levels.
    assert shades[10] > 800


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_series_of_pictures_comes_back_exactly(tmp_path: Path, dtype: type) -> None:
    given, sound = ramp(dtype=dtype), tone(1.0)
    pictures = media.write_series(tmp_path / "50%_d", given, fps=12.5, metadata=TAGS, sound=sound)
    assert [path.name for path in pictures] == [f"0000{number}.png" for number in range(1, 6)]
    frames, fps = media.read_video(pictures[0], all_bits=True)
    assert fps == 12.5
    assert np.array_equal(frames, given)
    part, _ = media.read_video(pictures[1], start=1, num_frames=2, all_bits=True)
    assert np.array_equal(part, given[2:4])
    assert {key: media.read_metadata(pictures[4])[key] for key in TAGS} == TAGS
    with Image.open(pictures[2]) as picture:  # a reader that is not ours
        assert picture.text["workflow"] == TAGS["workflow"]  # type: ignore[attr-defined]
        if dtype == np.uint8:
            assert np.array_equal(np.asarray(picture), given[2])
    heard = media.read_sound(tmp_path / "50%_d" / series.SOUND_NAME)
    assert heard is not None
    assert torch.equal(heard.waveform, sound.waveform)


@pytest.mark.parametrize("num_frames", [1, 4])
def test_webp_carries_its_workflow(tmp_path: Path, num_frames: int) -> None:
    """A single picture has another kind of file inside than one that moves."""
    given = ramp(num_frames)
    path = media.write_video(tmp_path / "a.webp", given, fps=FPS, metadata=TAGS)
    assert media.read_metadata(path) == TAGS
    with Image.open(path) as picture:
        assert picture.getexif()[0x0110] == f"prompt:{TAGS['prompt']}"
        assert set(picture.getexif()) == {0x010F, 0x0110}
        assert getattr(picture, "n_frames", 1) == num_frames
    frames, fps = media.read_video(path)
    assert np.array_equal(frames, given)
    assert fps == FPS


def frontend_reads(content: bytes) -> dict[str, str]:
    """As ComfyUI's frontend finds texts in the first 2 MiB of a webm: tags by their bytes, JSON by counting braces."""
    found, place = {}, -1
    while (place := content.find(b"\x67\xc8", place + 1, 2 << 20)) >= 0:
        name = content.find(b"\x45\xa3", place)
        length = content[name + 2] & 0x7F
        key = content[name + 3 : name + 3 + length].decode()
        if key in ("PROMPT", "WORKFLOW"):
            begin = end = content.index(b"{", name)
            depth = 0
            while depth or end == begin:
                depth += (content[end : end + 1] == b"{") - (content[end : end + 1] == b"}")
                end += 1
            found[key.lower()] = content[begin:end].decode()
    return found


@pytest.mark.parametrize("ending", ["webm", "mkv"])
def test_tags_of_webm_and_mkv_lie_in_front(tmp_path: Path, ending: str) -> None:
    path = media.write_video(tmp_path / f"a.{ending}", ramp(2, 32, 32), fps=FPS, metadata=TAGS)
    expected = TAGS if ending == "mkv" else {key: tags.without_braces(value) for key, value in TAGS.items()}
    assert {key: media.read_metadata(path)[key] for key in TAGS} == expected
    if ending == "webm":
        assert frontend_reads(path.read_bytes()) == expected


def test_a_sound_is_cut_or_filled_up(tmp_path: Path) -> None:
    for length_s in (0.3, 2.0):
        path = media.write_video(tmp_path / "a.mkv", ramp(4, 16, 16), fps=FPS, sound=tone(length_s, 1))
        heard = media.read_sound(path)
        assert heard is not None
        assert heard.waveform.shape == (1, RATE_HZ // 2)
        kept = min(round(length_s * RATE_HZ), RATE_HZ // 2)
        assert float((heard.waveform[:, :kept] - tone(length_s, 1).waveform[:, :kept]).abs().max()) < 2**-22
        assert not heard.waveform[:, kept:].any()


def test_silent_files_leave_the_sound_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = media.write_video(tmp_path / "a.gif", ramp(2, 16, 16), fps=FPS, sound=tone(1.0))
    assert "gif files are silent" in caplog.text
    assert media.read_sound(path) is None


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "bits", "words"),
    [
        ("a.mp4", "prores", 0, "mp4 files do not hold this codec.*choose mov or mkv"),
        ("a.mp4", "h266", 0, "no such codec.*did you mean"),
        ("a.webm", "auto", 16, "not written with this number of bits.*8 or 10"),
        ("a.gif", "auto", 10, "expected: auto, or 8"),
        ("a.avi", "auto", 0, "format is not known"),
    ],
)
def test_ways_that_do_not_exist(name: str, codec: str, bits: int, words: str) -> None:
    with pytest.raises(SettingsError, match=f"(?i){words}"):
        media.way_of(name, codec, bits)


def test_an_ffmpeg_that_lacks_a_codec_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "encoders", lambda: frozenset({"libx264", "aac", "ffv1"}))
    monkeypatch.setattr(program, "pixel_formats", lambda encoder: frozenset({"yuv420p"}))
    with pytest.raises(MissingLibraryError) as refused:
        media.way_of("a.webm").check()
    assert "cannot write vp9 with 8 bits" in str(refused.value)
    assert "mp4: h264 (8 bits); mov: h264 (8 bits); mkv: ffv1 (8 bits), h264 (8 bits); png" in str(refused.value)
    with pytest.raises(MissingLibraryError, match="h264 with 10 bits"):
        media.way_of("a.mp4", bits=10).check()
    media.way_of("a.mp4").check()
    with pytest.raises(MissingLibraryError, match="sound into webm"):
        media.way_of("a.webm").sound_options()


def test_small_frames_take_another_encoder_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "encoders", lambda: frozenset({"libsvtav1", "libaom-av1", "libx265"}))
    assert "libsvtav1" in media.way_of("a.webm", "av1").video_options(64, 64, crf=17)
    assert "libaom-av1" in media.way_of("a.webm", "av1").video_options(62, 64, crf=17)
    with pytest.raises(SettingsError, match="too small for h265"):
        media.way_of("a.mp4", "h265").video_options(62, 64, crf=17)


@pytest.mark.parametrize(
    "audio",
    [
        "a sound",
        {"waveform": torch.zeros(1, 2, 9)},
        {"waveform": torch.zeros(2, 2, 9), "sample_rate": 44100},
        {"waveform": torch.zeros(1, 0, 9), "sample_rate": 44100},
        {"waveform": torch.zeros(1, 2, 0), "sample_rate": 44100},
        {"waveform": torch.zeros(2, 9), "sample_rate": 44100},
        {"waveform": torch.full((1, 2, 9), torch.nan), "sample_rate": 44100},
        {"waveform": torch.zeros(1, 2, 9), "sample_rate": 0},
    ],
)
def test_what_is_no_sound(audio: object) -> None:
    with pytest.raises(SettingsError, match="sound"):
        media.sound_of(audio)


def test_files_without_sound(tmp_path: Path) -> None:
    noise = tmp_path / "noise.wav"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(FileError, match="cannot be read"):
        media.read_sound(noise)
    with pytest.raises(FileError, match="no such sound"):
        media.read_sound(tmp_path / "missing.wav")


@pytest.mark.parametrize("name", ["a.webm", "a.webp", "a.png"])
def test_damaged_files_have_fewer_tags(tmp_path: Path, name: str) -> None:
    """They end the walk; they neither hang nor raise."""
    rng = np.random.default_rng(0)
    path = tmp_path / name
    if name == "a.png":
        path.write_bytes(series.png(ramp(1, 8, 8)[0], tags.png_texts(TAGS)))
    else:
        media.write_video(path, ramp(2, 16, 16), fps=FPS, metadata=TAGS)
    whole = path.read_bytes()
    assert media.read_metadata(path)
    for _ in range(100):
        data = bytearray(whole)
        for place in rng.integers(12, len(data), 20):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(12, len(data))])
        assert isinstance(media.read_metadata(path), dict)


# --- nothing half-done stays ------------------------------------------------------------------------------------------

Writer = Callable[[Path, Iterator[np.ndarray]], object]
WRITERS: dict[str, Writer] = {
    "a.gif": lambda place, frames: media.write_video(place / "a.gif", frames, fps=FPS),
    "sound": lambda place, frames: media.write_video(place / "a.mp4", frames, fps=FPS, sound=tone(1.0)),
    "series": lambda place, frames: media.write_series(place / "a", frames, fps=FPS),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_stop_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """While the frames come, and in what is done when they are all there."""

    @contextmanager
    def stopped_at(question: int) -> Iterator[None]:
        asked = 0

        class Host(LocalHost):
            def check_cancelled(self) -> None:
                nonlocal asked
                asked += 1
                if asked >= question:
                    raise Cancelled

        with listening(Host()):
            yield

    def broken() -> Iterator[np.ndarray]:
        yield from ramp(3, 16, 16)
        raise Cancelled

    with pytest.raises(Cancelled):
        WRITERS[kind](tmp_path, broken())
    assert list(tmp_path.iterdir()) == []
    with stopped_at(2), pytest.raises(Cancelled):
        WRITERS[kind](tmp_path, iter(ramp(3, 16, 16)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", WRITERS)
def test_frames_are_not_kept(tmp_path: Path, kind: str) -> None:
    """Memory does not grow with the length: a frame is gone when the one after the next is asked for."""
    alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for _ in range(20):
            frame = np.zeros((16, 16, 3), dtype=np.uint8)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(ref() is not None for ref in alive) <= 2

    WRITERS[kind](tmp_path, frames())
    assert len(alive) == 20


def test_a_file_that_lost_its_end_does_not_replace_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = media.write_video(tmp_path / "a.mp4", ramp(2, 32, 32), fps=FPS)
    before, encode = path.read_bytes(), write._encode

    def torn(unfinished: Path, *args: object, **settings: object) -> int:
        count = encode(unfinished, *args, **settings)  # type: ignore[arg-type]
        os.truncate(unfinished, unfinished.stat().st_size * 2 // 3)
        return count

    monkeypatch.setattr(write, "_encode", torn)
    with pytest.raises(FileError):
        media.write_video(path, np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8), fps=FPS)
    assert path.read_bytes() == before
    monkeypatch.setattr(write, "_encode", lambda *args, **settings: encode(*args, **settings) + 1)
    with pytest.raises(FileError, match=r"cannot be read back.*2 frames of 32 x 32 px.*3 frames"):
        media.write_video(path, ramp(2, 32, 32), fps=FPS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_a_series_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write_bytes = [], Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) == 3:
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FileError, match="disk is full"):
        media.write_series(tmp_path / "a", ramp(), fps=FPS)
    assert list(tmp_path.iterdir()) == []


def test_a_series_takes_no_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileError, match="is there already"):
        media.write_series(tmp_path / "a", ramp(), fps=FPS)
    with pytest.raises(FileError, match="does not exist"):
        media.write_series(tmp_path / "b" / "a", ramp(), fps=FPS)


# --- a long video -----------------------------------------------------------------------------------------------------

DECODED_TO_A_FILE = """
import sys, torch
from pathlib import Path
from vidgen.vidgen_core import media
from vidgen.vidgen_core.bounded import Bound
from vidgen.vidgen_core.families.hunyuan.codec import HunyuanCodec
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.generate import decode_frames

folder = Path(sys.argv[1])
torch.set_num_threads(1)
sides = {"latent_channels": 4, "block_channels": (4, 4, 4, 4), "layers_per_block": 1, "num_groups": 2}
small = CodecConfig(**sides, mid_attention=False)
codec = HunyuanCodec(CausalVAE(small).eval().requires_grad_(False))

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def save(num_latent_frames):
    latents = torch.randn(1, 4, num_latent_frames, 16, 16)
    made = decode_frames(codec, latents, bound=Bound(budget_bytes=16_000_000, spill=folder))
    images = (media.video_to_images(one[None, :, None])[0] for one in made)
    media.write_video(folder / "a.mp4", media.images_to_frames(images), fps=8)
    return peak_bytes()

save(3)  # what is loaded at the first use
print(save(5), save(33))
"""


def test_a_long_video_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    """Latents to mp4, 17 and 129 frames of 128 x 128 px: the longer one's pixels are 25 MB as floats."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which tells the peak of a process")
    run = subprocess.run(
        [sys.executable, "-c", DECODED_TO_A_FILE, str(tmp_path)], check=True, capture_output=True, text=True
    )
    short, long = map(int, run.stdout.split())
    assert long - short < 8e6  # measured: 2 MB, and 4 MB for 257 frames
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert len(media.read_video(tmp_path / "a.mp4")[0]) == 129
