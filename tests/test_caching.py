"""Step caches: off is off to the bit, estimates are what their papers say, and nothing outlives a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.blocks import Stream, around_blocks, forward_of
from vidgen.vidgen_core.caching import (
    IDENTITY,
    METHODS,
    CacheRun,
    CacheState,
    CurveRecorder,
    MagnitudeCurve,
    StepCache,
    StepFinder,
    magnitude_ratio,
    polynomial_at,
    relative_change,
)
from vidgen.vidgen_core.errors import Cancelled, SettingsError
from vidgen.vidgen_core.families import FAMILIES
from vidgen.vidgen_core.families.hunyuan.block_rules import BLOCK_RULES, TEACACHE_POLYNOMIAL
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.generate import Sampling, measure_curve, sample_latents
from vidgen.vidgen_core.memory import stream as streaming
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.model import VideoModel, load_network
from vidgen.vidgen_core.tricks import Tricks
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.weights.lora import Lora

CONFIG = NetworkConfig(
    hidden_size=32,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=32,
    pooled_width=32,
    guidance_embed=False,
)
SHAPE = (1, 16, 3, 4, 4)
STEPS = 8
FLAT = MagnitudeCurve(times=(1.0, 0.5, 0.1), ratios={"cond": (1.0, 1.0, 1.0)})
SETTINGS = Sampling(num_steps=STEPS, cfg=3.0, shift=1.0)


def network(seed: int = 0) -> HunyuanVideoTransformer:
    torch.manual_seed(seed)
    made = HunyuanVideoTransformer(CONFIG)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return VideoModel.of("hunyuan", CONFIG, network())


def prompt(seed: int = 1, length: int = 5) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        context=torch.randn(1, length, 32, generator=generator), pooled=torch.randn(1, 32, generator=generator)
    )


def sampled(model: VideoModel, cond: Conditioning | None = None, *, host: Any = None, **changes: Any) -> Tensor:
    settings = replace(SETTINGS, **changes)
    return sample_latents(model, cond or prompt(), prompt(2, 3), SHAPE, settings, host=host)


def cache(method: str, threshold: float, **fields: Any) -> StepCache:
    curve = FLAT if method == "magcache" else None
    return StepCache(method=method, threshold=threshold, curve=curve, **fields)


def with_cache(model: VideoModel, method: str, threshold: float, **fields: Any) -> VideoModel:
    return model.with_tricks(Tricks(cache=cache(method, threshold, **fields)))


def counted(model: VideoModel, number: int) -> list[int]:
    """One entry for each time that the block of this number really runs."""
    ran: list[int] = []
    block = model.network.get_submodule(model.block_paths[number])
    inner = type(block).forward

    def forward(*args: Any) -> Any:
        ran.append(number)
        return inner(block, *args)

    block.forward = forward
    return ran


@pytest.fixture
def ran(model: VideoModel) -> Any:
    """By block number: how often it ran."""
    counts = [counted(model, number) for number in range(4)]
    yield counts
    for path in model.block_paths:
        del model.network.get_submodule(path).forward


# --- off is off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batched", [True, False])
def test_a_threshold_of_zero_changes_no_bit(model: VideoModel, method: str, batched: bool) -> None:
    expected = sampled(model, cfg_batched=batched)
    assert torch.equal(sampled(with_cache(model, method, 0.0), cfg_batched=batched), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_as_it_was_afterwards(model: VideoModel, method: str) -> None:
    sampled(with_cache(model, method, 10.0))
    assert not any("forward" in vars(module) for module in model.network.modules())


def test_quality_off_is_no_cache_at_all() -> None:
    assert all(StepCache.preset(method, "off") is None for method in METHODS)
    assert Tricks().identity is None


# --- what is skipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batched", [True, False])
def test_all_steps_but_the_first_and_last_are_skipped_without_a_limit(
    model: VideoModel, ran: list[list[int]], method: str, batched: bool
) -> None:
    """The extreme: what remains is each stream's first and last step; only first_block runs its first block always."""
    sampled(with_cache(model, method, 1e9, max_skips=100), cfg_batched=batched)
    forwards = STEPS if batched else 2 * STEPS
    computed = 2 if batched else 4
    first = {"first_block": forwards, "teacache": forwards, "magcache": computed}[method]
    assert [len(block) for block in ran] == [first, computed, computed, computed]


