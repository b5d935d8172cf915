"""Videos through the real ffmpeg: what is written is what is read, and the workflow is where the frontend looks."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vidgen.vidgen_core import media
from vidgen.vidgen_core.errors import FileError, SettingsError
from vidgen.vidgen_core.types import Grid

TAGS = {
    "prompt": json.dumps({"1": {"inputs": {"prompt": "a = b; # c \\ d\n€ 漢 \U0001f980"}}}, ensure_ascii=False),
    "workflow": json.dumps({"nodes": ["x" * 300_000]}),  # larger than a command line may be
}


def ramp(num_frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """(T, H, W, 3) uint8: smooth colours that change over time, which 4:2:0 chroma does not hurt."""
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij")
    return (np.stack([x, y, t], axis=-1) * 255).round().astype(np.uint8)


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """An independent walk over mp4 boxes: (name, content)."""
    offset = 0
    while offset + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, offset)
        yield name.decode("latin-1"), data[offset + 8 : offset + size]
        offset += size


def test_frames_come_back(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", ramp(), fps=8, crf=0)
    frames, fps = media.read_video(path)
    assert frames.shape == ramp().shape
    assert fps == 8
    # BT.709 in 8 bits loses up to 2 levels, and chroma at half the size up to a step of the ramp (about 8).
    assert np.abs(frames.astype(int) - ramp()).max() <= 10
    assert np.abs(frames.astype(int) - ramp()).mean() < 3


def test_colours_are_true(tmp_path: Path) -> None:
    """With the matrix of BT.601 in one of the two directions green would be off by 40."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (120, 60, 200)]
    frames = np.broadcast_to(np.array(colours, dtype=np.uint8)[:, None, None], (6, 16, 16, 3))
    read, _ = media.read_video(media.write_video(tmp_path / "a.mp4", frames, fps=8, crf=0))
    assert np.abs(read.astype(int) - frames).max() <= 3  # rounding in YUV


@pytest.mark.parametrize(("height", "width"), [(31, 47), (31, 48), (1, 1)])
def test_odd_sides_are_padded_with_the_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = np.full((3, height, width, 3), (200, 40, 90), dtype=np.uint8)
    read, _ = media.read_video(media.write_video(tmp_path / "a.mp4", frames, fps=5))
    assert read.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(read.astype(int) - (200, 40, 90)).max() <= 4


