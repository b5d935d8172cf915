"""Every shipped workflow runs, its two formats say the same, and a video restores the graph that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.executor import check, input_specs
from vidgen.headless.graph import has_seed_control, is_widget, to_ui
from vidgen.headless.render import about, shipped
from vidgen.nodes.host import LocalNodeHost
from vidgen.training.data import detect, shapes
from vidgen.training.lora import Adapters, LoraSettings, write_loras
from vidgen.vidgen_core.embeddings import Embeddings, save_embeddings
from vidgen.vidgen_core.media import read_metadata, read_sound, read_video
from vidgen.vidgen_core.memory.host import bundled_models
from vidgen.vidgen_core.model import load_network, load_text

NODES: dict[str, type] = vidgen.NODE_CLASS_MAPPINGS
WORKFLOWS = Path(vidgen.__file__).resolve().parent / "workflows"
NAMES = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
BUNDLED = "vidgen-tiny-hunyuan"


def restore(ui: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ComfyUI's frontend makes of a UI-format workflow when it is queued: widgets by place, links by number."""
    links = {link[0]: link for link in ui["links"]}
    prompt = {}
    for node in ui["nodes"]:
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, kind, options, _ in input_specs(NODES[node["type"]]):
            if is_widget(kind, options):
                inputs[name] = next(values)
                if has_seed_control(name, kind, options):
                    assert next(values) == "fixed"
        for socket in node["inputs"]:
            if socket["link"] is not None:
                _, source, output, target, slot, _ = links[socket["link"]]
                assert target == node["id"]
                assert node["inputs"][slot] is socket
                inputs[socket["name"]] = [str(source), output]
        assert next(values, None) is None
        title = {"_meta": {"title": node["title"]}} if "title" in node else {}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs} | title
    return prompt


SMALL: dict[str, dict[str, Any]] = {
    "VidGenLoadAll": {"model_folder": "."},
    "VidGenLoadModel": {"model_name": "network.safetensors"},
    "VidGenLoadVAE": {"vae_name": "vae.safetensors"},
    "VidGenLoadTextEncoders": {"text_name": "text.safetensors"},
    "VidGenApplyLora": {"lora_name": "lora.safetensors"},
    "VidGenLoadEmbeddings": {"embeddings_name": "prompt.safetensors"},
    "VidGenSampler": {"steps": 2},
    "VidGenEmptyLatent": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenImageToVideo": {"width": 32, "height": 32, "num_frames": 5, "size": "exact"},
    "VidGenKeyframesToVideo": {"width": 32, "height": 32, "num_frames": 5, "size": "exact"},
    "VidGenLoadVideo": {"max_frames": 5},
    "VidGenFitImages": {"width": 32, "height": 32},
    "VidGenPadVideo": {"overlap": 0},
    "VidGenCalibrateCache": {"steps": 2},
}
"""What makes a shipped workflow run on the random model in a blink, by node; a text of :data:`FILES` is a stand-in."""
FILES = ("model_folder", "model_name", "vae_name", "text_name", "lora_name", "embeddings_name")

