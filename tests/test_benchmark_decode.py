"""The benchmark of exact coding, on a picture: every way is measured, and the bars are read from the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidgen.benchmarks import decode
from vidgen.vidgen_core.families.hunyuan import vae
from vidgen.vidgen_core.nn import convolution

CASE = "decode:1x16x24"


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the ways changes it for its process."""
    for name in ("PART_BYTES", "PART_OPERATIONS"):
        monkeypatch.setattr(vae, name, getattr(vae, name))
    monkeypatch.setattr(convolution, "PART_OPERATIONS", convolution.PART_OPERATIONS)


@pytest.mark.parametrize("case", [CASE, "encode:5x16x16"])
def test_every_way_is_measured_and_compared(case: str, tmp_path: Path) -> None:
    for way in decode.WAYS:
        task = decode.Task(case=case, way=way, budget_bytes=10**8, reference=str(tmp_path / "one.npy"))
        measured = decode.measure(task)
        assert measured["cpu_s"] > 0
        assert measured["peak_bytes"] >= 0
        if way == "one_pass":
            assert measured["deviation"] > 0
        else:
            assert measured["max_abs_error"] < 1e-4  # a single tile is one pass
        assert ("planned_peak_bytes" in measured) == (way in decode.SHARE)


def test_the_summary_reads_the_bars(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    report = decode.Report(path, adds=False)

    def figures(way: str, peak: float, cpu: float, error: float = 1e-6) -> dict[str, object]:
        measured = {"case": CASE, "way": way, "peak_bytes": int(peak), "cpu_s": cpu, "planned_peak_bytes": 1}
        return measured if way == "one_pass" else {**measured, "max_abs_error": error, "psnr_db": 120.0}

    report.add(figures("one_pass", 1e9, 10))
    report.add(figures("memory", 0.3e9, 14))
    report.add(figures("tiles", 0.5e9, 20, error=0.5))
    again = decode.Report(path, adds=True)
    again.add(figures("disk", 0.09e9, 16, error=2e-4))
    summary = json.loads(path.read_text())["summary"][CASE]
    kept = summary["memory"]["bar_kept"]
    assert kept == {"error": True, "peak": False, "cpu": True, "cpu_below_tiles": True}
    assert summary["disk"]["bar_kept"] == {"error": False, "peak": True, "cpu": False, "cpu_below_tiles": True}
    assert summary["tiles"]["cpu_ratio"] == 2
    assert again.one_pass_peak(CASE) == 10**9


def test_a_share_needs_what_it_is_a_share_of(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="one_pass is measured first"):
        decode.rounds([CASE], ["memory"], 1, tmp_path, decode.Report(None, adds=False))
