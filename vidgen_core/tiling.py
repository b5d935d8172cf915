"""Bounded memory for codecs: long and large videos in overlapping tiles, with linear cross-fades between them.

A tiled result is not the one-pass result: a codec's norms and attention see one tile at a time. What is kept exactly
is HunyuanVideo's own tiling (``hyvideo/vae/autoencoder_kl_causal_3d.py``): which tiles there are, what is cut from
each and in which order neighbours are blended. Frames are the outer loop, rows and columns the inner one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codec import Codec, draw
from .errors import SettingsError
from .types import Grid, VideoShape

OnTile = Callable[[int, int], None]
"""``(done, total)`` after each tile; may raise to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Size of the tiles in pixels and frames; tiles overlap by size minus stride. The defaults are HunyuanVideo's.

    A causal codec is given one more frame per tile, and drops the first of what it makes of every later tile: a first
    frame is coded on its own and must not appear in the middle of a video. The frames of a codec that goes through a
    video group by group (``Grid.group``) are not cut: tiles would save nothing and lose what it carries along.
    """

    tile_px: int = 256
    stride_px: int = 192
    tile_frames: int = 64
    stride_frames: int = 48
    tile_width_px: int | None = None
    """of tiles that are not square (CogVideoX's own are 240 px high every 200 and 360 px wide every 288); None: they
    are as wide as high"""
    stride_width_px: int | None = None

    @property
    def width(self) -> tuple[int, int]:
        """Size and stride along a row."""
        tile = self.tile_px if self.tile_width_px is None else self.tile_width_px
        return tile, self.stride_px if self.stride_width_px is None else self.stride_width_px

    def check(self, grid: Grid) -> None:
        """Raise :class:`SettingsError` unless tiles and strides are whole numbers of latents."""
        for name, tile, stride, step, unit in (
            ("size", self.tile_px, self.stride_px, grid.spatial, "px"),
            ("width", *self.width, grid.spatial, "px"),
            ("length", self.tile_frames, self.stride_frames, grid.temporal, "frames"),
        ):
            if not 0 < stride <= tile or tile % step or stride % step:
                raise SettingsError(
                    f"The {name} of the codec's tiles cannot be used",
                    given=f"tiles of {tile} {unit} every {stride} {unit}",
                    expected=f"multiples of {step} {unit}, and a stride of at most the tile",
                    do="use tiles of 256 px every 192 px, and of 64 frames every 48 frames",
                )


@dataclass(frozen=True, slots=True)
class _Axis:
    """Tiles along one axis; ``size``, ``stride`` and ``extra`` in samples of the input, ``ratio`` outputs per input.

    ``ratio`` is (n, 1) when decoding and (1, n) when encoding.
    """

    size: int
    stride: int
    ratio: tuple[int, int]
    lead: int = 0
    """samples at the start of the axis that stand outside the ratio: 1 for the frames of a causal codec"""

    def starts(self, length: int) -> range:
        """Where tiles start. With a lead, the last stride may hold nothing but the sample that the tile would drop."""
        return range(0, length - self.lead, self.stride)

    def out(self, samples: int) -> int:
        """Samples of output for ``samples`` of input, the lead not counted."""
        return samples * self.ratio[0] // self.ratio[1]

    @property
    def overlap(self) -> int:
        return self.out(self.size - self.stride)


Space = tuple[_Axis, _Axis]
"""rows and columns"""


def _starts(space: Space, lengths: Sequence[int]) -> list[range]:
    """Where tiles start along both axes: they are cut together or, if the whole fits into a tile, not at all."""
    if all(length <= axis.size for axis, length in zip(space, lengths, strict=True)):
        return [range(1), range(1)]
    return [axis.starts(length) for axis, length in zip(space, lengths, strict=True)]


def tiled(codec: Codec, tiling: Tiling | None = None, *, on_tile: OnTile | None = None) -> TiledCodec:
    """``codec`` with bounded memory and the same interface.

    Args:
        tiling: None takes HunyuanVideo's tiles.
        on_tile: called after each tile with (done, total), for progress and for cancelling by raising.

    Raises:
        SettingsError: tiles that are not whole latents.
    """
    return TiledCodec(codec, Tiling() if tiling is None else tiling, on_tile)


class TiledCodec:
    """A :class:`Codec` that codes tile by tile; results are collected on the device of what it is given.

    So latents in CPU memory decode to a video in CPU memory, and only a tile at a time is on the codec's device.
    """

    def __init__(self, codec: Codec, tiling: Tiling, on_tile: OnTile | None = None) -> None:
        tiling.check(codec.grid)
        self.codec = codec
        self.tiling = tiling
        self.on_tile = on_tile

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        return self.codec.grid

    @torch.no_grad()
    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance at unit scale, blended over the tiles."""
        grid = self.grid
        VideoShape(num_frames=video.shape[2], height_px=video.shape[3], width_px=video.shape[4]).check(grid)
        both = self._run(lambda tile: torch.cat(self.codec.moments(tile), dim=1), video, decodes=False)
        mean, logvar = both.chunk(2, dim=1)
        return mean, logvar

    @torch.no_grad()
    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T', H', W') at unit scale: the mode, or a sample with a generator."""
        return draw(*self.moments(video), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T', H', W') at unit scale -> (B, 3, T, H, W), about [-1, 1]."""
        return self._run(self.codec.decode, latents, decodes=True)

    def _axes(self, length: int, *, decodes: bool) -> tuple[_Axis, Space]:
        """Frames, rows and columns of what is coded."""

        def axis(size: int, stride: int, step: int, lead: int = 0) -> _Axis:
            if decodes:
                return _Axis(size // step, stride // step, (step, 1), lead)
            return _Axis(size, stride, (1, step), lead)

        grid, tiling, lead = self.grid, self.tiling, int(self.grid.causal)
        time = axis(tiling.tile_frames, tiling.stride_frames, grid.temporal, lead)
        if grid.group > 1:
            time = replace(time, size=max(time.size, length))
        rows, columns = (axis(*sizes, grid.spatial) for sizes in ((tiling.tile_px, tiling.stride_px), tiling.width))
        return time, (rows, columns)

    def _run(self, code: Callable[[Tensor], Tensor], x: Tensor, *, decodes: bool) -> Tensor:
        time, space = self._axes(x.shape[2], decodes=decodes)
        starts = range(1) if x.shape[2] <= time.size else time.starts(x.shape[2])
        code = self._counted(code, math.prod(len(axis) for axis in (starts, *_starts(space, x.shape[3:]))))
        out = None
        tail: Tensor | None = None
        done = 0
        for start in starts:
            tile = _in_space(code, x[:, :, start : start + time.size + time.lead], space)
            if len(starts) == 1:
                return tile
            if start > 0:
                tile = tile[:, :, time.lead :]
            if out is None:
                num_frames = time.out(x.shape[2] - time.lead) + time.lead
                out = tile.new_empty(*tile.shape[:2], num_frames, *tile.shape[3:])
            tail = _blend_(tail, tile, time.overlap, dim=2)
            kept = tile[:, :, : time.out(time.stride) + (time.lead if start == 0 else 0)]
            kept = kept[:, :, : out.shape[2] - done]
            out[:, :, done : done + kept.shape[2]] = kept
            done += kept.shape[2]
        assert out is not None
        assert done == out.shape[2]
        return out

    def _counted(self, code: Callable[[Tensor], Tensor], total: int) -> Callable[[Tensor], Tensor]:
        if self.on_tile is None:
            return code
        done = 0
        on_tile = self.on_tile

        def counted(tile: Tensor) -> Tensor:
            nonlocal done
            result = code(tile)
            done += 1
            on_tile(done, total)
            return result

        return counted


def _in_space(code: Callable[[Tensor], Tensor], x: Tensor, space: Space) -> Tensor:
    """Code ``x`` in tiles of rows and columns and put them together, on the device of ``x``.

    Every tile is first blended with the tile above, then with the tile on its left, and both have been blended
    themselves before: corners depend on this order. Only the strips that are still to be blended are kept.
    """
    rows, columns = _starts(space, x.shape[3:])
    if len(rows) == len(columns) == 1:
        return code(x).to(x.device)
    down, across = space
    out: Tensor | None = None
    above: list[Tensor | None] = [None] * len(columns)
    height, width = down.out(down.stride), across.out(across.stride)
    for i, top in enumerate(rows):
        left: Tensor | None = None
        for j, start in enumerate(columns):
            tile = code(x[:, :, :, top : top + down.size, start : start + across.size]).to(x.device)
            if out is None:
                out = tile.new_empty(*tile.shape[:3], down.out(x.shape[3]), across.out(x.shape[4]))
            _blend_(above[j], tile, down.overlap, dim=3)
            left = _blend_(left, tile, across.overlap, dim=4)
            above[j] = tile[:, :, :, -down.overlap :].clone() if down.overlap else None
            part = tile[:, :, :, :height, :width]
            out[..., i * height : i * height + part.shape[3], j * width : j * width + part.shape[4]] = part
    assert out is not None
    return out


def _blend_(before: Tensor | None, tile: Tensor, overlap: int, *, dim: int) -> Tensor | None:
    """Fade from the end of ``before`` into the start of ``tile``, in place; returns the end of ``tile``.

    A tile at the border may be shorter than the overlap. Then it ends where the tile before it ends, and the last
    samples of both are still the same places.
    """
    if before is not None:
        extent = min(overlap, before.shape[dim], tile.shape[dim])
        weight = torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent
        weight = weight.view(-1, *[1] * (tile.ndim - 1 - dim))
        start = tile.narrow(dim, 0, extent)
        end = before.narrow(dim, before.shape[dim] - extent, extent)
        start.copy_(end * (1 - weight) + start * weight)
    keep = min(overlap, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - keep, keep).clone() if keep else None
