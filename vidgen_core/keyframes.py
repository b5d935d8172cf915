"""Given pictures: which frame of the video they are, how they come to its size, and what they and masks are in latents.

How a network is told of them is its family's matter (``families.KeyframeRules``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import Codec
from .errors import SettingsError
from .types import Grid, VideoShape

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = ("crop", "pad", "stretch")
BUCKET_BASES_PX = {"720p": 960, "540p": 720, "360p": 480}
"""side of the square with as many pixels as a bucket of this name has at most (HunyuanVideo-I2V)"""
MAX_RATIO = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyframe:
    """A picture that a frame of the video must be, or look like."""

    image: Tensor
    """(1 or B, 3, H, W) in [-1, 1], of the video's size"""
    frame: int = 0
    """of the video, from 0; -1 is the last one"""
    strength: float = 1.0
    """1: the frame is this picture; below: it is drawn towards it, by families that can"""
    until: float = 0.0
    """the time at which the picture lets go, for families that release it: 0 never"""
    noise: float = 0.0
    """standard deviation of noise added to the picture first, for families that are told so"""
    mask: Tensor | None = None
    """(1, 1, H, W): 1 where the frame is made new all the same, for networks that fill in; None: nowhere"""

    def index(self, num_frames: int) -> int:
        """The frame counted from 0; SettingsError if the video has no such frame."""
        index = self.frame + num_frames if self.frame < 0 else self.frame
        if not 0 <= index < num_frames:
            raise SettingsError(
                "There is no such frame to give a picture for",
                given=f"frame {self.frame} of {num_frames}",
                expected=f"0 to {num_frames - 1}, or -1 for the last",
            )
        return index


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentKeyframe:
    """A keyframe as the network sees it."""

    latents: Tensor
    """(1 or B, C, 1, h, w) at unit scale; of a whole video (1, C, T, h, w) with its gaps black"""
    index: int
    """frame of the video, from 0"""
    strength: float = 1.0
    until: float = 0.0
    noise: float = 0.0
    mask: Tensor | None = None
    """of a whole video, (1, 1, T, h, w): how far a latent is given"""


def video_keyframes(video: Tensor, mask: Tensor | None = None) -> list[Keyframe]:
    """Every frame of a video as a keyframe, for networks that fill in.

    Args:
        video: (1, 3, T, H, W) in [-1, 1].
        mask: (1 or T, H, W), 1 where the video is made new; None: nowhere.
    """
    masks = [None] * video.shape[2] if mask is None else mask[:, None, None].expand(video.shape[2], -1, -1, -1, -1)
    frames = zip(video.unbind(2), masks, strict=True)
    return [Keyframe(image=image, frame=frame, mask=gaps) for frame, (image, gaps) in enumerate(frames)]


def picture(images: Tensor) -> Tensor:
    """ComfyUI's IMAGE (N, H, W, 3) in [0, 1] -> its first picture (1, 3, H, W) in [-1, 1].

    Raises:
        SettingsError: another rank, no picture at all, an alpha channel, or numbers that are not finite.
    """
    shape = tuple(images.shape)
    if images.ndim != 4 or 0 in shape:
        raise SettingsError("The image cannot be used", given=f"shape {shape}", expected="(1, height, width, 3)")
    if shape[-1] != 3:
        raise SettingsError(
            "The image has another number of colour channels",
            given=f"{shape[-1]} channels" + (" (colours and alpha)" if shape[-1] == 4 else ""),
            expected="3: red, green and blue",
            do="give it without its alpha channel, as Load Image does",
        )
    if not bool(torch.isfinite(images[:1]).all()):
        raise SettingsError("The image has numbers in it that are not finite", expected="numbers from 0 to 1")
    return images[:1].float().clamp(0, 1).permute(0, 3, 1, 2).mul(2.0).sub(1.0)


