"""The editor's file and its API twin make the same frames: a few workflows really, the rest on paper."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vidgen.benchmarks import workflows
from vidgen.vidgen_core.media import write_video

SMALL = {
    "VidGenSampler": {"steps": 1},
    "VidGenEmptyLatent": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenImageToVideo": {"width": 32, "height": 32, "num_frames": 5},
    "VidGenLoadVideo": {"max_frames": 5},
    "VidGenFitImages": {"width": 32, "height": 32},
}


@pytest.mark.parametrize("name", ["hunyuan_t2v", "hunyuan_i2v", "hunyuan_v2v", "hunyuan_lora_stack"])
def test_both_formats_make_the_same_frames(name: str) -> None:
    row = workflows.compare(name, SMALL)
    assert row["same"] is True, row
    (file,) = row["files"]
    assert file.endswith(".mp4")


def test_a_workflow_for_published_files_too(i2v_v1_models: Path) -> None:
    changes = SMALL | {"VidGenImageToVideo": {"width": 32, "height": 32, "num_frames": 9, "size": "exact"}}
    assert workflows.compare("hunyuan_i2v_v1", changes, [i2v_v1_models])["same"] is True
    assert "No codec checkpoint" in workflows.compare("hunyuan_i2v_v1", changes)["why"]


def test_encoded_prompts_are_the_same_too() -> None:
    row = workflows.compare("hunyuan_save_embeddings", SMALL)
    assert row["same"] is True, row
    assert len(row["files"]) == 2


def test_another_seed_is_another_video() -> None:
    """Or the hashes would say nothing."""
    changes = [SMALL | {"VidGenSampler": {"steps": 1, "seed": seed}} for seed in (1, 2)]
    first, other = (workflows.hashes(workflows.WORKFLOWS / "hunyuan_t2v.json", one, ()) for one in changes)
    assert first.keys() == other.keys()
    assert first != other


def test_what_a_file_holds_counts_and_not_what_it_says_of_itself(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    files = [tmp_path / "a.mp4", tmp_path / "b.mp4", tmp_path / "c.mp4"]
    for path, shown, tags in zip(files, (frames, frames, 255 - frames), ({}, {"prompt": "{}"}, {}), strict=True):
        write_video(path, iter(shown), fps=8, metadata=tags)
    first, tagged, other = map(workflows.content_hash, files)
    assert first == tagged
    assert first != other


def test_the_exit_status_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"a": {"same": True}, "b": {"same": None, "why": "no model"}, "c": {"same": False}}
    asked = []
    monkeypatch.setattr(workflows, "compare", lambda name, changes, models: asked.append(changes) or rows[name])
    assert workflows.main(["a", "b", "--json", str(tmp_path / "r.json")]) == 0
    assert workflows.main(["a", "c", "--steps", "2"]) == 1
    assert asked[-1]["VidGenSampler"] == {"steps": 2}
    assert "NOT THE SAME" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["workflows"]["b"]["why"] == "no model"
