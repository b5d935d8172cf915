"""One plan for memory: which way each stage goes, what it will take and how long, before anything is loaded.

A stage (encode the prompt, sample, decode, ...) can go several ways, the fastest first. A :class:`Way` says what it
costs; :func:`choose` takes the fastest combination that stays within the budget. Costs come from
:mod:`~vidgen_core.memory.live`, and times from the few numbers of :class:`Rates`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import SettingsError
from ..types import Grid, VideoShape
from .host import available_memory, memory_in_use
from .live import Work

SLACK = 0.025
"""of what passes: what an allocator keeps besides"""
KEPT_BYTES = 4_000_000
"""what libraries keep for themselves after the first large product: buffers, and code that was made for a shape"""


# --- ways and plans ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way of doing a stage; ``settings`` are what the rest of the core reads of it."""

    name: str
    why: str
    passing: Callable[[], int]
    """bytes that are there while it runs and gone afterwards"""
    work: Callable[[], Work] = Work
    kept: Callable[[], int] = int
    """bytes of what passes that stay after all"""
    loaded: int = 0
    """bytes of weights that are there as soon as everything is loaded"""
    touched: int = 0
    """bytes of weights that join when the stage runs (mapped to a file), and stay"""
    read: float = 0.0
    """bytes that are read from files while it runs"""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWays:
    """A stage and the ways it can go, the best first."""

    name: str
    ways: Sequence[Way]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What was chosen for a stage."""

    name: str
    way: str
    why: str
    peak_bytes: int
    """of the whole process, the interpreter and its libraries included"""
    seconds: float
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will be done, stage by stage."""

    stages: tuple[Stage, ...]
    budget_bytes: int
    baseline_bytes: int
    """what the process takes before anything is loaded"""
    subject: Mapping[str, Any] = field(default_factory=dict)
    """what it is a plan for: size, frames, steps, ..."""

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.budget_bytes

    def setting(self, stage: str, name: str, default: Any = None) -> Any:
        """What was decided for a stage; ``default`` where the plan does not say."""
        return next((one.settings[name] for one in self.stages if one.name == stage and name in one.settings), default)

    def to_dict(self) -> dict[str, Any]:
        """For programs; only plain numbers and texts."""
        stages = [asdict(replace(stage, settings={})) | {"settings": _plain(stage.settings)} for stage in self.stages]
        return {
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "budget_bytes": self.budget_bytes,
            "baseline_bytes": self.baseline_bytes,
            "seconds": round(self.seconds, 3),
            "subject": dict(self.subject),
            "stages": stages,
        }

    def lines(self) -> Iterator[str]:
        """For people: one line for each stage."""
        for stage in self.stages:
            cost = f"{_size(stage.peak_bytes)}, {_duration(stage.seconds)}"
            yield f"{stage.name:<16}{cost:<22}{stage.way}: {stage.why}"
        within = "within" if self.fits else "more than"
        total = f"at most {_size(self.peak_bytes)}, {within} the {_size(self.budget_bytes)} that it may take"
        yield f"{'in all':<16}{total}; about {_duration(self.seconds)}"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    simple = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, simple) else str(value) for name, value in settings.items()}


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def choose(
    stages: Sequence[StageWays],
    budget_bytes: int,
    rates: Rates,
    *,
    baseline_bytes: int,
    subject: Mapping[str, Any] | None = None,
) -> Plan:
    """The fastest combination of ways within the budget, else the one that takes least (``fits`` is false then).

    Stages follow each other in one process, so each has beside it what the stages before have touched, and the weights
    that loading itself brings. A way is only asked for its cost when its turn comes.
    """
    told = (budget_bytes, rates, baseline_bytes, subject or {})
    smallest = _combined(stages, [stage.ways[-1] for stage in stages], *told)
    if not smallest.fits:
        return smallest
    *earlier, last = _with_choices_last(stages)
    best = smallest
    for number, before in enumerate(itertools.product(*(stage.ways for stage in earlier))):
        for way in last.ways:
            chosen = dict(zip((stage.name for stage in earlier), before, strict=True)) | {last.name: way}
            plan = _combined(stages, [chosen[stage.name] for stage in stages], *told)
            if plan.fits:
                best = plan if plan.seconds < 0.99 * best.seconds or best is smallest else best
                if number == 0 and way is last.ways[0]:
                    return plan  # everything the best way
                break
    return best


