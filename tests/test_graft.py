"""CogVideoX networks that begin with another one's weights: block by block what the other one computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from vidgen.training.graft import _fit_time, fit_output, graft, graft_pairs
from vidgen.training.teacher import time_of_share
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families import FAMILIES
from vidgen.vidgen_core.families.cogvideox import network as cogvideox
from vidgen.vidgen_core.families.cogvideox.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan import network as hunyuan
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig as HunyuanConfig
from vidgen.vidgen_core.memory.host import bundled_models
from vidgen.vidgen_core.model import VideoModel, load_network
from vidgen.vidgen_core.nn.embeddings import timestep_embedding

SCION = HunyuanConfig(
    in_channels=4, out_channels=4, hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=1,
    num_refiner_blocks=1, patch=(1, 1, 1), rope_axes=(4, 6, 6), text_width=8, pooled_width=8, guidance_embed=False,
)  # fmt: skip
OWN = NetworkConfig(
    in_channels=4, out_channels=4, hidden_size=32, num_heads=2, num_layers=2, patch=(1, 1, 1), rope_axes=(4, 6, 6),
    rope_theta=256.0, text_width=8, text_length=3, time_width=32, trained_grid=(3, 4, 4),
)  # fmt: skip
LENGTH = 12


def random_scion() -> hunyuan.HunyuanVideoTransformer:
    torch.manual_seed(0)
    scion = hunyuan.HunyuanVideoTransformer(SCION)
    with torch.no_grad():
        for name, parameter in scion.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (1.0 if "norm" in name else 0.0))
        # A norm of the root mean square is a layer norm where the mean is 0 already.
        for rows in (scion.double_blocks[0].img_attn_qkv, scion.single_blocks[0].linear1):
            for tensor in (rows.weight, rows.bias):
                heads = tensor[:64].unflatten(0, (4, 16))
                tensor[:64] = (heads - heads.mean(1, keepdim=True)).flatten(0, 1)
    return scion.eval()


@pytest.fixture(scope="module")
def scion() -> hunyuan.HunyuanVideoTransformer:
    return random_scion()


@pytest.fixture(scope="module")
def grafted(scion: hunyuan.HunyuanVideoTransformer) -> VideoModel:
    network = FAMILIES["cogvideox"].parts["network"].build(OWN, {})
    network.init_weights(torch.Generator().manual_seed(1))
    model = VideoModel.of("cogvideox", OWN, network.eval())
    graft(network, scion, model.diffusion, torch.randn(5, 8))
    return model


def own_block(block: nn.Module, x: Tensor, vec: Tensor) -> Tensor:
    context = cogvideox._Context(vec=vec, rope=None, mask=None, num_video=LENGTH, grid=(3, 2, 2))
    return block(x, context)


def rest(width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, LENGTH, width, generator=generator), torch.randn(2, width, generator=generator)


@torch.no_grad()
def test_a_double_block_is_a_block_of_its_video(scion, grafted):
    x, vec = rest()
    block = scion.double_blocks[0]
    shift1, scale1, gate1, shift2, scale2, gate2 = block.img_mod(vec[:, None])
    normed = hunyuan._normed(x, shift1, scale1)
    qkv = hunyuan._projected(normed, block.img_attn_qkv, block.img_attn_q_norm, block.img_attn_k_norm, 2)
    wanted = x + gate1 * block.img_attn_proj(hunyuan._attend(*qkv, None))
    wanted = wanted + gate2 * block.img_mlp(hunyuan._normed(wanted, shift2, scale2))
    # The norms' epsilons differ.
    torch.testing.assert_close(own_block(grafted.network.layers[0], x, vec), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", ["attention", "mlp"])
@torch.no_grad()
def test_a_single_block_is_a_block_of_its_parts(scion, grafted, part):
    """One after the other is in parallel where one of both does nothing."""
    x, vec = rest()
    block, own = scion.single_blocks[0], cogvideox.Block(OWN).eval()
    own.load_state_dict(grafted.network.layers[1].state_dict())
    shift, scale, gate = block.modulation(vec[:, None])
    inner = block.linear1(hunyuan._normed(x, shift, scale))
    qkv, hidden = inner.split(block.split, dim=-1)
    q, k, v = hunyuan._heads(qkv, 2)
    attended = hunyuan._attend(block.q_norm(q), block.k_norm(k), v, None)
    if part == "attention":
        own.dense_4h_to_h.weight.zero_()
        hidden = torch.full_like(hidden, -1e4)  # GELU makes nothing of it
    else:
        own.dense.weight.zero_()
        attended = torch.zeros_like(attended)
    wanted = x + gate * block.linear2(torch.cat([attended, hunyuan.gelu_tanh(hidden)], dim=-1))
    torch.testing.assert_close(own_block(own, x, vec), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_time_says_what_it_said():
    """At the same share of noise, with a mean prompt in it: the bundled network's embedding, for another clock."""
    scion = load_network(bundled_models()["vidgen-tiny-hunyuan"] / "network.safetensors", dtype=torch.float32).network
    config = replace(OWN, hidden_size=128, num_heads=4, rope_axes=(8, 12, 12), time_width=128)
    network = FAMILIES["cogvideox"].parts["network"].build(config, {})
    model, pooled = VideoModel.of("cogvideox", config, network), torch.randn(5, 128)
    _fit_time(network, scion, model.diffusion, pooled)
    share = torch.linspace(0.05, 0.95, 40)
    clock = model.diffusion.clock(time_of_share(model.diffusion, share).double()).float()
    vec = network.time_embed(timestep_embedding(clock, 128))
    wanted = scion.time_in(1000 * share) + scion.vector_in(pooled).mean(0)
    assert float((vec - wanted).square().mean()) < 0.01 * float(wanted.var(0).mean())


