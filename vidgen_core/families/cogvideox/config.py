"""CogVideoX's dimensions, from a toy to the published 5 B.

They travel as JSON in the metadata of a safetensors file, so that a file alone is enough to build the model it holds.
Source of the published values: the CogVideo repository (``sat/configs``) and the ``config.json`` of its releases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...text.dims import T5Dims
from ...types import Defaults


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


SCALING_FACTOR_2B = 1.15258426
VAE_2B = CodecConfig(scaling_factor=SCALING_FACTOR_2B)
VAE_5B = CodecConfig()
T5_XXL = TextConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The diffusion transformer."""

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 3072
    num_heads: int = 48
    num_layers: int = 42
    mlp_ratio: float = 4.0
    patch: tuple[int, int, int] = (1, 2, 2)
    """latent frames, rows and columns per token; two frames in version 1.5"""
    text_width: int = 4096
    text_length: int = 226
    """text tokens of every prompt, the padded ones included: nothing is masked"""
    time_width: int = 512
    """of the vector that tells every block the time"""
    positions: Literal["sincos", "rope", "learned"] = "rope"
    """what tells tokens where they are: a fixed table that is added, rotations, or rotations and a trained table"""
    trained_grid: tuple[int, int, int] = (13, 30, 45)
    """tokens along frames, rows and columns of the trained size"""
    rope_fit: Literal["resize", "slice"] = "resize"
    """another size is spread over the trained one, or counts its tokens from 0 as far as the trained one goes"""
    rope_axes: tuple[int, int, int] = (16, 24, 24)
    """head dimensions given to time, height and width; they add up to hidden_size / num_heads"""
    rope_theta: float = 10_000.0
    sincos_scale: float = 1.875
    """rows and columns are this many times closer together in the fixed table"""
    sincos_fit: Literal["count", "stretch"] = "count"
    """another size goes on counting in the fixed table, or the trained part of it is stretched over that size"""
    offset_embed: bool = False
    """the network is told a number besides the time, which is always 2 (image to video of version 1.5)"""
    snr_shift: float = 1.0
    """what the signal-to-noise ratio of the noise table is divided by"""
    image_scale: float = 1.0
    """latents of a given picture, at unit scale, are multiplied with it before they are stacked onto the channels"""
    image_noise: float = 0.0
    """standard deviation of noise on what is given of a video, before it is encoded (networks that fill in)"""
    mask_scale: float = 0.7
    """what the mask says where the video is given: the factor of the VAE in training (networks that fill in)"""

    @property
    def takes_image(self) -> bool:
        """The input has channels for the latents of a given picture."""
        return self.in_channels > self.out_channels

    @property
    def fills_in(self) -> bool:
        """The input has channels for a mask and for the latents of a video with gaps (CogVideoX-Fun-InP)."""
        return self.in_channels == 2 * self.out_channels + 1


SCALING_FACTOR = 0.7
"""of the VAE of 5B and its successors: latents at unit scale = factor * latents of the VAE"""
RAW_LATENTS = 1 / SCALING_FACTOR
"""image_scale with which the network is told a picture as the VAE gives it: how the official code of 1.5 does it"""
INVERTED_LATENTS = 1 / SCALING_FACTOR**2
"""as the release for diffusers does it (``invert_scale_latents``)"""

T2V_2B = NetworkConfig(hidden_size=1920, num_heads=30, num_layers=30, positions="sincos", snr_shift=3.0)
T2V_5B = NetworkConfig()
I2V_5B = NetworkConfig(in_channels=32, positions="learned")
T2V_1_5_5B = NetworkConfig(patch=(2, 2, 2), trained_grid=(11, 150, 150), rope_fit="slice")
I2V_1_5_5B = replace(T2V_1_5_5B, in_channels=32, offset_embed=True, image_scale=INVERTED_LATENTS)

# CogVideoX-Fun (alibaba-pai): 2B and both versions of 5B trained on to fill in what is missing of a video. Its trainer
# and its samplers leave the ratio of 2B alone (github.com/aigc-apps/VideoX-Fun).
FUN_2B = replace(T2V_2B, in_channels=33, snr_shift=1.0, sincos_fit="stretch", mask_scale=SCALING_FACTOR_2B)
FUN_5B = NetworkConfig(in_channels=33)
FUN_1_5_5B = replace(T2V_1_5_5B, in_channels=33)
FUN_NOISE = 0.0563
"""image_noise of the releases that were trained on noisy pictures, for more motion: 1.1 and later, but not 2B"""

DEFAULTS_2B = Defaults(
    num_frames=49, height_px=480, width_px=720, fps=8, num_steps=50, shift=1.0, cfg=6.0, sampler="ddim",
    schedule="trailing",
)  # fmt: skip
DEFAULTS_5B = replace(DEFAULTS_2B, sampler="cogvideox_dpm", cfg_schedule="dynamic")
DEFAULTS_1_5 = replace(DEFAULTS_5B, num_frames=81, height_px=768, width_px=1360, fps=16)
DEFAULTS_FUN = replace(DEFAULTS_2B, height_px=384, width_px=672)


def defaults(config: NetworkConfig) -> Defaults:
    """What the authors recommend for a network."""
    if config.fills_in:
        return DEFAULTS_FUN if config.patch[0] == 1 else replace(DEFAULTS_FUN, num_frames=81)
    if config.patch[0] > 1:
        return DEFAULTS_1_5
    return DEFAULTS_2B if config.positions == "sincos" else DEFAULTS_5B
