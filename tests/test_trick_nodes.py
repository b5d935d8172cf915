"""The nodes around a network: what each one puts on the model, how they add up, and ``vidgen generate --cache``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.headless.cli import main
from vidgen.nodes.loaders import LoadAll
from vidgen.nodes.sampling import EmptyLatent, Sampler
from vidgen.nodes.text import EncodePrompt
from vidgen.nodes.tricks import (
    CalibrateCache,
    CfgZeroStar,
    ContextWindows,
    EnhanceAVideo,
    Riflex,
    SkipLayerGuidance,
    SpatioTemporalGuidance,
    StepCache,
)
from vidgen.vidgen_core.caching import PRESETS, MagnitudeCurve
from vidgen.vidgen_core.caching import StepCache as Cache
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.media import read_metadata
from vidgen.vidgen_core.tricks import CfgZero, Enhance, Tricks, WeakPass
from vidgen.vidgen_core.tricks import Riflex as RiflexRecord
from vidgen.vidgen_core.windows import Windows

CURVE = MagnitudeCurve(times=(1.0, 0.5), ratios={"cond": (1.0, 0.9)}).to_json()


@pytest.fixture(scope="module")
def parts(tiny_bundle_dir: Path) -> tuple[Any, Any, Any]:
    return LoadAll().load(str(tiny_bundle_dir), "auto")


@pytest.mark.parametrize(
    ("node", "arguments", "expected"),
    [
        (
            SkipLayerGuidance,
            ("1", 2.0, 0.9, 0.1),
            Tricks(skip_layers=WeakPass(blocks="1", scale=2.0, start=0.9, end=0.1)),
        ),
        (
            SpatioTemporalGuidance,
            ("attention", "auto", 1.5, 0.7, 1.0, 0.0),
            Tricks(stg=WeakPass(scale=1.5, rescale=0.7, attention_only=True)),
        ),
        (SpatioTemporalGuidance, ("block", "", 1.5, 0.0, 1.0, 0.0), Tricks(stg=WeakPass(blocks="", scale=1.5))),
        (CfgZeroStar, (2, False), Tricks(cfg_zero=CfgZero(zero_steps=2, projected=False))),
        (EnhanceAVideo, (3.0,), Tricks(enhance=Enhance(weight=3.0))),
        (Riflex, (0, 0), Tricks(riflex=RiflexRecord())),
        (Riflex, (2, 129), Tricks(riflex=RiflexRecord(component=1, trained_length=33))),
        (
            ContextWindows,
            (65, 16, "uniform", "flat", True, "shared"),
            Tricks(
                windows=Windows(
                    size=17, overlap=4, schedule="uniform", blend="flat", shuffle_noise=True, share_first=True
                )
            ),
        ),
        (
            ContextWindows,
            (18, 7, "looped", "pyramid", False, "auto"),
            Tricks(windows=Windows(size=5, overlap=1, schedule="looped")),
        ),
        (StepCache, ("first_block", "off", 1.0, 9, 0.5, 0.6), Tricks()),
        (StepCache, ("teacache", "fast", 1.0, 9, 0.5, 0.6), Tricks(cache=Cache.preset("teacache", "fast"))),
        (
            StepCache,
            ("first_block", "custom", 0.3, 3, 0.2, 0.9, CURVE),
            Tricks(cache=Cache(method="first_block", threshold=0.3, max_skips=3, start=0.2, end=0.9)),
        ),
        (
            StepCache,
            ("magcache", "careful", 1.0, 9, 0.5, 0.6, CURVE),
            Tricks(cache=Cache.preset("magcache", "careful", curve=MagnitudeCurve.from_json(CURVE))),
        ),
    ],
)
def test_a_node_puts_its_record_on_the_model(
    parts: tuple[Any, Any, Any], node: type, arguments: tuple[Any, ...], expected: Tricks
) -> None:
    (changed,) = node().apply(parts[0], *arguments)
    assert changed.tricks == expected
    assert changed.network is parts[0].network
    assert parts[0].tricks == Tricks()


def test_nodes_in_a_row_add_up_and_the_last_of_a_kind_counts(parts: tuple[Any, Any, Any]) -> None:
    (model,) = EnhanceAVideo().apply(parts[0], 1.0)
    (model,) = CfgZeroStar().apply(model, 1, True)
    (model,) = EnhanceAVideo().apply(model, 2.0)
    assert model.tricks == Tricks(enhance=Enhance(weight=2.0), cfg_zero=CfgZero())


def test_defaults_of_custom_are_the_careful_preset() -> None:
    inputs = StepCache.INPUT_TYPES()["required"]
    assert (inputs["threshold"][1]["default"], inputs["max_skips"][1]["default"]) == PRESETS["first_block"]["careful"]


def test_calibrate_then_cache(parts: tuple[Any, Any, Any]) -> None:
    model, vae, text = parts
    (positive,), (negative,) = (EncodePrompt().encode(text, prompt, "video") for prompt in ("a red star", ""))
    (latent,) = EmptyLatent().make(vae, 32, 32, 5, 1)
    (curve,) = CalibrateCache().measure(model, positive, latent, 0, 6, 2.0, 0.0, "auto", negative)
    assert json.loads(curve)["checkpoint"] == model.fingerprint
    (cached,) = StepCache().apply(model, "magcache", "custom", 10.0, 3, 0.0, 1.0, curve)
    settings: dict[str, Any] = {
        **{"seed": 0, "steps": 6, "cfg": 2.0, "guidance": 0.0, "shift": 0.0, "sampler": "auto", "schedule": "auto"},
        **{"denoise": 1.0, "negative": negative},
    }
    (expected,), (found,) = (Sampler().sample(m, positive, latent, **settings) for m in (model, cached))
    assert found["samples"].isfinite().all()
    assert not torch.equal(found["samples"], expected["samples"])


def test_what_a_model_cannot_do_is_told_by_the_node(parts: tuple[Any, Any, Any]) -> None:
    with pytest.raises(SettingsError, match="Calibrate Cache"):
        StepCache().apply(parts[0], "magcache", "fast", 0.1, 2, 0.0, 1.0, "")
    with pytest.raises(SettingsError, match="magnitude curve"):
        StepCache().apply(parts[0], "magcache", "fast", 0.1, 2, 0.0, 1.0, "nonsense")
    with pytest.raises(SettingsError, match="no such block"):
        SkipLayerGuidance().apply(parts[0], "99", 1.0, 1.0, 0.0)
    with pytest.raises(SettingsError, match="no such frequency"):
        Riflex().apply(parts[0], 20, 0)
    with pytest.raises(SettingsError, match="windows cannot be used"):
        ContextWindows().apply(parts[0], 17, 16, "static", "pyramid", True, "auto")
    other = replace(parts[0], fingerprint="other")
    curve = MagnitudeCurve(times=(1.0, 0.5), ratios={"cond": (1.0, 0.9)}, checkpoint="this").to_json()
    with pytest.raises(SettingsError, match="another model"):
        StepCache().apply(other, "magcache", "fast", 0.1, 2, 0.0, 1.0, curve)


# --- vidgen generate --cache ------------------------------------------------------------------------------------------


def generated(tiny_bundle_dir: Path, out: Path, *options: str) -> int:
    words = ["generate", "a red star", "--model", str(tiny_bundle_dir), "--frames", "5", "--steps", "4", "-q"]
    return main([*words, "-o", str(out), *options])


def test_generate_with_a_cache(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text(CURVE)
    for number, (text, more) in enumerate(
        [("first_block", []), ("teacache:fast", []), ("magcache", ["--curve", str(tmp_path / "curve.json")])]
    ):
        out = tmp_path / f"{number}.mp4"
        assert generated(tiny_bundle_dir, out, "--cache", text, *more) == 0
        prompt = json.loads(read_metadata(out)["prompt"])
        method, _, quality = text.partition(":")
        (node_id,) = (key for key, node in prompt.items() if node["class_type"] == "VidGenStepCache")
        assert prompt[node_id]["inputs"]["method"] == method
        assert prompt[node_id]["inputs"]["quality"] == (quality or "careful")
        assert prompt["5"]["inputs"]["model"] == [node_id, 0]
        assert bool(prompt[node_id]["inputs"]["curve"]) == (method == "magcache")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--cache", "teacash"), "teacache"),
        (("--cache", "teacache:slow"), "quality"),
        (("--cache", "teacache:off"), "leave --cache out"),
        (("--cache", "magcache"), "Calibrate Cache"),
        (("--cache", "magcache", "--curve", "missing.json"), "cannot be read"),
    ],
)
def test_a_cache_that_cannot_be_is_told_before_any_work(
    tiny_bundle_dir: Path, tmp_path: Path, options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(tiny_bundle_dir, tmp_path / "a.mp4", *options) == 1
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
