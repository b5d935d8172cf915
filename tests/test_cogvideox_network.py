"""CogVideoX's transformer against diffusers, and against its own promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.errors import SettingsError, UserError
from vidgen.vidgen_core.families.cogvideox.config import NetworkConfig
from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer, fitted_spans
from vidgen.vidgen_core.nn.attention import attending_with
from vidgen.vidgen_core.nn.backends import plain

PARITY = 2e-6
"""float32 rounding of two orders of the same sums; a wrong formula is off by 1e-3 or more"""

TINY = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=48,
    num_heads=3,
    num_layers=2,
    text_width=24,
    text_length=7,
    time_width=20,
    trained_grid=(3, 3, 4),
    rope_axes=(4, 6, 6),
)
NETWORKS = {
    "2b": replace(TINY, positions="sincos", snr_shift=3.0),
    "5b": TINY,
    "5b_i2v": replace(TINY, in_channels=8, positions="learned"),
    "1.5_5b": replace(TINY, patch=(2, 2, 2), trained_grid=(2, 5, 6), rope_fit="slice"),
    "1.5_5b_i2v": replace(
        TINY, patch=(2, 2, 2), trained_grid=(2, 5, 6), rope_fit="slice", in_channels=8, offset_embed=True
    ),
}

Twin = Callable[[CogVideoXTransformer], Any]


def build(config: NetworkConfig, *, seed: int = 0) -> CogVideoXTransformer:
    """Random weights large enough that every part of the network matters."""
    network = CogVideoXTransformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.requires_grad_(False)


def inputs(config: NetworkConfig, *, frames: int | None = None, height: int = 6, width: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frames = config.patch[0] * config.trained_grid[0] if frames is None else frames
    frames += frames % config.patch[0]
    given = {
        "x": normal(2, config.in_channels, frames, height, width),
        "timestep": torch.tensor([731, 12]),
        "context": normal(2, config.text_length, config.text_width),
    }
    return given | ({"offset": torch.full((2,), 2.0)} if config.offset_embed else {})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def ask_twin(twin: Any, config: NetworkConfig, given: dict[str, Tensor]) -> Tensor:
    """diffusers' network with rotations as its own pipelines make them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    rope = None
    frames, rows, columns = (size // step for size, step in zip(given["x"].shape[2:], config.patch, strict=True))
    _, trained_rows, trained_columns = config.trained_grid
    if config.positions != "sincos" and config.patch[0] == 1:
        crops = get_resize_crop_region_for_grid((rows, columns), trained_columns, trained_rows)
        rope = get_3d_rotary_pos_embed(16, crops, (rows, columns), frames)
    elif config.positions != "sincos":
        size = (trained_rows, trained_columns)
        rope = get_3d_rotary_pos_embed(16, None, (rows, columns), frames, grid_type="slice", max_size=size)
    with torch.no_grad():
        return twin(
            given["x"].transpose(1, 2),
            given["context"],
            given["timestep"],
            ofs=given["offset"][:1] if "offset" in given else None,
            image_rotary_emb=rope,
            return_dict=False,
        )[0].transpose(1, 2)


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_diffusers_with_the_same_weights(cogvideox_twin: Twin, name: str) -> None:
    config = NETWORKS[name]
    network, given = build(config), inputs(config)
    with torch.no_grad():
        ours = network(**given)
    assert ours.std() > 0.1
    assert ours.shape == (2, 4, *given["x"].shape[2:])
    assert relative(ours, ask_twin(cogvideox_twin(network), config, given)) <= PARITY


@pytest.mark.parametrize("name", ["2b", "5b", "1.5_5b", "1.5_5b_i2v"])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 6, 8), (5, 4, 12), (2, 8, 4)])
def test_other_sizes_equal_diffusers(cogvideox_twin: Twin, name: str, frames: int, height: int, width: int) -> None:
    config = NETWORKS[name]
    network, given = build(config), inputs(config, frames=frames, height=height, width=width)
    with torch.no_grad():
        ours = network(**given)
    assert relative(ours, ask_twin(cogvideox_twin(network), config, given)) <= PARITY


def test_what_the_other_eps_of_the_output_layer_costs(cogvideox_twin: Twin) -> None:
    """diffusers normalises with 1e-5 where the official code has 1e-6. Norms near 1, as trained ones are."""
    network = build(TINY)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
    twin, given = cogvideox_twin(network), inputs(TINY)
    with torch.no_grad():
        ours = network(**given)
    same = relative(ours, ask_twin(twin, TINY, given))
    twin.norm_out.norm.eps = 1e-5
    other = relative(ours, ask_twin(twin, TINY, given))
    assert same <= PARITY / 2
    assert 3e-6 <= other <= 6e-6  # half of the difference, where the variance is 1: 4.5e-6


