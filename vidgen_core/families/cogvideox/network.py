"""CogVideoX's diffusion transformer: 2B, 5B, 5B-I2V, both of version 1.5 and Fun-InP, from a toy to published sizes.

Video and text tokens are one stream and attend to each other without a mask. A vector made of the time shifts, scales
and gates every block, the two kinds of tokens each in its own way. Sources: the CogVideo repository
(``sat/dit_video_concat.py``) and arXiv:2408.06072.

Modules carry the names of the official checkpoint's layers, gathered block by block. The order of tokens is the only
liberty taken: video first, as everywhere in this program; attention does not mind.

Shapes: B batch, L video tokens, M text tokens, N = L + M, D hidden size, E width of the time's vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SettingsError
from ...nn.attention import attention
from ...nn.embeddings import patchify, timestep_embedding, unpatchify
from ...nn.norms import overwrites
from ...nn.rope import apply_rope, rope_table, time_stretch
from .config import NetworkConfig

NORM_EPS = 1e-5
"""of the blocks' norms and the one after them"""
FINE_EPS = 1e-6
"""of queries, keys and the output layer's norm. diffusers has 1e-5 in the output layer, 4e-6 of its result away."""


@dataclass(frozen=True, slots=True)
class _Context:
    """What every block is told."""

    vec: Tensor
    """(B, E) after SiLU"""
    rope: Tensor | None
    """rotations of the N joint tokens; text is not rotated"""
    mask: Tensor | None
    """(B, 1, 1, N) bool, true for tokens that may be looked at; None: all"""
    num_video: int
    """L"""
    grid: tuple[int, int, int]
    """video tokens along (frames, rows, columns)"""

    def of_part(self, take: Callable[[Tensor], Tensor]) -> _Context:
        """For some of the video tokens: ``take`` (L, ...) -> (L', ...). The mask stays that of all tokens."""
        tokens = torch.arange(self.num_video) if self.rope is None else self.rope[: self.num_video]
        part = take(tokens)
        rope = None if self.rope is None else torch.cat([part, self.rope[self.num_video :]])
        return replace(self, rope=rope, num_video=len(part))


class PatchConv2d(nn.Conv2d):
    """A convolution whose kernel equals its stride, computed as one matrix product."""

    def __init__(self, in_channels: int, hidden_size: int, patch: tuple[int, int]) -> None:
        super().__init__(in_channels, hidden_size, kernel_size=patch, stride=patch)
        self.patch = patch

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, hidden_size, H / ph, W / pw), as any convolution; a view of the tokens."""
        tokens = F.linear(patchify(input.unsqueeze(2), (1, *self.patch)), self.weight.flatten(1), self.bias)
        grid = [size // step for size, step in zip(input.shape[2:], self.patch, strict=True)]
        return tokens.transpose(1, 2).unflatten(2, grid)


class PatchEmbed(nn.Module):
    """Latents and text states to tokens, with the trained table of positions where there is one."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.patch = config.patch
        frames, rows, columns = config.patch
        if frames == 1:
            self.proj = PatchConv2d(config.in_channels, config.hidden_size, (rows, columns))
        else:
            self.proj = nn.Linear(config.in_channels * frames * rows * columns, config.hidden_size)
        self.text_proj = nn.Linear(config.text_width, config.hidden_size)
        self.pos_embedding = None
        if config.positions == "learned":
            num_tokens = config.text_length + _volume(config.trained_grid)
            self.pos_embedding = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))

    def video(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, L, D); frames are outermost, then rows, then columns."""
        if isinstance(self.proj, nn.Linear):
            return self.proj(patchify(x, self.patch))
        frames = self.proj(x.transpose(1, 2).flatten(0, 1))
        return frames.flatten(2).transpose(1, 2).unflatten(0, (x.shape[0], -1)).flatten(1, 2)


class Block(nn.Module):
    """Attention and MLP over the joint tokens, each shifted, scaled and gated by the time."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads = config.num_heads
        # For each of attention and MLP: shift, scale and gate of the video, then of the text.
        self.adaLN_modulation = nn.Linear(config.time_width, 12 * width)
        self.input_layernorm = nn.LayerNorm(width, eps=NORM_EPS)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.query_layernorm = nn.LayerNorm(head, eps=FINE_EPS)
        self.key_layernorm = nn.LayerNorm(head, eps=FINE_EPS)
        self.dense = nn.Linear(width, width)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dense_h_to_4h = nn.Linear(width, int(width * config.mlp_ratio))
        self.dense_4h_to_h = nn.Linear(int(width * config.mlp_ratio), width)

    def forward(self, x: Tensor, context: _Context) -> Tensor:
        """x (B, N, D), video first -> the same."""
        # (12, B, 1, D)
        told = self.adaLN_modulation(context.vec).unflatten(1, (12, 1, -1)).movedim(1, 0)
        num_video = context.num_video
        normed = _modulated(self.input_layernorm(x), told[0:2], told[3:5], num_video)
        x = _gated_add(x, told[2], told[5], self._attended(normed, context), num_video)
        normed = _modulated(self.post_attention_layernorm(x), told[6:8], told[9:11], num_video)
        return _gated_add(x, told[8], told[11], self._mlp(normed), num_video)

    def _attended(self, x: Tensor, context: _Context) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.query_layernorm(q), self.key_layernorm(k)
        if context.rope is not None:
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        heads = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=context.mask)
        return self.dense(heads.transpose(1, 2).flatten(2))

    def _mlp(self, x: Tensor) -> Tensor:
        inner = self.dense_h_to_4h(x)
        if overwrites():  # nobody keeps it, and it is the largest tensor of a block
            return self.dense_4h_to_h(torch.ops.aten.gelu_(inner, approximate="tanh"))
        return self.dense_4h_to_h(F.gelu(inner, approximate="tanh"))


