"""Step caches: when the blocks of a network need not run, because a step would hardly differ from the one before.

From one step to the next the blocks add almost the same to the video's tokens. So what they added once (the residual)
is added again in place of running them, until an estimate of the error passes a threshold. The three methods differ
in the estimate:

* ``first_block``: how much the first block's own residual changed since the blocks last ran (ParaAttention's cache).
* ``teacache``: the sum over skipped steps of p(change of the first block's modulated input), p a polynomial
  (Liu et al. 2024, arXiv:2411.19108).
* ``magcache``: the sum over skipped steps of |1 - size now / size kept| of the residual, sizes from a curve that was
  measured once for the model (Ma et al. 2025, arXiv:2506.09045).

A change is the relative L1 distance. Here are the decisions; ``blocks`` stands around the blocks and obeys them.
The first and the last step of a run always compute. What a stream remembers lives as long as one run: another
prompt, a resumed and a cancelled run begin without it.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import SettingsError, unknown_name

METHODS = ("first_block", "teacache", "magcache")
QUALITIES = ("off", "careful", "fast")

PRESETS: dict[str, dict[str, tuple[float, int]]] = {
    "first_block": {"careful": (0.08, 2), "fast": (0.16, 4)},
    "teacache": {"careful": (0.10, 2), "fast": (0.20, 4)},
    "magcache": {"careful": (0.06, 2), "fast": (0.12, 4)},
}
"""method -> quality -> (threshold, most steps skipped in a row); benchmarks/caching.py measures what each costs"""

IDENTITY = (1.0, 0.0)
"""the polynomial of models without published coefficients: the change itself"""

CURVE_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeCurve:
    """How the residual's size changes along a run: what MagCache measures once for a model."""

    times: tuple[float, ...]
    """falling, of the measured steps"""
    ratios: Mapping[str, tuple[float, ...]]
    """branch ("cond", "uncond") -> mean over tokens of |residual at times[i]| / |residual at times[i - 1]|; [0] is 1"""
    checkpoint: str = ""
    """fingerprint of the network it was measured on"""

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.times, self.times[1:], strict=False))
        whole = all(len(values) == len(self.times) for values in self.ratios.values())
        positive = all(math.isfinite(r) and r > 0 for values in self.ratios.values() for r in values)
        if len(self.times) < 2 or not self.ratios or not (falling and whole and positive):
            raise _unreadable_curve("times must fall and each branch needs one positive ratio per time")

    def ratio(self, branch: str, t: float, s: float) -> float:
        """|residual at s| / |residual at t|. Between measured times the logarithm is a line, so that a curve serves
        any number of steps. A branch that was not measured is taken for the first one."""
        values = self.ratios.get(branch) or next(iter(self.ratios.values()))
        return math.exp(self._log_size(values, s) - self._log_size(values, t))

    def _log_size(self, ratios: Sequence[float], t: float) -> float:
        index = bisect_left(self.times, -t, key=lambda time: -time)
        before = sum(math.log(ratio) for ratio in ratios[1:index])
        if index in (0, len(self.times)):
            return before
        earlier, later = self.times[index - 1], self.times[index]
        return before + (earlier - t) / (earlier - later) * math.log(ratios[index])

    def to_json(self) -> str:
        ratios = {branch: [round(r, 5) for r in values] for branch, values in self.ratios.items()}
        times = [round(t, 6) for t in self.times]
        return json.dumps({"format": CURVE_FORMAT, "checkpoint": self.checkpoint, "times": times, "ratios": ratios})

    @classmethod
    def from_json(cls, text: str) -> MagnitudeCurve:
        """Raises SettingsError for anything that :meth:`to_json` has not written."""
        try:
            read = json.loads(text)
            if read["format"] != CURVE_FORMAT:
                raise _unreadable_curve(f"format {read['format']!r}")
            return cls(
                times=tuple(float(t) for t in read["times"]),
                ratios={str(name): tuple(float(r) for r in values) for name, values in read["ratios"].items()},
                checkpoint=str(read["checkpoint"]),
            )
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise _unreadable_curve(repr(error)) from error