@torch.no_grad()
def test_the_output_is_fitted_by_least_squares(grafted):
    network = grafted.network
    nn.init.normal_(network.final_layer.linear.weight)
    nn.init.normal_(network.final_layer.linear.bias)
    before = {name: value.clone() for name, value in network.final_layer.linear.state_dict().items()}
    x, context = torch.randn(6, 4, 3, 4, 4), torch.randn(6, 3, 8)
    timestep = torch.linspace(1, 900, 6)
    wanted = network(x, timestep, context)
    nn.init.zeros_(network.final_layer.linear.weight)
    fit_output(network, lambda: network(x, timestep, context), wanted)
    torch.testing.assert_close(network(x, timestep, context), wanted, rtol=2e-2, atol=2e-2)
    assert not torch.equal(network.final_layer.linear.weight, before["weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 3}, r"model\.num_layers = 3.*num_layers = 2"),
        ({"rope_theta": 10000.0, "time_width": 16}, r"model\.rope_theta = 10000.*time_width = 16"),
        ({"positions": "sincos"}, "sincos"),
        ({"offset_embed": True}, "offset_embed True"),
    ],
)
def test_networks_of_other_sizes_are_refused(scion, grafted, changes, message):
    network = FAMILIES["cogvideox"].parts["network"].build(replace(OWN, **changes), {})
    with pytest.raises(RecipeError, match=message):
        graft(network, scion, grafted.diffusion, torch.randn(5, 8))


def test_only_a_hunyuan_network_can_be_grafted(grafted):
    with pytest.raises(RecipeError, match="Linear onto CogVideoXTransformer"):
        graft(grafted.network, nn.Linear(1, 1), grafted.diffusion, torch.randn(5, 8))


# --- two latent frames to a token -------------------------------------------------------------------------------------

PAIRS = replace(OWN, hidden_size=64, num_heads=4, patch=(2, 1, 1), in_channels=8, offset_embed=True, rope_fit="slice")
ONE = replace(OWN, rope_fit="slice")