def test_no_more_steps_in_a_row_are_skipped_than_allowed(model: VideoModel, ran: list[list[int]]) -> None:
    sampled(with_cache(model, "first_block", 1e9, max_skips=2))
    assert len(ran[3]) == 4  # 0, 3, 6 and the last, 7


def test_the_beginning_and_the_end_can_be_kept(model: VideoModel, ran: list[list[int]]) -> None:
    sampled(with_cache(model, "first_block", 1e9, max_skips=100, start=0.5, end=0.75))
    assert len(ran[3]) == 6  # steps 4 and 5 of 8 are skipped


@pytest.mark.parametrize("method", METHODS)
def test_a_second_look_at_one_time_is_no_gap(model: VideoModel, ran: list[list[int]], method: str) -> None:
    """Heun asks 15 times in 8 steps."""
    out = sampled(with_cache(model, method, 1e9, max_skips=100), sampler="heun")
    assert out.isfinite().all()
    assert 2 <= len(ran[3]) <= 4


def test_a_small_error_and_a_large_one(model: VideoModel) -> None:
    """More skipping, more error, and neither is none."""
    expected = sampled(model)
    errors = [
        float((sampled(with_cache(model, "first_block", 1e9, max_skips=skips)) - expected).norm()) for skips in (1, 6)
    ]
    assert 0 < errors[0] < errors[1]


# --- estimates, in closed form ----------------------------------------------------------------------------------------

TS = torch.linspace(1, 0, 11, dtype=torch.float64)


def decisions(cache: StepCache, evidence: list[Tensor | None], branches: tuple[str, ...] = ("cond",)) -> list[bool]:
    """What is decided at each step, as the blocks would ask."""
    run, state, skipped = CacheRun(cache, TS), CacheState(), []
    for t, item in zip(TS.tolist(), evidence, strict=False):
        skip = run.may_skip(state, t, item, branches)
        if not skip:
            state.residual = torch.ones(1, 1, 1)
        skipped.append(skip)
    assert run.tally.skipped == sum(skipped)
    assert run.tally.forwards == len(skipped)
    return skipped


def constant(*values: float) -> list[Tensor | None]:
    return [torch.full((1, 2, 3), value) for value in values]


def test_first_block_compares_with_the_last_step_that_ran() -> None:
    """1.04 and 1.08 are near 1; 1.12 is not; 1.2 is near 1.12, which ran."""
    assert decisions(cache("first_block", 0.1), constant(1, 1.04, 1.08, 1.12, 1.2)) == [False, True, True, False, True]


def test_teacache_adds_up_changes_from_step_to_step() -> None:
    """0.04 + 0.0385 are below 0.1, with 0.037 they are not; after that the sum begins again."""
    assert decisions(cache("teacache", 0.1), constant(1, 1.04, 1.08, 1.12, 1.16)) == [False, True, True, False, True]


def test_teacache_hears_its_polynomial() -> None:
    doubled = cache("teacache", 0.1, polynomial=(2.0, 0.0))
    assert decisions(doubled, constant(1, 1.04, 1.08, 1.12)) == [False, True, False, True]
    assert polynomial_at((2.0, -3.0, 5.0), 4.0) == 2 * 16 - 3 * 4 + 5
    assert polynomial_at(IDENTITY, 0.37) == 0.37


def test_magcache_adds_up_what_the_curve_says() -> None:
    """|1 - 0.95|, then + |1 - 0.95**2| is over 0.12."""
    times = tuple(TS.tolist()[:-1])
    curve = MagnitudeCurve(times=times, ratios={"cond": (1.0, *[0.95] * 9), "uncond": (1.0, *[0.9] * 9)})
    only = StepCache(method="magcache", threshold=0.12, curve=curve)
    assert decisions(only, [None] * 7) == [False, True, False, True, False, True, False]
    # a batch of both goes by the one that changes more: |1 - 0.9| + |1 - 0.81| = 0.29
    assert decisions(replace(only, threshold=0.28), [None] * 4, ("cond", "uncond")) == [False, True, False, True]
    assert decisions(replace(only, threshold=0.28), [None] * 4) == [False, True, True, False]


