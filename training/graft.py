"""A CogVideoX network that begins with the weights of a HunyuanVideo network of its size.

Both read latents as tokens, turn heads by the same positions and shift, scale and gate by the time, so most of what a
trained network of one family knows about latents serves the other. What differs is left to training:

* a double block's video stream becomes a block, its text stream is lost: CogVideoX's blocks treat both kinds of
  tokens with the same matrices;
* a single block's attention and MLP run in parallel, here one after the other;
* the prompt's one vector is gone; its mean moves into the time's embedding, which is fitted to the other clock;
* another noise process asks for another output, and the last layer is fitted to that by least squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
    wrong = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    if wrong or own.offset_embed or own.positions != "rope":
        raise RecipeError(
            "The teacher's weights do not fit into this network",
            given=", ".join(f"model.{name} = {pair[0]}" for name, pair in wrong.items())
            or f"positions {own.positions!r}, offset_embed {own.offset_embed}",
            expected=", ".join(f"{name} = {pair[1]}" for name, pair in wrong.items()) or "rotations, and no offset",
            do="set these, or teacher.graft = false",
        )


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
    wanted = scion.time_in(1000 * share) + scion.vector_in(pooled).mean(0)
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
