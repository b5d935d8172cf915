"""Numbers, vectors and pixels on their way into a transformer, and tokens on their way out."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of ``t`` at geometrically spaced frequencies, cosines first.

    Args:
        t: any shape, any scale (0..1000 for most networks); need not be whole numbers.
        dim: even number of channels.

    Returns:
        float32 (*t.shape, dim).
    """
    half = dim // 2
    # In the order of every published code: at t = 1000 an angle shows each digit of its frequency.
    ladder = -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float().unsqueeze(-1) * torch.exp(ladder)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """A number -> sinusoids -> two linear layers. Any shape (...) -> (..., hidden_size)."""

    def __init__(self, hidden_size: int, *, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """The sinusoids are made in float32 and rounded once, to the dtype of the weights."""
        weight = self.mlp[0].weight
        assert isinstance(weight, Tensor)
        return self.mlp(timestep_embedding(t, self.frequencies).to(weight.dtype))


class PatchConv(nn.Conv3d):
    """A convolution whose kernel equals its stride, so that it is one matrix product: several times faster on a CPU."""

    def __init__(self, in_channels: int, hidden_size: int, patch: tuple[int, int, int]) -> None:
        super().__init__(in_channels, hidden_size, kernel_size=patch, stride=patch)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, hidden_size, T / pt, H / ph, W / pw), as any convolution; a view of the tokens."""
        tokens = F.linear(patchify(input, self.patch), self.weight.flatten(1), self.bias)
        grid = [size // step for size, step in zip(input.shape[2:], self.patch, strict=True)]
        return tokens.transpose(1, 2).unflatten(2, grid)


class PatchEmbed(nn.Module):
    """Blocks of latents to tokens. The weight has a convolution's shape, as checkpoints store it."""

    def __init__(self, in_channels: int, hidden_size: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        # Called as a module, so that what listens to modules (a LoRA, offloading) hears of this one too.
        self.proj = PatchConv(in_channels, hidden_size, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, L, hidden_size); frames are outermost, then rows, then columns."""
        return self.proj(x).flatten(2).transpose(1, 2)


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B, L, C * prod(patch)); a token's channels are ordered (C, pt, ph, pw)."""
    b, c, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify`; ``grid`` counts tokens along (frames, rows, columns)."""
    t, h, w = grid
    pt, ph, pw = patch
    x = tokens.unflatten(2, (-1, pt, ph, pw)).unflatten(1, (t, h, w))
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(x.shape[0], -1, t * pt, h * ph, w * pw)
