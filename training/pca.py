"""A VAE encoder in closed form: principal components of 4 x 8 x 8 patches, written into the causal convolutions.

A codec trained from nothing on two cores spends its first hour finding out that neighbouring pixels are alike.
Principal components know that at once. Each strided convolution of the encoder is set to gather its 2 x 2 (x 2)
neighbourhood and to keep the leading components of it; the residual branches start at zero; so the encoder is
linear and optimal among linear ones, level by level. It can stay frozen: then latents never change while the
decoder is still learning, and a diffusion network can be trained on them at the same time.

The way out of the encoder is not linear (norm, SiLU, convolution) but can be made so:

* silu(a) - silu(-a) = a, so every component leaves as a pair of opposite signs;
* every group of the norm holds a large constant and its negative, so that its mean is zero and its spread the same
  for all clips, up to (1 / CONSTANT)^2.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vidgen_core.errors import RecipeError
from ..vidgen_core.families.hunyuan.vae import CausalVAE, ResnetBlock, level_steps
from .least_squares import LeastSquares

CONSTANT = 16.0
"""the constant channels of a group, in standard deviations of the components"""
WHITENING = 0.5
"""component k of standard deviation s_k leaves with s_k ** (1 - WHITENING): fine detail keeps above the noise
of diffusion, coarse structure keeps its lead"""
POSTERIOR_STD = 0.05
"""of every latent, where the encoder starts"""
FIRST_FRAME_WEIGHT = 2.0
"""how much a patch of the first latent frame counts: it is encoded as if it stood still for 4 frames"""


class Sizes(Protocol):
    """What the ways out of an encoder and a decoder need to know of a codec's config, whatever its family."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def block_channels(self) -> tuple[int, ...]: ...

    @property
    def num_groups(self) -> int: ...


@torch.no_grad()
def set_encoder(vae: CausalVAE, videos: Tensor) -> Tensor:
    """Overwrite the encoder (and ``quant_conv``) of a VAE with the principal components of some videos.

    Args:
        vae: 8 x 8 px and 4 frames to a latent; the last two ``block_channels`` equal and even per group.
        videos: (N, 3, T, H, W) in [-1, 1], a few hundred clips.

    Returns:
        (latent_channels,) standard deviations of the latents, largest first; their mean square is 1.
    """
    config = vae.config
    _check(vae)
    encoder = vae.encoder
    for block in (*encoder.down_blocks, encoder.mid_block):
        for layer in block.resnets:
            _make_straight(layer)
    for attention in encoder.mid_block.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(attention.to_out[0].bias)

    _clear(encoder.conv_in.conv)
    for colour in range(3):
        encoder.conv_in.conv.weight[colour, colour, 2, 1, 1] = 1.0

    signal = videos
    last = 2
    for level, block in enumerate(encoder.down_blocks[: last + 1]):
        steps = block.downsamplers[0].conv.conv.stride
        cells = patches(signal, steps)
        room = config.latent_channels if level == last else config.block_channels[level]
        basis, mean, spread = _components(cells, min(room, cells.shape[1]))
        if level == last:
            scale = spread.clamp_min(1e-6) ** -WHITENING
            scale = scale / (spread * scale).square().mean().sqrt()
            basis, spread = basis * scale[None, :], spread * scale
        weight, bias = basis.T, -(mean @ basis)  # (K, patch), (K,)
        if level == last:
            weight, bias = paired_rows(config, weight, bias)
        conv = block.downsamplers[0].conv.conv
        _clear(conv)
        _write_taps(conv, weight, steps)
        conv.bias[: len(bias)] = bias
        signal = torch.einsum("nptyx,pk->nktyx", cells - mean[:, None, None, None], basis)
    set_encoder_exit(config, encoder.conv_norm_out, encoder.conv_out.conv)
    _clear(vae.quant_conv)
    for channel in range(2 * config.latent_channels):
        vae.quant_conv.weight[channel, channel] = 1.0
    return spread


