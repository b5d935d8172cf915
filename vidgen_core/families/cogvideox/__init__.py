"""CogVideoX (Zhipu AI, 2024): a v-predicting transformer over a causal VAE, told by T5.

Source: https://github.com/zai-org/CogVideo and arXiv:2408.06072.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ...types import Defaults
from .. import Family, KeyframeRules, Part
from .config import CodecConfig
from .parts import CODEC, T5, TEXT, TEXT_ASSEMBLY, build_codec
from .vae import grid_of


def _not_yet(*_: Any) -> NoReturn:
    raise NotImplementedError("CogVideoX's network")


FAMILY = Family(
    name="cogvideox",
    title="CogVideoX",
    parts={
        "network": Part(config=CodecConfig, build=_not_yet, recognise=lambda shapes: None),
        "codec": CODEC,
        "text": TEXT,
        "t5": T5,
    },
    text=TEXT_ASSEMBLY,
    diffusion=_not_yet,
    codec=build_codec,
    network_inputs=_not_yet,
    condition=_not_yet,
    native_features=_not_yet,
    keyframes=KeyframeRules(
        check=_not_yet,
        condition=_not_yet,
        check_conditioning=_not_yet,
        methods={},
        modes={},
        hidden_frames=_not_yet,
        interleave=_not_yet,
    ),
    patch=_not_yet,
    grid=grid_of,
    latent_channels=_not_yet,
    fits_text=_not_yet,
    blocks=(),
    keep_fp32=(),
    lora_targets=(),
    activation_bytes=_not_yet,
    defaults=Defaults(),
)
"""Codec and text encoder are whole; the network is on its way in another branch."""