def test_a_gap_between_steps_computes() -> None:
    """Guidance that acts only in an interval leaves a branch alone for a while."""
    run, state = CacheRun(cache("first_block", 1e9, max_skips=100), TS), CacheState()
    evidence = torch.ones(1, 2, 3)
    answers = []
    for t in (1.0, 0.9, 0.4, 0.3):
        answers.append(run.may_skip(state, t, evidence, ("cond",)))
        state.residual = evidence
    assert answers == [False, True, False, True]


def test_the_change_is_that_of_the_sample_that_changed_most() -> None:
    before = torch.tensor([1.0, 2.0, 0.0]).reshape(3, 1, 1)
    assert relative_change(before[:2] * torch.tensor([1.1, 1.5]).reshape(2, 1, 1), before[:2]) == pytest.approx(0.5)
    assert relative_change(before, before) == math.inf  # nothing can be said of a sample that is all 0


def test_published_coefficients_are_for_the_published_network_only() -> None:
    polynomial = FAMILIES["hunyuan"].block_rules.polynomial
    assert polynomial(NetworkConfig()) == TEACACHE_POLYNOMIAL
    assert polynomial(NetworkConfig(in_channels=33, image_condition="latent_concat")) == TEACACHE_POLYNOMIAL
    assert polynomial(CONFIG) is None


# --- the curve --------------------------------------------------------------------------------------------------------


def test_ratios_multiply_along_the_curve() -> None:
    curve = MagnitudeCurve(times=(1.0, 0.75, 0.5, 0.25), ratios={"cond": (1.0, 0.5, 0.25, 2.0)})
    assert curve.ratio("cond", 1.0, 0.75) == pytest.approx(0.5)
    assert curve.ratio("cond", 1.0, 0.5) == pytest.approx(0.125)
    assert curve.ratio("cond", 0.75, 0.25) == pytest.approx(0.5)
    assert curve.ratio("cond", 0.75, 0.625) == pytest.approx(0.5)  # half the way: the root of 0.25
    assert curve.ratio("cond", 0.25, 0.0) == 1.0
    assert curve.ratio("uncond", 1.0, 0.75) == pytest.approx(0.5)


def test_a_curve_is_text_and_back() -> None:
    curve = MagnitudeCurve(times=(1.0, 0.5), ratios={"cond": (1.0, 0.75)}, checkpoint="abc")
    assert MagnitudeCurve.from_json(curve.to_json()) == curve


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "no", '{"format": 1, "times": [1]}'])
def test_a_damaged_curve_says_so(text: str) -> None:
    with pytest.raises(SettingsError, match="magnitude curve"):
        MagnitudeCurve.from_json(text)


@pytest.mark.parametrize(
    ("times", "ratios"), [((1.0,), (1.0,)), ((0.5, 1.0), (1.0, 1.0)), ((1.0, 0.5), (1.0,)), ((1.0, 0.5), (1.0, -1.0))]
)
def test_a_curve_that_cannot_be(times: tuple[float, ...], ratios: tuple[float, ...]) -> None:
    with pytest.raises(SettingsError, match="magnitude curve"):
        MagnitudeCurve(times=times, ratios={"cond": ratios})


def test_the_recorder_measures_the_mean_ratio_of_tokens() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]])
    now = torch.tensor([[[6.0, 8.0], [4.0, 0.0], [1.0, 1.0]]])
    assert magnitude_ratio(now, before) == 3.0  # (2 + 4) / 2; the token that was 0 is left out
    recorder = CurveRecorder()
    recorder.note(("cond", "uncond"), 1.0, torch.cat([before, now]), None)
    recorder.note(("cond", "uncond"), 0.5, torch.cat([now, now]), torch.cat([before, now]))
    recorder.note(("cond", "uncond"), 0.5, torch.cat([now, before]), torch.cat([now, now]))  # Heun's second look
    assert recorder.curve("x").ratios == {"cond": (1.0, 3.0), "uncond": (1.0, 1.0)}


