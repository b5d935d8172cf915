"""Rotary position embedding over a grid of (frames, rows, columns).

Pairs are interleaved: channels (0, 1), (2, 3), ... of a head are rotated together. Each axis owns a run of channels
of its own. Source: RoFormer (Su et al. 2021), with the axes of HunyuanVideo's ``hyvideo/modules/posemb_layers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .norms import overwrites


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeStretch:
    """RIFLEx (Zhao et al. 2025): one frequency of the frame axis slowed down, so that a video longer than the network
    has learned does not begin anew when that frequency has turned once."""

    component: int
    """which frequency of the ladder, 0 is the fastest"""
    trained_length: int
    """tokens along frames that the network has learned; no longer video is changed by anything"""
    turn: float = 0.9
    """how far the frequency turns over the whole video; the published code leaves a tenth of margin"""

    def frequencies(self, ladder: Tensor, length: int) -> Tensor:
        """The frame axis' frequencies for ``length`` tokens along it."""
        if length <= self.trained_length:
            return ladder
        changed = ladder.clone()
        changed[self.component] = changed[self.component].clamp(max=self.turn * 2 * math.pi / length)
        return changed


def intrinsic_component(channels: int, theta: float, trained_length: int) -> int:
    """The fastest frequency that turns at most once over the trained length: the one whose turn shows as repetition.

    Gives the published choices: 3 of HunyuanVideo (16 channels, base 256, 33 tokens), 1 of CogVideoX-5B (16, 1e4, 13).
    """
    count = channels // 2
    periods = (2 * math.pi * theta ** (2 * i / channels) for i in range(count))
    return next((i for i, period in enumerate(periods) if period >= trained_length), count - 1)


_stretch: TimeStretch | None = None


def time_stretch() -> TimeStretch | None:
    """The stretch of now, for :func:`rope_table`."""
    return _stretch


@contextmanager
def stretched_time(stretch: TimeStretch | None) -> Iterator[None]:
    """Inside the block, :func:`time_stretch` is this one."""
    global _stretch
    before, _stretch = _stretch, stretch
    try:
        yield
    finally:
        _stretch = before


@lru_cache(maxsize=8)
def rope_table(
    grid: tuple[int, int, int],
    axes: tuple[int, int, int],
    theta: float,
    *,
    num_plain: int = 0,
    device: torch.device,
    stretch: TimeStretch | None = None,
    spans: tuple[tuple[float, float], ...] | None = None,
) -> Tensor:
    """Every token's rotations; kept for the last few grids, never part of a state dict.

    Args:
        grid: tokens along (frames, rows, columns); positions count from 0 on each axis.
        axes: head channels given to each axis, all even.
        theta: base of the geometric ladder of frequencies, theta ** (-2 i / axis).
        num_plain: tokens after the grid (text) that are not rotated.
        device: where the tables live.
        stretch: of the frame axis, for videos longer than the network has learned.
        spans: (first, end) of the positions on each axis, over which the tokens are spread; None counts them from 0.

    Returns:
        float32 (L, 1, sum(axes) / 2, 2) with L = prod(grid) + num_plain, ready to broadcast over heads: the cosine
        and sine of each channel pair's angle.
    """
    # A table first made while sampling must also serve training, which inference tensors cannot.
    with torch.inference_mode(False), torch.no_grad():
        angles = []
        for axis, (size, channels) in enumerate(zip(grid, axes, strict=True)):
            ladder = torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels
            frequencies = 1.0 / theta**ladder
            if axis == 0 and stretch is not None:
                frequencies = stretch.frequencies(frequencies, size)
            first, end = (0.0, float(size)) if spans is None else spans[axis]
            positions = torch.linspace(first, end * (size - 1) / size, size, device=device, dtype=torch.float32)
            shape = [1, 1, 1, len(frequencies)]
            shape[axis] = size
            angles.append(torch.outer(positions, frequencies).view(shape).expand(*grid, -1))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)
        angle = torch.cat([angle, angle.new_zeros(num_plain, angle.shape[1])])
        return torch.stack([angle.cos(), angle.sin()], dim=-1).unsqueeze(1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the channel pairs of ``x`` (B, L, heads, d); float32 inside, the dtype of ``x`` outside."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler fuses this form and cannot fuse complex numbers.
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        # A complex product reads and writes every number once: 10 times faster than the form above on a CPU.
        numbers = torch.view_as_complex(pairs)
        is_own = x.dtype != torch.float32 and overwrites()
        turned = torch.view_as_real(torch.mul(numbers, torch.view_as_complex(table), out=numbers if is_own else None))
    return turned.flatten(-2).to(x.dtype)
