"""Combinators around a network: closed forms, and off is off to the bit, one by one and all together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.blocks import Stream, Weakening, around_blocks, block_numbers, forward_of
from vidgen.vidgen_core.caching import MagnitudeCurve, StepCache
from vidgen.vidgen_core.diffusion import flow_matching, scaled_linear_table, vp
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.hunyuan.block_rules import BLOCK_RULES
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.generate import Sampling, sample_latents
from vidgen.vidgen_core.guidance import away_from, cfg, cfg_zero_star, once, rescale_guidance, zero_init
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.nn.attention import attention
from vidgen.vidgen_core.nn.attention_change import (
    changed_attention,
    cross_frame_intensity,
    enhanced,
    own_value_only,
)
from vidgen.vidgen_core.nn.parallel import Team, in_team
from vidgen.vidgen_core.nn.rope import TimeStretch, intrinsic_component, rope_table, stretched_time, time_stretch
from vidgen.vidgen_core.tricks import CfgZero, Enhance, Riflex, Tricks, WeakPass
from vidgen.vidgen_core.types import Conditioning, Held
from vidgen.vidgen_core.windows import Windows

FLOW = flow_matching()
SHAPE = (2, 3, 4, 2, 2)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, V, U = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
T = torch.tensor(0.5, dtype=torch.float64)


def says(output: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser of a network with this output."""
    return lambda x, t: FLOW.to_x0(x, output, t)


