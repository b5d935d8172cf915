"""The benchmark of memory by length, at a size that takes no time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vidgen.benchmarks import decode_length
from vidgen.benchmarks.decode_length import Task, main, measure, report
from vidgen.vidgen_core.errors import SettingsError

SMALL = Task(frames=17, size="16x24", part_of_width=16)


def test_measures_and_counts() -> None:
    measured = measure(SMALL)
    assert measured["frames"] == 17
    assert measured["cpu_s"] > 0
    counted = measure(Task(frames=17, size="16x24", part_of_width=16, count=True))
    whole = measure(Task(frames=17, size="16x24", part_of_width=16, count=True, whole=True))
    assert 0 < counted["peak_bytes"] < whole["peak_bytes"]


def test_frames_go_into_a_file() -> None:
    assert measure(replace(SMALL, write=True))["write"]


def test_a_length_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="8 n"):
        measure(Task(frames=13, size="16x24", part_of_width=16, count=True))


def test_the_report_says_how_much_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bytes_of = {49: 100, 97: 108, 193: 130}
    monkeypatch.setattr(
        decode_length, "measure_fresh", lambda task: {"frames": task.frames, "peak_bytes": bytes_of[task.frames]}
    )
    path = tmp_path / "figures.json"
    main(["--json", str(path)])
    assert json.loads(path.read_text())["growth"] == 1.08
    assert json.loads(path.read_text())["bar_kept"]
    grown = report([{"frames": frames, "peak_bytes": size} for frames, size in bytes_of.items()])
    assert (grown["growth"], grown["bar_kept"]) == (1.3, False)
