"""HunyuanVideo's causal 3-D VAE: video <-> latents, one file read from top to bottom.

Every module carries the name it has in the official checkpoint, so a state dict loads without a key map.
Source: Tencent's HunyuanVideo repository (``hyvideo/vae``), the published ``884-16c-hy0801``: 8 x 8 pixels and
4 frames to one latent of 16 channels, the first frame on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...errors import SettingsError
from ...nn.attention import attention
from ...nn.causal_conv import CausalConv3d, Steps, UpsampledCausalConv3d
from ...nn.convolution import PART_OPERATIONS, Conv3d, fast_layout
from ...nn.group_norm import GroupNorm, GroupNormSiLU
from ...types import Grid, VideoShape
from .config import CodecConfig

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)
PART_BYTES = 1 << 26
"""Without gradients, larger tensors are normalised, padded and convolved a few frames at a time."""


def _norm(config: CodecConfig, channels: int) -> GroupNormSiLU:
    return GroupNormSiLU(config.num_groups, channels, eps=NORM_EPS)


def _frames_at_once(x: Tensor) -> int:
    """Into how many frames at a time a layer cuts ``x``: all of them in training and where they are small."""
    if torch.is_grad_enabled():
        return x.shape[2]
    channels, numbers = x.shape[1], x[:, :, 0].numel()
    frames = PART_BYTES // (numbers * x.element_size())
    if x.device.type in ("cpu", "meta"):
        frames = min(frames, int(PART_OPERATIONS / (2 * 27 * channels * numbers)))
    return max(1, frames)


def _normed_conv(norm: GroupNormSiLU, conv: CausalConv3d, x: Tensor) -> Tensor:
    num_frames = _frames_at_once(x)
    if num_frames >= x.shape[2]:
        return conv(norm(x))
    return conv.stream(x, norm.by_frames(x, num_frames), num_frames)


class ResnetBlock(nn.Module):
    """(B, C, T, H, W) -> (B, C', T, H, W)."""

    def __init__(self, config: CodecConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = _norm(config, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = _normed_conv(self.norm1, self.conv1, x)
        h = _normed_conv(self.norm2, self.conv2, h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return h + x if torch.is_grad_enabled() else h.add_(x)


class FrameCausalAttention(nn.Module):
    """One head over all positions; a position sees the frames up to and including its own."""

    def __init__(self, config: CodecConfig, channels: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(config.num_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        num_frames, height, width = x.shape[2:]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, T H W, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        # One call per frame over the keys so far: half the work of a masked call and no (T H W)^2 mask.
        area = height * width
        seen = [
            attention(frame, k[:, :, : (i + 1) * area], v[:, :, : (i + 1) * area])
            for i, frame in enumerate(q.split(area, dim=2))
        ]
        out = self.to_out[0](torch.cat(seen, dim=2)).squeeze(1)
        return x + out.transpose(1, 2).unflatten(2, (num_frames, height, width))


class MidBlock(nn.Module):
    """Residual block, attention (optional), residual block, at the coarsest level."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        channels = config.block_channels[-1]
        self.attentions = nn.ModuleList([FrameCausalAttention(config, channels)] if config.mid_attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, channels) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Strided causal convolution: T -> ceil(T / 2) where time shrinks, so 2n + 1 frames -> n + 1."""

    def __init__(self, channels: int, steps: Steps) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=steps)

    def forward(self, x: Tensor) -> Tensor:
        num_frames = _frames_at_once(x)
        return self.conv(x) if num_frames >= x.shape[2] else self.conv.stream(x, lambda frames: frames, num_frames)


class Upsample(nn.Module):
    """Nearest neighbour, then a causal convolution: T -> 2 T - 1 where time grows (the first frame stays single)."""

    def __init__(self, channels: int, steps: Steps) -> None:
        super().__init__()
        self.conv = UpsampledCausalConv3d(channels, channels, steps)

    def forward(self, x: Tensor) -> Tensor:
        num_frames = _frames_at_once(x)
        return self.conv(x) if num_frames >= x.shape[2] else self.conv.stream(x, num_frames)


class DownBlock(nn.Module):
    """One level of the encoder. Its layers are called from outside, so that nobody holds on to the level's input."""

    def __init__(self, config: CodecConfig, in_channels: int, out_channels: int, steps: Steps) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.layers_per_block
        self.resnets = nn.ModuleList([ResnetBlock(config, a, b) for a, b in zip(widths, widths[1:], strict=False)])
        self.downsamplers = nn.ModuleList([Downsample(out_channels, steps)] if max(steps) > 1 else [])

    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.resnets, *self.downsamplers)


class UpBlock(nn.Module):
    """One level of the decoder; see :class:`DownBlock`."""

    def __init__(self, config: CodecConfig, in_channels: int, out_channels: int, steps: Steps) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (config.layers_per_block + 1)
        self.resnets = nn.ModuleList([ResnetBlock(config, a, b) for a, b in zip(widths, widths[1:], strict=False)])
        self.upsamplers = nn.ModuleList([Upsample(out_channels, steps)] if max(steps) > 1 else [])

    def layers(self) -> Iterator[nn.Module]:
        yield from (*self.resnets, *self.upsamplers)


def _layers(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    for block in blocks:
        assert isinstance(block, (DownBlock, UpBlock))
        yield from block.layers()


class Encoder(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.block_channels
        self.conv_in = CausalConv3d(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(config, a, b, steps)
                for a, b, steps in zip((widths[0], *widths), widths, level_steps(config), strict=False)
            ]
        )
        self.mid_block = MidBlock(config)
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in _layers(self.down_blocks):
            x = layer(x)
        x = self.mid_block(x)
        return _normed_conv(self.conv_norm_out, self.conv_out, x)


class Decoder(nn.Module):
    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        widths = config.block_channels[::-1]
        self.conv_in = CausalConv3d(config.latent_channels, widths[0])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(config, a, b, steps)
                for a, b, steps in zip((widths[0], *widths), widths, level_steps(config), strict=False)
            ]
        )
        self.conv_norm_out = _norm(config, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.in_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for layer in _layers(self.up_blocks):
            x = layer(x)
        return _normed_conv(self.conv_norm_out, self.conv_out, x)


def level_steps(config: CodecConfig) -> list[Steps]:
    """(T, H, W) factors of each level, in the order of execution, the same for encoder and decoder.

    Space changes in the first levels; time in the last ones before the final level, which never changes it.

    Raises:
        SettingsError: more halvings than levels, or a compression that is no power of two.
    """
    num_levels = len(config.block_channels)
    num_space, num_time = _log2(config.spatial_compression), _log2(config.temporal_compression)
    if num_space > num_levels or num_time > num_levels - 1:
        raise SettingsError(
            "The codec has too few levels for its compression",
            given=f"{num_levels} levels for {config.spatial_compression} px and {config.temporal_compression} frames",
            expected="one level for each halving of space, and one more level than halvings of time",
            do="add a level to block_channels or lower the compression",
        )
    last = num_levels - 1
    steps = []
    for level in range(num_levels):
        time = 2 if last - num_time <= level < last else 1
        space = 2 if level < num_space else 1
        steps.append((time, space, space))
    return steps


def _log2(compression: int) -> int:
    if compression < 1 or compression & (compression - 1):
        raise SettingsError(
            "The compression of the codec cannot be used", given=compression, expected="a power of two: 1, 2, 4, 8, ..."
        )
    return int(math.log2(compression))


def _check_widths(config: CodecConfig) -> None:
    widths = config.block_channels
    if not widths or any(width < 1 or width % config.num_groups for width in widths):
        raise SettingsError(
            "The widths of the codec cannot be used",
            given=f"block_channels {tuple(widths)} with num_groups {config.num_groups}",
            expected="at least one level, and every width a multiple of num_groups",
        )


class CausalVAE(nn.Module):
    """The whole codec at the VAE's own scale; :class:`HunyuanCodec` adds the scaling."""

    def __init__(self, config: CodecConfig) -> None:
        _check_widths(config)
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv3d(config.latent_channels, config.latent_channels, 1)

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        config = self.config
        return Grid(
            channels=config.latent_channels, spatial=config.spatial_compression, temporal=config.temporal_compression
        )

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance, each (B, C, T', H / 8, W / 8), in one pass.

        Raises:
            SettingsError: T is not 4 n + 1, or H or W is not a multiple of 8.
        """
        self._check(video, self.config.in_channels, "video")
        VideoShape(num_frames=video.shape[2], height_px=video.shape[3], width_px=video.shape[4]).check(self.grid)
        return self.moments(self.quant_conv(self.encoder(fast_layout(video))))

    @staticmethod
    def moments(encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What ``quant_conv`` makes, (B, 2 C, T', H', W') -> mean and log variance."""
        mean, logvar = encoded.contiguous().chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, T, H, W) latents at the VAE's scale -> (B, 3, 4 (T - 1) + 1, 8 H, 8 W), about [-1, 1]; one pass."""
        self._check(z, self.config.latent_channels, "latents")
        return self.decoder(self.post_quant_conv(fast_layout(z))).contiguous()

    @staticmethod
    def _check(x: Tensor, channels: int, name: str) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise SettingsError(
                f"The {name} cannot be used",
                given=f"a tensor of shape {tuple(x.shape)}",
                expected=f"(batch, {channels}, frames, height, width), none of them 0",
            )
