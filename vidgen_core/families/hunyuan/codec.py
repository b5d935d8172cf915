"""HunyuanVideo's codec: the causal VAE and the scale of its latents."""

from __future__ import annotations

from torch import Tensor

from ...codec import ScaledCodec
from ...nn.strips import Chain
from .blocks import decoder_blocks, encoder_blocks
from .config import CodecConfig
from .vae import CausalVAE


class HunyuanCodec(ScaledCodec):
    """:class:`~vidgen_core.codec.Codec` over a :class:`CausalVAE`; a module, so that it moves and is placed as one.

    Tensors are cast to the dtype and device of the weights on the way in; what comes out stays there.
    """

    vae: CausalVAE

    def __init__(self, vae: CausalVAE, config: CodecConfig | None = None) -> None:
        super().__init__(vae, config)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance at unit scale, each (B, C, T', H', W').

        Raises:
            SettingsError: T is not 4 n + 1, or H or W is not a multiple of 8.
        """
        return self._scaled(*self.vae.encode(self._cast(video)))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) at unit scale -> (B, 3, 4 (T - 1) + 1, 8 H, 8 W), about [-1, 1]."""
        return self.vae.decode(self._unscaled(latents))

    def _unscaled(self, latents: Tensor) -> Tensor:
        return self._cast(latents) / self.config.scaling_factor

    def decoder_chain(self) -> Chain:
        """The decoder block by block, for :func:`~vidgen_core.bounded.exact`."""
        return Chain(decoder_blocks(self.vae), weight=self.vae.post_quant_conv.weight, before=self._unscaled)

    def encoder_chain(self) -> Chain:
        """The encoder block by block."""
        return Chain(encoder_blocks(self.vae), weight=self.vae.encoder.conv_in.conv.weight, before=self._cast)

    def moments_of(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`encoder_chain` makes of a video -> mean and log variance at unit scale."""
        return self._scaled(*self.vae.moments(encoded))

    def _cast(self, x: Tensor) -> Tensor:
        weight = self.vae.post_quant_conv.weight
        return x.to(device=weight.device, dtype=weight.dtype)
