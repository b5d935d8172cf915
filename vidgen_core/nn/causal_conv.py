"""3-D convolution that never looks at a later frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import Conv3d, conv3d, empty_like

Steps = tuple[int, int, int]
"""Factors by which T, H and W shrink or grow."""


class CausalConv3d(nn.Module):
    """``Conv3d`` with edge-replicating padding: all of the padding in time comes before the first frame.

    (B, C, T, H, W) -> (B, C', ceil(T / st), ceil(H / sh), ceil(W / sw)) for stride (st, sh, sw); an output frame
    depends on its own and earlier input frames only. The weights live in ``.conv``, as in the official
    checkpoints (source: HunyuanVideo ``hyvideo/vae/unet_causal_3d_blocks.py``).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: Steps = (1, 1, 1)) -> None:
        super().__init__()
        self.side, self.front = kernel // 2, kernel - 1
        self.conv = Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_pad(x, self.side, self.front))

    def stream(self, x: Tensor, before: Callable[[Tensor], Tensor], num_frames: int) -> Tensor:
        """``self(before(x))`` with ``num_frames`` at a time in memory between the two, or the stride in time."""
        time = self.conv.stride[0]
        num_frames = max(1, num_frames // time) * time  # so that every window but the last has no frame left over
        out: Tensor | None = None
        for start, padded in _windows(x, before, self.side, self.front, num_frames):
            part: Tensor = self.conv(padded)
            if out is None:
                out = empty_like(part, (*part.shape[:2], math.ceil(x.shape[2] / time), *part.shape[3:]))
            out[:, :, start // time : start // time + part.shape[2]] = part
        assert out is not None
        return out


class UpsampledCausalConv3d(nn.Module):
    """Nearest-neighbour upsampling by ``steps`` (1 or 2 along T, H, W) and a causal 3x3x3 convolution, as one.

    (B, C, T, H, W) -> (B, C', 2 T - 1, 2 H, 2 W) for (2, 2, 2): the first frame is not doubled. The large tensor
    between the two never exists. After the upsampling, neighbours are equal and two of the three taps along an axis
    meet the same sample, so every phase of the output (odd rows, even rows, ...) is a convolution of the small
    tensor with 2 taps along that axis: 27 multiplications become 8 for (2, 2, 2), 12 for (1, 2, 2).
    """

    def __init__(self, in_channels: int, out_channels: int, steps: Steps) -> None:
        super().__init__()
        self.front = 2 // steps[0]
        self.conv = _PhaseConv3d(in_channels, out_channels, steps)

    def forward(self, x: Tensor) -> Tensor:
        return Interleave.apply(self.conv(_pad(x, 1, self.front)), self.conv.steps)

    def stream(self, x: Tensor, num_frames: int) -> Tensor:
        """``self(x)`` from ``num_frames`` at a time."""
        time, height, width = steps = self.conv.steps
        batch, _, length, rows, columns = x.shape
        size = (time * (length - 1) + 1, height * rows, width * columns)
        out: Tensor | None = None
        for start, padded in _windows(x, lambda frames: frames, 1, self.front, num_frames):
            phases: Tensor = self.conv(padded)
            if out is None:
                out = empty_like(phases, (batch, self.conv.out_channels, *size))
            end = time * (start + phases.shape[2] - 1) + 1
            for small, large in phase_pairs(phases, out[:, :, max(0, time * (start - 1) + 1) : end], steps):
                large.copy_(small)
        assert out is not None
        return out


def _pad(x: Tensor, side: int, front: int) -> Tensor:
    return F.pad(x, (side, side, side, side, front, 0), mode="replicate") if side or front else x


def _windows(
    x: Tensor, before: Callable[[Tensor], Tensor], side: int, front: int, num_frames: int
) -> Iterator[tuple[int, Tensor]]:
    """``before(x)``, padded, as (first frame, window): each begins with the last ``front`` frames before it."""
    past: Tensor | None = None
    for start in range(0, x.shape[2], num_frames):
        frames = before(x[:, :, start : start + num_frames])
        window = _pad(frames, side, front) if past is None else torch.cat([past, _pad(frames, side, 0)], dim=2)
        del frames
        past = window[:, :, window.shape[2] - front :].clone()
        yield start, window


class _PhaseConv3d(nn.Conv3d):
    """Owns the 3x3x3 weights; computes all phases of the upsampled convolution at once, phase-major in channels."""

    def __init__(self, in_channels: int, out_channels: int, steps: Steps) -> None:
        super().__init__(in_channels, out_channels, 3)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return conv3d(x, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weights and biases of all phases."""
        assert self.bias is not None
        return fold_phases(self.weight, self.bias, self.steps)


def fold_phases(weight: Tensor, bias: Tensor, steps: Steps) -> tuple[Tensor, Tensor]:
    """A convolution of what is upsampled by ``steps`` -> one of what is not, with all phases of the output in its
    channels, phase-major: (C', C, t, 3, 3) -> (phases C', C, t', 2, 2), and the biases."""
    time, height, width = steps
    for dim, step in ((4, width), (3, height), (2, time)):
        if step == 2:
            first, middle, last = weight.unbind(dim)
            late = torch.stack([first, middle + last], dim)  # the sample before this one, and this one twice
            early = torch.stack([first + middle, last], dim)
            # Space is padded on both sides, time in front only: there, frame 2 n - 1 is the first of its pair.
            weight = torch.cat([early, late] if dim == 2 else [late, early])
    return weight, bias.repeat(math.prod(steps))


class Interleave(torch.autograd.Function):
    """(B, phases C, T, H [+ 1], W [+ 1]) -> (B, C, T', H', W'): a copy each way, where slices under autograd would
    clone the whole tensor once for each phase."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor, steps: Steps) -> Tensor:
        time, height, width = ctx.steps = steps
        batch, channels, num_frames, rows, columns = ctx.shape = phases.shape
        size = time * (num_frames - 1) + 1, height * (rows - height + 1), width * (columns - width + 1)
        out = empty_like(phases, (batch, channels // math.prod(steps), *size))
        for small, large in phase_pairs(phases, out, steps):
            large.copy_(small)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        phases = grad.new_zeros(ctx.shape)
        for small, large in phase_pairs(phases, grad, ctx.steps):
            small.copy_(large)
        return phases, None


def phase_pairs(phases: Tensor, full: Tensor, steps: Steps) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same samples in both layouts.

    Along a doubled axis of space there is one position too many: phase 0 uses all but the last, phase 1 all but
    the first. In time, phase 0 of the video's first frame would be that frame a second time; where ``full`` has no
    place for it, it is left out.
    """
    time, height, width = steps
    rows, columns = full.shape[3] // height, full.shape[4] // width
    first = time * phases.shape[2] - full.shape[2]
    phases = phases.unflatten(1, (*steps, -1))
    for i in range(time):
        skip = int(i < first)
        for j in range(height):
            for k in range(width):
                small = phases[:, i, j, k, :, skip:, j : j + rows, k : k + columns]
                yield small, full[:, :, i - first + time * skip :: time, j::height, k::width]
