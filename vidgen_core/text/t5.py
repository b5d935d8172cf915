"""T5 v1.1's encoder as states per token, on the modules of ``transformers``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .library import importing

if TYPE_CHECKING:
    from collections.abc import Callable

    from .dims import T5Dims


class GatedFeedForward(nn.Module):
    """``wo(gelu(wi_0 x) * wi_1 x)``; in float16 the last product is taken in float32, where it does not overflow.

    It stands in for the module of ``transformers``, which keeps ``wo`` in float32 for that, and looks at its weight
    before it is used: a weight that is stored small would be widened three times.
    """

    def __init__(self, dims: T5Dims) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.wi_1 = nn.Linear(dims.hidden_size, dims.intermediate_size, bias=False)
        self.wo = nn.Linear(dims.intermediate_size, dims.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), in float32 for float16."""
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        if h.dtype != torch.float16:
            return self.wo(h)
        if type(self.wo) is nn.Linear:
            return F.linear(h.float(), self.wo.weight.float())
        return self.wo(h.float())


def build_t5(dims: T5Dims) -> nn.Module:
    """The encoder of a ``transformers.T5EncoderModel`` with random weights on the current default device.

    Parameter names are its own (``embed_tokens.weight``, ``block.0.layer.0.SelfAttention.q.weight``, ...); the
    embedding is there once.
    """
    with importing:
        from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(
            vocab_size=dims.vocab_size,
            d_model=dims.hidden_size,
            d_kv=dims.head_size,
            d_ff=dims.intermediate_size,
            num_layers=dims.num_layers,
            num_heads=dims.num_heads,
            relative_attention_num_buckets=dims.num_buckets,
            relative_attention_max_distance=dims.max_distance,
            layer_norm_epsilon=dims.norm_eps,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            use_cache=False,
        )
    )
    encoder = model.encoder
    for number in range(dims.num_layers):
        encoder.set_submodule(f"block.{number}.layer.1.DenseReluDense", GatedFeedForward(dims))
    return encoder.eval()


def t5_states(t5: Callable[..., object], ids: Tensor) -> Tensor:
    """(B, L) int64 ids, padding among them -> (B, L, D) after the final norm. Nothing is masked."""
    return t5(input_ids=ids).last_hidden_state  # type: ignore[attr-defined]
