"""Samplers: textbook order on targets with a closed-form answer, agreement with the published schedulers, the right
marginals where noise is added, and resuming after any step to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

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
from vidgen.vidgen_core.errors import Cancelled, CheckpointError, FileError, NumericsError, SettingsError
from vidgen.vidgen_core.guidance import hold
from vidgen.vidgen_core.noise import NoiseStream
from vidgen.vidgen_core.sampling import SAMPLERS, SamplerState, StepInfo, _corrector_moments, sample
from vidgen.vidgen_core.timesteps import schedule
from vidgen.vidgen_core.types import Held

# diffusers hands tensors to numpy in a way that numpy 2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROCESSES = {
    "flow": flow_matching(),
    "vp": vp(scaled_linear_table(), predicts="eps"),
    "zero_snr": vp(zero_terminal_snr(snr_shift(scaled_linear_table(), 3.0)), predicts="v"),
    "svd": edm(predicts="v", sigma_max=700, sigma_data=1),
    "snap": snap(sigma_in=4),
}
DETERMINISTIC = ("euler", "heun", "dpmpp_2m", "unipc", "ddim")


@dataclass(frozen=True)
class Mixture:
    """Data drawn from Gaussians on the line: denoiser, distribution function and exact flow are all known."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    spreads: tuple[float, ...]

    def _parts(self, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, means, spreads = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.spreads)
        )
        return weights, means, spreads, (alpha**2 * spreads**2 + sigma**2).sqrt()

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The mean of the data given x = alpha x0 + sigma noise, element by element."""
        weights, means, spreads, total = self._parts(alpha, sigma)
        z = (x.double()[..., None] - alpha * means) / total
        posterior = torch.softmax(weights.log() - total.log() - z**2 / 2, dim=-1)
        return (posterior * (means + alpha * spreads**2 / total * z)).sum(-1).to(x.dtype)

    def cdf(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        weights, means, _, total = self._parts(alpha, sigma)
        return (weights * torch.special.ndtr((x[..., None] - alpha * means) / total)).sum(-1)

    def quantile(self, p: Tensor, alpha: float, sigma: float) -> Tensor:
        low, high = torch.full_like(p, -3000.0), torch.full_like(p, 3000.0)
        for _ in range(200):
            middle = (low + high) / 2
            below = self.cdf(middle, alpha, sigma) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def denoiser(self, diffusion: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: self.x0(x, diffusion.alpha(t).item(), diffusion.sigma(t).item())

    @property
    def mean(self) -> float:
        return sum(w * m for w, m in zip(self.weights, self.means, strict=True))

    @property
    def spread(self) -> float:
        second = sum(w * (m**2 + s**2) for w, m, s in zip(self.weights, self.means, self.spreads, strict=True))
        return math.sqrt(second - self.mean**2)


GAUSSIAN = Mixture((1.0,), (0.7,), (0.4,))
MIXTURE = Mixture((0.3, 0.7), (-1.2, 0.9), (0.3, 0.5))
QUANTILES = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)[None]


# --- order of convergence ----------------------------------------------------------------------------------------


def error_of(name: str, target: Mixture, diffusion: Diffusion, ends: tuple[float, float], num_steps: int) -> float:
    """The largest error of a run between two times. The exact flow of the line keeps every quantile in place."""
    ts = torch.linspace(*ends, num_steps + 1, dtype=torch.float64)
    alpha, sigma = diffusion.alpha(ts), diffusion.sigma(ts)
    x = target.quantile(QUANTILES, alpha[0].item(), sigma[0].item())
    expected = target.quantile(QUANTILES, alpha[-1].item(), sigma[-1].item())
    reached = sample(name, target.denoiser(diffusion), diffusion, x, ts)
    return (reached - expected).abs().max().item()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("target", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_order_of_convergence(name: str, order: int, target: Mixture, process: str) -> None:
    """Between t = 0.8 and 0.4, where every process is smooth: halving the step divides the error by 2**order. UniPC's
    corrector lifts its predictor's order 2 to 3."""
    diffusion = PROCESSES[process]
    coarse, fine = (error_of(name, target, diffusion, (0.8, 0.4), num_steps) for num_steps in (32, 64))
    # A band, not a bound: an order that is too good would mean that the test sees nothing. The next term of the error
    # weighs most for UniPC on the two processes whose levels span decades.
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.45 if name == "unipc" else 0.15), (coarse, fine)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "unipc"])
def test_second_order_survives_pure_noise_in_flow_matching(name: str) -> None:
    """From t = 1 exactly, where alpha = 0 and the log SNR is infinite: the one step of order 1 costs no order."""
    coarse, fine = (error_of(name, GAUSSIAN, PROCESSES["flow"], (1.0, 0.1), num_steps) for num_steps in (80, 160))
    assert math.log2(coarse / fine) > 1.8, (coarse, fine)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_whole_runs_reach_the_data(name: str, process: str) -> None:
    """From pure noise to t = 0 every process and sampler recovers the quantiles of the mixture."""
    diffusion = PROCESSES[process]
    ts = schedule("karras" if process != "flow" else "simple", 100, diffusion=diffusion)
    alpha, sigma = diffusion.alpha(ts[0]).item(), diffusion.sigma(ts[0]).item()
    x = sample(name, MIXTURE.denoiser(diffusion), diffusion, MIXTURE.quantile(QUANTILES, alpha, sigma), ts)
    # Errors of order 1 at 100 steps; order 2 sits an order of magnitude below.
    tolerance = 0.05 if name in ("euler", "ddim") else 0.005
    assert (x - MIXTURE.quantile(QUANTILES, 1.0, 0.0)).abs().mean() < tolerance


