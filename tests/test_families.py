"""What a checkpoint is, told from its content."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidgen.vidgen_core.errors import CheckpointError
from vidgen.vidgen_core.families import FAMILIES, Family, identify
from vidgen.vidgen_core.families.hunyuan.config import (
    I2V_LATENT_CONCAT,
    T2V_720P,
    VAE_884_16C,
    CodecConfig,
    NetworkConfig,
)
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.weights.header import Header, TensorInfo, read_header
from vidgen.vidgen_core.weights.save import save_tensors

HUNYUAN = FAMILIES["hunyuan"]


def header_of(tensors: dict[str, torch.Tensor], **metadata: str) -> Header:
    table = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return Header(path=Path("some/file"), tensors=table, metadata=metadata, num_bytes=1, digest="")


def state_on_meta(part: str, config: object) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return HUNYUAN.parts[part].build(config, {}).state_dict()


def test_records_are_complete_and_found_by_name() -> None:
    assert all(isinstance(family, Family) and family.name == name for name, family in FAMILIES.items())
    assert all({"network", "codec", "text"} <= family.parts.keys() for family in FAMILIES.values())
    assert all(set(family.text.parts) == family.parts.keys() - {"network", "codec"} for family in FAMILIES.values())


@pytest.mark.parametrize("part", ["network", "codec", "text"])
def test_our_own_files_are_known_whatever_they_are_called(tiny_bundle_dir: Path, tmp_path: Path, part: str) -> None:
    name = {"network": "network", "codec": "vae", "text": "text"}[part]
    disguise = tmp_path / "svd_xt_lora.safetensors"
    shutil.copy(tiny_bundle_dir / f"{name}.safetensors", disguise)
    found = identify(read_header(disguise))
    assert (found.family.name, found.part, found.layout) == ("hunyuan", part, "native")


@pytest.mark.parametrize("config", [T2V_720P, I2V_LATENT_CONCAT], ids=["t2v", "latent_concat"])
@pytest.mark.parametrize("layout", ["native", *HUNYUAN.parts["network"].layouts])
def test_published_networks_are_known_by_shape(config: NetworkConfig, layout: str) -> None:
    """The full sizes, on the meta device: 13 B weights without a byte."""
    state = state_on_meta("network", config)
    if layout != "native":
        state = HUNYUAN.parts["network"].layouts[layout].to_foreign(state)
    if layout == "prefixed":
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    found = identify(header_of(state))
    assert found.part == "network"
    assert found.layout == layout
    assert found.config == config


@pytest.mark.parametrize(
    "config", [VAE_884_16C, replace(VAE_884_16C, block_channels=(32, 64, 64, 96), latent_channels=8)]
)
def test_vaes_are_known_by_shape(config: CodecConfig) -> None:
    found = identify(header_of(state_on_meta("codec", config)))
    assert found.part == "codec"
    assert found.config == config


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"vidgen.family": "hunyan"}, "did you mean 'hunyuan'"),
        ({"vidgen.family": "hunyuan", "vidgen.part": "vae"}, "one of clip, codec, llama, network, text, vision"),
        ({"vidgen.family": "hunyuan", "vidgen.part": "codec"}, "no vidgen.config"),
        (
            {"vidgen.family": "hunyuan", "vidgen.part": "codec", "vidgen.config": '{"num_group": 4}'},
            "did you mean 'num_groups'",
        ),
        ({"vidgen.family": "hunyuan", "vidgen.part": "codec", "vidgen.config": "{"}, "not valid JSON"),
    ],
)
def test_wrong_metadata_is_named(metadata: dict[str, str], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        identify(header_of({}, **metadata))


def test_a_strange_checkpoint_is_refused_with_its_names(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_tensors(path, {"lora_A.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="lora_A.weight"):
        identify(read_header(path))


def test_only_real_tokens_reach_the_network() -> None:
    from vidgen.vidgen_core.families.hunyuan.text import TextFeatures

    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    features = TextFeatures(context=torch.randn(2, 6, 4), context_mask=mask, pooled=torch.randn(2, 3))
    cond = HUNYUAN.condition(T2V_720P, features, 7.5)
    assert cond.context.shape == (2, 3, 4)
    assert cond.context_mask.tolist() == [[True, True, True], [True, True, False]]
    assert cond.scalars["guidance"].tolist() == [7.5, 7.5]
    assert HUNYUAN.condition(I2V_LATENT_CONCAT, features, 7.5).scalars == {}


def test_a_sample_taken_from_a_batch_loses_its_padding() -> None:
    cond = Conditioning(
        context=torch.randn(2, 3, 4), context_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(), pooled=torch.randn(2, 3)
    )
    second = cond.take(slice(1, 2))
    assert torch.equal(second.context, cond.context[1:, :2])
    assert second.context_mask is None
    assert torch.equal(second.pooled, cond.pooled[1:])


@pytest.mark.parametrize(
    ("t", "shape"), [(torch.tensor(0.5), (2,)), (torch.rand(2), (2,)), (torch.rand(2, 1, 3, 1, 1), (2, 3))]
)
def test_the_clock_has_one_time_per_sample_or_per_frame(t: torch.Tensor, shape: tuple[int, ...]) -> None:
    inputs = HUNYUAN.network_inputs(T2V_720P, torch.zeros(2, 16, 3, 4, 4), 1000 * t, Conditioning())
    assert inputs["timestep"].shape == shape


def test_concatenated_conditions_become_channels() -> None:
    cond = Conditioning(concat=torch.ones(1, 17, 2, 4, 4))
    inputs = HUNYUAN.network_inputs(I2V_LATENT_CONCAT, torch.zeros(1, 16, 2, 4, 4), torch.tensor(0.0), cond)
    assert inputs["x"].shape == (1, 33, 2, 4, 4)
    assert inputs["x"][:, 16:].eq(1).all()