def test_metadata_comes_back_unharmed(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", ramp(), fps=8, metadata=TAGS)
    read = media.read_metadata(path)
    assert {key: read[key] for key in TAGS} == TAGS


def test_metadata_lies_where_the_frontend_looks(tmp_path: Path) -> None:
    """In front of the frames, in moov/udta/meta as keys + ilst; read here without the code under test."""
    path = media.write_video(tmp_path / "a.mp4", ramp(), fps=8, metadata={"prompt": "{}", "workflow": "[1]"})
    top = list(boxes(path.read_bytes()))
    names = [name for name, _ in top]
    assert names.index("moov") < names.index("mdat")
    udta = dict(boxes(dict(top)["moov"]))["udta"]
    children = dict(boxes(dict(boxes(udta))["meta"][4:]))
    keys = [content.decode() for _, content in boxes(children["keys"][8:])]
    values = [dict(boxes(item))["data"][8:].decode() for _, item in boxes(children["ilst"])]
    found = dict(zip(keys, values, strict=True))
    assert found["prompt"] == "{}"
    assert found["workflow"] == "[1]"


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    first, second = (media.write_video(tmp_path / name, ramp(), fps=8, metadata=TAGS) for name in ("a.mp4", "b.mp4"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("ending", [".webm", ".gif", ".webp", ".mov", ".MP4"])
def test_other_formats_are_written_and_read(tmp_path: Path, ending: str) -> None:
    path = media.write_video(tmp_path / f"a{ending}", ramp(), fps=10, metadata=TAGS)
    frames, fps = media.read_video(path)
    assert frames.shape == ramp().shape
    assert fps == pytest.approx(10)
    assert (media.read_metadata(path).get("workflow") == TAGS["workflow"]) == (ending != ".gif")


def test_a_part_of_a_video(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", ramp(10), fps=8)
    whole, _ = media.read_video(path)
    part, _ = media.read_video(path, start=3, num_frames=4)
    assert np.array_equal(part, whole[3:7])
    with pytest.raises(FileError, match="no frames there"):
        media.read_video(path, start=10)


def test_frames_are_streamed(tmp_path: Path) -> None:
    """Memory does not grow with the length: a frame is gone when the one after the next is asked for."""
    frames_alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for _ in range(40):
            frame = np.zeros((16, 16, 3), dtype=np.uint8)
            frames_alive.append(weakref.ref(frame))
            yield frame
            del frame
            # The first is kept by its reader, for its size, and the newest is still in its hands.
            assert sum(ref() is not None for ref in frames_alive) <= 2

    media.write_video(tmp_path / "a.mp4", frames(), fps=8)
    assert len(frames_alive) == 40


def test_an_old_video_survives_a_failure(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "a.mp4", ramp(), fps=8)
    before = path.read_bytes()

    def broken() -> Iterator[np.ndarray]:
        yield ramp()[0]
        raise RuntimeError("the decoder failed")

    with pytest.raises(RuntimeError, match="the decoder failed"):
        media.write_video(path, broken(), fps=8)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> Iterator[np.ndarray]:
        yield from ramp()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        media.write_video(tmp_path / "a.mp4", stopped(), fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        ([], "no frames"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)], "frame cannot be written"),
        ([np.zeros((8, 8, 3), np.float32)], "frame cannot be written"),
        ([np.zeros((8, 8), np.uint8)], "frame cannot be written"),
    ],
)
def test_unusable_frames(tmp_path: Path, frames: list[np.ndarray], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        media.write_video(tmp_path / "a.mp4", frames, fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_unusable_rates(tmp_path: Path, fps: float) -> None:
    with pytest.raises(SettingsError, match="frame rate"):
        media.write_video(tmp_path / "a.mp4", ramp(), fps=fps)


def test_unusable_places(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="format is not known"):
        media.write_video(tmp_path / "a.avi", ramp(), fps=8)
    with pytest.raises(FileError, match="does not exist"):
        media.write_video(tmp_path / "missing" / "a.mp4", ramp(), fps=8)
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(FileError, match="replace a folder"):
        media.write_video(tmp_path / "b.mp4", ramp(), fps=8)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: ffmpeg meets it, in a process of its own."""
    if os.name != "posix":
        pytest.skip("needs a POSIX system")
    code = f"""
import resource, numpy as np
from vidgen.vidgen_core import media, errors
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
frames = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
try:
    media.write_video({str(tmp_path / "a.mp4")!r}, frames, fps=8, crf=0)
except errors.FileError as error:
    assert "disk is full" in str(error), error
else:
    raise SystemExit("written all the same")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such video"):
        media.read_video(tmp_path / "missing.mp4")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(FileError, match="no video"):
        media.read_video(noise)


def test_garbage_has_no_metadata(tmp_path: Path) -> None:
    """Damaged files end the walk; they neither hang nor raise."""
    rng = np.random.default_rng(0)
    path = media.write_video(tmp_path / "a.mp4", ramp(2, 16, 16), fps=8, metadata={"prompt": "{}"})
    whole = path.read_bytes()
    for _ in range(50):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 40):
            data[place] = rng.integers(256)
        path.write_bytes(data[: rng.integers(8, len(data))])
        assert isinstance(media.read_metadata(path), dict)
        path.write_bytes(rng.bytes(3000))
        assert media.read_metadata(path) == {}


def test_video_and_images_are_one_to_one() -> None:
    video = torch.rand(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = media.video_to_images(video)
    assert images.shape == (10, 4, 6, 3)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    # (x + 1) / 2 and back, in float32
    torch.testing.assert_close(media.images_to_video(images[5:]), video[1:], atol=2e-7, rtol=0)
    frames = np.stack(list(media.images_to_frames(images)))
    assert np.array_equal(frames, (images * 255).round().byte().numpy())
    torch.testing.assert_close(media.frames_to_images(frames) * 255, torch.tensor(frames).float())


def test_crop_to_grid_keeps_the_middle(caplog: pytest.LogCaptureFixture) -> None:
    grid = Grid(channels=16, spatial=8, temporal=4)
    images = torch.arange(7 * 37 * 50 * 3.0).reshape(7, 37, 50, 3)
    cropped = media.crop_to_grid(images, grid, multiple_px=16)
    assert torch.equal(cropped, images[:5, 2:34, 1:49])
    assert "cropped 7 frames of 50 x 37 px to 5 frames of 48 x 32 px" in caplog.text
    assert media.crop_to_grid(cropped, grid, multiple_px=16) is not None
    with pytest.raises(SettingsError, match="too small"):
        media.crop_to_grid(images[:, :15], grid, multiple_px=16)
