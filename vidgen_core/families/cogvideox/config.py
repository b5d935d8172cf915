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

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along an edge."""
        return 2 ** (len(self.block_channels) - 1)


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
T5_XXL = TextConfig()
