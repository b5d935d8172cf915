"""Workflows as people saved them with the first versions of the nodes: they load, say the same, and render.

The files under tests/golden are never changed. A node that grows must keep reading them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.executor import check, input_specs
from vidgen.headless.render import load_prompt
from vidgen.vidgen_core.media import read_video

NODES: dict[str, type] = vidgen.NODE_CLASS_MAPPINGS
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.json") if not path.stem.endswith("_api"))
SIZES = {"inpaint": (64, 64), "outpaint": (32, 48)}
SMALL: dict[str, dict[str, Any]] = {
    "VidGenLoadAll": {"model_folder": "."},
    "VidGenLoadModel": {"model_name": "network.safetensors"},
    "VidGenLoadVAE": {"vae_name": "vae.safetensors"},
    "VidGenLoadTextEncoders": {"text_name": "text.safetensors"},
    "VidGenSampler": {"steps": 1},
    "VidGenEmptyLatent": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenImageToVideo": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenLoadVideo": {"max_frames": 5},
    "VidGenFitImages": {"width": 32, "height": 32},
    "VidGenPadVideo": {"overlap": 0},
}


def prompt_of(name: str) -> dict[str, dict[str, Any]]:
    return load_prompt(GOLDEN / f"{name}.json", NODES)


def with_defaults(node: dict[str, Any]) -> dict[str, Any]:
    """Its inputs, with those that were not there yet."""
    later = {
        name: options["default"]
        for name, _, options, _ in input_specs(NODES[node["class_type"]])
        if name not in node["inputs"] and "default" in options
    }
    return {**later, **node["inputs"]}


def test_there_are_old_files() -> None:
    assert NAMES == ["i2v", "inpaint", "outpaint", "t2v", "v2v"]
    assert all((GOLDEN / f"{name}_api.json").is_file() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_both_formats_still_say_the_same(name: str) -> None:
    """The editor's file is read by its places; widgets that came later have their defaults."""
    old, saved = prompt_of(f"{name}_api"), prompt_of(name)
    assert {key: node["class_type"] for key, node in old.items()} == {
        key: node["class_type"] for key, node in saved.items()
    }
    for key, node in old.items():
        assert with_defaults(saved[key]) == with_defaults(node), node["class_type"]
    assert check(old, NODES) == check(saved, NODES)


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}_api" for name in NAMES)])
def test_it_still_renders(name: str, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    settings = []
    for key, node in prompt_of(name).items():
        for widget, value in SMALL.get(node["class_type"], {}).items():
            file = widget.endswith(("_name", "_folder"))
            settings += ["--set", f"{key}.{widget}={tiny_bundle_dir / value if file else value}"]
    out = tmp_path / "a.mp4"
    assert main(["render", str(GOLDEN / f"{name}.json"), "-q", "-o", str(out), *settings]) == 0
    assert read_video(out)[0].shape == (5, *SIZES.get(name.removesuffix("_api"), (32, 32)), 3)


def test_the_files_are_old() -> None:
    """Of the first nodes: a file that is saved again today has more widgets."""
    sampler = next(node for node in json.loads((GOLDEN / "t2v.json").read_text())["nodes"] if "Sampler" in node["type"])
    assert len(sampler["widgets_values"]) < len(list(input_specs(NODES[sampler["type"]])))
