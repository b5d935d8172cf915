"""What stands around the blocks of a network while it is asked: skipping, reuse, another attention.

Like ``memory.stream`` this wraps ``forward``, and outside of it: a block that is not run is not read from its file.
The network knows nothing of it. Around each block, from the outside in:

1. reuse: a step cache decides once per forward; then no block (but perhaps the first) runs, and what all of them
   added to the video's tokens last time is added again;
2. skipping: a block that a weak pass leaves out gives its input back;
3. attention: the identity in a weak pass, else enhanced across frames if that was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from .block_names import fits
from .caching import CacheRun, CacheState, CurveRecorder
from .errors import SettingsError
from .families import BlockRules
from .nn.attention_change import AttentionChange, changed_attention, enhanced, own_value_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Weakening:
    """What a weak pass leaves out; blocks are numbered in the order they run."""

    skipped: frozenset[int] = frozenset()
    """blocks that give their input back"""
    unattending: frozenset[int] = frozenset()
    """blocks whose tokens attend to themselves alone"""


@dataclass(slots=True, eq=False)
class Stream:
    """The forwards of one conditioning (or a pair in one batch) in one run: a step is compared with their last one."""

    branches: tuple[str, ...] = ("cond",)
    """what the batch holds in equal parts"""
    weakening: Weakening = Weakening()
    state: CacheState = field(default_factory=CacheState)


@dataclass(slots=True)
class _Forward:
    """One forward of a network, from the first block to the last."""

    stream: Stream
    t: Tensor
    grid: tuple[int, int, int]
    """tokens along (frames, rows, columns)"""
    base: Tensor | None = None
    """the video's tokens to which the residual is added"""
    skipping: bool = False

    @property
    def num_video(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def time(self) -> float:
        return float(self.t.max())


_now: _Forward | None = None


@contextmanager
def forward_of(stream: Stream, t: Tensor, grid: tuple[int, int, int]) -> Iterator[None]:
    """Says to the blocks whose forward runs inside the ``with`` block; without it they do nothing special."""
    global _now
    before, _now = _now, _Forward(stream=stream, t=t, grid=grid)
    try:
        yield
    finally:
        _now = before


def block_numbers(text: str, paths: Sequence[str]) -> frozenset[int]:
    """Blocks by name: ``"double_blocks.3-5, single_blocks.0"``, by their number in the order they run: ``"7-9"``, or
    ``"auto"``, the one a third of the way in. Empty is none.

    Args:
        paths: of all blocks, in the order they run.

    Raises:
        SettingsError: a part that fits no block.
    """
    numbers: set[int] = set()
    for item in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        if item == "auto":
            chosen = {len(paths) // 3}
        elif span := re.fullmatch(r"(\d+)(?:-(\d+))?", item):
            chosen = {n for n in range(len(paths)) if int(span[1]) <= n <= int(span[2] or span[1])}
        else:
            chosen = {n for n, path in enumerate(paths) if fits(item, path)}
        if not chosen:
            lists = sorted({path.rpartition(".")[0] for path in paths})
            raise SettingsError(
                "There is no such block",
                given=item,
                expected=f"numbers from 0 to {len(paths) - 1}, auto, or blocks of {', '.join(lists)}",
                do="write for example 7-9, or double_blocks.3",
            )
        numbers |= chosen
    return frozenset(numbers)


def block_paths(network: nn.Module, lists: Sequence[str]) -> list[str]:
    """The paths of all blocks of these module lists, in the order they run."""
    return [f"{path}.{name}" for path in lists for name, _ in network.get_submodule(path).named_children()]


@contextmanager
def around_blocks(
    network: nn.Module,
    paths: Sequence[str],
    rules: BlockRules,
    *,
    cache: CacheRun | None = None,
    recorder: CurveRecorder | None = None,
    enhance: float = 0.0,
) -> Iterator[None]:
    """Stand around the blocks for the time of the ``with`` block.

    Args:
        cache: decides which forwards reuse a residual.
        recorder: hears of every residual; nothing is reused then.
        enhance: weight of Enhance-A-Video; 0 is off.
    """
    blocks = [network.get_submodule(path) for path in paths]
    around = _Around(len(blocks), rules, cache, recorder, enhance)
    wrapped: list[tuple[nn.Module, Any]] = []

    def wrap(module: nn.Module, forward: Callable[..., Any]) -> None:
        wrapped.append((module, vars(module).get("forward")))
        module.forward = forward

    try:
        if cache is not None and cache.method == "teacache":
            reader = rules.reads(blocks[0])
            wrap(reader, wraps(reader.forward)(partial(around.read, reader.forward)))
        for number, block in enumerate(blocks):
            wrap(block, wraps(block.forward)(partial(around.run, number, block.forward)))
        yield
    finally:
        while wrapped:
            module, forward = wrapped.pop()
            if forward is None:
                del module.forward  # the class has its own
            else:
                module.forward = forward


class _Reuse(Exception):
    """Raised inside the first block where its input shows that it need not run."""


class _Around:
    def __init__(
        self,
        num_blocks: int,
        rules: BlockRules,
        cache: CacheRun | None,
        recorder: CurveRecorder | None,
        enhance: float,
    ) -> None:
        self._last = num_blocks - 1
        self._rules, self._cache, self._recorder, self._enhance = rules, cache, recorder, enhance
        self._keeps = cache is not None or recorder is not None

    def run(self, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward, or what takes its place."""
        now = _now
        if now is None:
            return forward(*args, **kwargs)
        if number == 0 and self._keeps:
            self._begin(now, args)
        if now.skipping or number in now.stream.weakening.skipped:
            out = self._rules.through(args)
        else:
            try:
                with changed_attention(self._change(number, now)):
                    out = forward(*args, **kwargs)
            except _Reuse:
                now.skipping = True
                out = self._rules.through(args)
        if number == 0 and self._cache is not None and self._cache.method == "first_block" and self._last > 0:
            self._look_at_first(now, out)
        return self._end(now, out) if number == self._last and self._keeps else out

    def read(self, forward: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer of the first block that reads its modulated input: what TeaCache looks at."""
        now = _now
        if now is not None and self._decides(now, x[:, : now.num_video].clone()):
            raise _Reuse
        return forward(x, *args, **kwargs)

    def _begin(self, now: _Forward, args: Sequence[Any]) -> None:
        # A copy: blocks may add to their input in place.
        now.base = self._rules.video(self._rules.through(args), now.num_video).clone()
        if self._cache is not None and self._cache.method == "magcache":
            now.skipping = self._decides(now, None)

    def _look_at_first(self, now: _Forward, out: Any) -> None:
        assert now.base is not None
        video = self._rules.video(out, now.num_video)
        now.skipping = self._decides(now, video - now.base)
        now.base = video.clone()

    def _decides(self, now: _Forward, evidence: Tensor | None) -> bool:
        assert self._cache is not None
        return self._cache.may_skip(now.stream.state, now.time, evidence, now.stream.branches)

    def _end(self, now: _Forward, out: Any) -> Any:
        """After the last block: add the kept residual, or keep the new one."""
        state, video = now.stream.state, self._rules.video(out, now.num_video)
        if now.skipping:
            assert state.residual is not None
            return self._rules.with_video(out, video + state.residual)
        assert now.base is not None
        residual = video - now.base
        if self._recorder is not None:
            self._recorder.note(now.stream.branches, now.time, residual, state.residual)
        state.residual, now.base = residual, None
        return out

    def _change(self, number: int, now: _Forward) -> AttentionChange | None:
        if number in now.stream.weakening.unattending:
            return own_value_only
        if self._enhance and now.grid[0] > 1:
            return enhanced(self._enhance, now.grid[0], self._rules.attended_video(now.num_video))
        return None
