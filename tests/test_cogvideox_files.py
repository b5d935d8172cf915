"""CogVideoX's networks as others publish them: every layout at its full size, every kind of file, and LoRAs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.errors import CheckpointError, UserError
from vidgen.vidgen_core.families import FAMILIES, Found, identify
from vidgen.vidgen_core.families.cogvideox.config import (
    I2V_1_5_5B,
    I2V_5B,
    T2V_1_5_5B,
    T2V_2B,
    T2V_5B,
    NetworkConfig,
)
from vidgen.vidgen_core.families.cogvideox.keys import LAYOUTS
from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer
from vidgen.vidgen_core.model import inspect_file, load_network
from vidgen.vidgen_core.weights.header import Header, TensorInfo, read_header
from vidgen.vidgen_core.weights.load import check_names, load_module
from vidgen.vidgen_core.weights.quantise import Float8Linear, PackedLinear, QuantisedLinear, fit

CONTRACTS = Path(__file__).parent / "contracts"
PUBLISHED = {
    "cogvideox_2b": (T2V_2B, 1_693_783_872),
    "cogvideox_5b": (T2V_5B, 5_570_283_072),
    "cogvideox_5b_i2v": (I2V_5B, 5_625_087_552),
    "cogvideox_1_5_5b": (T2V_1_5_5B, 5_570_676_352),
    "cogvideox_1_5_5b_i2v": (I2V_1_5_5B, 5_571_594_880),
}
KINDS = ("diffusers", "kijai_single_file", "sat")

TINY = NetworkConfig(
    hidden_size=64,
    num_heads=2,
    num_layers=2,
    text_width=32,
    text_length=5,
    time_width=32,
    trained_grid=(3, 2, 3),
    rope_axes=(8, 12, 12),
)
"""heads of 32, from whose size the axes of the rotations follow"""
VARIANTS = {
    "5b": TINY,
    "5b_i2v": replace(TINY, in_channels=32, positions="learned"),
    "1.5_5b_i2v": replace(
        TINY, patch=(2, 2, 2), in_channels=32, offset_embed=True, rope_fit="slice", image_scale=I2V_1_5_5B.image_scale
    ),
}


def header_of(name: str) -> Header:
    """The header of a published file, without the file."""
    with gzip.open(CONTRACTS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        table = json.load(file)["tensors"]
    tensors = {key: TensorInfo(tuple(t["shape"]), getattr(torch, t["dtype"])) for key, t in table.items()}
    return Header(path=Path(name), tensors=tensors, metadata={}, num_bytes=1, digest="")


def assert_complete(header: Header, found: Found) -> int:
    """Built, translated and checked on the meta device as loading does it; the number of parameters."""
    part = found.family.parts[found.part]
    with torch.device("meta"):
        module = part.build(found.config, {})
    tensors = header.meta_tensors()
    native = tensors if found.layout == "native" else part.layouts[found.layout].to_native(tensors)
    wanted = module.state_dict()
    check_names(wanted, fit(native, wanted, torch.bfloat16), where=str(header.path))
    return sum(parameter.numel() for parameter in module.parameters())


def random_weights(config: NetworkConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = CogVideoXTransformer(config).state_dict()
    return {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in state.items()}


def given() -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of the tiny network's forward."""
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(*shape, generator=generator) for shape in ((1, 16, 3, 4, 6), (1, 5, 32)))
    return latents, torch.tensor([500.0]), text


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(TINY)


# --- every published layout, at its full size -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_network_is_known_and_complete(name: str, kind: str) -> None:
    config, num_parameters = PUBLISHED[name]
    header = header_of(f"{name}__{kind}")
    found = identify(header)
    assert (found.family.name, found.part, found.is_told) == ("cogvideox", "network", True)
    assert found.config == config
    expected = ("sat", "sat_fixed") if kind == "sat" else ("diffusers",)
    assert found.layout in expected
    assert assert_complete(header, found) == num_parameters


def test_all_the_contracts_are_there() -> None:
    assert len(list(CONTRACTS.glob("cogvideox_*b__*"))) + len(list(CONTRACTS.glob("cogvideox_*i2v__*"))) == 15