def test_unipcs_weights_are_the_moments_they_should_be() -> None:
    """b_k = mean of u**k under exp(h (u - 1)) on [0, 1], by quadrature; series and closed form meet at h = 0.5."""
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    for h in (1e-6, 1e-3, 0.1, 0.4999, 0.5, 0.5001, 2.0, 15.0):
        weight = torch.exp(h * (u - 1))
        expected = [((u**k * weight).sum() / weight.sum()).item() for k in (1, 2)]
        assert _corrector_moments(h) == pytest.approx(expected, abs=1e-8)


# --- marginals where noise is added ----------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("name", "eta"), [("euler_ancestral", 1.0), ("dpmpp_2m_sde", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_keep_the_marginals(name: str, eta: float, process: str) -> None:
    """Mean and spread of 8192 samples: half way (where a wrong share of noise shows at once) and at the end."""
    diffusion = PROCESSES[process]
    ts = schedule("karras" if process != "flow" else "simple", 120, diffusion=diffusion)
    noise = NoiseStream([11])
    x = diffusion.start(noise.draw((8192,), dtype=torch.float64), ts[0])
    state = SamplerState()
    denoise = MIXTURE.denoiser(diffusion)
    for stop_after in (60, 120):
        x = sample(name, denoise, diffusion, x, ts, noise=noise, state=state, stop_after=stop_after, eta=eta)
        at = ts[state.step]
        alpha, sigma = (diffusion.alpha(at).item(), diffusion.sigma(at).item()) if stop_after == 60 else (1.0, 0.0)
        spread = math.hypot(alpha * MIXTURE.spread, sigma)
        # Sampling error: 1 / sqrt(8192) = 1.1 % of the spread, three of them; and some for what order 1 costs at 120
        # steps (a run of 240 halves that). A wrong share of noise is off by tens of percent.
        assert abs(x.mean().item() - alpha * MIXTURE.mean) < 0.045 * spread
        assert abs(x.std().item() / spread - 1) < (0.035 if name == "dpmpp_2m_sde" else 0.06)


def test_ancestral_sampling_without_noise_is_euler() -> None:
    diffusion = PROCESSES["zero_snr"]
    ts = schedule("trailing", 10, diffusion=diffusion)
    x = NoiseStream([0]).draw((32,), dtype=torch.float64)
    denoise = MIXTURE.denoiser(diffusion)
    euler = sample("euler", denoise, diffusion, x, ts)
    assert torch.equal(sample("euler_ancestral", denoise, diffusion, x, ts, eta=0.0), euler)
    assert torch.equal(sample("ddim", denoise, diffusion, x, ts), euler)


# --- the published schedulers ----------------------------------------------------------------------------------
#
# Their tables and sums are float32 in places. Where they allow it they are given float64 levels, so that what is
# compared is the method; the schedules themselves are compared in test_timesteps.


