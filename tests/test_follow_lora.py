"""The benchmark of a LoRA: how it counts, and the shipped LoRA in one short render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.benchmarks import follow_lora
from vidgen.training.data import detect
from vidgen.vidgen_core.bundle import load_bundle
from vidgen.vidgen_core.generate import Sampling, generate
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.model import check_lora, open_part
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.lora import read_lora


def row(*, right: bool, light: float) -> dict[str, Any]:
    wanted = dict.fromkeys(detect.JUDGED, "a")
    return {
        "wanted": wanted,
        "seen": wanted | ({} if right else {"colour": "b", "motion": "b"}),
        "light": light,
        "light_without": 0.5,
        "true_light": 0.2,
        "true_light_without": 0.6,
        "seconds": 1.0,
    }


@pytest.mark.parametrize(
    ("num_right", "light", "moved"), [(10, 0.1, True), (9, 0.29, True), (8, 0.1, True), (10, 0.31, False)]
)
def test_the_bars(num_right: int, light: float, moved: bool) -> None:
    result = follow_lora.summary([row(right=index < num_right, light=light) for index in range(10)])
    assert result["moved"] == pytest.approx((0.5 - light) / 0.4)
    assert result["passes"] == {"moved": moved, "colour": num_right > 8, "motion": num_right > 8}
    told = {"n": 10, "split": "seen", "seed": 1, "lora": "x", "strength": 1.0, "wall_s": 1.0}
    assert ("not reached" in follow_lora.report(result | told)) == (not all(result["passes"].values()))


def test_the_shipped_lora_darkens_the_background() -> None:
    """Eight steps are enough to see it: half of the style's own change, as the benchmark asks of whole runs."""
    task = follow_lora.LoraTask(model=None, split="seen", seed=5, indices=(3,), sampling=(("num_steps", 8),))
    (found,) = follow_lora.run_task(task)
    change = found["true_light_without"] - found["true_light"]
    assert found["light_without"] - found["light"] > follow_lora.BAR_MOVED * change


def test_at_strength_0_nothing_has_changed() -> None:
    bundle = load_bundle("vidgen-tiny-hunyuan")
    path = LocalHost().find("lora", follow_lora.LORA)
    settings = Sampling(num_steps=1, seed=3)
    plain = generate(bundle, "a red star", settings=settings)
    bundle.model = bundle.model.with_lora(read_lora(path), 0.0)
    assert torch.equal(generate(bundle, "a red star", settings=settings), plain)


def test_the_shipped_lora_belongs_to_the_shipped_network() -> None:
    path = LocalHost().find("lora", follow_lora.LORA)
    network = path.parents[1] / "network.safetensors"
    check_lora(path, open_part(network, "network")[1])
    tags = read_header(path).metadata
    # Not this network's, perhaps: one that was trained on from it takes the LoRA as well.
    assert len(tags["vidgen.base"]) == len(read_header(network).digest)
    assert (tags["ss_network_dim"], tags["modelspec.architecture"]) == ("8", "hunyuan-video/lora")
    assert Path(path).stat().st_size < 1e6
