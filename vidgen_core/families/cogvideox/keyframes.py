"""How CogVideoX takes a given first frame: on the channels, its latents at latent frame 0 and zeros elsewhere.

Version 1.5 reads two latent frames as one token. A video has an odd number of them, so one more runs along in front,
in training a copy of the first. The picture belongs to that one; it is dropped before decoding. Sources: the CogVideo
repository (``sat/diffusion_video.py``) and its release for diffusers.

CogVideoX-Fun-InP takes any frames and any parts of them, or nothing: the latents of the video with black gaps, and
before them a mask of what is given. Its 1.5 was trained on even numbers of latent frames that begin with the video, so
the one more runs along behind. Source: github.com/aigc-apps/VideoX-Fun (``pipeline_cogvideox_fun_inpaint.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...codec import Codec
from ...errors import SettingsError
from ...keyframes import (
    Keyframe,
    LatentKeyframe,
    check_first_frame,
    check_prepared,
    check_prepared_size,
    check_size,
    encode_keyframes,
    needs_a_picture,
)
from ...noise import NoiseStream
from ...types import Conditioning, VideoShape
from .. import ImageMode, KeyframeRules
from .config import FUN_NOISE, RAW_LATENTS, NetworkConfig

FRAMES_PER_LATENT = 4
BLACK = -1.0
"""what stands in the gaps of a video"""


def lead_frames(config: NetworkConfig, num_frames: int) -> int:
    """How many latent frames run along in front of ``num_frames``, so that they can be cut into patches."""
    return 0 if config.fills_in else -num_frames % config.patch[0]


def trail_frames(config: NetworkConfig, num_frames: int) -> int:
    """How many run along behind them."""
    return -num_frames % config.patch[0] if config.fills_in else 0


def check(config: NetworkConfig, keyframes: Sequence[Keyframe | LatentKeyframe], num_frames: int) -> None:
    """Raise SettingsError unless this network takes these pictures for a video of this length."""
    _check_length(config, num_frames)
    if config.fills_in:
        _check_given(keyframes, num_frames)
        return
    if not keyframes:
        if config.takes_image:
            raise needs_a_picture()
        return
    if not config.takes_image:
        raise SettingsError(
            "This network makes videos from text alone",
            given="an image for the first frame",
            expected="an image-to-video checkpoint (CogVideoX-5B-I2V, CogVideoX1.5-5B-I2V, CogVideoX-Fun-InP)",
            do="load one, or leave the image out",
        )
    check_first_frame("CogVideoX", keyframes, num_frames)


def _check_given(keyframes: Sequence[Keyframe | LatentKeyframe], num_frames: int) -> None:
    frames = [k.index if isinstance(k, LatentKeyframe) else k.index(num_frames) for k in keyframes]
    if len(set(frames)) < len(frames):
        raise SettingsError(
            "Two pictures are given for the same frame", given="images for frames " + ", ".join(map(str, frames))
        )
    for keyframe in keyframes:
        if (keyframe.strength, keyframe.until) != (1.0, 0.0):
            raise SettingsError(
                "CogVideoX-Fun takes its pictures exactly as they are",
                given=f"strength {keyframe.strength}, until {keyframe.until}",
                expected="strength 1, until 0",
            )


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
    is_fixed = config.positions == "learned" or (config.positions == "sincos" and config.sincos_fit == "stretch")
    if is_fixed and latent_frames > longest:
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
    if config.fills_in:
        return replace(cond, concat=_with_mask(config, keyframes, shape))
    picture = keyframes[0].latents
    check_prepared_size(picture, shape)
    rest = shape[2] + lead_frames(config, shape[2]) - 1
    nothing = picture.new_zeros(*picture.shape[:2], rest, *picture.shape[3:])
    return replace(cond, concat=torch.cat([picture * config.image_scale, nothing], dim=2))


def _with_mask(config: NetworkConfig, keyframes: Sequence[LatentKeyframe], shape: Sequence[int]) -> Tensor:
    """(1 or B, 1 + C, T, h, w): the mask and the latents of the one video that ``keyframes`` hold."""
    video, mask = keyframes[0].latents, keyframes[0].mask
    if len(keyframes) > 1 or mask is None:
        raise SettingsError(
            "This network is told its pictures as one video with gaps",
            given=f"the latents of {len(keyframes)} pictures",
            expected="the latents of the whole video, and its mask",
            do="encode the pictures with the encode of this family's keyframes",
        )
    check_prepared(video, shape[2] + trail_frames(config, shape[2]), shape)
    mask = mask.to(video).expand(len(video), -1, -1, -1, -1)
    return torch.cat([mask * config.mask_scale, video], dim=1)


def encode(
    config: NetworkConfig, codec: Codec, keyframes: Sequence[Keyframe], shape: VideoShape
) -> list[LatentKeyframe]:
    """The pictures' latents; for networks that fill in, those of the one video that shows them between black gaps.

    Raises:
        SettingsError: a picture or a mask of another size than the video.
    """
    if not config.fills_in or not keyframes:
        return encode_keyframes(codec, keyframes, shape)
    video, gaps = _video_with_gaps(config, keyframes, shape)
    if bool(gaps.all()):  # the network was trained on nothing at all, not on a black video
        return []
    num_frames = codec.grid.num_latent_frames(shape.num_frames)
    spare = trail_frames(config, num_frames)
    if spare:  # the video goes on as a still one
        video, gaps = (_held(part, codec.grid.step) for part in (video, gaps))
    with torch.inference_mode():
        latents = codec.encode(video)[:, :, : num_frames + spare].float()
    given = mask_in_latents(1 - gaps[:, :, : FRAMES_PER_LATENT * (num_frames + spare - 1) + 1], latents.shape)
    return [LatentKeyframe(latents=latents, index=0, mask=given)]


def _video_with_gaps(config: NetworkConfig, keyframes: Sequence[Keyframe], shape: VideoShape) -> tuple[Tensor, Tensor]:
    """(the video (1 or B, 3, T, H, W) that shows the pictures, black elsewhere, with noise where the network was
    trained so; 1 (1, 1, T, H, W) in the gaps, 0 elsewhere)."""
    size, batch = (shape.num_frames, shape.height_px, shape.width_px), max(len(k.image) for k in keyframes)
    video, gaps, noise = torch.full((batch, 3, *size), BLACK), torch.ones(1, 1, *size), NoiseStream([0])
    for keyframe in keyframes:
        check_size(keyframe, shape)
        frame, image = keyframe.index(shape.num_frames), keyframe.image.float().cpu()
        gap = torch.zeros(1, 1, *size[1:]) if keyframe.mask is None else (keyframe.mask[:1].cpu() >= 0.5).float()
        video[:, :, frame], gaps[:, :, frame] = torch.where(gap.bool(), BLACK, image), gap
        spread = keyframe.noise or config.image_noise
        if spread:
            grain = spread * noise.draw(image.shape[1:])
            video[:, :, frame] += torch.where(video[:, :, frame] == BLACK, 0.0, grain)
    return video, gaps


def _held(video: Tensor, num_frames: int) -> Tensor:
    """(1, C, T, H, W) with its last frame ``num_frames`` more times."""
    return torch.cat([video, video[:, :, -1:].expand(-1, -1, num_frames, -1, -1)], dim=2)


def mask_in_latents(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask (1, 1, T, H, W) of pixels at the places of latents (B, C, T', h, w): the first frame on its own, the
    others as one volume, linear between the nearest and so without the means of all that a latent stands for. What is
    given at the last frame alone is not seen in it; the network was trained so."""
    frames, rows, columns = shape[2:]
    first = F.interpolate(mask[:, :, :1], size=(1, rows, columns), mode="trilinear", align_corners=False)
    if frames == 1:
        return first
    rest = F.interpolate(mask[:, :, 1:], size=(frames - 1, rows, columns), mode="trilinear", align_corners=False)
    return torch.cat([first, rest], dim=2)