@pytest.mark.parametrize("batched", [True, False])
def test_a_calibration_run_measures_every_step_of_both_branches(model: VideoModel, batched: bool) -> None:
    settings = replace(SETTINGS, cfg_batched=batched)
    curve = measure_curve(with_cache(model, "first_block", 1e9), prompt(), prompt(2, 3), SHAPE, settings)
    assert curve.times == pytest.approx([1 - i / STEPS for i in range(STEPS)])
    assert set(curve.ratios) == {"cond", "uncond"}
    assert all(0.5 < ratio < 2 for values in curve.ratios.values() for ratio in values)
    assert MagnitudeCurve.from_json(curve.to_json()).times == pytest.approx(curve.times, abs=1e-6)


def test_a_calibrated_curve_says_what_the_residual_does(model: VideoModel) -> None:
    """Measured again by hand from the blocks' input and output."""
    curve = measure_curve(model, prompt(), None, SHAPE, replace(SETTINGS, cfg=1.0))
    residuals: list[Tensor] = []
    ends: dict[str, Tensor] = {}
    first = model.network.double_blocks[0].register_forward_pre_hook(
        lambda block, args: ends.update(start=args[0].clone())
    )
    last = model.network.single_blocks[-1].register_forward_hook(
        lambda block, args, out: residuals.append(out[:, : ends["start"].shape[1]] - ends["start"])
    )
    sampled(model, cfg=1.0)
    first.remove()
    last.remove()
    ratios = [magnitude_ratio(now, before) for before, now in zip(residuals, residuals[1:], strict=False)]
    assert list(curve.ratios["cond"][1:]) == pytest.approx(ratios, rel=1e-6)


# --- streams are apart ------------------------------------------------------------------------------------------------


def test_streams_do_not_hear_of_each_other(model: VideoModel) -> None:
    """Two conditionings in turn through one cache answer as each alone."""
    ts, x = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64), torch.randn(SHAPE)

    def asked(*conds: Conditioning) -> list[list[Tensor]]:
        run, streams = CacheRun(cache("first_block", 2.0), ts), [Stream() for _ in conds]
        answers: list[list[Tensor]] = [[] for _ in conds]
        with torch.no_grad(), around_blocks(model.network, model.block_paths, BLOCK_RULES, cache=run):
            for t in ts[:-1]:
                for cond, stream, row in zip(conds, streams, answers, strict=True):
                    with forward_of(stream, t, (3, 2, 2)):
                        row.append(model.predict(x * t, t, cond))
        assert run.tally.skipped > 0
        return answers

    one, two = prompt(1), prompt(7)
    together, alone = asked(one, two), (asked(one)[0], asked(two)[0])
    for row, expected in zip(together, alone, strict=True):
        assert all(map(torch.equal, row, expected))


@pytest.mark.parametrize("method", METHODS)
def test_another_prompt_and_a_cancelled_run_begin_clean(model: VideoModel, method: str) -> None:
    cached, other = with_cache(model, method, 1e9), prompt(9)
    expected = sampled(cached, other)
    stops = LocalHost(on_progress=lambda what, done, total: stops.cancel() if done == 3 else None)
    with pytest.raises(Cancelled):
        sampled(cached, host=stops)
    assert not any("forward" in vars(module) for module in model.network.modules())
    assert torch.equal(sampled(cached, other), expected)


def test_samples_of_a_batch_are_as_alone(model: VideoModel) -> None:
    cached = with_cache(model, "first_block", 0.5)
    both = sample_latents(cached, prompt(), prompt(2, 3), (2, *SHAPE[1:]), SETTINGS)
    assert torch.equal(both[:1], sampled(cached))
    assert torch.equal(both[1:], sampled(cached, seed=1))


class StopAt(LocalHost):
    """Cancels after some steps."""

    def progress(self, what: str, done: int, total: int) -> None:
        if done == 4:
            self.cancel()


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_begins_with_an_empty_memory(model: VideoModel, method: str, tmp_path: Path) -> None:
    """It is, to the bit, the run whose cache was emptied at that step; and without skipping, the uninterrupted one."""
    cached, path = with_cache(model, method, 1e9), tmp_path / "run"
    with pytest.raises(Cancelled):
        sampled(cached, host=StopAt(), resume_path=path)
    resumed = sampled(cached, resume_path=path)
    path.unlink()
    with pytest.raises(Cancelled):
        sampled(cached, host=StopAt(), resume_path=path)
    assert torch.equal(sampled(cached, resume_path=path), resumed)
    uninterrupted = sampled(cached)
    assert not torch.equal(resumed, uninterrupted)
    assert float((resumed - sampled(model)).norm()) < 2 * float((uninterrupted - sampled(model)).norm())


