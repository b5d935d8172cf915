"""Dimensions of the text encoders, shared by the families that use them.

The defaults are those of the published checkpoints: LLaMA-3-8B and CLIP ViT-L/14's text tower.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaDims:
    vocab_size: int = 128320
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    intermediate_size: int = 14336
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    skip_layers: int = 2
    """states are taken this many layers before the last, without the final norm"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipDims:
    vocab_size: int = 49408
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_length: int = 77
    activation: str = "quick_gelu"
    eos_token_id: int = 49407