def _unreadable_curve(why: str) -> SettingsError:
    return SettingsError(
        "The magnitude curve cannot be used",
        given=why,
        expected="the text that Calibrate Cache gives",
        do="measure it again for this model",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCache:
    """Which method skips steps, and how boldly."""

    method: str
    threshold: float
    """of the estimated error; 0 never skips"""
    max_skips: int = 4
    """most steps skipped in a row"""
    start: float = 0.0
    """share of the steps at the beginning that always compute"""
    end: float = 1.0
    """share of the steps after which all compute"""
    polynomial: tuple[float, ...] | None = None
    """teacache: highest power first; None takes the family's published one for this network, else :data:`IDENTITY`"""
    curve: MagnitudeCurve | None = None
    """magcache needs it"""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("step cache", self.method, METHODS)
        if not math.isfinite(self.threshold) or self.threshold < 0:
            raise SettingsError(
                "The threshold of the step cache cannot be used",
                given=self.threshold,
                expected="a number from 0",
                do="use 0 for no skipping",
            )
        if self.max_skips < 1 or not 0 <= self.start <= 1 or not 0 <= self.end <= 1:
            raise SettingsError(
                "The step cache cannot be used",
                given=f"{self.max_skips} skips in a row, start {self.start}, end {self.end}",
                expected="at least 1 skip, start and end from 0 to 1",
            )
        if self.method == "magcache" and self.curve is None:
            raise SettingsError(
                "MagCache needs the magnitude curve of this model",
                given="no curve",
                do="measure it once with Calibrate Cache, or use the method first_block",
            )

    @classmethod
    def preset(cls, method: str, quality: str, *, curve: MagnitudeCurve | None = None) -> StepCache | None:
        """A method at "careful" or "fast"; None for "off"."""
        if method not in METHODS:
            raise unknown_name("step cache", method, METHODS)
        if quality not in QUALITIES:
            raise unknown_name("quality of the step cache", quality, QUALITIES)
        if quality == "off":
            return None
        threshold, max_skips = PRESETS[method][quality]
        start = 0.2 if method == "magcache" else 0.0  # the share that its authors keep: sizes change most there
        return cls(method=method, threshold=threshold, max_skips=max_skips, start=start, curve=curve)

    @property
    def identity(self) -> list[Any]:
        """What the result depends on, as JSON values."""
        curve = None if self.curve is None else self.curve.to_json()
        polynomial = None if self.polynomial is None else list(self.polynomial)
        return [self.method, self.threshold, self.max_skips, self.start, self.end, polynomial, curve]


@dataclass(slots=True)
class CacheState:
    """What one stream of forwards remembers between steps."""

    residual: Tensor | None = None
    """what the blocks last added to the video's tokens (B, L, D)"""
    evidence: Tensor | None = None
    """what the estimate compares with"""
    step: int = -1
    """of the last forward; -1: none yet"""
    computed_at: float = 1.0
    """the time at which the blocks last ran"""
    estimate: float = 0.0
    """error gathered since then"""
    skips: int = 0
    """forwards in a row that did not run"""


@dataclass(slots=True)
class Tally:
    """How much a run was spared."""

    forwards: int = 0
    skipped: int = 0


class CacheRun:
    """The decisions of one :class:`StepCache` in one run over the times ``ts``."""

    def __init__(self, cache: StepCache, ts: Tensor, *, polynomial: Sequence[float] | None = None) -> None:
        self.method = cache.method
        self.tally = Tally()
        self._cache = cache
        self._polynomial = tuple(cache.polynomial or polynomial or IDENTITY)
        self._steps = StepFinder(ts)
        num_steps = len(ts) - 1
        self._allowed = range(
            max(1, math.ceil(cache.start * num_steps)), min(num_steps - 1, math.floor(cache.end * num_steps))
        )

    def may_skip(self, state: CacheState, t: float, evidence: Tensor | None, branches: Sequence[str]) -> bool:
        """Whether the blocks need not run at ``t``; asked once per forward, and the state goes on accordingly.

        Args:
            evidence: (B, L, D) the first block's residual, or its modulated input; None for magcache.
            branches: the conditionings in the batch, in equal parts: all of it is skipped or none.
        """
        step = self._steps.at(t)
        estimate = self._estimate(state, t, evidence, branches)
        follows = state.step >= 0 and step - state.step in (0, 1)  # 0: Heun looks twice at one time
        self.tally.forwards += 1
        skip = (
            state.residual is not None
            and follows
            and step in self._allowed
            and state.skips < self._cache.max_skips
            and estimate < self._cache.threshold
        )
        if self.method == "teacache" or not skip:
            state.evidence = evidence
        state.step = step
        if skip:
            self.tally.skipped += 1
            state.skips += 1
            state.estimate = estimate
        else:
            state.skips, state.estimate, state.computed_at = 0, 0.0, t
            state.residual = None  # room for the new one, and nothing stale is left if the forward fails
        return skip

    def _estimate(self, state: CacheState, t: float, evidence: Tensor | None, branches: Sequence[str]) -> float:
        if self.method == "magcache":
            assert self._cache.curve is not None
            ratios = [self._cache.curve.ratio(branch, state.computed_at, t) for branch in branches]
            return state.estimate + max(abs(1 - ratio) for ratio in ratios)
        if state.evidence is None or evidence is None or state.evidence.shape != evidence.shape:
            return math.inf
        change = relative_change(evidence, state.evidence)
        if self.method == "first_block":
            return change
        return state.estimate + max(0.0, polynomial_at(self._polynomial, change))


class StepFinder:
    """Which step of a run a time belongs to."""

    def __init__(self, ts: Tensor) -> None:
        self._ts = ts.detach().to("cpu", torch.float64)

    def at(self, t: float) -> int:
        return int((self._ts - t).abs().argmin())


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean |now - before| over mean |before|, of the sample that changed most; infinite where ``before`` is all 0."""
    dims = tuple(range(1, now.ndim))
    distance = (now - before).abs().mean(dim=dims, dtype=torch.float32)
    size = before.abs().mean(dim=dims, dtype=torch.float32)
    return float(torch.where(size > 0, distance / size, math.inf).max())


def polynomial_at(coefficients: Sequence[float], x: float) -> float:
    """Highest power first."""
    total = 0.0
    for coefficient in coefficients:
        total = total * x + coefficient
    return total


@dataclass(slots=True)
class CurveRecorder:
    """Measures a :class:`MagnitudeCurve` while a run computes every step."""

    times: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)

    def note(self, branches: Sequence[str], t: float, residual: Tensor, before: Tensor | None) -> None:
        """Residuals of a batch (B, L, D) that holds ``branches`` in equal parts."""
        parts = residual.chunk(len(branches))
        parts_before = [None] * len(branches) if before is None else before.chunk(len(branches))
        for branch, now, then in zip(branches, parts, parts_before, strict=True):
            times, ratios = self.times.setdefault(branch, []), self.ratios.setdefault(branch, [])
            if times and t >= times[-1]:  # a second look at the same time (Heun), or another sample of a batch
                continue
            times.append(t)
            ratios.append(1.0 if then is None else magnitude_ratio(now, then))

    def curve(self, checkpoint: str) -> MagnitudeCurve:
        """What was measured. Raises SettingsError for fewer than two steps."""
        branches = [branch for branch in self.ratios if branch in ("cond", "uncond")]
        longest = max((self.times[branch] for branch in branches), key=len, default=[])
        ratios = {branch: tuple(self.ratios[branch]) for branch in branches if self.times[branch] == longest}
        return MagnitudeCurve(times=tuple(longest), ratios=ratios, checkpoint=checkpoint)


def magnitude_ratio(now: Tensor, before: Tensor) -> float:
    """Mean over tokens of |now| / |before|, both (B, L, D); tokens that were 0 are left out."""
    size, size_before = now.float().norm(dim=-1), before.float().norm(dim=-1)
    known = size_before > 0
    return float((size[known] / size_before[known]).mean()) if bool(known.any()) else 1.0
