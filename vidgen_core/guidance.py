"""Functions over ``Denoise = (x_t, t) -> x0``: what is asked of the network, and what is made of its answers.

Each takes a Denoise and gives a Denoise, so they nest: ``hold(cfg(cond, uncond, 6.0), held)``. None of them
knows a model or a sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .diffusion import Diffusion
from .errors import SettingsError, unknown_name
from .types import Denoise, Held

Scale = float | Tensor
"""a guidance scale; a tensor broadcasts against the latents, e.g. (1, 1, T, 1, 1) for one scale per frame"""
ScaleAt = Callable[[float], Scale]
"""t in [0, 1] -> the guidance scale at that time"""


def cfg(
    cond: Denoise,
    uncond: Denoise,
    scale: Scale | ScaleAt,
    *,
    rescale: float = 0.0,
    diffusion: Diffusion | None = None,
) -> Denoise:
    """Classifier-free guidance, ``uncond + scale (cond - uncond)`` (Ho & Salimans 2022).

    ``uncond`` is not run at times where the scale is 1. Guiding x0 or the network's output is the same thing,
    since one is a line in the other with the same x_t.

    Args:
        scale: a number, a tensor, or a function of t (see :data:`CFG_SCHEDULES`).
        rescale: in [0, 1], how far :func:`rescale_guidance` is applied.
        diffusion: rescale what the network predicts, as Lin et al. and diffusers do, in place of x0.
    """
    if not 0 <= rescale <= 1:
        raise SettingsError(
            "The guidance rescale cannot be used", given=rescale, expected="a number from 0 to 1", do="use 0 for none"
        )

    def guided(x: Tensor, t: Tensor) -> Tensor:
        now = scale(float(t.max())) if callable(scale) else scale
        positive = cond(x, t)
        if not isinstance(now, Tensor) and now == 1.0:
            return positive
        negative = uncond(x, t)
        factor = now.to(positive) if isinstance(now, Tensor) else now
        x0 = negative + factor * (positive - negative)
        if rescale == 0.0:
            return x0
        if diffusion is None:
            return rescale_guidance(x0, positive, rescale)
        output, wanted = diffusion.target(x0, x, t), diffusion.target(positive, x, t)
        return diffusion.to_x0(x, rescale_guidance(output, wanted, rescale), t)

    return guided


def rescale_guidance(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """Give each guided sample the spread of the conditional one, mixed in by ``amount``
    (Lin et al. 2024, equations 15 and 16). Both (B, ...)."""
    dims = tuple(range(1, guided.ndim))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (amount * ratio + (1 - amount))


def cfg_zero_star(
    cond: Denoise, uncond: Denoise, scale: Scale | ScaleAt, diffusion: Diffusion, *, rescale: float = 0.0
) -> Denoise:
    """Guidance with an optimised scale (CFG-Zero*, Fan et al. 2025, equation 7): before it is guided away from, the
    unconditional output u is multiplied by s = <v, u> / |u|^2 of each sample, which brings it nearest to the
    conditional output v. So guidance acts only along what is not common to both.

    Outputs are what the network predicts under ``diffusion`` (the velocity of flow matching). Otherwise as :func:`cfg`.
    """

    def nearest(x: Tensor, t: Tensor) -> Tensor:
        outputs = (diffusion.target(denoise(x, t), x, t) for denoise in (cond, uncond))
        v, u = (output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs)
        dims = tuple(range(1, v.ndim))
        norm = u.square().sum(dim=dims, keepdim=True)
        best = torch.where(norm > 0, (v * u).sum(dim=dims, keepdim=True) / norm, 1.0)
        return diffusion.to_x0(x, (best * u).to(x.dtype), t)

    cond, uncond = once(cond), once(uncond)
    return cfg(cond, nearest, scale, rescale=rescale, diffusion=diffusion)


def zero_init(denoise: Denoise, diffusion: Diffusion, until: float) -> Denoise:
    """The first steps stand still (CFG-Zero*, section 3.3): at times t above ``until`` the velocity is 0 and the
    network is not asked, since there a network is farther from the truth than nothing at all.

    For straight processes (flow matching) only, where no velocity means no motion.
    """

    def still_at_first(x: Tensor, t: Tensor) -> Tensor:
        if float(t.max()) > until:
            return diffusion.to_x0(x, torch.zeros_like(x), t)
        return denoise(x, t)

    return still_at_first


def away_from(
    guided: Denoise, cond: Denoise, weak: Denoise, scale: Callable[[float], float], *, rescale: float = 0.0
) -> Denoise:
    """``guided + scale (cond - weak)``: away from what a weakened network says under the same conditioning.

    With blocks left out this is skip-layer guidance, with attention left out spatio-temporal guidance (Hyung et al.
    2024, equation 6). ``weak`` is not asked at times where the scale is 0, and then nothing is changed.

    Args:
        cond: the same denoiser that ``guided`` asks; wrap it in :func:`once` before, or it runs twice.
        rescale: in [0, 1], how far the result is given the spread of ``cond``'s answer.
    """

    def pushed(x: Tensor, t: Tensor) -> Tensor:
        x0, now = guided(x, t), scale(float(t.max()))
        if now == 0.0:
            return x0
        strong = cond(x, t)
        x0 = x0 + now * (strong - weak(x, t))
        return x0 if rescale == 0.0 else rescale_guidance(x0, strong, rescale)

    return pushed


def once(denoise: Denoise) -> Denoise:
    """Asked the very same question twice in a row (the same tensors), it answers from memory."""
    last: list[Tensor] = []

    def remembering(x: Tensor, t: Tensor) -> Tensor:
        if not (last and last[0] is x and last[1] is t):
            last[:] = [x, t, denoise(x, t)]
        return last[2]

    return remembering


def dynamic_thresholding(denoise: Denoise, *, percentile: float = 0.995, limit: float = 1.0) -> Denoise:
    """Clip x0 at a percentile s of its magnitude, when that is above ``limit``, and scale back by limit / s
    (Saharia et al. 2022, section 2.3). Meant for pixels in [-limit, limit]; latents have no such bound.

    Raises:
        SettingsError: percentile outside (0, 1] or limit not above 0.
    """
    if not 0 < percentile <= 1 or limit <= 0:
        raise SettingsError(
            "The dynamic threshold cannot be used",
            given=f"percentile {percentile}, limit {limit}",
            expected="a percentile above 0 and at most 1, a limit above 0",
            do="use 0.995 and 1",
        )

    def thresholded(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x, t)
        bound = _quantile(x0.abs().flatten(1), percentile).clamp(min=limit)
        bound = bound.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.dtype)
        return x0.clamp(-bound, bound) * (limit / bound)

    return thresholded


def _quantile(values: Tensor, q: float) -> Tensor:
    """(B, N) -> (B,) with linear interpolation; ``torch.quantile`` refuses more than 2**24 values."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    position = q * (values.shape[1] - 1)
    low = math.floor(position)
    at_low = values.kthvalue(low + 1, dim=1).values
    if low == position:
        return at_low
    at_high = values.kthvalue(low + 2, dim=1).values
    return torch.lerp(at_low, at_high, position - low)