def output_of(denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return FLOW.target(denoise(X, T), X, T)


# --- CFG-Zero* --------------------------------------------------------------------------------------------------------


def test_the_optimised_scale_is_the_projection() -> None:
    """Equation 7, sample by sample; float64 rounding of a few hundred sums."""
    out = output_of(cfg_zero_star(says(V), says(U), 3.0, FLOW))
    s = (V * U).flatten(1).sum(1) / U.flatten(1).square().sum(1)
    s = s.reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close(out, s * U + 3.0 * (V - s * U), rtol=0, atol=1e-12)
    along = ((V - s * U) * U).flatten(1).sum(1)
    assert along.abs().max() < 1e-12, "what is guided along has nothing in common with u"


@pytest.mark.parametrize("factor", [0.25, 1.0, -2.0])
def test_parallel_outputs_leave_nothing_to_guide_along(factor: float) -> None:
    """v = a u: s is a, and any scale gives v."""
    out = output_of(cfg_zero_star(says(factor * U), says(U), 7.0, FLOW))
    torch.testing.assert_close(out, factor * U, rtol=0, atol=1e-12)


def test_a_scale_of_one_is_the_prompt_alone_and_asks_nothing_else() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked")

    assert torch.equal(cfg_zero_star(says(V), never, 1.0, FLOW)(X, T), says(V)(X, T))


def test_an_output_of_zero_is_no_division_by_it() -> None:
    out = output_of(cfg_zero_star(says(V), says(torch.zeros_like(U)), 2.0, FLOW))
    torch.testing.assert_close(out, 2 * V, rtol=0, atol=1e-12)


def test_each_network_is_asked_once() -> None:
    asked: list[str] = []

    def counting(name: str, output: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def denoise(x: Tensor, t: Tensor) -> Tensor:
            asked.append(name)
            return FLOW.to_x0(x, output, t)

        return denoise

    cond = once(counting("cond", V))
    guided = cfg_zero_star(cond, counting("uncond", U), 3.0, FLOW)
    away_from(guided, cond, counting("weak", X), lambda t: 1.0)(X, T)
    assert sorted(asked) == ["cond", "uncond", "weak"]
    assert torch.equal(cond(X, T.clone()), says(V)(X, T))
    assert asked.count("cond") == 2, "another question is asked anew"


def test_the_first_steps_stand_still_and_ask_nothing() -> None:
    denoise = zero_init(says(V), FLOW, 0.8)
    for t in (1.0, 0.9):
        time = torch.tensor(t, dtype=torch.float64)
        assert FLOW.target(denoise(X, time), X, time).abs().max() < 1e-14
    assert torch.equal(denoise(X, T), says(V)(X, T))


# --- weak passes ------------------------------------------------------------------------------------------------------


def test_away_from_is_a_line() -> None:
    guided = cfg(says(V), says(U), 3.0)
    out = away_from(guided, says(V), says(X), lambda t: 0.5)(X, T)
    strong, weak = says(V)(X, T), says(X)(X, T)
    torch.testing.assert_close(out, guided(X, T) + 0.5 * (strong - weak), rtol=0, atol=1e-14)
    rescaled = away_from(guided, says(V), says(X), lambda t: 0.5, rescale=0.7)(X, T)
    torch.testing.assert_close(rescaled, rescale_guidance(out, strong, 0.7), rtol=0, atol=1e-14)


def test_a_scale_of_zero_asks_no_weak_network() -> None:
    def never(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("asked")

    weak = WeakPass(scale=2.0, start=0.4, end=0.2)
    out = away_from(says(V), says(V), never, weak.scale_at, rescale=1.0)(X, T)
    assert torch.equal(out, says(V)(X, T))
    assert [weak.scale_at(t) for t in (0.5, 0.4, 0.3, 0.2, 0.1)] == [0, 2, 2, 2, 0]


PATHS = [*(f"double_blocks.{i}" for i in range(4)), *(f"single_blocks.{i}" for i in range(8))]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", set()),
        (" , ", set()),
        ("auto", {4}),
        ("7", {7}),
        ("2-4", {2, 3, 4}),
        ("double_blocks.1-2, single_blocks.0", {1, 2, 4}),
        ("single.*", set(range(4, 12))),
        ("0\n11", {0, 11}),
    ],
)
def test_blocks_are_found_by_number_and_by_name(text: str, numbers: set[int]) -> None:
    assert block_numbers(text, PATHS) == numbers


@pytest.mark.parametrize("text", ["12", "triple_blocks.0", "1, 90-95", "double_blocks.4"])
def test_a_block_that_is_not_there_is_told(text: str) -> None:
    with pytest.raises(SettingsError, match="no such block"):
        block_numbers(text, PATHS)


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_is_changed_inside_the_block_only() -> None:
    q, k, v = (randn(1, 2, 6, 4, seed=seed) for seed in (1, 2, 3))
    plain = attention(q, k, v)
    with changed_attention(own_value_only):
        assert attention(q, k, v) is v
        with changed_attention(None):
            assert torch.equal(attention(q, k, v), plain)
    with pytest.raises(KeyboardInterrupt), changed_attention(own_value_only):
        raise KeyboardInterrupt
    assert torch.equal(attention(q, k, v), plain)


def test_even_attention_has_the_intensity_of_one_frame() -> None:
    """q = 0: every map is 1 / frames everywhere, so the mean beside the diagonal is that, too."""
    zero = torch.zeros(2, 3, 5 * 4, 8)
    assert cross_frame_intensity(zero, zero, 5).item() == pytest.approx(1 / 5)


def test_the_intensity_is_that_of_the_temporal_maps() -> None:
    """Map by map, as the paper says it: the mean of the entries beside the diagonal."""
    frames, places = 3, 4
    q, k = (randn(2, 2, frames * places, 8, seed=seed) for seed in (1, 2))
    values = []
    for sample in range(2):
        for head in range(2):
            for place in range(places):
                own_q, own_k = (x[sample, head, place::places] for x in (q, k))
                scores = (own_q @ own_k.T / math.sqrt(8)).softmax(dim=-1)
                values += [scores[i, j] for i in range(frames) for j in range(frames) if i != j]
    # the scores are rounded to float32 on the way
    assert cross_frame_intensity(q, k, frames).item() == pytest.approx(float(torch.stack(values).mean()), abs=1e-6)


def test_even_attention_is_enhanced_by_weight_over_frames() -> None:
    """(frames + weight) / frames, for the video's tokens and no others."""
    zero, v = torch.zeros(1, 2, 5 * 3 + 2, 4), randn(1, 2, 17, 4).float()
    plain = attention(zero, zero, v)
    with changed_attention(enhanced(2.0, 5, slice(0, 15))):
        out = attention(zero, zero, v)
    torch.testing.assert_close(out[:, :, :15], plain[:, :, :15] * 7 / 5)
    assert torch.equal(out[:, :, 15:], plain[:, :, 15:])


def test_attention_that_keeps_to_its_frame_is_not_weakened() -> None:
    """Scores of 100 on the diagonal: nothing beside it, and a factor of 0 is clamped to 1."""
    q = (10 * torch.eye(4)).repeat_interleave(1, dim=0).reshape(1, 1, 4, 4) * 4
    v = randn(1, 1, 4, 4).float()
    plain = attention(q, q, v)
    with changed_attention(enhanced(3.0, 4, slice(0, 4))):
        assert torch.equal(attention(q, q, v), plain)


# --- RIFLEx -----------------------------------------------------------------------------------------------------------


def angles(table: Tensor) -> Tensor:
    return torch.atan2(table[..., 1], table[..., 0]).squeeze(1)


def test_the_published_frequencies_are_found() -> None:
    """The paper's k = 4 for HunyuanVideo (129 frames, 33 latents) and 2 for CogVideoX-5B (49 frames, 13 latents)."""
    assert intrinsic_component(16, 256.0, 33) + 1 == 4
    assert intrinsic_component(16, 10000.0, 13) + 1 == 2
    assert intrinsic_component(4, 10000.0, 10**6) == 1  # none is slow enough: the slowest


@pytest.mark.parametrize("length", [49, 66])
def test_one_frequency_turns_nine_tenths_over_the_video(length: int) -> None:
    """Tencent's own code for more than 192 frames: frequency k - 1 becomes 0.9 * 2 pi / L."""
    plain = rope_table((length, 1, 1), (16, 2, 2), 256.0, device=torch.device("cpu"))
    stretch = TimeStretch(component=3, trained_length=33)
    slow = rope_table((length, 1, 1), (16, 2, 2), 256.0, device=torch.device("cpu"), stretch=stretch)
    assert angles(slow)[1, 3].item() == pytest.approx(0.9 * 2 * math.pi / length, rel=1e-6)
    rest = [0, 1, 2, *range(4, 10)]
    assert torch.equal(slow[:, :, rest], plain[:, :, rest])


def test_a_video_that_is_not_too_long_is_not_stretched() -> None:
    stretch = TimeStretch(component=3, trained_length=33)
    arguments: tuple[Any, ...] = ((33, 2, 2), (16, 4, 4), 256.0)
    plain = rope_table(*arguments, device=torch.device("cpu"))
    assert torch.equal(rope_table(*arguments, device=torch.device("cpu"), stretch=stretch), plain)
    # 40 frames would turn it 0.8 times already: nothing is made faster
    long: tuple[Any, ...] = ((40, 2, 2), (16, 4, 4), 256.0)
    plain = rope_table(*long, device=torch.device("cpu"))
    assert torch.equal(rope_table(*long, device=torch.device("cpu"), stretch=stretch), plain)


def test_a_stretch_ends_with_its_block() -> None:
    stretch = TimeStretch(component=0, trained_length=1)
    with stretched_time(stretch):
        assert time_stretch() is stretch
    with pytest.raises(KeyboardInterrupt), stretched_time(stretch):
        raise KeyboardInterrupt
    assert time_stretch() is None


# --- on a network -----------------------------------------------------------------------------------------------------

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
LATENTS = (1, 16, 5, 4, 4)
SETTINGS = Sampling(num_steps=3, cfg=3.0, shift=1.0)
FLAT = MagnitudeCurve(times=(1.0, 0.1), ratios={"cond": (1.0, 1.0)})


@pytest.fixture(scope="module")
def model() -> VideoModel:
    torch.manual_seed(0)
    network = HunyuanVideoTransformer(CONFIG)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    made = VideoModel.of("hunyuan", CONFIG, network.eval())
    return replace(made, defaults=replace(made.defaults, num_frames=9))


def prompt(seed: int = 1, length: int = 5, **fields: Any) -> Conditioning:
    context, pooled = randn(1, length, 32, seed=seed).float(), randn(1, 32, seed=seed).float()
    return Conditioning(context=context, pooled=pooled, **fields)


def sampled(model: VideoModel, cond: Conditioning | None = None, **changes: Any) -> Tensor:
    settings = replace(SETTINGS, **changes)
    return sample_latents(model, cond or prompt(), prompt(2, 3), LATENTS, settings)


@pytest.fixture(scope="module")
def plain(model: VideoModel) -> Tensor:
    return sampled(model)


NOTHING = {
    "skip no layers": {"skip_layers": WeakPass(blocks="", scale=3.0)},
    "skip with scale 0": {"skip_layers": WeakPass(scale=0.0)},
    "skip at no time": {"skip_layers": WeakPass(scale=3.0, start=0.01, end=0.0)},
    "stg on no layers": {"stg": WeakPass(blocks=" ", attention_only=True)},
    "stg with scale 0": {"stg": WeakPass(scale=0.0, attention_only=True, rescale=0.7)},
    "enhance by 0": {"enhance": Enhance(weight=0.0)},
    "riflex on a trained length": {"riflex": Riflex(trained_length=5)},
    "a window as long as the video": {"windows": Windows(size=5, overlap=2, shuffle_noise=True)},
    "a longer window in a loop": {"windows": Windows(size=9, overlap=2, schedule="looped")},
    "cfg-zero without either half": {"cfg_zero": CfgZero(zero_steps=0, projected=False)},
    "a cache that never skips": {"cache": StepCache(method="teacache", threshold=0.0)},
}


@pytest.mark.parametrize("tricks", NOTHING.values(), ids=NOTHING.keys())
def test_what_cannot_act_changes_no_bit(model: VideoModel, plain: Tensor, tricks: dict[str, Any]) -> None:
    assert torch.equal(sampled(model.with_tricks(Tricks(**tricks))), plain)


def test_all_of_that_together_changes_no_bit(model: VideoModel, plain: Tensor) -> None:
    everything = Tricks(
        windows=Windows(size=5, shuffle_noise=True),
        cfg_zero=CfgZero(zero_steps=0, projected=False),
        skip_layers=WeakPass(scale=0.0),
        stg=WeakPass(blocks="", attention_only=True),
        riflex=Riflex(trained_length=5),
        cache=StepCache(method="first_block", threshold=0.0),
        enhance=Enhance(weight=0.0),
    )
    assert torch.equal(sampled(model.with_tricks(everything)), plain)


SOMETHING = {
    "skip": {"skip_layers": WeakPass(scale=1.0)},
    "skip first and last": {"skip_layers": WeakPass(blocks="0, 3", scale=1.0)},
    "stg": {"stg": WeakPass(attention_only=True)},
    "stg block": {"stg": WeakPass(rescale=0.7)},
    "cfg-zero": {"cfg_zero": CfgZero()},
    "enhance": {"enhance": Enhance(weight=2.0)},
    "windows": {"windows": Windows(size=3, overlap=1)},
    "noise": {"windows": Windows(size=3, overlap=1, shuffle_noise=True)},
    "shared": {"windows": Windows(size=3, overlap=1, share_first=True)},
    "looped": {"windows": Windows(size=3, overlap=1, schedule="looped")},
}


@pytest.mark.parametrize("tricks", SOMETHING.values(), ids=SOMETHING.keys())
def test_what_can_act_does_and_leaves_nothing_behind(model: VideoModel, plain: Tensor, tricks: dict[str, Any]) -> None:
    changed = model.with_tricks(Tricks(**tricks))
    first = sampled(changed)
    assert first.isfinite().all()
    assert not torch.equal(first, plain)
    assert not any("forward" in vars(module) for module in model.network.modules())
    assert torch.equal(sampled(changed), first)
    assert torch.equal(sampled(model), plain)
    # another batch size takes other kernels; random weights amplify float32 rounding about tenfold
    torch.testing.assert_close(sampled(changed, cfg_batched=False), first, rtol=0, atol=2e-3)


def test_they_all_work_together(model: VideoModel) -> None:
    everything = Tricks(
        windows=Windows(size=3, overlap=1, shuffle_noise=True),
        cfg_zero=CfgZero(),
        skip_layers=WeakPass(blocks="1", scale=0.5),
        stg=WeakPass(blocks="2", attention_only=True, rescale=0.7),
        riflex=Riflex(trained_length=2),
        cache=StepCache(method="magcache", threshold=1.0, max_skips=1, curve=FLAT),
        enhance=Enhance(weight=1.0),
    )
    out = sampled(model.with_tricks(everything), num_steps=6)
    assert out.isfinite().all()
    assert not any("forward" in vars(module) for module in model.network.modules())


def asked(model: VideoModel, stream: Stream, x: Tensor, **around: Any) -> Tensor:
    t = torch.tensor(0.5, dtype=torch.float64)
    around_all = around_blocks(model.network, model.block_paths, BLOCK_RULES, **around)
    with torch.no_grad(), around_all, forward_of(stream, t, (x.shape[2], 2, 2)):
        return model.predict(x, t, prompt())


@pytest.mark.parametrize(
    "tricks",
    [
        Tricks(cache=StepCache.preset("first_block", "fast")),
        Tricks(stg=WeakPass(blocks="1", scale=1.0)),
        Tricks(enhance=Enhance(weight=1.0)),
    ],
)
def test_what_looks_at_all_tokens_is_refused_on_several_processes(model: VideoModel, tricks: Tricks) -> None:
    with in_team(Team(rank=0, size=2)), pytest.raises(SettingsError, match="by several processes together"):
        sampled(model.with_tricks(tricks))


def test_a_skipped_block_is_a_network_without_it(model: VideoModel) -> None:
    x = randn(*LATENTS).float()
    for number in range(4):
        out = asked(model, Stream(weakening=Weakening(skipped=frozenset({number}))), x)
        torch.manual_seed(0)
        double, single = (
            [n for n in range(2) if n != number],
            [n for n in range(2) if n + 2 != number],
        )
        smaller = replace(CONFIG, num_double_blocks=len(double), num_single_blocks=len(single))
        network = HunyuanVideoTransformer(smaller)
        state = {
            name: tensor
            for name, tensor in model.network.state_dict().items()
            if not name.startswith(("double", "single"))
        }
        for kind, kept in (("double_blocks", double), ("single_blocks", single)):
            for new, old in enumerate(kept):
                block = getattr(model.network, kind)[old].state_dict()
                state |= {f"{kind}.{new}.{name}": tensor for name, tensor in block.items()}
        network.load_state_dict(state)
        with torch.no_grad():
            expected = VideoModel.of("hunyuan", smaller, network).predict(x, torch.tensor(0.5), prompt())
        assert torch.equal(out, expected)


def test_unattending_blocks_give_attention_its_own_values(model: VideoModel) -> None:
    """What the projection after attention is given are the values, bit for bit."""
    x = randn(*LATENTS).float()
    seen: list[bool] = []
    block = model.network.double_blocks[1]

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(bool(torch.equal(inputs[0], values[: inputs[0].shape[1]].unsqueeze(0))))

    values: Tensor = torch.empty(0)

    def keep(layer: nn.Module, inputs: Any, out: Tensor) -> None:
        nonlocal values
        values = out[0, :, 64:]

    hooks = [block.img_attn_qkv.register_forward_hook(keep), block.img_attn_proj.register_forward_pre_hook(watch)]
    asked(model, Stream(weakening=Weakening(unattending=frozenset({1}))), x)
    asked(model, Stream(weakening=Weakening(unattending=frozenset({0}))), x)
    for hook in hooks:
        hook.remove()
    assert seen == [True, False]


def test_a_weak_pass_is_added_to_the_guided_answer(model: VideoModel) -> None:
    """One step from noise to clean is one answer of the denoiser, so the result is the line itself."""
    one = {"num_steps": 1, "cfg": 1.0}
    strong = sampled(model, **one)
    # at t = 1 the whole network is asked once; a push of -1 away from weak and +1 differ by twice the difference
    up, down = (
        sampled(model.with_tricks(Tricks(skip_layers=WeakPass(blocks="1", scale=scale))), **one)
        for scale in (1.0, -1.0)
    )
    torch.testing.assert_close((up + down) / 2, strong, rtol=0, atol=1e-5)
    twice = sampled(model.with_tricks(Tricks(skip_layers=WeakPass(blocks="1", scale=2.0))), **one)
    torch.testing.assert_close(twice - strong, 2 * (up - strong), rtol=0, atol=1e-5)


def test_zero_steps_are_no_steps_of_a_changed_video(model: VideoModel) -> None:
    """A run that starts from given latents has no first steps in this sense."""
    start = randn(*LATENTS).float()
    settings = replace(SETTINGS, denoise=0.5)
    zero = model.with_tricks(Tricks(cfg_zero=CfgZero(zero_steps=2, projected=False)))
    expected, found = (sample_latents(m, prompt(), prompt(2, 3), LATENTS, settings, start=start) for m in (model, zero))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("schedule", ["static", "uniform"])
def test_held_frames_stay_in_windows(model: VideoModel, schedule: str) -> None:
    still = randn(*LATENTS, seed=5).float()
    mask = torch.zeros(1, 1, 5, 1, 1, dtype=torch.bool)
    mask[:, :, 0] = True
    windows = model.with_tricks(Tricks(windows=Windows(size=3, overlap=1, schedule=schedule)))
    seen: list[Tensor] = []
    hook = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["x"][:1, :, 0].clone()), with_kwargs=True
    )
    out = sampled(windows, prompt(held=Held(latents=still, mask=mask)))
    hook.remove()
    assert torch.equal(out[:, :, 0], still[:, :, 0])
    assert all(torch.equal(first, still[:, :, 0]) for first in seen), "every window sees the given frame"


