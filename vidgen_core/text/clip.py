"""CLIP's text tower as one vector per prompt: the normalised state at the end-of-text token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .library import importing

if TYPE_CHECKING:
    from .dims import ClipDims


class ClipText(nn.Module):
    """CLIP's text transformer without its projection.

    Parameter names are those of the published files (``text_model.embeddings.token_embedding.weight``, ...)
    with every version of ``transformers``: from version 5 on the library leaves the first part out.
    """

    def __init__(self, dims: ClipDims) -> None:
        super().__init__()
        with importing:
            from transformers import CLIPTextConfig, CLIPTextModel

        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=dims.vocab_size,
                hidden_size=dims.hidden_size,
                intermediate_size=dims.intermediate_size,
                num_hidden_layers=dims.num_layers,
                num_attention_heads=dims.num_heads,
                max_position_embeddings=dims.max_length,
                hidden_act=dims.activation,
                bos_token_id=None,
                eos_token_id=dims.eos_token_id,
                pad_token_id=dims.eos_token_id,
            )
        )
        self.text_model = getattr(model, "text_model", model)
        self.eos_token_id = dims.eos_token_id
        # Positions are passed to every call: a buffer of them would stay behind on the meta device.
        self.text_model.embeddings.register_buffer("position_ids", None, persistent=False)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        """``ids`` (B, L) int64, each row holding an end-of-text token -> (B, P).

        Whatever follows the first end-of-text token does not matter: attention is causal.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        states = self.text_model(input_ids=ids, position_ids=positions).last_hidden_state
        end = (ids == self.eos_token_id).int().argmax(dim=-1)
        return states[torch.arange(ids.shape[0], device=ids.device), end]
