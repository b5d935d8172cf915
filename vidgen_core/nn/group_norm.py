"""Group normalisation followed by SiLU, over whole videos or a few frames at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormSiLU(nn.GroupNorm):
    """(B, C, T, H, W) -> the same shape; statistics are over the channels of a group and over all of T, H, W."""

    def forward(self, x: Tensor) -> Tensor:
        """SiLU works in place where no gradient needs its input."""
        return F.silu(super().forward(x), inplace=not torch.is_grad_enabled())

    def by_frames(self, x: Tensor, num_frames: int) -> Callable[[Tensor], Tensor]:
        """This layer with the statistics of all of ``x``, as a function of any of its frames.

        ``x`` is read ``num_frames`` at a time; what is computed and where it is rounded is as in :meth:`forward`.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, variance = _statistics(x, self.num_groups, num_frames, dtype)
        width = self.num_channels // self.num_groups
        rstd = torch.rsqrt(variance + self.eps).repeat_interleave(width, dim=1)
        scale = rstd * self.weight.to(dtype)
        shift = self.bias.to(dtype) - mean.repeat_interleave(width, dim=1) * scale
        scale, shift = (value[:, :, None, None, None] for value in (scale, shift))

        def apply(frames: Tensor) -> Tensor:
            return F.silu(torch.addcmul(shift, frames.to(dtype), scale).to(frames.dtype), inplace=True)

        return apply


def _statistics(x: Tensor, num_groups: int, num_frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each sample and group, each (B, groups), merged from parts of ``num_frames`` frames."""
    parts = [
        torch.var_mean(part.to(dtype).unflatten(1, (num_groups, -1)), dim=(2, 3, 4, 5), correction=0)
        for part in x.split(num_frames, dim=2)
    ]
    variances, means = (torch.stack(values) for values in zip(*parts, strict=True))
    lengths = [part.shape[2] for part in x.split(num_frames, dim=2)]
    share = torch.tensor(lengths, dtype=dtype, device=x.device).div(x.shape[2])[:, None, None]
    mean = (share * means).sum(0)
    # Spread inside the parts and spread of the parts (Chan, Golub and LeVeque 1979).
    return mean, (share * (variances + (means - mean).square())).sum(0)
