"""The memory plan: what is counted without computing, which way is chosen, what is refused, and that it is obeyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.benchmarks.plan import cases, summarise
from vidgen.headless.cli import main
from vidgen.headless.plan import plan_prompt, wish
from vidgen.headless.render import node_of, shipped
from vidgen.vidgen_core.bundle import find_parts, load_bundle
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.generate import Sampling, decode_latents, generate
from vidgen.vidgen_core.memory import plan as plans
from vidgen.vidgen_core.memory.live import Work, cost_of, watched_memory
from vidgen.vidgen_core.memory.plan import Plan, Rates, Stage, StageWays, Way, choose, following, nearest_sizes
from vidgen.vidgen_core.planning import Planner, Wish, plan_video
from vidgen.vidgen_core.tiling import Tiling
from vidgen.vidgen_core.types import Grid, VideoShape

MB = 1_000_000
RATES = Rates()


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# --- counting without computing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "times"),
    [
        (lambda x: x, 1),
        (lambda x: x + 1, 2),
        (lambda x: (x + 1) + 1, 3),
        (lambda x: ((x + 1) + 1) + 1, 3),  # the first result is gone when the third comes
        (lambda x: x.view(-1)[::2].unsqueeze(0), 1),
        (lambda x: x.mul_(2).add_(1), 1),
        (lambda x: torch.cat([x, x]), 3),
        (lambda x: x.to(torch.float64), 3),
        (lambda x: x.to(torch.bfloat16), 1.5),
        (lambda x: torch.empty_like(x), 1),  # not written, so the system gave nothing
        (lambda x: torch.empty_like(x).copy_(x), 2),
        (lambda x: x.new_empty(4, *x.shape)[1:3].copy_(x), 3),  # a half of it is written
    ],
)
def test_the_peak_is_what_is_alive_at_once(run: Callable[[Tensor], Any], times: float) -> None:
    x = meta(1000, 64)
    assert cost_of(run, x).peak == times * x.nbytes


def test_weights_do_not_count_but_are_told() -> None:
    with torch.device("meta"):
        used, unused = nn.Linear(64, 32), nn.Linear(64, 32)
    cost = cost_of(used, meta(100, 64), modules=[used, unused])
    assert cost.peak == 4 * 100 * (64 + 32)
    assert cost.weights == 4 * (64 * 32 + 32)
    assert cost.work.flops == {"linear": 2 * 100 * 64 * 32}


def test_mapped_weights_join_when_they_are_read() -> None:
    with torch.device("meta"):
        wide, narrow = nn.Linear(64, 1000, bias=False), nn.Linear(1000, 50, bias=False)
    cost = cost_of(lambda x: narrow(wide(x).mean(0)), meta(100, 64), modules=[wide, narrow])
    assert cost.peak == 4 * (100 * 64 + 100 * 1000 + 1000)
    assert cost.with_weights == cost.peak + 4 * 64 * 1000  # the second layer is read when the wide tensor is gone
    with watched_memory() as meter:
        meter.skip(cost)
        assert meter.with_weights == cost.with_weights
        meter.skip(cost)
    assert meter.with_weights == cost.peak + cost.weights  # now it is there from the start


def test_what_is_measured_apart_is_counted_once() -> None:
    with watched_memory() as meter:
        with meter.not_counting():
            cost = cost_of(lambda x: (x + 1) @ x.T, meta(50, 60))
        assert (meter.peak, meter.work) == (0, Work())
        meter.skip(cost)
    assert (meter.peak, meter.work) == (cost.peak, cost.work)
    assert cost.work.num_ops == 2


def test_attention_keeps_no_scores() -> None:
    peaks = []
    for tokens in (1000, 2000):
        q = meta(1, 4, tokens, 32)
        cost = cost_of(lambda q=q: F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        peaks.append(cost.peak)
        assert cost.work.flops == {"attention": 4 * 4 * tokens**2 * 32}
    assert peaks[1] == 2 * peaks[0]  # linear in the tokens: q, the output and a sum for each row
    assert peaks[0] == 4 * 4 * 1000 * (32 + 32 + 1)


def test_convolutions_take_what_their_kernels_take() -> None:
    with torch.device("meta"):
        conv = nn.Conv3d(24, 24, 3)
    # torch's own kernel unfolds small inputs: 27 numbers for each of the input's channels and the output's places.
    small = cost_of(conv, meta(1, 24, 7, 34, 34), modules=[conv]).peak
    places = 5 * 32 * 32
    assert small == 4 * (24 * 7 * 34 * 34 + 24 * places + 24 * 27 * places)
    # oneDNN copies large ones into blocks of 16 channels, before and after.
    large = cost_of(conv, meta(1, 24, 19, 130, 130), modules=[conv]).peak
    blocked = 32 * (19 * 130 * 130 + 17 * 128 * 128) + 27 * 32 * 32
    assert large == 4 * (24 * 19 * 130 * 130 + blocked)


# --- choosing ---------------------------------------------------------------------------------------------------------


def way(name: str, passing: int, seconds: float, *, loaded: int = 0, touched: int = 0) -> Way:
    work = Work(moved=seconds * RATES.moved)
    return Way(
        name=name,
        why="",
        passing=lambda: passing * MB,
        work=lambda: work,
        loaded=loaded * MB,
        touched=touched * MB,
        settings={"way": name},
    )


def ways(name: str, *choices: Way) -> StageWays:
    return StageWays(name=name, ways=choices)


SAMPLE = ways(
    "sample",
    way("resident", 100, 10, touched=500),
    way("in turn", 60, 11, touched=500),
    way("streamed", 110, 30, touched=50),
)
DECODE = ways("decode", way("one pass", 700, 5), way("tiles", 200, 12))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2000, ["resident", "one pass"]),
        (1000, ["resident", "tiles"]),  # 17 + 500 + 200 would fit; one pass beside the weights would not
        (720, ["in turn", "tiles"]),
        (400, ["streamed", "tiles"]),
    ],
)
def test_the_fastest_way_that_fits_is_taken(budget: int, expected: list[str]) -> None:
    stages = [ways("text", way("resident", 0, 1, touched=100 if budget == 720 else 0)), SAMPLE, DECODE]
    if budget == 720:
        stages[1] = ways("sample", way("resident", 130, 10, touched=500), *SAMPLE.ways[1:])
        stages[2] = ways("decode", way("one pass", 700, 5), way("tiles", 90, 12))
    plan = choose(stages, budget * MB, RATES, baseline_bytes=10 * MB)
    assert plan.fits
    assert [stage.way for stage in plan.stages[1:]] == expected
    assert plan.seconds == pytest.approx(
        sum({"resident": 10, "one pass": 5, "tiles": 12, "in turn": 11, "streamed": 30}[name] for name in expected) + 1
    )


def test_a_slow_way_of_one_stage_may_buy_a_fast_one_of_another() -> None:
    """Weights that are streamed leave room for a decode that is so much faster that both together are."""
    slow_tiles = ways("decode", way("one pass", 700, 5), way("tiles", 200, 500))
    plan = choose([SAMPLE, slow_tiles], 900 * MB, RATES, baseline_bytes=0)
    assert [stage.way for stage in plan.stages] == ["streamed", "one pass"]


def test_stages_have_beside_them_what_came_before() -> None:
    stages = [ways("a", way("x", 5, 1, loaded=100, touched=30)), ways("b", way("y", 7, 1, loaded=1000, touched=300))]
    plan = choose(stages, 10**12, RATES, baseline_bytes=2 * MB)
    slack, kept = 1 + plans.SLACK, plans.KEPT_BYTES
    assert [stage.peak_bytes for stage in plan.stages] == [
        (2 + 1100 + 30) * MB + round(5 * MB * slack) + kept,
        (2 + 1100 + 330) * MB + round(7 * MB * slack) + kept,
    ]
    assert plan.peak_bytes == plan.stages[1].peak_bytes


def test_where_nothing_fits_the_smallest_way_is_told() -> None:
    plan = choose([SAMPLE, DECODE], 100 * MB, RATES, baseline_bytes=0)
    assert not plan.fits
    assert [stage.way for stage in plan.stages] == ["streamed", "tiles"]


def test_no_way_is_asked_for_its_cost_in_vain() -> None:
    asked: list[str] = []

    def asking(name: str, passing: int) -> Way:
        return replace(way(name, passing, 1), passing=lambda: asked.append(name) or passing * MB)  # type: ignore[func-returns-value]

    choose([ways("decode", asking("a", 5), asking("b", 4), asking("c", 3))], 10 * MB, RATES, baseline_bytes=0)
    assert set(asked) == {"a", "c"}  # the fastest, which is taken, and the smallest, which says that there is a way


def test_the_nearest_sizes() -> None:
    grid = Grid(channels=16, spatial=8, temporal=4)
    shape = VideoShape(num_frames=129, height_px=720, width_px=1280)

    def fits(size: VideoShape) -> bool:
        return size.num_frames * size.height_px * size.width_px <= 50e6

    shorter, smaller = nearest_sizes(shape, grid, (1, 2, 2), fits)
    assert shorter == replace(shape, num_frames=53)  # 53 is the last of 1, 5, 9, ... below 54.25
    assert smaller.num_frames == 129
    assert (smaller.height_px, smaller.width_px) == (464, 832)
    assert fits(smaller)
    assert nearest_sizes(shape, grid, (1, 2, 2), lambda size: False) == []


# --- time -------------------------------------------------------------------------------------------------------------


def test_seconds_are_work_over_rates() -> None:
    rates = Rates(linear=10, attention=20, convolution=40, moved=5, per_op=0.5, disk=1)
    work = Work({"linear": 10, "attention": 40, "convolution": 20}, 10, 3)
    assert rates.seconds(work) == 1 + 2 + 0.5 + 2 + 1.5
    assert rates.seconds(work * 2) == 2 * rates.seconds(work)
    assert rates.seconds(work + work) == 2 * rates.seconds(work)


def test_rates_are_measured_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cpu")
    assert plans.known_rates(device) == Rates()
    measured = plans.calibrate(device, seconds=0.001)
    assert plans.known_rates(device) == measured != Rates()
    (tmp_path / "vidgen" / "rates_cpu.json").write_text("[1, 2")
    assert plans.known_rates(device) == Rates()


# --- a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(tiny_bundle_dir: Path) -> Planner:
    headers, found = find_parts(tiny_bundle_dir)
    return Planner(headers, found, rates=RATES, baseline_bytes=0)


WISH = Wish(shape=VideoShape(num_frames=17, height_px=96, width_px=96), num_steps=2, guided=True, num_text_tokens=8)


def test_a_plan_of_a_model(planner: Planner) -> None:
    plan = planner.plan(WISH, 10**12)
    assert [stage.name for stage in plan.stages] == ["encode prompt", "sample", "decode", "write"]
    assert plan.setting("sample", "cfg_batched") is True
    assert plan.setting("decode", "tiling", "unknown") is None
    assert json.loads(json.dumps(plan.to_dict()))["fits"] is True
    assert len(list(plan.lines())) == 5


def test_more_video_takes_more(planner: Planner) -> None:
    """Where convolutions go to oneDNN: torch's own kernel, which takes small ones, unfolds them and takes more."""
    shape = VideoShape(num_frames=33, height_px=160, width_px=128)
    peaks = [
        planner.plan(replace(WISH, shape=replace(shape, **larger)), 10**12).peak_bytes
        for larger in ({}, {"num_frames": 65}, {"width_px": 256})
    ]
    assert peaks[1] > 1.5 * peaks[0]
    assert peaks[2] > 1.5 * peaks[0]


