"""LLaMA as a text encoder: a ``transformers`` decoder cut off before its last layers.

Only what the states need is built: the embedding and the first ``num_layers - skip_layers`` blocks.
The blocks after them, the final norm and the language-model head of a published file are not loaded,
which saves about 1.9 GB of fp16 weights at LLaMA-3-8B's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .library import importing

if TYPE_CHECKING:
    from collections.abc import Callable

    from .dims import LlamaDims


class Rotary(nn.Module):
    """Cosines and sines of LLaMA's half-split rotary embedding, from nothing but the head width.

    It stands in for the module of ``transformers``, which keeps its frequencies in a buffer: a buffer is
    lost when a model is built on the meta device and rounded when the model is cast to half precision.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """``position_ids`` (B, L) -> cos, sin (B, L, head_dim) in the dtype of ``x``."""
        exponent = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float32) / self.head_dim
        angles = position_ids[..., None].to(torch.float32) * (1.0 / self.theta**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def build_llama(dims: LlamaDims) -> nn.Module:
    """A ``transformers.LlamaModel`` with random weights on the current default device (meta works too).

    Parameter names are LlamaModel's own (``embed_tokens.weight``, ``layers.0.self_attn.q_proj.weight``, ...).
    """
    with importing:
        from transformers import LlamaConfig, LlamaModel

    num_layers = dims.num_layers - dims.skip_layers
    model = LlamaModel(
        LlamaConfig(
            vocab_size=dims.vocab_size,
            hidden_size=dims.hidden_size,
            intermediate_size=dims.intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=dims.num_heads,
            num_key_value_heads=dims.num_kv_heads,
            rms_norm_eps=dims.norm_eps,
            hidden_act="silu",
            max_position_embeddings=8192,
            attention_bias=False,
            mlp_bias=False,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    rotary = Rotary(dims.hidden_size // dims.num_heads, dims.rope_theta)
    model.set_submodule("rotary_emb", rotary)
    for name, _ in list(model.named_modules()):  # transformers before 4.48 also kept one, unused, in every layer
        if name.endswith(".rotary_emb"):
            model.set_submodule(name, rotary)
    model.set_submodule("norm", nn.Identity())  # the states are wanted as they leave the last block
    return model.eval()


def llama_states(llama: Callable[..., object], ids: Tensor, mask: Tensor) -> Tensor:
    """States after the last built block, without the final norm.

    Args:
        ids: (B, L) int64 token ids, padded on the right; or (B, L, D) their embeddings, where some are a picture's.
        mask: (B, L) bool, true for real tokens.

    Returns:
        (B, L, D). States of real tokens do not depend on the padding: attention is causal.
    """
    attention = mask.to(torch.long)
    positions = (attention.cumsum(dim=1) - 1).masked_fill(~mask, 1)
    inputs = {"input_ids": ids} if ids.ndim == 2 else {"inputs_embeds": ids}
    output = llama(**inputs, attention_mask=attention, position_ids=positions, use_cache=False)
    return output.last_hidden_state  # type: ignore[attr-defined]
