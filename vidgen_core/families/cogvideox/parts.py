"""CogVideoX's VAE and text encoder as parts of its record."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...codec import Codec
from .. import Part, TextAssembly
from .codec import CogVideoXCodec
from .codec_keys import VAE_LAYOUTS, codec_config, codec_told
from .config import CodecConfig, T5Dims, TextConfig
from .text_files import build_t5_part, build_text, find_t5_tokenizer, join_stack, stack_config
from .text_keys import T5_LAYOUTS, stranger, t5_dims
from .vae import CogVideoXVAE


def _build_vae(config: CodecConfig, metadata: Mapping[str, str]) -> nn.Module:
    return CogVideoXVAE(config)


def build_codec(vae: nn.Module, config: CodecConfig) -> Codec:
    assert isinstance(vae, CogVideoXVAE)
    return CogVideoXCodec(vae, config)


def _activation(config: TextConfig, num_tokens: int) -> tuple[int, float]:
    """Residual stream, q, k, v and the gated layer's three inner tensors of every token in float32, and the scores and
    the bias of all heads; every prompt has all its tokens, however short it is."""
    dims, tokens = config.t5, config.max_length
    inner = dims.num_heads * dims.head_size
    width = 3 * dims.hidden_size + 4 * inner + 3 * dims.intermediate_size
    per_layer = 4 * dims.hidden_size * inner + 3 * dims.hidden_size * dims.intermediate_size
    scores = 3 * dims.num_heads * tokens**2
    return 4 * (tokens * width + scores), 2.0 * tokens * per_layer * dims.num_layers


CODEC = Part(config=CodecConfig, build=_build_vae, recognise=codec_config, layouts=VAE_LAYOUTS, told=codec_told)
TEXT = Part(config=TextConfig, build=build_text, recognise=lambda shapes: None)
"""a file of ours; its metadata say so"""
T5 = Part(config=T5Dims, build=build_t5_part, recognise=t5_dims, layouts=T5_LAYOUTS)
TEXT_ASSEMBLY = TextAssembly(
    parts=("text", "t5"),
    config=stack_config,
    tokenizers=find_t5_tokenizer,
    join=join_stack,
    blocks={"text": ("t5.block",), "t5": ("t5.block",)},
    later=(),
    widths=lambda config: (config.t5.hidden_size, 0),
    sees_images=lambda config: False,
    stranger=stranger,
    activation=_activation,
)
