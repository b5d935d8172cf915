"""The render benchmark on a model of random weights: every phase that it reports is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidgen.benchmarks import render


def test_every_phase_is_measured(tiny_bundle_dir: Path) -> None:
    run = render.measure("a red star", str(tiny_bundle_dir), seed=0, threads=None)
    assert tuple(run["seconds"]) == render.PHASES
    assert all(seconds > 0 for seconds in run["seconds"].values())
    assert all(run["peak_bytes"][phase] > 0 for phase in render.PHASES)
    assert run["video"]["shape"] == [1, 3, 9, 32, 32]
    assert run["video"]["file_bytes"] > 0
    assert set(run["checkpoint"]) == {"network", "codec", "text"}


def fake_run(sample_s: float, peak_mib: int) -> dict[str, Any]:
    seconds = dict.fromkeys(render.PHASES, 1.0) | {"sample": sample_s}
    peaks = dict.fromkeys(render.PHASES, render.MIB) | {"decode": peak_mib * render.MIB}
    return {"seconds": seconds, "peak_bytes": peaks, "ffmpeg_peak_bytes": 2 * render.MIB}


def test_summary_takes_medians_of_time_and_the_worst_of_memory() -> None:
    runs = [fake_run(2.0, 300), fake_run(9.0, 500), fake_run(4.0, 400)]
    summary = render.summarise(runs)
    assert summary["sample_s"] == 4.0
    assert summary["after_load_s"] == 7.0  # text 1, sample 4, decode 1, encode file 1
    assert summary["total_s"] == 9.0  # and import 1, load 1
    assert summary["peak_mib"] == 500
    assert "encode file" in render.table(runs, summary)
