"""Bad input of every kind: one clear message, no traceback, the right exit status, and no half-written file."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vidgen.headless.cli import main
from vidgen.headless.render import shipped
from vidgen.vidgen_core.media import read_video

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 200
NOT_ROOT = os.name == "posix" and os.geteuid() != 0


def generate(bundle: Path, out: Path, *options: str, prompt: str = "a red star") -> list[str]:
    return ["generate", prompt, "--model", str(bundle), "-o", str(out), *options]


def refused(capsys: pytest.CaptureFixture[str], command: list[str], *words: str) -> str:
    """Run a command that must fail with one clear message; what it said."""
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.startswith("vidgen: ")
    for word in words:
        assert word in said.err, said.err
    return said.err


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--frames 0", ["number of frames", "0 frames", "use 1 frame."]),
        ("--frames -4", ["number of frames", "-4 frames"]),
        ("--frames 18", ["number of frames", "18 frames", "4 n + 1", "use 17 frames"]),
        ("--size -64x64", ["width", "-64 px", "positive multiple of 16"]),
        ("--size 64x0", ["height", "0 px"]),
        ("--size 65x64", ["width", "65 px", "use 64 px"]),
        ("--size huge", ["size", "WIDTHxHEIGHT"]),
        ("--steps 0", ["steps"]),
        ("--steps -3", ["steps"]),
        ("--sampler magic", ["sampler", "magic", "euler"]),
        ("--schedule magic", ["schedule", "magic", "simple"]),
        ("--shift 0", ["shift"]),
        ("--cfg nan", ["cfg"]),
        ("--seed -1", ["seed"]),
        ("--image no.png", ["no such file", "no.png"]),
        ("--video no.mp4", ["no such file", "no.mp4"]),
        ("--denoise 0.5", ["nothing to change", "--video FILE"]),
        ("--fps 0", ["fps"]),
        ("--fps nan", ["fps"]),
        ("--crf 99", ["crf"]),
        ("--device tpu", ["device"]),
    ],
)
def test_settings_that_cannot_be(
    options: str, words: list[str], tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # argparse takes "-64x64" for an option unless it is tied to its own
    flag, value = options.split()
    refused(capsys, generate(tiny_bundle_dir, tmp_path / "a.mp4", f"{flag}={value}"), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "vidgen-mask.png", "--video", "vidgen-circle.mp4"], ["from an image or from a video"]),
        (["--image", "vidgen-circle.mp4"], ["image cannot be read", "PNG, JPEG"]),
        (["--image", "vidgen-mask.png", "--frames", "1"], ["too short", "5 frames or more"]),
        (["--video", "vidgen-circle.mp4", "--denoise", "0"], ["denoising strength"]),
        (["--video", "vidgen-circle.mp4", "--denoise", "1.2"], ["denoising strength"]),
        (["--video", "vidgen-circle.mp4", "--size", "30x32"], ["width", "30 px"]),
    ],
)
def test_images_and_videos_that_cannot_be(
    options: list[str], words: list[str], tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, generate(tiny_bundle_dir, tmp_path / "a.mp4", *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_image_for_a_network_that_knows_text_alone(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said from the header, before any weights are read."""
    from dataclasses import replace

    from vidgen.training.export import export_network
    from vidgen.vidgen_core.model import load_network

    folder = tmp_path / "text-alone"
    shutil.copytree(tiny_bundle_dir, folder)
    model = load_network(folder / "network.safetensors")
    config = replace(model.config, accepts_first_frame=False)
    export_network(folder / "network.safetensors", model.network, config, model.defaults)
    refused(
        capsys,
        generate(folder, tmp_path / "a.mp4", "--image", "vidgen-mask.png"),
        "text alone",
        "image-to-video checkpoint",
        "token_replace",
    )


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(
    prompt: str, tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, generate(tiny_bundle_dir, tmp_path / "a.mp4", prompt=prompt), "prompt is empty")
    refused(capsys, render(tmp_path, tiny_bundle_dir, f"2.prompt={prompt}"), "prompt is empty")


def test_a_bad_command_line_is_told_by_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["paint"], ["generate"], ["generate", "x", "--frames", "many"], ["render"]):
        with pytest.raises(SystemExit) as done:
            main(command)
        assert done.value.code == 2
        assert "usage: vidgen" in capsys.readouterr().err


