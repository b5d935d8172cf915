"""Small previews while sampling: latents straight to RGB by one 3 x C matrix, no decoder involved."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec
from .errors import CheckpointError

METADATA_KEY = "vidgen.preview"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRGB:
    """``rgb = latents @ weight + bias`` in [-1, 1], for each latent alone."""

    weight: tuple[tuple[float, float, float], ...]
    """one row per latent channel"""
    bias: tuple[float, float, float]

    def frames(self, latents: Tensor) -> Tensor:
        """The first sample of (B, C, T, H, W) -> (T, H, W, 3) uint8 on the CPU."""
        pixels = latents[0].detach().to("cpu", torch.float32).permute(1, 2, 3, 0)
        rgb = pixels @ torch.tensor(self.weight) + torch.tensor(self.bias)
        return ((rgb.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def to_json(self) -> str:
        return json.dumps({"weight": self.weight, "bias": self.bias})

    @classmethod
    def from_json(cls, text: str) -> LatentRGB:
        """From a network's metadata. Raises CheckpointError when it is not such a matrix."""
        try:
            values = json.loads(text)
            weight = torch.tensor(values["weight"], dtype=torch.float32)
            bias = torch.tensor(values["bias"], dtype=torch.float32)
            if weight.ndim != 2 or weight.shape[1] != 3 or bias.shape != (3,):
                raise ValueError(f"shapes {tuple(weight.shape)} and {tuple(bias.shape)}")
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"The preview matrix in the metadata cannot be read ({error})") from error
        return _of(weight, bias)


def _of(weight: Tensor, bias: Tensor) -> LatentRGB:
    rows = tuple((float(r), float(g), float(b)) for r, g, b in weight.tolist())
    red, green, blue = bias.tolist()
    return LatentRGB(weight=rows, bias=(red, green, blue))


@torch.no_grad()
def fit_preview(codec: Codec, *, cells: int = 8, num_images: int = 4, ridge: float = 1e-3) -> LatentRGB:
    """Least squares from the latents of coloured patchwork images to the images' own mean colours.

    Args:
        cells: patches along each side; a patch is two latents wide, so that half the latents see one colour only.
    """
    side = cells * 2
    colours = torch.rand((num_images, 3, cells, cells), generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = colours.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    step = codec.grid.spatial
    image = small.repeat_interleave(step, dim=2).repeat_interleave(step, dim=3).unsqueeze(2)
    latents = codec.encode(image).to("cpu", torch.float64)
    rows = latents.permute(0, 2, 3, 4, 1).reshape(num_images * side * side, -1)
    targets = small.permute(0, 2, 3, 1).reshape(-1, 3).double()
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    gram = rows.T @ rows
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram, rows.T @ targets).float()
    return _of(solution[:-1], solution[-1])