def test_a_budget_is_kept_by_every_plan_until_none_fits(planner: Planner) -> None:
    fastest = planner.plan(WISH, 10**12)
    found = set()
    for share in (0.98, 0.9, 0.8, 0.7, 0.6, 0.4):
        plan = planner.plan(WISH, round(share * fastest.peak_bytes))
        if plan.fits:
            assert plan.peak_bytes <= plan.budget_bytes
            assert plan.seconds >= fastest.seconds
            found.add(plan.stages[2].way)
    assert any(name.startswith(("tiles", "exact")) for name in found)


def test_too_large_a_video_is_refused_with_sizes_that_fit(planner: Planner) -> None:
    budget = round(0.97 * planner.plan(WISH, 1).peak_bytes)  # a little less than the smallest way takes
    with pytest.raises(SettingsError, match="frames of") as refusal:
        planner.check(WISH, budget)
    sizes = planner.nearest(WISH, budget)
    assert sizes
    for size in sizes:
        assert f"{size.num_frames} frames of {size.width_px} x {size.height_px} px" in str(refusal.value)
        assert planner.plan(replace(WISH, shape=size), budget).fits


def test_the_plan_as_plain_values(tiny_bundle_dir: Path) -> None:
    headers, found = find_parts(tiny_bundle_dir)
    said = plan_video(headers, found, {"width": 64, "height": 64, "frames": 9, "num_steps": 2}, 10**12)
    assert said["fits"]
    assert said["nearest"] == []
    assert plan_video(headers, found, {"width": 64, "height": 64, "frames": 9}, 1)["fits"] is False


