"""Every shipped workflow runs, its two formats say the same, and a video restores the graph that made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.executor import check, input_specs
from vidgen.headless.graph import has_seed_control, is_widget, to_ui
from vidgen.headless.render import shipped
from vidgen.nodes.host import LocalNodeHost
from vidgen.vidgen_core.media import read_metadata, read_video
from vidgen.vidgen_core.memory.host import bundled_models

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


SMALL = {
    "VidGenLoadAll": {"model_folder": None},
    "VidGenSampler": {"steps": 2},
    "VidGenEmptyLatent": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenImageToVideo": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenLoadVideo": {"max_frames": 5},
    "VidGenFitImages": {"width": 32, "height": 32},
    "VidGenPadVideo": {"overlap": 0},
}
"""What makes a shipped workflow run on the random model in a blink, by node; None is the model."""


def small(name: str, tiny_bundle_dir: Path) -> list[str]:
    used = {node["class_type"] for node in shipped(name).values()}
    settings = [
        f"{node}.{key}={tiny_bundle_dir if value is None else value}"
        for node, values in SMALL.items()
        if node in used
        for key, value in values.items()
    ]
    return [word for setting in settings for word in ("--set", setting)]


SIZES = {"hunyuan_inpaint": (64, 64), "hunyuan_outpaint": (32, 48)}
"""(height, width) that a workflow then has, where it is not (32, 32)"""


def test_there_are_workflows() -> None:
    tasks = ("t2v", "i2v", "v2v", "inpaint", "outpaint", "low_memory", "exact_decode")
    assert {f"hunyuan_{task}" for task in tasks} <= set(NAMES)
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_say_the_same(name: str) -> None:
    """The editor's file is drawn from the other one; after a change of a workflow or a node, draw it again."""
    assert json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")) == to_ui(shipped(name), NODES)


@pytest.mark.parametrize("name", NAMES)
def test_the_editor_sends_what_was_drawn(name: str) -> None:
    assert restore(to_ui(shipped(name), NODES)) == shipped(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_drawing_is_readable(name: str) -> None:
    """Nodes do not cover each other, and every link goes from left to right."""
    ui = to_ui(shipped(name), NODES)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_and_comes_back_from_its_video(
    name: str, tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The workflow in the mp4 is the one that ran; queued again it makes the same video."""
    out = tmp_path / "a.mp4"
    assert main(["render", str(WORKFLOWS / "api" / f"{name}.json"), "-o", str(out), *small(name, tiny_bundle_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert read_video(out)[0].shape == (5, *SIZES.get(name, (32, 32)), 3)
    tags = read_metadata(out)
    prompt = json.loads(tags["prompt"])
    assert prompt["1"]["inputs"]["model_folder"] == str(tiny_bundle_dir)
    assert restore(json.loads(tags["workflow"])) == prompt
    (tmp_path / "again.json").write_text(json.dumps(prompt))
    assert main(["render", str(tmp_path / "again.json"), "-q", "-o", str(tmp_path / "b.mp4")]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == out.read_bytes()


def test_numbers_and_links_survive_any_id() -> None:
    """Ids of nodes in subgraphs are no numbers; the editor's are."""
    prompt = {
        "7:1": {"class_type": "VidGenLoadVideo", "inputs": {"video": "a.mp4", "start_frame": 1, "max_frames": 2}},
        "2": {
            "class_type": "VidGenSaveVideo",
            "inputs": {"images": ["7:1", 0], "fps": ["7:1", 1], "filename_prefix": "a", "format": "gif", "crf": 3},
        },
    }
    ui = to_ui(prompt, NODES)
    assert sorted(node["id"] for node in ui["nodes"]) == [1, 2]
    restored = restore(ui)
    assert restored["2"]["inputs"] == prompt["2"]["inputs"] | {"images": ["1", 0], "fps": ["1", 1]}
    assert restored["1"] == prompt["7:1"]


def needs_the_bundled_model() -> None:
    parts = [path.name for path in bundled_models().get(BUNDLED, Path("missing")).glob("*.safetensors")]
    if len(parts) < 3:
        pytest.skip("the bundled checkpoint is not complete")


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_as_it_is_shipped(name: str, tmp_path: Path) -> None:
    needs_the_bundled_model()
    out = tmp_path / "a.mp4"
    few = [] if name == "hunyuan_t2v" else ["--set", "VidGenSampler.steps=4"]
    assert main(["render", str(WORKFLOWS / "api" / f"{name}.json"), "-o", str(out), "-q", *few]) == 0
    frames, fps = read_video(out)
    assert len(frames) == 17
    assert fps == 8
    assert float(frames.std()) > 4, "the frames are blank"


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