def _modulated(x: Tensor, of_video: Tensor, of_text: Tensor, num_video: int) -> Tensor:
    """x * (1 + scale) + shift; ``x`` (B, N, D) is a norm's result that nobody keeps, the others (shift, scale)."""
    parts = (x[:, :num_video], x[:, num_video:])
    told = ((shift, 1 + scale) for shift, scale in (of_video, of_text))
    if not overwrites():
        return torch.cat([torch.addcmul(s, part, g) for part, (s, g) in zip(parts, told, strict=True)], dim=1)
    for part, (shift, factor) in zip(parts, told, strict=True):
        torch.addcmul(shift, part, factor, out=part)
    return x


def _gated_add(x: Tensor, of_video: Tensor, of_text: Tensor, update: Tensor, num_video: int) -> Tensor:
    """x + gate * update, in place of ``update`` where nobody keeps that."""
    parts = [(x[:, :num_video], update[:, :num_video], of_video), (x[:, num_video:], update[:, num_video:], of_text)]
    if not overwrites():
        return torch.cat([torch.addcmul(part, new, gate) for part, new, gate in parts], dim=1)
    for part, new, gate in parts:
        torch.addcmul(part, new, gate, out=new)
    return update


class FinalLayer(nn.Module):
    """Tokens to patches."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_final = nn.LayerNorm(width, eps=FINE_EPS)
        self.linear = nn.Linear(width, _volume(config.patch) * config.out_channels)
        self.adaLN_modulation = nn.Linear(config.time_width, 2 * width)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (B, L, D), vec (B, E) after SiLU -> (B, L, prod(patch) * out_channels)."""
        shift, scale = self.adaLN_modulation(vec).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


def _embedder(width: int, time_width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width))


