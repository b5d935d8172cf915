"""Pictures as CLIP reads them: the short side resized, a square cut out of the middle, CLIP's mean and deviation.

The steps, their order and the rounding to bytes between them are those of ``CLIPImageProcessor`` of ``transformers``,
whose own class needs torchvision.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import SettingsError

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(images: Tensor, size_px: int) -> Tensor:
    """What CLIP's image encoder reads.

    Args:
        images: (N, H, W, 3) in [0, 1], or one picture (H, W, 3). Values outside are clamped.
        size_px: side of the square.

    Returns:
        (N, 3, size_px, size_px) float32 on the CPU.

    Raises:
        SettingsError: another shape, an alpha channel, no pixels, or values that are not finite.
    """
    check_images(images)
    rows = images[None] if images.ndim == 3 else images
    bytes_ = (rows.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8)
    squares = np.stack([_square(Image.fromarray(row.numpy()), size_px) for row in bytes_])
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def check_images(images: Tensor) -> None:
    """Raise SettingsError unless this is a picture or a batch of them: (H, W, 3) or (N, H, W, 3)."""
    given = f"shape {tuple(images.shape)}"
    expected = "(N, height, width, 3): pictures with red, green and blue"
    if images.ndim in (3, 4) and images.shape[-1] == 4:
        raise SettingsError(
            "The picture has an alpha channel", given=given, expected=expected, do="remove the alpha channel first"
        )
    if images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise SettingsError(
            "This is not a picture", given=given, expected=expected, do="connect an IMAGE, e.g. of Load Image"
        )
    if 0 in images.shape:
        raise SettingsError("The picture is empty", given=given, expected=expected, do="use another picture")
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise SettingsError(
            "The picture has values that are not finite", given=given, expected="values from 0 to 1",
            do="use another picture",
        )  # fmt: skip


def _square(image: Image.Image, size_px: int) -> np.ndarray:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = int(size_px * long / short)  # rounded down, as the library does
    size = (size_px, scaled) if width <= height else (scaled, size_px)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - size_px) // 2, (size[1] - size_px) // 2
    return np.asarray(image.crop((left, top, left + size_px, top + size_px)))
