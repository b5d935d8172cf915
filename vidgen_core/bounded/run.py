"""Run a plan: every pass strip by strip and slab by slab, layers between them in a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..nn.scratch import Scratch
from ..nn.strips import Affine, CausalAttention, Layer, Rows, Size, SoftmaxOverParts, Statistics, add_skip, chain_strip
from .planner import KEYS_AT_ONCE, Job, Pass, Plan, Segment
from .volumes import Input, Output, Sink, Source, Store, Volume

OnTile = Callable[[int, int], None]
"""``(done, total)`` after each strip of each slab; may raise to stop."""


class Run:
    """One video through one chain of blocks."""

    def __init__(self, job: Job, plan: Plan, store: Store, on_tile: OnTile | None = None) -> None:
        self.job, self.plan, self.store = job, plan, store
        self.on_tile = on_tile
        self.done = 0
        self.scratch = Scratch(store.dtype, store.device)
        self.affines: dict[Layer | CausalAttention, Affine] = {}

    def whole(self, given: Input, result: Tensor) -> None:
        """Into ``result`` (C, T, H, W)."""
        source = self._until_last(given)
        self._segment(self.plan.segments[-1], source, Output(result))

    def frames(self, given: Input) -> Iterator[Tensor]:
        """(n, H, W, C) in the order of time; the last segment is one convolution."""
        source = self._until_last(given)
        (one,) = self.plan.segments[-1].passes
        (layer,) = one.layers
        size, out = self.plan.sizes[-2], self.plan.sizes[-1]
        assert size.frames == out.frames, "the last block keeps the frames"
        for first in range(0, size.frames, one.frames):
            last = min(first + one.frames, size.frames)
            begin = max(0, first - 2)
            slab = torch.empty(last - first, *out[2:], out.channels, dtype=self.store.dtype, device=self.store.device)
            for rows in _strips(out.rows, one.rows):
                strip = layer.strip(size, rows, self.affines, self.scratch)
                made = strip.push(self._read(source, strip.rows, (begin, last)))
                assert made is not None
                slab[:, slice(*rows)] = made[first - begin :]
                del made
                self._tick()
            yield slab
        source.release(size.rows)

    def _until_last(self, given: Input) -> Source:
        source: Source = given
        for segment in self.plan.segments[:-1]:
            block = self.job.blocks[segment.start]
            if isinstance(block, CausalAttention):
                assert isinstance(source, Volume)
                self._attend(block, segment, source)
                continue
            target = self._volume(self.plan.sizes[segment.stop])
            self._segment(segment, source, target)
            source = target
        return source

    def _volume(self, size: Size) -> Volume:
        return self.store.volume(size, spilled=self.plan.is_spilled(size))

    def _segment(self, segment: Segment, source: Source, target: Sink) -> None:
        inner: Volume | None = None
        for one in segment.passes:
            sink: Sink | None = None
            if one.stores == "inner":
                sink = inner = self._volume(one.size(self.plan.sizes[segment.start]))
            elif one.stores == "result":
                sink = target
            self._pass(one, segment, source, inner, sink)
        source.release(self.plan.sizes[segment.start].rows)
        if inner is not None:
            inner.close()

    def _pass(self, one: Pass, segment: Segment, source: Source, inner: Volume | None, sink: Sink | None) -> None:
        given = self.plan.sizes[segment.start]
        out = one.size(given)
        statistics = None if one.collects is None or one.collects.norm is None else Statistics(one.collects.norm)
        for rows in _strips(out.rows, one.rows):
            if one.joined is None:
                made = self._strip(one, given, rows, source)
            else:
                assert inner is not None
                made = self._joined_strip(one, given, rows, source, inner)
            first = 0
            for frames in made:
                if statistics is not None:
                    statistics.add(frames)
                if sink is not None:
                    sink.write(rows, first, frames)
                first += len(frames)
                del frames
            assert first == out.frames
            self.store.tidy()
        self._tidy()
        if statistics is not None:
            assert one.collects is not None
            self.affines[one.collects] = statistics.affine()

    def _strip(self, one: Pass, given: Size, rows: Rows, source: Source) -> Iterator[Tensor]:
        """The result of one strip, some frames at a time."""
        strip = chain_strip(one.layers, given, rows, self.affines, self.scratch)
        if one.stores == "result":
            source.release(strip.rows[0])
        for slab in _strips(given.frames, one.frames):
            made = strip.push(self._read(source, strip.rows, slab))
            self._tick()
            if made is not None:
                yield made
                del made

    def _joined_strip(self, one: Pass, given: Size, rows: Rows, source: Source, inner: Volume) -> Iterator[Tensor]:
        """As :meth:`_strip`, for a residual block whose first half was kept."""
        assert one.joined is not None
        second = one.joined.second.strip(inner.size, rows, self.affines, self.scratch)
        strip = chain_strip(one.layers, given, rows, self.affines, self.scratch)
        source.release(strip.rows[0])
        inner.release(second.rows[0])
        first = 0
        for slab in _strips(given.frames, one.frames):
            skip = strip.push(self._read(source, strip.rows, slab))
            if skip is not None:
                made = second.push(self._read(inner, second.rows, (first, first + len(skip))))
                assert made is not None
                first += len(skip)
                add_skip(made, skip, one.joined.shortcut)
                del skip
                yield made
                del made
            self._tick()

    def _attend(self, block: CausalAttention, segment: Segment, x: Volume) -> None:
        """In place: a position of ``x`` is not read any more once its own result is there."""
        (one,) = segment.passes
        size, affine = x.size, self.affines[block]
        statistics = None if one.collects is None or one.collects.norm is None else Statistics(one.collects.norm)

        def normalised(frames: Tensor) -> Tensor:
            return torch.addcmul(affine.shift, frames.to(affine.scale.dtype), affine.scale).to(frames.dtype)

        keys, values = self._volume(size), self._volume(size)
        for rows in _strips(size.rows, one.rows):
            for slab in _strips(size.frames, 1):
                tokens = normalised(self._read(x, rows, slab))
                keys.write(rows, slab[0], block.to_k(tokens))
                values.write(rows, slab[0], block.to_v(tokens))
            self._tick()
        for rows in _strips(size.rows, one.rows):
            for slab in _strips(size.frames, 1):
                frames = self._read(x, rows, slab)
                softmax = SoftmaxOverParts(block.to_q(normalised(frames)).flatten(0, 2))
                seen = 0, slab[1]
                for some in _strips(size.rows, max(1, KEYS_AT_ONCE // (slab[1] * size.columns))):
                    softmax.add(
                        self._read(keys, some, seen).flatten(0, 2), self._read(values, some, seen).flatten(0, 2)
                    )
                made = frames + block.to_out(softmax.result().to(frames.dtype)).view_as(frames)
                if statistics is not None:
                    statistics.add(made)
                x.write(rows, slab[0], made)
                del softmax, made
                self.store.tidy()
                self._tick()
        keys.close()
        values.close()
        self._tidy()
        if statistics is not None:
            assert one.collects is not None
            self.affines[one.collects] = statistics.affine()

    def _read(self, source: Source, rows: Rows, frames: Rows) -> Tensor:
        return source.read(rows, frames, self.scratch)

    def _tidy(self) -> None:
        """After a pass: the next one has strips of other sizes."""
        self.scratch.clear()
        self.store.tidy()

    def _tick(self) -> None:
        self.done += 1
        if self.on_tile is not None:
            self.on_tile(self.done, self.plan.tiles)


def _strips(length: int, step: int) -> Iterator[Rows]:
    for first in range(0, length, step):
        yield first, min(first + step, length)