@pytest.mark.parametrize("missing", ["layers.3.dense.bias", "final_layer.linear.weight", "patch_embed.proj.bias"])
def test_a_missing_weight_is_named(missing: str) -> None:
    header = header_of("cogvideox_2b__sat")
    foreign = LAYOUTS["sat_fixed"].foreign_names(missing)[0]
    name = f"model.diffusion_model.{foreign}"
    assert name in header.tensors
    header = replace(header, tensors={key: info for key, info in header.tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=missing if missing != "final_layer.linear.weight" else "not of a family"):
        assert_complete(header, identify(header))


@pytest.mark.parametrize("prefix", ["model.", "transformer.", "diffusion_model.", "model.diffusion_model."])
def test_prefixes_of_other_programs(prefix: str) -> None:
    plain = header_of("cogvideox_5b__diffusers")
    header = replace(plain, tensors={prefix + name: info for name, info in plain.tensors.items()})
    found = identify(header)
    assert (found.config, found.layout) == (T2V_5B, "diffusers")
    assert assert_complete(header, found) == PUBLISHED["cogvideox_5b"][1]


def test_an_official_file_may_carry_more_than_the_network() -> None:
    plain = header_of("cogvideox_5b__sat")
    more = {"conditioner.embedders.0.x": TensorInfo((1,), torch.float32), "loss": TensorInfo((), torch.float32)}
    header = replace(plain, tensors={**plain.tensors, **more})
    assert assert_complete(header, identify(header)) == PUBLISHED["cogvideox_5b"][1]


def test_variants_with_other_inputs_are_refused_by_name() -> None:
    plain = header_of("cogvideox_5b__diffusers")
    proj = {"patch_embed.proj.weight": TensorInfo((3072, 48, 2, 2), torch.bfloat16)}
    with pytest.raises(CheckpointError, match="48 input channels"):
        identify(replace(plain, tensors={**plain.tensors, **proj}))


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_survive_every_layout_bit_for_bit(variant: str, layout: str) -> None:
    source = random_weights(VARIANTS[variant])
    if layout == "sat_fixed":
        source.pop("patch_embed.pos_embedding", None)
    again = LAYOUTS[layout].to_native(LAYOUTS[layout].to_foreign(source))
    assert again.keys() == source.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in source.items())


def test_the_twelve_chunks_of_the_official_modulation(weights: dict[str, Tensor]) -> None:
    """The official order is shift, scale, gate of attention and of the MLP for the video, then for the text; diffusers
    keeps those of attention in one layer and those of the MLP in another."""
    name = "layers.1.adaLN_modulation.weight"
    sat = LAYOUTS["sat"].to_foreign(weights)["mixins.adaln_layer.adaLN_modulations.1.1.weight"].chunk(12)
    diffusers = LAYOUTS["diffusers"].to_foreign(weights)
    first = diffusers["transformer_blocks.1.norm1.linear.weight"].chunk(6)
    second = diffusers["transformer_blocks.1.norm2.linear.weight"].chunk(6)
    assert all(torch.equal(sat[a], b) for a, b in zip((0, 1, 2, 6, 7, 8), first, strict=True))
    assert all(torch.equal(sat[a], b) for a, b in zip((3, 4, 5, 9, 10, 11), second, strict=True))
    assert torch.equal(torch.cat([*first, *second]), weights[name])


# --- every kind of file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "shards", "folder", "torch", "torch_bare"])
@pytest.mark.parametrize("layout", ["native", "diffusers", "sat"])
def test_a_network_loads_from_every_container_bit_for_bit(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, layout: str
) -> None:
    foreign = weights if layout == "native" else LAYOUTS[layout].to_foreign(weights)
    if layout == "sat":
        foreign = {f"model.diffusion_model.{name}": tensor for name, tensor in foreign.items()}
    path = published(kind, tmp_path, foreign)
    info = inspect_file(path)
    assert (info["family"], info["layout"]) == ("cogvideox", layout)
    model = load_network(path)
    assert replace(model.config, trained_grid=TINY.trained_grid, text_length=5) == TINY
    state = model.network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_folder_says_what_its_shapes_do_not(
    published: Callable[..., Path], tmp_path: Path, variant: str
) -> None:
    from vidgen.benchmarks.compare_cogvideox import diffusers_network

    config = VARIANTS[variant]
    folder = tmp_path / "transformer"
    published("folder", folder, LAYOUTS["diffusers"].to_foreign(random_weights(config)))
    (folder / "config.json").write_text(json.dumps(dict(diffusers_network(config).config)))
    assert load_network(folder).config == config


