"""How HunyuanVideo takes a given first frame: its latent replaces the first one, or is stacked onto the channels.

Source: https://github.com/Tencent-Hunyuan/HunyuanVideo-I2V; v1 stacks ("latent_concat"), v2 replaces
("token_replace"). Both were trained with the first frame alone.
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
from ...types import Conditioning, Held
from .. import ImageMode, KeyframeRules
from .config import NetworkConfig

CONCAT_HIDDEN_FRAMES = 4
"""the first latent but one repeats the picture: v1's videos begin after it (129 frames are shown as 125)"""


def check(config: NetworkConfig, keyframes: Sequence[Keyframe | LatentKeyframe], num_frames: int) -> None:
    """Raise SettingsError unless this network takes these pictures."""
    if not keyframes:
        if config.image_condition != "none":
            raise needs_a_picture()
        return
    if config.image_condition == "none" and not config.accepts_first_frame:
        raise SettingsError(
            "This network makes videos from text alone",
            given="an image for the first frame",
            expected="an image-to-video checkpoint",
            do="load one, or leave the image out; if this file is HunyuanVideo-I2V v2, which does not say so itself, "
            'set method to "token_replace"',
        )
    check_first_frame("HunyuanVideo", keyframes, num_frames, do='for more motion use the mode "dynamic"')
    if num_frames < 5:
        raise SettingsError(
            "The video is too short to go on from its first frame",
            given=f"{num_frames} frames",
            expected="5 frames or more (5, 9, 13, 17, ...)",
            do="use 17 frames, or leave the image out to make a picture from text",
        )


def condition(
    config: NetworkConfig, cond: Conditioning, keyframes: Sequence[LatentKeyframe], shape: Sequence[int]
) -> Conditioning:
    """``cond`` with the first frame ``keyframes[0]`` for latents of ``shape`` (B, C, T, H, W)."""
    check(config, keyframes, 4 * (shape[2] - 1) + 1)
    if not keyframes:
        return cond
    picture = keyframes[0].latents
    check_prepared_size(picture, shape)
    first = picture.new_zeros(len(picture), 1, shape[2], 1, 1)
    first[:, :, 0] = 1
    still = picture.expand(-1, -1, shape[2], -1, -1)
    if config.image_condition == "latent_concat":
        mask = first.expand(-1, -1, -1, *shape[3:])
        return replace(cond, concat=torch.cat([still * first, mask], dim=1))
    return replace(cond, held=Held(latents=still, mask=first.bool()))


def check_conditioning(config: NetworkConfig, cond: Conditioning, shape: Sequence[int]) -> None:
    """Raise SettingsError where the picture is missing, or does not fit latents of ``shape``."""
    stacked, held = cond.concat, cond.held
    missing = {"latent_concat": stacked is None, "token_replace": held is None, "none": False}
    if missing[config.image_condition]:
        raise needs_a_picture()
    for given in (stacked, None if held is None else held.latents):
        if given is not None:
            check_prepared(given, shape[2], shape)


def _told_to_replace(config: NetworkConfig) -> NetworkConfig:
    """A published v2 file is in every name and shape a text-to-video file; only the user can tell."""
    if config.image_condition == "latent_concat":
        raise SettingsError(
            "This network is given its image in channels of its own",
            given='method "token_replace"',
            expected='method "auto"',
        )
    return replace(config, accepts_first_frame=True)


def interleave(config: NetworkConfig) -> int | None:
    """As published: 2 for v1, 4 for v2. Networks that know no first frame were trained on prompts alone."""
    if config.image_condition == "latent_concat":
        return 2
    return 4 if config.image_condition == "token_replace" or config.accepts_first_frame else None


RULES = KeyframeRules(
    check=check,
    condition=condition,
    check_conditioning=check_conditioning,
    methods={"auto": lambda config: config, "token_replace": _told_to_replace},
    # The published sampler's two settings: motion close to the picture, or more of it.
    modes={"stability": ImageMode(start_share=0.001), "dynamic": ImageMode(shift=17.0)},
    interleave=interleave,
    hidden_frames=lambda config: CONCAT_HIDDEN_FRAMES if config.image_condition == "latent_concat" else 0,
)
