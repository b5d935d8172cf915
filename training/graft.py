"""CogVideoX networks that begin with the weights of another one: HunyuanVideo's, or one of half the width.

:func:`graft`: both families read latents as tokens, turn heads by the same positions and shift, scale and gate by the
time, so most of what a trained network of one family knows about latents serves the other. What differs is learned:

* a double block's video stream becomes a block, its text stream is lost: CogVideoX's blocks treat both kinds of
  tokens with the same matrices;
* a single block's attention and MLP run in parallel, here one after the other;
* the prompt's one vector is gone; its mean moves into the time's embedding, which is fitted to the other clock;
* another noise process asks for another output, and the last layer is fitted to that by least squares.

:func:`graft_pairs`: a network that reads two latent frames as one token has, to begin with, the weights of one that
reads them one by one twice, side by side, so that either half of it sees every other frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vidgen_core.diffusion import Diffusion
from ..vidgen_core.errors import RecipeError
from ..vidgen_core.families.cogvideox.network import CogVideoXTransformer
from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from ..vidgen_core.nn.embeddings import patchify, timestep_embedding
from .least_squares import LeastSquares
from .teacher import time_of_share

TIME_STEPS = 2000
RIDGE = 1e-6


@torch.no_grad()
def graft(network: nn.Module, scion: nn.Module, diffusion: Diffusion, pooled: Tensor) -> None:
    """Overwrite ``network``'s blocks, its first layer and its time's embedding with what ``scion`` has.

    Args:
        network: CogVideoX's, without an offset; its output layer stays as it is (:func:`fit_output`).
        scion: HunyuanVideo's, with the same width, heads, number of blocks and patch.
        diffusion: of ``network``.
        pooled: (N, P) vectors of some prompts.

    Raises:
        RecipeError: the networks are not of one size.
    """
    if not isinstance(network, CogVideoXTransformer) or not isinstance(scion, HunyuanVideoTransformer):
        raise RecipeError(
            "These networks cannot be grafted", given=f"{type(scion).__name__} onto {type(network).__name__}"
        )
    _check(network, scion)
    network.patch_embed.proj.weight.copy_(scion.img_in.proj.weight.flatten(1).view_as(network.patch_embed.proj.weight))
    network.patch_embed.proj.bias.copy_(scion.img_in.proj.bias)
    blocks = [*map(_of_double, scion.double_blocks), *map(_of_single, scion.single_blocks)]
    for block, state in zip(network.layers, blocks, strict=True):
        block.load_state_dict(block.state_dict() | state)
    network.final_layer.adaLN_modulation.load_state_dict(scion.final_layer.adaLN_modulation[1].state_dict())
    _fit_time(network, scion, diffusion, pooled)


def _check(network: CogVideoXTransformer, scion: HunyuanVideoTransformer) -> None:
    own, other = network.config, scion.config
    names = ("out_channels", "hidden_size", "num_heads", "mlp_ratio", "patch", "rope_axes", "rope_theta")
    sizes = {name: (getattr(own, name), getattr(other, name)) for name in names}
    sizes["in_channels"] = (own.in_channels, other.in_channels)
    sizes["num_layers"] = (own.num_layers, other.num_double_blocks + other.num_single_blocks)
    sizes["time_width"] = (own.time_width, other.hidden_size)
    given, expected = _differing(sizes)
    if given or own.offset_embed or own.positions != "rope":
        raise RecipeError(
            "The teacher's weights do not fit into this network",
            given=given or f"positions {own.positions!r}, offset_embed {own.offset_embed}",
            expected=expected or "rotations, and no offset",
            do="set these, or teacher.graft = false",
        )


def _differing(sizes: Mapping[str, tuple[Any, Any]]) -> tuple[str, str]:
    """What a recipe has and what is needed, of the sizes (own, needed) that differ; empty where none does."""
    wrong = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    given = ", ".join(f"model.{name} = {own}" for name, (own, _) in wrong.items())
    return given, ", ".join(f"{name} = {needed}" for name, (_, needed) in wrong.items())


def _of_double(block: nn.Module) -> dict[str, Tensor]:
    """The video stream of a double block."""
    state = block.state_dict()
    return {
        **_attention(state, "img_attn_qkv", "img_attn_q_norm", "img_attn_k_norm", "img_attn_proj"),
        **_linear("dense_h_to_4h", state["img_mlp.fc1.weight"], state["img_mlp.fc1.bias"]),
        **_linear("dense_4h_to_h", state["img_mlp.fc2.weight"], state["img_mlp.fc2.bias"]),
        **_modulation(state["img_mod.linear.weight"].chunk(2), state["img_mod.linear.bias"].chunk(2)),
    }


def _of_single(block: nn.Module) -> dict[str, Tensor]:
    state = block.state_dict()
    width = state["linear2.bias"].shape[0]
    first, bias, second = state["linear1.weight"], state["linear1.bias"], state["linear2.weight"]
    parts = {
        "qkv.weight": first[: 3 * width],
        "qkv.bias": bias[: 3 * width],
        "proj.weight": second[:, :width],
        "proj.bias": torch.zeros_like(state["linear2.bias"]),
        "q_norm.weight": state["q_norm.weight"],
        "k_norm.weight": state["k_norm.weight"],
    }
    told = (state["modulation.linear.weight"],) * 2, (state["modulation.linear.bias"],) * 2
    return {
        **_attention(parts, "qkv", "q_norm", "k_norm", "proj"),
        **_linear("dense_h_to_4h", first[3 * width :], bias[3 * width :]),
        **_linear("dense_4h_to_h", second[:, width:], state["linear2.bias"]),
        **_modulation(*told),
    }


def _attention(state: Mapping[str, Tensor], qkv: str, q_norm: str, k_norm: str, proj: str) -> dict[str, Tensor]:
    return {
        **_linear("query_key_value", state[f"{qkv}.weight"], state[f"{qkv}.bias"]),
        **_linear("dense", state[f"{proj}.weight"], state[f"{proj}.bias"]),
        "query_layernorm.weight": state[f"{q_norm}.weight"],
        "key_layernorm.weight": state[f"{k_norm}.weight"],
    }


def _linear(name: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _modulation(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """(attention's, MLP's) shift, scale and gate, for video and text alike."""
    return {
        "adaLN_modulation.weight": torch.cat([part for part in weights for _ in range(2)]),
        "adaLN_modulation.bias": torch.cat([part for part in biases for _ in range(2)]),
    }


def _fit_time(
    network: CogVideoXTransformer, scion: HunyuanVideoTransformer, diffusion: Diffusion, pooled: Tensor
) -> None:
    """Let the time's embedding give, at each share of noise, what the other one gave together with a mean prompt."""
    share = torch.linspace(0.002, 0.998, 512)
    clock = diffusion.clock(time_of_share(diffusion, share).double()).float()
    _fit_embedding(network, clock, scion.time_in(1000 * share) + scion.vector_in(pooled).mean(0))