COGVIDEOX = {"num_frames": 9, "max_frames": 9}
"""its VAE takes two latent frames at a time, behind the first one"""
PUBLISHED = {"hunyuan_i2v_v1": {"num_frames": 9}} | {
    f"cogvideox_{name}": COGVIDEOX
    for name in ("2b_t2v", "5b_t2v", "5b_i2v", "1_5_t2v", "1_5_i2v", "fun_interpolation", "v2v", "lora")
}
"""workflows for files that are not in the box, and what is larger for them: v1 hides its first four frames"""
TINY = {"cogvideox_tiny_t2v": COGVIDEOX, "cogvideox_tiny_i2v": COGVIDEOX}
"""workflows for the bundled CogVideoX, and what is larger for them"""
OWN_FILES = PUBLISHED | TINY
"""workflows that keep their files, and find stand-ins under these names"""
WITHOUT_VIDEO = {"hunyuan_save_embeddings"}
RENDERED = [name for name in NAMES if name not in WITHOUT_VIDEO]
BUNDLED_ONLY = [name for name in RENDERED if name not in PUBLISHED]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path) -> Path:
    """The random model with an encoded prompt and a LoRA for it."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for path in tiny_bundle_dir.iterdir():
        (folder / path.name).symlink_to(path)
    model, text = load_network(folder / "network.safetensors"), load_text(folder / "text.safetensors")
    features = text.encode(["a red star"])
    save_embeddings(
        folder / "prompt.safetensors", Embeddings(features=features, text_config=text.config, prompt="a red star")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapters = Adapters(model.network, LoraSettings(rank=2), model.family.lora_targets, torch.Generator())
        for parameter in adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    (written,) = write_loras(folder, adapters, LoraSettings(rank=2, dialects=("musubi",)), model)
    written.rename(folder / "lora.safetensors")
    return folder


def small(name: str, stand_ins: Path | None) -> dict[tuple[str, str], Any]:
    """(node, input) -> the value that makes a workflow small; without stand-ins it keeps its own files."""
    changes = {}
    for node_id, node in shipped(name).items():
        for key, value in SMALL.get(node["class_type"], {}).items():
            if key not in FILES:
                changes[node_id, key] = OWN_FILES.get(name, {}).get(key, value)
            elif stand_ins is not None:
                changes[node_id, key] = str(stand_ins / value)
    return changes


def as_settings(changes: Mapping[tuple[str, str], Any]) -> list[str]:
    return [word for (node, key), value in changes.items() for word in ("--set", f"{node}.{key}={value}")]


SIZES = {"hunyuan_inpaint": (64, 64), "hunyuan_outpaint": (32, 48)}
"""(height, width) that a workflow then has, where it is not (32, 32)"""


LENGTHS = {"hunyuan_riflex": 33, "hunyuan_windows": 49}
"""frames that a workflow makes as it is shipped, where it is not the 17 that the network has learned"""


def test_there_are_workflows() -> None:
    tasks = [
        "t2v",
        "i2v",
        "i2v_v1",
        "v2v",
        "v2v_sound",
        "inpaint",
        "outpaint",
        "low_memory",
        "lora_stack",
        "compile",
        "exact_decode",
    ]
    tasks += ["save_embeddings", "load_embeddings", "keyframes"]
    tasks += ["step_cache", "magcache", "skip_layers", "stg", "cfg_zero_star", "enhance_a_video", "riflex", "windows"]
    assert {f"hunyuan_{task}" for task in tasks} | OWN_FILES.keys() <= set(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_say_the_same(name: str) -> None:
    """The editor's file is drawn from the other one; after a change of a workflow or a node, draw it again."""
    assert json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")) == to_ui(shipped(name), NODES, about(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_sends_what_was_drawn(name: str) -> None:
    assert restore(to_ui(shipped(name), NODES)) == shipped(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_drawing_is_readable(name: str) -> None:
    """Nodes do not cover each other, and every link goes from left to right."""
    ui = to_ui(shipped(name), NODES, about(name))
    nodes = {node["id"]: node for node in ui["nodes"]}
    for link in ui["links"]:
        source, target = nodes[link[1]], nodes[link[3]]
        assert source["pos"][0] + source["size"][0] < target["pos"][0]
        assert source["order"] < target["order"]
        assert link[0] in source["outputs"][link[2]]["links"]
    for a in nodes.values():
        for b in nodes.values():
            apart = [
                a["pos"][i] + a["size"][i] < b["pos"][i] or b["pos"][i] + b["size"][i] < a["pos"][i] for i in (0, 1)
            ]
            assert a is b or any(apart)
    inside = 0
    for group in ui["groups"]:
        x, y, width, height = group["bounding"]
        assert group["title"]
        for node in ui["nodes"]:
            left, top = node["pos"]
            within = x <= left and y <= top and left + node["size"][0] <= x + width
            inside += within and top + node["size"][1] <= y + height
        for other in ui["groups"]:
            begin, end = other["bounding"][0], other["bounding"][0] + other["bounding"][2]
            assert other is group or begin >= x + width or end <= x
    assert inside == len(nodes) - 1  # each in one group, but for the note


@pytest.mark.parametrize("name", RENDERED)
def test_a_workflow_runs_and_comes_back_from_its_video(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The workflow in the mp4 is the one that ran; queued again it makes the same video."""
    out = tmp_path / "a.mp4"
    changes = small(name, None if name in OWN_FILES else request.getfixturevalue("stand_ins"))
    family = "cogvideox_models" if name.startswith("cogvideox") else "i2v_v1_models"
    models = ["--models", str(request.getfixturevalue(family))] if name in OWN_FILES else []
    file = str(WORKFLOWS / "api" / f"{name}.json")
    assert main(["render", file, "-o", str(out), *models, *as_settings(changes)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    num_frames = 9 if OWN_FILES.get(name) is COGVIDEOX else 5
    assert read_video(out)[0].shape == (num_frames, *SIZES.get(name, (32, 32)), 3)
    tags = read_metadata(out)
    prompt = json.loads(tags["prompt"])
    assert all(prompt[node]["inputs"][key] == value for (node, key), value in changes.items())
    assert restore(json.loads(tags["workflow"])) == prompt
    (tmp_path / "again.json").write_text(json.dumps(prompt))
    assert main(["render", str(tmp_path / "again.json"), "-q", "-o", str(tmp_path / "b.mp4"), *models]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == out.read_bytes()


def test_published_files_that_are_not_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything runs, all of them."""
    file = str(WORKFLOWS / "api" / "hunyuan_i2v_v1.json")
    assert main(["render", file, "-q", "-o", str(tmp_path / "a.mp4")]) == 1
    said = capsys.readouterr().err
    for name in ("hunyuan_video_image_to_video_720p_bf16", "hunyuan_video_vae_bf16", "llava_llama3_fp8_scaled"):
        assert name in said
    loaders = {node["class_type"]: node["inputs"] for node in shipped("hunyuan_i2v_v1").values()}
    page = (WORKFLOWS.parent / "web" / "docs" / "VidGenImageToVideo.md").read_text("utf-8")
    named = [value for inputs in loaders.values() for value in inputs.values() if str(value).endswith(".safetensors")]
    assert len(named) == 5
    assert all(name in page for name in named)


def test_numbers_and_links_survive_any_id() -> None:
    """Ids of nodes in subgraphs are no numbers; the editor's are."""
    prompt = {
        "7:1": {"class_type": "VidGenLoadVideo", "inputs": {"video": "a.mp4", "start_frame": 1, "max_frames": 2}},
        "2": {
            "class_type": "VidGenSaveVideo",
            "inputs": {
                **{"images": ["7:1", 0], "fps": ["7:1", 1], "filename_prefix": "a", "format": "gif", "crf": 3},
                **{"codec": "auto", "bit_depth": "auto"},
            },
        },
    }
    ui = to_ui(prompt, NODES)
    assert sorted(node["id"] for node in ui["nodes"]) == [1, 2]
    restored = restore(ui)
    assert restored["2"]["inputs"] == prompt["2"]["inputs"] | {"images": ["1", 0], "fps": ["1", 1]}
    assert restored["1"] == prompt["7:1"]


def needs_the_bundled_model(name: str = BUNDLED, files: int = 3) -> None:
    parts = [path.name for path in bundled_models().get(name, Path("missing")).glob("*.safetensors")]
    if len(parts) < files:
        pytest.skip("the bundled checkpoint is not complete")


MOTIONS = {"bounces": "bounce", "grows": "grow", "to the right": "right", "to the left": "left"}


def told(name: str) -> dict[str, str]:
    """What the prompt of a shipped workflow says of the object."""
    prompt = shipped("hunyuan_save_embeddings" if name == "hunyuan_load_embeddings" else name)
    (text,) = {node["inputs"].get("prompt", "") for node in prompt.values()} - {""}
    values = {word: ("colour", word) for word in shapes.COLOURS}
    values |= {word: ("shape", word) for word in shapes.SHAPES}
    values |= {word: ("motion", motion) for word, motion in MOTIONS.items()}
    found = dict(value for word, value in values.items() if word in text.partition(" on a ")[0])
    assert sorted(found) == ["colour", "motion", "shape"], text
    return found


@pytest.mark.parametrize("name", BUNDLED_ONLY)
def test_a_workflow_runs_as_it_is_shipped_and_shows_what_it_says(name: str, tmp_path: Path) -> None:
    needs_the_bundled_model(*(("vidgen-tiny-cogvideox", 4) if name in TINY else ()))
    out = tmp_path / "a.mp4"
    few = ["--set", "VidGenCalibrateCache.steps=4"] if name == "hunyuan_magcache" else []
    assert main(["render", str(WORKFLOWS / "api" / f"{name}.json"), "-o", str(out), "-q", *few]) == 0
    frames, fps = read_video(out)
    assert len(frames) == LENGTHS.get(name, 17)
    assert fps == 8
    seen = detect.detect(np.moveaxis(np.asarray(frames), -1, 0))
    for attribute, value in told(name).items():
        # What moves in a long video begins anew in every window.
        assert seen[attribute] == value or (name, attribute) == ("hunyuan_windows", "motion"), attribute
    if name == "hunyuan_v2v_sound":
        heard, given = (read_sound(path) for path in (out, WORKFLOWS / "inputs" / "vidgen-sound.mp4"))
        assert heard is not None
        assert heard.waveform.shape[1] == round(17 / 8 * heard.rate_hz)
        # AAC for the second time: a tone stays what it was, but for noise of a hundredth.
        assert float((heard.waveform - given.waveform[:, : heard.waveform.shape[1]]).abs().mean()) < 0.01


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    """The two workflows of embeddings together make the video that the plain one makes, to the bit."""
    needs_the_bundled_model()
    api, few = WORKFLOWS / "api", ["--set", "VidGenSampler.steps=1"]
    assert main(["render", str(api / "hunyuan_save_embeddings.json"), "-q", "-o", str(tmp_path / "x.mp4")]) == 0
    made = sorted((tmp_path / "embeddings").iterdir())
    assert [path.name for path in made] == ["VidGen_negative_00001.safetensors", "VidGen_prompt_00001.safetensors"]
    for path, shown in zip(made, ("vidgen-negative", "vidgen-prompt"), strict=True):
        # The examples were made by this workflow on another machine: sums of 128 numbers in another order.
        for name, tensor in load_file(path).items():
            example = load_file(WORKFLOWS / "inputs" / f"{shown}.safetensors")[name]
            torch.testing.assert_close(tensor, example, rtol=1e-4, atol=1e-5)
    chosen = [f"{node}.embeddings_name={path}" for node, path in zip("43", made, strict=True)]
    videos = {"hunyuan_t2v": [], "hunyuan_load_embeddings": [word for one in chosen for word in ("--set", one)]}
    for name, more in videos.items():
        out = str(tmp_path / f"{name}.mp4")
        assert main(["render", str(api / f"{name}.json"), "-q", "-o", out, *few, *more]) == 0
    plain, loaded = (read_video(tmp_path / f"{name}.mp4")[0] for name in videos)
    assert (plain == loaded).all()


def test_generate_runs_the_shipped_workflow(tmp_path: Path) -> None:
    """With no options nothing but the prompt differs."""
    needs_the_bundled_model()
    out = tmp_path / "a.mp4"
    assert main(["generate", "a green heart", "-q", "--steps", "1", "-o", str(out)]) == 0
    expected = shipped("hunyuan_t2v")
    expected["2"]["inputs"]["prompt"] = "a green heart"
    expected["5"]["inputs"]["steps"] = 1
    assert json.loads(read_metadata(out)["prompt"]) == expected


def test_the_bundled_model_is_in_every_list() -> None:
    needs_the_bundled_model()
    host = LocalNodeHost()
    assert BUNDLED in host.model_folders()
    for kind in ("network", "codec", "text"):
        assert any(name.startswith(f"{BUNDLED}/") for name in host.names(kind))
    assert check(shipped("hunyuan_t2v"), NODES) == ["7"]
