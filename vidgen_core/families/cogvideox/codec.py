"""CogVideoX's codec: the causal VAE and the scale of its latents."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ...codec import OnPart, ScaledCodec
from ...errors import SettingsError
from .config import CodecConfig
from .vae import GROUP, CogVideoXVAE, groups


class CogVideoXCodec(ScaledCodec):
    """:class:`~vidgen_core.codec.StreamingCodec` over a :class:`CogVideoXVAE`; a module, so that it moves as one.

    Tensors are cast to the dtype and device of the weights on the way in; what comes out stays there.
    """

    vae: CogVideoXVAE

    def __init__(self, vae: CogVideoXVAE, config: CodecConfig | None = None) -> None:
        super().__init__(vae, config)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance at unit scale, each (B, C, T', H', W').

        Raises:
            SettingsError: T is not 8 n + 1, or H or W is not a multiple of 8.
        """
        return self._scaled(*self.vae.encode(video))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T, H, W) at unit scale, T odd -> (B, 3, 4 (T - 1) + 1, 8 H, 8 W), about [-1, 1].

        Raises:
            SettingsError: T is even.
        """
        return self.vae.decode(self._unscaled(latents))

    @torch.no_grad()
    def frames(self, latents: Tensor, *, on_part: OnPart | None = None) -> Generator[Tensor, None, None]:
        """The video of one sample's latents as (3, n, H, W), a group of frames at a time and in order.

        Raises:
            SettingsError: more than one video, or an even number of latent frames.
        """
        if len(latents) != 1:
            raise SettingsError("Frames come from one video", given=f"a batch of {len(latents)}", expected="1")
        self.vae.check_latents(latents)
        total = len(groups(latents.shape[2], GROUP))
        for done, part in enumerate(self.vae.decode_groups(self._unscaled(latents)), 1):
            if on_part is not None:
                on_part(done, total)
            yield part[0]

    def _unscaled(self, latents: Tensor) -> Tensor:
        weight = self.vae.decoder.conv_in.conv.weight
        return latents.to(device=weight.device, dtype=weight.dtype) / self.config.scaling_factor