def _with_choices_last(stages: Sequence[StageWays]) -> list[StageWays]:
    """The stages with the last one that has a choice at the end."""
    index = max((i for i, stage in enumerate(stages) if len(stage.ways) > 1), default=len(stages) - 1)
    return [*stages[:index], *stages[index + 1 :], stages[index]]


def least(stages: Sequence[StageWays], baseline_bytes: int) -> int:
    """Bytes of the process at its worst moment where every stage goes its smallest way, the last in its list."""
    ways = [stage.ways[-1] for stage in stages]
    return _combined(stages, ways, 0, Rates(), baseline_bytes, {}).peak_bytes


def _combined(
    stages: Sequence[StageWays],
    ways: Sequence[Way],
    budget_bytes: int,
    rates: Rates,
    baseline: int,
    subject: Mapping[str, Any],
) -> Plan:
    stays = baseline + sum(way.loaded for way in ways)
    made = []
    for stage, way in zip(stages, ways, strict=True):
        stays += way.touched
        # The slack is on what passes: weights are known to the byte.
        peak = stays + KEPT_BYTES + round((1 + SLACK) * way.passing())
        made.append(
            Stage(
                name=stage.name,
                way=way.name,
                why=way.why,
                peak_bytes=peak,
                seconds=rates.seconds(way.work()) + way.read / rates.disk,
                settings=way.settings,
            )
        )
        stays += way.kept()
    return Plan(stages=tuple(made), budget_bytes=budget_bytes, baseline_bytes=baseline, subject=subject)


# --- sizes that fit ---------------------------------------------------------------------------------------------------


