"""CogVideoX (Zhipu AI, 2024): a v-predicting transformer over a causal VAE, told by T5.

Source: https://github.com/zai-org/CogVideo and arXiv:2408.06072.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...diffusion import Diffusion, scaled_linear_table, snr_shift, vp, zero_terminal_snr
from ...errors import SettingsError
from ...text.features import TextFeatures
from ...types import Conditioning, VideoShape
from .. import Family, Part
from .block_rules import BLOCK_RULES
from .config import NetworkConfig, TextConfig, defaults
from .keyframes import RULES, lead_frames, trail_frames
from .keys import LAYOUTS
from .network import CogVideoXTransformer
from .parts import CODEC, T5, TEXT, TEXT_ASSEMBLY, build_codec
from .recognise import network_config, network_told
from .vae import grid_of

OFFSET = 2.0
"""what networks with an offset embedding are told"""


def _build_network(config: NetworkConfig, metadata: Mapping[str, str]) -> nn.Module:
    return CogVideoXTransformer(config)


def _diffusion(config: NetworkConfig) -> Diffusion:
    return vp(zero_terminal_snr(snr_shift(scaled_linear_table(), config.snr_shift)), predicts="v")


def _network_inputs(config: NetworkConfig, x: Tensor, clock: Tensor, cond: Conditioning) -> dict[str, Any]:
    if cond.concat is not None:
        x = torch.cat([x, cond.concat.to(x.dtype)], dim=1)
    elif config.fills_in:  # nothing is given: a video from text
        x = torch.cat([x, x.new_zeros(x.shape[0], config.in_channels - x.shape[1], *x.shape[2:])], dim=1)
    return {
        "x": x,
        "timestep": clock.expand(x.shape[0]),
        "context": cond.context,
        "context_mask": cond.context_mask,
        "offset": torch.full((x.shape[0],), OFFSET, device=x.device) if config.offset_embed else None,
    }


def _condition(config: NetworkConfig, features: TextFeatures, guidance: float | None) -> Conditioning:
    """Every token, padded ones too: the networks were trained to look at all of them."""
    return Conditioning(context=features.context)


def _native_features(config: NetworkConfig, tokens: Tensor, mask: Tensor | None, pooled: Tensor | None) -> TextFeatures:
    if tokens.ndim != 3 or tokens.shape[-1] != config.text_width:
        raise SettingsError(
            "This conditioning does not belong to the network",
            given=f"tokens {tuple(tokens.shape)}",
            expected=f"tokens {config.text_width} wide",
            do="encode with T5-XXL",
        )
    everything = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return TextFeatures(
        context=tokens.float(), context_mask=everything, pooled=tokens.new_zeros(len(tokens), 0).float()
    )


def _fits_text(network: NetworkConfig, text: TextConfig) -> str | None:
    width = FAMILY.text.widths(text)[0]
    if width == network.text_width:
        return None
    return f"a text encoder {width} wide, where the network reads {network.text_width}"


def _activation_bytes(config: NetworkConfig, shape: VideoShape) -> int:
    """Residual stream, q, k, v, attention output, the MLP's inner layer and two temporaries of each token."""
    frames = (shape.num_frames - 1) // 4 + 1
    frames = FAMILY.denoised_frames(config, frames)
    pt, ph, pw = config.patch
    tokens = frames * shape.height_px * shape.width_px // (64 * pt * ph * pw)
    width = config.hidden_size * (1 + 3 + 1 + 2 + config.mlp_ratio)
    return int(2 * (tokens + config.text_length) * width)


FAMILY = Family(
    name="cogvideox",
    title="CogVideoX",
    parts={
        "network": Part(
            config=NetworkConfig, build=_build_network, recognise=network_config, layouts=LAYOUTS, told=network_told
        ),
        "codec": CODEC,
        "text": TEXT,
        "t5": T5,
    },
    text=TEXT_ASSEMBLY,
    diffusion=_diffusion,
    codec=build_codec,
    network_inputs=_network_inputs,
    condition=_condition,
    native_features=_native_features,
    keyframes=RULES,
    patch=lambda config: config.patch,
    grid=grid_of,
    lead_frames=lead_frames,
    trail_frames=trail_frames,
    latent_channels=lambda config: config.out_channels,
    fits_text=_fits_text,
    blocks=("layers",),
    block_rules=BLOCK_RULES,
    keep_fp32=(),
    lora_targets=("query_key_value", "dense"),
    lora_alpha_note=(
        "taken as its rank. Trainers of CogVideoX often use alpha 64 at rank 128, and SAT uses alpha 1: if the LoRA "
        "acts too strongly, set alpha to what it was trained with"
    ),
    activation_bytes=_activation_bytes,
    defaults=defaults,
)
