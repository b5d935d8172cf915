"""How CogVideoX takes a given first frame: on the channels, its latents at latent frame 0 and zeros elsewhere.

Version 1.5 reads two latent frames as one token. A video has an odd number of them, so one more runs along in front,
in training a copy of the first. The picture belongs to that one; it is dropped before decoding. Sources: the CogVideo
repository (``sat/diffusion_video.py``) and its release for diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...errors import SettingsError
from ...keyframes import (
    Keyframe,
    LatentKeyframe,
    check_first_frame,
    check_prepared,
    check_prepared_size,
    needs_a_picture,
)
from ...types import Conditioning
from .. import ImageMode, KeyframeRules
from .config import RAW_LATENTS, NetworkConfig

FRAMES_PER_LATENT = 4


def lead_frames(config: NetworkConfig, num_frames: int) -> int:
    """How many latent frames run along in front of ``num_frames``, so that they can be cut into patches."""
    return -num_frames % config.patch[0]


def check(config: NetworkConfig, keyframes: Sequence[Keyframe | LatentKeyframe], num_frames: int) -> None:
    """Raise SettingsError unless this network takes these pictures for a video of this length."""
    _check_length(config, num_frames)
    if not keyframes:
        if config.takes_image:
            raise needs_a_picture()
        return
    if not config.takes_image:
        raise SettingsError(
            "This network makes videos from text alone",
            given="an image for the first frame",
            expected="an image-to-video checkpoint (CogVideoX-5B-I2V, CogVideoX1.5-5B-I2V)",
            do="load one, or leave the image out",
        )
    check_first_frame("CogVideoX", keyframes, num_frames)


def _check_length(config: NetworkConfig, num_frames: int) -> None:
    latent_frames = (num_frames - 1) // FRAMES_PER_LATENT + 1
    if latent_frames % 2 == 0:
        step = 2 * FRAMES_PER_LATENT
        below, above = num_frames // step * step + 1, (num_frames // step + 1) * step + 1
        raise SettingsError(
            "CogVideoX's VAE cannot decode a video of this length",
            given=f"{num_frames} frames ({latent_frames} latent frames)",
            expected="8 n + 1 frames (1, 9, 17, ..., 49), an odd number of latent frames",
            do=f"use {below} or {above} frames",
        )
    longest = config.trained_grid[0]
    if config.positions == "learned" and latent_frames > longest:
        raise SettingsError(
            "This network was trained for one length of video and knows no longer one",
            given=f"{num_frames} frames",
            expected=f"at most {FRAMES_PER_LATENT * (longest - 1) + 1} frames",
            do="use fewer frames",
        )


def condition(
    config: NetworkConfig, cond: Conditioning, keyframes: Sequence[LatentKeyframe], shape: Sequence[int]
) -> Conditioning:
    """``cond`` with the first frame ``keyframes[0]`` for latents of ``shape`` (B, C, T, H, W)."""
    check(config, keyframes, FRAMES_PER_LATENT * (shape[2] - 1) + 1)
    if not keyframes:
        return cond
    picture = keyframes[0].latents
    check_prepared_size(picture, shape)
    rest = shape[2] + lead_frames(config, shape[2]) - 1
    nothing = picture.new_zeros(*picture.shape[:2], rest, *picture.shape[3:])
    return replace(cond, concat=torch.cat([picture * config.image_scale, nothing], dim=2))


def check_conditioning(config: NetworkConfig, cond: Conditioning, shape: Sequence[int]) -> None:
    """Raise SettingsError where the picture is missing, or does not fit latents of ``shape``."""
    _check_length(config, FRAMES_PER_LATENT * (shape[2] - 1) + 1)
    if not config.takes_image:
        return
    if cond.concat is None:
        raise needs_a_picture()
    check_prepared(cond.concat, shape[2] + lead_frames(config, shape[2]), shape)


def _told_raw(config: NetworkConfig) -> NetworkConfig:
    if config.image_scale == 1.0:
        raise SettingsError(
            "This network is told its image at the scale of its own latents",
            given='method "raw_latents"',
            expected='method "auto"; only CogVideoX1.5 was trained on raw latents',
        )
    return replace(config, image_scale=RAW_LATENTS)


RULES = KeyframeRules(
    check=check,
    condition=condition,
    check_conditioning=check_conditioning,
    # 1.5 was trained on the VAE's latents as they are; its release for diffusers divides them by the factor once more.
    methods={"auto": lambda config: config, "raw_latents": _told_raw},
    modes={"stability": ImageMode()},
    interleave=lambda config: None,
    hidden_frames=lambda config: 0,
)
