"""HunyuanVideo's diffusion transformer, from the 1 M toy to the published 13 B.

Video and text tokens first run as two streams that attend jointly (double blocks), then as one (single blocks).
A vector made of the time, the pooled text and, for distilled checkpoints, the guidance scale shifts, scales and gates
every block. Module names are those of the published checkpoints. Source: Tencent's ``hyvideo/modules/models.py``.

Shapes: B batch, L video tokens, M text tokens, D hidden size, F vectors per sample (1, or one per latent frame).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import SettingsError
from ...nn.attention import attention
from ...nn.embeddings import PatchEmbed, TimestepEmbedder, unpatchify
from ...nn.modulation import Modulation, gated_add, modulate
from ...nn.norms import RMSNorm, layer_norm, overwrites
from ...nn.rope import apply_rope, rope_table, time_stretch
from .config import NetworkConfig

NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class _Context:
    """What every block is told."""

    vec: Tensor
    """(B, 1, D) after SiLU: for text tokens, and for video tokens unless they have their own"""
    frame_vec: Tensor
    """(B, F, D) after SiLU: for video tokens"""
    rope: Tensor
    """rotations of the L + M joint tokens; text is not rotated"""
    mask: Tensor | None
    """(B, 1, 1, L + M) bool, true for tokens that may be looked at"""
    num_video: int
    """L"""
    grid: tuple[int, int, int]
    """video tokens along (frames, rows, columns)"""

    def of_part(self, take: Callable[[Tensor], Tensor]) -> _Context:
        """For some of the video tokens: ``take`` (L, ...) -> (L', ...). The mask stays that of all tokens."""
        video, text = self.rope.tensor_split([self.num_video])
        part = take(video)
        return replace(self, rope=torch.cat([part, text]), num_video=len(part))


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 * D), rows ordered [q | k | v] -> three (B, L, heads, d)."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return q, k, v


def _projected(
    x: Tensor, linear: nn.Module, q_norm: nn.Module, k_norm: nn.Module, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, D) -> normalised queries and keys, and values, each (B, L, heads, d)."""
    q, k, v = _heads(linear(x), num_heads)
    return q_norm(q), k_norm(k), v


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, heads, d) each -> (B, L, D)."""
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation; without gradients in place, as ``x`` is a layer's output that nobody keeps."""
    if overwrites():
        return torch.ops.aten.gelu_(x, approximate="tanh")
    return F.gelu(x, approximate="tanh")


class VectorEmbedder(nn.Module):
    """The pooled text (B, P) -> (B, D)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(width, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class TextProjection(nn.Module):
    """The mean of the text tokens (B, text_width) -> (B, D)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class RefinerBlock(nn.Module):
    """Self-attention over the text, gated but neither shifted nor scaled; queries and keys are not normalised."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.self_attn_qkv = nn.Linear(width, 3 * width)
        self.self_attn_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * config.mlp_ratio), F.silu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        gate_attn, gate_mlp = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        q, k, v = _heads(self.self_attn_qkv(self.norm1(x)), self.num_heads)
        x = gated_add(x, gate_attn, self.self_attn_proj(_attend(q, k, v, mask)))
        return gated_add(x, gate_mlp, self.mlp(self.norm2(x)))


class IndividualTokenRefiner(nn.Module):
    """Holds the blocks; exists for the checkpoints' names."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.num_refiner_blocks))

    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, c, mask)
        return x


class TokenRefiner(nn.Module):
    """Text states -> text tokens: a small bidirectional transformer told the time and the mean of the text."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_width, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.c_embedder = TextProjection(config.text_width, config.hidden_size)
        self.individual_token_refiner = IndividualTokenRefiner(config)

    def forward(self, context: Tensor, timestep: Tensor, mask: Tensor | None) -> Tensor:
        """context (B, M, text_width), timestep (B,), mask (B, M) bool -> (B, M, D)."""
        c = self.t_embedder(timestep) + self.c_embedder(_masked_mean(context, mask))
        keys = None
        if mask is not None:
            # Token 0 is always visible: a prompt without any token must not divide zero by zero in the softmax.
            # Padded rows look at the real tokens here; nothing ever looks at a padded row.
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            keys = (mask | first)[:, None, None, :]
        return self.individual_token_refiner(self.input_embedder(context), c, keys)


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens: (B, M, D), (B, M) -> (B, D); zero when there is none."""
    if mask is None:
        return x.mean(dim=1)
    weight = mask.float()
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.bmm(weight.unsqueeze(1), x.float()).squeeze(1).to(x.dtype)