def fit_images(images: Tensor, height_px: int, width_px: int, fit: Fit = "crop") -> Tensor:
    """(N, C, H, W) with 0 for black brought to a size, smoothly and without aliasing.

    Args:
        fit: "crop" covers the size and cuts what is over on both sides alike; "pad" shows all of the picture between
            black bars; "stretch" changes its proportions.
    """
    if fit not in FITS:
        raise SettingsError(
            "There is no such way to fit an image", given=repr(fit), expected="one of " + ", ".join(FITS)
        )
    for name, value in (("height", height_px), ("width", width_px)):
        if value < 1:
            raise SettingsError(f"The {name} cannot be used", given=f"{value} px", expected="at least 1 px")
    height, width = images.shape[-2:]
    scales = height_px / height, width_px / width
    scale = max(scales) if fit == "crop" else min(scales)
    inner = [height_px, width_px]
    if fit != "stretch":
        # A hair above, so that a side which is meant to come out whole is not cut short by rounding.
        inner = [max(1, int(side * scale + 1e-6)) for side in (height, width)]
        bound = max if fit == "crop" else min
        inner = [bound(side, wanted) for side, wanted in zip(inner, (height_px, width_px), strict=True)]
    if tuple(inner) != (height, width):
        images = F.interpolate(images, size=inner, mode="bilinear", antialias=True, align_corners=False)
    if fit == "crop":
        top, left = (round((have - want) / 2) for have, want in zip(inner, (height_px, width_px), strict=True))
        return images[..., top : top + height_px, left : left + width_px]
    rows, columns = height_px - inner[0], width_px - inner[1]
    if rows or columns:
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        images = F.pad(images, padding)
    return images


# --- sizes ------------------------------------------------------------------------------------------------------------


