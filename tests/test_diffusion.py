"""Noise processes: the line is the papers', it inverts, it is finite where it must be, and it broadcasts."""

from __future__ import annotations

import math

import pytest
import torch

from vidgen.vidgen_core.diffusion import (
    Diffusion,
    edm,
    flow_matching,
    scaled_linear_table,
    snap,
    snr_shift,
    vp,
    zero_terminal_snr,
)
from vidgen.vidgen_core.errors import SettingsError

# float64 throughout; the lines are a handful of operations, so anything above 1e-13 is a wrong formula.
EXACT = {"rtol": 0, "atol": 1e-13}
COGVIDEO_2B = zero_terminal_snr(snr_shift(scaled_linear_table(), 3.0))

PROCESSES = {
    "flow": flow_matching(),
    "vp_v": vp(scaled_linear_table(), predicts="v"),
    "vp_eps": vp(scaled_linear_table(), predicts="eps"),
    "vp_x0": vp(scaled_linear_table(), predicts="x0"),
    "zero_snr": vp(COGVIDEO_2B, predicts="v"),
    "svd": edm(predicts="v", sigma_max=700, sigma_data=1),
    "edm": edm(),
    "snap": snap(sigma_in=4),
}
TIMES = torch.tensor([0.001, 0.0137, 0.1, 0.25, 0.5, 0.777, 0.999, 1.0], dtype=torch.float64)


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x0, noise


@pytest.mark.parametrize("name", PROCESSES)
def test_target_is_what_to_x0_reads_back(name: str) -> None:
    diffusion = PROCESSES[name]
    x0, noise = draw(len(TIMES), 2, 3, 4, 4)
    x_t = diffusion.add_noise(x0, noise, TIMES)
    for output in (diffusion.target(x0, x_t, TIMES), diffusion.target_from_noise(x0, noise, TIMES)):
        # Values reach sigma = 700 on SVD; relative to that the round trip is exact to rounding.
        torch.testing.assert_close(diffusion.to_x0(x_t, output, TIMES), x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("flow", lambda x0, noise, alpha, sigma: noise - x0),
        ("vp_v", lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0),
        ("vp_eps", lambda x0, noise, alpha, sigma: noise),
        ("vp_x0", lambda x0, noise, alpha, sigma: x0),
        ("zero_snr", lambda x0, noise, alpha, sigma: alpha * noise - sigma * x0),
        # sgm's VScaling solved for the network's output.
        ("svd", lambda x0, noise, alpha, sigma: (noise - sigma * x0) / (sigma**2 + 1).sqrt()),
        # Karras et al. 2022, table 1, sigma_data = 0.5: (x0 - c_skip x) / c_out, with the common factor cancelled.
        ("edm", lambda x0, noise, alpha, sigma: (2 * sigma * x0 - 0.5 * noise) / (sigma**2 + 0.25).sqrt()),
        ("snap", lambda x0, noise, alpha, sigma: (noise - sigma * x0) / (sigma**2 + 1).sqrt()),
    ],
)
def test_targets_are_the_papers(name: str, paper) -> None:
    diffusion = PROCESSES[name]
    x0, noise = draw(len(TIMES), 5)
    alpha, sigma = diffusion.alpha(TIMES)[:, None], diffusion.sigma(TIMES)[:, None]
    expected = paper(x0, noise, alpha, sigma)
    torch.testing.assert_close(diffusion.target_from_noise(x0, noise, TIMES), expected, rtol=0, atol=1e-10)


