"""Dimensions of the text encoders, shared by the families that use them.

The defaults are those of the published checkpoints: LLaMA-3-8B, CLIP ViT-L/14's text tower, LLaVA's image encoder
(CLIP ViT-L/14 at 336 px with a projector to LLaMA's width), and the encoder of T5 v1.1 XXL.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionDims:
    image_size: int = 336
    """px; the picture is resized and cropped to a square of it"""
    patch_size: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    activation: str = "quick_gelu"
    skip_layers: int = 1
    """states are taken this many layers before the last"""
    out_size: int = 4096
    """width of the language model that reads the projected states"""

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture: one per patch, the class token is dropped."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Dims:
    vocab_size: int = 32128
    hidden_size: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_size: int = 64
    intermediate_size: int = 10240
    """of the gated feed-forward layer"""
    num_buckets: int = 32
    """of the relative positions' bias, which all layers share"""
    max_distance: int = 128
    """tokens; farther ones share a bucket"""
    norm_eps: float = 1e-6