def hold(denoise: Denoise, held: Held) -> Denoise:
    """Token replacement: the held frames go in clean with t = 0 of their own and come out unchanged.

    The inner ``denoise`` is given t as (B, 1, T, 1, 1).
    """

    def held_denoise(x: Tensor, t: Tensor) -> Tensor:
        mask = held.mask.to(x.device)
        clean = held.latents.to(x)
        t_frames = torch.where(mask, 0.0, _over_latents(t, x))
        return torch.where(mask, clean, denoise(torch.where(mask, clean, x), t_frames))

    return held_denoise


def keep(denoise: Denoise, source: Tensor, mask: Tensor, until: Tensor | None = None) -> Denoise:
    """Inpainting: where ``mask`` is 0 the clean latents are known to be ``source``, where it is 1 the network is asked,
    between the two are mixed.

    A sampler so told re-noises the known part by itself: at every step it stands at ``source`` plus the noise that was
    put in, at the level of that step, and after the last one it is ``source`` to the bit.

    Args:
        source: (B, C, T, H, W) clean latents.
        mask: broadcastable against them, in [0, 1].
        until: broadcastable against them: the time at which the source lets go and the network goes on alone; None
            and 0: never.
    """

    def kept(x: Tensor, t: Tensor) -> Tensor:
        x0 = denoise(x, t)
        now = mask.to(x0)
        if until is not None:
            now = torch.where(_over_latents(t, x) > until.to(x.device), now, 1.0)
        return torch.lerp(source.to(x0), x0, now)

    return kept


def _over_latents(t: Tensor, x: Tensor) -> Tensor:
    """0-dim, (B,) or per-frame ``t`` on the device of ``x``, in a shape that broadcasts against it. In float64 where
    there is one: a time in half precision would be another time."""
    t = t.to(device="cpu" if t.ndim == 0 else x.device)
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    return (t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim < 2 else t).to(dtype=dtype).to(x.device)


# --- guidance that changes along the run: functions of t ---------------------------------------------------


