"""CogVideoX's causal 3-D VAE: video <-> latents, a few frames at a time, one file read from top to bottom.

Every module carries the name it has in the diffusers release. Source: zai-org's CogVideo repository
(``sat/vae_modules``) and arXiv:2408.06072: 8 x 8 pixels and 4 frames to one latent of 16 channels.

A video goes through in groups: the first frame on its own together with the next 8 (one latent and the next 2), then
8 frames (2 latents) at a time. Convolutions in time read the last frames of the group before, so they notice nothing;
group norms take the statistics of one group, so the groups are part of what the VAE computes. Memory does not depend
on the length of the video.

Shapes: B batch, C channels, T frames of a group, H height, W width; z (B, Z, T', h, w) the group's latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SettingsError
from ...nn.causal_conv import Interleave, fold_phases, phase_pairs
from ...nn.convolution import Conv3d, conv3d, empty_like, fast_layout
from ...nn.group_norm import GroupNorm, GroupNormSiLU
from ...types import Grid, VideoShape
from .config import CodecConfig

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
GROUP = 2
"""latents in a group"""
PART_BYTES = 1 << 26
"""Without gradients, larger tensors are normalised, convolved and upsampled a few frames at a time."""

Past = dict[nn.Module, Tensor]
"""The last frames that each convolution has read of this video, by the convolution; empty before the first group."""
Read = Callable[[int, int], Tensor]
"""(first frame, the one after the last) -> these frames of what a convolution is to read"""


def _frames_at_once(x: Tensor) -> int:
    """Into how many frames at a time a layer cuts ``x``: all of them in training and where they are small."""
    if torch.is_grad_enabled():
        return x.shape[2]
    return max(1, PART_BYTES // (x[:, :, 0].numel() * x.element_size()))


def _as_it_is(x: Tensor) -> Read:
    return lambda start, stop: x[:, :, start:stop]


def _lead(num_frames: int) -> int:
    """1 if a group begins with the video's first frame, which time neither doubles nor halves; else 0."""
    return num_frames % 2


class CachedConv3d(nn.Module):
    """3 x 3 x 3 with zeros around each frame, reading two earlier frames: copies of the first one where a video begins.

    The weights live in ``.conv``, as in the official checkpoints.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, past: Past, read: Read | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C', T, H, W).

        Args:
            past: the frames before; those that the next group needs are left in it.
            read: makes of ``x`` what is convolved, a few frames at a time; None: ``x`` itself.
        """
        read, step, num_frames = read or _as_it_is(x), _frames_at_once(x), x.shape[2]
        if step >= num_frames:
            return self.conv(self._window(read(0, num_frames), x, past))
        out: Tensor | None = None
        for start in range(0, num_frames, step):
            part: Tensor = self.conv(self._window(read(start, min(start + step, num_frames)), x, past))
            if out is None:
                out = empty_like(x, (*part.shape[:2], num_frames, *part.shape[3:]))
            out[:, :, start : start + part.shape[2]] = part
        assert out is not None
        return out

    def _window(self, frames: Tensor, like: Tensor, past: Past) -> Tensor:
        """The frames behind those before them, in the layout of ``like``."""
        before = past.get(self)
        if before is None:
            before = frames[:, :, :1].expand(-1, -1, 2, -1, -1)
        if torch.is_grad_enabled():
            window = torch.cat([before, frames], dim=2)
            past[self] = window[:, :, -2:]
            return window
        window = empty_like(like, (*frames.shape[:2], 2 + frames.shape[2], *frames.shape[3:]))
        window[:, :, :2] = before
        window[:, :, 2:] = frames
        past[self] = window[:, :, -2:].clone()
        return window


class PlainNorm(GroupNormSiLU):
    """The encoder's norms."""

    def read(self, x: Tensor, z: Tensor | None) -> Read:
        """The normalised frames of a group; ``z`` is for :class:`SpatialNorm`."""
        if _frames_at_once(x) >= x.shape[2]:
            return _as_it_is(self(x))
        frames = self.by_frames(x, _frames_at_once(x))
        return lambda start, stop: frames(x[:, :, start:stop])


