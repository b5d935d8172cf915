"""What lies between video and latents: one small interface, whatever the family."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .types import Grid


@runtime_checkable
class Codec(Protocol):
    """Video (B, 3, T, H, W) in [-1, 1] <-> latents (B, C, T', H', W') at the scale that the network sees.

    Scale, shift, mean and std live inside, so that nobody else multiplies latents.
    """

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        ...

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents of ``video``: a sample of the posterior with a generator, its mode without."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Video of ``latents``, about [-1, 1]; not clamped."""
        ...
