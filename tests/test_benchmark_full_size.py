"""The full-size benchmark at a tiny size: its file is a checkpoint, and a full disk is told before writing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vidgen.benchmarks import full_size
from vidgen.vidgen_core.errors import FileError
from vidgen.vidgen_core.families.cogvideox.config import T2V_5B
from vidgen.vidgen_core.families.hunyuan.config import T2V_720P
from vidgen.vidgen_core.model import inspect_file

TINY = replace(
    T2V_720P,
    hidden_size=32,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    rope_axes=(4, 6, 6),
    text_width=16,
    pooled_width=8,
)


def test_the_checkpoint_is_a_network_of_the_asked_size(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    assert full_size.write_checkpoint(path, TINY) == path.stat().st_size
    info = inspect_file(path)
    assert info["title"] == "HunyuanVideo diffusion network"
    assert info["config"]["num_single_blocks"] == 2
    assert info["dtypes"]["float8_e4m3fn"] == 32 * 32 * (36 + 2 * 15)  # each of two streams 18, a single block 15


TINY_COGVIDEOX = replace(
    T2V_5B, hidden_size=32, num_heads=2, num_layers=2, rope_axes=(4, 6, 6), text_width=16, time_width=8
)


@pytest.mark.parametrize("config", [TINY, TINY_COGVIDEOX], ids=["hunyuan", "cogvideox"])
def test_one_forward_is_measured(tmp_path: Path, config: Any) -> None:
    full_size.write_checkpoint(tmp_path / "network.safetensors", config)
    report = full_size.measure(tmp_path / "network.safetensors")
    assert report["video_tokens"] == 288
    assert report["output"]["shape"] == list(full_size.LATENTS)
    assert report["output"]["finite"]
    assert report["output"]["deviation"] > 0
    assert set(report["seconds"]) == {"import", "load", "forward"}
    assert report["peak_rss_bytes"] >= report["peak_rss_after_load_bytes"] > 0


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = full_size.shutil.disk_usage(tmp_path)._replace(free=10 * full_size.GIB)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FileError, match=r"10\.0 GiB free.*Expected: 12\.\d GiB"):
        full_size.write_checkpoint(tmp_path / "network.safetensors", T2V_720P)
    assert list(tmp_path.iterdir()) == []