def _fit_embedding(network: CogVideoXTransformer, clock: Tensor, wanted: Tensor) -> None:
    """Let the time's embedding give what is wanted, (N, E), at these entries of the noise table, (N,)."""
    told = timestep_embedding(clock, network.config.hidden_size)
    nn.init.xavier_uniform_(network.time_embed[0].weight, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        optimizer = torch.optim.Adam(network.time_embed.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TIME_STEPS)
        for _ in range(TIME_STEPS):
            optimizer.zero_grad()
            F.mse_loss(network.time_embed(told), wanted).backward()
            optimizer.step()
            schedule.step()
    network.zero_grad()


@torch.no_grad()
def graft_pairs(network: nn.Module, scion: nn.Module) -> None:
    """Overwrite ``network`` but for its output layer (:func:`fit_output`) with ``scion``'s weights, twice side by side.

    Args:
        network: with a patch of two latent frames, and twice ``scion``'s width and heads. What it reads besides the
            noisy latents (a picture, an offset) does nothing at first.
        scion: with a patch of one frame, and as many blocks.

    Raises:
        RecipeError: the networks are not of such sizes.
    """
    if not isinstance(network, CogVideoXTransformer) or not isinstance(scion, CogVideoXTransformer):
        raise RecipeError(
            "Only CogVideoX networks are grafted in pairs",
            given=f"{type(scion).__name__} onto {type(network).__name__}",
        )
    _check_pairs(network, scion)
    own, other = network.state_dict(), scion.state_dict()
    taken: dict[str, Tensor] = {}
    for name, value in other.items():
        if name == "patch_embed.proj.weight":
            taken[name] = _first_layer(network, value)
        elif name.startswith(("time_embed", "final_layer.linear")):
            continue
        elif "adaLN_modulation" in name:  # shifts, scales and gates, each (D, E) or (D,)
            count = 2 if name.startswith("final_layer") else 12
            taken[name] = value.unflatten(0, (count, -1)).repeat_interleave(2, 0).flatten(0, 1)
        elif "query_key_value" in name:
            taken[name] = torch.cat([_twice(part) for part in value.chunk(3)])
        elif name == "patch_embed.text_proj.weight":
            taken[name] = value.repeat(2, 1)
        elif own[name].shape == value.shape:  # a norm of each head
            taken[name] = value
        else:
            taken[name] = _twice(value)
    network.load_state_dict(own | taken)
    if network.ofs_embed is not None:
        for parameter in network.ofs_embed[-1].parameters():
            nn.init.zeros_(parameter)
    clock = torch.linspace(0, 999, 512)
    _fit_embedding(network, clock, scion.time_embed(timestep_embedding(clock, scion.config.hidden_size)))


def _twice(value: Tensor) -> Tensor:
    """A vector after itself, a matrix as two blocks on the diagonal."""
    return torch.block_diag(value, value) if value.ndim == 2 else value.repeat(2)


def _first_layer(network: CogVideoXTransformer, weight: Tensor) -> Tensor:
    """(D, C, 1, 1) -> (2 D, C' * 2): a token's channels are ordered (C', frame); a picture's count for nothing."""
    width, channels = weight.shape[:2]
    first = weight.new_zeros(2, width, network.config.in_channels, 2)
    for frame in range(2):
        first[frame, :, :channels, frame] = weight.flatten(1)
    return first.flatten(2).flatten(0, 1)


def _check_pairs(network: CogVideoXTransformer, scion: CogVideoXTransformer) -> None:
    own, other = network.config, scion.config
    names = ("num_layers", "text_width", "time_width", "mlp_ratio", "rope_axes", "out_channels")
    sizes = {name: (getattr(own, name), getattr(other, name)) for name in names}
    sizes |= {name: (getattr(own, name), 2 * getattr(other, name)) for name in ("hidden_size", "num_heads")}
    sizes["patch"] = own.patch, (2, 1, 1)
    given, expected = _differing(sizes)
    if given or other.patch != (1, 1, 1) or {own.positions, other.positions} != {"rope"}:
        raise RecipeError(
            "The weights to begin with do not fit into this network twice",
            given=given or f"a patch of {other.patch}, positions {own.positions!r} and {other.positions!r}",
            expected=expected or "one latent frame to a token, and rotations",
        )


@torch.no_grad()
def fit_output(network: nn.Module, forward: Callable[[], Tensor], wanted: Tensor) -> None:
    """Set the output layer to the one that comes nearest to what is wanted in the mean square.

    Args:
        network: CogVideoX's.
        forward: runs it on a batch.
        wanted: (B, C, T, H, W) what it should have given.
    """
    assert isinstance(network, CogVideoXTransformer)
    layer = network.final_layer.linear
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        forward()
    finally:
        handle.remove()
    fit = LeastSquares()
    rows = torch.cat([part.flatten(0, 1) for part in seen])
    fit.add(rows.double(), patchify(wanted, network.config.patch).flatten(0, 1).double())
    weight, bias = fit.solve(ridge=RIDGE)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
