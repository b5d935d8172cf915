"""Schedules: shape, ends, and agreement with the schedulers that users know."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vidgen.vidgen_core.diffusion import Diffusion, edm, flow_matching, scaled_linear_table, snap, vp, zero_terminal_snr
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.timesteps import SCHEDULES, schedule, shift_time

# diffusers hands tensors to numpy in a way that numpy 2 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROCESSES = {
    "flow": flow_matching(),
    "vp": vp(scaled_linear_table()),
    "zero_snr": vp(zero_terminal_snr(scaled_linear_table())),
    "svd": edm(predicts="v", sigma_max=700, sigma_data=1),
    "snap": snap(sigma_in=4),
}
# The published schedulers hand out float32, whose relative rounding is 6e-8.
FLOAT32 = {"rtol": 2e-7, "atol": 1e-9}


@pytest.mark.parametrize("shift", [1.0, 7.0, 0.5])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 50])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_descends_to_zero(name: str, process: str, num_steps: int, shift: float) -> None:
    ts = schedule(name, num_steps, shift=shift, diffusion=PROCESSES[process])
    assert ts.shape == (num_steps + 1,)
    assert ts.dtype == torch.float64
    assert ts[-1] == 0
    assert 0.9 < ts[0] <= 1
    assert (ts.diff() < 0).all()


@pytest.mark.parametrize("shift", [1.0, 7.0, 17.0])
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_simple_is_the_published_flow_schedule(num_steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    published.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])
    ours = schedule("simple", num_steps, shift=shift)
    torch.testing.assert_close(ours.float(), published.sigmas, **FLOAT32)
    torch.testing.assert_close(flow_matching().clock(ours[:-1]).float(), published.timesteps, **FLOAT32)


@pytest.mark.parametrize("num_steps", [1, 7, 30, 50, 999, 1000])
def test_trailing_is_the_published_spacing(num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing")
    published.set_timesteps(num_steps)
    diffusion = PROCESSES["vp"]
    ours = diffusion.clock(schedule("trailing", num_steps, diffusion=diffusion)[:-1]).round().long()
    assert ours.tolist() == published.timesteps.tolist()[:num_steps]


@pytest.mark.parametrize(
    ("name", "option"), [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")]
)
@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_karras_and_exponential_are_the_published_ones_on_a_table(name: str, option: str, num_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    table = scaled_linear_table()
    published = diffusers.EulerDiscreteScheduler(**{option: True})
    published.alphas_cumprod = table  # in float64: near the clean end float32 is off by 4e-5
    published.set_timesteps(num_steps)
    diffusion = PROCESSES["vp"]
    ours = schedule(name, num_steps, diffusion=diffusion)
    torch.testing.assert_close(diffusion.level(ours).float(), published.sigmas, **FLOAT32)
    # What the network is told between the table's entries: linear in log sigma on both sides.
    torch.testing.assert_close(diffusion.clock(ours[:-1]).float(), published.timesteps, rtol=0, atol=1e-3)


def test_karras_is_svds_schedule() -> None:
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.EulerDiscreteScheduler(
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        prediction_type="v_prediction",
        timestep_type="continuous",
    )
    published.set_timesteps(25)
    diffusion = PROCESSES["svd"]
    ours = schedule("karras", 25, diffusion=diffusion)
    torch.testing.assert_close(diffusion.sigma(ours).float(), published.sigmas, **FLOAT32)
    torch.testing.assert_close(diffusion.clock(ours[:-1]).float(), published.timesteps, rtol=0, atol=1e-6)


def test_karras_on_flow_matching_spans_the_trained_levels() -> None:
    """Levels of flow matching are its own times, 1 down to 1 / 1000, as the published scheduler has it."""
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    published.set_timesteps(12)
    torch.testing.assert_close(schedule("karras", 12).float(), published.sigmas, **FLOAT32)


@pytest.mark.parametrize("num_steps", [2, 8, 51])
def test_linear_quadratic_is_the_published_one(num_steps: int) -> None:
    module = pytest.importorskip("diffusers.pipelines.mochi.pipeline_mochi")
    published = module.linear_quadratic_schedule(num_steps, 0.025)
    torch.testing.assert_close(schedule("linear_quadratic", num_steps)[:-1], torch.tensor(published).double())


def test_shift_multiplies_the_odds_and_inverts() -> None:
    t = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    shifted = shift_time(t, 7.0)
    torch.testing.assert_close(shifted / (1 - shifted), 7 * t / (1 - t))
    torch.testing.assert_close(shift_time(shifted, 1 / 7), t)
    assert shift_time(torch.tensor(1.0), 7.0) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_partial_denoising_makes_the_last_steps_of_a_longer_run(name: str) -> None:
    diffusion = PROCESSES["vp"]
    part = schedule(name, 12, denoise=0.5, diffusion=diffusion)
    assert torch.equal(part, schedule(name, 24, diffusion=diffusion)[-13:])


def test_partial_denoising_of_the_simple_schedule_starts_at_its_strength() -> None:
    assert schedule("simple", 10, denoise=0.4)[0].item() == pytest.approx(0.4, abs=1e-12)


def test_trailing_without_a_table_is_simple() -> None:
    assert torch.equal(schedule("trailing", 9, shift=3.0), schedule("simple", 9, shift=3.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "karas", "num_steps": 10}, 'did you mean "karras"'),
        ({"name": "xyzzy", "num_steps": 10}, "one of exponential, karras"),
        ({"name": "simple", "num_steps": 0}, "number of steps"),
        ({"name": "simple", "num_steps": -3}, "number of steps"),
        ({"name": "simple", "num_steps": 10**6}, "number of steps"),
        ({"name": "simple", "num_steps": 2.5}, "number of steps"),
        ({"name": "simple", "num_steps": True}, "number of steps"),
        ({"name": "simple", "num_steps": 10, "shift": 0.0}, "shift"),
        ({"name": "simple", "num_steps": 10, "shift": math.nan}, "shift"),
        ({"name": "simple", "num_steps": 10, "denoise": 0.0}, "strength"),
        ({"name": "simple", "num_steps": 10, "denoise": 1.1}, "strength"),
        ({"name": "trailing", "num_steps": 1001, "diffusion": PROCESSES["vp"]}, "at most 1000"),
    ],
)
def test_unusable_settings_say_what_to_do(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        schedule(**arguments)  # type: ignore[arg-type]


def test_the_default_process_is_flow_matching() -> None:
    assert isinstance(PROCESSES["flow"], Diffusion)
    assert torch.equal(schedule("karras", 5), schedule("karras", 5, diffusion=PROCESSES["flow"]))
