"""The `vidgen` command from the outside: what it writes, what it says, and its exit status."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vidgen
from vidgen.headless.cli import _parser, generate_prompt, main, model_folders, parse_size
from vidgen.headless.progress import ProgressBar, clock_time
from vidgen.headless.render import load_prompt, override, shipped
from vidgen.headless.report import memory_bytes, quantity, size_text
from vidgen.vidgen_core.errors import FileError, SettingsError
from vidgen.vidgen_core.media import read_metadata, read_video
from vidgen.vidgen_core.memory.host import bundled_models

NODES: dict[str, type] = vidgen.NODE_CLASS_MAPPINGS


def generate(tiny_bundle_dir: Path, out: Path, *options: str, prompt: str = "a red star") -> int:
    return main(["generate", prompt, "--model", str(tiny_bundle_dir), "-o", str(out), *options])


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys\nfrom vidgen.headless.cli import main\n"
        "for words in (['--help'], ['--version'], ['generate', '--help'], ['render', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"vidgen {vidgen.__version__}" in done.stdout
    for command in ("generate", "render", "inspect", "doctor", "train"):
        assert command in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(vidgen.__file__).resolve().parent / "pyproject.toml").read_text("utf-8")
    assert f'version = "{vidgen.__version__}"' in text


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_takes_what_the_checkpoint_recommends(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.mp4"
    assert generate(tiny_bundle_dir, out) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"  # nothing but the result: made for pipes
    assert "sampling" in said.err
    assert "3/3" in said.err
    frames, fps = read_video(out)
    assert frames.shape == (9, 32, 32, 3)
    assert fps == 8
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_generate_hands_every_option_on(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    options = "--seed 7 --frames 5 --size 48x32 --fps 12.5 --steps 2 --cfg 1.5 --guidance 3 --shift 2 --crf 5"
    options += " --sampler heun --schedule karras --negative fog --device cpu -q"
    assert generate(tiny_bundle_dir, out, *options.split()) == 0
    frames, fps = read_video(out)
    assert frames.shape == (5, 32, 48, 3)
    assert fps == 12.5
    prompt = json.loads(read_metadata(out)["prompt"])
    sampler = {name: value for name, value in prompt["5"]["inputs"].items() if not isinstance(value, list)}
    assert sampler == {
        "seed": 7,
        "steps": 2,
        "cfg": 1.5,
        "guidance": 3.0,
        "shift": 2.0,
        "sampler": "heun",
        "schedule": "karras",
        "denoise": 1.0,
        "cfg_schedule": "auto",
        "cfg_start": 1.0,
        "cfg_end": 0.0,
        "cfg_rescale": 0.0,
        "cfg_batched": True,
    }
    assert prompt["2"]["inputs"]["prompt"] == "a red star"
    assert prompt["3"]["inputs"]["prompt"] == "fog"
    assert prompt["7"]["inputs"] | {"images": 0} == {
        "images": 0,
        "fps": 12.5,
        "filename_prefix": "video/VidGen",
        "format": "mp4",
        "codec": "auto",
        "bit_depth": "auto",
        "crf": 5,
    }


def test_storage_and_budget_reach_the_loader(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    assert generate(tiny_bundle_dir, out, "--storage", "float8 per row", "--budget", "64GB", "--steps", "1", "-q") == 0
    loader = json.loads(read_metadata(out)["prompt"])["1"]["inputs"]
    assert (loader["storage"], loader["budget_gb"]) == ("float8 per row", 64.0)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--storage", "nf3", "no such way to store"),
        ("--budget", "much", "amount of memory"),
        ("--budget", "1MB", "does not fit into this much memory"),
    ],
)
def test_a_budget_or_storage_that_cannot_be_used(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    assert generate(tiny_bundle_dir, tmp_path / "a.mp4", option, value, "-q") == 1
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_file_other_seed_other_file(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert generate(tiny_bundle_dir, tmp_path / f"{name}.mp4", "--seed", seed, "-q") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    first, other = (read_video(tmp_path / f"{name}.mp4")[0] for name in ("a", "c"))
    assert (first != other).any()


def test_generate_decodes_exactly_into_the_file(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, one_piece = tmp_path / "a.mp4", tmp_path / "b.mp4"
    options = ["--frames", "9", "--size", "32x48", "--steps", "1", "--crf", "0", "-q"]
    exact = ["--decode", "exact_disk", "--decode-memory", "0.1", "--scratch", str(tmp_path)]
    assert generate(tiny_bundle_dir, out, *options, *exact) == 0
    assert generate(tiny_bundle_dir, one_piece, *options) == 0
    ours, theirs = read_video(out)[0], read_video(one_piece)[0]
    assert ours.shape == (9, 48, 32, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # a value that lies between two levels may go to either
    inputs = json.loads(read_metadata(out)["prompt"])["7"]["inputs"]
    assert (inputs["method"], inputs["memory_gb"]) == ("exact_disk", 0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
    capsys.readouterr()
    for bad, words in (
        (["--decode", "exact", "--decode-memory", "0.0001"], "at least"),
        (["--decode-memory", "1"], "Tiles have no bound"),
        (["--decode", "exact_disk", "--scratch", str(tmp_path / "missing")], "does not exist"),
    ):
        assert generate(tiny_bundle_dir, out, *options, *bad) == 1
        assert words in capsys.readouterr().err


def test_a_single_frame_takes_the_template_for_images(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.webp"
    assert generate(tiny_bundle_dir, out, "--frames", "1", "-q") == 0
    assert out.read_bytes()[8:12] == b"WEBP"


def test_unknown_words_do_no_harm(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    assert generate(tiny_bundle_dir, tmp_path / "a.mp4", "-q", prompt="a zxqy 漢 \U0001f980 star") == 0


EXAMPLES = Path(vidgen.__file__).resolve().parent / "workflows" / "inputs"


def test_an_image_is_the_first_frame(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """The shipped workflow with the settings of the command line; another image, another video."""
    out, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    image = str(EXAMPLES / "vidgen-first-frame.png")
    options = ("-q", "--frames", "5", "--steps", "1", "--shift", "2")
    assert generate(tiny_bundle_dir, out, "--image", image, *options) == 0
    assert generate(tiny_bundle_dir, other, "--image", str(EXAMPLES / "vidgen-mask.png"), *options) == 0
    frames, fps = read_video(out)
    assert (frames.shape, fps) == ((5, 32, 32, 3), 8)
    assert (frames != read_video(other)[0]).any()
    prompt = json.loads(read_metadata(out)["prompt"])
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert inputs["VidGenLoadImage"]["image"] == image
    assert inputs["VidGenImageToVideo"]["method"] == "auto"
    assert inputs["VidGenSampler"]["shift"] == 2


def test_a_folder_with_two_networks_gives_the_one_that_is_needed(tmp_path: Path) -> None:
    """A picture goes on with the network for pictures, under the name that it has on every machine."""
    name = "vidgen-tiny-cogvideox"
    image, words = ["--image", "vidgen-first-frame.png"], ["generate", "a red star", "-o", str(tmp_path / "a.mp4")]
    own = bundled_models()[name]
    for model, options, expected in (
        (name, [], name),
        (name, image, f"{name}/network_i2v.safetensors"),
        (f"{name}/network_i2v.safetensors", image, f"{name}/network_i2v.safetensors"),
        (str(own), image, str(own / "network_i2v.safetensors")),
    ):
        prompt = generate_prompt(_parser().parse_args([*words, "--model", model, *options]), NODES)
        loader = next(node for node in prompt.values() if node["class_type"] == "VidGenLoadAll")
        assert loader["inputs"]["model_folder"] == expected
    assert main([*words, "--model", name, *image, "-q", "--steps", "1", "--frames", "9", "--size", "32x32"]) == 0
    assert read_video(tmp_path / "a.mp4")[0].shape == (9, 32, 32, 3)


def test_a_video_is_changed(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """As far as denoise says, at its own frame rate and the size of the result."""
    options = ("-q", "--video", str(EXAMPLES / "vidgen-circle.mp4"), "--frames", "5", "--steps", "2", "--size", "32x48")
    distances = []
    for denoise in ("0.05", "1"):
        out = tmp_path / f"{denoise}.mp4"
        assert generate(tiny_bundle_dir, out, *options, "--denoise", denoise) == 0
        frames, fps = read_video(out)
        assert (frames.shape, fps) == ((5, 48, 32, 3), 8)
        distances.append(frames)
    assert (distances[0] != distances[1]).any()
    assert generate(tiny_bundle_dir, tmp_path / "a.mp4", *options, "--fps", "12") == 0
    assert read_video(tmp_path / "a.mp4")[1] == 12
    prompt = json.loads(read_metadata(tmp_path / "a.mp4")["prompt"])
    assert {node["class_type"]: node["inputs"] for node in prompt.values()}["VidGenSampler"]["denoise"] == 0.6


# --- render -----------------------------------------------------------------------------------------------------------


def test_a_video_is_rendered_again_from_itself(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    first, again, other = (tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert generate(tiny_bundle_dir, first, "-q") == 0
    assert main(["render", str(first), "-q", "-o", str(again)]) == 0
    assert main(["render", str(first), "-q", "-o", str(other), "--set", "Sampler.seed=9"]) == 0
    assert again.read_bytes() == first.read_bytes()
    assert (read_video(other)[0] != read_video(first)[0]).any()


def test_videos_go_to_a_folder(tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny_bundle_dir, tmp_path / "a.mp4", "-q") == 0
    folder = tmp_path / "out"
    folder.mkdir()
    capsys.readouterr()
    for _ in range(2):
        assert main(["render", str(tmp_path / "a.mp4"), "-q", "-o", str(folder)]) == 0
    names = [str(folder / "video" / f"VidGen_0000{number}.mp4") for number in (1, 2)]
    assert capsys.readouterr().out.split() == names
    assert all(Path(name).is_file() for name in names)


def test_several_outputs_get_names_of_their_own(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    prompt = override(
        shipped("hunyuan_t2v"), NODES, [f"1.model_folder={tiny_bundle_dir}", "4.num_frames=5", "5.steps=1"]
    )
    prompt["8"] = {**prompt["7"], "inputs": prompt["7"]["inputs"] | {"fps": 4.0}}
    (tmp_path / "two.json").write_text(json.dumps(prompt))
    assert main(["render", str(tmp_path / "two.json"), "-q", "-o", str(tmp_path / "a.mp4")]) == 0
    assert read_video(tmp_path / "a.mp4")[1] == 8
    assert read_video(tmp_path / "a_2.mp4")[1] == 4


@pytest.mark.parametrize(
    ("setting", "node_id", "name", "value"),
    [
        ("5.seed=7", "5", "seed", 7),
        ("Sampler.seed=7", "5", "seed", 7),
        ("VidGenSampler.cfg=1.5", "5", "cfg", 1.5),
        ("Prompt.prompt=a = b", "2", "prompt", "a = b"),
        ("2.prompt=12", "2", "prompt", "12"),
        ('2.prompt="x"', "2", "prompt", '"x"'),
        ("5.sampler=heun", "5", "sampler", "heun"),
        ('5.latent=["4", 0]', "5", "latent", ["4", 0]),
        ("5.seed=many", "5", "seed", "many"),  # told by the check of the whole workflow
    ],
)
def test_set(setting: str, node_id: str, name: str, value: Any) -> None:
    before = shipped("hunyuan_t2v")
    changed = override(before, NODES, [setting])
    assert changed[node_id]["inputs"][name] == value
    changed[node_id]["inputs"][name] = before[node_id]["inputs"][name]
    assert changed == before == shipped("hunyuan_t2v")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=7", "NODE.INPUT=VALUE"),
        ("5.seed", "NODE.INPUT=VALUE"),
        (".seed=1", "NODE.INPUT=VALUE"),
        ("99.seed=7", "no such node"),
        ("VidGenEncodePrompt.prompt=x", "Several nodes"),
        ("5.sead=7", "did you mean seed"),
    ],
)
def test_a_set_that_cannot_be(setting: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        override(shipped("hunyuan_t2v"), NODES, [setting])


def test_load_prompt_reads_json_and_videos(tmp_path: Path, tiny_bundle_dir: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(shipped("hunyuan_t2v")))
    assert load_prompt(tmp_path / "a.json", {}) == shipped("hunyuan_t2v")


def test_a_workflow_runs_from_python(tmp_path: Path, tiny_bundle_dir: Path) -> None:
    values = {"VidGenLoadAll.model_folder": str(tiny_bundle_dir), "Prompt.prompt": "a red star"}
    sizes = {"width": 32, "height": 32, "num_frames": 5, "steps": 2, "seed": 3}
    saved = vidgen.render("hunyuan_t2v", output=tmp_path / "a.mp4", **sizes, **values)
    assert saved == [tmp_path / "a.mp4"]
    prompt = load_prompt(saved[0], NODES)
    assert any(node["inputs"].get("prompt") == "a red star" for node in prompt.values())
    again = vidgen.render(prompt, output=tmp_path / "b.mp4", seed=4)
    assert load_prompt(again[0], NODES) != prompt
    for wrong, words in (({"prompt": "x"}, "Several nodes"), ({"sead": 1}, "No node"), ({"Sampler.sead": 1}, "seed")):
        with pytest.raises(SettingsError, match=words):
            vidgen.render("hunyuan_t2v", **wrong)
    with pytest.raises(FileError, match="cannot be read"):
        vidgen.render("hunyuan_nothing")


# --- inspect, doctor, train -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "title"), [("network", "diffusion network"), ("vae", "VAE"), ("text", "text encoders")]
)
def test_inspect_a_checkpoint(tiny_bundle_dir: Path, name: str, title: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle_dir / f"{name}.safetensors")]) == 0
    said = capsys.readouterr().out
    assert f"HunyuanVideo {title}" in said
    assert "parameters in" in said
    assert main(["inspect", "--json", str(tiny_bundle_dir / f"{name}.safetensors")]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["kind"] == "checkpoint"
    assert info["family"] == "hunyuan"


def test_inspect_a_video(tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.mp4"
    assert generate(tiny_bundle_dir, out, "-q", prompt="a blue circle") == 0
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "9 frames of 32 x 32 px, 8 per second" in said
    assert "Prompt: a blue circle" in said


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    info = json.loads(capsys.readouterr().out)
    assert status == (1 if info["problems"] else 0)
    assert info["cores"] >= 1
    assert info["libraries"]["torch"]
    assert info["ffmpeg"]["version"]
    assert info["devices"][0]["name"] == "cpu"
    # 12.8 billion is what the HunyuanVideo report says of its network (rounded there to "13B")
    assert info["published"]["hunyuan"]["num_parameters"] == pytest.approx(12.8e9, rel=0.01)
    assert main(["doctor"]) == status
    assert "What it can do" in capsys.readouterr().out


def test_train_has_a_command_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["train", "--help"])
    assert done.value.code == 0
    assert "recipe" in capsys.readouterr().out.lower()


# --- small parts ------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_tells_the_time_left() -> None:
    clock, terminal = Clock(), Terminal()
    bar = ProgressBar(terminal, clock=clock)
    bar("sample", 0, 10)
    for step in range(1, 5):
        clock.now += 30
        bar("sample", step, 10)
    assert terminal.getvalue().endswith("sampling: [#########...............] 4/10, 3:00 left")
    bar("decode", 0, 1)
    assert "\n" in terminal.getvalue()
    bar.close()
    assert terminal.getvalue().endswith("\n")


def test_a_resumed_bar_counts_from_where_it_stands() -> None:
    clock, terminal = Clock(), Terminal()
    bar = ProgressBar(terminal, clock=clock)
    bar("sample", 90, 100)
    clock.now += 60
    bar("sample", 95, 100)
    assert terminal.getvalue().endswith("95/100, 1:00 left")


def test_without_a_terminal_lines_are_few() -> None:
    clock, stream = Clock(), io.StringIO()
    bar = ProgressBar(stream, clock=clock)
    for step in range(101):
        bar("sample", step, 100)
        clock.now += 0.25
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # after 10 s, 20 s, and at the end
    assert lines[-1].endswith("100/100, 25 s")
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.4, "9.4 s"), (9.6, "10 s"), (59, "59 s"), (61, "1:01"), (3725, "1:02:05")]
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def test_parse_size() -> None:
    assert parse_size("64x48") == parse_size("64*48") == parse_size(" 64 X 48 ") == (64, 48)
    for text in ("64", "x", "axb", "64x", "1x2x3"):
        with pytest.raises(SettingsError):
            parse_size(text)


def test_model_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("VIDGEN_MODELS", os.pathsep.join(["b", "", "c"]))
    assert model_folders([Path("a")]) == [Path("a"), Path("b"), Path("c")]


def test_numbers_for_people() -> None:
    assert [quantity(n) for n in (950, 3100, 12.8e9)] == ["950", "3.1 thousand", "12.8 billion"]
    assert [size_text(n) for n in (950, 3100, 2.61e10)] == ["950 bytes", "3.1 kB", "26.1 GB"]
    total, free = memory_bytes()
    assert total is None or total > 2**28
    assert free is None or total is None or 0 < free <= total