# --- obeyed -----------------------------------------------------------------------------------------------------------


def decided(**settings: dict[str, Any]) -> Plan:
    stages = [
        Stage(name=name.replace("_", " "), way="", why="", peak_bytes=1, seconds=0.0, settings=values)
        for name, values in settings.items()
    ]
    return Plan(stages=tuple(stages), budget_bytes=2, baseline_bytes=0)


def test_decoding_follows_the_plan(tiny_bundle_dir: Path) -> None:
    codec = load_bundle(tiny_bundle_dir).codec
    latents = torch.randn(1, 16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    tiling = Tiling(tile_px=32, stride_px=24, tile_frames=8, stride_frames=8)
    whole, cut = decode_latents(codec, latents, tiling=None), decode_latents(codec, latents, tiling=tiling)
    assert not torch.equal(whole, cut)
    with following(decided(decode={"tiling": tiling})):
        assert torch.equal(decode_latents(codec, latents, tiling=None), cut)
    with following(decided(decode={"tiling": None})):
        assert torch.equal(decode_latents(codec, latents, tiling=tiling), whole)


def test_loading_and_sampling_follow_the_plan(tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.vidgen_core import generate as module
    from vidgen.vidgen_core.memory.stream import stream_of

    shape, settings = VideoShape(num_frames=5, height_px=32, width_px=32), Sampling(num_steps=1, cfg=3.0)
    usual = generate(load_bundle(tiny_bundle_dir), "a red star", shape, settings)
    monkeypatch.setattr(module, "denoiser_pair", lambda *given, **more: pytest.fail("both in one forward"))
    plan = decided(encode_prompt={"stream": True}, sample={"stream": True, "room": None, "cfg_batched": False})
    with following(plan):
        bundle = load_bundle(tiny_bundle_dir)
        assert stream_of(bundle.model.network) is not None
        assert stream_of(bundle.text.llama) is not None  # type: ignore[attr-defined]
        video = generate(bundle, "a red star", shape, settings)
    # One forward of two samples and two of one sample round differently.
    torch.testing.assert_close(video, usual, atol=1e-4, rtol=0)


# --- the command line -------------------------------------------------------------------------------------------------


def workflow(tiny_bundle_dir: Path, **size: int) -> dict[str, Any]:
    prompt = shipped("hunyuan_t2v")
    prompt[node_of(prompt, "VidGenLoadAll")]["inputs"]["model_folder"] = str(tiny_bundle_dir)
    prompt[node_of(prompt, "VidGenEmptyLatent")]["inputs"].update(size)
    return prompt


def test_a_wish_is_read_from_a_workflow(tiny_bundle_dir: Path) -> None:
    prompt = workflow(tiny_bundle_dir, width=96, height=64, num_frames=33, batch_size=2)
    sampler = prompt[node_of(prompt, "VidGenSampler")]["inputs"]
    sampler |= {"steps": 7, "cfg": 1.0, "sampler": "heun", "cfg_batched": False}
    headers, found = find_parts(tiny_bundle_dir)
    asked = wish(prompt, headers, found)
    assert asked.shape == VideoShape(num_frames=33, height_px=64, width_px=96)
    assert (asked.num_videos, asked.num_steps, asked.evaluations, asked.guided) == (2, 7, 2.0, False)
    assert not asked.may_batch
    sampler |= {"steps": 0, "cfg": 0.0}
    asked = wish(prompt, headers, found)
    assert (asked.num_steps, asked.guided) == (3, True)  # what the checkpoint recommends


@pytest.mark.parametrize("name", ["hunyuan_t2v", "hunyuan_i2v", "hunyuan_v2v", "hunyuan_inpaint", "hunyuan_low_memory"])
def test_the_shipped_workflows_have_plans(name: str) -> None:
    plan, _, asked = plan_prompt(shipped(name), budget_bytes=10**12, device="cpu")
    assert plan.fits
    assert [stage.name for stage in plan.stages][-3:] == ["sample", "decode", "write"]
    assert asked.encodes_frames == {"hunyuan_t2v": 0, "hunyuan_low_memory": 0, "hunyuan_i2v": 1}.get(
        name, asked.shape.num_frames
    )


def test_the_command(tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(workflow(tiny_bundle_dir)))
    assert main(["plan", str(file), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert [line.split("  ")[0].strip() for line in said.splitlines()] == [
        "encode prompt",
        "sample",
        "decode",
        "write",
        "in all",
    ]
    larger = ["--set", "VidGenEmptyLatent.num_frames=129", "--set", "VidGenEmptyLatent.width=512"]
    assert main(["plan", str(file), "--device", "cpu", "--json", *larger]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["subject"]["frames"], plan["subject"]["width"]) == (129, 512)
    assert main(["plan", str(file), "--device", "cpu", "--budget", "1MB"]) == 1
    assert "does not fit" in capsys.readouterr().err


def test_a_render_keeps_to_its_budget_or_is_refused(
    tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.mp4"
    words = ["generate", "a red star", "--model", str(tiny_bundle_dir), "-o", str(out), "--device", "cpu"]
    assert main([*words, "--budget", "1MB"]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words, "--budget", "100GB"]) == 0
    assert "in all" in capsys.readouterr().err
    assert out.exists()


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_covers_enough() -> None:
    listed = list(cases())
    assert len({case.name for case in listed}) == len(listed) >= 60
    assert {case.stage for case in listed} == {"sample", "decode", "encode", "render"}
    assert sum(case.budget == 0.1 for case in listed) == 6
    cogvideox = [case for case in listed if case.model.startswith("cogvideox")]
    assert len(cogvideox) >= 15
    assert {case.stage for case in cogvideox} == {"sample", "decode", "encode", "render"}
    assert {case.dtype for case in cogvideox} == {"float32", "bfloat16", "float8"}


def test_the_benchmark_adds_up() -> None:
    rows = [
        {"ratio": 1.0, "budget": None, "fits": True, "measured": 1},
        {"ratio": 1.05, "budget": 100, "fits": True, "measured": 101},
        {"ratio": 0.9, "budget": 10, "fits": False, "measured": 30},
    ]
    summary = summarise(rows)
    assert (summary["within_10_percent"], summary["lowest_ratio"], summary["refused_rightly"]) == (2, 1.0, 1)
    assert summary["worst_measured_over_budget"] == 1.01