def bucket_sizes(base_px: int, *, step_px: int = 32, max_ratio: float = MAX_RATIO) -> list[tuple[int, int]]:
    """The (height, width) pairs on which HunyuanVideo-I2V was trained, from tall to wide.

    In steps, a high and b wide: none has more area than the base square. For each a there is the largest such b, and
    every smaller one down to the largest of a + 1.
    """
    area = round((base_px / step_px) ** 2)
    pairs = [(a, b) for a in range(area, 0, -1) for b in range(max(1, area // (a + 1)), area // a + 1)]
    return [(a * step_px, b * step_px) for a, b in pairs if max(a, b) / min(a, b) <= max_ratio]


def bucket_for(height_px: int, width_px: int, name: str) -> tuple[int, int]:
    """The (height, width) of the bucket for a picture: the closest ratio that is not taller for a tall picture, and
    not wider for a wide one, so that nothing but a thin border is cut."""
    if name not in BUCKET_BASES_PX:
        raise SettingsError(
            "There is no such bucket of sizes", given=repr(name), expected="one of " + ", ".join(BUCKET_BASES_PX)
        )
    ratio = height_px / width_px
    # Ratios to five places, as published: it decides between sizes of nearly the same shape.
    ratios = [(round(h / w, 5), (h, w)) for h, w in bucket_sizes(BUCKET_BASES_PX[name])]
    fitting = [(r, size) for r, size in ratios if (r <= ratio if ratio >= 1 else r > ratio)]
    return min(fitting, key=lambda pair: abs(pair[0] - ratio))[1]


# --- into latents -----------------------------------------------------------------------------------------------------


def encode_keyframes(codec: Codec, keyframes: Sequence[Keyframe], shape: VideoShape) -> list[LatentKeyframe]:
    """The keyframes' latents: the posterior's mode, of each picture on its own.

    Raises:
        SettingsError: a picture of another size than the video, or for a frame that the video does not have.
    """
    encoded = []
    for keyframe in keyframes:
        index = keyframe.index(shape.num_frames)
        check_size(keyframe, shape)
        with torch.inference_mode():
            latents = codec.encode(keyframe.image.unsqueeze(2)).float()
        encoded.append(
            LatentKeyframe(
                latents=latents,
                index=index,
                strength=keyframe.strength,
                until=keyframe.until,
                noise=keyframe.noise,
            )
        )
    return encoded


def check_size(keyframe: Keyframe, shape: VideoShape) -> None:
    """Raise SettingsError unless the picture and its mask are as large as the video."""
    size = (shape.height_px, shape.width_px)
    for name, given, channels in (("image", keyframe.image, 3), ("mask", keyframe.mask, 1)):
        if given is not None and (given.ndim != 4 or tuple(given.shape[1:]) != (channels, *size)):
            raise SettingsError(
                f"The {name} is of another size than the video",
                given=f"shape {tuple(given.shape)}",
                expected=f"(1, {channels}, {size[0]}, {size[1]})",
                do="bring it to the size of the video with fit_images",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFrames:
    """Pictures at frames of a video as a sampler keeps them, whatever the network (:func:`guidance.keep`)."""

    latents: Tensor
    """(1, C, T, h, w) at unit scale; 0 where nothing is given"""
    mask: Tensor
    """(1, 1, T, 1, 1) in [0, 1]: how far a latent frame is made new, 1 where nothing is given"""
    until: Tensor
    """(1, 1, T, 1, 1): the time at which the picture lets go; 0 never"""


def kept_frames(codec: Codec, keyframes: Sequence[Keyframe], shape: VideoShape) -> KeptFrames:
    """``keyframes`` in the latents of a video of ``shape``.

    A latent stands for several frames; a picture is given to all of them. Its own latent is that of a still video at
    any moment, because causal codecs begin as if the first frame had always been there.

    Raises:
        SettingsError: two pictures in one latent, a strength or a time that cannot be used, and what
            :func:`encode_keyframes` refuses.
    """
    places = latent_places(keyframes, shape, codec.grid)
    channels, num_latents, rows, columns = shape.latent_shape(codec.grid)
    latents = torch.zeros(1, channels, num_latents, rows, columns)
    mask, until = torch.ones(1, 1, num_latents, 1, 1), torch.zeros(1, 1, num_latents, 1, 1)
    for place, given in zip(places, encode_keyframes(codec, keyframes, shape), strict=True):
        latents[:, :, place] = given.latents[:1, :, 0].cpu()
        mask[:, :, place], until[:, :, place] = 1 - given.strength, given.until
    return KeptFrames(latents=latents, mask=mask, until=until)


def latent_places(keyframes: Sequence[Keyframe], shape: VideoShape, grid: Grid) -> list[int]:
    """Which latent frame each picture is given to; SettingsError where two would share one, and for a strength or a
    time of release that is not in [0, 1]."""
    shared: dict[int, Keyframe] = {}
    for keyframe in keyframes:
        place = _latent_place(keyframe, shape, grid)
        if place in shared:
            frames = f"{shared[place].index(shape.num_frames)} and {keyframe.index(shape.num_frames)}"
            raise SettingsError(
                "Two pictures are given for the same moment of the video",
                given=f"frames {frames}",
                expected=f"frames that are {grid.temporal} or more apart: that many are one latent",
                do=f"move one of them by {grid.temporal} frames",
            )
        shared[place] = keyframe
        for name, value in (("strength", keyframe.strength), ("until", keyframe.until)):
            if not 0 <= value <= 1:
                raise SettingsError(
                    f"The {name} of a keyframe cannot be used", given=value, expected="a number from 0 to 1"
                )
    return list(shared)


def _latent_place(keyframe: Keyframe, shape: VideoShape, grid: Grid) -> int:
    index = keyframe.index(shape.num_frames)
    # The first frame of a causal codec has a latent of its own; those after it come in groups.
    return -(-index // grid.temporal) if grid.causal else index // grid.temporal


def taken_by_network(
    check: Callable[[Sequence[Keyframe]], None], keyframes: Sequence[Keyframe]
) -> tuple[list[Keyframe], list[Keyframe]]:
    """(the pictures that the network itself can be given, as it was trained; the others, which can only be kept).

    Args:
        check: raises SettingsError for pictures that the network does not take together.
    """
    taken: list[Keyframe] = []
    others: list[Keyframe] = []
    for keyframe in keyframes:
        try:
            check([*taken, keyframe])
        except SettingsError:
            others.append(keyframe)
        else:
            taken.append(keyframe)
    return taken, others


def mask_to_latents(mask: Tensor, grid: Grid, shape: Sequence[int]) -> Tensor:
    """A mask of pixels as one of latents: a latent is made new as far as any of its pixels is.

    Args:
        mask: (H, W), (T, H, W), (T, 1, H, W) or (B, 1, T, H, W) in [0, 1], 1 where the video is made new; T is 1, the
            frames of the video or those of the latents, H and W are in pixels or in latents.
        shape: (B, C, T, H, W) of the latents.

    Returns:
        (1 or B, 1, T, H, W) float32 on the CPU.

    Raises:
        SettingsError: a mask of another size or length, or with numbers that are not finite.
    """
    given = tuple(mask.shape)
    mask = mask.detach().float().cpu()
    if mask.ndim in (2, 3):
        mask = mask.reshape(1, 1, -1, *given[-2:])
    elif mask.ndim == 4 and given[1] == 1:
        mask = mask.transpose(0, 1).unsqueeze(0)
    batch, _, num_frames, height, width = shape
    frames = grid.num_frames(num_frames)
    sizes = (height, width), (height * grid.spatial, width * grid.spatial)
    fits = mask.ndim == 5 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    if not fits or mask.shape[2] not in (1, num_frames, frames) or tuple(mask.shape[3:]) not in sizes:
        raise SettingsError(
            "The mask is of another size than the video",
            given=f"shape {given}",
            expected=f"{sizes[1][1]} x {sizes[1][0]} px, and 1 or {frames} frames",
            do="resize the mask to the video that was encoded",
        )
    if not bool(torch.isfinite(mask).all()):
        raise SettingsError("The mask has numbers in it that are not finite", expected="numbers from 0 to 1")
    mask = mask.clamp(0, 1)
    if tuple(mask.shape[3:]) == sizes[1]:
        mask = F.max_pool3d(mask, (1, grid.spatial, grid.spatial))
    if mask.shape[2] == 1:
        return mask.expand(-1, -1, num_frames, -1, -1)
    if mask.shape[2] == num_frames:
        return mask
    # Frames of one latent lie together; the first one of a causal codec has a latent of its own.
    lead = frames - num_frames * grid.temporal
    mask = torch.cat([mask[:, :, :1].expand(-1, -1, max(0, -lead), -1, -1), mask], dim=2)
    return F.max_pool3d(mask, (grid.temporal, 1, 1))


def repeat_over_frames(latents: Tensor, shape: Sequence[int]) -> Tensor:
    """(1 or B, C, 1, h, w) -> (B, C, T, h, w): the picture as a still video; of a video its first frame."""
    return latents[:, :, :1].expand(shape[0], -1, shape[2], -1, -1)


# --- what networks refuse that go on from a first frame ------------------------------------------------------------


def check_first_frame(
    title: str, keyframes: Sequence[Keyframe | LatentKeyframe], num_frames: int, *, do: str | None = None
) -> None:
    """Raise SettingsError unless there is one picture, at frame 0 and held as it is; ``do`` is told where it is not."""
    frames = [k.index if isinstance(k, LatentKeyframe) else k.index(num_frames) for k in keyframes]
    if frames != [0]:
        raise SettingsError(
            f"{title} takes no image but that of the first frame",
            given="images for frames " + ", ".join(map(str, frames)),
            expected="one image, for frame 0",
            do="leave the others out",
        )
    given = keyframes[0]
    if given.mask is not None:
        raise SettingsError(
            f"{title} takes its first frame whole", given="a picture with a mask", do="leave the mask out"
        )
    if (given.strength, given.until, given.noise) != (1.0, 0.0, 0.0):
        raise SettingsError(
            f"{title} takes its first frame exactly as it is",
            given=f"strength {given.strength}, until {given.until}, noise {given.noise}",
            expected="strength 1, until 0, noise 0",
            do=do,
        )


def needs_a_picture() -> SettingsError:
    """For a network that was trained to go on from an image."""
    return SettingsError(
        "This network goes on from an image and was given none",
        expected="the image of the first frame",
        do="add one with Image to Video, or load a text-to-video checkpoint",
    )


def check_prepared_size(given: Tensor, shape: Sequence[int]) -> None:
    """Raise SettingsError unless ``given`` (B or 1, C, T, H, W) has the rows and columns of latents of ``shape``."""
    if tuple(given.shape[3:]) != tuple(shape[3:]) or given.shape[0] not in (1, shape[0]):
        raise SettingsError(
            "The image was prepared for a video of another size",
            given=f"{given.shape[4]} x {given.shape[3]} latents, {given.shape[0]} images",
            expected=f"{shape[4]} x {shape[3]} latents, 1 or {shape[0]} images",
            do="take the latent of the same Image to Video node",
        )


def check_prepared(given: Tensor, num_frames: int, shape: Sequence[int]) -> None:
    """:func:`check_prepared_size`, and that ``given`` has this many latent frames."""
    if given.shape[2] != num_frames:
        raise SettingsError(
            "The image was prepared for a video of another length",
            given=f"{given.shape[2]} latent frames",
            expected=f"{num_frames} latent frames",
            do="take the latent of the same Image to Video node",
        )
    check_prepared_size(given, shape)
