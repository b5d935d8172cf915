"""A CogVideoX VAE that starts with the latents of another codec, in closed form.

A diffusion network can then change families with its latents, and be trained on them before this VAE is. Every
step is least squares on some clips, from the pixels up to the given latents and back; training mends the rest.

The encoder's levels average two frames each, and what alternates between the two is lost to everything linear that
comes after. So each of these levels first makes an estimate of the difference from what moved before: the linear
part where the video comes in, the rest in the branch of the residual block. The estimate is a channel like the
others, nought wherever nothing moves, so that still pictures and first frames need none. Of all that a level has,
it hands on the directions that the latents depend on most.

The decoder repeats frames where it doubles time, and its convolutions between levels see one frame each. What
distinguishes the two copies comes out of the residual blocks, which see the frames before: random features of the
first convolution, and a second one fitted to what is still missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vidgen_core.errors import RecipeError
from ..vidgen_core.families.cogvideox.config import CodecConfig
from ..vidgen_core.families.cogvideox.vae import (
    GROUP,
    CachedConv3d,
    CogVideoXVAE,
    Past,
    ResnetBlock,
    SpatialNorm,
    Upsample,
    groups,
)
from .least_squares import LeastSquares
from .pca import components_of_equal_spread, exit_rows, paired_rows, patches, set_decoder_exit, set_encoder_exit

Layer = Callable[[Tensor, Past, Tensor | None], Tensor]
"""(frames, the frames before, the latents of these frames in the decoder) -> frames"""

COLOURS = 3
POSITIONS = 160_000
"""of all clips together, on which a convolution is fitted"""
RIDGE = 1e-3
"""times the mean energy of the features"""
FIRST_FRAME_WEIGHT = 4.0
"""of a latent of the first frame; there are few of them, and a given picture is one"""


@torch.no_grad()
def set_matched_encoder(vae: CogVideoXVAE, videos: Tensor, latents: Tensor) -> None:
    """Overwrite the encoder so that it comes near to the given latents.

    Args:
        vae: 8 x 8 px and 4 frames to a latent; the last two ``block_channels`` equal and even per group.
        videos: (N, 3, T, H, W) in [-1, 1], some hundred clips.
        latents: (N, Z, T', H / 8, W / 8) of the videos at the VAE's scale.
    """
    _check(vae)
    encoder = vae.encoder
    for level in (*encoder.down_blocks, encoder.mid_block):
        for layer in level.resnets:
            _make_straight(layer)
    _set_entrance(vae, videos)
    first, second, third = encoder.down_blocks[:3]
    signal = _through(_entering(encoder.conv_in), videos, latents)
    signal = _estimate_differences(first.resnets[0], signal, latents, videos, room=range(COLOURS, 2 * COLOURS))
    held = _halved(signal[:, : 2 * COLOURS])
    both = torch.cat([_halved(held), 0.5 * _difference(held)], dim=1)
    signal = _hand_on(first.downsamplers[0].conv, held, both, latents)

    width = signal.shape[1]
    signal = _estimate_differences(second.resnets[0], signal, latents, signal, room=range(width, 2 * width))
    held = _halved(signal)
    signal = _hand_on(second.downsamplers[0].conv, held, held, latents)

    cells = _cells(signal, 2)
    weight, bias = _latents_from(cells, latents)
    rows, offsets = paired_rows(vae.config, weight, bias)
    _set_cells(third.downsamplers[0].conv, rows, offsets, signal.shape[1])
    set_encoder_exit(vae.config, encoder.norm_out, encoder.conv_out.conv)


def _check(vae: CogVideoXVAE) -> None:
    config = vae.config
    widths = config.block_channels
    per_group = widths[-1] // config.num_groups
    fits = (
        len(widths) == 4
        and config.temporal_compression == 4
        and widths[0] >= 2 * COLOURS
        and 2 * widths[0] <= widths[1] <= widths[2] == widths[3]
        and per_group % 2 == 0
        and config.num_groups * (per_group - 2) >= 2 * config.latent_channels
        and widths[0] // config.num_groups >= 4
        and config.num_groups > COLOURS
    )
    if not fits:
        raise RecipeError(
            "The closed-form start does not fit into this codec",
            given=f"channels {widths}, {config.num_groups} groups, {config.latent_channels} latents",
            expected="8 px and 4 frames, 4 levels, the second twice as wide as the first or more, the last two alike, "
            "more than 3 groups of 4 or more, and room for a pair of channels per latent and of constants per group",
            do="use block_channels = [16, 32, 64, 64], num_groups = 4, latent_channels = 24 or fewer",
        )


def _make_straight(layer: ResnetBlock) -> None:
    """Let a residual block pass its input on: its branch ends in zeros, its shortcut copies channels."""
    _clear(layer.conv2.conv)
    for norm in (layer.norm1, layer.norm2):
        if isinstance(norm, SpatialNorm):
            _make_plain(norm)
    if layer.conv_shortcut is not None:
        _clear(layer.conv_shortcut)
        for channel in range(min(layer.conv_shortcut.weight.shape[:2])):
            layer.conv_shortcut.weight[channel, channel] = 1.0


def _make_plain(norm: SpatialNorm) -> None:
    """Let the latents say nothing yet: times 1, plus 0."""
    for point, value in ((norm.conv_y, 1.0), (norm.conv_b, 0.0)):
        nn.init.zeros_(point.conv.weight)
        nn.init.constant_(_bias(point.conv), value)


def _clear(conv: nn.Module) -> None:
    nn.init.zeros_(cast(Tensor, conv.weight))
    nn.init.zeros_(_bias(conv))


def _bias(conv: nn.Module) -> Tensor:
    return cast(Tensor, conv.bias)


# ---- the way in ------------------------------------------------------------------------------------------------


def _set_entrance(vae: CogVideoXVAE, videos: Tensor) -> None:
    """Colours as they are, and the best linear estimate of half the difference within pairs of frames."""
    conv = vae.encoder.conv_in.conv
    conv.weight[: 2 * COLOURS] = 0.0
    _bias(conv)[: 2 * COLOURS] = 0.0
    for colour in range(COLOURS):
        conv.weight[colour, colour, 2, 1, 1] = 1.0
    fit = _Fit(len(videos))
    for clip in videos:
        ago = F.pad(clip, (0, 0, 0, 0, 2, 0), mode="replicate")
        changes = torch.cat([ago[:, 1:-1] - clip, ago[:, :-2] - clip])
        fit.add_convolved(changes, _difference(clip[None])[0] * 0.5, kernel=(1, 3, 3), halved=True)
    weight = fit.solve(ridge=RIDGE, constant=False)[0].reshape(COLOURS, 2, COLOURS, 3, 3)
    rows = conv.weight[COLOURS : 2 * COLOURS]
    rows[:, :, 1], rows[:, :, 0], rows[:, :, 2] = weight[:, 0], weight[:, 1], -weight.sum(1)


def _estimate_differences(
    layer: ResnetBlock, signal: Tensor, latents: Tensor, wanted: Tensor, *, room: Sequence[int]
) -> Tensor:
    """Let ``layer`` put half the difference within pairs of ``wanted`` into the channels ``room``.

    What these channels have already (by way of the shortcut) is left to them. Returns what the layer gives.
    """
    fit = _Fit(len(signal))
    inner = _branch(layer)
    for clip, z, goal in zip(signal.split(1), latents.split(1), wanted.split(1), strict=True):
        straight = clip if layer.conv_shortcut is None else layer.conv_shortcut(clip)
        missing = 0.5 * _difference(goal) - _halved(straight[:, room])
        features = _through(inner, clip, z, spatial=False)[0]
        fit.add_convolved(features, missing[0], kernel=(3, 3, 3), halved=True)
    _write(layer.conv2.conv, room, *fit.solve(ridge=RIDGE))
    return _through(layer, signal, latents, spatial=False)


def _halved(x: Tensor) -> Tensor:
    """(N, C, 2 n + 1, H, W) -> (N, C, n + 1, H, W): the first frame, and means of two."""
    return torch.cat([x[:, :, :1], 0.5 * (x[:, :, 1::2] + x[:, :, 2::2])], dim=2)


def _difference(x: Tensor) -> Tensor:
    """As :func:`_halved`: nought, and the second of two frames minus the first."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 2::2] - x[:, :, 1::2]], dim=2)


def _cells(x: Tensor, side: int) -> Tensor:
    """(N, C, T, H, W) -> (N, side side C, T, H / side, W / side), in the order (row, column, channel)."""
    return torch.cat([x[..., i::side, j::side] for i in range(side) for j in range(side)], dim=1)


def _hand_on(conv: nn.Conv2d, held: Tensor, later: Tensor, latents: Tensor) -> Tensor:
    """Set a strided convolution to the directions of 2 x 2 cells that the latents depend on most; what it gives.

    Args:
        held: (N, C, T, H, W), what the convolution reads.
        later: (N, k C, T', H, W): what becomes of it at the latents' frames, in k ways.
        latents: as wanted at the end.
    """
    num, cells = held.shape[1], _cells(held, 2)
    side = later.shape[3] // latents.shape[3]
    weight, _ = _latents_from(_cells(later, side), latents)
    ways = later.shape[1] // num
    # (Z, rows, in cell, columns, in cell, ways, C) -> all that one cell is good for, in the order of ``_cells``
    parts = weight.reshape(len(weight), side // 2, 2, side // 2, 2, ways, num)
    uses = parts.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 4 * num).double()
    flat = cells.movedim(1, -1).flatten(0, 3)
    mean = flat.double().mean(0)
    spread = (flat.T @ flat).double() / len(flat) - mean[:, None] * mean
    values, vectors = torch.linalg.eigh(spread)
    values = values.clamp_min(1e-5 * float(values[-1]))
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    directions = torch.linalg.svd(uses @ root, full_matrices=False).Vh[: conv.out_channels] @ inverse
    rows, offsets = directions.float(), -(directions @ mean).float()
    _set_cells(conv, rows, offsets, num)
    return torch.einsum("kp,nptyx->nktyx", rows, cells) + offsets[:, None, None, None]


def _latents_from(features: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (Z, P) and bias (Z,) that come nearest to the latents (N, Z, ...) from features (N, P, ...) there."""
    fit = _Fit(len(latents))
    for given, wanted in zip(features, latents, strict=True):
        weight = torch.ones(wanted.shape[1:])
        weight[0] = math.sqrt(FIRST_FRAME_WEIGHT)
        fit.add(given.flatten(1).T, wanted.flatten(1).T, weight.flatten())
    return fit.solve(ridge=1e-6)


def _set_cells(conv: nn.Conv2d, rows: Tensor, offsets: Tensor, num: int) -> None:
    """Write rows (K, 4 C) that act on 2 x 2 cells, whose first taps a strided kernel has at 0 and 1."""
    _clear(conv)
    for index, (i, j) in enumerate((i, j) for i in (0, 1) for j in (0, 1)):
        conv.weight[: len(rows), :num, i, j] = rows[:, index * num : (index + 1) * num]
    _bias(conv)[: len(offsets)] = offsets


# ---- the way back ----------------------------------------------------------------------------------------------


@torch.no_grad()
def set_matched_decoder(vae: CogVideoXVAE, latents: Tensor, videos: Tensor) -> None:
    """Start the decoder level by level with what comes nearest to the videos; training goes on from there.

    Channels that a fit does not need keep their random features, for the residual blocks to make use of.

    Args:
        latents: (N, Z, T', H / 8, W / 8) of the videos at the VAE's scale.
        videos: (N, 3, T, H, W) in [-1, 1]; some sixty are enough.
    """
    _check(vae)
    decoder = vae.decoder
    for level in (decoder.mid_block, *decoder.up_blocks):
        for layer in level.resnets:
            _make_straight(layer)
    _make_plain(decoder.norm_out)
    channels = vae.config.latent_channels
    decoder.conv_in.conv.weight[:channels] = 0.0
    _bias(decoder.conv_in.conv)[:channels] = 0.0
    for channel in range(channels):
        decoder.conv_in.conv.weight[channel, channel, 2, 1, 1] = 1.0

    single = patches(videos, (1, 2, 2))
    pairs = patches(single, (2, 2, 2))
    widths = vae.config.block_channels
    coarse, fine = (components_of_equal_spread(each, widths[2]) for each in (pairs, single))
    first, second, third, last = decoder.up_blocks
    signal = _through(_entering(decoder.conv_in), latents, latents)
    for layer in (*decoder.mid_block.resnets, *first.resnets):
        signal = _through(layer, signal, latents)
    signal = _enlarge(first.upsamplers[0], signal, latents, coarse)
    for layer in second.resnets:
        signal = _mend(layer, signal, latents, coarse)
    signal = _enlarge(second.upsamplers[0], signal, latents, fine)
    for layer in third.resnets:
        signal = _mend(layer, signal, latents, fine)
    signal = _enlarge(third.upsamplers[0], signal, latents, videos, exit_of=vae.config)
    for layer in last.resnets:
        signal = _mend(layer, signal, latents, videos, apart=widths[0] // vae.config.num_groups)
    set_decoder_exit(vae.config, decoder.norm_out.norm_layer, decoder.conv_out.conv, videos)


def _enlarge(
    layer: Upsample, signal: Tensor, latents: Tensor, goal: Tensor, *, exit_of: CodecConfig | None = None
) -> Tensor:
    """Fit the convolution after the enlargement to ``goal`` (N, K, T, H, W); what the layer gives.

    Args:
        exit_of: the goal are colours, which go on in the layout of the exit of this codec.
    """
    fit = _Fit(len(signal))
    for clip, wanted in zip(signal, goal, strict=True):
        large = clip.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if layer.doubles_time:
            large = large.repeat_interleave(2, 1)[:, 1:]
        fit.add_convolved(large, wanted, kernel=(1, 3, 3))
    weight, bias = fit.solve(ridge=RIDGE)
    weight = weight.reshape(len(weight), signal.shape[1], 3, 3)
    if exit_of is not None:
        weight, bias = exit_rows(exit_of, weight, bias)
    layer.conv.weight[: len(weight)] = weight
    _bias(layer.conv)[: len(bias)] = bias
    return _through(layer, signal, latents)


def _mend(layer: ResnetBlock, signal: Tensor, latents: Tensor, goal: Tensor, *, apart: int = 0) -> Tensor:
    """Fit the branch of ``layer`` to what its shortcut lacks of ``goal``; what the layer gives.

    Args:
        apart: how many channels apart the components of the goal lie, each followed by its negative; 0: they are the
            leading channels.
    """
    num = goal.shape[1]
    places = [k * apart if apart else k for k in range(num)]
    fit = _Fit(len(signal))
    for clip, z, wanted in zip(signal.split(1), latents.split(1), goal.split(1), strict=True):
        straight = clip if layer.conv_shortcut is None else layer.conv_shortcut(clip)
        fit.add_convolved(_through(_branch(layer), clip, z)[0], (wanted - straight[:, places])[0], kernel=(3, 3, 3))
    weight, bias = fit.solve(ridge=RIDGE)
    _write(layer.conv2.conv, places, weight, bias)
    if apart:
        _write(layer.conv2.conv, [place + 1 for place in places], -weight, -bias)
    return _through(layer, signal, latents)


# ---- layers and least squares ----------------------------------------------------------------------------------


def _entering(conv: CachedConv3d) -> Layer:
    return lambda x, past, z: conv(x, past)


def _branch(layer: ResnetBlock) -> Layer:
    """What the second convolution of a residual block reads."""

    def read(x: Tensor, past: Past, z: Tensor | None) -> Tensor:
        inner = layer.conv1(x, past, layer.norm1.read(x, z))
        return layer.norm2.read(inner, z)(0, inner.shape[2])

    return read


def _through(layer: Layer, x: Tensor, latents: Tensor, *, spatial: bool = True) -> Tensor:
    """A layer's output for whole videos, one at a time and group by group as the VAE does it."""
    num_groups = len(groups(latents.shape[2], GROUP))
    size = max(1, (x.shape[2] - 1) // num_groups)
    outputs = []
    for clip, z in zip(x.split(1), latents.split(1), strict=True):
        past: Past = {}
        parts = zip(groups(x.shape[2], size), groups(latents.shape[2], GROUP), strict=True)
        outputs.append(
            torch.cat([layer(clip[:, :, some], past, z[:, :, few] if spatial else None) for some, few in parts], dim=2)
        )
    return torch.cat(outputs)


def _write(conv: nn.Module, places: Sequence[int], weight: Tensor, bias: Tensor) -> None:
    """Rows (K, P) and (K,) into a convolution's output channels ``places``."""
    kernel = cast(Tensor, conv.weight)
    for place, row, offset in zip(places, weight, bias, strict=True):
        kernel[place] = row.reshape(kernel.shape[1:])
        _bias(conv)[place] = offset


class _Fit(LeastSquares):
    """Of convolutions, a clip at a time.

    Args:
        num_clips: among which :data:`POSITIONS` are shared out.
    """

    def __init__(self, num_clips: int) -> None:
        super().__init__()
        self.share = max(1, POSITIONS // num_clips)
        self.generator = torch.Generator().manual_seed(0)

    def add_convolved(self, x: Tensor, wanted: Tensor, *, kernel: tuple[int, int, int], halved: bool = False) -> None:
        """What a convolution of ``kernel`` reads of x (C, T, H, W) at some positions of ``wanted`` (Q, T', H, W).

        Args:
            halved: the mean of two frames each, but for the first one, becomes a frame.
        """
        num_t, num_y, num_x = kernel
        x = F.pad(x, (num_x // 2, num_x // 2, num_y // 2, num_y // 2))
        if num_t > 1:
            x = torch.cat([x[:, :1].expand(-1, num_t - 1, -1, -1), x], dim=1)
        windows = x.unfold(1, num_t, 1).unfold(2, num_y, 1).unfold(3, num_x, 1)  # (C, T, H, W, *kernel)
        chosen = torch.randperm(math.prod(wanted.shape[1:]), generator=self.generator)[: self.share]
        t, y, z = torch.unravel_index(chosen, wanted.shape[1:])
        if halved:
            rows = 0.5 * (windows[:, (2 * t - 1).clamp_min(0), y, z] + windows[:, 2 * t, y, z])
        else:
            rows = windows[:, t, y, z]
        self.add(rows.movedim(0, 1).flatten(1), wanted[:, t, y, z].T)
