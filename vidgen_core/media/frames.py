"""Tensors to frames and back, and pictures from files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import FileError, SettingsError, UserError
from ..types import Grid

log = logging.getLogger("vidgen")

if TYPE_CHECKING:
    import numpy as np
    from PIL.ImageFile import ImageFile

MAX_IMAGE_PX = 8192**2
"""of a picture: 1 GB as numbers"""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


def video_to_images(video: Tensor) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> ComfyUI's IMAGE: (B * T, H, W, 3) float32 in [0, 1], on the CPU."""
    images = video.detach().to("cpu", torch.float32).permute(0, 2, 3, 4, 1).flatten(0, 1)
    return images.add(1.0).div_(2.0).clamp_(0.0, 1.0)


def images_to_video(images: Tensor) -> Tensor:
    """ComfyUI's IMAGE (T, H, W, 3 or more) in [0, 1] -> (1, 3, T, H, W) in [-1, 1]; an alpha channel is dropped."""
    if images.ndim != 4 or images.shape[-1] < 3:
        raise SettingsError(
            "The images cannot be used as a video",
            given=f"shape {tuple(images.shape)}",
            expected="(frames, height, width, 3)",
        )
    return images[..., :3].permute(3, 0, 1, 2).unsqueeze(0).mul(2.0).sub(1.0)


def images_to_frames(images: Iterable[Tensor], bits: int = 8) -> Iterator[np.ndarray]:
    """Pictures (H, W, 3) in [0, 1], an IMAGE or a generator of them -> frames (H, W, 3), one at a time so that long
    videos need no copy: uint8, or uint16 where ``bits`` is 16."""
    import numpy as np

    for image in images:
        pixels = image[..., :3].float()
        if bits == 8:
            yield pixels.mul(255.0).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
        else:
            yield pixels.mul(65535.0).round().clamp(0, 65535).cpu().numpy().astype(np.uint16)


def frames_to_images(frames: np.ndarray) -> Tensor:
    """uint8 or uint16 frames (T, H, W, 3) -> IMAGE, float32 in [0, 1]."""
    if frames.dtype.itemsize == 1:
        return torch.tensor(frames, dtype=torch.float32).div_(255.0)
    return torch.from_numpy(frames.astype("float32")).div_(65535.0)


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[ImageFile]:
    """A picture file by Pillow, whose pixels are not read yet. Errors while they are read are told here, too.

    Raises:
        FileError: it cannot be read, is damaged, is no picture, or is larger than :data:`MAX_IMAGE_PX`.
    """
    from PIL import Image

    try:
        # Named kinds only: for some others Pillow would start a program.
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            # Before a pixel is read: a few bytes can stand for gigabytes.
            if file.width * file.height > MAX_IMAGE_PX:
                raise FileError(
                    "The image is too large",
                    given=f"{Path(path).name} of {file.width} x {file.height} px",
                    expected=f"at most {MAX_IMAGE_PX // 10**6} million px",
                    do="make it smaller first",
                )
            yield file
    except UserError:
        raise
    # SyntaxError is what Pillow raises for some damaged PNGs.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(
            "The image cannot be read", given=path, expected="a PNG, JPEG, WebP or BMP file", do=f"check it ({error})"
        ) from error


def read_image(path: str | os.PathLike[str]) -> tuple[Tensor, Tensor]:
    """A picture file, upright: (IMAGE (1, H, W, 3) in [0, 1], MASK (1, H, W), 1 where it is transparent).

    Raises:
        FileError: it cannot be read, is damaged, or is no picture.
    """
    import numpy as np
    from PIL import ImageOps

    with open_image(path) as file:
        pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGBA"), dtype=np.float32) / 255
    rgba = torch.from_numpy(pixels)[None]
    return rgba[..., :3].contiguous(), 1 - rgba[..., 3]


def crop_to_grid(images: Tensor, grid: Grid, *, multiple_px: int) -> Tensor:
    """The middle of the frames with sides that are multiples of ``multiple_px``, without the last frames that the
    codec cannot take. What is cut off is logged; too small a video is a SettingsError."""
    num_frames, height, width = images.shape[:3]
    latents = grid.num_latent_frames(num_frames)
    kept_frames = grid.num_frames(latents - (latents - grid.causal) % grid.group)
    kept_height, kept_width = height // multiple_px * multiple_px, width // multiple_px * multiple_px
    if 0 in (kept_frames, kept_height, kept_width):
        raise SettingsError(
            "The video is too small to encode",
            given=f"{num_frames} frames of {width} x {height} px",
            expected=f"at least {grid.num_frames(1)} frames of {multiple_px} x {multiple_px} px",
        )
    if (kept_frames, kept_height, kept_width) != (num_frames, height, width):
        log.warning(
            "cropped %d frames of %d x %d px to %d frames of %d x %d px, which the VAE can encode",
            *(num_frames, width, height, kept_frames, kept_width, kept_height),
        )
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return images[:kept_frames, top : top + kept_height, left : left + kept_width]