def test_a_batch_in_windows_is_as_its_samples(model: VideoModel) -> None:
    windows = model.with_tricks(Tricks(windows=Windows(size=3, overlap=1, schedule="uniform", shuffle_noise=True)))
    both = sample_latents(windows, prompt(), prompt(2, 3), (2, *LATENTS[1:]), SETTINGS)
    assert torch.equal(both[:1], sampled(windows))
    assert torch.equal(both[1:], sampled(windows, seed=1))


@pytest.mark.parametrize(("schedule", "computed"), [("static", 2 * 2), ("uniform", 2 + 1 + 0 + 3)])
def test_windows_have_a_memory_each(model: VideoModel, schedule: str, computed: int) -> None:
    """Of 4 steps the first and the last compute in each window; a window that has just come computes, too: frames 1 to
    3 in the second step, and again in the last."""
    cache = StepCache(method="magcache", threshold=1.0, max_skips=100, curve=FLAT)
    tricks = Tricks(windows=Windows(size=3, overlap=1, schedule=schedule), cache=cache)
    ran: list[int] = []
    hook = model.network.single_blocks[1].linear1.register_forward_hook(lambda *args: ran.append(1))
    sampled(model.with_tricks(tricks), num_steps=4)
    hook.remove()
    assert len(ran) == computed


