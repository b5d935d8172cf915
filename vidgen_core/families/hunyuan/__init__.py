"""HunyuanVideo (Tencent, 2024): a flow-matching transformer over a causal VAE, told by LLaMA and CLIP.

Source: https://github.com/Tencent-Hunyuan/HunyuanVideo and arXiv:2412.03603.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...codec import Codec
from ...diffusion import Diffusion, flow_matching
from ...errors import SettingsError
from ...nn.attention import trim_padding
from ...text.features import TextFeatures
from ...types import Conditioning, Grid, VideoShape
from .. import Family, Part, TextAssembly
from .block_rules import BLOCK_RULES
from .codec import HunyuanCodec
from .config import DEFAULTS, ClipDims, CodecConfig, LlamaDims, NetworkConfig, TextConfig, VisionDims
from .keyframes import RULES
from .keys import LAYOUTS, VAE_LAYOUTS
from .network import HunyuanVideoTransformer
from .recognise import codec_config, network_config, network_told
from .text_files import (
    build_clip_part,
    build_llama_part,
    build_text,
    build_vision_part,
    find_tokenizers,
    join_stack,
    stack_config,
)
from .text_keys import CLIP_LAYOUTS, LLAMA_LAYOUTS, VISION_LAYOUTS
from .text_recognise import clip_dims, llama_dims, stranger, text_config, vision_dims
from .vae import CausalVAE


def _build_network(config: NetworkConfig, metadata: Mapping[str, str]) -> nn.Module:
    return HunyuanVideoTransformer(config)


def _build_vae(config: CodecConfig, metadata: Mapping[str, str]) -> nn.Module:
    return CausalVAE(config)


def _diffusion(config: NetworkConfig) -> Diffusion:
    return flow_matching()


def _codec(vae: nn.Module, config: CodecConfig) -> Codec:
    assert isinstance(vae, CausalVAE)
    return HunyuanCodec(vae, config)


def _per_sample(clock: Tensor, x: Tensor) -> Tensor:
    """The clock as the network wants it: (B,), or (B, T) where frames have times of their own."""
    if clock.ndim == 5:
        return clock.expand(x.shape[0], 1, x.shape[2], 1, 1).reshape(x.shape[0], x.shape[2])
    return clock.expand(x.shape[0])


def _network_inputs(config: NetworkConfig, x: Tensor, clock: Tensor, cond: Conditioning) -> dict[str, Any]:
    if cond.concat is not None:
        x = torch.cat([x, cond.concat.to(x.dtype)], dim=1)
    return {
        "x": x,
        "timestep": _per_sample(clock, x),
        "context": cond.context,
        "context_mask": cond.context_mask,
        "pooled": cond.pooled,
        "guidance": cond.scalars.get("guidance") if config.guidance_embed else None,
    }


def _condition(config: NetworkConfig, features: TextFeatures, guidance: float | None) -> Conditioning:
    """Only as many tokens as are real go on: the network's cost grows with every padded one."""
    context, mask = trim_padding(features.context, features.context_mask)
    scalars = {}
    if config.guidance_embed:
        value = DEFAULTS.guidance if guidance is None else guidance
        scalars["guidance"] = torch.full((len(context),), value, dtype=torch.float32, device=context.device)
    return Conditioning(context=context, context_mask=mask, pooled=features.pooled, scalars=scalars)


def _native_features(config: NetworkConfig, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None) -> TextFeatures:
    widths = tokens.shape[-1], None if pooled is None else pooled.shape[-1]
    if tokens.ndim != 3 or widths != (config.text_width, config.pooled_width):
        raise SettingsError(
            "This conditioning does not belong to the network",
            given=f"tokens {tuple(tokens.shape)}, " + ("no pooled vector" if pooled is None else f"pooled {widths[1]}"),
            expected=f"tokens {config.text_width} wide and a pooled vector of {config.pooled_width}",
            do="encode with DualCLIPLoader set to hunyuan_video (llava_llama3 and clip_l)",
        )
    assert pooled is not None
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    if mask.shape != tokens.shape[:2] or len(pooled) != len(tokens):
        raise SettingsError(
            "The parts of this conditioning do not fit together",
            given=f"tokens {tuple(tokens.shape)}, mask {tuple(mask.shape)}, pooled {tuple(pooled.shape)}",
            expected="as many samples and tokens in each",
        )
    return TextFeatures(context=tokens.float(), context_mask=mask.to(tokens.device), pooled=pooled.float())


