"""ComfyUI's own nodes in `vidgen render`: the server's set, files of the input folder only, results in their place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.core_nodes import NODES, EmptyImage, ImageScale, LoadImage, LoadImageMask
from vidgen.headless.custom_nodes import own_packs
from vidgen.headless.render import load_prompt
from vidgen.headless.server.app import ServerSettings
from vidgen.headless.server.start import new_server
from vidgen.nodes.host import LocalNodeHost, using
from vidgen.vidgen_core.errors import FileError
from vidgen.vidgen_core.media import read_metadata, read_video

sys.path.insert(0, str(Path(__file__).parent))
from serving import node


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """An input folder with ``star.png``, 6 x 4 px of random colours half of which is transparent, and ``sub/b.png``."""
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    pixels[:, :3, 3], pixels[:, 3:, 3] = 255, 0
    Image.fromarray(pixels, "RGBA").save(folder / "star.png")
    Image.fromarray(pixels[..., :3]).save(folder / "sub" / "b.png")
    return folder


@pytest.fixture
def host(inputs: Path, tmp_path: Path) -> Iterator[LocalNodeHost]:
    with using(LocalNodeHost(input_folder=inputs, output_folder=tmp_path / "out")) as host:
        assert isinstance(host, LocalNodeHost)
        yield host


def render(prompt: dict[str, Any], inputs: Path, output: Path) -> int:
    flow = inputs.parent / "flow.json"
    flow.write_text(json.dumps(prompt))
    return main(["render", str(flow), "--input", str(inputs), "-o", str(output), "-q"])


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# --- one set ----------------------------------------------------------------------------------------------------------


def test_the_server_and_a_render_know_the_same_nodes(tmp_path: Path) -> None:
    packs = own_packs()
    server = new_server(ServerSettings(folder=tmp_path, has_page=False))
    assert server.classes.keys() == packs.classes.keys() == {*vidgen.NODE_CLASS_MAPPINGS, *NODES}
    assert packs.titles.keys() == packs.modules.keys() == packs.classes.keys()
    assert packs.modules["LoadImage"] == "nodes"


def test_what_only_the_editor_knows_is_resolved_around_them(tmp_path: Path) -> None:
    """A reroute, a primitive and notes between ComfyUI's own nodes."""

    def drawn(number: int, kind: str, inputs: list[Any], values: list[Any]) -> dict[str, Any]:
        return {"id": number, "type": kind, "mode": 0, "inputs": inputs, "widgets_values": values}

    prefix = {"name": "filename_prefix", "type": "STRING", "widget": {"name": "filename_prefix"}, "link": 3}
    workflow = {
        "nodes": [
            drawn(1, "LoadImage", [], ["star.png", "image"]),
            drawn(2, "Reroute", [{"name": "", "type": "*", "link": 1}], []),
            drawn(3, "SaveImage", [{"name": "images", "type": "IMAGE", "link": 2}, prefix], ["ComfyUI"]),
            drawn(4, "PrimitiveNode", [], ["shots/a"]),
            drawn(5, "Note", [], ["words"]),
            drawn(6, "MarkdownNote", [], ["words"]),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"], [3, 4, 0, 3, 1, "STRING"]],
    }
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(workflow))
    assert load_prompt(path, own_packs().classes) == {
        "1": node("LoadImage", image="star.png"),
        "3": node("SaveImage", images=["1", 0], filename_prefix="shots/a"),
    }


# --- in a render ------------------------------------------------------------------------------------------------------


def test_pictures_go_through_a_render(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = {
        "1": node("LoadImage", image="sub/b.png"),
        "2": node("ImageScale", image=["1", 0], upscale_method="nearest-exact", width=12, height=0, crop="disabled"),
        "3": node("SaveImage", images=["2", 0], filename_prefix="shots/a"),
        "4": node("PreviewImage", images=["2", 0]),
    }
    out = tmp_path / "out"
    out.mkdir()
    assert render(prompt, inputs, out) == 0
    saved = out / "shots" / "a_00001.png"
    assert capsys.readouterr().out.split() == [str(saved)]
    assert [path for path in out.rglob("*") if path.is_file()] == [saved]  # nobody would see the preview
    assert np.array_equal(pixels_of(saved), pixels_of(inputs / "sub" / "b.png").repeat(2, 0).repeat(2, 1))
    assert json.loads(read_metadata(saved)["prompt"]) == prompt


def test_pictures_beside_a_video_have_names_of_their_own(inputs: Path, tmp_path: Path) -> None:
    prompt = {
        "1": node("EmptyImage", width=32, height=16, batch_size=2, color=0xFF8000),
        "2": node("SaveImage", images=["1", 0], filename_prefix="x"),
        "3": node("CreateVideo", images=["1", 0], fps=8.0),
        "4": node("SaveVideo", video=["3", 0], filename_prefix="y", format="auto", codec="auto"),
    }
    out = tmp_path / "out"
    out.mkdir()
    assert render(prompt, inputs, out / "a.mp4") == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "a.png", "a_2.png"]
    assert (pixels_of(out / "a_2.png") == (255, 128, 0)).all()
    (inputs / "a.mp4").write_bytes((out / "a.mp4").read_bytes())
    again = {
        "1": node("LoadVideo", file="a.mp4"),
        "2": node("GetVideoComponents", video=["1", 0]),
        "3": node("CreateVideo", images=["2", 0], fps=["2", 2]),
        "4": node("SaveVideo", video=["3", 0], filename_prefix="y", format="mp4", codec="h264"),
    }
    assert render(again, inputs, out / "b.mp4") == 0
    frames, fps = read_video(out / "b.mp4")
    assert (frames.shape, fps) == ((2, 16, 32, 3), 8)
    assert np.abs(frames.astype(int) - (255, 128, 0)).max() < 12  # two times through chroma at half the size


