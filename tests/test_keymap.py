"""The table between layouts: exact in both directions, and it names what does not fit."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.errors import CheckpointError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS, diffusers_layout
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.weights.keymap import KeyMap, Row

MAP = KeyMap(
    [
        Row("stem", "embed.proj"),
        Row("blocks.*.qkv", ("layers.*.q", "layers.*.k", "layers.*.v")),
        Row("blocks.*.fused", ("layers.*.up", "layers.*.down"), parts=(1, 3)),
        Row("blocks.*.norm.weight", "layers.*.norm.scale"),
        Row("head", "out", chunk_order=(1, 0)),
    ],
    foreign="other",
    prefixes=("model.", "model.net."),
)


def native() -> dict[str, Tensor]:
    return {
        "stem.weight": torch.randn(4, 2),
        "stem.bias": torch.randn(4),
        "blocks.0.qkv.weight": torch.randn(6, 2),
        "blocks.12.qkv.weight": torch.randn(6, 2),
        "blocks.12.fused.bias": torch.arange(8.0),
        "blocks.3.norm.weight": torch.randn(5),
        "head.weight": torch.arange(8.0).view(4, 2),
    }


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_there_and_back():
    source = native()
    assert_equal(MAP.to_native(MAP.to_foreign(source)), source)


def test_names_parts_and_halves():
    source = native()
    foreign = MAP.to_foreign(source)
    assert torch.equal(foreign["layers.12.k.weight"], source["blocks.12.qkv.weight"][2:4])
    assert foreign["layers.12.up.bias"].tolist() == [0, 1]
    assert foreign["layers.12.down.bias"].tolist() == [2, 3, 4, 5, 6, 7]
    assert foreign["layers.3.norm.scale"] is source["blocks.3.norm.weight"]
    assert foreign["out.weight"][:, 0].tolist() == [4, 6, 0, 2]


def test_single_names():
    assert MAP.native_name("layers.7.v.weight") == "blocks.7.qkv.weight"
    assert MAP.foreign_names("blocks.7.qkv.bias") == ("layers.7.q.bias", "layers.7.k.bias", "layers.7.v.bias")


def test_parts_of_a_fused_weight_are_views():
    source = native()
    part = MAP.to_foreign(source)["layers.0.v.weight"]
    assert part.untyped_storage().data_ptr() == source["blocks.0.qkv.weight"].untyped_storage().data_ptr()


@pytest.mark.parametrize("prefix", ["", "model.", "model.net."])
def test_prefixes_are_stripped(prefix):
    source = native()
    foreign = {prefix + name: tensor for name, tensor in MAP.to_foreign(source).items()}
    assert_equal(MAP.to_native(foreign), source)


def test_a_prefix_must_be_on_every_name():
    foreign = MAP.to_foreign(native())
    foreign["model.stray.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"'model\.stray\.weight'"):
        MAP.to_native(foreign)


def test_an_unknown_name_is_named_with_a_neighbour():
    with pytest.raises(CheckpointError, match=r"'layers\.0\.qq\.weight'.*layers\.\*\.q"):
        MAP.to_native({"layers.0.qq.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="'blocks.x.qkv.weight'"):
        MAP.to_foreign({"blocks.x.qkv.weight": torch.zeros(6, 2)})


def test_a_missing_part_is_named():
    foreign = MAP.to_foreign(native())
    del foreign["layers.12.k.weight"]
    with pytest.raises(CheckpointError, match=r"'blocks\.12\.qkv\.weight'.*layers\.12\.k\.weight"):
        MAP.to_native(foreign)


def test_parts_that_do_not_divide_are_explained():
    with pytest.raises(CheckpointError, match="1 : 3"):
        MAP.to_foreign({"blocks.0.fused.weight": torch.zeros(6, 2)})


def test_one_scale_serves_all_parts():
    scale = torch.tensor(0.5)
    foreign = MAP.to_foreign({"blocks.0.qkv.scale_weight": scale})
    assert len(foreign) == 3
    assert MAP.to_native(foreign)["blocks.0.qkv.scale_weight"] == 0.5
    foreign["layers.0.k.scale_weight"] = torch.tensor(0.25)
    with pytest.raises(CheckpointError, match="different scales"):
        MAP.to_native(foreign)


def test_names_are_matched_whole():
    """A row for ``stem`` must not take ``stem2``, nor ``*`` a word."""
    for name in ("embed.proj2.weight", "embed.projection", "layers.a.q.weight", "layers.1.2.q.weight"):
        with pytest.raises(CheckpointError):
            MAP.native_name(name)


# HunyuanVideo's layouts

TINY = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=16,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(2, 2, 4),
    text_width=6,
    pooled_width=5,
)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_returns_equal_weights(layout):
    source = HunyuanVideoTransformer(TINY).state_dict()
    assert_equal(LAYOUTS[layout].to_native(LAYOUTS[layout].to_foreign(source)), source)


def test_diffusers_layout_of_another_mlp_ratio():
    source = HunyuanVideoTransformer(replace(TINY, mlp_ratio=2.5)).state_dict()
    foreign = diffusers_layout(2.5).to_foreign(source)
    assert foreign["single_transformer_blocks.0.proj_mlp.weight"].shape == (40, 16)
    # Joining needs no ratio, so a file can be read before its config is known.
    assert_equal(LAYOUTS["diffusers"].to_native(foreign), source)


def contract(name: str) -> dict[str, tuple[int, ...]]:
    path = Path(__file__).parent / "contracts" / f"{name}.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return {key: tuple(tensor["shape"]) for key, tensor in json.load(file)["tensors"].items()}


@pytest.mark.parametrize(
    ("layout", "name"),
    [("diffusers", "hunyuan_dit_t2v__diffusers"), ("comfy", "hunyuan_dit_t2v__comfy_internal_model_model")],
)
def test_published_files_become_native(layout, name):
    foreign = {key: torch.empty(shape, device="meta") for key, shape in contract(name).items()}
    translated = {key: tuple(tensor.shape) for key, tensor in LAYOUTS[layout].to_native(foreign).items()}
    assert translated == contract("hunyuan_dit_t2v__official_pt")
