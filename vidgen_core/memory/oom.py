"""Out of memory: recognised in all its spellings, and answered in one place by trying again with less."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from ..errors import MemoryLimitError

log = logging.getLogger("vidgen")

T = TypeVar("T")
Plan = TypeVar("Plan")

_WORDS = re.compile(
    r"out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|std::bad_alloc|Cannot allocate memory",
    re.IGNORECASE,
)
"""CUDA and MPS; the CPU's allocator on Linux and on Windows; cuBLAS; C++; the system itself (mmap)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure(Generic[Plan]):
    """One way to need less memory."""

    name: str
    """what it does, as the end of "again ..." """
    tighten: Callable[[Plan], Plan | None]
    """a plan that needs less; None where this changes nothing"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and _WORDS.search(str(error)) is not None


def relieved(
    work: Callable[[Plan], T],
    plan: Plan,
    measures: Sequence[Measure[Plan]],
    *,
    what: str,
    make_room: Callable[[], None] = lambda: None,
    advice: Callable[[], str],
) -> T:
    """``work(plan)``; where memory runs out, again with less, one measure after the other.

    ``work`` must be able to start anew, or go on from where it stood.

    Args:
        measures: the mildest first; each is used once.
        what: what the work is, e.g. "The sampling".
        make_room: asks whoever else holds memory to let go of it, before each new try.
        advice: what to lower, with numbers; asked when nothing is left to try.

    Raises:
        MemoryLimitError: also with the last measure it does not fit.
    """
    used: list[str] = []
    left = list(measures)
    while True:
        done, result, problem = _attempt(work, plan)
        if done:
            return result  # type: ignore[return-value]
        # Only here, where the exception and with it every tensor of its frames is gone, is there something to free.
        give_back()
        tighter = None
        while left and tighter is None:
            measure = left.pop(0)
            tighter = measure.tighten(plan)
            if tighter is not None:
                plan = tighter
                used.append(measure.name)
                log.warning("%s ran out of memory (%s): again %s", what, problem, measure.name)
        if tighter is None:
            tried = f", also {' and '.join(used)}" if used else ""
            raise MemoryLimitError(f"{what} does not fit the memory{tried}", given=problem, do=advice())
        make_room()


def _attempt(work: Callable[[Plan], T], plan: Plan) -> tuple[bool, T | None, str]:
    """(whether it was done, its result, else what the allocator said)."""
    try:
        return True, work(plan), ""
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        return False, None, shortage(error)


def shortage(error: BaseException) -> str:
    """What the allocator said in a few words: how much was wanted."""
    text = str(error)
    number = re.search(r"allocate (\d+) bytes", text)
    if number:
        return f"{int(number[1]) / 2**30:.2f} GiB at once"
    size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", text)
    if size:
        return f"{size[1]} at once"
    first = text.strip().splitlines()[:1]
    return first[0][:120] if first else type(error).__name__


def give_back() -> None:
    """Return what nobody uses any more to the system, on every device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
