"""LLaVA's eyes: CLIP's image encoder and the projector that turns its states into tokens for LLaMA.

Only what the states need is built: the layers after the state that is taken, and the norm of the pooled vector, are
not loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .library import importing

if TYPE_CHECKING:
    from .dims import VisionDims


class PatchEmbeddings(nn.Module):
    """Patches and a class token with learned positions.

    It stands in for the module of ``transformers``, whose buffer of positions would stay behind on the meta device.
    """

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(dims.hidden_size))
        self.patch_embedding = nn.Conv2d(3, dims.hidden_size, dims.patch_size, stride=dims.patch_size, bias=False)
        self.position_embedding = nn.Embedding(dims.num_tokens + 1, dims.hidden_size)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + patches, D). The second argument is the library's and always false here."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class Projector(nn.Module):
    """Two layers with an exact GELU between them: the width of the image encoder to that of LLaMA."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dims.hidden_size, dims.out_size)
        self.linear_2 = nn.Linear(dims.out_size, dims.out_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class LlavaVision(nn.Module):
    """Pictures to LLaMA tokens. Parameter names are those of ComfyUI's file (``vision_model``,
    ``multi_modal_projector``) with every version of ``transformers``."""

    def __init__(self, dims: VisionDims) -> None:
        super().__init__()
        with importing:
            from transformers import CLIPVisionConfig, CLIPVisionModel

        model = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=dims.hidden_size,
                intermediate_size=dims.intermediate_size,
                num_hidden_layers=dims.num_layers - dims.skip_layers,
                num_attention_heads=dims.num_heads,
                image_size=dims.image_size,
                patch_size=dims.patch_size,
                hidden_act=dims.activation,
            )
        )
        self.dims = dims
        self.vision_model = getattr(model, "vision_model", model)
        self.vision_model.set_submodule("embeddings", PatchEmbeddings(dims))
        self.vision_model.set_submodule("post_layernorm", nn.Identity())
        self.multi_modal_projector = Projector(dims)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), as ``image.clip_pixels`` makes them -> (B, patches, out_size)."""
        states = self.vision_model(pixel_values=pixels).last_hidden_state
        return self.multi_modal_projector(states[:, 1:])
