"""HunyuanVideo's configs from the names and shapes in a published file, which carries no config of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ...errors import CheckpointError
from ...weights.shards import CONFIG_KEY
from .config import VAE_884_16C, CodecConfig, NetworkConfig

Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many modules are numbered ``prefix.N.``."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def network_config(shapes: Shapes) -> NetworkConfig | None:
    """The transformer's config; None when the names are not HunyuanVideo's.

    Text-to-video and token-replace image-to-video files are alike in every shape and count as text-to-video.
    """
    needed = ("img_in.proj.weight", "double_blocks.0.img_attn_qkv.weight", "txt_in.input_embedder.weight")
    if any(name not in shapes for name in needed) or "vector_in.in_layer.weight" not in shapes:
        return None
    hidden_size, in_channels, *patch = shapes["img_in.proj.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn_q_norm.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] // math.prod(patch)
    concat = in_channels == 2 * out_channels + 1
    image: Literal["none", "latent_concat"] = "latent_concat" if concat else "none"
    return NetworkConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        hidden_size=hidden_size,
        num_heads=hidden_size // head_dim,
        mlp_ratio=shapes["double_blocks.0.img_mlp.fc1.weight"][0] / hidden_size,
        num_double_blocks=_count(shapes, "double_blocks"),
        num_single_blocks=_count(shapes, "single_blocks"),
        num_refiner_blocks=_count(shapes, "txt_in.individual_token_refiner.blocks"),
        patch=(patch[0], patch[1], patch[2]),
        rope_axes=_rope_axes(head_dim),
        text_width=shapes["txt_in.input_embedder.weight"][1],
        pooled_width=shapes["vector_in.in_layer.weight"][1],
        guidance_embed="guidance_in.mlp.0.weight" in shapes,
        image_condition=image,
    )


def network_told(config: NetworkConfig, metadata: Mapping[str, str]) -> tuple[NetworkConfig, bool]:
    """(the config with what diffusers' config.json adds to the shapes, whether an image condition was named).

    Raises:
        CheckpointError: the config.json is damaged, or belongs to another network.
    """
    if config.image_condition == "latent_concat":
        return config, True
    if CONFIG_KEY not in metadata:
        return config, False
    try:
        told = json.loads(metadata[CONFIG_KEY])
        image = told.get("image_condition_type", "unknown")
    except (json.JSONDecodeError, AttributeError):
        raise CheckpointError("The config.json beside the weights is damaged", do="download it again") from None
    if image == "unknown":
        return config, False
    if image not in (None, "token_replace"):
        raise CheckpointError(
            "The config.json does not belong to the weights beside it",
            given=f"image_condition_type {image!r} for a network with {config.in_channels} channels",
            expected="null or token_replace",
            do="use the config.json that was published with these weights",
        )
    return replace(config, image_condition="token_replace" if image else "none"), True


def _rope_axes(head_dim: int) -> tuple[int, int, int]:
    """1/8 of the head for time, 7/16 for rows and for columns: 16, 56, 56 of the published 128."""
    space = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * space, space, space


def codec_config(shapes: Shapes) -> CodecConfig | None:
    """The VAE's config; scaling factor and compression are the published ones."""
    needed = (
        "encoder.conv_in.conv.weight",
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "encoder.mid_block.attentions.0.to_q.weight",
        "decoder.up_blocks.0.resnets.0.conv1.conv.weight",
        "post_quant_conv.weight",
    )
    if any(name not in shapes for name in needed):
        return None
    levels = _count(shapes, "encoder.down_blocks")
    channels = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"][0] for level in range(levels)]
    return replace(
        VAE_884_16C,
        in_channels=shapes["encoder.conv_in.conv.weight"][1],
        latent_channels=shapes["post_quant_conv.weight"][0],
        block_channels=tuple(channels),
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets"),
    )
