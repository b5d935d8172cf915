"""Guidance: the papers' formulas, the published functions, and no wasted runs of the network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.diffusion import flow_matching, scaled_linear_table, vp
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.guidance import (
    CFG_SCHEDULES,
    cfg,
    cfg_schedule,
    dynamic_thresholding,
    hold,
    oscillating,
    per_frame,
    per_frame_triangle,
    power_cosine,
    rescale_guidance,
)
from vidgen.vidgen_core.types import Held

T_HALF = torch.tensor(0.5, dtype=torch.float64)


def latents(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 5, 4, 4)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


COND, UNCOND, X = latents(1), latents(2), latents(3)


def cond(x: Tensor, t: Tensor) -> Tensor:
    return COND


def uncond(x: Tensor, t: Tensor) -> Tensor:
    return UNCOND


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the network was run for nothing")


def test_cfg_is_its_formula() -> None:
    guided = cfg(cond, uncond, 6.0)(X, T_HALF)
    torch.testing.assert_close(guided, UNCOND + 6.0 * (COND - UNCOND), rtol=0, atol=1e-13)
    assert torch.equal(cfg(cond, uncond, 0.0)(X, T_HALF), UNCOND)


def test_guiding_x0_is_guiding_the_networks_output() -> None:
    diffusion = vp(scaled_linear_table())
    outputs = [diffusion.target(value, X, T_HALF) for value in (COND, UNCOND)]
    expected = diffusion.to_x0(X, outputs[1] + 6.0 * (outputs[0] - outputs[1]), T_HALF)
    torch.testing.assert_close(cfg(cond, uncond, 6.0)(X, T_HALF), expected, rtol=0, atol=1e-12)


def test_no_second_run_without_guidance() -> None:
    assert cfg(cond, never, 1.0)(X, T_HALF) is COND
    assert cfg(cond, never, cfg_schedule("interval", 7.0, start=0.4, end=0.1))(X, T_HALF) is COND


def test_one_scale_per_frame() -> None:
    scales = per_frame(1.0, 3.0, 5)
    guided = cfg(cond, uncond, scales)(X, T_HALF)
    for frame, scale in enumerate((1.0, 1.5, 2.0, 2.5, 3.0)):
        expected = UNCOND[:, :, frame] + scale * (COND[:, :, frame] - UNCOND[:, :, frame])
        torch.testing.assert_close(guided[:, :, frame], expected, rtol=0, atol=1e-12)


def test_triangle_is_sv3ds() -> None:
    scales = per_frame_triangle(1.0, 2.5, 21).flatten()
    expected = torch.tensor([1.0 + 0.15 * min(i, 20 - i) for i in range(21)])
    torch.testing.assert_close(scales, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("amount", [0.0, 0.7, 1.0])
def test_rescale_is_the_published_one(amount: float) -> None:
    module = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    guided = UNCOND + 6.0 * (COND - UNCOND)
    expected = module.rescale_noise_cfg(guided, COND, guidance_rescale=amount)
    torch.testing.assert_close(rescale_guidance(guided, COND, amount), expected, rtol=0, atol=1e-13)


def test_rescale_acts_on_x0_or_on_what_the_network_predicts() -> None:
    on_x0 = cfg(cond, uncond, 6.0, rescale=1.0)(X, T_HALF)
    dims = (1, 2, 3, 4)
    torch.testing.assert_close(on_x0.std(dims), COND.std(dims), rtol=0, atol=1e-12)
    flow = flow_matching()
    on_output = cfg(cond, uncond, 6.0, rescale=1.0, diffusion=flow)(X, T_HALF)
    velocity, wanted = (flow.target(value, X, T_HALF) for value in (on_output, COND))
    torch.testing.assert_close(velocity.std(dims), wanted.std(dims), rtol=0, atol=1e-12)


@pytest.mark.parametrize("percentile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_the_published_one(percentile: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=math.inf
    )
    loud = 3 * COND
    ours = dynamic_thresholding(lambda x, t: loud, percentile=percentile)(X, T_HALF)
    torch.testing.assert_close(ours, scheduler._threshold_sample(loud), rtol=0, atol=1e-13)
    assert ours.abs().max() <= 1


def test_dynamic_thresholding_leaves_quiet_samples_alone() -> None:
    quiet = 0.9 * COND / COND.abs().max()
    assert torch.equal(dynamic_thresholding(lambda x, t: quiet)(X, T_HALF), quiet)


def test_hold_shows_clean_frames_at_time_zero_and_gives_them_back() -> None:
    mask = torch.tensor([True, False, False, True, False]).reshape(1, 1, 5, 1, 1).expand(2, 1, 5, 1, 1)
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return -x

    for t in (T_HALF, torch.tensor([0.5, 0.25])):
        out = hold(network, Held(latents=COND, mask=mask))(X, t)
        x, times = seen.pop()
        assert times.shape == (2, 1, 5, 1, 1)
        last = t.flatten()[-1].item()
        assert times[1].flatten().tolist() == [0, last, last, 0, last]
        assert torch.equal(x[:, :, [0, 3]], COND[:, :, [0, 3]])
        assert torch.equal(x[:, :, [1, 2, 4]], X[:, :, [1, 2, 4]])
        assert torch.equal(out[:, :, [0, 3]], COND[:, :, [0, 3]])
        assert torch.equal(out[:, :, [1, 2, 4]], -X[:, :, [1, 2, 4]])


def test_hold_tells_half_precision_latents_an_exact_time() -> None:
    mask = torch.zeros(1, 1, 5, 1, 1, dtype=torch.bool)
    told: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x

    hold(network, Held(latents=COND, mask=mask))(X.bfloat16(), torch.tensor(0.7371, dtype=torch.float64))
    assert told[0].flatten().tolist() == pytest.approx([0.7371] * 5, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", (7.0, 7.0, 7.0, 7.0, 7.0)),
        ("interval", (1.0, 7.0, 7.0, 7.0, 1.0)),
        ("linear", (1.0, 1.0, 4.0, 7.0, 7.0)),
        ("cosine", (1.0, 1.0, 4.0, 7.0, 7.0)),
    ],
)
def test_schedules_at_and_around_their_ends(name: str, expected: tuple[float, ...]) -> None:
    at = cfg_schedule(name, 7.0, start=0.75, end=0.25)
    assert [at(t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)] == pytest.approx(expected)


def test_cosine_is_slow_at_its_ends() -> None:
    linear, cosine = cfg_schedule("linear", 5.0), cfg_schedule("cosine", 5.0)
    assert cosine(0.9) < linear(0.9)
    assert cosine(0.1) > linear(0.1)


def test_power_cosine_is_cogvideos_formula() -> None:
    at = power_cosine(6.0, 50)
    for entry in (999, 979, 499, 19):
        expected = 1 + 6.0 * ((1 - math.cos(math.pi * ((50 - entry) / 50) ** 5.0)) / 2)
        # 19 ** 5 times pi leaves 1e-16 relative at 2.5e6: nine digits after the point.
        assert at((entry + 1) / 1000) == pytest.approx(expected, abs=1e-9)


def test_oscillating_alternates_after_its_first_steps() -> None:
    ts = torch.linspace(1, 0, 9, dtype=torch.float64)
    at = oscillating(7.0, ts, low=2.0, after=3)
    assert [at(t) for t in ts.tolist()[:-1]] == [7.0, 7.0, 7.0, 2.0, 7.0, 2.0, 7.0, 2.0]


def test_a_schedule_is_read_at_the_samplers_time() -> None:
    seen: list[float] = []

    def scale(t: float) -> float:
        seen.append(t)
        return 2.0

    cfg(cond, uncond, scale)(X, T_HALF)
    assert seen == [0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cfg_schedule("linaer", 3.0), 'did you mean "linear"'),
        (lambda: cfg_schedule("linear", math.inf), "guidance scale"),
        (lambda: cfg_schedule("linear", 3.0, start=0.2, end=0.4), "start > end"),
        (lambda: cfg(cond, uncond, 3.0, rescale=1.5), "rescale"),
        (lambda: dynamic_thresholding(cond, percentile=0.0), "threshold"),
        (lambda: dynamic_thresholding(cond, limit=0.0), "threshold"),
    ],
)
def test_unusable_settings_say_what_to_do(call, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        call()


def test_every_schedule_takes_the_same_arguments() -> None:
    assert all(callable(make(2.0, start=0.9, end=0.1)) for make in CFG_SCHEDULES.values())
