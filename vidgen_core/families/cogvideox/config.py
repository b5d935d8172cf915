"""CogVideoX's dimensions: frozen records that travel as JSON in the metadata of a safetensors file.

Source of the published values: zai-org's CogVideo repository (``sat/configs``) and the diffusers release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...text.dims import T5Dims


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecConfig:
    """The causal 3-D VAE. Every level but the last halves rows and columns, the first ones also frames."""

    in_channels: int = 3
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    """residual blocks per encoder level; the decoder has one more"""
    num_groups: int = 32
    temporal_compression: int = 4
    scaling_factor: float = 0.7
    """latents the network sees = scaling_factor * latents of the VAE; 1.15258426 for CogVideoX-2B"""
    image_latents: Literal["scaled", "inverse", "raw"] = "scaled"
    """how a network wants a given picture: scaled as its own latents, divided by the scaling factor (the diffusers
    release of CogVideoX 1.5: ``invert_scale_latents``), or as the VAE makes it (the original release of 1.5)"""

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along an edge."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def image_factor(self) -> float:
        """What latents at unit scale are multiplied by where they are a given picture."""
        exponent = {"scaled": 0, "inverse": -2, "raw": -1}[self.image_latents]
        return self.scaling_factor**exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """T5's states of the bare prompt; padding is attended to and handed on like words."""

    t5: T5Dims = T5Dims()
    max_length: int = 226
    """tokens, the end-of-text token and padding counted"""
    pad_token_id: int = 0
    eos_token_id: int = 1
    empty_prompt: Literal["encoded", "zeros"] = "encoded"
    """what an empty prompt becomes: T5's states of it (diffusers), or zeros (the original release)"""


VAE_2B = CodecConfig(scaling_factor=1.15258426)
VAE_5B = CodecConfig()
VAE_1_5 = CodecConfig(image_latents="inverse")
T5_XXL = TextConfig()