def _check(vae: CausalVAE) -> None:
    config = vae.config
    width = config.block_channels[-1]
    per_group = width // config.num_groups
    fits = (
        len(config.block_channels) == 4
        and (config.spatial_compression, config.temporal_compression) == (8, 4)
        and config.block_channels[0] >= 12
        and config.block_channels[-2] == width
        and per_group % 2 == 0
        and config.num_groups * (per_group - 2) >= 2 * config.latent_channels
    )
    if not fits:
        raise RecipeError(
            "The closed-form encoder does not fit into this codec",
            given=f"channels {config.block_channels}, {config.num_groups} groups, {config.latent_channels} latents",
            expected="8 px and 4 frames, 4 levels, at least 12 channels in the first, the last two alike, and room "
            "for a pair of channels per latent and a pair of constants per group",
            do="use block_channels = [16, 32, 64, 64], num_groups = 4, latent_channels = 24 or fewer",
        )


def _clear(conv: nn.Conv3d) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


def _make_straight(layer: ResnetBlock) -> None:
    """Let a residual block pass its input on: its branch ends in zeros, its shortcut copies channels."""
    _clear(layer.conv2.conv)
    if layer.conv_shortcut is not None:
        conv = layer.conv_shortcut.conv
        _clear(conv)
        for channel in range(min(conv.in_channels, conv.out_channels)):
            conv.weight[channel, channel] = 1.0


