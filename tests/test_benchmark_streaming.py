"""The benchmarks of streaming and storage at a small size: a model that renders, and honest sums over time lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidgen.benchmarks import storage, streaming
from vidgen.benchmarks.streaming import Span
from vidgen.vidgen_core.memory.place import STORAGES
from vidgen.vidgen_core.model import inspect_file


def test_the_model_is_found_and_has_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.vidgen_core.bundle import find_parts

    streaming.write_model(tmp_path, streaming.network_config(1, 1))
    info = inspect_file(tmp_path / "network.safetensors")
    assert info["config"]["num_double_blocks"] == info["config"]["num_single_blocks"] == 1
    assert set(info["dtypes"]) == {"bfloat16"}
    assert set(find_parts(tmp_path)[0]) == {"network", "codec", "text"}
    one, width = info["num_bytes"], 640
    blocks = 39 * 36 * width**2 + 65 * 15 * width**2  # matrices of the blocks that are missing here
    assert 1.95e9 < one + 2 * blocks < 2.1e9


def test_a_profile_is_drawn(tmp_path: Path) -> None:
    arguments = streaming.parse(
        ["--profile", str(tmp_path), "--double", "1", "--single", "2", "--side", "4", "--device", "cpu"]
    )
    report = streaming.profile(tmp_path / "pictures", arguments)
    assert report["run_s"] > 0
    assert report["bring_s"] > 0
    assert report["wait_s"] >= 0
    assert report["both_s"] <= min(report["run_s"], report["bring_s"])
    assert 0 <= report["hidden"] <= 1
    assert (tmp_path / "pictures" / streaming.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_overlap_counts_nothing_twice() -> None:
    spans = [
        Span("bring", 0, 2),
        Span("bring", 1, 3),  # two copies at once: 3 s of bringing
        Span("run", 2, 4),
        Span("run", 2.5, 3.5),
        Span("wait", 0, 9),
        Span("bring", 6, 7),
    ]
    assert streaming.overlap(spans) == {"bring_s": 4, "run_s": 2, "wait_s": 9, "both_s": 1, "hidden": 0.25}
    assert streaming.overlap([]) == {"bring_s": 0, "run_s": 0, "both_s": 0, "hidden": 1}  # nobody told of waiting


def test_a_trace_of_a_gpu_is_read() -> None:
    events = [
        {"cat": "cpu_op", "name": "aten::mm", "ts": 50.0, "dur": 9.0},
        {"cat": "kernel", "name": "gemm", "ts": 110.0, "dur": 20.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 100.0, "dur": 15.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 100.0, "dur": 1.0},
        {"name": "process_name", "ph": "M"},
    ]
    spans = streaming.trace_spans(events)
    assert [(span.lane, round(span.start_s * 1e6), round(span.end_s * 1e6)) for span in spans] == [
        ("run", 10, 30),
        ("bring", 0, 15),
    ]


def test_every_storage_is_measured(tiny_bundle_dir: Path) -> None:
    rows = storage.measure(str(tiny_bundle_dir))["storages"]
    assert rows.keys() == STORAGES.keys()
    assert rows["float32"]["bundled_answers"] == rows["float32"]["normal_weights"] == 0
    for kind in ("normal_weights", "bundled_weights", "bundled_answers"):
        assert 0 < rows["bfloat16"][kind] < rows["int8"][kind] < rows["nf4"][kind] < 1


def test_a_render_is_measured(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    report = streaming.measure(tiny_bundle_dir, tmp_path / "a.mp4", "64GB", "int8")
    assert report["frames"]["shape"] == [9, 32, 32, 3]
    assert report["peak_rss_bytes"] > 100e6
    assert report["command"].startswith("vidgen generate a red star --device cpu")
