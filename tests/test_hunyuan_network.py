"""HunyuanVideo's transformer against diffusers, against the published shapes, and against its own promises."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.errors import SettingsError, UserError
from vidgen.vidgen_core.families.hunyuan.config import I2V_LATENT_CONCAT, T2V_720P, NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.nn.attention import attention, trim_padding
from vidgen.vidgen_core.nn.embeddings import PatchEmbed, patchify, timestep_embedding, unpatchify
from vidgen.vidgen_core.nn.modulation import gated_add, modulate
from vidgen.vidgen_core.nn.norms import RMSNorm
from vidgen.vidgen_core.nn.rope import apply_rope, rope_table

TINY = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=32,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    num_refiner_blocks=2,
    rope_axes=(4, 6, 6),
    text_width=24,
    pooled_width=20,
    guidance_embed=False,
)
PARITY = 2e-6
"""float32 rounding of two orders of the same sums; a wrong formula is off by 1e-3 or more"""


def build(config: NetworkConfig, *, seed: int = 0) -> HunyuanVideoTransformer:
    """Random weights large enough that every part of the network matters."""
    network = HunyuanVideoTransformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.requires_grad_(False)


def inputs(config: NetworkConfig, *, frames: int = 3, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Two samples with texts of different length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([3, 6, 7, 1])[:batch]
    return {
        "x": normal(batch, config.in_channels, frames, 6, 8),
        "timestep": torch.tensor([731.5, 12.25, 1000.0, 444.0])[:batch],
        "context": normal(batch, 7, config.text_width),
        "context_mask": torch.arange(7) < lengths[:, None],
        "pooled": normal(batch, config.pooled_width),
        "guidance": torch.tensor([6.0, 1.5, 1.0, 8.0])[:batch],
    }


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# Against diffusers


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("image_condition", ["none", "token_replace", "latent_concat"])
def test_equals_diffusers_with_the_same_weights(network_twin, image_condition, guidance):
    channels = 9 if image_condition == "latent_concat" else 4
    config = replace(TINY, image_condition=image_condition, in_channels=channels, guidance_embed=guidance)
    network = build(config)
    given = inputs(config)
    with torch.no_grad():
        ours = network(**given)
        theirs = network_twin(network)(
            given["x"],
            given["timestep"],
            given["context"],
            given["context_mask"],
            given["pooled"],
            given["guidance"] * 1000 if guidance else None,
            return_dict=False,
        )[0]
    assert ours.std() > 0.1
    assert relative(ours, theirs) <= PARITY


def test_one_frame_equals_diffusers(network_twin):
    network = build(TINY)
    given = inputs(TINY, frames=1)
    with torch.no_grad():
        ours = network(**given)
        theirs = network_twin(network)(
            given["x"],
            given["timestep"],
            given["context"],
            given["context_mask"],
            given["pooled"],
            return_dict=False,
        )[0]
    assert ours.shape == (2, 4, 1, 6, 8)
    assert relative(ours, theirs) <= PARITY


# Against the published checkpoints


def contract(name: str) -> dict[str, tuple[int, ...]]:
    path = Path(__file__).parent / "contracts" / f"{name}.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {key: tuple(tensor["shape"]) for key, tensor in json.load(file)["tensors"].items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def published() -> HunyuanVideoTransformer:
    with torch.device("meta"):
        return HunyuanVideoTransformer(T2V_720P)


def test_published_names_and_shapes(published):
    assert shapes(published.state_dict()) == contract("hunyuan_dit_t2v__official_pt")
    assert sum(parameter.numel() for parameter in published.parameters()) == 12_821_012_544


def test_published_latent_concat_names_and_shapes():
    with torch.device("meta"):
        network = HunyuanVideoTransformer(I2V_LATENT_CONCAT)
    assert shapes(network.state_dict()) == contract("hunyuan_dit_i2v_33ch_v1_latent_concat__official_pt")


def test_published_diffusers_layout(published):
    assert shapes(LAYOUTS["diffusers"].to_foreign(published.state_dict())) == contract("hunyuan_dit_t2v__diffusers")


def test_published_network_runs_on_meta(published):
    """Nothing is precomputed at build time, so shapes of a 720p video flow through without memory."""
    with torch.device("meta"), torch.no_grad():
        out = published(
            torch.empty(1, 16, 33, 90, 160),
            torch.empty(1),
            torch.empty(1, 256, 4096),
            torch.empty(1, 256, dtype=torch.bool),
            torch.empty(1, 768),
            torch.empty(1),
        )
    assert out.shape == (1, 16, 33, 90, 160)


def test_state_dict_holds_parameters_only():
    network = HunyuanVideoTransformer(TINY)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


# Text


def test_padded_tokens_never_influence_the_video():
    network = build(TINY)
    given = inputs(TINY)
    context = given["context"].clone().requires_grad_()
    out = network(**{**given, "context": context})
    (gradient,) = torch.autograd.grad(out.square().sum(), context)
    reached = gradient.abs().amax(dim=2) > 0
    assert torch.equal(reached, given["context_mask"])


def test_what_stands_in_the_padding_changes_nothing():
    network = build(TINY)
    given = inputs(TINY)
    padding = ~given["context_mask"].unsqueeze(-1)
    other = given["context"].masked_fill(padding, 50.0)
    assert torch.equal(network(**given), network(**{**given, "context": other}))


def test_trimmed_text_gives_the_same_video():
    network = build(TINY)
    given = inputs(TINY)
    context, mask = trim_padding(given["context"], given["context_mask"])
    assert context.shape[1] == 6
    assert relative(network(**{**given, "context": context, "context_mask": mask}), network(**given)) <= PARITY


def test_trimming_drops_a_mask_that_hides_nothing():
    context = torch.randn(2, 7, 3)
    trimmed, mask = trim_padding(context, (torch.arange(7) < 4).expand(2, 7))
    assert mask is None
    assert torch.equal(trimmed, context[:, :4])
    assert trim_padding(context, None) == (context, None)


def test_a_text_without_tokens_stays_finite():
    given = inputs(TINY)
    given["context_mask"] = torch.zeros(2, 7, dtype=torch.bool)
    assert build(TINY)(**given).isfinite().all()
    context, mask = trim_padding(given["context"], given["context_mask"])
    assert context.shape[1] == 1
    assert not mask.any()


def test_a_batch_equals_its_samples():
    """Rows of a matrix product round differently in another batch; 1e-5 leaves room for that and nothing else."""
    network = build(TINY)
    given = inputs(TINY, batch=4)
    together = network(**given)
    for index in range(4):
        alone = network(**{name: value[index : index + 1] for name, value in given.items()})
        assert relative(together[index : index + 1], alone) <= 1e-5


# Time and guidance


def test_equal_frame_times_equal_one_time():
    network = build(TINY)
    given = inputs(TINY)
    frames = given["timestep"][:, None].expand(-1, 3)
    assert relative(network(**{**given, "timestep": frames}), network(**given)) <= PARITY


@pytest.mark.parametrize("guidance", [False, True])
def test_token_replace_is_a_first_frame_at_time_zero(guidance):
    config = replace(TINY, image_condition="token_replace", guidance_embed=guidance)
    given = inputs(config)
    frames = given["timestep"][:, None].repeat(1, 3)
    frames[:, 0] = 0
    network, plain = build(config), build(replace(config, image_condition="none"))
    assert torch.equal(plain(**{**given, "timestep": frames}), network(**given))


def test_a_single_token_replaced_frame_still_hears_the_time():
    network = build(replace(TINY, image_condition="token_replace"))
    given = inputs(TINY, frames=1)
    late = network(**given)
    early = network(**{**given, "timestep": given["timestep"] / 2})
    assert relative(early, late) > 1e-3


def test_given_frames_are_not_told_the_guidance():
    config = replace(TINY, guidance_embed=True)
    network = build(config)
    seen = []
    network.double_blocks[0].img_mod.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    given = inputs(config)
    frames = torch.tensor([[0.0, 500.0, 0.0]]).expand(2, 3)
    for scale in (1.0, 9.0):
        network(**{**given, "timestep": frames, "guidance": torch.full((2,), scale)})
    first, second = seen
    assert torch.equal(first[:, [0, 2]], second[:, [0, 2]])
    assert not torch.equal(first[:, 1], second[:, 1])


def test_patches_over_time_hear_the_latest_time_of_their_frames():
    config = replace(TINY, patch=(2, 2, 2))
    network = build(config)
    given = inputs(config, frames=4)
    uneven = torch.tensor([[0.0, 300.0, 700.0, 100.0]]).expand(2, 4)
    even = torch.tensor([[300.0, 300.0, 700.0, 700.0]]).expand(2, 4)
    assert torch.equal(network(**{**given, "timestep": uneven}), network(**{**given, "timestep": even}))


def test_guidance_is_rounded_to_the_dtype_of_the_network():
    """6.0 * 1000 is 6016 in bfloat16: what the published network heard while it was distilled."""
    config = replace(TINY, guidance_embed=True)
    for dtype, expected in ((torch.float32, 6000.0), (torch.bfloat16, 6016.0)):
        network = build(config).to(dtype)
        heard = []
        network.guidance_in.register_forward_pre_hook(lambda module, args, heard=heard: heard.append(args[0]))
        network(**{**inputs(config), "guidance": torch.tensor([6.0, 6.0])})
        assert heard[0].float().flatten().tolist() == [expected, expected]


def test_guidance_is_ignored_by_a_network_without_it():
    network = build(TINY)
    given = inputs(TINY)
    assert torch.equal(network(**given), network(**{**given, "guidance": None}))


# Precision


def test_bfloat16_weights_stay_near_float32():
    """bfloat16 keeps 8 bits; rounding these weights alone costs 0.8 %. Guidance 1 and 8 survive the rounding."""
    config = replace(TINY, guidance_embed=True, image_condition="token_replace")
    network = build(config)
    given = {**inputs(config), "guidance": torch.tensor([1.0, 8.0])}
    exact = network(**given)
    rounded = network.to(torch.bfloat16)(**given)
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), exact) < 0.03


@pytest.mark.parametrize("image_condition", ["none", "token_replace", "latent_concat"])
def test_bfloat16_rounds_no_worse_than_diffusers(network_twin, image_condition):
    """Distance from the same float32 network, over several inputs. Guidance 1 and 8 survive the rounding."""
    channels = 9 if image_condition == "latent_concat" else 4
    config = replace(TINY, guidance_embed=True, image_condition=image_condition, in_channels=channels)
    network = build(config)
    twin = network_twin(network).to(torch.bfloat16)
    narrow = build(config).to(torch.bfloat16)
    ours, theirs = [], []
    for seed in range(4):
        given = {**inputs(config, seed=seed), "guidance": torch.tensor([1.0, 8.0])}
        with torch.no_grad():
            exact = network(**given)
            half = {k: v.bfloat16() if v.is_floating_point() and k != "timestep" else v for k, v in given.items()}
            rounded = twin(
                half["x"],
                half["timestep"],
                half["context"],
                half["context_mask"],
                half["pooled"],
                half["guidance"] * 1000,
                return_dict=False,
            )[0]
            ours.append(relative(narrow(**given).float(), exact))
            theirs.append(relative(rounded.float(), exact))
    assert sum(ours) <= 1.05 * sum(theirs), (ours, theirs)


def test_parts_may_be_kept_in_float32():
    config = replace(TINY, guidance_embed=True)
    network = build(config).to(torch.bfloat16)
    reference = network(**inputs(config))
    for name in ("time_in", "vector_in", "guidance_in", "final_layer"):
        getattr(network, name).float()
    out = network(**inputs(config))
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), reference.float()) < 0.05


def test_autocast_trains_near_float32():
    """Also takes the plain attention that bfloat16 uses for training on a CPU."""
    network = build(TINY).requires_grad_(True)
    given = inputs(TINY)
    exact = torch.autograd.grad(network(**given).square().sum(), network.single_blocks[0].linear1.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = network(**given)
    rough = torch.autograd.grad(out.float().square().sum(), network.single_blocks[0].linear1.weight)[0]
    assert relative(rough, exact) < 0.1


# Training from scratch


def test_initial_prediction_is_zero_and_learning_starts():
    network = HunyuanVideoTransformer(TINY)
    network.init_weights(torch.Generator().manual_seed(0))
    given = inputs(TINY)
    target = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = (network(**given) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(float(target.square().mean()))
    assert losses[-1] < 0.9 * losses[0]


def test_init_weights_is_reproducible():
    first, second = HunyuanVideoTransformer(TINY), HunyuanVideoTransformer(TINY)
    for network in (first, second):
        network.init_weights(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_every_weight_learns():
    config = replace(TINY, guidance_embed=True)
    network = build(config).requires_grad_(True)
    network(**inputs(config)).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_forward_is_one_graph():
    torch._dynamo.reset()
    config = replace(TINY, num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1)
    network = build(config)
    given = inputs(config)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert relative(compiled(**given), network(**given)) <= PARITY


def test_a_table_made_while_sampling_serves_training():
    network = build(TINY).requires_grad_(True)
    given = inputs(TINY)
    rope_table.cache_clear()
    with torch.inference_mode():
        network(**given)
    network(**given).sum().backward()
    assert network.img_in.proj.weight.grad is not None


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 16, 3, 6, 8)}, ["(2, 16, 3, 6, 8)", "4 channels"]),
        ({"x": torch.zeros(2, 4, 3, 7, 8)}, ["height", "7", "multiple of 2", "use 8"]),
        ({"x": torch.zeros(2, 4, 3, 6, 5)}, ["width", "5", "use 6"]),
        ({"x": torch.zeros(2, 4, 0, 6, 8)}, ["frames", "0", "use 1"]),
        ({"context": torch.zeros(2, 7, 99)}, ["99", "24", "text encoder"]),
        ({"pooled": None}, ["none", "20"]),
        ({"pooled": torch.zeros(2, 21)}, ["21", "20"]),
        ({"timestep": torch.zeros(2, 5)}, ["(2, 5)", "(2, 3)"]),
    ],
)
def test_inputs_that_do_not_fit_are_explained(change, words):
    with pytest.raises(SettingsError) as error:
        build(TINY)(**{**inputs(TINY), **change})
    assert all(word in str(error.value) for word in words), error.value


def test_missing_guidance_is_explained():
    config = replace(TINY, guidance_embed=True)
    with pytest.raises(UserError, match="guidance scale"):
        build(config)(**{**inputs(config), "guidance": None})


def test_latent_concat_network_explains_its_channels():
    config = replace(TINY, in_channels=9, image_condition="latent_concat")
    with pytest.raises(UserError, match="mask of given frames"):
        build(config)(**{**inputs(config), "x": torch.zeros(2, 4, 3, 6, 8)})


@pytest.mark.parametrize("change", [{"rope_axes": (4, 6, 8)}, {"rope_axes": (5, 5, 6)}, {"num_heads": 3}])
def test_dimensions_that_do_not_fit_are_explained(change):
    with pytest.raises(SettingsError, match="add up to hidden_size"):
        HunyuanVideoTransformer(replace(TINY, **change))


# The pieces, against closed forms


def test_timestep_embedding_has_cosines_first():
    out = timestep_embedding(torch.tensor([0.0, 250.5]), 8)
    expected = [250.5 * 10000 ** (-i / 4) for i in range(4)]
    assert out[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    # float32 angles near 250 are exact to 1.5e-5
    closed = torch.tensor([*map(math.cos, expected), *map(math.sin, expected)])
    torch.testing.assert_close(out[1], closed, atol=3e-5, rtol=0)


def test_patches_are_the_strided_convolution():
    embed = PatchEmbed(3, 8, (1, 2, 2))
    x = torch.randn(2, 3, 3, 4, 6)
    convolved = nn.functional.conv3d(x, embed.proj.weight, embed.proj.bias, stride=(1, 2, 2))
    torch.testing.assert_close(embed.proj(x), convolved, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(embed(x), convolved.flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-5)
    # Tokens are views all the way: nothing is copied.
    assert embed(x).is_contiguous()


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (1, 1, 1)])
def test_unpatchify_undoes_patchify(patch):
    x = torch.randn(2, 3, 4, 6, 6)
    grid = tuple(size // step for size, step in zip((4, 6, 6), patch, strict=True))
    assert torch.equal(unpatchify(patchify(x, patch), grid, patch), x)


def test_rope_scores_depend_on_distance_only():
    """The same query and key at equal offsets give equal scores, on each axis."""
    table = rope_table((4, 5, 6), (4, 6, 6), 256.0, device=torch.device("cpu"))
    q, k = torch.randn(2, 16)
    where = torch.arange(4 * 5 * 6).view(4, 5, 6)
    rotated_q = apply_rope(q.expand(1, 120, 1, 16), table)[0, :, 0]
    rotated_k = apply_rope(k.expand(1, 120, 1, 16), table)[0, :, 0]

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> Tensor:
        return rotated_q[where[a]] @ rotated_k[where[b]]

    torch.testing.assert_close(score((0, 0, 0), (1, 2, 3)), score((2, 2, 2), (3, 4, 5)), atol=1e-5, rtol=0)
    assert (score((0, 0, 0), (1, 2, 3)) - score((0, 0, 0), (1, 2, 2))).abs() > 1e-3


def test_rope_turns_neighbouring_channels_by_the_published_angles():
    """Against float64: position 3 on the time axis, channels (2, 3), theta 256, 8 channels."""
    table = rope_table((4, 1, 1), (8, 2, 2), 256.0, device=torch.device("cpu"))
    x = torch.randn(1, 4, 1, 12)
    a, b = x[0, 3, 0, 2:4].tolist()
    angle = 3 * 256 ** (-2 / 8)
    expected = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    torch.testing.assert_close(apply_rope(x, table)[0, 3, 0, 2:4], torch.tensor(expected), atol=1e-6, rtol=0)


def test_plain_tokens_are_not_rotated():
    table = rope_table((1, 2, 2), (4, 6, 6), 256.0, num_plain=3, device=torch.device("cpu"))
    x = torch.randn(2, 7, 2, 16)
    assert torch.equal(apply_rope(x, table)[:, 4:], x[:, 4:])


def test_rms_norm_rounds_before_the_weight():
    norm = RMSNorm(16)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 16)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(norm(x), expected * norm.weight, atol=1e-6, rtol=1e-5)
    narrow, rounded = norm.to(torch.bfloat16), x.bfloat16()
    wide = rounded.float()
    quotient = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    assert (narrow(rounded) != quotient * narrow.weight).float().mean() < 0.05  # ties in the last bit


def test_modulation_serves_groups_of_tokens():
    x, shift, scale = torch.randn(2, 6, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    spread = [value.repeat_interleave(2, dim=1) for value in (shift, scale)]
    torch.testing.assert_close(modulate(x, shift, scale), x * (1 + spread[1]) + spread[0])
    torch.testing.assert_close(gated_add(x, scale, x), x + spread[1] * x)


def test_both_attentions_agree():
    """The products used to train in bfloat16 on a CPU against the fused kernel in float32: 8 bits of difference."""
    q, k, v = torch.randn(3, 2, 2, 5, 8).bfloat16()
    mask = (torch.arange(5) < torch.tensor([[3], [5]]))[:, None, None, :]
    plain = attention(q.requires_grad_(), k, v, mask=mask)
    fused = attention(q.detach().float(), k.float(), v.float(), mask=mask)
    torch.testing.assert_close(plain.float(), fused, atol=0.03, rtol=0.03)
