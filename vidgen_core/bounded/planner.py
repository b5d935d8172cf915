"""Which layers are kept whole, which are computed again, and in what strips: arithmetic, before anything runs.

A chain of blocks is cut into segments. The result of a segment is kept whole; what lies between is computed strip by
strip, once for every group norm that has to know its statistics first. Short segments compute everything once and
keep every layer; long ones keep little and compute more. The cheapest cut that stays within the bound is taken.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import SettingsError
from ..nn.strips import Block, CausalAttention, ConvLayer, Layer, Residual, Size, UpsampleLayer, slab_bytes
from .volumes import row_bytes

WORK_BYTES = 24 << 20
"""What a strip may take; larger ones gain nothing."""
LONGEST = 6
"""Blocks in one segment: an upsampling, the residual blocks after it and the last convolution."""
FRAMES_AT_ONCE = (4, 2, 1)
ROWS_AT_ONCE = (128, 64, 48, 32, 24, 16, 12, 8, 4, 2, 1)
QUERIES_AT_ONCE, KEYS_AT_ONCE = 1024, 2048
SLACK_BYTES = 6 << 20
"""Of the allocator and of the libraries that compute: measured, for everything but the strips and what is kept."""
SMALL_SHARE = 8
"""Layers below this part of the bound stay in memory where larger ones are spilled."""

# What things cost beside multiplications, in multiplications.
COST_OF_NUMBER = 40
"""normalise, pad and copy one"""
COST_OF_STRIP = 1e7
"""call a layer on one strip and slab"""
COST_OF_SPILLED_BYTE = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One walk over the input of a segment, strip by strip."""

    layers: tuple[Layer, ...]
    """run on each strip, from the input of the segment"""
    joined: Residual | None = None
    """a last block whose first half was kept: its second half is run on that, ``layers`` give what is added"""
    collects: ConvLayer | CausalAttention | None = None
    """whose norm wants the statistics of the result"""
    stores: Literal["nothing", "inner", "result"] = "nothing"
    rows: int = 1
    """of the result in a strip"""
    frames: int = 1
    """of the input at a time"""
    tiles: int = 0

    def size(self, given: Size) -> Size:
        """Of the result, for an input of this size."""
        for layer in self.layers:
            given = layer.size(given)
        return given if self.joined is None else self.joined.size(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Blocks ``start`` to ``stop``; their result is kept whole."""

    start: int
    stop: int
    passes: tuple[Pass, ...]
    peak_bytes: int
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a chain of blocks runs within a bound."""

    segments: tuple[Segment, ...]
    sizes: tuple[Size, ...]
    """of the input and of every block's result"""
    itemsize: int
    small_bytes: int | None
    """layers up to this size stay in memory; None: all of them"""
    peak_bytes: int
    """above weights and input, the result included"""
    spilled_bytes: int
    """at most at one time on the disk"""
    relative_cost: float
    """multiplications, compared with those of one pass"""

    @property
    def tiles(self) -> int:
        """Steps until the result is there."""
        return sum(one.tiles for segment in self.segments for one in segment.passes)

    def is_spilled(self, size: Size) -> bool:
        return self.small_bytes is not None and size.count * self.itemsize > self.small_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked of a plan."""

    blocks: tuple[Block, ...]
    given: Size
    itemsize: int
    counts_result: bool
    """whether the result takes memory of the bound"""
    in_time_order: bool = False
    """whether the last block gives its frames one after the other"""

    def sizes(self) -> tuple[Size, ...]:
        sizes = [self.given]
        for block in self.blocks:
            sizes.append(block.size(sizes[-1]))
        return tuple(sizes)


def make(job: Job, budget_bytes: int, *, spills: bool) -> Plan:
    """The cheapest plan within the bound.

    Raises:
        SettingsError: none; it names the smallest bound.
    """
    for small in (budget_bytes // SMALL_SHARE, 0) if spills else (None,):
        plan = _Planner(job, small).cheapest(budget_bytes - SLACK_BYTES)
        if plan is not None:
            return plan
    smallest = smallest_bytes(job, spills=spills)
    raise SettingsError(
        "The video does not fit into this much memory",
        given=f"{budget_bytes / 1e6:.0f} MB for {job.given.frames} x {job.given.rows} x {job.given.columns} samples",
        expected=f"at least {math.ceil(smallest / 1e6)} MB" + ("" if spills else " (less with a folder to spill to)"),
        do="give more memory" if spills else "give more memory, or a folder for intermediate results",
    )


def smallest_bytes(job: Job, *, spills: bool) -> int:
    """The smallest bound that :func:`make` accepts."""
    return _Planner(job, 0 if spills else None).smallest() + SLACK_BYTES


class _Planner:
    def __init__(self, job: Job, small: int | None) -> None:
        self.job = job
        self.sizes = job.sizes()
        self.itemsize = job.itemsize
        self.small = small
        self.blocks = job.blocks

    def _is_spilled(self, size: Size) -> bool:
        return self.small is not None and size.count * self.itemsize > self.small

    def _row(self, size: Size) -> int:
        """Bytes of memory for a row that is kept."""
        return 0 if self._is_spilled(size) else row_bytes(size, self.itemsize)

    # --- over segments ---

    def smallest(self) -> int:
        best: list[float] = [0.0] + [math.inf] * len(self.blocks)
        for start, stop, keeps_inner in self._cuts():
            peak = max(self._smallest(one, start, stop, keeps_inner) for one in self._passes(start, stop, keeps_inner))
            best[stop] = min(best[stop], max(best[start], peak))
        return int(best[-1])

    def cheapest(self, limit: int) -> Plan | None:
        best: list[tuple[float, tuple[Segment, ...]] | None] = [None] * (len(self.blocks) + 1)
        best[0] = (0.0, ())
        for start, stop, keeps_inner in self._cuts():
            before = best[start]
            if before is None:
                continue
            segment = self._segment(start, stop, keeps_inner, limit)
            if segment is None:
                continue
            cost, known = before[0] + segment.cost, best[stop]
            if known is None or cost < known[0]:
                best[stop] = cost, (*before[1], segment)
        final = best[len(self.blocks)]
        if final is None:
            return None
        segments: tuple[Segment, ...] = final[1]
        macs = sum(block.macs(size) * self.sizes[i + 1].rows for i, (block, size) in self._local())
        run = sum(self._macs(one, segment.start) for segment in segments for one in segment.passes)
        return Plan(
            segments=segments,
            sizes=self.sizes,
            itemsize=self.itemsize,
            small_bytes=self.small,
            peak_bytes=max(segment.peak_bytes for segment in segments) + SLACK_BYTES,
            spilled_bytes=max(self._spilled_bytes(segment) for segment in segments),
            relative_cost=run / max(1, macs),
        )

    def _local(self) -> Iterator[tuple[int, tuple[Layer, Size]]]:
        for i, block in enumerate(self.blocks):
            if not isinstance(block, CausalAttention):
                yield i, (block, self.sizes[i])

    def _cuts(self) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether the last block's first half is kept), in the order of ``stop``."""
        last = len(self.blocks)
        for stop in range(1, last + 1):
            for start in range(stop - 1, max(0, stop - LONGEST) - 1, -1):
                inside = self.blocks[start:stop]
                if len(inside) > 1 and any(isinstance(block, CausalAttention) for block in inside):
                    break
                if self.job.in_time_order and stop == last and start < last - 1:
                    break
                yield start, stop, False
                if isinstance(self.blocks[stop - 1], Residual):
                    yield start, stop, True

    def _passes(self, start: int, stop: int, keeps_inner: bool) -> tuple[Pass, ...]:
        following = self.blocks[stop] if stop < len(self.blocks) else None
        wants = None if following is None else _wants(following)
        if isinstance(self.blocks[start], CausalAttention):
            return (Pass(layers=(), collects=wants, stores="result"),)
        passes: list[Pass] = []
        layers: list[Layer] = []
        for number in range(start, stop):
            block = self.blocks[number]
            assert not isinstance(block, CausalAttention)
            wanted = _wants(block)
            if number > start and wanted is not None:
                passes.append(Pass(layers=tuple(layers), collects=wanted))
            if isinstance(block, Residual):
                is_kept = keeps_inner and number == stop - 1
                half = (*layers, block.first)
                passes.append(Pass(layers=half, collects=block.second, stores="inner" if is_kept else "nothing"))
            layers.append(block)
        if keeps_inner:
            block = layers.pop()
            assert isinstance(block, Residual)
            passes.append(Pass(layers=tuple(layers), joined=block, collects=wants, stores="result"))
        else:
            passes.append(Pass(layers=tuple(layers), collects=wants, stores="result"))
        return tuple(passes)

    def _segment(self, start: int, stop: int, keeps_inner: bool, limit: int) -> Segment | None:
        passes, peak, cost = [], 0, 0.0
        for one in self._passes(start, stop, keeps_inner):
            chosen = self._choose(one, start, stop, keeps_inner, limit)
            if chosen is None:
                return None
            passes.append(chosen[0])
            peak, cost = max(peak, chosen[1]), cost + chosen[2]
        return Segment(start=start, stop=stop, passes=tuple(passes), peak_bytes=peak, cost=cost)

    # --- over strips ---

    def _choose(
        self, one: Pass, start: int, stop: int, keeps_inner: bool, limit: int
    ) -> tuple[Pass, int, float] | None:
        """The cheapest strips within the limit, as (pass, its peak, its cost)."""
        if self._is_attention(start):
            return self._choose_attention(one, start, limit)
        best: tuple[Pass, int, float] | None = None
        height, given = one.size(self.sizes[start]).rows, self.sizes[start]
        for frames in sorted({min(frames, given.frames) for frames in FRAMES_AT_ONCE}, reverse=True):
            known: dict[int, int] = {}

            def fits(rows: int, frames: int = frames, known: dict[int, int] = known) -> bool:
                tried = replace(one, rows=rows, frames=frames)
                work = self._work(tried, start)
                known[rows] = work + self._kept(tried, start, stop, keeps_inner)
                return known[rows] <= limit and (work <= WORK_BYTES or rows == 1)

            choices = sorted({math.ceil(height / math.ceil(height / rows)) for rows in ROWS_AT_ONCE})
            # More rows take more memory, and fewer only compute more of them twice.
            rows = choices[max(0, bisect_left(choices, True, key=lambda rows: not fits(rows)) - 1)]
            if not fits(rows):
                continue
            tried = replace(one, rows=rows, frames=frames)
            cost, tiles = self._cost(tried, start, stop)
            if best is None or cost < best[2]:
                best = replace(tried, tiles=tiles), known[rows], cost
        return best

    def _smallest(self, one: Pass, start: int, stop: int, keeps_inner: bool) -> int:
        if self._is_attention(start):
            return self._attention_peak(start, 1)
        return self._work(one, start) + self._kept(one, start, stop, keeps_inner)

    def _is_attention(self, start: int) -> bool:
        return isinstance(self.blocks[start], CausalAttention)

    def _steps(self, one: Pass, start: int) -> Iterator[tuple[Layer, Size, tuple[int, int], int]]:
        """Each layer with its input's size, the rows of a strip in the middle and its frames at a time; last first."""
        sizes, lengths = [self.sizes[start]], [one.frames]
        for layer in one.layers:
            sizes.append(layer.size(sizes[-1]))
            growth = max(1, sizes[-1].frames - 1) / max(1, sizes[-2].frames - 1)
            lengths.append(min(sizes[-1].frames, math.ceil(lengths[-1] * growth)))
        height = one.size(self.sizes[start]).rows
        first = (height - one.rows) // 2
        rows = first, first + one.rows
        if one.joined is not None:
            if one.joined.shortcut is not None:
                yield one.joined.shortcut, sizes[-1], rows, lengths[-1]
            yield one.joined.second, one.joined.first.size(sizes[-1]), rows, lengths[-1]
        for layer, size, length in zip(reversed(one.layers), reversed(sizes[:-1]), reversed(lengths[:-1]), strict=True):
            yield layer, size, rows, length
            rows = layer.halo(rows, size.rows)

    def _work(self, one: Pass, start: int) -> int:
        """What a strip takes."""
        steps = list(self._steps(one, start))[::-1]
        layers, rest = steps[: len(one.layers)], steps[len(one.layers) :]
        rows = 0, one.rows
        if layers:
            layer, size, rows, _ = layers[0]
            rows = layer.halo(rows, size.rows)
        scratch = slab_bytes(self.sizes[start], rows, one.frames, self.itemsize)
        largest, before = 0, None
        for layer, size, rows, frames in layers:
            held, needed = layer.work(size, rows, frames, self.itemsize)
            needed += self._loose(before, size, layer.halo(rows, size.rows), frames)
            scratch, largest, before = scratch + held, max(largest, needed), layer
        if rest:
            # The second convolution. A shortcut beside it needs no memory of its own: it is added to what that gives.
            layer, size, rows, frames = rest[0]
            held, needed = layer.work(size, rows, frames, self.itemsize)
            needed += self._loose(before, one.size(self.sizes[start]), rows, frames)
            scratch += held + slab_bytes(size, layer.halo(rows, size.rows), frames, self.itemsize)
            largest = max(largest, needed)
        return scratch + largest

    def _loose(self, layer: Layer | None, size: Size, rows: tuple[int, int], frames: int) -> int:
        """What a layer has given, where that does not lie in scratch memory, as the input does and an upsampling's."""
        if layer is None or isinstance(layer, UpsampleLayer):
            return 0
        return slab_bytes(size, rows, frames, self.itemsize)

    def _kept(self, one: Pass, start: int, stop: int, keeps_inner: bool) -> int:
        """What lies whole in memory beside the strip, at most."""
        given = self.sizes[start]
        source = 0 if start == 0 else self._row(given)
        inner_size = self._inner(start, stop) if keeps_inner else None
        inner = 0 if inner_size is None else self._row(inner_size)
        if one.stores == "nothing":
            return given.rows * source
        if one.stores == "inner":
            assert inner_size is not None
            return given.rows * source + inner_size.rows * inner
        result = self.sizes[stop]
        is_last = stop == len(self.sizes) - 1
        counts = self.job.counts_result and not self.job.in_time_order
        made = (row_bytes(result, self.itemsize) if counts else 0) if is_last else self._row(result)
        if is_last and self.job.in_time_order:
            return given.rows * source
        # Rows of the input go as rows of the result come, so that one of the ends is the largest.
        return max(
            self._left(one, start, first) * source
            + (0 if inner_size is None else max(0, inner_size.rows - max(0, first - 1)) * inner)
            + min(result.rows, first + one.rows) * made
            for first in (0, one.rows, (result.rows - 1) // one.rows * one.rows)
            if first < result.rows
        )

    def _left(self, one: Pass, start: int, first: int) -> int:
        """Rows of the input that are still needed when the strip from row ``first`` on begins."""
        sizes = [self.sizes[start]]
        for layer in one.layers:
            sizes.append(layer.size(sizes[-1]))
        rows = first, first + 1
        for layer, size in zip(reversed(one.layers), reversed(sizes[:-1]), strict=True):
            rows = layer.halo(rows, size.rows)
        return sizes[0].rows - rows[0]

    def _inner(self, start: int, stop: int) -> Size:
        block = self.blocks[stop - 1]
        assert isinstance(block, Residual)
        return block.first.size(self.sizes[stop - 1])

    def _macs(self, one: Pass, start: int) -> float:
        if self._is_attention(start):
            return 0.0
        strips = one.size(self.sizes[start]).rows / one.rows
        return strips * sum(_macs_of(layer, size, rows) for layer, size, rows, _ in self._steps(one, start))

    def _cost(self, one: Pass, start: int, stop: int) -> tuple[float, int]:
        """(cost, number of strips and slabs)."""
        out, given = one.size(self.sizes[start]), self.sizes[start]
        strips, slabs = math.ceil(out.rows / one.rows), math.ceil(given.frames / one.frames)
        numbers, calls = 0.0, 0
        for layer, size, rows, frames in self._steps(one, start):
            halo = layer.halo(rows, size.rows)
            carried = (frames + 2) / frames
            numbers += size.row_count * (halo[1] - halo[0]) * strips * carried
            calls += 1
        cost = self._macs(one, start) + COST_OF_NUMBER * numbers + COST_OF_STRIP * calls * strips * slabs
        moved = given.count if start and self._is_spilled(given) else 0
        if one.stores != "nothing" and self._is_spilled(out) and stop < len(self.sizes) - 1:
            moved += out.count
        if one.joined is not None and self._is_spilled(self._inner(start, stop)):
            moved += self._inner(start, stop).count
        return cost + COST_OF_SPILLED_BYTE * moved * self.itemsize, strips * slabs

    # --- attention ---

    def _attention_peak(self, start: int, rows: int) -> int:
        size = self.sizes[start]
        kept = 3 * size.rows * self._row(size)
        wide = max(4, self.itemsize)
        queries = rows * size.columns
        keys = max(size.frames * size.columns, min(KEYS_AT_ONCE, size.frames * size.rows * size.columns))
        scores = 2 * queries * keys * wide
        tokens = (6 * queries + 4 * keys) * size.channels * wide
        return kept + scores + tokens + self.blocks[start].weight_bytes

    def _choose_attention(self, one: Pass, start: int, limit: int) -> tuple[Pass, int, float] | None:
        size = self.sizes[start]
        most = min(size.rows, max(1, QUERIES_AT_ONCE // size.columns))
        for rows in range(most, 0, -1):
            peak = self._attention_peak(start, rows)
            if peak <= limit:
                strips = math.ceil(size.rows / rows)
                tokens = size.frames * size.rows * size.columns
                read = strips * size.frames * size.count if self._is_spilled(size) else 0
                cost = tokens**2 * size.channels + COST_OF_SPILLED_BYTE * read * self.itemsize
                return replace(one, rows=rows, frames=1, tiles=strips * (size.frames + 1)), peak, cost
        return None

    # --- on the disk ---

    def _spilled_bytes(self, segment: Segment) -> int:
        sizes = [self.sizes[segment.stop]] if segment.stop < len(self.sizes) - 1 else []
        sizes += [self.sizes[segment.start]] * (3 if self._is_attention(segment.start) else 1 if segment.start else 0)
        if any(one.stores == "inner" for one in segment.passes):
            sizes.append(self._inner(segment.start, segment.stop))
        return sum(size.count * self.itemsize for size in sizes if self._is_spilled(size))


def _macs_of(layer: Layer, size: Size, rows: tuple[int, int]) -> int:
    """Multiplications for these rows of the output, the rows between two convolutions that neighbours need included."""
    macs = layer.macs(size) * (rows[1] - rows[0])
    if isinstance(layer, Residual):
        inner = layer.second.halo(rows, layer.first.size(size).rows)
        macs += layer.first.macs(size) * (inner[1] - inner[0] - (rows[1] - rows[0]))
    return macs


def _wants(block: Block) -> ConvLayer | CausalAttention | None:
    """The layer at the beginning of a block whose norm must know the statistics of the block's input."""
    if isinstance(block, Residual):
        return block.first if block.first.norm is not None else None
    if isinstance(block, (ConvLayer, CausalAttention)):
        return block if block.norm is not None else None
    return None