def test_a_folder_with_a_fixed_table_is_told_from_one_with_rotations(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    published("folder", tmp_path, LAYOUTS["diffusers"].to_foreign(weights))
    (tmp_path / "config.json").write_text('{"use_rotary_positional_embeddings": false}')
    config = load_network(tmp_path).config
    assert (config.positions, config.snr_shift) == ("sincos", 3.0)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ('{"num_layers": 30}', "num_layers 30, not 2"),
        ('{"in_channels": 32}', "in_channels 32, not 16"),
        ('{"num_attention_heads": 48}', "num_attention_heads 48, not 2"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"sample_height": null}', "damaged"),
    ],
)
def test_a_config_of_another_network_is_refused(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, told: str, says: str
) -> None:
    published("folder", tmp_path, LAYOUTS["diffusers"].to_foreign(weights))
    (tmp_path / "config.json").write_text(told)
    with pytest.raises(UserError, match=says):
        load_network(tmp_path)


@pytest.mark.parametrize(
    ("kind", "packing"), [("float8", ""), ("float8_scaled", ""), ("gguf", "Q8_0"), ("gguf", "Q4_0")]
)
def test_float8_and_gguf_files_compute_as_widened_ones(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, packing: str
) -> None:
    """As kijai and others repack: diffusers' names, the blocks' matrices small. A fused projection is put together."""
    foreign = LAYOUTS["diffusers"].to_foreign(weights)
    path = published(kind, tmp_path, foreign, packing=packing, architecture="cogvideox")
    small, dense = (
        load_module(
            read_header(path),
            lambda: CogVideoXTransformer(TINY),
            layout=LAYOUTS["diffusers"],
            dtype=torch.float32,
            keep_quantised=keeps,
        )
        for keeps in (True, False)
    )
    assert not any(isinstance(module, QuantisedLinear) for module in dense.modules())
    assert load_network(path).config.hidden_size == TINY.hidden_size
    wanted = PackedLinear if kind == "gguf" else Float8Linear
    assert sum(isinstance(module, wanted) for module in small.modules()) == 5 * TINY.num_layers
    with torch.no_grad():
        ours, wide = small(*given()), dense(*given())
    assert float((ours - wide).norm() / wide.norm()) <= 2e-6  # scales act before or after the sum