def start_noise(num: int = 64) -> Tensor:
    return NoiseStream([5]).draw((1, num), dtype=torch.float64)


def output_for(kind: str, x: Tensor, x0: Tensor, alpha: float, sigma: float) -> Tensor:
    """What a network of this kind would have said."""
    noise = (x - alpha * x0) / sigma
    if kind == "flow_prediction":
        return noise - x0
    if kind == "epsilon":
        return noise
    return (alpha * noise - sigma * x0) / math.hypot(alpha, sigma)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    assert theirs.shape == ours.shape
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def run_levels(scheduler, x: Tensor, *, coordinates: str, kind: str, num_calls: int, **extra) -> Tensor:
    """Drive a scheduler that steps along ``scheduler.sigmas``. ``coordinates``: "ve" x0 + sigma noise, "vp" the same
    on the unit circle, "flow" (1 - sigma) x0 + sigma noise."""
    for index in range(num_calls):
        level = scheduler.sigmas[index].item()
        alpha, sigma = {
            "ve": (1.0, level),
            "vp": (1 / math.hypot(1, level), level / math.hypot(1, level)),
            "flow": (1 - level, level),
        }[coordinates]
        output = output_for(kind, x, MIXTURE.x0(x, alpha, sigma), alpha, sigma)
        arguments = {key: make() for key, make in extra.items()}
        x = scheduler.step(output, scheduler.timesteps[index], x, **arguments, return_dict=False)[0]
    return x


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_euler_is_the_published_flow_matching(diffusers, shift: float) -> None:
    diffusion, ts = PROCESSES["flow"], schedule("simple", 30, shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 31)[:-1])
    scheduler.sigmas = ts
    theirs = run_levels(scheduler, start_noise(), coordinates="flow", kind="flow_prediction", num_calls=30)
    assert_same(sample("euler", MIXTURE.denoiser(diffusion), diffusion, start_noise(), ts), theirs)


def test_heun_is_the_published_flow_matching(diffusers) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    diffusion = PROCESSES["flow"]
    ts = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]).double()
    ts[0] = 1.0
    scheduler.sigmas = torch.cat([ts[:1], ts[1:-1].repeat_interleave(2), ts[-1:]])
    theirs = run_levels(scheduler, start_noise(), coordinates="flow", kind="flow_prediction", num_calls=23)
    assert_same(sample("heun", MIXTURE.denoiser(diffusion), diffusion, start_noise(), ts), theirs)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("snr_scale", [1.0, 3.0])
def test_ddim_is_the_published_one_at_zero_terminal_snr(diffusers, snr_scale: float, eta: float) -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_scale,
        clip_sample=False,
    )
    scheduler.set_timesteps(25)
    diffusion = vp(zero_terminal_snr(snr_shift(scaled_linear_table(), snr_scale)))
    x, fresh = start_noise(), NoiseStream([9])
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t].sqrt().item()
        sigma = (1 - scheduler.alphas_cumprod[t]).sqrt().item()
        output = output_for("v_prediction", x, MIXTURE.x0(x, alpha, sigma), alpha, sigma)
        drawn = fresh.draw((1, 64), dtype=torch.float64) if eta else None
        # This class accepts eta but adds no noise; DDIM's own class does the same sums and adds it.
        x = _ddim_step(diffusers, scheduler, output, t, x, eta, drawn)
    ts = schedule("trailing", 25, diffusion=diffusion)
    ours = sample("ddim", MIXTURE.denoiser(diffusion), diffusion, start_noise(), ts, eta=eta, noise=NoiseStream([9]))
    assert_same(ours, x)


def _ddim_step(diffusers, cogvideo, output: Tensor, t: Tensor, x: Tensor, eta: float, drawn: Tensor | None) -> Tensor:
    if eta == 0:
        return cogvideo.step(output, t, x, return_dict=False)[0]
    ddim = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    ddim.set_timesteps(cogvideo.num_inference_steps)
    ddim.alphas_cumprod, ddim.final_alpha_cumprod = cogvideo.alphas_cumprod, torch.ones((), dtype=torch.float64)
    return ddim.step(output, t, x, eta=eta, variance_noise=drawn, return_dict=False)[0]