def test_a_longer_video_is_stretched_and_a_network_is_told_nothing(model: VideoModel) -> None:
    """9 frames are 3 latents; 8 latents turn the first frequency 0.9 times, as a base that gives it would."""
    x = randn(1, 16, 8, 4, 4).float()
    riflex = model.with_tricks(Tricks(riflex=Riflex()))
    with torch.no_grad(), riflex.patched():
        out = riflex.predict(x, torch.tensor(0.5), prompt())
    with torch.no_grad(), stretched_time(TimeStretch(component=0, trained_length=3)):
        assert torch.equal(model.predict(x, torch.tensor(0.5), prompt()), out)
    with torch.no_grad():
        assert not torch.equal(model.predict(x, torch.tensor(0.5), prompt()), out)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeakPass(scale=math.nan), "scale"),
        (lambda: WeakPass(start=0.2, end=0.4), "start >= end"),
        (lambda: WeakPass(rescale=1.5), "rescale"),
        (lambda: CfgZero(zero_steps=-1), "zero steps"),
        (lambda: Enhance(weight=math.inf), "weight"),
        (lambda: Riflex(trained_length=0), "RIFLEx"),
    ],
)
def test_unusable_settings_say_what_to_do(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()


def test_a_model_refuses_what_it_cannot_do(model: VideoModel) -> None:
    with pytest.raises(SettingsError, match="no such block"):
        model.with_tricks(Tricks(skip_layers=WeakPass(blocks="17")))
    with pytest.raises(SettingsError, match="no such frequency"):
        model.with_tricks(Tricks(riflex=Riflex(component=2)))
    curved = replace(model, diffusion=vp(scaled_linear_table()))
    with pytest.raises(SettingsError, match="flow matching"):
        curved.with_tricks(Tricks(cfg_zero=CfgZero(zero_steps=1)))
    assert curved.with_tricks(Tricks(cfg_zero=CfgZero(zero_steps=0))).tricks.cfg_zero is not None
    plain_family = replace(model, family=replace(model.family, block_rules=None))
    for tricks in (Tricks(enhance=Enhance()), Tricks(riflex=Riflex()), Tricks(stg=WeakPass())):
        with pytest.raises(SettingsError, match="no blocks"):
            plain_family.with_tricks(tricks)
    assert plain_family.with_tricks(Tricks(windows=Windows(size=3))).tricks.windows is not None


def test_a_loop_with_a_given_picture_is_refused_before_any_step(model: VideoModel) -> None:
    looped = model.with_tricks(Tricks(windows=Windows(size=3, schedule="looped")))
    mask = torch.zeros(1, 1, 5, 1, 1, dtype=torch.bool)
    held = Held(latents=torch.zeros(LATENTS), mask=mask)
    with pytest.raises(SettingsError, match="loop"):
        sampled(looped, prompt(held=held))
    short = model.with_tricks(Tricks(windows=Windows(size=5, schedule="looped")))
    assert torch.equal(sampled(short, prompt(held=held)), sampled(model, prompt(held=held)))  # it does not act


def test_what_a_run_depends_on_names_every_trick() -> None:
    tricks = Tricks(stg=WeakPass(scale=2.0), windows=Windows(size=5))
    assert set(tricks.identity or {}) == {"stg", "windows"}
    assert tricks.identity != Tricks(stg=WeakPass(scale=2.0), windows=Windows(size=6)).identity