def test_networks_stream_from_the_file(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = published("safetensors", tmp_path, LAYOUTS["diffusers"].to_foreign(weights))
    with torch.no_grad():
        assert torch.equal(load_network(path, stream=True).network(*given()), load_network(path).network(*given()))


def test_defaults_of_the_variants() -> None:
    defaults = FAMILIES["cogvideox"].defaults
    small, large, later = defaults(T2V_2B), defaults(I2V_5B), defaults(I2V_1_5_5B)
    assert (small.sampler, small.cfg_schedule, small.fps) == ("ddim", "constant", 8)
    assert (large.sampler, large.cfg_schedule, large.num_frames) == ("cogvideox_dpm", "dynamic", 49)
    assert (later.height_px, later.width_px, later.num_frames, later.fps) == (768, 1360, 81, 16)
    assert all((d.cfg, d.num_steps, d.schedule, d.shift) == (6.0, 50, "trailing", 1.0) for d in (small, large, later))


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def lora_in(dialect: str, num_layers: int = 2, width: int = 64, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA of every attention projection as the trainers of CogVideoX write it; equal numbers in every dialect."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for layer in range(num_layers):
        for index, part in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            down = torch.randn(rank, width, generator=generator)
            up = torch.randn(width, rank, generator=generator)
            block = f"transformer_blocks.{layer}.attn1.{part}"
            if dialect == "sat":
                owner = f"model.diffusion_model.transformer.layers.{layer}.attention."
                owner += "dense" if part == "to_out.0" else "query_key_value"
                number = 0 if part == "to_out.0" else index
                tensors |= {f"{owner}.matrix_A.{number}": down, f"{owner}.matrix_B.{number}": up}
            elif dialect == "kohya":
                name = "lora_unet__" + block.replace(".", "_")
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(float(rank))
            else:
                prefix = {"peft": "transformer.", "raw": "base_model.model.", "bare": ""}[dialect]
                tensors |= {f"{prefix}{block}.lora_A.weight": down, f"{prefix}{block}.lora_B.weight": up}
    return tensors


def with_lora(
    weights: dict[str, Tensor],
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    alpha: float | None = None,
) -> Any:
    from safetensors.torch import save_file

    from vidgen.vidgen_core.model import VideoModel
    from vidgen.vidgen_core.weights.lora import read_lora

    save_file(tensors, path, metadata=metadata)
    network = CogVideoXTransformer(TINY).eval().requires_grad_(False)
    network.load_state_dict(weights)
    return VideoModel.of("cogvideox", TINY, network).with_lora(read_lora(path, alpha=alpha))


def ask(model: Any) -> Tensor:
    with torch.no_grad(), model.patched():
        return model.network(*given())


@pytest.mark.parametrize("dialect", ["peft", "raw", "bare", "sat", "kohya"])
def test_every_dialect_of_lora_is_the_same_change(weights: dict[str, Tensor], tmp_path: Path, dialect: str) -> None:
    changed = dict(weights)
    for layer in range(2):
        part = lora_in("bare")
        names = [f"transformer_blocks.{layer}.attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
        deltas = [part[f"{name}.lora_B.weight"] @ part[f"{name}.lora_A.weight"] for name in names]
        changed[f"layers.{layer}.query_key_value.weight"] = weights[
            f"layers.{layer}.query_key_value.weight"
        ] + torch.cat(deltas[:3])
        changed[f"layers.{layer}.dense.weight"] = weights[f"layers.{layer}.dense.weight"] + deltas[3]
    network = CogVideoXTransformer(TINY).eval().requires_grad_(False)
    network.load_state_dict(changed)
    model = with_lora(weights, tmp_path / "a.safetensors", lora_in(dialect))
    assert model.loras[0].lora.report.unmatched == ()
    with torch.no_grad():
        expected = network(*given())
    torch.testing.assert_close(ask(model), expected, rtol=1e-4, atol=1e-4)


TRAP = pytest.mark.parametrize(
    ("dialect", "metadata", "alpha", "scale", "warns"),
    [
        ("peft", None, None, 1.0, True),
        ("peft", None, 2.0, 0.5, False),
        ("peft", {"lora_alpha": "2", "r": "4"}, None, 0.5, False),
        ("peft", {"lora_alpha": "2", "r": "4"}, 100.0, 0.5, False),
        ("peft", {"lora_adapter_metadata": '{"transformer.lora_alpha": 2, "transformer.r": 4}'}, None, 0.5, False),
        ("sat", None, None, 1.0, True),
        ("sat", None, 1.0, 0.25, False),
        ("kohya", None, 2.0, 1.0, False),
    ],
)


@TRAP
def test_a_lora_that_does_not_say_its_alpha(
    weights: dict[str, Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    dialect: str,
    metadata: dict[str, str] | None,
    alpha: float | None,
    scale: float,
    warns: bool,
) -> None:
    """PEFT's files of CogVideoX were trained with alpha 64 at rank 128 and often do not say so; SAT's with alpha 1."""
    model = with_lora(weights, tmp_path / "a.safetensors", lora_in(dialect), metadata, alpha)
    lora = model.loras[0].lora
    assert {patch.change.scale for patch in lora.patches} == {scale}
    assert lora.report.alphas == (scale * 4,)
    assert ("does not say its alpha" in caplog.text) == warns


def test_hunyuans_trainers_mean_the_rank(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    from vidgen.vidgen_core.weights.lora import read_lora

    path = tmp_path / "a.safetensors"
    with_lora(weights, path, lora_in("peft"))
    assert not read_lora(path).tells_alpha
    assert FAMILIES["hunyuan"].lora_alpha_note == ""


def test_a_lora_of_another_size_or_family_is_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another size"):
        with_lora(weights, tmp_path / "a.safetensors", lora_in("peft", width=32))
    other = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 64),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(64, 4),
    }
    with pytest.raises(CheckpointError, match="Nothing in this LoRA belongs"):
        with_lora(weights, tmp_path / "b.safetensors", other)


def test_inspecting_a_lora_names_the_family(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from vidgen.vidgen_core.model import inspect_lora

    for dialect in ("peft", "sat", "kohya"):
        path = tmp_path / f"{dialect}.safetensors"
        save_file(lora_in(dialect), path)
        info = inspect_lora(read_header(path))
        assert (info["family"], info["num_modules"], info["unmatched"]) == ("cogvideox", 4, [])
