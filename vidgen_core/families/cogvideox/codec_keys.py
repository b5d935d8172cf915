"""The VAE's weights in the layouts that people have on disk, and its config from a file's names and shapes.

Native names are those of the diffusers release, which the single files for ComfyUI share. The original release
(``3d-vae.pt``) has those of latent diffusion's autoencoder and, in some copies, the weights of its training loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import CheckpointError
from ...weights.keymap import KeyMap, Row
from ...weights.shards import CONFIG_KEY
from .config import CodecConfig

Shapes = Mapping[str, tuple[int, ...]]

_PREFIXES = ("first_stage_model.", "vae.")
_LEVELS = 4


def _resnet(native: str, foreign: str) -> list[Row]:
    same = ("norm1", "conv1", "norm2", "conv2")
    return [
        *(Row(f"{native}.{name}", f"{foreign}.{name}") for name in same),
        Row(f"{native}.conv_shortcut", f"{foreign}.nin_shortcut"),
    ]


def _half(half: str) -> list[Row]:
    """What encoder and decoder share: both ends and the middle."""
    return [
        *(Row(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "norm_out", "conv_out")),
        *_resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"),
        *_resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"),
    ]


def _level(native: str, foreign: str, change: str) -> list[Row]:
    return [
        *_resnet(f"{native}.resnets.*", f"{foreign}.block.*"),
        Row(f"{native}.{change}samplers.0.conv", f"{foreign}.{change}sample.conv"),
    ]


def sat_layout() -> KeyMap:
    """The original release; it counts the decoder's levels from the output."""
    return KeyMap(
        [
            *_half("encoder"),
            *_half("decoder"),
            *_level("encoder.down_blocks.*", "encoder.down.*", "down"),
            *(
                row
                for level in range(_LEVELS)
                for row in _level(f"decoder.up_blocks.{level}", f"decoder.up.{_LEVELS - 1 - level}", "up")
            ),
        ],
        foreign="original CogVideoX",
        only_prefixes=_PREFIXES,
        unneeded=("loss.",),
    )


VAE_LAYOUTS: Mapping[str, KeyMap] = {
    "sat": sat_layout(),
    "prefixed": KeyMap(
        [Row(name, name) for name in ("encoder", "decoder")],
        foreign="prefixed native",
        only_prefixes=_PREFIXES,
        unneeded=("loss.",),
    ),
}
"""every layout of the VAE besides the native one"""


def _count(shapes: Shapes, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def codec_config(shapes: Shapes) -> CodecConfig | None:
    """The VAE's config; None when the names are not CogVideoX's. What shapes do not tell is as published for 5B."""
    needed = ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "decoder.norm_out.conv_y.conv.weight")
    if (
        any(name not in shapes for name in needed)
        or "decoder.mid_block.resnets.0.norm1.norm_layer.weight" not in shapes
    ):
        return None
    widths = [
        shapes.get(f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight", (0,))[0]
        for level in range(_count(shapes, "encoder.down_blocks"))
    ]
    return CodecConfig(
        in_channels=shapes["encoder.conv_in.conv.weight"][1],
        latent_channels=shapes["decoder.conv_in.conv.weight"][1],
        block_channels=tuple(widths),
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets"),
    )


def codec_told(config: CodecConfig, metadata: Mapping[str, str]) -> tuple[CodecConfig, bool]:
    """(the config with what diffusers' config.json adds to the shapes, whether there was one).

    All five models have the same VAE; only the config.json beside it tells the scale of its latents. (What it says of
    the scale of a given picture's latents, ``invert_scale_latents``, is the network's business.)

    Raises:
        CheckpointError: the config.json is damaged, or belongs to another VAE.
    """
    if CONFIG_KEY not in metadata:
        return config, False
    try:
        told: Any = json.loads(metadata[CONFIG_KEY])
        name, widths = told.get("_class_name"), told.get("block_out_channels", config.block_channels)
        scale = float(told.get("scaling_factor", config.scaling_factor))
        num_groups, frames = int(told.get("norm_num_groups", 32)), int(told.get("temporal_compression_ratio", 4))
    except (json.JSONDecodeError, AttributeError, TypeError, ValueError):
        raise CheckpointError("The config.json beside the VAE is damaged", do="download it again") from None
    if name not in (None, "AutoencoderKLCogVideoX") or tuple(widths) != config.block_channels or not scale > 0:
        raise CheckpointError(
            "The config.json does not belong to the VAE beside it",
            given=f"{name} with block_out_channels {widths} and scaling_factor {scale}",
            expected=f"AutoencoderKLCogVideoX with block_out_channels {list(config.block_channels)}",
            do="use the config.json that was published with these weights",
        )
    return replace(config, scaling_factor=scale, num_groups=num_groups, temporal_compression=frames), True