def patches(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """(N, C, T, H, W) -> (N, taps C, T', H / 2, W / 2): what taps 1 and 2 of a strided causal kernel see.

    In time the pair of output k is (2 k - 1, 2 k), and (0, 0) for the first. Order: (time, row, column, channel).
    """
    if steps[0] == 2:
        now = x[:, :, ::2]
        before = torch.cat([x[:, :, :1], x[:, :, 1::2]], dim=2)
        frames = [before, now]
    else:
        frames = [x]
    return torch.cat([f[..., i::2, j::2] for f in frames for i in (0, 1) for j in (0, 1)], dim=1)


def _write_taps(conv: nn.Conv3d, weight: Tensor, steps: tuple[int, ...]) -> None:
    """Put rows (K, taps C) that act on :func:`patches` where the kernel's taps are."""
    times = (1, 2) if steps[0] == 2 else (2,)
    taps = [(t, i, j) for t in times for i in (1, 2) for j in (1, 2)]
    num = weight.shape[1] // len(taps)
    for index, (t, i, j) in enumerate(taps):
        conv.weight[: len(weight), :num, t, i, j] = weight[:, index * num : (index + 1) * num]


def _components(cells: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading ``num`` principal directions (P, num), the mean (P,), and standard deviations (num,)."""
    weights = torch.ones(cells.shape[2], dtype=torch.float64)
    weights[0] = FIRST_FRAME_WEIGHT
    flat = cells.movedim(1, -1).double()  # (N, T, H, W, P)
    weights = (weights / weights.sum())[None, :, None, None, None] / (flat.shape[0] * flat.shape[2] * flat.shape[3])
    mean = (flat * weights).sum((0, 1, 2, 3))
    centred = ((flat - mean) * weights.sqrt()).flatten(0, 3)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    basis = vectors.flip(1)[:, :num]
    # the sign of an eigenvector is anyone's choice: make its largest entry positive
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    spread = values.flip(0)[:num].clamp_min(0).sqrt()
    return (basis * signs).float(), mean.float(), spread.float()


def _slots(config: Sizes) -> list[tuple[int, int]]:
    """(plus, minus) channel of each latent on its way to the exit; the last two of a group are constants."""
    per_group = config.block_channels[-1] // config.num_groups
    free = [g * per_group + 2 * i for g in range(config.num_groups) for i in range(per_group // 2 - 1)]
    # spread the strong components over the groups, so that all groups have about the same energy
    pairs = per_group // 2 - 1
    order = [g * pairs + i for i in range(pairs) for g in range(config.num_groups)]
    return [(free[k], free[k] + 1) for k in order[: config.latent_channels]]


def paired_rows(config: Sizes, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows for the last strided convolution: each component and its negative, and the constants in the bias."""
    width = config.block_channels[-1]
    rows, offsets = weight.new_zeros(width, weight.shape[1]), bias.new_zeros(width)
    for k, (plus, minus) in enumerate(_slots(config)):
        rows[plus], rows[minus] = weight[k], -weight[k]
        offsets[plus], offsets[minus] = bias[k], -bias[k]
    per_group = width // config.num_groups
    for group in range(config.num_groups):
        offsets[(group + 1) * per_group - 2] = CONSTANT
        offsets[(group + 1) * per_group - 1] = -CONSTANT
    return rows, offsets


def set_encoder_exit(config: Sizes, norm: nn.GroupNorm, conv: nn.Conv3d) -> None:
    """Undo the scale of the norm, join the pairs, and give every latent the same small posterior spread."""
    per_group = config.block_channels[-1] // config.num_groups
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    _clear(conv)
    scale = CONSTANT * math.sqrt(2 / per_group)  # what the group norm divides by, but for the components' own part
    for k, (plus, minus) in enumerate(_slots(config)):
        conv.weight[k, plus, 2, 1, 1], conv.weight[k, minus, 2, 1, 1] = scale, -scale
    assert conv.bias is not None
    conv.bias[config.latent_channels :] = 2 * math.log(POSTERIOR_STD)


# ---------------------------------------------------------------------------------------------
# the way back

DECODER_CONSTANT = 2.0
"""as CONSTANT, in the units of pixels; small, because training starts from here and mends the rest"""
RIDGE = 1e-4
MAX_POSITIONS = 200_000


@torch.no_grad()
def set_decoder(vae: CausalVAE, latents: Tensor, videos: Tensor) -> None:
    """Start the decoder as a linear one, fitted level by level; training goes on from there.

    Each upsampling convolution is fitted by least squares to the principal components of the finer patches that it
    has to produce, from what the level before really gives. Nearest-neighbour upsampling cannot draw the finest
    alternation within a cell, so this is no inverse of the encoder, but it is far from nothing. Channels that the
    fit does not need keep their random features for the residual branches to use.

    Args:
        latents: (N, C, T', H', W') of the videos, at the VAE's scale.
        videos: (N, 3, T, H, W) in [-1, 1]; some sixty are enough.
    """
    decoder = vae.decoder
    if vae.config.block_channels[0] // vae.config.num_groups < 4 or vae.config.num_groups < 3:
        raise RecipeError(
            "The closed-form decoder does not fit into this codec",
            given=f"{vae.config.num_groups} groups in {vae.config.block_channels[0]} channels",
            expected="at least 3 groups of at least 4 channels in the finest level",
            do="use block_channels = [16, 32, 64, 64] and num_groups = 4",
        )
    for block in (decoder.mid_block, *decoder.up_blocks):
        for layer in block.resnets:
            _make_straight(layer)
    for attention in decoder.mid_block.attentions:
        nn.init.zeros_(attention.to_out[0].weight)
        nn.init.zeros_(attention.to_out[0].bias)
    _clear(vae.post_quant_conv)
    for channel in range(vae.config.latent_channels):
        vae.post_quant_conv.weight[channel, channel] = 1.0
        decoder.conv_in.conv.weight[channel] = 0.0
        decoder.conv_in.conv.weight[channel, channel, 2, 1, 1] = 1.0

    pairs = patches(patches(videos, (1, 2, 2)), (2, 2, 2))  # 2 frames x 4 x 4 px
    fours = torch.cat([torch.cat([pairs[:, :, :1], pairs[:, :, 1::2]], dim=2), pairs[:, :, ::2]], dim=1)
    targets = (
        components_of_equal_spread(fours, vae.config.block_channels[-1]),
        components_of_equal_spread(patches(videos, (2, 2, 2)), 24),
        videos,
    )
    signal = decoder.conv_in(vae.post_quant_conv(latents))
    for block, steps, target in zip(decoder.up_blocks[:3], level_steps(vae.config)[:3], targets, strict=True):
        for layer in block.resnets:
            signal = layer(signal)
        upsampler = block.upsamplers[0]
        weight, bias = _fitted(signal, steps, target)
        if target is videos:
            weight, bias = exit_rows(vae.config, weight, bias)
        upsampler.conv.conv.weight[: len(weight)] = weight
        upsampler.conv.conv.bias[: len(bias)] = bias
        signal = upsampler(signal)
    set_decoder_exit(vae.config, decoder.conv_norm_out, decoder.conv_out.conv, videos)


def components_of_equal_spread(cells: Tensor, num: int) -> Tensor:
    """(N, P, T, H, W) -> (N, min(num, P), T, H, W): coordinates along the leading principal directions, of equal
    spread: a step of training must not shake the brightness of everything because its channel is the loudest."""
    basis, mean, spread = _components(cells, min(num, cells.shape[1]))
    basis = basis / spread.clamp_min(0.02 * float(spread[0]))
    return torch.einsum("nptyx,pk->nktyx", cells - mean[:, None, None, None], basis)


def _fitted(x: Tensor, steps: tuple[int, int, int], target: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (K, C, 3, 3, 3) and bias (K,) of the causal convolution that comes nearest to ``target`` after ``x`` is
    upsampled by ``steps``, in the mean square over at most MAX_POSITIONS positions."""
    generator = torch.Generator().manual_seed(0)
    fit = LeastSquares()
    area = math.prod(target.shape[2:])
    share = max(1, MAX_POSITIONS // len(x))
    for clip, wanted in zip(x.split(1), target.split(1), strict=True):
        up = clip.repeat_interleave(steps[1], 3).repeat_interleave(steps[2], 4)
        up = up.repeat_interleave(steps[0], 2)[:, :, steps[0] - 1 :]
        up = F.pad(up, (1, 1, 1, 1, 2, 0), mode="replicate")[0]
        windows = up.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # (C, T, H, W, 3, 3, 3)
        chosen = torch.randperm(area, generator=generator)[:share]
        t, y, z = torch.unravel_index(chosen, target.shape[2:])
        fit.add(windows[:, t, y, z].movedim(0, 1).flatten(1), wanted[0].flatten(1)[:, chosen].T)
    weight, bias = fit.solve(ridge=RIDGE)
    return weight.reshape(target.shape[1], x.shape[1], 3, 3, 3), bias


def exit_rows(config: Sizes, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Rows for the last upsampling: in each group of the norm a colour, its negative and two constants."""
    per_group = config.block_channels[0] // config.num_groups
    rows, offsets = weight.new_zeros(3 * per_group, *weight.shape[1:]), bias.new_zeros(3 * per_group)
    for colour in range(3):
        first = colour * per_group
        rows[first], rows[first + 1] = weight[colour], -weight[colour]
        offsets[first], offsets[first + 1] = bias[colour], -bias[colour]
        offsets[first + 2], offsets[first + 3] = DECODER_CONSTANT, -DECODER_CONSTANT
    return rows, offsets


def set_decoder_exit(config: Sizes, norm: nn.GroupNorm, conv: nn.Conv3d, videos: Tensor) -> None:
    """silu(a) - silu(-a) = a again, times what the norm has divided by."""
    per_group = config.block_channels[0] // config.num_groups
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    _clear(conv)
    for colour in range(3):
        energy = 2 * (DECODER_CONSTANT**2 + float(videos[:, colour].square().mean()))
        scale = math.sqrt(energy / per_group)
        conv.weight[colour, colour * per_group, 2, 1, 1] = scale
        conv.weight[colour, colour * per_group + 1, 2, 1, 1] = -scale


# ---------------------------------------------------------------------------------------------


class Shortcut(nn.Module):
    """What is left of a residual block whose branch is zero."""

    def __init__(self, layer: ResnetBlock) -> None:
        super().__init__()
        self.path = nn.Identity() if layer.conv_shortcut is None else layer.conv_shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x)


@torch.no_grad()
def without_idle_branches(vae: CausalVAE) -> CausalVAE:
    """A copy that shares its weights but leaves out residual branches that end in zeros: same results, less work.

    A closed-form encoder has nothing else, and encoding a pool with this copy is several times faster.
    """
    import copy

    memo = {id(p): p for p in vae.parameters()}
    light = copy.deepcopy(vae, memo)
    for block in (*light.encoder.down_blocks, light.encoder.mid_block):
        for index, layer in enumerate(block.resnets):
            conv = layer.conv2.conv
            if not conv.weight.any() and not conv.bias.any():
                block.resnets[index] = Shortcut(layer)
    middle = light.encoder.mid_block
    out = [attention.to_out[0] for attention in middle.attentions]
    if out and not any(layer.weight.any() or layer.bias.any() for layer in out):
        middle.attentions = nn.ModuleList()
    return light