# --- workflows --------------------------------------------------------------------------------------------------------


def render(folder: Path, bundle: Path, *settings: str) -> list[str]:
    """Render the shipped workflow on the random model with ``settings``."""
    (folder / "w.json").write_text(json.dumps(shipped("hunyuan_t2v")))
    words = [f"1.model_folder={bundle}", "4.width=32", "4.height=32", "4.num_frames=5", "5.steps=1", *settings]
    sets = [word for setting in words for word in ("--set", setting)]
    return ["render", str(folder / "w.json"), "-o", str(folder / "a.mp4"), *sets]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("4.num_frames=0", ["Node 4", "num_frames", "below the minimum of 1"]),
        ("4.num_frames=18", ["Node 4", "18 frames", "use 17 frames"]),
        ("4.width=-64", ["Node 4", "width", "below the minimum"]),
        ("4.width=24", ["width", "multiples of 16"]),
        ("5.seed=many", ["Node 5", "seed", "cannot be read as INT"]),
        ("5.sampler=magic", ["Node 5", "sampler", "magic"]),
        ('5.latent=["99", 0]', ["Node 5", "latent", "does not exist"]),
        ("1.model_folder=nowhere", ["Node 1", "nowhere"]),
    ],
)
def test_a_workflow_that_cannot_run(
    setting: str, words: list[str], tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, render(tmp_path, tiny_bundle_dir, setting), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["w.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b"[1]", ["not a workflow in API format"]),
        (b"{}", ["no output node"]),
        (b'{"1": 2}', ["not a workflow in API format"]),
        (b'{"nodes": [], "links": []}', ["no output node"]),
        (b'{"nodes": [{"id": 1}], "links": []}', ["The workflow is damaged", "type"]),
        (b'{"1": {"class_type": "Unknown", "inputs": {}}}', ["Unknown", "not known"]),
        (PNG, ["not a text file"]),
        (bytes(range(256)), ["not a text file"]),
    ],
)
def test_a_file_that_is_no_workflow(
    content: bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.json").write_bytes(content)
    refused(capsys, ["render", str(tmp_path / "w.json"), "-o", str(tmp_path / "a.mp4")], *words)
    assert not (tmp_path / "a.mp4").exists()


def test_files_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["render", str(tmp_path / "w.json")], "w.json", "check the path")
    refused(capsys, ["render", str(tmp_path)], str(tmp_path))
    refused(capsys, ["render", str(tmp_path / "v.mp4")], "v.mp4")
    refused(capsys, ["inspect", str(tmp_path / "c.safetensors")], "c.safetensors", "does not exist")
    refused(capsys, ["inspect", str(tmp_path)], "folder")
    refused(capsys, generate(tmp_path / "nothing", tmp_path / "a.mp4"), "nothing")
    refused(capsys, generate(tmp_path, tmp_path / "a.mp4"), "no checkpoint in this folder")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def longer(data: bytes) -> bytes:
    return data + b"\0" * 100


@pytest.mark.parametrize("part", ["network", "vae", "text"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: b"just a text file\n" * 20, "not a checkpoint"),
        (lambda data: PNG, "PNG"),
        (lambda data: bytes((7 * n * n + 13 * n) % 251 for n in range(4000)), "safetensors"),
        (lambda data: b"", "empty"),
        (lambda data: b"PK\x03\x04" + data, "zip archive"),
        (cut, "cut short"),
        (longer, "damaged"),
    ],
    ids=["text", "png", "random", "empty", "zip", "cut", "longer"],
)
def test_a_file_that_is_no_checkpoint(
    part: str,
    damage: Callable[[bytes], bytes],
    word: str,
    tiny_bundle_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_dir, bundle)
    file = bundle / f"{part}.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused(capsys, generate(bundle, tmp_path / "a.mp4"), word, str(file))
    refused(capsys, ["inspect", str(file)], word)
    assert not (tmp_path / "a.mp4").exists()


def test_a_bundle_without_a_part(tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle_dir, bundle)
    (bundle / "vae.safetensors").unlink()
    refused(capsys, generate(bundle, tmp_path / "a.mp4"), "VAE")


