"""The step cache benchmark on a model of random weights: what it counts is what the network did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vidgen.benchmarks import caching
from vidgen.vidgen_core.caching import MagnitudeCurve, StepCache
from vidgen.vidgen_core.generate import Sampling, load_bundle
from vidgen.vidgen_core.tricks import Tricks


def test_skipped_forwards_are_counted_at_the_network(tiny_bundle_dir: Path) -> None:
    bench = caching.Bench(load_bundle(tiny_bundle_dir, device="cpu"), Sampling(num_steps=5))
    cache = StepCache(method="first_block", threshold=1e9, max_skips=100)
    cond = bench.encode("a red star")
    assert bench.run(bench.model, cond).skipped == 0
    assert bench.run(bench.model.with_tricks(Tricks(cache=cache)), cond).skipped == pytest.approx(3 / 5)


def test_psnr_of_a_known_error() -> None:
    zero = torch.zeros(2, 3)
    assert caching.psnr_db(zero + 0.02, zero, 2.0) == pytest.approx(40)
    assert caching.psnr_db(zero, zero, 2.0) > 200


def test_a_small_run_writes_every_row_and_the_curve(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, curve = tmp_path / "caching.json", tmp_path / "curve.json"
    arguments = ["--model", str(tiny_bundle_dir), "--prompts", "1", "--steps", "4", "--json", str(out)]
    caching.main([*arguments, "--curve", str(curve)])
    report = json.loads(out.read_text())
    named = {(row["method"], row["quality"]) for row in report["rows"]}
    assert {(m, q) for m in ("first_block", "teacache", "magcache") for q in ("careful", "fast")} <= named
    assert all(0 <= row["skipped"] <= 1 and row["cpu_s"] >= 0 for row in report["rows"])
    assert len(MagnitudeCurve.from_json(curve.read_text()).times) == 4
    assert "| first_block | careful |" in capsys.readouterr().out
