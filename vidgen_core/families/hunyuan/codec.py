"""HunyuanVideo's codec: the causal VAE and the scale of its latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...types import Grid
from .config import CodecConfig
from .vae import CausalVAE


class HunyuanCodec(nn.Module):
    """:class:`~vidgen_core.codec.Codec` over a :class:`CausalVAE`; a module, so that it moves and is placed as one.

    Tensors are cast to the dtype and device of the weights on the way in; what comes out stays there.
    """

    def __init__(self, vae: CausalVAE, config: CodecConfig | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.config = vae.config if config is None else config

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        return self.vae.grid

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T', H', W') at unit scale.

        Args:
            video: T is 4 n + 1; H and W are multiples of 8.
            generator: draws from the posterior, on the generator's own device; None takes the mode.

        Raises:
            SettingsError: a size that the codec cannot make.
        """
        mean, logvar = self.vae.encode(self._cast(video))
        if generator is not None:
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
            mean = mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return mean * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) at unit scale -> (B, 3, 4 (T - 1) + 1, 8 H, 8 W), about [-1, 1]."""
        return self.vae.decode(self._cast(latents) / self.config.scaling_factor)

    def _cast(self, x: Tensor) -> Tensor:
        weight = self.vae.post_quant_conv.weight
        return x.to(device=weight.device, dtype=weight.dtype)