class CogVideoXTransformer(nn.Module):
    """Noisy latents, time and text in; v out. See :meth:`forward`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.time_embed = _embedder(config.hidden_size, config.time_width)
        self.ofs_embed = _embedder(config.time_width, config.time_width) if config.offset_embed else None
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """Predict v.

        Args:
            x: (B, in_channels, T, H, W) noisy latents, with those of a given picture behind them on the channels; for
                networks that fill in with a mask and the latents of the video with gaps.
            timestep: (B,) entry of the noise table, 0 to 999.
            context: (B, M, text_width) text states; padded ones count like any others.
            context_mask: (B, M) bool, for texts that do not come at their full length; None: every token is looked at.
            offset: (B,), for networks with ``offset_embed``.

        Returns:
            (B, out_channels, T, H, W) in the network's dtype.

        Raises:
            SettingsError: a shape that does not fit.
        """
        self._check_inputs(x, context, offset)
        dtype = self.patch_embed.text_proj.weight.dtype
        grid = self._grid(x)
        video, text = self.patch_embed.video(x.to(dtype)), self.patch_embed.text_proj(context.to(dtype))
        video, text = self._placed(video, text, grid)
        block_context = _Context(
            vec=self._vector(timestep, offset, dtype),
            rope=self._rope(grid, text.shape[1], x.device),
            mask=None
            if context_mask is None
            else F.pad(context_mask.bool(), (video.shape[1], 0), value=True)[:, None, None, :],
            num_video=video.shape[1],
            grid=grid,
        )
        out = self.final_layernorm(self.through_blocks(video, text, block_context))
        return unpatchify(self.final_layer(out, block_context.vec), grid, self.config.patch)

    def through_blocks(self, video: Tensor, text: Tensor, context: _Context) -> Tensor:
        """video (B, L, D), text (B, M, D) -> video. What concerns the joint tokens stands around it:
        ``nn.joint_blocks``."""
        joint = torch.cat([video, text], dim=1)
        for block in self.layers:
            joint = block(joint, context)
        return joint[:, : video.shape[1]]

    def _vector(self, timestep: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, E) after SiLU."""
        vec = self.time_embed(timestep_embedding(timestep, self.config.hidden_size).to(dtype))
        if self.ofs_embed is not None:
            assert offset is not None, "checked before"
            vec = vec + self.ofs_embed(timestep_embedding(offset, self.config.time_width).to(dtype))
        return F.silu(vec)

    def _placed(self, video: Tensor, text: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """With the table of positions added, where the network has one."""
        if self.config.positions == "sincos":
            trained = self.config.trained_grid if self.config.sincos_fit == "stretch" else None
            table = sincos_table(
                grid, self.config.hidden_size, self.config.sincos_scale, device=video.device, trained=trained
            )
            return video + table.to(video.dtype), text
        table = self.patch_embed.pos_embedding
        if table is None:
            return video, text
        table, length = table.to(video.dtype), self.config.text_length
        return video + table[:, length : length + video.shape[1]], text + table[:, :length]

    def _rope(self, grid: tuple[int, int, int], num_text: int, device: torch.device) -> Tensor | None:
        if self.config.positions == "sincos":
            return None
        return rope_table(
            grid,
            self.config.rope_axes,
            self.config.rope_theta,
            num_plain=num_text,
            device=device,
            stretch=time_stretch(),
            spans=fitted_spans(grid, self.config.trained_grid) if self.config.rope_fit == "resize" else None,
        )

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns)."""
        pt, ph, pw = self.config.patch
        return x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw

    def _check_inputs(self, x: Tensor, context: Tensor, offset: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise SettingsError(
                "The latents do not fit this network",
                given=f"shape {tuple(x.shape)}",
                expected=f"(batch, {config.in_channels} channels, frames, height, width)",
                do="stack the noisy latents and those of the picture on the channels"
                if config.takes_image
                else "check that VAE and network belong together",
            )
        for name, size, step in zip(("frames", "height", "width"), x.shape[2:], config.patch, strict=True):
            if size < 1 or size % step:
                raise SettingsError(
                    f"The latents' {name} cannot be cut into patches",
                    given=size,
                    expected=f"a positive multiple of {step}",
                    do=f"use {max(step, -(-size // step) * step)}",
                )
        if context.ndim != 3 or context.shape[2] != config.text_width:
            raise SettingsError(
                "The text states do not fit this network",
                given=f"shape {tuple(context.shape)}",
                expected=f"(batch, tokens, {config.text_width})",
                do="load the text encoder that belongs to this checkpoint (T5-XXL)",
            )
        if config.offset_embed and offset is None:
            raise SettingsError("This network must be told an offset", expected="offset (2.0) for each sample")
        self._check_size(self._grid(x), context.shape[1])

    def _check_size(self, grid: tuple[int, int, int], num_text: int) -> None:
        """A trained table serves the trained size alone, and fewer frames of it; counting ends where the table did.
        A stretched one has its number of frames."""
        config, trained = self.config, self.config.trained_grid
        unit = [8 * step for step in config.patch[1:]]
        size = f"{grid[2] * unit[1]} x {grid[1] * unit[0]} px"
        limit = f"{trained[2] * unit[1]} x {trained[1] * unit[0]} px"
        if config.positions == "learned" and (grid[1:] != trained[1:] or grid[0] > trained[0]):
            raise SettingsError(
                "This network was trained for one size of video and knows no other",
                given=f"{size}, {grid[0]} latent frames",
                expected=f"{limit}, at most {trained[0]} latent frames",
                do=f"use {limit} and {4 * trained[0] - 3} frames",
            )
        if config.positions == "sincos" and config.sincos_fit == "stretch" and grid[0] > trained[0]:
            raise SettingsError(
                "This network knows no longer video than it was trained for",
                given=f"{grid[0]} latent frames",
                expected=f"at most {trained[0]}",
                do=f"use {4 * trained[0] - 3} frames",
            )
        if config.positions == "learned" and num_text != config.text_length:
            raise SettingsError(
                "This network has a place for each text token",
                given=f"{num_text} tokens",
                expected=f"{config.text_length} tokens, padded ones included",
            )
        if (
            config.positions != "sincos"
            and config.rope_fit == "slice"
            and (grid[1] > trained[1] or grid[2] > trained[2])
        ):
            raise SettingsError(
                "The video is larger than this network can tell positions apart",
                given=size,
                expected=f"at most {limit}",
                do="make it smaller",
            )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start values for training from scratch.

        Every modulation and the output layer start at zero, so each block begins as the identity and the first
        prediction is 0 (adaLN-zero). Embedders of numbers and the trained table are normal with deviation 0.02,
        everything else Xavier uniform, biases zero, norms one.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith(("time_embed", "ofs_embed")):
                    nn.init.normal_(module.weight, std=0.02, generator=generator)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if self.patch_embed.pos_embedding is not None:
            nn.init.normal_(self.patch_embed.pos_embedding, std=0.02, generator=generator)


# --- positions --------------------------------------------------------------------------------------------------------


def fitted_spans(
    grid: tuple[int, int, int], trained: tuple[int, int, int]
) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
    """(first, end) of the positions along frames, rows and columns: the largest area of this shape in the middle of
    the trained one. Frames count on."""
    rows, columns = trained[1:]
    height, width = grid[1:]
    if height / width > rows / columns:
        size = rows, round(rows / height * width)
    else:
        size = round(columns / width * height), columns
    starts = [round((whole - part) / 2) for whole, part in zip((rows, columns), size, strict=True)]
    spans = [(float(start), float(start + part)) for start, part in zip(starts, size, strict=True)]
    return (0.0, float(grid[0])), spans[0], spans[1]


@lru_cache(maxsize=4)
def sincos_table(
    grid: tuple[int, int, int],
    width: int,
    scale: float,
    *,
    device: torch.device,
    trained: tuple[int, int, int] | None = None,
) -> Tensor:
    """The fixed table of 2B: a quarter of the channels for frames, then as many for columns as for rows.

    Args:
        trained: the grid whose rows and columns are stretched to those of ``grid``; None goes on counting.

    Returns:
        float32 (1, L, width).
    """
    with torch.inference_mode(False), torch.no_grad():
        frames, rows, columns = grid
        time, space = width // 4, 3 * width // 8
        known_rows, known_columns = grid[1:] if trained is None else trained[1:]
        across = _sinusoids(torch.arange(known_columns, dtype=torch.float32) / scale, space)
        down = _sinusoids(torch.arange(known_rows, dtype=torch.float32) / scale, space)
        parts = [
            _sinusoids(torch.arange(frames), time)[:, None, None, :],
            _stretched(across, columns)[None, None, :, :],
            _stretched(down, rows)[None, :, None, :],
        ]
        table = torch.cat([part.expand(frames, rows, columns, -1) for part in parts], dim=-1)
        return table.flatten(0, 2).unsqueeze(0).float().to(device)


def _sinusoids(positions: Tensor, channels: int) -> Tensor:
    """(P,) -> float64 (P, channels), sines first."""
    half = channels // 2
    angles = torch.outer(positions.double(), 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _stretched(table: Tensor, length: int) -> Tensor:
    """(P, channels) -> (length, channels), linear between neighbours."""
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], size=length, mode="linear", align_corners=False)[0].T


def _volume(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def _check_config(config: NetworkConfig) -> None:
    head, rest = divmod(config.hidden_size, config.num_heads)
    if rest or sum(config.rope_axes) != head or any(axis % 2 for axis in config.rope_axes):
        raise SettingsError(
            "The network's dimensions do not fit together",
            given=f"hidden_size {config.hidden_size}, {config.num_heads} heads, rope_axes {config.rope_axes}",
            expected="even rope_axes that add up to hidden_size / num_heads",
        )
    if config.positions == "sincos" and config.hidden_size % 16:
        raise SettingsError(
            "The network's width cannot be divided among the axes of its positions",
            given=f"hidden_size {config.hidden_size}",
            expected="a multiple of 16",
        )