def test_snap_matches_the_published_coefficients() -> None:
    """Golden values computed from Snap Video's table for sigma_data = 1 (printed to six decimals)."""
    golden = {
        (4, 0.1): (3.713907, 3.846154, -0.386534),
        (4, 1.0): (0.970143, 0.800000, -1.131371),
        (4, 10.0): (0.099969, 0.009975, -1.002481),
        (32, 0.1): (9.544800, 24.242424, -2.436333),
        (32, 1.0): (0.999512, 0.969697, -1.371359),
        (32, 10.0): (0.100000, 0.009997, -1.004674),
    }
    for (sigma_in, sigma), (c_in, c_skip, c_out) in golden.items():
        diffusion = snap(sigma_in=sigma_in)
        t = diffusion.time_at(torch.tensor(sigma * sigma_in, dtype=torch.float64))
        a, b = diffusion.coefficients(t)
        assert (diffusion.input_scale(t).item(), a.item(), b.item()) == pytest.approx((c_in, c_skip, c_out), abs=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_ends_are_clean_and_noise_and_the_path_is_monotone(name: str) -> None:
    diffusion = PROCESSES[name]
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
    assert sigma[0] == 0
    assert alpha[0] == (0.25 if name == "snap" else 1.0)
    assert (sigma.diff() > 0).all()
    assert (alpha.diff() <= 0).all()
    if name in ("flow", "zero_snr"):
        assert alpha[-1] == 0.0
        assert sigma[-1] == 1.0


@pytest.mark.parametrize("name", PROCESSES)
def test_time_at_inverts_level(name: str) -> None:
    diffusion = PROCESSES[name]
    t = torch.linspace(0.0005, 0.9985, 997, dtype=torch.float64)
    torch.testing.assert_close(diffusion.time_at(diffusion.level(t)), t, rtol=0, atol=1e-12)


def test_table_entries_are_hit_exactly_and_between_them_log_snr_is_linear() -> None:
    table = scaled_linear_table()
    diffusion = vp(table)
    entries = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(diffusion.alpha(entries) ** 2, table, **EXACT)
    torch.testing.assert_close(diffusion.sigma(entries) ** 2, 1 - table, **EXACT)
    for t in (entries, entries.float()):
        assert diffusion.clock(t).tolist() == list(range(1000))
    low, middle, high = diffusion.level(torch.tensor([0.3, 0.3005, 0.301], dtype=torch.float64)).log()
    assert middle.item() == pytest.approx(((low + high) / 2).item(), abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cogvideo_tables_are_the_published_schedulers(scale: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=scale)
    ours = zero_terminal_snr(snr_shift(scaled_linear_table(), scale))
    torch.testing.assert_close(ours, published.alphas_cumprod, **EXACT)
    assert ours[-1] == 0


def test_clocks() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert PROCESSES["flow"].clock(t).tolist() == [0, 500, 1000]
    assert PROCESSES["zero_snr"].clock(t).tolist() == [0, 499, 999]
    svd = PROCESSES["svd"]
    expected = [math.log(0.002) / 4, math.log(700 * 0.5**7) / 4, math.log(700) / 4]
    assert svd.clock(t).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["flow", "zero_snr", "svd", "edm", "snap"])
def test_a_time_per_frame_equals_frame_by_frame(name: str) -> None:
    diffusion = PROCESSES[name]
    x0, noise = draw(2, 3, 4, 2, 2)
    t = torch.tensor([[0.0, 0.3, 0.6, 1.0], [0.2, 0.0, 1.0, 0.9]], dtype=torch.float64).reshape(2, 1, 4, 1, 1)
    x_t = diffusion.add_noise(x0, noise, t)
    output = diffusion.target_from_noise(x0, noise, t)
    back = diffusion.to_x0(x_t, output, t)
    assert torch.isfinite(output).all(), "a held frame (t = 0) must not poison a masked loss"
    for sample in range(2):
        for frame in range(4):
            at = t[sample, 0, frame, 0, 0]
            expected = diffusion.add_noise(x0[sample, :, frame], noise[sample, :, frame], at)
            torch.testing.assert_close(x_t[sample, :, frame], expected, **EXACT)
            if at > 0:
                torch.testing.assert_close(back[sample, :, frame], x0[sample, :, frame], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_keep_the_dtype_and_are_computed_in_float32(dtype: torch.dtype) -> None:
    x0, noise = (value.to(dtype) for value in draw(2, 3))
    t = torch.tensor([0.25, 0.75])
    x_t = flow_matching().add_noise(x0, noise, t)
    assert x_t.dtype == dtype
    wanted = (0.75 * x0[0].float() + 0.25 * noise[0].float()).to(dtype)
    assert torch.equal(x_t[0], wanted)


def test_flow_target_is_accurate_near_the_clean_end_in_float32() -> None:
    """noise - x0 through x_t loses 1e-7 / t; from the noise itself it loses nothing."""
    x0, noise = (value.float() for value in draw(4, 8))
    t = torch.full((4,), 1e-4)
    ours = flow_matching().target_from_noise(x0, noise, t)
    torch.testing.assert_close(ours, noise - x0, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "spread"), [("flow", 1.0), ("zero_snr", 1.0), ("svd", math.sqrt(1 + 700**2))])
def test_start_has_the_spread_of_noised_data(name: str, spread: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert PROCESSES[name].start(one, torch.tensor(1.0)).item() == pytest.approx(spread, rel=1e-12)


def test_noise_prediction_is_refused_at_zero_snr() -> None:
    with pytest.raises(SettingsError, match="cannot start from pure noise"):
        vp(COGVIDEO_2B, predicts="eps")


def test_an_empty_range_of_levels_is_refused() -> None:
    with pytest.raises(SettingsError, match="sigma_min"):
        edm(sigma_min=2, sigma_max=1)


def test_the_record_is_frozen() -> None:
    assert isinstance(flow_matching(), Diffusion)
    with pytest.raises(AttributeError):
        flow_matching().predicts = "v"  # type: ignore[misc]