def random_network(config: NetworkConfig, seed: int) -> cogvideox.CogVideoXTransformer:
    network = FAMILIES["cogvideox"].parts["network"].build(config, {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (1.0 if "norm" in name else 0.0))
    return network.eval()


@pytest.fixture
def pair() -> tuple[cogvideox.CogVideoXTransformer, cogvideox.CogVideoXTransformer]:
    own, scion = random_network(PAIRS, 1), random_network(ONE, 2)
    graft_pairs(own, scion)
    return own, scion


class Told(nn.Module):
    def __init__(self, vec: Tensor) -> None:
        super().__init__()
        self.vec = vec

    def forward(self, x: Tensor) -> Tensor:
        return self.vec


@torch.no_grad()
def test_both_halves_are_the_narrow_network(pair):
    """Where both frames of a token are alike, so that a norm over both is the norm of each."""
    own, scion = pair
    torch.manual_seed(3)
    x, context, timestep = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 3, 8), torch.tensor([10.0, 700.0])
    vec = torch.randn(2, 32)
    own.time_embed = scion.time_embed = Told(vec)  # fitted, and so near but not the same
    seen: dict[str, Tensor] = {}
    for name, network in (("own", own), ("scion", scion)):
        network.final_layer.linear.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    picture = torch.randn(2, 4, 6, 4, 4)  # counts for nothing yet, nor does the offset
    own(torch.cat([x.repeat_interleave(2, 2), picture], 1), timestep, context, offset=torch.tensor([2.0, 2.0]))
    scion(x, timestep, context)
    first, second = seen["own"].chunk(2, dim=-1)
    # float32, two blocks of random weights
    torch.testing.assert_close(first, seen["scion"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, seen["scion"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_half_sees_every_other_frame(pair):
    own, scion = pair
    x = torch.randn(1, 4, 6, 4, 4)
    tokens = own.patch_embed.video(torch.cat([x, torch.randn(1, 4, 6, 4, 4)], 1))
    for half, frames in zip(tokens.chunk(2, dim=-1), (x[:, :, ::2], x[:, :, 1::2]), strict=True):
        torch.testing.assert_close(half, scion.patch_embed.video(frames), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_time_of_pairs_says_what_it_said():
    scion_path = bundled_models()["vidgen-tiny-cogvideox"] / "network.safetensors"
    scion = load_network(scion_path, dtype=torch.float32).network
    config = replace(scion.config, hidden_size=256, num_heads=8, patch=(2, 1, 1))
    own = FAMILIES["cogvideox"].parts["network"].build(config, {})
    graft_pairs(own, scion)
    clock = torch.linspace(20, 980, 40)
    told = own.time_embed(timestep_embedding(clock, 256))
    wanted = scion.time_embed(timestep_embedding(clock, 128))
    assert float((told - wanted).square().mean()) < 0.01 * float(wanted.var(0).mean())


@pytest.mark.parametrize(
    ("own", "scion", "message"),
    [
        ({"hidden_size": 32, "num_heads": 2}, {}, r"model\.hidden_size = 32, model\.num_heads = 2.*hidden_size = 64"),
        ({"num_layers": 3}, {}, r"model\.num_layers = 3.*num_layers = 2"),
        ({"patch": (1, 1, 1)}, {}, r"model\.patch = \(1, 1, 1\).*\(2, 1, 1\)"),
        ({}, {"patch": (1, 2, 2)}, r"a patch of \(1, 2, 2\).*one latent frame to a token"),
        ({}, {"positions": "sincos"}, "sincos.*rotations"),
    ],
)
def test_pairs_of_other_sizes_are_refused(own, scion, message):
    with pytest.raises(RecipeError, match=message):
        graft_pairs(random_network(replace(PAIRS, **own), 1), random_network(replace(ONE, **scion), 2))


def test_only_cogvideox_is_grafted_in_pairs(scion):
    with pytest.raises(RecipeError, match="HunyuanVideoTransformer onto CogVideoXTransformer"):
        graft_pairs(random_network(PAIRS, 1), scion)