class _Point(nn.Module):
    """1 x 1 x 1, in ``.conv``."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SpatialNorm(nn.Module):
    """The decoder's norms, followed by SiLU: a group norm times a map and plus another one, both made of the latents.

    The official code enlarges the latents by nearest neighbour and convolves the result with one point. That is here
    done the other way round, which gives the same with a 64th of the multiplications. Source: MoVQ, arXiv:2209.09002.
    """

    def __init__(self, config: CodecConfig, channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(config.num_groups, channels, eps=NORM_EPS)
        self.conv_y = _Point(config.latent_channels, channels)
        self.conv_b = _Point(config.latent_channels, channels)

    def read(self, x: Tensor, z: Tensor | None) -> Read:
        """The normalised frames of a group with the latents ``z``."""
        assert z is not None
        lead, rest = _lead(x.shape[2]), max(1, x.shape[2] // max(1, z.shape[2] - _lead(x.shape[2])))
        latents = torch.tensor([max(0, frame - lead) // rest + lead * (frame > 0) for frame in range(x.shape[2])])
        latents = latents.to(z.device)
        times, plus = self.conv_y(z), self.conv_b(z)
        if torch.is_grad_enabled():
            grown = [_enlarged(part[:, :, latents], x) for part in (times, plus)]
            return _as_it_is(F.silu(self.norm_layer(x) * grown[0] + grown[1]))
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, shift = self.norm_layer.scale_and_shift(x, _frames_at_once(x), wide)
        scale, shift = (value[:, :, None, None, None] for value in (scale, shift))
        times = times.to(wide)
        plus = torch.addcmul(plus.to(wide), times, shift)
        times = times * scale

        def read(start: int, stop: int) -> Tensor:
            frames, places = x[:, :, start:stop], latents[start:stop]
            out = empty_like(x, frames.shape)
            small = [part.index_select(2, places)[:, :, :, :, None, :, None] for part in (plus, times)]
            cells = _cells(frames, z)
            if x.dtype == wide:
                torch.addcmul(small[0], cells, small[1], out=_cells(out, z))
            else:
                _cells(out, z).copy_(torch.addcmul(small[0], cells.to(wide), small[1]))
            return F.silu(out, inplace=True)

        return read


def _cells(x: Tensor, z: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, h, H / h, w, W / w), without a copy."""
    return x.unflatten(4, (z.shape[4], -1)).unflatten(3, (z.shape[3], -1))


def _enlarged(part: Tensor, x: Tensor) -> Tensor:
    """(B, C, T, h, w) -> (B, C, T, H, W) of ``x`` by nearest neighbour."""
    rows, columns = x.shape[3] // part.shape[3], x.shape[4] // part.shape[4]
    return part.repeat_interleave(rows, 3).repeat_interleave(columns, 4)


def _norm(config: CodecConfig, channels: int, *, spatial: bool) -> PlainNorm | SpatialNorm:
    return SpatialNorm(config, channels) if spatial else PlainNorm(config.num_groups, channels, eps=NORM_EPS)


class ResnetBlock(nn.Module):
    """(B, C, T, H, W) -> (B, C', T, H, W)."""

    def __init__(self, config: CodecConfig, in_channels: int, out_channels: int, *, spatial: bool) -> None:
        super().__init__()
        self.norm1 = _norm(config, in_channels, spatial=spatial)
        self.conv1 = CachedConv3d(in_channels, out_channels)
        self.norm2 = _norm(config, out_channels, spatial=spatial)
        self.conv2 = CachedConv3d(out_channels, out_channels)
        self.conv_shortcut = Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, past: Past, z: Tensor | None) -> Tensor:
        h = self.conv1(x, past, self.norm1.read(x, z))
        h = self.conv2(h, past, self.norm2.read(h, z))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return h + x if torch.is_grad_enabled() else h.add_(x)