@pytest.mark.parametrize(
    "name",
    ["../secret.png", "sub/../../secret.png", "link.png", "nothing.png", "a\0.png", "x" * 300],
    ids=["up", "up_from_below", "link", "missing", "zero", "long"],
)
def test_a_name_does_not_lead_out_of_the_input_folder(
    inputs: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes((inputs / "star.png").read_bytes())
    (inputs / "link.png").symlink_to(secret)
    out = tmp_path / "out"
    out.mkdir()
    for named in (name, str(secret)):
        prompt = {"1": node("LoadImage", image=named), "2": node("SaveImage", images=["1", 0], filename_prefix="a")}
        assert render(prompt, inputs, out) == 1
        assert "There is no such file" in capsys.readouterr().err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("prefix", ["../a", "x/../../a", "/tmp/a", "..\\a", ".", "x/.."])
def test_a_prefix_does_not_lead_out_of_the_output_folder(
    inputs: Path, tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    before = sorted(tmp_path.iterdir())
    prompt = {"1": node("LoadImage", image="star.png"), "2": node("SaveImage", images=["1", 0], filename_prefix=prefix)}
    assert render(prompt, inputs, out) == 1
    assert "outside of the output folder" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.iterdir() if path.name != "flow.json") == before
    assert [path for path in out.iterdir() if path.suffix == ".png"] == []


def test_names_of_the_input_folder(host: LocalNodeHost, inputs: Path) -> None:
    listed = LoadImage.INPUT_TYPES()["required"]["image"][0]
    assert listed[:2] == ["star.png", "sub/b.png"]
    assert len(listed) > 2, "the examples stand behind"
    for name in ("star.png", "star.png [input]", "sub/b.png", "sub\\b.png", str(inputs / "star.png"), listed[-1]):
        assert LoadImage.VALIDATE_INPUTS(name) is True
    (host.output_folder).mkdir()
    (host.output_folder / "made.png").write_bytes((inputs / "star.png").read_bytes())
    assert LoadImage.VALIDATE_INPUTS("made.png [output]") is True
    assert "There is no such file" in str(LoadImage.VALIDATE_INPUTS("made.png"))
    # ours takes paths, and looks in the folder next
    assert host.find_input(str(host.output_folder / "made.png")) == host.output_folder / "made.png"
    assert host.find_input("sub/b.png") == inputs / "sub" / "b.png"
    with using(LocalNodeHost()) as bare, pytest.raises(FileError, match="There is no such file"):
        bare.find_input("star.png")


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("host")
def test_channels_of_a_mask(inputs: Path) -> None:
    pixels = np.asarray(Image.open(inputs / "star.png"), dtype=np.float32) / 255
    (mask,) = LoadImageMask().load_image("star.png", "alpha")
    assert np.allclose(mask[0], 1 - pixels[..., 3])
    for number, name in enumerate(("red", "green", "blue")):
        (mask,) = LoadImageMask().load_image("star.png", name)
        assert mask.shape == (1, 4, 6)
        assert np.allclose(mask[0], pixels[..., number])
    (mask,) = LoadImageMask().load_image("sub/b.png", "alpha")
    assert float(mask.abs().max()) == 0


def test_an_empty_image_has_one_colour() -> None:
    (images,) = EmptyImage().generate(4, 2, 3, 0x336699)
    assert images.shape == (3, 2, 4, 3)
    torch.testing.assert_close(images[2, 1, 3], torch.tensor([0x33, 0x66, 0x99]) / 255)


@pytest.mark.parametrize("method", ImageScale.INPUT_TYPES()["required"]["upscale_method"][0])
def test_pictures_are_scaled(method: str) -> None:
    images = torch.rand(2, 6, 10, 3, generator=torch.Generator().manual_seed(0))
    scale = ImageScale().upscale
    (same,) = scale(images, method, 10, 6, "disabled")
    torch.testing.assert_close(same, images, rtol=0, atol=0.5 / 255 + 1e-6)  # Lanczos goes through 8 bits
    (plain,) = scale(torch.full((1, 6, 10, 3), 0.6), method, 7, 11, "center")
    assert plain.shape == (1, 11, 7, 3)
    torch.testing.assert_close(plain, torch.full_like(plain, 0.6), rtol=0, atol=1e-5)
    (cut,) = scale(images, method, 6, 6, "center")  # only cut, not scaled
    torch.testing.assert_close(cut, images[:, :, 2:8], rtol=0, atol=0.5 / 255 + 1e-6)
    assert [scale(images, method, *size, "disabled")[0].shape[1:3] for size in ((20, 0), (0, 3), (0, 0))] == [
        (12, 20),
        (3, 5),
        (6, 10),
    ]