# --- where the video goes ---------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before any weights are read."""
    refused(capsys, generate(tiny_bundle_dir, tmp_path / "no" / "a.mp4"), "does not exist", "mkdir")
    refused(capsys, generate(tiny_bundle_dir, tmp_path / "a.avi"), "format is not known", ".mp4")
    refused(capsys, generate(tiny_bundle_dir, tmp_path), "format is not known")
    (tmp_path / "file").write_text("x")
    refused(capsys, generate(tiny_bundle_dir, tmp_path / "file" / "a.mp4"), "does not exist")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_write_permission(tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """root may write everywhere but to the kernel's own file systems."""
    if NOT_ROOT:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    elif Path("/sys/kernel").is_dir():
        folder = Path("/sys/kernel")
    else:
        pytest.skip("needs a user without root's rights")
    refused(capsys, generate(tiny_bundle_dir, folder / "a.mp4"), "may not be written", str(folder))


def test_the_disk_is_full(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """A limit on the size of files, in a process of its own, stands for the full disk. The old video survives."""
    if os.name != "posix":
        pytest.skip("needs a POSIX system")
    out = tmp_path / "a.mp4"
    out.write_bytes(b"the old video")
    code = (
        "import resource, sys\nfrom vidgen.headless.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *generate(tiny_bundle_dir, out, "-q", "--crf=0")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_bytes() == b"the old video"
    assert "the same command goes on" in done.stderr
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".unfinished"}


# --- ctrl-C -----------------------------------------------------------------------------------------------------------


class Interrupter(io.StringIO):
    """A terminal that presses ctrl-C, by a real signal, when a text appears on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.text and self.text in text:
            self.text = ""
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


MOMENTS = {
    "before the first step": "0/4",
    "after the first step": "1/4",
    "in the middle": "2/4",
    "after the last step": "4/4",
    "while decoding": "decoding",
    "while saving": "saving",
}


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment(
    moment: str, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """130, a clear message, no half-written file; the same command goes on and ends in the very same video."""
    command = generate(tiny_bundle_dir, tmp_path / "a.mp4", "--steps=4", "--sampler=dpmpp_2m_sde")
    terminal = Interrupter(MOMENTS[moment])
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("vidgen.headless.progress._EVERY_S", 0.0)
    before = signal.getsignal(signal.SIGINT)
    assert main(command) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "vidgen: stopped" in terminal.getvalue()
    left = {path.suffix for path in tmp_path.iterdir()}
    assert left <= {".unfinished"}
    if moment != "before the first step":
        assert left == {".unfinished"}
        assert "the same command goes on" in terminal.getvalue()

    again = Interrupter("")
    monkeypatch.setattr(sys, "stderr", again)
    assert main(command) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    if moment == "in the middle":
        assert "0/4" not in again.getvalue()
        assert "3/4" in again.getvalue()
    whole = tmp_path / "whole.mp4"
    assert main([word.replace("a.mp4", "whole.mp4") for word in command]) == 0
    assert whole.read_bytes() == (tmp_path / "a.mp4").read_bytes()


def test_another_command_does_not_take_up_the_run(
    tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.name != "posix":
        pytest.skip("needs a POSIX system")
    monkeypatch.setattr(sys, "stderr", Interrupter("2/4"))
    monkeypatch.setattr("vidgen.headless.progress._EVERY_S", 0.0)
    assert main(generate(tiny_bundle_dir, tmp_path / "a.mp4", "--steps=4")) == 130
    assert main(generate(tiny_bundle_dir, tmp_path / "a.mp4", "--steps=4", "--seed=8", "-q")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert len(read_video(tmp_path / "a.mp4")[0]) == 9


@pytest.mark.parametrize("delay_s", [0.2, 2.0])
def test_ctrl_c_from_outside(delay_s: float, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """A process of its own, at moments that nobody chose: while it starts, or while it works."""
    if os.name != "posix":
        pytest.skip("needs a POSIX system")
    words = generate(tiny_bundle_dir, tmp_path / "a.mp4", "--steps=1000", "-q")
    command = [sys.executable, "-c", "import sys; from vidgen.headless.cli import main; print('!', flush=True); "]
    command[-1] += "sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == "!"
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "vidgen: stopped" in said
    assert {path.suffix for path in tmp_path.iterdir()} <= {".unfinished"}
