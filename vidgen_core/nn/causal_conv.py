"""3-D convolution that never looks at a later frame."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        return self.conv(x)


class UpsampledCausalConv3d(nn.Module):
    """Nearest-neighbour upsampling by ``steps`` (1 or 2 along T, H, W) and a causal 3x3x3 convolution, as one.

    (B, C, T, H, W) -> (B, C', 2 T - 1, 2 H, 2 W) for (2, 2, 2): the first frame is not doubled. The large tensor
    between the two never exists. After the upsampling, neighbours are equal and two of the three taps along an axis
    meet the same sample, so every phase of the output (odd rows, even rows, ...) is a convolution of the small
    tensor with 2 taps along that axis: 27 multiplications become 8 for (2, 2, 2), 12 for (1, 2, 2).
    """

    def __init__(self, in_channels: int, out_channels: int, steps: Steps) -> None:
        super().__init__()
        self.conv = _PhaseConv3d(in_channels, out_channels, steps)

    def forward(self, x: Tensor) -> Tensor:
        front = 2 // self.conv.steps[0]
        phases = self.conv(F.pad(x, (1, 1, 1, 1, front, 0), mode="replicate"))
        return _Interleave.apply(phases, self.conv.steps)


class _PhaseConv3d(nn.Conv3d):
    """Owns the 3x3x3 weights; computes all phases of the upsampled convolution at once, phase-major in channels."""

    def __init__(self, in_channels: int, out_channels: int, steps: Steps) -> None:
        super().__init__(in_channels, out_channels, 3)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        time, height, width = self.steps
        weight = self.weight
        for dim, step in ((4, width), (3, height), (2, time)):
            if step == 2:
                first, middle, last = weight.unbind(dim)
                late = torch.stack([first, middle + last], dim)  # the sample before this one, and this one twice
                early = torch.stack([first + middle, last], dim)
                # Space is padded on both sides, time in front only: there, frame 2 n - 1 is the first of its pair.
                weight = torch.cat([early, late] if dim == 2 else [late, early])
        return F.conv3d(x, weight, self.bias.repeat(time * height * width))


class _Interleave(torch.autograd.Function):
    """(B, phases C, T, H [+ 1], W [+ 1]) -> (B, C, T', H', W'): a copy each way, where slices under autograd would
    clone the whole tensor once for each phase."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, y: Tensor, steps: Steps) -> Tensor:
        time, height, width = ctx.steps = steps
        ctx.shape = y.shape
        batch, channels, num_frames, rows, columns = y.shape
        num_frames = time * (num_frames - 1) + 1 if time == 2 else num_frames
        out = y.new_empty(
            batch, channels // math.prod(steps), num_frames, height * (rows - height + 1), width * (columns - width + 1)
        )
        for small, large in _phase_pairs(y, out, steps):
            large.copy_(small)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        for small, large in _phase_pairs(out, grad, ctx.steps):
            small.copy_(large)
        return out, None


def _phase_pairs(phases: Tensor, full: Tensor, steps: Steps) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same samples in both layouts.

    Along a doubled axis of space there is one position too many: phase 0 uses all but the last, phase 1 all but
    the first. In time, phase 0 of the first frame would be the doubled first frame; it is left out.
    """
    time, height, width = steps
    rows, columns = full.shape[3] // height, full.shape[4] // width
    phases = phases.unflatten(1, (*steps, -1))
    for i in range(time):
        skip = 1 if time == 2 and i == 0 else 0
        for j in range(height):
            for k in range(width):
                small = phases[:, i, j, k, :, skip:, j : j + rows, k : k + columns]
                yield small, full[:, :, skip::time, j::height, k::width]