class DoubleBlock(nn.Module):
    """Two streams with weights of their own that meet in one attention."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.hidden_size // config.num_heads
        hidden = int(width * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.img_mod = Modulation(width, 6)
        self.img_attn_qkv = nn.Linear(width, 3 * width)
        self.img_attn_q_norm = RMSNorm(head, eps=NORM_EPS)
        self.img_attn_k_norm = RMSNorm(head, eps=NORM_EPS)
        self.img_attn_proj = nn.Linear(width, width)
        self.img_mlp = MLP(width, hidden, gelu_tanh)
        self.txt_mod = Modulation(width, 6)
        self.txt_attn_qkv = nn.Linear(width, 3 * width)
        self.txt_attn_q_norm = RMSNorm(head, eps=NORM_EPS)
        self.txt_attn_k_norm = RMSNorm(head, eps=NORM_EPS)
        self.txt_attn_proj = nn.Linear(width, width)
        self.txt_mlp = MLP(width, hidden, gelu_tanh)

    def forward(self, img: Tensor, txt: Tensor, context: _Context) -> tuple[Tensor, Tensor]:
        """img (B, L, D), txt (B, M, D) -> the same."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = self.img_mod(context.frame_vec)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt_mod(context.vec)

        i_out, t_out = self._attended(_normed(img, i_shift1, i_scale1), _normed(txt, t_shift1, t_scale1), context)
        img = gated_add(img, i_gate1, self.img_attn_proj(i_out))
        img = gated_add(img, i_gate2, self.img_mlp(_normed(img, i_shift2, i_scale2)))
        txt = gated_add(txt, t_gate1, self.txt_attn_proj(t_out))
        txt = gated_add(txt, t_gate2, self.txt_mlp(_normed(txt, t_shift2, t_scale2)))
        return img, txt

    def _attended(self, img: Tensor, txt: Tensor, context: _Context) -> tuple[Tensor, ...]:
        """What each stream sees. On its own, so that queries, keys and values are gone when the MLPs run."""
        streams = (
            _projected(img, self.img_attn_qkv, self.img_attn_q_norm, self.img_attn_k_norm, self.num_heads),
            _projected(txt, self.txt_attn_qkv, self.txt_attn_q_norm, self.txt_attn_k_norm, self.num_heads),
        )
        sizes = [img.shape[1], txt.shape[1]]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(*streams, strict=True))
        del streams
        q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        return _attend(q, k, v, context.mask).split(sizes, dim=1)


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalised and modulated in float32, then back in the dtype of ``x``."""
    return modulate(layer_norm(x, eps=NORM_EPS), shift, scale, in_place=overwrites()).to(x.dtype)


class SingleBlock(nn.Module):
    """One stream; attention and MLP run in parallel between two fused projections."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width, head = config.hidden_size, config.hidden_size // config.num_heads
        hidden = int(width * config.mlp_ratio)
        self.num_heads = config.num_heads
        self.split = [3 * width, hidden]
        self.linear1 = nn.Linear(width, 3 * width + hidden)
        self.linear2 = nn.Linear(width + hidden, width)
        self.q_norm = RMSNorm(head, eps=NORM_EPS)
        self.k_norm = RMSNorm(head, eps=NORM_EPS)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, context: _Context) -> Tensor:
        """x (B, L + M, D), video first -> the same."""
        if context.frame_vec is context.vec:
            shift, scale, gate = self.modulation(context.vec)
            return gated_add(x, gate, self.update(_normed(x, shift, scale), context))
        sizes = [context.num_video, x.shape[1] - context.num_video]
        img, txt = x.split(sizes, dim=1)
        i_shift, i_scale, i_gate = self.modulation(context.frame_vec)
        t_shift, t_scale, t_gate = self.modulation(context.vec)
        joint = torch.cat([_normed(img, i_shift, i_scale), _normed(txt, t_shift, t_scale)], dim=1)
        i_out, t_out = self.update(joint, context).split(sizes, dim=1)
        return torch.cat([gated_add(img, i_gate, i_out), gated_add(txt, t_gate, t_out)], dim=1)

    def update(self, x: Tensor, context: _Context) -> Tensor:
        width, inner = x.shape[-1], self.linear1(x)
        qkv, mlp = inner.split(self.split, dim=-1)
        attended = self._attended(qkv, context)
        mlp = gelu_tanh(mlp)
        if not overwrites():
            return self.linear2(torch.cat([attended, mlp], dim=-1))
        # The values were used: what was attended takes their place, beside the MLP, and nothing is copied together.
        inner[..., 2 * width : 3 * width] = attended
        return self.linear2(inner.flatten(0, 1)[:, 2 * width :]).unflatten(0, x.shape[:2])

    def _attended(self, qkv: Tensor, context: _Context) -> Tensor:
        q, k, v = _heads(qkv, self.num_heads)
        q = apply_rope(self.q_norm(q), context.rope)
        k = apply_rope(self.k_norm(k), context.rope)
        return _attend(q, k, v, context.mask)


