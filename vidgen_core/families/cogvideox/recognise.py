"""CogVideoX's configs from the names and shapes in a published file, and from the config.json beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError
from ...weights.shards import CONFIG_KEY
from .config import (
    FUN_1_5_5B,
    FUN_2B,
    FUN_5B,
    FUN_NOISE,
    I2V_1_5_5B,
    T2V_1_5_5B,
    T2V_2B,
    T2V_5B,
    NetworkConfig,
)

Shapes = Mapping[str, tuple[int, ...]]

_NEEDED = (
    "patch_embed.proj.weight",
    "patch_embed.text_proj.weight",
    "time_embed.0.weight",
    "layers.0.query_key_value.weight",
    "layers.0.query_layernorm.weight",
    "layers.0.dense_h_to_4h.weight",
    "final_layer.linear.weight",
)


def network_config(shapes: Shapes) -> NetworkConfig | None:
    """The transformer's config; None when the names are not CogVideoX's.

    Nothing in a file tells a fixed table of positions from rotations: networks of 2B's width have the table, as the
    published one does, unless a config.json says otherwise.
    """
    if any(name not in shapes for name in _NEEDED):
        return None
    projection = shapes["patch_embed.proj.weight"]
    table = shapes.get("patch_embed.pos_embedding")
    (head,) = shapes["layers.0.query_layernorm.weight"]
    hidden_size, text_width = shapes["patch_embed.text_proj.weight"]
    is_1_5 = len(projection) == 2
    has_offset = "ofs_embed.0.weight" in shapes
    volume = math.prod((T2V_1_5_5B if is_1_5 else T2V_5B).patch)
    out_channels = shapes["final_layer.linear.weight"][0] // volume
    in_channels = projection[1] // volume if is_1_5 else projection[1]
    base = _base(
        is_1_5=is_1_5,
        is_offset=has_offset,
        is_2b=hidden_size == T2V_2B.hidden_size and table is None,
        fills_in=in_channels == 2 * out_channels + 1,
    )
    if table is not None and in_channels == out_channels:
        return None  # SAT's files carry the fixed table under the trained one's name
    return replace(
        base,
        in_channels=in_channels,
        out_channels=out_channels,
        hidden_size=hidden_size,
        num_heads=hidden_size // head,
        num_layers=len({match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))}),
        mlp_ratio=shapes["layers.0.dense_h_to_4h.weight"][0] / hidden_size,
        text_width=text_width,
        time_width=shapes["time_embed.0.weight"][0],
        rope_axes=_rope_axes(head),
        positions="learned" if table is not None else base.positions,
    )


def _base(*, is_1_5: bool, is_offset: bool, is_2b: bool, fills_in: bool) -> NetworkConfig:
    if fills_in:
        return FUN_1_5_5B if is_1_5 else (FUN_2B if is_2b else FUN_5B)
    if is_1_5:
        return I2V_1_5_5B if is_offset else T2V_1_5_5B
    return T2V_2B if is_2b else T2V_5B


def _rope_axes(head: int) -> tuple[int, int, int]:
    """1/4 of the head for time, 3/8 for rows and for columns: 16, 24, 24 of the published 64."""
    space = head // 8 * 3
    return head - 2 * space, space, space


def network_told(config: NetworkConfig, metadata: Mapping[str, str]) -> tuple[NetworkConfig, bool]:
    """(the config with what diffusers' config.json adds to the shapes, True: files say how they take pictures).

    Raises:
        CheckpointError: the config.json is damaged, or belongs to another network.
    """
    out_channels = config.out_channels
    if config.in_channels not in (out_channels, 2 * out_channels, 2 * out_channels + 1):
        raise CheckpointError(
            "This CogVideoX takes more than a text and pictures, which is not supported",
            given=f"{config.in_channels} input channels for {out_channels} output channels",
            expected=f"{out_channels} (from text), {2 * out_channels} (from a first frame) or {2 * out_channels + 1} "
            "(Fun-InP, from any frames)",
            do="use one of the five releases of Zhipu AI or CogVideoX-Fun-InP; control variants are other networks",
        )
    if CONFIG_KEY not in metadata:
        return config, True
    try:
        told = json.loads(metadata[CONFIG_KEY])
        return _with_told(config, told), True
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError):
        raise CheckpointError("The config.json beside the weights is damaged", do="download it again") from None


def _with_told(config: NetworkConfig, told: Mapping[str, Any]) -> NetworkConfig:
    given = {
        "num_layers": config.num_layers,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
    }
    wrong = [f"{name} {told[name]}, not {own}" for name, own in given.items() if told.get(name, own) != own]
    if wrong:
        raise CheckpointError(
            "The config.json does not belong to the weights beside it",
            given=", ".join(wrong),
            do="use the config.json that was published with these weights",
        )
    if "use_rotary_positional_embeddings" in told and config.positions != "learned":
        positions = "rope" if told["use_rotary_positional_embeddings"] else "sincos"
        snr_shift = T2V_2B.snr_shift if positions == "sincos" and not config.fills_in else T2V_5B.snr_shift
        config = replace(config, positions=positions, snr_shift=snr_shift)
    pt, ph, pw = config.patch
    frames, rows, columns = config.trained_grid
    if "sample_frames" in told:
        latent_frames = (int(told["sample_frames"]) - 1) // int(told.get("temporal_compression_ratio", 4)) + 1
        frames = -(-latent_frames // pt)
    rows, columns = int(told.get("sample_height", ph * rows)) // ph, int(told.get("sample_width", pw * columns)) // pw
    return replace(
        config,
        trained_grid=(frames, rows, columns),
        text_length=int(told.get("max_text_seq_length", config.text_length)),
        sincos_scale=float(told.get("spatial_interpolation_scale", config.sincos_scale)),
        image_noise=FUN_NOISE if told.get("add_noise_in_inpaint_model", False) else config.image_noise,
    )