def constant(scale: float) -> ScaleAt:
    """The same scale at all times."""
    return lambda t: scale


def interval(scale: float, *, start: float = 1.0, end: float = 0.0) -> ScaleAt:
    """``scale`` for start >= t >= end and 1 (no guidance, no second run) elsewhere (Kynkäänniemi et al. 2024)."""
    return lambda t: scale if end <= t <= start else 1.0


def linear(scale: float, *, start: float = 1.0, end: float = 0.0) -> ScaleAt:
    """From 1 at t = start to ``scale`` at t = end along a line, constant outside."""
    return lambda t: 1.0 + (scale - 1.0) * _progress(t, start, end)


def cosine(scale: float, *, start: float = 1.0, end: float = 0.0) -> ScaleAt:
    """As :func:`linear` along half a cosine: slow at both ends."""
    return lambda t: 1.0 + (scale - 1.0) * (1 - math.cos(math.pi * _progress(t, start, end))) / 2


def _progress(t: float, start: float, end: float) -> float:
    """0 at t = start, 1 at t = end < start."""
    return min(1.0, max(0.0, (start - t) / (start - end)))


def dynamic(scale: float, *, start: float = 1.0, end: float = 0.0, num_steps: int = 50) -> ScaleAt:
    """:func:`power_cosine` for start >= t >= end and 1 elsewhere."""
    at = power_cosine(scale, num_steps)
    return lambda t: at(t) if end <= t <= start else 1.0


CFG_SCHEDULES: dict[str, Callable[..., ScaleAt]] = {
    "constant": lambda scale, *, start=1.0, end=0.0: constant(scale),
    "interval": interval,
    "linear": linear,
    "cosine": cosine,
    "dynamic": dynamic,
}


def cfg_schedule(name: str, scale: float, *, start: float = 1.0, end: float = 0.0, num_steps: int = 50) -> ScaleAt:
    """A guidance schedule by name; ``start`` > ``end`` are the times between which it acts, ``num_steps`` is the run's.

    Raises:
        SettingsError: unknown name, a scale that is not a finite number, or 1 >= start > end >= 0 broken.
    """
    if name not in CFG_SCHEDULES:
        raise unknown_name("guidance schedule", name, CFG_SCHEDULES)
    if not math.isfinite(scale):
        raise SettingsError(
            "The guidance scale cannot be used", given=scale, expected="a finite number", do="use 1 for none"
        )
    if not 1 >= start > end >= 0:
        raise SettingsError(
            "The times of the guidance schedule cannot be used",
            given=f"start {start}, end {end}",
            expected="1 >= start > end >= 0 (1 is noise, 0 is clean)",
            do="use start 1 and end 0 for the whole run",
        )
    steps = {"num_steps": num_steps} if name == "dynamic" else {}
    return CFG_SCHEDULES[name](scale, start=start, end=end, **steps)


def power_cosine(scale: float, num_steps: int, *, num_timesteps: int = 1000, power: float = 5.0) -> ScaleAt:
    """CogVideoX's dynamic guidance ``1 + scale (1 - cos(pi ((N - i) / N)**power)) / 2`` with N the number of steps
    and i the entry of the noise table (not the step): the published code mixes the two, and images depend on it."""

    def at(t: float) -> float:
        entry = round(num_timesteps * t) - 1
        return 1 + scale * (1 - math.cos(math.pi * ((num_steps - entry) / num_steps) ** power)) / 2

    return at


def oscillating(scale: float, ts: Tensor, *, low: float = 1.0, after: int = 10) -> ScaleAt:
    """``scale`` for the first ``after`` steps of the run ``ts``, then ``low`` and ``scale`` in turn (Ho et al. 2022,
    Imagen Video, section 3.4): strong guidance without burnt colours."""
    times = ts.detach().to("cpu", torch.float64)

    def at(t: float) -> float:
        step = int((times - t).abs().argmin())
        return low if step >= after and (step - after) % 2 == 0 else scale

    return at


def per_frame(first: float, last: float, num_frames: int) -> Tensor:
    """(1, 1, T, 1, 1) scales rising in a line along the clip (SVD: 1 to 2.5 or 3)."""
    return torch.linspace(first, last, num_frames).reshape(1, 1, -1, 1, 1)


def per_frame_triangle(ends: float, middle: float, num_frames: int) -> Tensor:
    """(1, 1, T, 1, 1) scales from ``ends`` up to ``middle`` and back, for orbits that close (SV3D)."""
    ramp = 1 - torch.linspace(-1, 1, num_frames).abs()
    return (ends + (middle - ends) * ramp).reshape(1, 1, -1, 1, 1)
