"""A perceptual distance from a user's VGG16: how far apart two pictures are in the features of a classifier.

Like LPIPS (Zhang et al. 2018, arXiv 1801.03924) without its learned weights: the features after five of the
rectifiers are brought to length 1 at every pixel, and the squared distance is averaged over pixels.

The network comes from a file with the names of torchvision's VGG16: ``features.0.weight``, ...
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vidgen_core.errors import CheckpointError
from ..vidgen_core.weights.header import Header, read_header
from ..vidgen_core.weights.load import read_tensors

# VGG16 (Simonyan and Zisserman 2014, configuration D) as a list of layers: convolutions, each followed by a rectifier,
# and poolings between the five stages. The numbers are the layers' places in that list.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""of ImageNet's pictures in [0, 1], which the published weights expect to be taken out"""


class PerceptualDistance(nn.Module):
    """Distance of two videos frame by frame; frozen.

    Args:
        path: a checkpoint file; what it holds besides ``features.N.weight`` and ``features.N.bias`` is ignored.

    Raises:
        FileError: the file is not there or cannot be read.
        CheckpointError: it is no checkpoint, or lacks a layer, or one has a shape that cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        header = read_header(path)
        check(header)
        tensors = read_tensors(header)
        self.convs = nn.ModuleDict()
        for index in (index for stage in STAGES for index in stage):
            weight = tensors[f"features.{index}.weight"].float()
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            conv.load_state_dict({"weight": weight, "bias": tensors[f"features.{index}.bias"].float()})
            self.convs[str(index)] = conv
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, frames: Tensor) -> list[Tensor]:
        """(N, 3, H, W) in [-1, 1] -> the last features of each stage; frames too small for a stage end before it."""
        x = ((frames + 1) / 2 - self.mean) / self.std
        found = []
        for number, stage in enumerate(STAGES):
            if number:
                if min(x.shape[-2:]) < 2:
                    break
                x = F.max_pool2d(x, 2)
            for index in stage:
                x = F.relu(self.convs[str(index)](x))
            found.append(x)
        return found

    def forward(self, decoded: Tensor, video: Tensor) -> Tensor:
        """0-dim; both are (B, 3, T, H, W). Gradients reach ``decoded`` only."""
        with torch.no_grad():
            wanted = self.features(_frames(video))
        total = decoded.new_zeros((), dtype=torch.float32)
        for x, y in zip(self.features(_frames(decoded)), wanted, strict=True):
            total = total + (_unit(x) - _unit(y)).square().sum(dim=1).mean()
        return total


def _frames(video: Tensor) -> Tensor:
    return video.transpose(1, 2).flatten(0, 1)


def _unit(features: Tensor) -> Tensor:
    """Length 1 over the channels; where nothing fires, nearly 0 with a gradient that stays finite."""
    features = features.float()
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()


def check(header: Header) -> None:
    """Every convolution is there with 3 x 3 kernels, and each takes what the one before it gives.

    Widths may differ from the published 64 to 512: they are read from the file.
    """
    shapes = header.shapes
    indices = [index for stage in STAGES for index in stage]
    wanted = [f"features.{index}.{kind}" for index in indices for kind in ("weight", "bias")]
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise CheckpointError(
            f"The perceptual network lacks {len(missing)} of {len(wanted)} weights",
            given=f"{header.path} without {missing[0]!r}",
            expected="VGG16's features under torchvision's names",
            do="save the state dict of torchvision's vgg16 as safetensors",
        )
    weights = [shapes[f"features.{index}.weight"] for index in indices]
    inputs = [3, *(shape[0] if shape else 0 for shape in weights)]
    for index, shape, width in zip(indices, weights, inputs, strict=False):
        bias = shapes[f"features.{index}.bias"]
        if len(shape) != 4 or shape[1:] != (width, 3, 3) or bias != shape[:1]:
            raise CheckpointError(
                f"The layer 'features.{index}' of the perceptual network has a shape that cannot be",
                given=f"weight {shape}, bias {bias} in {header.path}",
                expected=f"weight (channels, {width}, 3, 3), bias (channels,)",
            )