def check_conditioning(config: NetworkConfig, cond: Conditioning, shape: Sequence[int]) -> None:
    """Raise SettingsError where the picture is missing, or does not fit latents of ``shape``."""
    _check_length(config, FRAMES_PER_LATENT * (shape[2] - 1) + 1)
    if not config.takes_image or (config.fills_in and cond.concat is None):
        return
    if cond.concat is None:
        raise needs_a_picture()
    spare = lead_frames(config, shape[2]) + trail_frames(config, shape[2])
    check_prepared(cond.concat, shape[2] + spare, shape)


def _told_noisy(config: NetworkConfig) -> NetworkConfig:
    if not config.fills_in:
        raise SettingsError(
            "This network takes its image as it is",
            given='method "noisy"',
            expected='method "auto"; only CogVideoX-Fun-InP was trained on noisy images, from its version 1.1 on',
        )
    return replace(config, image_noise=FUN_NOISE)


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
    # Fun's 5B of 1.1 looks as that of 1.0 does, which was trained on clean images; only its config.json says it.
    methods={"auto": lambda config: config, "raw_latents": _told_raw, "noisy": _told_noisy},
    modes={"stability": ImageMode()},
    interleave=lambda config: None,
    hidden_frames=lambda config: 0,
    encode=encode,
    fills_in=lambda config: config.fills_in,
)
