"""HunyuanVideo's dimensions, from the 1 M toy to the published 13 B: three frozen records.

They travel as JSON in the metadata of a safetensors file, so that a file alone is enough to build
the model it holds. Source of the published values: Tencent's HunyuanVideo repository
(``hyvideo/modules/models.py``, ``hyvideo/vae``, ``hyvideo/constants.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...text.dims import ClipDims, LlamaDims, VisionDims
from ...types import Defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """The diffusion transformer."""

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_ratio: float = 4.0
    num_double_blocks: int = 20
    num_single_blocks: int = 40
    num_refiner_blocks: int = 2
    patch: tuple[int, int, int] = (1, 2, 2)
    """latent frames, rows and columns per token"""
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    """head dimensions given to time, height and width; they add up to hidden_size / num_heads"""
    rope_theta: float = 256.0
    text_width: int = 4096
    pooled_width: int = 768
    guidance_embed: bool = True
    """the network is told the guidance scale (guidance-distilled checkpoints)"""
    image_condition: Literal["none", "token_replace", "latent_concat"] = "none"
    """how the network must be told of a first frame; "none": it makes videos from text alone"""
    accepts_first_frame: bool = False
    """a network of "none" that was also trained with its first latent frame given and at time 0"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecConfig:
    """The causal 3-D VAE."""

    in_channels: int = 3
    latent_channels: int = 16
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    """residual blocks per encoder level; the decoder has one more"""
    num_groups: int = 32
    spatial_compression: int = 8
    temporal_compression: int = 4
    mid_attention: bool = True
    scaling_factor: float = 0.476986
    """latents the network sees = scaling_factor * latents of the VAE"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A prompt template and what is cut from the states again."""

    text: str
    """with ``{}`` where the prompt goes; templates for a prompt with a picture also have :data:`IMAGE_MARK`"""
    crop_start: int
    """leading tokens that are cut, the start token counted; a picture counts as one token"""
    assistant_tokens: int = 0
    """tokens after the prompt that are cut, up to the last token of the template, which stays"""


IMAGE_MARK = "<image>"
"""stands for the picture's tokens in a template"""

_VIDEO_ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
_IMAGE_ASPECTS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|eot_id|>"
)
_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
_USER = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
_ASSISTANT = "<|start_header_id|>assistant<|end_header_id|>\n\n"

VIDEO_TEMPLATE = Template(
    text=f"{_SYSTEM}Describe the video by detailing the following aspects: {_VIDEO_ASPECTS}{_USER}", crop_start=95
)
IMAGE_TEMPLATE = Template(text=f"{_SYSTEM}{_IMAGE_ASPECTS}{_USER}", crop_start=36)
I2V_VIDEO_TEMPLATE = Template(
    text=(
        f"{_SYSTEM}{IMAGE_MARK}\nDescribe the video by detailing the following aspects according to the reference "
        f"image: {_VIDEO_ASPECTS}\n\n{_USER}{_ASSISTANT}"
    ),
    crop_start=103,
    assistant_tokens=4,
)
I2V_IMAGE_TEMPLATE = Template(
    # 36 is the published number, two less than this template has tokens; the networks were trained with it.
    text=f"{_SYSTEM}{IMAGE_MARK}\n{_IMAGE_ASPECTS}{_USER}{_ASSISTANT}",
    crop_start=36,
    assistant_tokens=4,
)

NEGATIVE_PROMPT = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)
"""what Tencent's code uses for text to video where true guidance is on (cfg above 1) and nothing else is given"""
NEGATIVE_PROMPT_I2V = "deformation, a poor composition and deformed video, bad teeth, bad eyes, bad limbs"
"""the same for image to video, together with a black picture"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """LLaMA states per token and one pooled CLIP vector; with ``vision``, LLaMA reads a picture as well (LLaVA)."""

    llama: LlamaDims = LlamaDims()
    clip: ClipDims = ClipDims()
    vision: VisionDims | None = None
    max_length: int = 256
    """prompt tokens kept after the template is cropped; shorter prompts are padded on the right"""
    pad_token_id: int = 128258
    bos_token_id: int = 128000
    video_template: Template = VIDEO_TEMPLATE
    image_template: Template = IMAGE_TEMPLATE
    image_token_id: int = 128257
    i2v_video_template: Template = I2V_VIDEO_TEMPLATE
    i2v_image_template: Template = I2V_IMAGE_TEMPLATE


T2V_720P = NetworkConfig()
I2V_TOKEN_REPLACE = NetworkConfig(image_condition="token_replace")
I2V_LATENT_CONCAT = NetworkConfig(in_channels=33, guidance_embed=False, image_condition="latent_concat")
VAE_884_16C = CodecConfig()
LLAMA_CLIP = TextConfig()
LLAVA_CLIP = TextConfig(vision=VisionDims())
DEFAULTS = Defaults()