def test_a_run_is_not_resumed_with_another_cache(model: VideoModel, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Cancelled):
        sampled(with_cache(model, "first_block", 0.5), host=StopAt(), resume_path=path)
    with pytest.raises(SettingsError, match="another tricks"):
        sampled(with_cache(model, "first_block", 0.6), resume_path=path)


# --- with the rest of the house ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_skipped_blocks_are_not_read_from_the_file(
    published: Callable[..., Path], model: VideoModel, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is read ahead: the first block when a step begins, the second one while the first one runs. A read
    that has not begun when it turns out to be for nothing is called off."""
    path = published("safetensors", tmp_path, dict(model.network.state_dict()))
    read: list[int] = []
    begin = streaming.FileFeed.__init__

    def counting(self: Any, inner: Any, *finish: Any) -> None:
        begin(self, lambda number: (read.append(number), inner(number))[1], *finish)

    monkeypatch.setattr(streaming.FileFeed, "__init__", counting)
    resident, streamed = load_network(path), load_network(path, stream=True)
    out = sampled(with_cache(streamed, method, 1e9, max_skips=100))
    first, second, *rest = (read.count(number) for number in range(4))
    assert rest == [2, 2]
    assert 2 <= first <= STEPS if method == "magcache" else first == STEPS
    assert 2 <= second <= (2 if method == "magcache" else STEPS)
    assert all(parameter.is_meta for parameter in streamed.network.single_blocks.parameters())
    assert torch.equal(out, sampled(with_cache(resident, method, 1e9, max_skips=100)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["runtime", "merge"])
def test_loras_act_inside_of_a_cache(model: VideoModel, method: str, mode: str) -> None:
    generator = torch.Generator().manual_seed(3)
    pairs = {
        "double_blocks.0.img_attn_qkv": (96, 32),
        "single_blocks.0.linear1": (96 + 128, 32),
        "double_blocks.0.img_mod.linear": (6 * 32, 32),
    }
    tensors = {}
    for name, (rows, columns) in pairs.items():
        tensors[f"{name}.lora_down.weight"] = 0.3 * torch.randn(2, columns, generator=generator)
        tensors[f"{name}.lora_up.weight"] = 0.3 * torch.randn(rows, 2, generator=generator)
    lora = lora_of(tensors)
    changed = model.with_lora(lora, mode=mode)
    expected = sampled(changed)
    assert not torch.equal(expected, sampled(model))
    assert torch.equal(sampled(with_cache(changed, method, 0.0)), expected)
    assert not any("forward" in vars(module) for module in model.network.modules())


def lora_of(tensors: dict[str, Tensor]) -> Lora:
    import tempfile

    from safetensors.torch import save_file

    from vidgen.vidgen_core.weights.lora import read_lora

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}, path)
        return read_lora(path)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StepCache(method="teacash", threshold=0.1), 'did you mean "teacache"'),
        (lambda: StepCache.preset("first_block", "quick"), "quality"),
        (lambda: StepCache.preset("first", "fast"), "no such step cache"),
        (lambda: StepCache(method="first_block", threshold=-1), "threshold"),
        (lambda: StepCache(method="first_block", threshold=math.nan), "threshold"),
        (lambda: StepCache(method="first_block", threshold=0.1, max_skips=0), "skips in a row"),
        (lambda: StepCache(method="first_block", threshold=0.1, start=1.5), "start"),
        (lambda: StepCache.preset("magcache", "fast"), "Calibrate Cache"),
    ],
)
def test_unusable_caches_say_what_to_do(make: Callable[[], object], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        make()


def test_a_curve_of_another_model_is_refused(model: VideoModel) -> None:
    curve = replace(FLAT, checkpoint="other")
    known = replace(model, fingerprint="this")
    with pytest.raises(SettingsError, match="another model"):
        known.with_tricks(Tricks(cache=StepCache(method="magcache", threshold=0.1, curve=curve)))


def test_steps_are_found_by_their_time() -> None:
    finder = StepFinder(TS)
    assert [finder.at(float(t)) for t in TS] == list(range(11))
    assert finder.at(0.89) == 1
