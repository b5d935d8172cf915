"""Which times a sampler visits: descending lists in [0, 1] that end at 0 (clean).

A schedule is ``(num_steps, diffusion, shift) -> (num_steps + 1,)`` in float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .diffusion import Diffusion, flow_matching
from .errors import SettingsError, unknown_name

Schedule = Callable[[int, Diffusion, float], Tensor]

MAX_STEPS = 10_000


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Multiply t / (1 - t) by ``shift``: more steps at high noise (Esser et al. 2024, equation 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _linspace(start: float, end: float, num: int) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


def simple(num_steps: int, diffusion: Diffusion, shift: float) -> Tensor:
    """Equal steps in t, then shifted: HunyuanVideo's schedule."""
    return shift_time(_linspace(1, 0, num_steps + 1), shift)


def trailing(num_steps: int, diffusion: Diffusion, shift: float) -> Tensor:
    """Equal steps counted from the noisy end and rounded to the table's entries (Lin et al. 2024, table 2)."""
    num = diffusion.num_timesteps
    if num is None:
        return simple(num_steps, diffusion, shift)
    if num_steps > num:
        raise SettingsError(
            "There are more steps than the noise table has entries",
            given=f"{num_steps} steps",
            expected=f"at most {num} steps",
            do='use fewer steps, or the schedule "simple"',
        )
    # torch.round and numpy.round both take halves to even, as the published schedulers do.
    entries = (num - torch.arange(num_steps, dtype=torch.float64) * (num / num_steps)).round()
    return shift_time(torch.cat([entries / num, torch.zeros(1, dtype=torch.float64)]), shift)


def linear_quadratic(num_steps: int, diffusion: Diffusion, shift: float) -> Tensor:
    """Small equal steps down to t = 0.975 for half of the steps, then a parabola that joins without a kink
    (Movie Gen, Polyak et al. 2024, section 3.4.2)."""
    threshold, num_linear = 0.025, num_steps // 2
    if num_linear == 0:
        return simple(num_steps, diffusion, shift)
    num_quadratic = num_steps - num_linear
    slope = threshold / num_linear
    bend = (1 - threshold - slope * num_quadratic) / num_quadratic**2
    i = torch.arange(num_linear, dtype=torch.float64)
    j = torch.arange(num_quadratic, dtype=torch.float64)
    clean = torch.cat([slope * i, threshold + slope * j + bend * j**2, torch.ones(1, dtype=torch.float64)])
    return shift_time(1 - clean, shift)


def karras(num_steps: int, diffusion: Diffusion, shift: float, *, rho: float = 7.0) -> Tensor:
    """Equal steps in level**(1 / rho) (Karras et al. 2022, equation 5), then 0."""
    low, high = _level_range(diffusion, shift)
    levels = _linspace(high ** (1 / rho), low ** (1 / rho), num_steps) ** rho
    return _from_levels(levels, diffusion)


def exponential(num_steps: int, diffusion: Diffusion, shift: float) -> Tensor:
    """Equal steps in log(level), then 0."""
    low, high = _level_range(diffusion, shift)
    return _from_levels(_linspace(math.log(high), math.log(low), num_steps).exp(), diffusion)


def _level_range(diffusion: Diffusion, shift: float) -> tuple[float, float]:
    """The levels between which the network was trained, both moved by ``shift``."""
    if shift == 1.0:
        return diffusion.levels
    ends = diffusion.time_at(torch.tensor(diffusion.levels, dtype=torch.float64))
    low, high = diffusion.level(shift_time(ends, shift)).tolist()
    return low, min(high, diffusion.levels[1])


def _from_levels(levels: Tensor, diffusion: Diffusion) -> Tensor:
    return torch.cat([diffusion.time_at(levels).clamp(max=1), torch.zeros(1, dtype=torch.float64)])


SCHEDULES: dict[str, Schedule] = {
    "simple": simple,
    "karras": karras,
    "exponential": exponential,
    "linear_quadratic": linear_quadratic,
    "trailing": trailing,
}


def schedule(
    name: str,
    num_steps: int,
    *,
    shift: float = 1.0,
    diffusion: Diffusion | None = None,
    denoise: float = 1.0,
) -> Tensor:
    """The times of a run.

    Args:
        name: a key of :data:`SCHEDULES`.
        num_steps: steps that are made.
        shift: > 1 spends more steps at high noise; 1 leaves the schedule alone.
        diffusion: the process, flow matching when None.
        denoise: in (0, 1]; below 1 only the last steps of a longer schedule are made, num_steps / denoise long,
            for starting from a noised video.

    Returns:
        (num_steps + 1,) float64 on the CPU, strictly descending, the last one 0.

    Raises:
        SettingsError: unknown name, or a number out of range.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    _check_steps(num_steps)
    if not (math.isfinite(shift) and shift > 0):
        raise SettingsError("The shift cannot be used", given=shift, expected="a number above 0", do="use 1 for none")
    if not 0 < denoise <= 1:
        raise SettingsError(
            "The denoising strength cannot be used", given=denoise, expected="above 0 and at most 1", do="use 1 for all"
        )
    total = max(num_steps, int(num_steps / denoise))
    ts = SCHEDULES[name](total, diffusion or flow_matching(), float(shift))
    return ts[-(num_steps + 1) :]


def to_sigmas(ts: Tensor, diffusion: Diffusion) -> Tensor:
    """Times as ComfyUI's SIGMAS: (num_steps + 1,) float32 noise levels, descending to 0; t in flow matching."""
    return diffusion.level(ts).clamp(max=diffusion.levels[1]).float()


def from_sigmas(sigmas: Sequence[float] | Tensor, diffusion: Diffusion) -> Tensor:
    """ComfyUI's SIGMAS as times.

    Returns:
        (num_steps + 1,) float64 on the CPU, strictly descending, the last one 0.

    Raises:
        SettingsError: not a descending list of two numbers or more that ends in 0, or one that begins above the level
            of pure noise.
    """
    levels = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    top = diffusion.levels[1]
    ends_clean = levels.ndim == 1 and 2 <= len(levels) <= MAX_STEPS + 1 and levels[-1] == 0
    if not ends_clean or not bool(levels.isfinite().all()) or not bool((levels.diff() < 0).all()):
        listed = levels.flatten().tolist()
        given = ", ".join(f"{value:.4g}" for value in listed[:8]) + (", ..." if len(listed) > 8 else "")
        raise SettingsError(
            "The sigmas cannot be used",
            given=given or "an empty list",
            expected="two numbers or more, each below the one before, the last one 0",
            do="make them with Sigmas (VidGen)",
        )
    if levels[0] > top * (1 + 1e-6):
        raise SettingsError(
            "The sigmas begin above this network's noise",
            given=f"{float(levels[0]):.4g}",
            expected=f"at most {top:.4g}",
            do="make them with Sigmas (VidGen) for this model; those of another kind of model do not fit",
        )
    # Pure noise may have no finite level of its own (zero terminal SNR); the last one stands for it.
    ts = diffusion.time_at(levels[:-1]).clamp(max=1).masked_fill(levels[:-1] >= top * (1 - 1e-6), 1.0)
    return torch.cat([ts, levels[-1:]])


def _check_steps(num_steps: int) -> None:
    whole = isinstance(num_steps, int) and not isinstance(num_steps, bool)
    if not whole or not 1 <= num_steps <= MAX_STEPS:
        raise SettingsError(
            "The number of steps cannot be used",
            given=repr(num_steps),
            expected=f"a whole number from 1 to {MAX_STEPS}",
            do="use 20 to 50 steps",
        )