def _grid(config: CodecConfig) -> Grid:
    return Grid(
        channels=config.latent_channels, spatial=config.spatial_compression, temporal=config.temporal_compression
    )


def _fits_text(network: NetworkConfig, text: TextConfig) -> str | None:
    given = FAMILY.text.widths(text)
    wanted = network.text_width, network.pooled_width
    if given == wanted:
        return None
    return f"text encoders {given[0]} and {given[1]} wide, where the network reads {wanted[0]} and {wanted[1]}"


def _image_conditions(config: NetworkConfig) -> tuple[str, ...]:
    """Text-to-video and token-replace networks have the same weights; only what they were trained for tells them."""
    return ("latent_concat",) if config.image_condition == "latent_concat" else ("none", "token_replace")


def _activation_bytes(config: NetworkConfig, shape: VideoShape) -> int:
    """Residual stream, q, k, v, attention output, the MLP's inner layer and two temporaries of each token."""
    frames = (shape.num_frames - 1) // 4 + 1
    tokens = frames * shape.height_px * shape.width_px // (64 * config.patch[0] * config.patch[1] * config.patch[2])
    width = config.hidden_size * (1 + 3 + 1 + 2 + 2 * config.mlp_ratio)
    return int(2 * (tokens + 256) * width)


def _text_activation(config: TextConfig, num_tokens: int) -> tuple[int, float]:
    """Residual stream, q, k, v and the MLP's three inner tensors in float32; the template's tokens run as well."""
    dims = config.llama
    tokens = num_tokens + config.video_template.crop_start
    width = 8 * dims.hidden_size + 3 * dims.intermediate_size
    per_layer = 4 * dims.hidden_size**2 + 3 * dims.hidden_size * dims.intermediate_size
    return 4 * tokens * width, 2.0 * tokens * per_layer * dims.num_layers


FAMILY = Family(
    name="hunyuan",
    title="HunyuanVideo",
    parts={
        "network": Part(
            config=NetworkConfig, build=_build_network, recognise=network_config, layouts=LAYOUTS, told=network_told
        ),
        "codec": Part(config=CodecConfig, build=_build_vae, recognise=codec_config, layouts=VAE_LAYOUTS),
        "text": Part(config=TextConfig, build=build_text, recognise=text_config),
        "llama": Part(config=LlamaDims, build=build_llama_part, recognise=llama_dims, layouts=LLAMA_LAYOUTS),
        "clip": Part(config=ClipDims, build=build_clip_part, recognise=clip_dims, layouts=CLIP_LAYOUTS),
        "vision": Part(config=VisionDims, build=build_vision_part, recognise=vision_dims, layouts=VISION_LAYOUTS),
    },
    text=TextAssembly(
        parts=("text", "llama", "clip", "vision"),
        config=stack_config,
        tokenizers=find_tokenizers,
        join=join_stack,
        blocks={"text": ("llama.layers",), "llama": ("llama.layers",)},
        later=("vision",),
        widths=lambda config: (config.llama.hidden_size, config.clip.hidden_size),
        sees_images=lambda config: config.vision is not None,
        stranger=stranger,
        activation=_text_activation,
    ),
    diffusion=_diffusion,
    codec=_codec,
    network_inputs=_network_inputs,
    condition=_condition,
    native_features=_native_features,
    keyframes=RULES,
    patch=lambda config: config.patch,
    grid=_grid,
    latent_channels=lambda config: config.out_channels,
    fits_text=_fits_text,
    image_conditions=_image_conditions,
    blocks=("double_blocks", "single_blocks"),
    block_rules=BLOCK_RULES,
    keep_fp32=("time_in", "vector_in", "guidance_in", "final_layer"),
    lora_targets=("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "linear1", "linear2"),
    activation_bytes=_activation_bytes,
    defaults=lambda config: DEFAULTS,
)