class FinalLayer(nn.Module):
    """Tokens to patches. One vector per sample here, also when frames have times of their own."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        pt, ph, pw = config.patch
        self.linear = nn.Linear(config.hidden_size, pt * ph * pw * config.out_channels)
        # Index 1 is the checkpoints' name; the SiLU at index 0 was applied to ``vec`` once for all blocks.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 2 * config.hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x (B, L, D), vec (B, 1, D) after SiLU -> (B, L, prod(patch) * out_channels)."""
        # This layer may be kept in float32 in a network of another dtype.
        dtype = self.linear.weight.dtype
        shift, scale = self.adaLN_modulation[1](vec.to(dtype)).chunk(2, dim=-1)
        return self.linear(_normed(x.to(dtype), shift, scale))


class HunyuanVideoTransformer(nn.Module):
    """Noisy latents, time and text in; the flow (noise minus data) out. See :meth:`forward`."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        width = config.hidden_size
        self.img_in = PatchEmbed(config.in_channels, width, config.patch)
        self.txt_in = TokenRefiner(config)
        self.time_in = TimestepEmbedder(width)
        self.vector_in = VectorEmbedder(config.pooled_width, width)
        self.guidance_in = TimestepEmbedder(width) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_blocks))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow.

        Args:
            x: (B, in_channels, T, H, W) noisy latents, with the conditioning channels of a latent-concat network.
            timestep: 0 (clean) to 1000 (noise), need not be whole numbers. (B,), or (B, T) with a time per latent
                frame: frames at exactly 0 are given (they are also not told the guidance), and the text, its
                refiner and the output layer hear the latest time of the sample. A token-replace network that is
                given (B,) takes latent frame 0 as given.
            context: (B, M, text_width) text states, real tokens first.
            context_mask: (B, M) bool, true for real tokens; None when nothing is padded.
            pooled: (B, pooled_width).
            guidance: (B,) guidance scale for networks with ``guidance_embed``; others ignore it.

        Returns:
            (B, out_channels, T, H, W) in the network's dtype.

        Raises:
            SettingsError: a shape that does not fit, or guidance missing where it is needed.
        """
        self._check_inputs(x, timestep, context, pooled)
        assert pooled is not None
        dtype = self.img_in.proj.weight.dtype
        grid = self._grid(x)
        time, frame_times = self._times(timestep, x.shape[2])
        mask = None if context_mask is None else context_mask.bool()

        # Under autocast these come out narrower than the weights; the residual streams keep the weights' precision.
        img = self.img_in(x.to(dtype)).to(dtype)
        txt = self.txt_in(context.to(dtype), time, mask).to(dtype)
        vec, frame_vec = self._vectors(time, frame_times, pooled, guidance)
        block_context = _Context(
            vec=vec,
            frame_vec=frame_vec,
            rope=rope_table(
                grid,
                self.config.rope_axes,
                self.config.rope_theta,
                num_plain=txt.shape[1],
                device=x.device,
                stretch=time_stretch(),
            ),
            mask=None if mask is None else F.pad(mask, (img.shape[1], 0), value=True)[:, None, None, :],
            num_video=img.shape[1],
            grid=grid,
        )
        out = self.final_layer(self.through_blocks(img, txt, block_context), vec)
        return unpatchify(out, grid, self.config.patch).to(dtype)

    def through_blocks(self, img: Tensor, txt: Tensor, context: _Context) -> Tensor:
        """img (B, L, D), txt (B, M, D) -> img. What concerns the joint tokens stands around it: ``nn.joint_blocks``."""
        for block in self.double_blocks:
            img, txt = block(img, txt, context)
        joint = torch.cat([img, txt], dim=1)
        for block in self.single_blocks:
            joint = block(joint, context)
        return joint[:, : img.shape[1]]

    def _times(self, timestep: Tensor, num_frames: int) -> tuple[Tensor, Tensor | None]:
        """The time of each sample (B,), and of each frame of tokens (B, F) unless they all share the sample's."""
        if timestep.ndim == 2 and num_frames > 1:
            frames = timestep.unflatten(1, (-1, self.config.patch[0])).amax(dim=2)
            return timestep.amax(dim=1), frames
        time = timestep.flatten()
        if self.config.image_condition != "token_replace":
            return time, None
        frames = time.unsqueeze(1).expand(-1, num_frames // self.config.patch[0])
        return time, torch.cat([torch.zeros_like(frames[:, :1]), frames[:, 1:]], dim=1)

    def _vectors(
        self, time: Tensor, frame_times: Tensor | None, pooled: Tensor, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """vec (B, 1, D) and frame_vec (B, F, D), both after SiLU; the same object when frames share a time."""
        dtype = self.img_in.proj.weight.dtype
        text = self.vector_in(pooled).unsqueeze(1)
        told = self._guidance_vector(guidance)
        vec = self.time_in(time.unsqueeze(1)) + text
        if told is not None:
            vec = vec + told
        vec = F.silu(vec).to(dtype)
        if frame_times is None:
            return vec, vec
        frame_vec = self.time_in(frame_times) + text
        if told is not None:
            frame_vec = frame_vec + told * (frame_times > 0).unsqueeze(-1)
        return vec, F.silu(frame_vec).to(dtype)

    def _guidance_vector(self, guidance: Tensor | None) -> Tensor | None:
        """(B,) -> (B, 1, D)."""
        if self.guidance_in is None:
            return None
        if guidance is None:
            raise SettingsError(
                "This network must be told a guidance scale",
                expected="guidance as a tensor with one number per sample",
                do="give guidance (6.0 is usual), or load a checkpoint without guidance embedding",
            )
        # Rounded to the network's dtype before the factor: 6.0 is heard as 6016 in bfloat16, as it was in training.
        return self.guidance_in(guidance.to(self.img_in.proj.weight.dtype).unsqueeze(1) * 1000)

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        """Tokens along (frames, rows, columns)."""
        pt, ph, pw = self.config.patch
        return x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw

    def _check_inputs(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise SettingsError(
                "The latents do not fit this network",
                given=f"shape {tuple(x.shape)}",
                expected=f"(batch, {config.in_channels} channels, frames, height, width)",
                do=_CHANNEL_ADVICE.get(config.image_condition, "check that VAE and network belong together"),
            )
        for name, size, step in zip(("frames", "height", "width"), x.shape[2:], config.patch, strict=True):
            if size < 1 or size % step:
                raise SettingsError(
                    f"The latents' {name} cannot be cut into patches",
                    given=size,
                    expected=f"a positive multiple of {step}",
                    do=f"use {max(step, -(-size // step) * step)}",
                )
        if timestep.ndim not in (1, 2) or (timestep.ndim == 2 and timestep.shape[1] != x.shape[2]):
            raise SettingsError(
                "The timesteps do not fit the latents",
                given=f"shape {tuple(timestep.shape)}",
                expected=f"({x.shape[0]},) or ({x.shape[0]}, {x.shape[2]}): one per sample or per latent frame",
            )
        if context.ndim != 3 or context.shape[2] != config.text_width:
            raise SettingsError(
                "The text states do not fit this network",
                given=f"shape {tuple(context.shape)}",
                expected=f"(batch, tokens, {config.text_width})",
                do="load the text encoder that belongs to this checkpoint",
            )
        if pooled is None or pooled.ndim != 2 or pooled.shape[1] != config.pooled_width:
            raise SettingsError(
                "The pooled text vector does not fit this network",
                given="none" if pooled is None else f"shape {tuple(pooled.shape)}",
                expected=f"(batch, {config.pooled_width})",
                do="load the text encoder that belongs to this checkpoint",
            )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Start values for training from scratch.

        Every modulation and the output layer start at zero, so each block begins as the identity and the first
        prediction is 0 (adaLN-zero). Embedders of numbers and pooled text are normal with deviation 0.02, everything
        else Xavier uniform, biases zero, norms one.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            elif isinstance(module, RMSNorm | nn.LayerNorm):
                nn.init.ones_(module.weight)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if any(part in name for part in ("_mod.", "modulation.", "adaLN_modulation", "final_layer")):
                nn.init.zeros_(module.weight)
            elif any(part in name for part in ("time_in", "vector_in", "guidance_in", "t_embedder", "c_embedder")):
                nn.init.normal_(module.weight, std=0.02, generator=generator)


_CHANNEL_ADVICE = {
    "latent_concat": "stack the noisy latents, the image's latents and the mask of given frames on the channels",
    "token_replace": "give the noisy latents alone, with latent frame 0 replaced by the image's latents",
}


def _check_config(config: NetworkConfig) -> None:
    head, rest = divmod(config.hidden_size, config.num_heads)
    if rest or sum(config.rope_axes) != head or any(axis % 2 for axis in config.rope_axes):
        raise SettingsError(
            "The network's dimensions do not fit together",
            given=f"hidden_size {config.hidden_size}, {config.num_heads} heads, rope_axes {config.rope_axes}",
            expected="even rope_axes that add up to hidden_size / num_heads",
        )
