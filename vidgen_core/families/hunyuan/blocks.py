"""The causal VAE as blocks that run strip by strip: which layers follow each other, and what they read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ...nn.strips import Block, CausalAttention, ConvLayer, Residual, UpsampleLayer
from .vae import CausalVAE, DownBlock, Downsample, FrameCausalAttention, MidBlock, ResnetBlock, UpBlock, Upsample


def decoder_blocks(vae: CausalVAE) -> tuple[Block, ...]:
    """``vae.decode``: (C, T, H, W) latents -> (3, 4 (T - 1) + 1, 8 H, 8 W)."""
    decoder = vae.decoder
    return (
        ConvLayer(vae.post_quant_conv),
        ConvLayer.of(decoder.conv_in),
        *_middle(decoder.mid_block),
        *_levels(decoder.up_blocks),
        ConvLayer.of(decoder.conv_out, decoder.conv_norm_out),
    )


def encoder_blocks(vae: CausalVAE) -> tuple[Block, ...]:
    """``vae.encode`` before its result is divided into mean and log variance."""
    encoder = vae.encoder
    return (
        ConvLayer.of(encoder.conv_in),
        *_levels(encoder.down_blocks),
        *_middle(encoder.mid_block),
        ConvLayer.of(encoder.conv_out, encoder.conv_norm_out),
        ConvLayer(vae.quant_conv),
    )


def _middle(block: MidBlock) -> Iterator[Block]:
    first, last = block.resnets
    yield _block(first)
    for attention in block.attentions:
        yield _block(attention)
    yield _block(last)


def _levels(levels: Iterable[nn.Module]) -> Iterator[Block]:
    for level in levels:
        assert isinstance(level, (DownBlock, UpBlock))
        for layer in level.layers():
            yield _block(layer)


def _block(module: nn.Module) -> Block:
    if isinstance(module, ResnetBlock):
        shortcut = None if module.conv_shortcut is None else ConvLayer.of(module.conv_shortcut)
        first, second = ConvLayer.of(module.conv1, module.norm1), ConvLayer.of(module.conv2, module.norm2)
        return Residual(first, second, shortcut)
    if isinstance(module, FrameCausalAttention):
        to_out = module.to_out[0]
        assert isinstance(to_out, nn.Linear)
        return CausalAttention(
            norm=module.group_norm, to_q=module.to_q, to_k=module.to_k, to_v=module.to_v, to_out=to_out
        )
    if isinstance(module, Upsample):
        return UpsampleLayer(module.conv)
    assert isinstance(module, Downsample)
    return ConvLayer.of(module.conv)
