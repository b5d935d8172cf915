"""Noise processes: one frozen record says how data turn into noise and what the network predicts.

Every process is ``x_t = alpha(t) x0 + sigma(t) noise`` with t in [0, 1], 0 clean and 1 noise, and every
prediction is a line: ``x0 = a(t) x_t + b(t) output``. Sampling reads that line forwards, training's target
is the same line solved for the output, so the two cannot drift apart.

=============  ================  ========  ==============  ============================================
process        alpha, sigma      predicts  network's clock  source
=============  ================  ========  ==============  ============================================
flow_matching  1 - t, t          flow      1000 t          Lipman et al. 2023; HunyuanVideo
vp             from a table      v, eps    table index     Ho et al. 2020; Lin et al. 2024 (zero SNR)
edm            1, sigma          edm, v    ln(sigma) / 4   Karras et al. 2022; "v" is sgm's (SVD)
snap           1 / s, sigma      snap      ln(sigma) / 4   Menapace et al. 2024 (Snap Video)
=============  ================  ========  ==============  ============================================

Not here: which times are visited (``timesteps``) and how a step is made (``sampling``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import SettingsError

Prediction = Literal["x0", "eps", "v", "flow", "edm", "snap"]
TimeFunction = Callable[[Tensor], Tensor]


def _line_x0(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(alpha), torch.ones_like(alpha)


def _line_eps(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return 1 / alpha, -sigma / alpha


def _line_v(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    # Salimans & Ho 2022 on the unit circle; dividing by the norm gives sgm's VScaling where alpha = 1.
    norm = torch.hypot(alpha, sigma)
    return alpha / norm**2, -sigma / norm


def _line_flow(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    # output = noise - x0, hence x_t = (alpha + sigma) x0 + sigma output.
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def _line_edm(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    # c_skip and c_out of Karras et al. 2022, table 1, for alpha = 1.
    norm = torch.hypot(alpha * sigma_data, sigma)
    return alpha * sigma_data**2 / norm**2, sigma * sigma_data / norm


def _line_snap(alpha: Tensor, sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    # The target -sigma x0 + sigma_data^2 noise, divided by its own spread (Snap Video, table of section 3.1).
    spread = sigma_data * torch.sqrt(sigma**2 + sigma_data**2)
    total = alpha + sigma**2 / sigma_data**2
    return 1 / total, -sigma * spread / sigma_data**2 / total


LINES: dict[str, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "x0": _line_x0,
    "eps": _line_eps,
    "v": _line_v,
    "flow": _line_flow,
    "edm": _line_edm,
    "snap": _line_snap,
}
"""(alpha, sigma, sigma_data) -> (a, b) of ``x0 = a x_t + b output`` for each kind of prediction."""


def wide(t: Tensor) -> Tensor:
    """``t`` in float64, or in float32 on a device that has no float64."""
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def fit(value: Tensor, x: Tensor) -> Tensor | float:
    """Make a 0-dim, (B,) or broadcastable ``value`` multiply ``x`` without changing its dtype or device."""
    if value.ndim == 0:
        return value.item()
    if value.ndim == 1:
        value = value.reshape(-1, *[1] * (x.ndim - 1))
    return value.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def _combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """``a x + b y`` in at least float32, given back in the dtype of ``x``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (fit(a, x) * x.to(dtype) + fit(b, x) * y.to(dtype)).to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diffusion:
    """One noise process and one kind of prediction.

    ``t`` is 0-dim, (B,) or broadcastable against x, e.g. (B, 1, T, 1, 1) for a time per frame.
    """

    alpha: TimeFunction
    """weight of the data at t; 1 at t = 0 (but for ``snap``) and falling, 0 is allowed at t = 1"""
    sigma: TimeFunction
    """weight of the noise at t; 0 at t = 0 and rising"""
    predicts: Prediction
    clock: TimeFunction
    """what the network is told in place of t"""
    input_scale: TimeFunction
    """what x_t is multiplied with before the network sees it (EDM's c_in)"""
    time_at: TimeFunction
    """the t at which :meth:`level` has the given value"""
    levels: tuple[float, float]
    """the smallest level above zero and the largest finite one that the network was trained on"""
    sigma_data: float = 1.0
    """standard deviation of the data, read by "edm" and "snap" only"""
    straight: bool = False
    """alpha + sigma = 1 everywhere, so that paths are straight in sigma itself (flow matching)"""
    num_timesteps: int | None = None
    """length of the table of a discrete process; None for a continuous one"""

    def level(self, t: Tensor) -> Tensor:
        """The noise level in which k-diffusion's schedules and Heun's slope are written:
        sigma for straight paths, sigma / alpha otherwise."""
        return self.sigma(wide(t)) if self.straight else self.sigma(wide(t)) / self.alpha(wide(t))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of ``x0 = a x_t + b output``, in the shape of ``t`` and float64."""
        t = wide(t)
        return LINES[self.predicts](self.alpha(t), self.sigma(t), self.sigma_data)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t`` in the shape and dtype of ``x0``."""
        t = wide(t)
        return _combine(self.alpha(t), x0, self.sigma(t), noise)

    def start(self, noise: Tensor, t: Tensor) -> Tensor:
        """Unit ``noise`` scaled to the spread that x_t has for data of unit spread: where sampling begins."""
        t = wide(t)
        return noise * fit(torch.hypot(self.alpha(t), self.sigma(t)), noise)

    def to_x0(self, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The clean latents that the network's raw ``output`` means, in the dtype of ``x_t``."""
        a, b = self.coefficients(t)
        return _combine(a, x_t, b, output)

    def target(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The output for which :meth:`to_x0` gives ``x0``; 0 where t = 0, since no output matters there."""
        a, b = self.coefficients(t)
        return _combine(_safe_divide(torch.ones_like(b), b), x0, -_safe_divide(a, b), x_t)

    def target_from_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """:meth:`target` of ``add_noise(x0, noise, t)`` without the cancellation near t = 0."""
        t = wide(t)
        a, b = self.coefficients(t)
        return _combine(_safe_divide(1 - a * self.alpha(t), b), x0, -_safe_divide(a * self.sigma(t), b), noise)


def _safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0: a held frame (t = 0) must not put NaN into a masked loss."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def flow_matching(*, predicts: Prediction = "flow", num_timesteps: int = 1000) -> Diffusion:
    """Rectified flow: the network is told ``num_timesteps * t`` and predicts noise - data."""
    return Diffusion(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        predicts=predicts,
        clock=lambda t: num_timesteps * t,
        input_scale=torch.ones_like,
        time_at=lambda level: level,
        levels=(1 / num_timesteps, 1.0),
        straight=True,
    )


def edm(
    *,
    predicts: Prediction = "edm",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    rho: float = 7.0,
) -> Diffusion:
    """Noise is added to data at full strength: ``sigma(t) = sigma_max t**rho`` (Karras et al. 2022, equation 5
    with sigma_min -> 0, so that t = 0 is clean). SVD is ``edm(predicts="v", sigma_max=700, sigma_data=1)``."""
    return _variance_exploding(1.0, sigma_data, predicts, (sigma_min, sigma_max), sigma_data, rho)


def snap(
    *, sigma_in: float, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 1.0, rho: float = 7.0
) -> Diffusion:
    """Snap Video: the data are divided by ``sigma_in`` (upsampling factor times sqrt(frames)) and the noise is not."""
    spread = sigma_data / sigma_in
    return _variance_exploding(1 / sigma_in, spread, "snap", (sigma_min, sigma_max), sigma_data, rho)


def _variance_exploding(
    alpha: float,
    spread: float,
    predicts: Prediction,
    sigma_range: tuple[float, float],
    sigma_data: float,
    rho: float,
) -> Diffusion:
    """Constant ``alpha``; ``spread`` is the standard deviation of alpha times the data."""
    sigma_min, sigma_max = sigma_range
    if not 0 < sigma_min < sigma_max:
        raise SettingsError(
            "The range of noise levels is empty",
            given=f"sigma_min {sigma_min}, sigma_max {sigma_max}",
            expected="0 < sigma_min < sigma_max",
            do="swap or correct the two numbers",
        )

    def sigma(t: Tensor) -> Tensor:
        return sigma_max * t**rho

    return Diffusion(
        alpha=lambda t: torch.full_like(t, alpha),
        sigma=sigma,
        predicts=predicts,
        # Below sigma_min the network knows nothing; the clamp also keeps held frames (t = 0) finite.
        clock=lambda t: sigma(t).clamp(min=sigma_min).log() / 4,
        input_scale=lambda t: 1 / torch.sqrt(spread**2 + sigma(t) ** 2),
        time_at=lambda level: (level * alpha / sigma_max) ** (1 / rho),
        levels=(sigma_min / alpha, sigma_max / alpha),
        sigma_data=sigma_data,
    )


def scaled_linear_table(num_timesteps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """alphas_cumprod of latent diffusion's schedule: sqrt(beta) is linear (Rombach et al. 2022). float64."""
    betas = torch.linspace(math.sqrt(start), math.sqrt(end), num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def snr_shift(alphas_cumprod: Tensor, scale: float) -> Tensor:
    """Divide the signal-to-noise ratio of a table by ``scale`` (CogVideoX: 3 for 2B, 1 otherwise)."""
    return alphas_cumprod / (scale + (1 - scale) * alphas_cumprod)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch alpha so that the last entry is pure noise (Lin et al. 2024, algorithm 1)."""
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2


def vp(alphas_cumprod: Tensor, *, predicts: Prediction = "v") -> Diffusion:
    """A variance-preserving process from a table; entry i of N sits at t = (i + 1) / N and t = 0 is clean.

    Between entries log(sigma / alpha) is linear in t, as the discrete schedulers' users expect; in the two outer
    intervals, where that is infinite at one end, the angle atan(sigma / alpha) is linear instead.

    Args:
        alphas_cumprod: (N,) falling from below 1; the last entry may be exactly 0 (zero terminal SNR).
        predicts: "v", "eps", "x0" or "flow". "eps" says nothing about x0 at zero SNR and is refused there.
    """
    table = alphas_cumprod.detach().to("cpu", torch.float64)
    if predicts == "eps" and table[-1] == 0:
        raise SettingsError(
            "A network that predicts noise cannot start from pure noise",
            given='predicts="eps" with alphas_cumprod[-1] = 0',
            expected='predicts="v" with zero terminal SNR',
            do="leave out zero_terminal_snr for this checkpoint",
        )
    num = len(table)
    grid = _AngleGrid.of(table)
    finite = grid.log_ratio[grid.log_ratio.isfinite()]
    # diffusers caps an infinite last level at alphas_cumprod = 2**-24, that is sigma / alpha = 2**12.
    return Diffusion(
        alpha=grid.alpha,
        sigma=grid.sigma,
        predicts=predicts,
        # Rounded, so that an entry of the table is told as a whole number even if t came in float32.
        clock=lambda t: torch.round(num * t - 1, decimals=3).clamp(min=0),
        input_scale=torch.ones_like,
        time_at=grid.time_at,
        levels=(math.exp(finite[0]), 2.0**12 if table[-1] == 0 else math.exp(finite[-1])),
        num_timesteps=num,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _AngleGrid:
    """N + 1 points of a path on the unit circle, the first one clean, and what lies between them."""

    angle: Tensor
    """(N + 1,) atan(sigma / alpha), from 0"""
    complement: Tensor
    """(N + 1,) atan(alpha / sigma): kept apart so that alpha is exactly 0 at zero SNR"""
    log_ratio: Tensor
    """(N + 1,) log(sigma / alpha), from -inf to perhaps inf"""

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> _AngleGrid:
        clean = torch.ones(1, dtype=torch.float64)
        alpha = torch.cat([clean, alphas_cumprod]).sqrt()
        sigma = torch.cat([clean * 0, (1 - alphas_cumprod).sqrt()])
        return cls(
            angle=torch.atan2(sigma, alpha), complement=torch.atan2(alpha, sigma), log_ratio=sigma.log() - alpha.log()
        )

    def _interval(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position = t * (len(self.angle) - 1)
        index = position.floor().long().clamp(0, len(self.angle) - 2)
        return index, position - index

    def _between(self, values: Tensor, sign: float, t: Tensor) -> Tensor:
        index, weight = self._interval(t)
        values, log_ratio = values.to(t), self.log_ratio.to(t)
        low, high = log_ratio[index], log_ratio[index + 1]
        inner = torch.atan(torch.exp(sign * (low + weight * (high - low))))
        outer = values[index] + weight * (values[index + 1] - values[index])
        return torch.sin(torch.where(low.isfinite() & high.isfinite(), inner, outer))

    def alpha(self, t: Tensor) -> Tensor:
        return self._between(self.complement, -1.0, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._between(self.angle, 1.0, t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """The inverse of sigma / alpha; ratios beyond the table are clamped to it."""
        angle, log_ratio = self.angle.to(ratio), self.log_ratio.to(ratio)
        wanted = torch.atan(ratio).clamp(max=angle[-1])
        index = (torch.searchsorted(angle, wanted) - 1).clamp(0, len(angle) - 2)
        low, high = log_ratio[index], log_ratio[index + 1]
        inner = (ratio.log() - low) / (high - low)
        outer = (wanted - angle[index]) / (angle[index + 1] - angle[index])
        weight = torch.where(low.isfinite() & high.isfinite(), inner, outer).clamp(0, 1)
        return (index + weight) / (len(angle) - 1)