def test_gradients_flow_to_the_same_values_as_without_them(cogvideox_twin: Twin) -> None:
    for config in NETWORKS.values():
        network, given = build(config), inputs(config)
        with torch.no_grad():
            without = network(**given)
        network.requires_grad_(True)
        output = network(**given)
        assert relative(output.detach(), without) <= PARITY
        output.square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_gradients_equal_those_of_diffusers(cogvideox_twin: Twin) -> None:
    config = NETWORKS["5b"]
    network, given = build(config), inputs(config)
    twin = cogvideox_twin(network)
    given = {**given, "x": given["x"].requires_grad_(True)}
    network(**given).square().sum().backward()
    ours, given["x"].grad = given["x"].grad.clone(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "no_grad", torch.enable_grad)
        ask_twin(twin, config, given).square().sum().backward()
    assert relative(ours, given["x"].grad) <= 1e-5  # a sum over more terms


# --- its own promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_near_and_finite(name: str) -> None:
    config = NETWORKS[name]
    network, given = build(config), inputs(config)
    for parameter in network.parameters():
        parameter.mul_(0.5)
    with torch.no_grad():
        exact = network(**given)
        rounded = network.to(torch.bfloat16)(**given)
    assert rounded.dtype == torch.bfloat16
    assert relative(rounded.float(), exact) <= 0.05


def test_every_input_matters() -> None:
    config = NETWORKS["1.5_5b_i2v"]
    network, given = build(config), inputs(config)
    with torch.no_grad():
        before = network(**given)
        for name in given:
            changed = {**given, name: given[name] + 1}
            assert relative(network(**changed), before) > 1e-3, name


def test_a_mask_leaves_tokens_out_and_none_counts_them_all() -> None:
    network, given = build(TINY), inputs(TINY)
    mask = torch.arange(7) < torch.tensor([[4], [4]])
    with torch.no_grad():
        masked = network(**given, context_mask=mask)
        short = network(**{**given, "context": given["context"][:, :4]})
        whole = network(**given)
    assert relative(masked, short) <= PARITY
    assert relative(whole, short) > 1e-3


def test_attention_is_what_the_run_says() -> None:
    network, given = build(TINY), inputs(TINY)
    calls = []

    def counting(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(tuple(q.shape))
        return plain(q, k, v, mask)

    with torch.no_grad(), attending_with(counting):
        network(**given)
    assert calls == [(2, 3, 3 * 3 * 4 + 7, 16)] * 2


def test_the_published_size_counts_its_tokens_in_whole_numbers() -> None:
    assert fitted_spans((13, 30, 45), (13, 30, 45)) == ((0, 13), (0, 30), (0, 45))
    assert fitted_spans((5, 15, 45), (13, 30, 45)) == ((0, 5), (8, 23), (0, 45))  # 7.5 is rounded to even
    assert fitted_spans((5, 30, 30), (13, 30, 45)) == ((0, 5), (0, 30), (8, 38))


def test_training_starts_at_zero() -> None:
    for config in NETWORKS.values():
        network = CogVideoXTransformer(config)
        for parameter in network.parameters():
            nn.init.constant_(parameter, 7.0)
        network.init_weights(torch.Generator().manual_seed(0))
        assert not any(bool((parameter == 7.0).any()) for parameter in network.parameters())
        with torch.no_grad():
            assert not bool(network(**inputs(config)).any())


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("5b", {"x": torch.zeros(1, 3, 3, 6, 8)}, "4 channels"),
        ("5b", {"x": torch.zeros(4, 3, 6, 8)}, "4 channels"),
        ("5b_i2v", {"x": torch.zeros(1, 4, 3, 6, 8)}, "those of the picture"),
        ("5b", {"x": torch.zeros(1, 4, 3, 5, 8)}, "height"),
        ("5b", {"x": torch.zeros(1, 4, 3, 6, 7)}, "width"),
        ("5b", {"x": torch.zeros(1, 4, 0, 6, 8)}, "frames"),
        ("1.5_5b", {"x": torch.zeros(1, 4, 3, 6, 8)}, "use 4"),
        ("1.5_5b", {"x": torch.zeros(1, 4, 4, 12, 8)}, "larger than this network can tell"),
        ("1.5_5b", {"x": torch.zeros(1, 4, 4, 6, 14)}, "96 x 80 px"),
        ("5b_i2v", {"x": torch.zeros(1, 8, 3, 4, 8)}, "one size of video"),
        ("5b_i2v", {"x": torch.zeros(1, 8, 4, 6, 8)}, "9 frames"),
        ("5b_i2v", {"context": torch.zeros(2, 6, 24)}, "padded ones included"),
        ("5b", {"context": torch.zeros(2, 7, 23)}, "T5-XXL"),
        ("5b", {"context": torch.zeros(7, 24)}, "T5-XXL"),
        ("1.5_5b_i2v", {"offset": None}, "offset"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name: str, change: dict[str, Any], says: str) -> None:
    config = NETWORKS[name]
    with pytest.raises(SettingsError, match=says):
        build(config)(**{**inputs(config), **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "do not fit together"),
        ({"rope_axes": (4, 6, 8)}, "do not fit together"),
        ({"rope_axes": (6, 5, 5)}, "even rope_axes"),
        ({"positions": "sincos", "hidden_size": 24}, "multiple of 16"),
    ],
)
def test_configs_that_do_not_fit_are_named(change: dict[str, Any], says: str) -> None:
    change = {"rope_axes": (2, 4, 2), **change} if change.get("hidden_size") == 24 else change
    with pytest.raises(UserError, match=says):
        CogVideoXTransformer(replace(TINY, **change))
