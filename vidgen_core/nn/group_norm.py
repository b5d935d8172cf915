"""Group normalisation and SiLU, over whole videos or a few frames at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import empty_like, is_channels_last

PIECE_NUMBERS = 1 << 18
"""that are worked on at a time where channels are last: they stay in the CPU's cache from one pass to the next"""


class GroupNorm(nn.GroupNorm):
    """(B, C, T, H, W) -> the same shape; statistics are over the channels of a group and over all of T, H, W.

    Where channels are last, torch adds up a channel's numbers one after the other in float32 and is 1e-5 off at 128 px,
    more with every pixel. Here they are added up in pieces, and the pieces in float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not is_channels_last(x):
            return self._whole(x)
        out = empty_like(x, x.shape)
        if x.is_meta:  # nobody needs to plan for pieces: they are small
            return self._finish(out.copy_(x))
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (value.unsqueeze(1) for value in self.scale_and_shift(x, x.shape[2], wide))
        for given, made in zip(_pieces(x), _pieces(out), strict=True):
            if x.dtype == wide:
                torch.addcmul(shift, given, scale, out=made)
            else:
                made.copy_(torch.addcmul(shift, given.to(wide), scale))
            self._finish(made)
        return out

    def by_frames(self, x: Tensor, num_frames: int) -> Callable[[Tensor], Tensor]:
        """This layer with the statistics of all of ``x``, as a function of any of its frames.

        ``x`` is read ``num_frames`` at a time; what is computed and where it is rounded is as in :meth:`forward`.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (value[:, :, None, None, None] for value in self.scale_and_shift(x, num_frames, wide))

        def apply(frames: Tensor) -> Tensor:
            return self._finish(torch.addcmul(shift, frames.to(wide), scale).to(frames.dtype))

        return apply

    def _whole(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def _finish(self, x: Tensor) -> Tensor:
        """What follows the normalisation; without gradients, in place."""
        return x

    def scale_and_shift(self, x: Tensor, num_frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each (B, C) in ``dtype``: with the statistics of ``x``, read ``num_frames`` at a time, the layer is
        ``x * scale + shift``."""
        mean, variance = _statistics(x, self.num_groups, num_frames, dtype)
        width = self.num_channels // self.num_groups
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(width, dim=1) * self.weight.to(mean.dtype)
        shift = self.bias.to(mean.dtype) - mean.repeat_interleave(width, dim=1) * scale
        return scale.to(dtype), shift.to(dtype)


class GroupNormSiLU(GroupNorm):
    """Followed by SiLU, which works in place where no gradient needs its input."""

    def _whole(self, x: Tensor) -> Tensor:
        return F.silu(super()._whole(x), inplace=not torch.is_grad_enabled())

    def _finish(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=True)


def _statistics(x: Tensor, num_groups: int, num_frames: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each sample and group, each (B, groups); of ``num_frames`` frames at a time, in ``dtype``.

    Where channels are last they come in float64.
    """
    if is_channels_last(x):
        mean, variance = _channel_statistics(x, dtype)
        mean, variance = (value.unflatten(1, (num_groups, -1)).permute(2, 0, 1) for value in (mean, variance))
        return _merged(mean, variance, [1] * len(mean))
    frames = x.split(num_frames, dim=2)
    parts = [
        torch.var_mean(part.to(dtype).unflatten(1, (num_groups, -1)), dim=(2, 3, 4, 5), correction=0) for part in frames
    ]
    variances, means = (torch.stack(values) for values in zip(*parts, strict=True))
    return _merged(means, variances, [part.shape[2] for part in frames])


def _channel_statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance of each sample and channel, each (B, C) float64."""
    if x.is_meta:  # as in GroupNorm.forward
        known = torch.empty(x.shape[:2], dtype=torch.float64, device="meta")
        return known, known
    means, variances, lengths = [], [], []
    for piece in _pieces(x):
        numbers = piece.to(dtype)
        mean = numbers.mean(dim=1)
        gap = numbers - mean.unsqueeze(1)
        means.append(mean.double())
        variances.append(gap.mul_(gap).mean(dim=1).double())
        lengths.append(piece.shape[1])
    return _merged(torch.stack(means), torch.stack(variances), lengths)


def _merged(means: Tensor, variances: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of the parts along dim 0, those of the whole: spread inside the parts and spread of the parts.

    Source: Chan, Golub and LeVeque 1979.
    """
    share = torch.tensor(lengths, dtype=means.dtype, device=means.device).div(sum(lengths))
    share = share.view(-1, *[1] * (means.ndim - 1))
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor with channels last, each (B, pixels, C)."""
    batch, channels = x.shape[:2]
    pixels = x.permute(0, 2, 3, 4, 1).view(batch, -1, channels)
    return pixels.split(max(1, PIECE_NUMBERS // (batch * channels)), dim=1)
