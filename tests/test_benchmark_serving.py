"""The benchmark of the server at a tiny size: its graphs are what they say, and its bars are read from the figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vidgen.benchmarks import serving
from vidgen.headless.executor import execute


@pytest.mark.parametrize("shape", serving.SHAPES)
def test_every_node_of_a_graph_runs(shape: str) -> None:
    ran = []
    prompt = serving.SHAPES[shape](50)
    assert len(prompt) == 50
    execute(prompt, serving.CLASSES, on_event=lambda event: ran.append(event.kind))
    assert ran.count("executing") == 50


def test_everything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    monkeypatch.setattr(serving, "BAR", 1.0)  # the first prompts of a process fill caches that stay
    assert serving.main(["--nodes", "20", "--prompts", "5", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["passes"] is True
    for shape in serving.SHAPES:
        assert report["server"]["graph"][shape]["messages"] > 20
        assert 0 <= report["executor"][shape]["run_s"] < 1
    assert report["server"]["queue"]["kept_in_history"] == 2 * 5 + serving.ROUNDS * 5 + len(serving.SHAPES)
    monkeypatch.setattr(serving, "BAR_S", 0.0)
    assert serving.main(["--nodes", "20", "--prompts", "5"]) == 1
