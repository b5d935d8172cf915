"""Contact sheets: a few frames of several clips in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..vidgen_core.weights.save import atomic_path


def contact_sheet(path: Path, videos: Sequence[Tensor], *, num_frames: int = 5, scale: int = 2) -> None:
    """Write one row per video with ``num_frames`` frames spread evenly over it.

    Args:
        videos: (3, T, H, W) each, in [-1, 1]; T may differ.
        scale: each pixel becomes so many pixels a side.
    """
    from PIL import Image

    rows = [_strip(video, num_frames) for video in videos]
    pixels = torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def to_pixels(video: Tensor) -> np.ndarray:
    """A video (3, T, H, W) in [-1, 1] as uint8, the form that the detectors read."""
    return ((video.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().cpu().numpy()


def _strip(video: Tensor, num_frames: int) -> Tensor:
    """(3, T, H, W) -> uint8 (3, H + 2, num_frames * (W + 2)) with a dark edge around each frame."""
    times = torch.linspace(0, video.shape[1] - 1, num_frames).round().long()
    frames = ((video[:, times].detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    framed = torch.nn.functional.pad(frames, (1, 1, 1, 1))
    return torch.cat(list(framed.unbind(1)), dim=2)
