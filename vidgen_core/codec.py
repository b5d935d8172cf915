"""What lies between video and latents: one small interface, whatever the family."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

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

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior over latents; tiles are blended here, before anything is drawn."""
        ...

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents of ``video``: a sample of the posterior with a generator, its mode without."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Video of ``latents``, about [-1, 1]; not clamped."""
        ...


OnPart = Callable[[int, int], None]
"""``(done, total)`` after each part; may raise to stop."""


@runtime_checkable
class StreamingCodec(Codec, Protocol):
    """A codec that hands on a video as it comes, in memory that does not depend on its length."""

    def frames(self, latents: Tensor, *, on_part: OnPart | None = None) -> Generator[Tensor, None, None]:
        """The video of one sample's latents (1, C, T', H', W') as (3, n, H, W), a few frames at a time, in order."""
        ...


class ScaledCodec(nn.Module):
    """What codecs share whose latents are those of a VAE times one number; a module, so that it moves as one.

    Args:
        vae: has ``grid`` and ``config``.
        config: with ``scaling_factor``; None: the VAE's own.
    """

    def __init__(self, vae: Any, config: Any = None) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config if config is None else config

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        return self.vae.grid

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Codec.moments`."""
        raise NotImplementedError

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T', H', W') at unit scale: the mode, or a sample with a generator."""
        return draw(*self.moments(video), generator)

    def _scaled(self, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.config.scaling_factor
        return mean * scale, logvar + 2 * math.log(scale)


def draw(mean: Tensor, logvar: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of the diagonal Gaussian, its mode for ``generator=None``.

    The noise is drawn in fp32 on the generator's own device, so that a CPU generator gives the same latents
    everywhere and in every dtype.
    """
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean + torch.exp(0.5 * logvar) * noise.to(mean)