@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize(("sampler", "kind"), [("euler", "epsilon"), ("euler", "v_prediction"), ("heun", "epsilon")])
def test_euler_and_heun_are_the_published_ones_on_a_table(diffusers, sampler: str, kind: str, name: str) -> None:
    """They step in x / alpha (k-diffusion's coordinates), we on the unit circle."""
    option = {f"use_{name}_sigmas": True, "prediction_type": kind}
    scheduler = {"euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler}[sampler](**option)
    scheduler.is_scale_input_called = True
    scheduler.set_timesteps(20)
    diffusion = PROCESSES["vp"]
    ts = schedule(name, 20, diffusion=diffusion)
    levels = diffusion.level(ts)
    twice = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    scheduler.sigmas = levels if sampler == "euler" else twice
    x = start_noise()
    num_calls = len(scheduler.sigmas) - 1
    theirs = run_levels(scheduler, x / diffusion.alpha(ts[0]), coordinates="ve", kind=kind, num_calls=num_calls)
    assert_same(sample(sampler, MIXTURE.denoiser(diffusion), diffusion, x, ts), theirs)


def test_euler_is_the_published_one_for_svd(diffusers) -> None:
    """Continuous v-prediction from sigma = 700. They add in float32; the way down forgets its rounding."""
    scheduler = diffusers.EulerDiscreteScheduler(
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        prediction_type="v_prediction",
        timestep_type="continuous",
    )
    scheduler.set_timesteps(25)
    scheduler.is_scale_input_called = True
    diffusion = PROCESSES["svd"]
    ts = schedule("karras", 25, diffusion=diffusion)
    scheduler.sigmas = diffusion.sigma(ts)
    x = diffusion.start(start_noise(), ts[0])
    theirs = run_levels(scheduler, x, coordinates="ve", kind="v_prediction", num_calls=25)
    assert_same(sample("euler", MIXTURE.denoiser(diffusion), diffusion, x, ts), theirs)


@pytest.fixture
def shared_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a published scheduler draw its noise from our stream, so that both see the same numbers."""

    def share(module: str) -> None:
        stream = NoiseStream([9])
        monkeypatch.setattr(
            f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: stream.draw((1, 64), dtype=torch.float64)
        )

    return share


def test_euler_ancestral_is_the_published_one(diffusers, shared_noise) -> None:
    shared_noise("scheduling_euler_ancestral_discrete")
    scheduler = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    scheduler.is_scale_input_called = True
    scheduler.set_timesteps(20)
    diffusion = PROCESSES["vp"]
    # This class's own levels come from another table (linear betas); ours replace them.
    ts = schedule("trailing", 20, diffusion=diffusion)
    scheduler.sigmas = diffusion.level(ts)
    x = start_noise()
    theirs = run_levels(scheduler, x / diffusion.alpha(ts[0]), coordinates="ve", kind="epsilon", num_calls=20)
    ours = sample("euler_ancestral", MIXTURE.denoiser(diffusion), diffusion, x, ts, noise=NoiseStream([9]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("num_steps", [8, 20])
@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_multistep_samplers_are_the_published_ones(diffusers, sampler: str, process: str, num_steps: int) -> None:
    """8 steps too: below 15 the published class lowers its order at the end, which with a clean end is the same."""
    flow = process == "flow"
    kind = "flow_prediction" if flow else "epsilon"
    options = {"use_flow_sigmas": flow, "prediction_type": kind}
    if sampler == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **options)
    else:
        algorithm = "sde-dpmsolver++" if sampler.endswith("sde") else "dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type=algorithm, solver_order=2, solver_type="midpoint", final_sigmas_type="zero", **options
        )
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    diffusion = PROCESSES[process]
    # They cannot start at pure noise (log 0), so the run begins just below.
    ts = schedule("simple" if flow else "karras", num_steps, diffusion=diffusion).clone()
    ts[0] = min(ts[0].item(), 0.99)
    scheduler.sigmas = diffusion.level(ts)
    stream = NoiseStream([9])
    extra = {"variance_noise": lambda: stream.draw((1, 64), dtype=torch.float64)} if sampler.endswith("sde") else {}
    coordinates = "flow" if flow else "vp"
    theirs = run_levels(scheduler, start_noise(), coordinates=coordinates, kind=kind, num_calls=num_steps, **extra)
    ours = sample(sampler, MIXTURE.denoiser(diffusion), diffusion, start_noise(), ts, noise=NoiseStream([9]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("snr_scale", [1.0, 3.0])
def test_dpmpp_2m_sde_is_cogvideos_scheduler_at_zero_terminal_snr(diffusers, monkeypatch, snr_scale: float) -> None:
    """From alpha = 0 exactly. That class draws twice in every step but the first and last and uses the second."""
    scheduler = diffusers.CogVideoXDPMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_scale,
    )
    scheduler.set_timesteps(20)
    stream, drawn = NoiseStream([9]), []
    monkeypatch.setattr("diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", lambda *_, **__: drawn[-1])
    diffusion = vp(zero_terminal_snr(snr_shift(scaled_linear_table(), snr_scale)))
    x, old, back = start_noise(), None, None
    for t in scheduler.timesteps:
        drawn.append(stream.draw((1, 64), dtype=torch.float64))
        alpha = scheduler.alphas_cumprod[t].sqrt().item()
        sigma = (1 - scheduler.alphas_cumprod[t]).sqrt().item()
        output = output_for("v_prediction", x, MIXTURE.x0(x, alpha, sigma), alpha, sigma)
        x, old = scheduler.step(output, old, t, back, x)
        back = t
    ts = schedule("trailing", 20, diffusion=diffusion)
    ours = sample("dpmpp_2m_sde", MIXTURE.denoiser(diffusion), diffusion, start_noise(), ts, noise=NoiseStream([9]))
    assert_same(ours, x)


def test_heun_is_snap_videos_algorithm() -> None:
    """EDM's algorithm 1 with D / sigma_in in place of D, and the last x multiplied by sigma_in, written out."""
    diffusion, sigma_in = PROCESSES["snap"], 4.0
    ts = schedule("karras", 16, diffusion=diffusion)
    start = diffusion.start(start_noise(), ts[0])
    sigmas = diffusion.sigma(ts).tolist()
    x = start
    for sigma, below in zip(sigmas[:-1], sigmas[1:], strict=True):
        d = (x - MIXTURE.x0(x, 1 / sigma_in, sigma) / sigma_in) / sigma
        proposal = x + (below - sigma) * d
        if below > 0:
            d = (d + (proposal - MIXTURE.x0(proposal, 1 / sigma_in, below) / sigma_in) / below) / 2
        x = x + (below - sigma) * d
    ours = sample("heun", MIXTURE.denoiser(diffusion), diffusion, start, ts)
    # Same sums in another order, in float64, at heights of up to sigma = 80.
    assert_same(ours, sigma_in * x, tolerance=1e-11)


# --- stopping and resuming -----------------------------------------------------------------------------------


def a_run(name: str, process: str) -> tuple[Callable[[Tensor, Tensor], Tensor], Diffusion, Tensor, Tensor]:
    diffusion = PROCESSES[process]
    ts = schedule("karras", 6, diffusion=diffusion)
    x = diffusion.start(NoiseStream.of_batch(3, 2).draw((4, 3, 2, 2)), ts[0])
    return MIXTURE.denoiser(diffusion), diffusion, x, ts


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_resumes_after_any_step_to_the_same_bits(name: str, process: str, tmp_path: Path) -> None:
    denoise, diffusion, x, ts = a_run(name, process)
    eta = 0.5 if SAMPLERS[name].takes_eta else None
    whole = sample(name, denoise, diffusion, x, ts, noise=NoiseStream.of_batch(3, 2), eta=eta)
    for stop_after in range(1, 6):
        state = SamplerState()
        noise = NoiseStream.of_batch(3, 2)
        sample(name, denoise, diffusion, x, ts, noise=noise, state=state, stop_after=stop_after, eta=eta)
        assert state.step == stop_after
        state.save(tmp_path / "run.safetensors")
        again = SamplerState.load(tmp_path / "run.safetensors")
        resumed = sample(name, denoise, diffusion, None, ts, state=again, eta=eta)
        assert torch.equal(resumed, whole), f"stopped after {stop_after}"
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"], "temporary files are left behind"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_cancelled_run_leaves_a_state_that_resumes(name: str) -> None:
    """Whether the host stops the run between steps or the network raises within one, after it has drawn noise."""
    denoise, diffusion, x, ts = a_run(name, "flow")
    whole = sample(name, denoise, diffusion, x, ts, noise=NoiseStream.of_batch(3, 2))

    def cancel(info: StepInfo) -> None:
        if info.step == 3:
            raise Cancelled

    calls = 0

    def fragile(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return denoise(x, t)

    for network, on_step, error in ((denoise, cancel, Cancelled), (fragile, None, RuntimeError)):
        state = SamplerState()
        with pytest.raises(error):
            sample(name, network, diffusion, x, ts, noise=NoiseStream.of_batch(3, 2), state=state, on_step=on_step)
        assert 0 < state.step <= 3
        assert torch.equal(sample(name, denoise, diffusion, None, ts, state=state), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_of_four_is_four_single_runs(name: str) -> None:
    diffusion = PROCESSES["flow"]
    ts, denoise = schedule("simple", 5, shift=7.0), MIXTURE.denoiser(diffusion)

    def run(seed: int, batch: int) -> Tensor:
        noise = NoiseStream.of_batch(seed, batch)
        return sample(name, denoise, diffusion, noise.draw((4, 3, 4, 4)), ts, noise=noise)

    assert torch.equal(run(20, 4), torch.cat([run(20 + index, 1) for index in range(4)]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_cuda_device_makes_the_same_run_and_resumes_one_from_the_cpu(name: str) -> None:
    diffusion = PROCESSES["flow"]
    ts = schedule("simple", 6)

    def run(device: str, state: SamplerState | None = None, stop_after: int | None = None) -> Tensor:
        noise = NoiseStream.of_batch(3, 2)
        x = noise.draw((4, 3, 2, 2), device)
        held = Held(latents=x, mask=torch.zeros(2, 1, 3, 1, 1, dtype=torch.bool, device=device))
        denoise = hold(lambda x, t: diffusion.to_x0(x, torch.tanh(x), t), held)
        return sample(name, denoise, diffusion, x, ts, noise=noise, state=state, stop_after=stop_after)

    whole = run("cpu")
    # float32, and tanh rounds differently on the two devices.
    torch.testing.assert_close(run("cuda").cpu(), whole, rtol=0, atol=1e-5)
    state = SamplerState()
    run("cpu", state, 3)
    resumed = run("cuda", state)
    assert resumed.is_cuda
    torch.testing.assert_close(resumed.cpu(), whole, rtol=0, atol=1e-5)


def test_on_step_sees_every_step() -> None:
    denoise, diffusion, x, ts = a_run("heun", "flow")
    seen: list[StepInfo] = []
    last = sample("heun", denoise, diffusion, x, ts, on_step=seen.append)
    assert [info.step for info in seen] == [1, 2, 3, 4, 5, 6]
    assert [info.t for info in seen] == ts[1:].tolist()
    assert {info.num_steps for info in seen} == {6}
    assert torch.equal(seen[-1].x, last)
    assert torch.equal(seen[-1].x0, last), "the last step ends at what the network expects"


def test_a_finished_run_is_returned_as_it_is() -> None:
    denoise, diffusion, x, ts = a_run("euler", "snap")
    state = SamplerState()
    whole = sample("euler", denoise, diffusion, x, ts, state=state)
    assert torch.equal(sample("euler", denoise, diffusion, None, ts, state=state), whole)


@pytest.mark.parametrize("process", ["flow", "zero_snr", "svd"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_held_frames_come_out_exactly(name: str, process: str) -> None:
    diffusion = PROCESSES[process]
    ts = schedule("simple", 8, diffusion=diffusion)
    noise = NoiseStream.of_batch(0, 2)
    clean = noise.draw((3, 5, 2, 2))
    mask = torch.tensor([True, False, False, False, True]).reshape(1, 1, 5, 1, 1).expand(2, 1, 5, 1, 1)
    told: list[list[float]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.append(t[0].flatten().tolist())
        output = torch.tanh(x)
        return diffusion.to_x0(x, output, t)

    denoise = hold(network, Held(latents=clean, mask=mask))
    x = sample(name, denoise, diffusion, diffusion.start(noise.draw((3, 5, 2, 2)), ts[0]), ts, noise=noise)
    assert torch.equal(x[:, :, [0, 4]], clean[:, :, [0, 4]])
    assert torch.isfinite(x).all()
    assert told[1] == pytest.approx([0, *[ts[1].item()] * 3, 0], abs=1e-6)


# --- what cannot be used -----------------------------------------------------------------------------------------


def test_unknown_samplers_are_answered_with_a_suggestion() -> None:
    denoise, diffusion, x, ts = a_run("euler", "flow")
    with pytest.raises(SettingsError, match='did you mean "euler"'):
        sample("eular", denoise, diffusion, x, ts)


@pytest.mark.parametrize(
    "ts", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.5, 0.0], [1.0, -0.1], [[1.0, 0.0]], [math.nan, 0.0]]
)
def test_unusable_times_are_refused(ts: list[float]) -> None:
    denoise, diffusion, x, _ = a_run("euler", "flow")
    with pytest.raises(SettingsError, match="times of the run"):
        sample("euler", denoise, diffusion, x, torch.tensor(ts))


def test_unusable_settings_are_refused() -> None:
    denoise, diffusion, x, ts = a_run("euler", "flow")
    with pytest.raises(SettingsError, match="adds no noise"):
        sample("heun", denoise, diffusion, x, ts, eta=1.0)
    with pytest.raises(SettingsError, match="0 to 1"):
        sample("ddim", denoise, diffusion, x, ts, eta=1.5)
    with pytest.raises(SettingsError, match="source of noise"):
        sample("euler_ancestral", denoise, diffusion, x, ts)
    with pytest.raises(SettingsError, match="nothing to sample from"):
        sample("euler", denoise, diffusion, None, ts)
    with pytest.raises(SettingsError, match="stop_after"):
        sample("euler", denoise, diffusion, x, ts, stop_after=-1)


def test_a_state_of_another_run_is_refused() -> None:
    denoise, diffusion, x, ts = a_run("euler", "flow")
    state = SamplerState()
    sample("euler", denoise, diffusion, x, ts, state=state, stop_after=2)
    with pytest.raises(SettingsError, match="other settings"):
        sample("heun", denoise, diffusion, x, ts, state=state)
    with pytest.raises(SettingsError, match="other times"):
        sample("euler", denoise, diffusion, x, schedule("simple", 7), state=state)


def test_numbers_that_are_not_finite_stop_the_run_at_the_last_good_step() -> None:
    denoise, diffusion, x, ts = a_run("euler", "flow")
    state = SamplerState()

    def overflowing(x: Tensor, t: Tensor) -> Tensor:
        return denoise(x, t) / (0.0 if t < ts[2] else 1.0)

    with pytest.raises(NumericsError, match="step 4 of 6"):
        sample("euler", overflowing, diffusion, x, ts, state=state)
    assert state.step == 3
    assert torch.isfinite(state.x).all()


def test_half_precision_latents_are_stepped_in_float32() -> None:
    denoise, diffusion, x, ts = a_run("euler", "flow")
    assert sample("euler", denoise, diffusion, x.bfloat16(), ts).dtype == torch.float32


def test_files_that_are_not_saved_runs(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileError, match="cannot be read"):
        SamplerState.load(tmp_path / "missing.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="damaged"):
        SamplerState.load(damaged)
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match="not a saved run"):
        SamplerState.load(other)
    save_file(
        {"x": torch.zeros(1)}, other, {"vidgen.part": "sampler_state", "vidgen.format": "1", "vidgen.state": "{}"}
    )
    with pytest.raises(CheckpointError, match="damaged"):
        SamplerState.load(other)
    with pytest.raises(SettingsError, match="not begun"):
        SamplerState().save(tmp_path / "empty.safetensors")
    denoise, diffusion, x, ts = a_run("euler", "flow")
    state = SamplerState()
    sample("euler", denoise, diffusion, x, ts, state=state, stop_after=1)
    with pytest.raises(FileError, match="cannot be saved"):
        state.save(tmp_path / "no" / "such" / "folder.safetensors")
