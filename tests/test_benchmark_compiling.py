"""The benchmark of torch.compile at a tiny size, with the quick compiler of the tests (see conftest.py)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from vidgen.benchmarks import compiling

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def test_a_small_run_is_reported(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "compiling.json"
    arguments = ["--network", "bundled", "--model", str(tiny_bundle_dir), "--steps", "1", "--runs", "2"]
    assert compiling.main([*arguments, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["within_bar"] is True
    (found,) = report["networks"].values()
    assert found["graphs"]["first_render"] == 2  # double and single blocks
    assert [found["graphs"][change] for change in ("again", "steps", "prompts", "seeds")] == [0, 0, 0, 0]
    assert found["graphs"]["without_guidance"] > 0, "half of the batch is another graph: what is counted is real"
    for side in ("compiled", "plain"):
        assert 0 < found["step_s"][side]["min"] <= found["step_s"][side]["median"] <= found["step_s"][side]["max"]
    assert found["ratio_spread"]["min"] <= found["ratio_median"] <= found["ratio_spread"]["max"]
    assert found["difference"]["relative"] < 1e-5


def test_prompts_of_the_random_network_have_several_lengths() -> None:
    subject = compiling.middle(1, hidden_size=128, side=4)
    assert [prompt.context.shape[1] for prompt in subject.prompts] == list(compiling.TEXT_TOKENS)
    assert subject.sample(subject.model, prompt=1, frames=6).shape == (1, 16, 6, 4, 4)


def test_compiling_again_fails_the_bar(tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(compiling, "num_graphs", lambda: next(count))
    subject = compiling.bundled(str(tiny_bundle_dir), 1)
    assert compiling.measure(subject, 1, "cpu")["within_bar"] is False