def nearest_sizes(
    shape: VideoShape, grid: Grid, patch: tuple[int, int, int], fits: Callable[[VideoShape], bool]
) -> list[VideoShape]:
    """The longest video of this size that fits, and the largest of this length; what fits not at all is left out."""
    found = []
    least = 1 if grid.causal else grid.step
    counts = range(0, max(1, (shape.num_frames - least) // grid.step + 1))
    length = _last(counts, lambda n: fits(replace(shape, num_frames=least + n * grid.step)))
    if length is not None and least + length * grid.step < shape.num_frames:
        found.append(replace(shape, num_frames=least + length * grid.step))
    rows, columns = grid.spatial * patch[1], grid.spatial * patch[2]

    def scaled(n: int) -> VideoShape:
        width = shape.width_px * n * rows / shape.height_px
        return replace(shape, height_px=n * rows, width_px=max(columns, round(width / columns) * columns))

    side = _last(range(1, shape.height_px // rows), lambda n: fits(scaled(n)))
    if side is not None:
        found.append(scaled(side))
    return found


def _last(numbers: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The last number for which a property holds that is lost once and for all."""
    low, high = -1, len(numbers)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(numbers[middle]):
            low = middle
        else:
            high = middle
    return numbers[low] if low >= 0 else None


def too_large(shape: VideoShape, plan: Plan, nearest: Sequence[VideoShape]) -> SettingsError:
    """The refusal of a video, with the nearest that fit."""
    worst = max(plan.stages, key=lambda stage: stage.peak_bytes)
    sizes = [f"{size.num_frames} frames of {size.width_px} x {size.height_px} px" for size in nearest]
    more = f"a budget of {_size(1.02 * plan.peak_bytes)}"
    return SettingsError(
        "The video does not fit into this much memory",
        given=f"{shape.num_frames} frames of {shape.width_px} x {shape.height_px} px, which take "
        f"{_size(plan.peak_bytes)} ({worst.name}, {worst.way}), within {_size(plan.budget_bytes)}",
        do="use " + ", or ".join([*sizes, more]),
    )


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a machine does in a second. The defaults are those of two slow cores; see :func:`calibrate`."""

    linear: float = 6e10
    """operations a second in matrix products"""
    attention: float = 4e10
    convolution: float = 4e10
    moved: float = 6e9
    """bytes a second through everything else"""
    per_op: float = 1.5e-5
    """seconds that calling an operation takes"""
    disk: float = 1.5e9
    """bytes a second from files"""

    def seconds(self, work: Work) -> float:
        products = sum(number / getattr(self, kind) for kind, number in work.flops.items())
        return products + work.moved / self.moved + work.num_ops * self.per_op


def cache_folder() -> Path:
    """The user's folder for what can be made again."""
    if (named := os.environ.get("XDG_CACHE_HOME")) is not None:
        return Path(named) / "vidgen"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "vidgen"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "vidgen"


def _rates_file(device: torch.device) -> Path:
    return cache_folder() / f"rates_{device.type}.json"


def known_rates(device: torch.device) -> Rates:
    """What :func:`calibrate` found on this machine, else the defaults."""
    try:
        values = json.loads(_rates_file(device).read_text("utf-8"))
        names = Rates.__dataclass_fields__
        return Rates(**{name: float(value) for name, value in values.items() if name in names and float(value) > 0})
    except (OSError, ValueError, TypeError, AttributeError):  # none, or one that cannot be read: no reason to stop
        return Rates()


def calibrate(device: torch.device, *, seconds: float = 0.5) -> Rates:
    """Measure this machine for about ``6 * seconds`` and keep the result in the user's cache folder."""
    options = {"device": device, "dtype": torch.float32}
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(**options)

    x, weight = tensor(1024, 512), tensor(1536, 512)
    q = tensor(1, 8, 1024, 64)
    video, kernel = tensor(1, 32, 6, 66, 66), tensor(32, 32, 3, 3, 3)
    large, small = tensor(1 << 23), tensor(8)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.inference_mode():
        rates = Rates(
            linear=2 * 1024 * 512 * 1536 * _per_second(lambda: x @ weight.T, device, seconds),
            attention=4 * 8 * 1024**2 * 64 * _per_second(lambda: attend(q, q, q), device, seconds),
            convolution=2
            * 27
            * 32**2
            * 4
            * 64**2
            * _per_second(lambda: torch.nn.functional.conv3d(video, kernel), device, seconds),
            moved=2 * large.nbytes * _per_second(lambda: large + 1.0, device, seconds),
            per_op=1 / _per_second(lambda: small + 1.0, device, seconds),
        )
    file = _rates_file(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(rates), indent=1) + "\n", "utf-8")
    except OSError as error:
        raise SettingsError(f"The rates cannot be kept ({error.strerror})", given=file) from error
    return rates


def _per_second(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How often ``run`` runs in a second, after a first time that does not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        run()
        wait()
        times += 1
    return times / (time.perf_counter() - start)


# --- the one place that decides ---------------------------------------------------------------------------------------

_plan: ContextVar[Plan | None] = ContextVar("vidgen_plan", default=None)


@contextmanager
def following(plan: Plan | None) -> Iterator[None]:
    """Inside, loading, sampling and decoding do what ``plan`` says."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def planned(stage: str, name: str, default: Any = None) -> Any:
    """What the plan that is followed says of a stage; ``default`` where there is none or where it does not say."""
    plan = _plan.get()
    return default if plan is None else plan.setting(stage, name, default)


CPU_SHARE = 0.5
"""of the free memory that weights may take as float32; the rest is for activations and the other parts"""
FILE_SHARE = 0.8
"""share of the free memory that a file's weights may take"""
SMALL_BYTES = 2**30
"""weights that a GPU does not notice as float32"""


def room_on(device: torch.device, budget_bytes: int | None = None) -> int:
    """Bytes that this process may still take on the device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return free if budget_bytes is None else min(free, budget_bytes - memory_in_use(device))


def small_as_float32(num_parameters: int, device: torch.device) -> bool:
    """Whether weights may be widened to float32 without a thought."""
    room = CPU_SHARE * available_memory() if device.type == "cpu" else SMALL_BYTES
    return 4 * num_parameters <= room


def too_large_to_stay(num_bytes: int, room: int) -> bool:
    """Whether weights must be streamed where there is no plan."""
    return num_bytes > FILE_SHARE * room


def return_freed_memory() -> bool:
    """Ask the C library to give freed tensors back to the system at once; false where it cannot be asked.

    glibc keeps what is freed, up to 32 MB a piece, in case it is wanted again; a process then holds more than its
    tensors. For a process of our own that has a budget to keep; a host such as ComfyUI is left alone.
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 20)) and bool(mallopt(trim_threshold, 1 << 20))


def begin_stage() -> None:
    """Where a plan is followed: give back the holes that the stage before left between small tensors."""
    trim = None if _plan.get() is None else _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_the_c_library(name: str) -> Any:
    """A function of glibc; None elsewhere."""
    import ctypes

    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
