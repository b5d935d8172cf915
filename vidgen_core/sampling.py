"""Samplers: the only step loop, and one short function per method.

A method is ``(Step) -> (x, x0)``: one step from time t to time s. It reads weights of data and noise as numbers
(alpha, sigma), so the same line is DDIM on a variance-preserving process, Karras' Euler on EDM and the Euler of
flow matching; alpha = 0 (zero terminal SNR, or flow matching at t = 1) needs no special value. What a multistep
method remembers lies in ``Step.memory``, so a run can be stopped after any step, saved, and continued to the
same bits.

Not here: the times (``timesteps``), what the network is asked (``guidance``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .diffusion import Diffusion
from .errors import CheckpointError, FileError, NumericsError, SettingsError, unknown_name
from .finite import Flag
from .noise import NoiseStream
from .types import Denoise

STATE_FORMAT = "1"


@dataclass(slots=True, kw_only=True)
class SamplerState:
    """Where a run stands. Empty means not begun; :func:`sample` keeps it up to date after every step, so it is
    whole whenever an exception (a cancelled run, say) leaves the loop."""

    sampler: str = ""
    step: int = 0
    """steps that are done"""
    eta: float = 0.0
    seeds: tuple[int, ...] = ()
    x: Tensor | None = None
    """(B, ...) latents after ``step`` steps"""
    ts: Tensor | None = None
    """(num_steps + 1,) the times of the whole run"""
    noise: Tensor | None = None
    """where the noise stream stands"""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """what a multistep method remembers of earlier steps"""
    run: str = ""
    """what the caller wrote down about the run (prompt, checkpoint, ...), to know it again"""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all. Raises :class:`FileError`."""
        from safetensors.torch import save

        if self.x is None or self.ts is None:
            raise SettingsError("A run that has not begun cannot be saved", do="save after the first step")
        tensors = {"x": self.x, "ts": self.ts} | {f"memory.{key}": value for key, value in self.memory.items()}
        if self.noise is not None:
            tensors["noise"] = self.noise
        numbers = {"sampler": self.sampler, "step": self.step, "eta": self.eta, "seeds": list(self.seeds)}
        numbers["run"] = self.run
        metadata = {"vidgen.part": "sampler_state", "vidgen.format": STATE_FORMAT, "vidgen.state": json.dumps(numbers)}
        # Clones: two names may share memory (x and the remembered x), which the format refuses.
        whole = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        _write_whole(Path(path), save(whole, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SamplerState:
        """Read :meth:`save`'s file. Raises :class:`FileError` or :class:`CheckpointError`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except OSError as error:
            raise FileError("The saved run cannot be read", given=path, do=f"check the file ({error})") from error
        except SafetensorError as error:
            raise CheckpointError("The saved run is damaged", given=path, do="start the run afresh") from error
        if metadata.get("vidgen.part") != "sampler_state" or metadata.get("vidgen.format") != STATE_FORMAT:
            raise CheckpointError(
                "This file is not a saved run of this version",
                given=path,
                expected=f"a safetensors file with vidgen.part = sampler_state, format {STATE_FORMAT}",
                do="choose the file that the interrupted run has written",
            )
        try:
            return cls._from_file(json.loads(metadata["vidgen.state"]), tensors)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError("The saved run is damaged", given=path, do="start the run afresh") from error

    @classmethod
    def _from_file(cls, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> SamplerState:
        prefix = "memory."
        return cls(
            sampler=numbers["sampler"],
            step=numbers["step"],
            eta=numbers["eta"],
            seeds=tuple(numbers["seeds"]),
            x=tensors["x"],
            ts=tensors["ts"],
            noise=tensors.get("noise"),
            memory={key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)},
            run=numbers["run"],
        )


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside ``path`` and rename, so that a crash leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FileError(
            "The run cannot be saved", given=path, do=f"free disk space or choose another folder ({error})"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInfo:
    """What ``on_step`` is told after each step."""

    step: int
    """steps that are done, 1 after the first"""
    num_steps: int
    x: Tensor
    """(B, ...) the latents now"""
    x0: Tensor
    """(B, ...) the clean latents that the network expected in this step: the preview"""
    t: float
    """the time at which x now stands; 0 after the last step"""
    state: SamplerState


@dataclass(frozen=True, slots=True)
class Point:
    """One time of a run as plain numbers, so that no arithmetic on the device waits for the host."""

    t: Tensor
    """0-dim float64 on the CPU"""
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """lambda of DPM-Solver: log(alpha / sigma); -inf at zero SNR, inf when clean."""
        return _log(self.alpha) - _log(self.sigma)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Everything a method may read for one step."""

    denoise: Denoise
    diffusion: Diffusion
    x: Tensor
    points: tuple[Point, ...]
    """all times of the run"""
    index: int
    """the step goes from ``points[index]`` to ``points[index + 1]``"""
    eta: float
    """how stochastic the step is: 0 not at all, 1 as the reversed diffusion"""
    memory: dict[str, Tensor]
    """read the last step's and leave this step's"""
    fresh_noise: Callable[[], Tensor]

    @property
    def ends(self) -> tuple[Point, Point]:
        return self.points[self.index], self.points[self.index + 1]


Method = Callable[[Step], tuple[Tensor, Tensor]]


def _retained(t: Point, s: Point) -> float:
    """exp(-h) = (sigma_s / alpha_s) / (sigma_t / alpha_t): the part of the noise at t that is left at s."""
    return s.sigma * t.alpha / (s.alpha * t.sigma)


def _line(x: Tensor, x0: Tensor, t: Point, s: Point, sigma_s: float) -> Tensor:
    """x0 at s plus the noise found in x, at the level ``sigma_s`` (DDIM, Song et al. 2021, equation 12)."""
    return s.alpha * x0 + (sigma_s / t.sigma) * (x - t.alpha * x0)


def euler(step: Step) -> tuple[Tensor, Tensor]:
    """Order 1. With eta > 0 a part of the noise is replaced by fresh noise: eta = 1 is the ancestral sampler
    of k-diffusion and DDPM's posterior, values between are DDIM's eta."""
    t, s = step.ends
    x0 = step.denoise(step.x, t.t)
    fresh = step.eta * s.sigma * math.sqrt(max(0.0, 1 - _retained(t, s) ** 2))
    fresh = min(fresh, s.sigma)
    x = _line(step.x, x0, t, s, math.sqrt(s.sigma**2 - fresh**2))
    return (x + fresh * step.fresh_noise() if fresh > 0 else x), x0


def heun(step: Step) -> tuple[Tensor, Tensor]:
    """Order 2, two evaluations a step (Karras et al. 2022, algorithm 1 without churn): the mean of the slopes at
    both ends, in the coordinates in which the process is a straight line. The correction is left out where a
    slope does not exist: at the clean end, and at zero SNR of a process that is not straight."""
    t, s = step.ends
    x0 = step.denoise(step.x, t.t)
    x = _line(step.x, x0, t, s, s.sigma)
    straight = step.diffusion.straight
    if s.sigma == 0 or (t.alpha == 0 and not straight):
        return x, x0
    slopes = _slope(step.x, x0, t, straight), _slope(x, step.denoise(x, s.t), s, straight)
    norm_t, norm_s = (1.0, 1.0) if straight else (t.alpha, s.alpha)
    span = s.sigma / norm_s - t.sigma / norm_t
    return norm_s * (step.x / norm_t + span * 0.5 * (slopes[0] + slopes[1])), x0


def _slope(x: Tensor, x0: Tensor, at: Point, straight: bool) -> Tensor:
    """dx / dsigma of a straight path (noise - x0), or d(x / alpha) / d(sigma / alpha) (noise)."""
    noise = (x - at.alpha * x0) / at.sigma
    return noise - x0 if straight else noise


def dpmpp_2m(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) and, with eta > 0, its SDE form (midpoint): order 2 with
    one evaluation a step, from the x0 of this step and the last one."""
    t, s = step.ends
    x0 = step.denoise(step.x, t.t)
    direction = x0
    if step.index > 0 and s.sigma > 0:
        slope = _step_ratio(step.points[step.index - 1], t, s) / 2
        direction = x0 + slope * (x0 - step.memory["x0"])
    step.memory["x0"] = x0
    kept = _retained(t, s)
    x = (s.sigma / t.sigma * kept**step.eta) * step.x + (s.alpha * (1 - kept ** (1 + step.eta))) * direction
    fresh = s.sigma * math.sqrt(max(0.0, 1 - kept ** (2 * step.eta)))
    return (x + fresh * step.fresh_noise() if fresh > 0 else x), x0


def cogvideox_dpm(step: Step) -> tuple[Tensor, Tensor]:
    """:func:`dpmpp_2m` with the draws of CogVideoX's published sampler: a step of order 2 draws noise twice and uses
    the second, the last step draws some that it does not need. So a seed stands for the same video."""
    is_first = step.index == 0
    spare = step.fresh_noise()

    def draw() -> Tensor:
        return spare if is_first else step.fresh_noise()

    return dpmpp_2m(replace(step, fresh_noise=draw))


def _step_ratio(r: Point, t: Point, s: Point) -> float:
    """h(t to s) / h(r to t) in log SNR; 0 when r is pure noise, which makes the step first order."""
    return (s.log_snr - t.log_snr) / (t.log_snr - r.log_snr)


def unipc(step: Step) -> tuple[Tensor, Tensor]:
    """UniPC of order 2, B2(h), data prediction (Zhao et al. 2023, algorithms 5 and 6): the x0 found at t first
    corrects the x that predicted it, then predicts s. One evaluation a step; the predictor is DPM-Solver++(2M).

    Its memory: the corrected x before the last prediction, and the last two x0.
    """
    t, s = step.ends
    x0 = step.denoise(step.x, t.t)
    x = _corrected(step, x0) if step.index > 0 else step.x
    direction = x0
    if step.index > 0 and s.sigma > 0:
        direction = x0 + _step_ratio(step.points[step.index - 1], t, s) / 2 * (x0 - step.memory["x0"])
    if step.index > 0:
        step.memory["x0_before"] = step.memory["x0"]
    step.memory["x0"], step.memory["x"] = x0, x
    return _line(x, direction, t, s, s.sigma), x0


def _corrected(step: Step, x0: Tensor) -> Tensor:
    """The corrector of the step that led to this one, from r to t, now that the x0 at t is known."""
    r, t = step.points[step.index - 1], step.points[step.index]
    before = step.memory["x0"]
    if step.index == 1:
        direction = before + 0.5 * (x0 - before)
    else:
        # The two orders' conditions, rho_0 + rho_1 = b_1 and k rho_0 + rho_1 = b_2, with k = -h(q to r) / h(r to t);
        # k = -inf (q is pure noise) leaves rho_1 = b_1.
        b_1, b_2 = _corrector_moments(t.log_snr - r.log_snr)
        inverse_k = -_step_ratio(step.points[step.index - 2], r, t)
        rho_0_over_k = (b_2 - b_1) * inverse_k**2 / (1 - inverse_k)
        rho_1 = b_1 - (b_2 - b_1) * inverse_k / (1 - inverse_k)
        direction = before + rho_0_over_k * (step.memory["x0_before"] - before) + rho_1 * (x0 - before)
    return _line(step.memory["x"], direction, r, t, t.sigma)


def _corrector_moments(h: float) -> tuple[float, float]:
    """b_1 and b_2 for B(h) = 1 - exp(-h): the means of u and u**2 over u in [0, 1] under the weight exp(h (u - 1)).

    A power series where the closed form would cancel.
    """
    if h < 0.5:
        weights = [h**n / math.factorial(n) for n in range(16)]
        total = sum(w / (n + 1) for n, w in enumerate(weights))
        first = sum(w / (n + 2) for n, w in enumerate(weights))
        second = sum(w / (n + 3) for n, w in enumerate(weights))
        return first / total, second / total
    gain = -math.expm1(-h)
    first = 1 / gain - 1 / h
    return first, 1 / gain - 2 * first / h


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A method and what it needs to know of its user."""

    method: Method
    eta: float = 0.0
    """the default; methods that are not stochastic at all take no other"""
    takes_eta: bool = False


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(method=euler),
    "euler_ancestral": Sampler(method=euler, eta=1.0, takes_eta=True),
    "heun": Sampler(method=heun),
    "dpmpp_2m": Sampler(method=dpmpp_2m),
    "dpmpp_2m_sde": Sampler(method=dpmpp_2m, eta=1.0, takes_eta=True),
    "cogvideox_dpm": Sampler(method=cogvideox_dpm, eta=1.0, takes_eta=True),
    "unipc": Sampler(method=unipc),
    "ddim": Sampler(method=euler, takes_eta=True),
}


@torch.no_grad()
def sample(
    name: str,
    denoise: Denoise,
    diffusion: Diffusion,
    x: Tensor | None,
    ts: Tensor,
    *,
    noise: NoiseStream | None = None,
    state: SamplerState | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    stop_after: int | None = None,
    eta: float | None = None,
) -> Tensor:
    """Make the steps of a run, or those that are left of it.

    Args:
        name: a key of :data:`SAMPLERS`.
        denoise: (x_t, t) -> x0; t is a 0-dim float64 tensor on the CPU.
        x: (B, ...) noise at ts[0] (see ``Diffusion.start`` and ``add_noise``), float32 or float64. When resuming
            it only says the device, and may be None.
        ts: (num_steps + 1,) descending, as :func:`~.timesteps.schedule` gives them.
        noise: fresh noise for stochastic samplers; when resuming it is set to where the run stood.
        state: empty to begin, or that of an interrupted run; kept up to date in place.
        on_step: called after every step. What it raises passes through, with ``state`` whole: cancelling.
        stop_after: return once this many steps of the run are done; the state continues from there.
        eta: overrides the sampler's own share of fresh noise.

    Returns:
        (B, ...) the latents at the last time made; clean latents if that is t = 0.

    Raises:
        SettingsError: unknown sampler, unusable times or eta, or a state of another run.
        NumericsError: the network gave NaN or infinity; ``state`` is at the last good step.
    """
    sampler = _find(name)
    eta = _check_eta(name, sampler, eta)
    ts = _check_times(ts)
    state = SamplerState() if state is None else state
    x, noise = _begin(state, name, eta, x, ts, noise)
    points = tuple(map(Point, ts, diffusion.alpha(ts).tolist(), diffusion.sigma(ts).tolist()))
    num_steps = len(ts) - 1
    check = _FiniteSteps()
    for index in range(state.step, _last_step(stop_after, num_steps)):
        step = Step(
            denoise=denoise,
            diffusion=diffusion,
            x=x,
            points=points,
            index=index,
            eta=eta,
            memory=dict(state.memory),
            fresh_noise=_drawer(name, noise, x),
        )
        x, x0 = sampler.method(step)
        check.last_step(state)
        check.begin(Flag(x), state, num_steps)
        # Only now, all at once: whatever is raised above leaves the state at the end of the step before.
        state.x, state.memory, state.step = x, step.memory, index + 1
        state.noise = None if noise is None else noise.state()
        if on_step is not None:
            t = points[index + 1].t.item()
            on_step(StepInfo(step=index + 1, num_steps=num_steps, x=x, x0=x0, t=t, state=state))
    check.last_step(state)
    return _finish(x, points[state.step])


def _last_step(stop_after: int | None, num_steps: int) -> int:
    if stop_after is None:
        return num_steps
    if stop_after < 0:
        raise SettingsError(
            "stop_after cannot be used", given=stop_after, expected="a number of steps, 0 or more", do="leave it out"
        )
    return min(stop_after, num_steps)


def _finish(x: Tensor, reached: Point) -> Tensor:
    """Undo a scaled-down signal (Snap Video) once no noise is left."""
    return x / reached.alpha if reached.sigma == 0 and reached.alpha != 1 else x


def _drawer(name: str, noise: NoiseStream | None, x: Tensor) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        if noise is None:
            raise SettingsError(
                "A stochastic sampler needs a source of noise", given=name, do="pass noise=NoiseStream([seed, ...])"
            )
        return noise.draw(x.shape[1:], x.device, x.dtype)

    return draw


def _begin(
    state: SamplerState, name: str, eta: float, x: Tensor | None, ts: Tensor, noise: NoiseStream | None
) -> tuple[Tensor, NoiseStream | None]:
    """Fill an empty state, or check a begun one; the latents and the noise as they stood."""
    if state.x is None:
        if x is None:
            raise SettingsError("There is nothing to sample from", expected="noise, or the state of an interrupted run")
        state.x = x.to(torch.promote_types(x.dtype, torch.float32))
        state.sampler, state.eta, state.ts = name, eta, ts
        state.seeds = () if noise is None else noise.seeds
        state.noise = None if noise is None else noise.state()
        return state.x, noise
    _check_same_run(state, name, eta, ts)
    if x is not None:
        state.x = state.x.to(x.device)
        state.memory = {key: value.to(x.device) for key, value in state.memory.items()}
    if state.noise is not None:
        noise = NoiseStream(state.seeds) if noise is None else noise
        noise.load_state(state.noise)
    return state.x, noise


def _check_same_run(state: SamplerState, name: str, eta: float, ts: Tensor) -> None:
    same_times = state.ts is not None and torch.equal(state.ts, ts)
    if (state.sampler, state.eta) == (name, eta) and same_times:
        return
    raise SettingsError(
        "The saved run was made with other settings",
        given=f"{name}, eta {eta}, {len(ts) - 1} steps" + ("" if same_times else ", other times"),
        expected=f"{state.sampler}, eta {state.eta}, {0 if state.ts is None else len(state.ts) - 1} steps",
        do="resume with the sampler, steps, schedule and shift of the interrupted run",
    )


def _find(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def _check_eta(name: str, sampler: Sampler, eta: float | None) -> float:
    if eta is None or eta == sampler.eta:
        return sampler.eta
    if not sampler.takes_eta:
        stochastic = ", ".join(key for key, value in SAMPLERS.items() if value.takes_eta)
        raise SettingsError(
            "This sampler adds no noise",
            given=f"{name} with eta {eta}",
            expected="no eta",
            do=f"use one of {stochastic}",
        )
    if not 0 <= eta <= 1:
        raise SettingsError("The eta cannot be used", given=eta, expected="a number from 0 to 1", do="use 1")
    return float(eta)


def _check_times(ts: Tensor) -> Tensor:
    ts = ts.detach().to("cpu", torch.float64)
    descending = ts.ndim == 1 and len(ts) >= 2 and bool((ts.diff() < 0).all())
    if descending and ts[0] <= 1 and ts[-1] >= 0:
        return ts
    raise SettingsError(
        "The times of the run cannot be used",
        given=str(ts.tolist()),
        expected="at least two numbers in [0, 1], each below the one before",
        do="take them from timesteps.schedule",
    )


class _FiniteSteps:
    """Whether the numbers of each step are finite. On a GPU that is known one step later, so that it never waits for
    this program: the state then goes back to the last good step."""

    def __init__(self) -> None:
        self._flag: Flag | None = None
        self._good = SamplerState()
        self._name = ""

    def begin(self, flag: Flag, state: SamplerState, num_steps: int) -> None:
        """``flag`` is of the step that follows ``state``; raises NumericsError at once where it is known."""
        self._flag, self._name = flag, f"step {state.step + 1} of {num_steps}"
        self._good = replace(state, memory=dict(state.memory))
        if flag.is_known:
            self.last_step(state)

    def last_step(self, state: SamplerState) -> None:
        """Raises NumericsError, with ``state`` before the step, if its numbers were not finite."""
        flag, self._flag = self._flag, None
        if flag is None or flag:
            return
        for item in fields(state):
            setattr(state, item.name, getattr(self._good, item.name))
        raise NumericsError(
            "The network gave numbers that are not finite",
            given=self._name,
            do="use bfloat16 or float32 in place of float16, or a smaller guidance scale",
        )