class Downsample(nn.Module):
    """A 3 x 3 convolution of each frame with stride 2; before it, if ``halves_time``, the mean of two frames each."""

    def __init__(self, channels: int, *, halves_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.halves_time = halves_time

    def forward(self, x: Tensor, past: Past, z: Tensor | None) -> Tensor:
        """T -> lead + (T - lead) / 2 where time is halved."""
        if self.halves_time:
            x = _halved(x, _lead(x.shape[2]))
        x = F.pad(x, (0, 1, 0, 1))
        return conv3d(x, self.conv.weight.unsqueeze(2), self.conv.bias, (1, 2, 2))


def _halved(x: Tensor, lead: int) -> Tensor:
    if torch.is_grad_enabled():
        return torch.cat([x[:, :, :lead], (x[:, :, lead::2] + x[:, :, lead + 1 :: 2]) * 0.5], dim=2)
    out = empty_like(x, (*x.shape[:2], lead + (x.shape[2] - lead) // 2, *x.shape[3:]))
    out[:, :, :lead] = x[:, :, :lead]
    torch.add(x[:, :, lead::2], x[:, :, lead + 1 :: 2], out=out[:, :, lead:])
    out[:, :, lead:] *= 0.5
    return out


class Upsample(nn.Module):
    """Nearest neighbour, then a 3 x 3 convolution of each frame; if ``doubles_time``, each frame but the lead twice.

    Two equal frames are convolved once, and neighbours that are equal meet one tap: 4 multiplications in place of 9
    (18 where time is doubled). See ``nn.causal_conv``.
    """

    STEPS = (1, 2, 2)

    def __init__(self, channels: int, *, doubles_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.doubles_time = doubles_time

    def forward(self, x: Tensor, past: Past, z: Tensor | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, lead + 2 (T - lead) or T, 2 H, 2 W)."""
        num_frames = x.shape[2]
        lead = _lead(num_frames) if self.doubles_time else num_frames
        assert self.conv.bias is not None
        weight, bias = fold_phases(self.conv.weight.unsqueeze(2), self.conv.bias, self.STEPS)
        if torch.is_grad_enabled():
            full: Any = Interleave.apply(conv3d(x, weight, bias, padding=(0, 1, 1)), self.STEPS)
            return torch.cat([full[:, :, :lead], full[:, :, lead:].repeat_interleave(2, dim=2)], dim=2)
        size = (lead + 2 * (num_frames - lead), 2 * x.shape[3], 2 * x.shape[4])
        out = empty_like(x, (*x.shape[:2], *size))
        copies = [_places(out, lead, copy) for copy in (0, 1)]
        step = _frames_at_once(x)
        for start in range(0, num_frames, step):
            phases = conv3d(x[:, :, start : start + step], weight, bias, padding=(0, 1, 1))
            for places in copies:
                self._spread(phases, places[start : start + step], out)
        return out

    def _spread(self, phases: Tensor, places: list[int], out: Tensor) -> None:
        """Phases of each frame to its place in ``out``."""
        for number, place in enumerate(places):
            frame = out[:, :, place : place + 1]
            for small, large in phase_pairs(phases[:, :, number : number + 1], frame, self.STEPS):
                large.copy_(small)


def _places(out: Tensor, lead: int, copy: int) -> list[int]:
    """Where the first or the second copy of each frame stands; the second one of a lead is the first."""
    return [*range(lead), *range(lead + copy, out.shape[2], 2)]


class Level(nn.Module):
    """Residual blocks and, but for the last level, a change of size."""

    def __init__(self, config: CodecConfig, widths: list[int], *, spatial: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(config, a, b, spatial=spatial) for a, b in zip(widths, widths[1:], strict=False)]
        )

    def layers(self) -> Iterator[nn.Module]:
        yield from self.resnets


class DownLevel(Level):
    def __init__(self, config: CodecConfig, in_channels: int, level: int) -> None:
        out_channels = config.block_channels[level]
        super().__init__(config, [in_channels] + [out_channels] * config.layers_per_block, spatial=False)
        self.downsamplers = nn.ModuleList()
        if level < len(config.block_channels) - 1:
            self.downsamplers.append(Downsample(out_channels, halves_time=level < _time_levels(config)))

    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.resnets, *self.downsamplers)


class UpLevel(Level):
    def __init__(self, config: CodecConfig, in_channels: int, level: int) -> None:
        out_channels = config.block_channels[-1 - level]
        super().__init__(config, [in_channels] + [out_channels] * (config.layers_per_block + 1), spatial=True)
        self.upsamplers = nn.ModuleList()
        if level < len(config.block_channels) - 1:
            self.upsamplers.append(Upsample(out_channels, doubles_time=level < _time_levels(config)))

    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.resnets, *self.upsamplers)


class Encoder(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.block_channels
        self.conv_in = CachedConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            [DownLevel(config, width, level) for level, width in enumerate((widths[0], *widths[:-1]))]
        )
        self.mid_block = Level(config, [widths[-1]] * 3, spatial=False)
        self.norm_out = PlainNorm(config.num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = CachedConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        """One group of frames."""
        x = self.conv_in(x, past)
        for layer in _layers(*self.down_blocks, self.mid_block):
            x = layer(x, past, None)
        return self.conv_out(x, past, self.norm_out.read(x, None))


class Decoder(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.block_channels[::-1]
        self.conv_in = CachedConv3d(config.latent_channels, widths[0])
        self.mid_block = Level(config, [widths[0]] * 3, spatial=True)
        self.up_blocks = nn.ModuleList(
            [UpLevel(config, width, level) for level, width in enumerate((widths[0], *widths[:-1]))]
        )
        self.norm_out = SpatialNorm(config, widths[-1])
        self.conv_out = CachedConv3d(widths[-1], config.in_channels)

    def forward(self, z: Tensor, past: Past) -> Tensor:
        """One group of latents."""
        x = self.conv_in(z, past)
        for layer in _layers(self.mid_block, *self.up_blocks):
            x = layer(x, past, z)
        return self.conv_out(x, past, self.norm_out.read(x, z))


def _layers(*levels: nn.Module) -> Iterator[nn.Module]:
    """All layers in order, one by one, so that nobody holds on to a level's input."""
    for level in levels:
        assert isinstance(level, Level)
        yield from level.layers()


def _time_levels(config: CodecConfig) -> int:
    return int(math.log2(config.temporal_compression))


def _check_config(config: CodecConfig) -> None:
    """Raise SettingsError for widths or a compression that cannot be built."""
    widths, compression = config.block_channels, config.temporal_compression
    if not widths or any(width < 1 or width % config.num_groups for width in widths):
        raise SettingsError(
            "The widths of the codec cannot be used",
            given=f"block_channels {tuple(widths)} with num_groups {config.num_groups}",
            expected="at least one level, and every width a multiple of num_groups",
        )
    if compression < 1 or compression & (compression - 1) or _time_levels(config) > len(widths) - 1:
        raise SettingsError(
            "The compression of the codec cannot be used",
            given=f"{compression} frames per latent with {len(widths)} levels",
            expected="a power of two (1, 2, 4, ...), and one more level than halvings of time",
            do="lower temporal_compression or add a level to block_channels",
        )
    if config.scaling_factor <= 0:
        raise SettingsError(
            "The scale of the latents cannot be used",
            given=f"scaling_factor {config.scaling_factor}",
            expected="a positive number: 0.7, or 1.15258426 for CogVideoX-2B",
        )


def groups(length: int, size: int) -> list[slice]:
    """Where the groups of a video lie: ``size`` frames each, and what is too much in the first one."""
    rest = length % size if length >= size else length
    ends = list(range(rest + size if length >= size else length, length + 1, size))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


class CogVideoXVAE(nn.Module):
    """The whole codec at the VAE's own scale; :class:`.codec.CogVideoXCodec` adds the scaling."""

    def __init__(self, config: CodecConfig) -> None:
        _check_config(config)
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        return grid_of(self.config)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance, each (B, Z, T', H / 8, W / 8).

        Each group is brought to the weights' device and dtype as its turn comes.

        Raises:
            SettingsError: T is not 8 n + 1, or H or W is not a multiple of 8.
        """
        self._check(video, self.config.in_channels, "video")
        VideoShape(num_frames=video.shape[2], height_px=video.shape[3], width_px=video.shape[4]).check(self.grid)
        past: Past = {}
        weight = self.encoder.conv_in.conv.weight
        parts = [
            self.encoder(fast_layout(video[:, :, group].to(weight)), past)
            for group in groups(video.shape[2], GROUP * self.config.temporal_compression)
        ]
        mean, logvar = torch.cat([part.contiguous() for part in parts], dim=2).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """(B, Z, T', h, w) latents at the VAE's scale, T' odd -> (B, 3, 4 (T' - 1) + 1, 8 h, 8 w), about [-1, 1].

        Raises:
            SettingsError: T' is even.
        """
        if torch.is_grad_enabled():
            return torch.cat(list(self.decode_groups(z)), dim=2)
        self.check_latents(z)
        grid = self.grid
        size = (grid.num_frames(z.shape[2]), *(side * grid.spatial for side in z.shape[3:]))
        out = z.new_empty(len(z), self.config.in_channels, *size)
        done = 0
        for part in self.decode_groups(z):
            out[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
        return out

    def decode_groups(self, z: Tensor) -> Generator[Tensor, None, None]:
        """:meth:`decode`, group by group in order, each (B, 3, n, 8 h, 8 w), with nothing but the last frames of each
        layer kept between two. What one video leaves behind never meets the next one."""
        self.check_latents(z)
        past: Past = {}
        for group in groups(z.shape[2], GROUP):
            yield self.decoder(fast_layout(z[:, :, group]), past)

    def check_latents(self, z: Tensor) -> None:
        """Raise SettingsError for latents that are no video's."""
        self._check(z, self.config.latent_channels, "latents")
        if z.shape[2] % GROUP == 0:
            raise SettingsError(
                "The number of latent frames cannot be decoded",
                given=f"{z.shape[2]} latent frames",
                expected="an odd number: the first one, and pairs",
                do=f"use {z.shape[2] - 1} or {z.shape[2] + 1}; of a CogVideoX 1.5 sample, leave out the first one",
            )

    @staticmethod
    def _check(x: Tensor, channels: int, name: str) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise SettingsError(
                f"The {name} cannot be used",
                given=f"a tensor of shape {tuple(x.shape)}",
                expected=f"(batch, {channels}, frames, height, width), none of them 0",
            )


def grid_of(config: CodecConfig) -> Grid:
    """How many pixels and frames one latent stands for."""
    return Grid(
        channels=config.latent_channels,
        spatial=config.spatial_compression,
        temporal=config.temporal_compression,
        group=GROUP,
    )
