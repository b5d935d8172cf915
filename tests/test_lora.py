"""LoRAs: every spelling against closed forms and diffusers, run time against merged, and off again to the bit."""

from __future__ import annotations

import copy
import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vidgen.vidgen_core.errors import CheckpointError, FileError, SettingsError, UserError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.lora import BlockStrengths, LoraUse, apply_loras, bind_to, module_names
from vidgen.vidgen_core.weights.adapters import LowRank
from vidgen.vidgen_core.weights.keymap import KeyMap, Row
from vidgen.vidgen_core.weights.lora import Lora, read_lora
from vidgen.vidgen_core.weights.lora_names import BoundLora, ModuleNames, bind
from vidgen.vidgen_core.weights.lora_write import DIALECTS, write_lora

TINY = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=16,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(2, 2, 4),
    text_width=12,
    pooled_width=10,
    guidance_embed=False,
)
D, RANK = TINY.hidden_size, 4
EXACT = {"atol": 0.0, "rtol": 0.0}
CLOSE = {"atol": 1e-6, "rtol": 1e-6}
"""float32 rounding of sums of a few products in another order"""
RELATIVE = 1e-6
"""the same through a whole forward"""


def build(config: NetworkConfig = TINY) -> HunyuanVideoTransformer:
    network = HunyuanVideoTransformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> HunyuanVideoTransformer:
    return build()


@pytest.fixture(scope="module")
def names(network: nn.Module) -> ModuleNames:
    return module_names(network, LAYOUTS)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def forward(network: nn.Module, channels: int = TINY.in_channels) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        return network(
            x=torch.randn(1, channels, 2, 4, 4, generator=generator),
            timestep=torch.tensor([444.0]),
            context=torch.randn(1, 5, TINY.text_width, generator=generator),
            context_mask=None,
            pooled=torch.randn(1, TINY.pooled_width, generator=generator),
        )


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Lora:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return read_lora(path)


def deltas(bound: BoundLora, network: nn.Module) -> dict[str, Tensor]:
    """module -> the dense difference of its whole weight."""
    found: dict[str, Tensor] = {}
    for patch in bound.patches:
        weight = network.get_submodule(patch.module).weight
        assert isinstance(weight, Tensor)
        assert patch.change is not None
        total = found.setdefault(patch.module, torch.zeros_like(weight))
        rows = slice(patch.start, patch.start + patch.length)
        total[rows] += patch.change.delta(weight[rows]).reshape(total[rows].shape)
    return found


def pair(out: int, into: int, *, rank: int = RANK, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(A, B)."""
    return randn(rank, into, seed=seed), randn(out, rank, seed=seed + 1)


# --- names ------------------------------------------------------------------------------------------------------------


def linears(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv3d)]


def test_every_split_name_is_a_module_of_diffusers(
    network: HunyuanVideoTransformer, names: ModuleNames, network_twin: Callable[[Any], Any]
) -> None:
    twin = dict(network_twin(network).named_modules())
    split = {name: place for module in linears(network) for name, place in names.parts(module, "diffusers")}
    assert len(split) > 100 - len(linears(network))
    for name, place in split.items():
        assert place.length == twin[name].weight.shape[0], name
    left = {n for n, m in twin.items() if isinstance(m, nn.Linear | nn.Conv3d)} - split.keys()
    assert left == set()


@pytest.mark.parametrize("layout", ["native", "comfy", "diffusers"])
@pytest.mark.parametrize(
    ("prefix", "joined"),
    [
        ("", False),
        ("transformer.", False),
        ("diffusion_model.", False),
        ("model.diffusion_model.", False),
        ("base_model.model.", False),
        ("base_model.model.transformer.", False),
        ("unet.", False),
        ("lora_unet_", True),
        ("lora_unet__", True),
        ("lora_transformer_", True),
        ("lycoris_", True),
        ("Hunyuan_video_I2V_lora_", True),
    ],
)
def test_every_linear_is_found_under_every_name(
    network: nn.Module, names: ModuleNames, layout: str, prefix: str, joined: bool
) -> None:
    for module in linears(network):
        covered = 0
        for name, place in names.parts(module, layout):
            found = names.find(prefix + (name.replace(".", "_") if joined else name))
            assert found is not None, name
            assert found[0] == place or found[0].order is not None
            assert (found[0].module, layout in found[1]) == (module, True)
            covered += place.length
        assert covered == names.shapes[module][0]


@pytest.mark.parametrize("name", ["", "lora_unet_", "lora_unet_double_blocks_9_img_attn_qkv", "double_blocks.0", "x.y"])
def test_no_other_name_is_found(names: ModuleNames, name: str) -> None:
    assert names.find(name) is None


@pytest.fixture(scope="module")
def published() -> ModuleNames:
    with torch.device("meta"):
        return module_names(HunyuanVideoTransformer(NetworkConfig()), LAYOUTS)


@pytest.mark.parametrize(
    ("layout", "contract", "prefix"),
    [
        ("native", "official_pt", ""),
        ("comfy", "comfy_internal_model_model", "model.model."),
        ("diffusers", "diffusers", ""),
    ],
)
def test_every_matrix_of_every_published_file_is_found(
    published: ModuleNames, layout: str, contract: str, prefix: str
) -> None:
    path = Path(__file__).parent / "contracts" / f"hunyuan_dit_t2v__{contract}.json.gz"
    tensors = json.loads(gzip.decompress(path.read_bytes()))["tensors"]
    matrices = {name: t["shape"] for name, t in tensors.items() if name.endswith(".weight") and len(t["shape"]) > 1}
    assert len(matrices) > 300
    for name, shape in matrices.items():
        stem = name.removeprefix(prefix).removesuffix(".weight")
        for spelt in (f"transformer.{stem}", "lora_unet_" + stem.replace(".", "_")):
            found = published.find(spelt)
            assert found is not None, spelt
            place, layouts = found
            assert layout in layouts
            assert [place.length, *published.shapes[place.module][1:]] == shape


def test_names_of_the_published_network(published: ModuleNames) -> None:
    """As LoRAs in the wild spell them, at the published size."""
    names = published
    width = 3072
    for name, module, start, length in [
        ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks.0.img_attn_qkv", 0, 3 * width),
        ("lora_unet_double_blocks_3_img_mlp_fc1", "double_blocks.3.img_mlp.fc1", 0, 4 * width),
        ("lora_unet_double_blocks_3_img_mlp_0", "double_blocks.3.img_mlp.fc1", 0, 4 * width),
        ("lora_unet_single_blocks_39_modulation_lin", "single_blocks.39.modulation.linear", 0, 3 * width),
        ("transformer.double_blocks.0.txt_attn_qkv", "double_blocks.0.txt_attn_qkv", 0, 3 * width),
        ("diffusion_model.double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn_qkv", 0, 3 * width),
        ("transformer.transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn_qkv", width, width),
        ("transformer.transformer_blocks.0.attn.add_v_proj", "double_blocks.0.txt_attn_qkv", 2 * width, width),
        ("transformer.single_transformer_blocks.5.proj_mlp", "single_blocks.5.linear1", 3 * width, 4 * width),
        ("transformer.x_embedder.proj", "img_in.proj", 0, width),
    ]:
        found = names.find(name)
        assert found is not None, name
        place = found[0]
        assert (place.module, place.start, place.length) == (module, start, length)


# --- spellings and alpha ----------------------------------------------------------------------------------------------

A, B = pair(3 * D, D)
QKV = "double_blocks.1.img_attn_qkv"


@pytest.mark.parametrize(
    ("keys", "extra", "metadata", "scale"),
    [
        # kohya and musubi: alpha / rank, 1 without alpha, and a trainer's alpha 0 means the rank
        ("lora_unet_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {"alpha": 1.0}, {}, 0.25),
        ("lora_unet_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {"alpha": 8.0}, {}, 2.0),
        ("lora_unet_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {"alpha": 0.0}, {}, 1.0),
        ("lora_unet_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {}, {}, 1.0),
        ("lora_unet_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {}, {"lora_alpha": "1"}, 1.0),
        ("lora_transformer_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {"alpha": 1.0}, {}, 0.25),
        # Tencent's loader ignores alpha
        ("Hunyuan_video_I2V_lora_double_blocks_1_img_attn_qkv.lora_{down,up}.weight", {"alpha": 1.0}, {}, 1.0),
        # diffusion-pipe, musubi --target other, ComfyUI: 1, or alpha / rank where a tensor says so
        ("transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight", {}, {}, 1.0),
        ("diffusion_model.double_blocks.1.img_attn_qkv.lora_{A,B}.weight", {}, {}, 1.0),
        ("diffusion_model.double_blocks.1.img_attn.qkv.lora_{A,B}.weight", {"alpha": 2.0}, {}, 0.5),
        ("model.diffusion_model.double_blocks.1.img_attn.qkv.lora_{A,B}.weight", {}, {}, 1.0),
        ("diffusion_model.double_blocks.1.img_attn_qkv.lora_{A,B}.default.weight", {}, {}, 1.0),
        ("double_blocks.1.img_attn_qkv.lora_{down,up}.weight", {"alpha": 2.0}, {}, 0.5),
        # PEFT: the metadata says lora_alpha, whole or with a component's prefix
        ("transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight", {}, {"lora_alpha": "2", "r": "4"}, 0.5),
        ("transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight", {}, {"transformer.lora_alpha": "8"}, 2.0),
        ("transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight", {}, {"lora_alpha": "None"}, 1.0),
        (
            "transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight",
            {},
            {"lora_alpha": "8", "alpha_pattern": '{"img_attn_qkv": 2}'},
            0.5,
        ),
        (
            "transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight",
            {},
            {"lora_adapter_metadata": '{"transformer.r": 4, "text_encoder.lora_alpha": 1}'},
            1.0,
        ),
        (
            "transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight",
            {},
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 2, "transformer.r": 4}'},
            0.5,
        ),
        (
            "transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight",
            {},
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 2, "transformer.use_rslora": true}'},
            2 / math.sqrt(4),
        ),
        (
            "transformer.double_blocks.1.img_attn_qkv.lora_{A,B}.weight",
            {},
            {"lora_adapter_metadata": '{"lora_alpha": 2, "alpha_pattern": {"img_attn_qkv": 1, "other": 9}}'},
            0.25,
        ),
    ],
)
def test_spelling_and_scale(
    tmp_path: Path,
    network: nn.Module,
    keys: str,
    extra: dict[str, float],
    metadata: dict[str, str],
    scale: float,
) -> None:
    stem, _, ending = keys.partition(".lora_{")
    (down, up), rest = ending.split("}")[0].split(","), ending.split("}")[1]
    tensors = {f"{stem}.lora_{down}{rest}": A, f"{stem}.lora_{up}{rest}": B}
    tensors |= {f"{stem}.{name}": torch.tensor(value) for name, value in extra.items()}
    bound = bind_to(saved(tmp_path / "a.safetensors", tensors, metadata), network, LAYOUTS)
    assert bound.report.modules == (QKV,)
    assert bound.report.unmatched == ()
    assert bound.report.ranks == (RANK,)
    torch.testing.assert_close(deltas(bound, network)[QKV], scale * B @ A, **CLOSE)


@pytest.mark.parametrize(("root", "scale"), [(False, 0.5), (True, 1.0)])
def test_a_raw_peft_file_has_its_alpha_beside_it(tmp_path: Path, network: nn.Module, root: bool, scale: float) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "r": 4, "use_rslora": root}))
    stem = f"base_model.model.{QKV}"
    lora = saved(tmp_path / "a.safetensors", {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B})
    torch.testing.assert_close(deltas(bind_to(lora, network, LAYOUTS), network)[QKV], scale * B @ A, **CLOSE)
    other = saved(
        tmp_path / "b.safetensors", {f"transformer.{QKV}.lora_A.weight": A, f"transformer.{QKV}.lora_B.weight": B}
    )
    # The file beside belongs to raw PEFT files only: in a folder of many LoRAs it says nothing of the others.
    torch.testing.assert_close(deltas(bind_to(other, network, LAYOUTS), network)[QKV], B @ A, **EXACT)


@pytest.mark.parametrize(
    "form",
    ["attn.to_k.lora.{}.weight", "attn.processor.to_k_lora.{}.weight", "attn.to_k.lora_linear_layer.{}.weight"],
)
def test_old_diffusers_names(tmp_path: Path, network: nn.Module, form: str) -> None:
    a, b = pair(D, D)
    out = form.replace("to_k", "to_out")
    tensors = {f"unet.transformer_blocks.1.{form.format(w)}": t for w, t in (("down", a), ("up", b))}
    tensors |= {f"unet.transformer_blocks.1.{out.format(w)}": t for w, t in (("down", a), ("up", b))}
    bound = bind_to(saved(tmp_path / "a.safetensors", tensors), network, LAYOUTS)
    found = deltas(bound, network)
    expected = torch.zeros(3 * D, D)
    expected[D : 2 * D] = b @ a
    torch.testing.assert_close(found[QKV], expected, **EXACT)
    torch.testing.assert_close(found["double_blocks.1.img_attn_proj"], b @ a, **EXACT)
    assert bound.report.dialect.startswith("old diffusers")


def test_factors_kept_as_convolutions_of_one_pixel(tmp_path: Path, network: nn.Module) -> None:
    """As trainers for pictures write them, also for linear layers."""
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": A[..., None, None], f"{stem}.lora_up.weight": B[..., None, None]}
    bound = bind_to(saved(tmp_path / "a.safetensors", tensors), network, LAYOUTS)
    check_both_ways(network, [LoraUse(lora=bound)], {QKV: B @ A})


def test_a_pt_file_of_plain_tensors(tmp_path: Path, network: nn.Module) -> None:
    tensors = {f"transformer.{QKV}.lora_A.weight": A, f"transformer.{QKV}.lora_B.weight": B}
    for content in (tensors, {"state_dict": tensors}):
        torch.save(content, tmp_path / "a.pt")
        bound = bind_to(read_lora(tmp_path / "a.pt"), network, LAYOUTS)
        torch.testing.assert_close(deltas(bound, network)[QKV], B @ A, **EXACT)


def test_sat_matrices_are_equal_parts_of_the_fused_rows(tmp_path: Path) -> None:
    """CogVideoX's own training writes q, k and v apart under the name of the fused layer."""
    names = ModuleNames(
        {"layers.0.attention.query_key_value": (12, 4), "layers.0.attention.dense": (4, 4)},
        {"diffusers": KeyMap([Row("layers.*.attention.query_key_value", ("b.*.q", "b.*.k", "b.*.v"))], foreign="d")},
    )
    stem = "model.diffusion_model.layers.0.attention"
    factors = {i: pair(4, 4, rank=2, seed=i) for i in range(3)}
    tensors = {f"{stem}.query_key_value.matrix_A.{i}": a for i, (a, _) in factors.items()}
    tensors |= {f"{stem}.query_key_value.matrix_B.{i}": b for i, (_, b) in factors.items()}
    tensors |= {f"{stem}.dense.matrix_A.0": factors[0][0], f"{stem}.dense.matrix_B.0": factors[0][1]}
    bound = bind(saved(tmp_path / "a.safetensors", tensors), names)
    starts = {(p.module, p.start): p for p in bound.patches}
    assert len(starts) == 4
    for i, (a, b) in factors.items():
        patch = starts["layers.0.attention.query_key_value", 4 * i]
        assert patch.change is not None
        torch.testing.assert_close(patch.change.delta(), b @ a, **EXACT)


# --- from dialect to dialect ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> BoundLora:
    """A change of every linear layer, under native names, alpha such that the scale is exact."""
    tensors = {}
    for index, module in enumerate(linears(network)):
        out, into, *kernel = network.get_submodule(module).weight.shape  # type: ignore[union-attr, misc]
        tensors[f"diffusion_model.{module}.lora_A.weight"] = randn(RANK, into, *kernel, seed=index)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = randn(out, RANK, *(1 for _ in kernel), seed=index)
        tensors[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0)
    lora = saved(tmp_path_factory.mktemp("lora") / "everywhere.safetensors", tensors)
    return bind_to(lora, network, LAYOUTS)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_there_and_back_through_every_dialect(
    dialect: str, everywhere: BoundLora, network: nn.Module, names: ModuleNames, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    write_lora(path, everywhere.patches, names, dialect)
    back = bind(read_lora(path), names)
    assert set(back.report.modules) == set(linears(network))
    assert back.report.unmatched == ()
    write_lora(tmp_path / "b.safetensors", back.patches, names, "comfy")
    again = bind(read_lora(tmp_path / "b.safetensors"), names)
    expected = deltas(everywhere, network)
    for bound in (back, again):
        for module, delta in deltas(bound, network).items():
            # Products of fewer rows at once may add up in another order; nothing else differs.
            torch.testing.assert_close(delta, expected[module], **CLOSE)
    same_rank = again.report.ranks == (RANK,)
    assert same_rank, "parts that share their A become one LoRA of the same rank again"


@pytest.mark.parametrize("dialect", [name for name, form in DIALECTS.items() if form.layout != "diffusers"])
def test_renaming_alone_keeps_the_bits(
    dialect: str, everywhere: BoundLora, network: nn.Module, names: ModuleNames, tmp_path: Path
) -> None:
    write_lora(tmp_path / "a.safetensors", everywhere.patches, names, dialect)
    back = deltas(bind(read_lora(tmp_path / "a.safetensors"), names), network)
    # A scale of a half is exact wherever it is put.
    assert all(torch.equal(back[module], delta) for module, delta in deltas(everywhere, network).items())


def test_the_split_dialect_copies_a_and_cuts_b(everywhere: BoundLora, names: ModuleNames, tmp_path: Path) -> None:
    from vidgen.vidgen_core.weights.lora_write import dialect_tensors

    tensors = dialect_tensors(everywhere.patches, names, "diffusers")
    by_module = {patch.module: patch.change for patch in everywhere.patches}
    fused = by_module["single_blocks.0.linear1"]
    assert isinstance(fused, LowRank)
    stem, row = "transformer.single_transformer_blocks.0", 0
    for part, length in (("attn.to_q", D), ("attn.to_k", D), ("attn.to_v", D), ("proj_mlp", 4 * D)):
        assert torch.equal(tensors[f"{stem}.{part}.lora_A.weight"], fused.down)
        assert torch.equal(tensors[f"{stem}.{part}.lora_B.weight"], 0.5 * fused.up[row : row + length])
        row += length
    final = by_module["final_layer.adaLN_modulation.1"]
    assert isinstance(final, LowRank)
    assert torch.equal(tensors["transformer.norm_out.linear.lora_A.weight"], final.down)
    swapped = torch.cat([final.up[D:], final.up[:D]])
    assert torch.equal(tensors["transformer.norm_out.linear.lora_B.weight"], 0.5 * swapped)


def test_split_parts_with_factors_of_their_own_become_block_diagonal(
    network: nn.Module, names: ModuleNames, tmp_path: Path
) -> None:
    stem, tensors, expected = "transformer.transformer_blocks.0.attn", {}, torch.zeros(3 * D, D)
    for index, name in ((0, "to_q"), (2, "to_v")):  # no to_k: nothing changes there
        a, b = pair(D, D, seed=index)
        tensors |= {f"{stem}.{name}.lora_A.weight": a, f"{stem}.{name}.lora_B.weight": b}
        expected[index * D : (index + 1) * D] = b @ a
    split = bind(saved(tmp_path / "a.safetensors", tensors), names)
    write_lora(tmp_path / "b.safetensors", split.patches, names, "musubi")
    fused = bind(read_lora(tmp_path / "b.safetensors"), names)
    assert fused.report.ranks == (2 * RANK,)
    for bound in (split, fused):
        torch.testing.assert_close(deltas(bound, network)["double_blocks.0.img_attn_qkv"], expected, **CLOSE)


def test_a_split_lora_does_to_ours_what_it_does_to_diffusers(
    network: HunyuanVideoTransformer, everywhere: BoundLora, names: ModuleNames, tmp_path: Path, network_twin: Any
) -> None:
    """Its names, its rows, its swapped halves: all through the forward of another implementation."""
    write_lora(tmp_path / "a.safetensors", everywhere.patches, names, "diffusers")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    twin = network_twin(network)
    for key, down in tensors.items():
        if key.endswith(".lora_A.weight"):
            up = tensors[key.replace("lora_A", "lora_B")]
            module = twin.get_submodule(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            module.weight.data += 0.3 * (up.flatten(1) @ down.flatten(1)).reshape(module.weight.shape)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, TINY.in_channels, 2, 4, 4, generator=generator)
    context = torch.randn(1, 5, TINY.text_width, generator=generator)
    pooled = torch.randn(1, TINY.pooled_width, generator=generator)
    with torch.no_grad():
        mask = torch.ones(1, 5)
        theirs = twin(x, torch.tensor([444.0]), context, mask, pooled, return_dict=False)[0]
    lora = bind(read_lora(tmp_path / "a.safetensors"), names)
    plain = forward(network)
    with apply_loras(network, [LoraUse(lora=lora, strength=0.3)]):
        ours = forward(network)
    assert relative(ours, plain) > 0.1
    # Two implementations and a sum in another order: as close as they are without a LoRA.
    assert relative(ours, theirs) < 5e-6


# --- other forms than low rank ----------------------------------------------------------------------------------------

FC1 = "single_blocks.0.modulation.linear"  # (3 D, D)
STEM = "lora_unet_single_blocks_0_modulation_linear"
OUT, IN = 3 * D, D


def loha() -> tuple[dict[str, Tensor], Tensor]:
    t = {f"hada_w{n}_{x}": randn(*s, seed=n) for n in (1, 2) for x, s in (("a", (OUT, 4)), ("b", (4, IN)))}
    expected = torch.zeros(OUT, IN)
    for i in range(OUT):
        for j in range(IN):
            expected[i, j] = (t["hada_w1_a"][i] @ t["hada_w1_b"][:, j]) * (t["hada_w2_a"][i] @ t["hada_w2_b"][:, j])
    return t | {"alpha": torch.tensor(2.0)}, 0.5 * expected


def lokr(first: bool, second: bool) -> tuple[dict[str, Tensor], Tensor]:
    """``first``, ``second``: whether that factor is itself a product."""
    t: dict[str, Tensor] = {}
    w1, w2 = randn(4, 2), randn(OUT // 4, IN // 2)
    if first:
        t |= {"lokr_w1_a": randn(4, 2), "lokr_w1_b": randn(2, 2)}
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"]
    else:
        t["lokr_w1"] = w1
    if second:
        t |= {"lokr_w2_a": randn(OUT // 4, 2), "lokr_w2_b": randn(2, IN // 2)}
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    else:
        t["lokr_w2"] = w2
    # Block (i, j) of a Kronecker product is w1[i, j] * w2; two whole factors have no rank for alpha to act on.
    expected = torch.cat([torch.cat([w1[i, j] * w2 for j in range(2)], 1) for i in range(4)])
    return t | {"alpha": torch.tensor(1.0)}, expected * (0.5 if first or second else 1.0)


def dora(by_rows: bool, base: Tensor, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    a, b = pair(OUT, IN)
    moved = base + 0.5 * b @ a
    if by_rows:
        m = 1 + randn(OUT).abs()
        expected = torch.stack([m[i] * moved[i] / moved[i].norm() for i in range(OUT)])
    else:
        m = 1 + randn(IN).abs()
        expected = torch.stack([m[j] * moved[:, j] / moved[:, j].norm() for j in range(IN)], dim=1)
    t = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(2.0), "dora_scale": m.reshape(shape)}
    return t, expected - base


FORMS: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]] = {
    "loha": lambda base: loha(),
    "lokr": lambda base: lokr(False, False),
    "lokr, first factored": lambda base: lokr(True, False),
    "lokr, second factored": lambda base: lokr(False, True),
    "lokr, both factored": lambda base: lokr(True, True),
    "dora by rows": lambda base: dora(True, base, (OUT, 1)),
    "dora as PEFT": lambda base: dora(True, base, (OUT,)),
    "dora by columns": lambda base: dora(False, base, (1, IN)),
    "diff": lambda base: ({"diff": randn(OUT, IN)}, randn(OUT, IN)),
    "set_weight": lambda base: ({"set_weight": randn(OUT, IN)}, randn(OUT, IN) - base),
}


def weight_of(network: nn.Module, module: str) -> Tensor:
    weight = network.get_submodule(module).weight
    assert isinstance(weight, Tensor)
    return weight


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_its_closed_form(form: str, network: nn.Module, names: ModuleNames, tmp_path: Path) -> None:
    tensors, expected = FORMS[form](weight_of(network, FC1))
    bound = bind(saved(tmp_path / "a.safetensors", {f"{STEM}.{k}": v for k, v in tensors.items()}), names)
    torch.testing.assert_close(deltas(bound, network)[FC1], expected, **CLOSE)
    # and spelt again
    for dialect in ("musubi", "comfy-internal"):
        write_lora(tmp_path / "b.safetensors", bound.patches, names, dialect)
        again = bind(read_lora(tmp_path / "b.safetensors"), names)
        torch.testing.assert_close(deltas(again, network)[FC1], expected, **CLOSE)


@pytest.mark.parametrize("form", ["loha", "lokr, both factored", "dora by rows", "diff", "set_weight"])
def test_a_form_is_cut_for_the_split_dialect(form: str, network: nn.Module, names: ModuleNames, tmp_path: Path) -> None:
    """(3 D, D) is also the shape of a fused qkv."""
    tensors, _ = FORMS[form](weight_of(network, QKV))
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    bound = bind(saved(tmp_path / "a.safetensors", {f"{stem}.{k}": v for k, v in tensors.items()}), names)
    write_lora(tmp_path / "b.safetensors", bound.patches, names, "diffusers")
    split = bind(read_lora(tmp_path / "b.safetensors"), names)
    assert len(split.patches) == 3
    torch.testing.assert_close(deltas(split, network)[QKV], deltas(bound, network)[QKV], **CLOSE)


def test_a_dora_by_columns_cannot_be_cut(network: nn.Module, names: ModuleNames, tmp_path: Path) -> None:
    tensors, _ = FORMS["dora by columns"](weight_of(network, QKV))
    stem = "lora_unet_double_blocks_1_img_attn_qkv"
    bound = bind(saved(tmp_path / "a.safetensors", {f"{stem}.{k}": v for k, v in tensors.items()}), names)
    with pytest.raises(CheckpointError, match="cannot be cut"):
        write_lora(tmp_path / "b.safetensors", bound.patches, names, "diffusers")


CONV = (D, TINY.in_channels, 1, 2, 2)


def conv_forms() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    out, into, *kernel = CONV
    down, up = randn(RANK, into, *kernel), randn(out, RANK, 1, 1, 1)
    yield {"lora_down.weight": down, "lora_up.weight": up}, torch.einsum("or,rithw->oithw", up.flatten(1), down)
    a, b, mid = randn(RANK, into, 1, 1, 1), randn(out, RANK, 1, 1, 1), randn(RANK, RANK, *kernel)
    core = torch.einsum("os,srthw,ri->oithw", b.flatten(1), mid, a.flatten(1))
    yield {"lora_down.weight": a, "lora_up.weight": b, "lora_mid.weight": mid}, core
    w1, wa, wb, t2 = randn(4, 2), randn(2, out // 4), randn(2, into // 2), randn(2, 2, *kernel)
    w2 = torch.einsum("pa,pqthw,qb->abthw", wa, t2, wb)
    kron = torch.cat([torch.cat([w1[i, j] * w2 for j in range(2)], 1) for i in range(4)])
    yield {"lokr_w1": w1, "lokr_w2_a": wa, "lokr_w2_b": wb, "lokr_t2": t2}, kron
    h = {f"hada_w{n}_{x}": randn(*s, seed=n) for n in (1, 2) for x, s in (("a", (3, out)), ("b", (3, into)))}
    h |= {f"hada_t{n}": randn(3, 3, *kernel, seed=n) for n in (1, 2)}
    one, two = (
        torch.einsum("pa,pqthw,qb->abthw", h[f"hada_w{n}_a"], h[f"hada_t{n}"], h[f"hada_w{n}_b"]) for n in (1, 2)
    )
    yield h, one * two
    yield {"diff": randn(*CONV)}, randn(*CONV)


@pytest.mark.parametrize("index", range(5))
def test_the_input_convolution(index: int, network: nn.Module, names: ModuleNames, tmp_path: Path) -> None:
    tensors, expected = list(conv_forms())[index]
    lora = saved(tmp_path / "a.safetensors", {f"lora_unet_img_in_proj.{k}": v for k, v in tensors.items()})
    bound = bind(lora, names)
    torch.testing.assert_close(deltas(bound, network)["img_in.proj"], expected, **CLOSE)
    check_both_ways(network, [LoraUse(lora=bound)], {"img_in.proj": expected})


# --- on a network -----------------------------------------------------------------------------------------------------


def changed(network: nn.Module, differences: dict[str, Tensor], biases: dict[str, Tensor] | None = None) -> Tensor:
    """The forward of a copy whose weights are the sums."""
    other = copy.deepcopy(network)
    for module, delta in differences.items():
        weight_of(other, module).data += delta
    for module, delta in (biases or {}).items():
        other.get_submodule(module).bias.data += delta  # type: ignore[union-attr, operator]
    return forward(other)


def check_both_ways(
    network: nn.Module,
    uses: list[LoraUse],
    differences: dict[str, Tensor],
    biases: dict[str, Tensor] | None = None,
) -> None:
    """Run time and merged equal the closed form, and leave the network as it was."""
    stored = {name: (parameter, parameter.clone()) for name, parameter in network.named_parameters()}
    before = forward(network)
    expected = changed(network, differences, biases)
    assert relative(expected, before) > 1e-3, "the test would not see the change"
    for mode in ("runtime", "merge", "auto"):
        applied = apply_loras(network, [replace(use, mode=mode) for use in uses])
        assert relative(forward(network), expected) < RELATIVE, mode
        applied.remove()
        applied.remove()
        assert torch.equal(forward(network), before)
        now = dict(network.named_parameters())
        assert now.keys() == stored.keys()
        for name, (parameter, bits) in stored.items():
            assert now[name] is parameter
            assert torch.equal(parameter, bits)
        assert not any(module._forward_hooks or "forward" in vars(module) for module in network.modules())


def test_run_time_equals_merged_on_every_layer(network: nn.Module, everywhere: BoundLora) -> None:
    differences = {module: 0.3 * delta for module, delta in deltas(everywhere, network).items()}
    check_both_ways(network, [LoraUse(lora=everywhere, strength=0.3)], differences)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_a_form_on_a_network(
    form: str, strength: float, network: nn.Module, names: ModuleNames, tmp_path: Path
) -> None:
    tensors, expected = FORMS[form](weight_of(network, FC1))
    bound = bind(saved(tmp_path / "a.safetensors", {f"{STEM}.{k}": v for k, v in tensors.items()}), names)
    check_both_ways(network, [LoraUse(lora=bound, strength=strength)], {FC1: strength * expected})


def test_biases_and_norms(network: nn.Module, names: ModuleNames, tmp_path: Path) -> None:
    """``diff_b`` is a difference, the bias of ``lora_B`` is scaled like its weight; norms change by ``diff``."""
    a, b = pair(OUT, IN)
    stem, peft = "diffusion_model.single_blocks.0.modulation.linear", f"transformer.{QKV}"
    norm, other = "double_blocks.0.img_attn_q_norm", "single_blocks.1.k_norm"
    head = D // TINY.num_heads
    tensors = {
        f"{stem}.diff_b": randn(OUT),
        f"{peft}.lora_A.weight": a,
        f"{peft}.lora_B.weight": b,
        f"{peft}.lora_B.bias": randn(OUT, seed=3),
        f"{peft}.alpha": torch.tensor(2.0),
        f"lycoris_{norm.replace('.', '_')}.w_norm": randn(head, seed=4),
        "diffusion_model.single_blocks.1.norm.key_norm.scale.set_weight": randn(head, seed=5),
    }
    bound = bind(saved(tmp_path / "a.safetensors", tensors), names)
    assert bound.report.unmatched == ()
    s = 0.7
    differences = {
        QKV: s * 0.5 * b @ a,
        norm: s * randn(head, seed=4),
        other: s * (randn(head, seed=5) - weight_of(network, other)),
    }
    biases = {FC1: s * randn(OUT), QKV: s * 0.5 * randn(OUT, seed=3)}
    check_both_ways(network, [LoraUse(lora=bound, strength=s)], differences, biases)


@pytest.mark.parametrize("dialect", ["musubi", "diffusers"])
def test_several_at_once_in_any_order(
    dialect: str, network: nn.Module, everywhere: BoundLora, names: ModuleNames, tmp_path: Path
) -> None:
    tensors, difference = FORMS["dora by rows"](weight_of(network, FC1))
    dora_lora = bind(saved(tmp_path / "d.safetensors", {f"{STEM}.{k}": v for k, v in tensors.items()}), names)
    write_lora(tmp_path / "a.safetensors", everywhere.patches, names, dialect)
    uses = [
        LoraUse(lora=everywhere, strength=0.3),
        LoraUse(lora=bind(read_lora(tmp_path / "a.safetensors"), names), strength=-0.2),
        LoraUse(lora=dora_lora, strength=0.5),
    ]
    differences = {module: 0.1 * delta for module, delta in deltas(everywhere, network).items()}
    differences[FC1] = differences[FC1] + 0.5 * difference
    check_both_ways(network, uses, differences)
    check_both_ways(network, uses[::-1], differences)


def test_strength_nought_does_nothing(network: nn.Module, everywhere: BoundLora) -> None:
    before = forward(network)
    with apply_loras(network, [LoraUse(lora=everywhere, strength=0.0)]) as applied:
        assert not any(module._forward_hooks for module in network.modules())
        assert applied.merged == []
        assert torch.equal(forward(network), before)


def test_an_error_inside_takes_the_lora_off(network: nn.Module, everywhere: BoundLora) -> None:
    before = forward(network)
    for mode in ("runtime", "merge"):
        with pytest.raises(KeyboardInterrupt), apply_loras(network, [LoraUse(lora=everywhere, mode=mode)]):
            raise KeyboardInterrupt
        assert torch.equal(forward(network), before)
    with pytest.raises(SettingsError), apply_loras(network, [LoraUse(lora=everywhere)]):
        network(x=torch.zeros(1, 9, 1, 4, 4), timestep=torch.zeros(1), context=torch.zeros(1, 1, 12))
    assert torch.equal(forward(network), before)


def test_a_forward_that_fails_within_a_swapped_layer_restores_it(
    network: nn.Module, names: ModuleNames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    head = D // TINY.num_heads
    norm = network.get_submodule("double_blocks.0.img_attn_q_norm")
    lora = saved(tmp_path / "a.safetensors", {"diffusion_model.double_blocks.0.img_attn_q_norm.diff": randn(head)})
    stored = norm.weight
    with apply_loras(network, [LoraUse(lora=bind(lora, names), mode="runtime")]):
        with pytest.raises(RuntimeError):
            norm(torch.zeros(1, head + 1))
        assert norm.weight is stored
        with monkeypatch.context() as patch:  # torch calls no hook for this one
            patch.setattr(nn.functional, "rms_norm", interrupt)
            with pytest.raises(KeyboardInterrupt):
                norm(torch.zeros(1, head))
        assert norm.weight is stored
    assert "forward" not in vars(norm)


def test_half_precision_weights_are_merged_in_float32(everywhere: BoundLora) -> None:
    network = build().to(torch.bfloat16)
    module = "double_blocks.0.img_attn_proj"
    before = weight_of(network, module)
    with apply_loras(network, [LoraUse(lora=everywhere, mode="merge"), LoraUse(lora=everywhere, mode="merge")]):
        merged = weight_of(network, module)
        change = next(patch.change for patch in everywhere.patches if patch.module == module)
        assert change is not None
        assert merged.dtype == torch.bfloat16
        assert torch.equal(merged, (before.float() + 2 * change.delta()).to(torch.bfloat16))
    assert weight_of(network, module) is before


def test_gradients_pass_through_the_side_branch(network: nn.Module, everywhere: BoundLora) -> None:
    x = torch.randn(1, D, requires_grad=True)
    layer = network.get_submodule("double_blocks.0.img_attn_proj")
    delta = deltas(everywhere, network)["double_blocks.0.img_attn_proj"]
    with apply_loras(network, [LoraUse(lora=everywhere)]):
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad[0], (weight_of(network, "double_blocks.0.img_attn_proj") + delta).sum(0), **CLOSE)


class Packed(nn.Module):
    """A stand-in for a quantised linear layer: eighths in int8, so that this one loses nothing to compare with."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.register_buffer("packed", (linear.weight * 64).round().clamp(-127, 127).to(torch.int8))

    def dense_weight(self) -> Tensor:
        return self.packed.float() / 64  # type: ignore[operator]

    @property
    def weight(self) -> Tensor:
        raise AssertionError("not to be looked at: a quantised weight is made anew every time")

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight(), self.bias)


@pytest.mark.parametrize("form", FORMS)
def test_quantised_weights_are_changed_beside_themselves(
    form: str, everywhere: BoundLora, names: ModuleNames, tmp_path: Path
) -> None:
    network = build()
    quantised = build()
    for dense, packed in zip(network.single_blocks, quantised.single_blocks, strict=True):
        for path in ("linear1", "linear2", "modulation.linear"):
            parent, _, name = path.rpartition(".")
            layer = Packed(dense.get_submodule(path))  # type: ignore[arg-type]
            setattr(packed.get_submodule(parent), name, layer)
            weight_of(dense, path).data = layer.dense_weight()
    tensors, difference = FORMS[form](weight_of(network, FC1))
    own = bind(saved(tmp_path / "a.safetensors", {f"{STEM}.{k}": v for k, v in tensors.items()}), names)
    # The names come from the quantised network itself.
    again = bind(read_lora(tmp_path / "a.safetensors"), module_names(quantised, LAYOUTS))
    assert again.report == own.report
    differences = {module: 0.3 * delta for module, delta in deltas(everywhere, network).items()}
    differences[FC1] = differences[FC1] + difference
    expected = changed(network, differences)
    bits = {name: tensor.clone() for name, tensor in quantised.state_dict().items()}
    for mode in ("auto", "runtime"):
        with apply_loras(quantised, [LoraUse(lora=everywhere, strength=0.3), LoraUse(lora=again, mode=mode)]):
            assert relative(forward(quantised), expected) < RELATIVE
    assert all(torch.equal(tensor, bits[name]) for name, tensor in quantised.state_dict().items())
    with pytest.raises(SettingsError, match="quantised"):
        apply_loras(quantised, [LoraUse(lora=again, mode="merge")])


def test_weights_that_are_away_between_two_uses(
    network: HunyuanVideoTransformer, everywhere: BoundLora, names: ModuleNames, tmp_path: Path
) -> None:
    """Streamed blocks: their weights are on the meta device except while the block runs."""
    tensors, _ = FORMS["dora by rows"](weight_of(network, FC1))
    head = D // TINY.num_heads
    tensors = {f"{STEM}.{k}": v for k, v in tensors.items()}
    tensors["diffusion_model.single_blocks.0.q_norm.diff"] = randn(head)
    uses = [
        LoraUse(lora=everywhere, strength=0.3),
        LoraUse(lora=bind(saved(tmp_path / "a.safetensors", tensors), names)),
    ]
    with apply_loras(network, uses):
        expected = forward(network)
    streamed = build()
    for block in (*streamed.double_blocks, *streamed.single_blocks):
        kept = {(owner, name): p for owner in block.modules() for name, p in owner.named_parameters(recurse=False)}

        def leave(*_: Any, kept: dict[Any, nn.Parameter] = kept) -> None:
            for (owner, name), parameter in kept.items():
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

        def come(*_: Any, kept: dict[Any, nn.Parameter] = kept) -> None:
            for (owner, name), parameter in kept.items():
                setattr(owner, name, parameter)

        block.register_forward_pre_hook(come)
        block.register_forward_hook(leave)
        leave()
    for _ in range(2):
        with apply_loras(streamed, uses):
            assert relative(forward(streamed), expected) < RELATIVE
    with pytest.raises(SettingsError, match="not in memory"):
        apply_loras(streamed, [replace(uses[0], mode="merge")])


# --- strengths of blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"double_blocks.0": 1, "double_blocks.1": 1, "single_blocks.0": 1, "img_in": 1}),
        ("double_blocks.*: 0.5", {"double_blocks.0": 0.5, "double_blocks.1": 0.5, "single_blocks.0": 1, "img_in": 1}),
        ("double: 0.5", {"double_blocks.0": 0.5, "double_blocks.1": 0.5, "single_blocks.0": 1, "img_in": 1}),
        ("single_blocks.0-0: 2, double_blocks.1:0", {"double_blocks.0": 1, "double_blocks.1": 0, "single_blocks.0": 2}),
        ("double only", {"double_blocks.0": 1, "double_blocks.1": 1, "single_blocks.0": 0, "img_in": 0}),
        ("single_blocks only", {"double_blocks.0": 0, "single_blocks.0": 1, "single_blocks.1": 1, "img_in": 0}),
        ("*: 0.1\nsingle.1: 3", {"double_blocks.0": 0.1, "single_blocks.0": 0.1, "single_blocks.1": 3, "img_in": 0.1}),
    ],
)
def test_strengths_of_blocks(text: str, expected: dict[str, float], network: nn.Module, everywhere: BoundLora) -> None:
    blocks = BlockStrengths.parse(text)
    assert BlockStrengths.parse(str(blocks)) == blocks
    differences = {}
    for module, delta in deltas(everywhere, network).items():
        own = [factor for block, factor in expected.items() if module.startswith(f"{block}.")]
        assert blocks.of(module) == own[0] if own else True
        differences[module] = 0.1 * blocks.of(module) * delta
    check_both_ways(network, [LoraUse(lora=everywhere, strength=0.1, blocks=blocks)], differences)


@pytest.mark.parametrize("text", ["double_blocks", "double_blocks: much", "a b: 1", "x: nan", ": 1", "only", "x: inf"])
def test_strengths_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SettingsError):
        BlockStrengths.parse(text)


def test_a_pattern_that_fits_nothing_is_refused(everywhere: BoundLora) -> None:
    with pytest.raises(SettingsError, match=r"double_blocks\.7.*double_blocks, final_layer"):
        LoraUse(lora=everywhere, blocks=BlockStrengths.parse("double_blocks.7: 1"))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1", None, True])
def test_a_strength_is_a_number(everywhere: BoundLora, strength: Any) -> None:
    with pytest.raises(SettingsError, match="strength"):
        LoraUse(lora=everywhere, strength=strength)


def test_a_mode_is_one_of_three(everywhere: BoundLora) -> None:
    with pytest.raises(SettingsError, match="runtime"):
        LoraUse(lora=everywhere, mode="runtimes")  # type: ignore[arg-type]


# --- an enlarged input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["low rank", "diff", "set_weight"])
def test_a_control_lora_enlarges_the_input(
    form: str, network: HunyuanVideoTransformer, names: ModuleNames, tmp_path: Path
) -> None:
    """New channels begin at zero, the old ones stay: with zeros in the new ones the delta alone shows."""
    out, into, *kernel = CONV
    wide = 2 * into
    stem = "diffusion_model.img_in.proj"
    base = nn.functional.pad(weight_of(network, "img_in.proj"), (0,) * 7 + (into,))
    down, up = randn(RANK, wide, *kernel), randn(out, RANK, 1, 1, 1)
    full = randn(out, wide, *kernel)
    tensors, delta = {
        "low rank": (
            {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up},
            torch.einsum("or,rithw->oithw", up.flatten(1), down),
        ),
        "diff": ({f"{stem}.diff": full}, full),
        "set_weight": ({f"{stem}.set_weight": full, f"{stem}.reshape_weight": torch.tensor(full.shape)}, full - base),
    }[form]
    bound = bind(saved(tmp_path / "a.safetensors", tensors), names)
    assert bound.widened == {"img_in.proj": wide}
    large = build(replace(TINY, in_channels=wide))
    large.load_state_dict({**network.state_dict(), "img_in.proj.weight": base + 0.5 * delta})
    expected = forward(large, wide)
    plain = bind(saved(tmp_path / "b.safetensors", {"lora_unet_img_in_proj.diff": randn(*CONV)}), names)
    large.img_in.proj.weight.data[:, :into] += 0.25 * randn(*CONV)
    with_both = forward(large, wide)
    stored = network.img_in.proj.weight
    for mode in ("runtime", "merge", "auto"):
        uses = [LoraUse(lora=bound, strength=0.5, mode=mode), LoraUse(lora=plain, strength=0.25, mode=mode)]
        network.config = replace(TINY, in_channels=wide)
        try:
            with apply_loras(network, uses[:1]):
                assert relative(forward(network, wide), expected) < RELATIVE
            for order in (uses, uses[::-1]):
                with apply_loras(network, order):
                    assert relative(forward(network, wide), with_both) < RELATIVE
        finally:
            network.config = TINY
        assert network.img_in.proj.weight is stored


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_names_what_was_found_and_what_not(network: nn.Module, tmp_path: Path) -> None:
    tensors = {
        "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight": A,
        "lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight": B,
        "lora_unet_double_blocks_1_img_attn_qkv.alpha": torch.tensor(2.0),
        "lora_unet_double_blocks_77_img_attn_qkv.lora_down.weight": A,
        "lora_unet_double_blocks_77_img_attn_qkv.lora_up.weight": B,
        "something.else": torch.zeros(1),
    }
    report = bind_to(saved(tmp_path / "style.safetensors", tensors), network, LAYOUTS).report
    assert report.name == "style.safetensors"
    assert report.dialect == "kohya, native names"
    assert report.modules == (QKV,)
    assert set(report.unmatched) == {key for key in tensors if "77" in key or "else" in key}
    assert (report.num_keys, report.ranks, report.alphas) == (6, (4,), (2.0,))


@pytest.mark.parametrize(
    ("dialect", "said"),
    [
        ("musubi", "kohya, native names"),
        ("kohya-comfy", "kohya, comfy names"),
        ("comfy-internal", "PEFT, comfy names"),
        ("diffusers", "PEFT, diffusers names"),
        ("diffusers-old", "old diffusers, diffusers names"),
    ],
)
def test_the_dialect_is_named(
    dialect: str, said: str, everywhere: BoundLora, names: ModuleNames, tmp_path: Path
) -> None:
    write_lora(tmp_path / "a.safetensors", everywhere.patches, names, dialect)
    assert bind(read_lora(tmp_path / "a.safetensors"), names).report.dialect == said


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("transformer.transformer_blocks.0.attn1.to_q", "CogVideoX"),
        ("lora_unet__transformer_blocks_0_attn1_to_q", "CogVideoX"),
        ("model.diffusion_model.transformer.layers.0.attention.query_key_value", "CogVideoX"),
        ("unet.down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q", "Stable Video Diffusion"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "Stable Diffusion"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text encoders"),
        ("abc.def", "not known here"),
    ],
)
def test_a_lora_of_another_model_says_what_it_looks_like(
    name: str, family: str, network: nn.Module, tmp_path: Path
) -> None:
    a, b = pair(8, 8)
    lora = saved(tmp_path / "a.safetensors", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    with pytest.raises(CheckpointError, match=f"Nothing in this LoRA.*{family}"):
        bind_to(lora, network, LAYOUTS)


# --- broken files -----------------------------------------------------------------------------------------------------

STEM_QKV = f"transformer.{QKV}"
GOOD = {f"{STEM_QKV}.lora_A.weight": A, f"{STEM_QKV}.lora_B.weight": B}


def with_value(tensor: Tensor, value: float) -> Tensor:
    broken = tensor.clone()
    broken[0, 0] = value
    return broken


BROKEN: dict[str, tuple[dict[str, Tensor], dict[str, str], list[str]]] = {
    "not a number": (GOOD | {f"{STEM_QKV}.lora_A.weight": with_value(A, math.nan)}, {}, ["not finite", "lora_A"]),
    "infinite": (GOOD | {f"{STEM_QKV}.lora_B.weight": with_value(B, math.inf)}, {}, ["not finite", "lora_B"]),
    "two ranks": (GOOD | {f"{STEM_QKV}.lora_B.weight": randn(3 * D, 5)}, {}, [QKV, "rank 4 in A", "rank 5 in B"]),
    "no B": ({f"{STEM_QKV}.lora_A.weight": A}, {}, [QKV, "without up"]),
    "no A": ({f"{STEM_QKV}.lora_B.weight": B}, {}, [QKV, "without down"]),
    "vectors": (GOOD | {f"{STEM_QKV}.lora_A.weight": randn(D)}, {}, [QKV, "matrices"]),
    "too wide": (GOOD | {f"{STEM_QKV}.lora_A.weight": randn(4, 2 * D)}, {}, [QKV, "another size", "(48, 16)"]),
    "too many rows": (GOOD | {f"{STEM_QKV}.lora_B.weight": randn(4 * D, 4)}, {}, [QKV, "(64, 16)", "(48, 16)"]),
    "split, too many rows": (
        {
            "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": A,
            "transformer.transformer_blocks.1.attn.to_q.lora_B.weight": B,
        },
        {},
        ["attn.to_q", "(48, 16)", "(16, 16)"],
    ),
    "alpha alone": (GOOD | {"transformer.img_in.proj.alpha": torch.tensor(1.0)}, {}, ["only alpha"]),
    "alpha of many": (GOOD | {f"{STEM_QKV}.alpha": torch.ones(3)}, {}, ["alpha", "of no use"]),
    "empty factor": (GOOD | {f"{STEM_QKV}.lora_A.weight": torch.zeros(0, D)}, {}, ["of no use"]),
    "alpha that is a word": (GOOD, {"lora_alpha": "high"}, ["alpha cannot be read", "number"]),
    "alpha in broken JSON": (GOOD, {"lora_adapter_metadata": "{"}, ["alpha cannot be read"]),
    "alpha of a module in a list": (GOOD, {"alpha_pattern": "[1]"}, ["alpha cannot be read"]),
    "alpha in a list": (GOOD, {"lora_adapter_metadata": "[1]"}, ["alpha cannot be read"]),
    "no LoRA": ({"double_blocks.0.img_attn_qkv.weight": A}, {}, ["no LoRA in this file", "img_attn_qkv.weight"]),
    "two adapters": (
        {
            f"{STEM_QKV}.lora_A.first.weight": A,
            f"{STEM_QKV}.lora_B.first.weight": B,
            f"{FC1}.lora_A.second.weight": A,
            f"{FC1}.lora_B.second.weight": B,
        },
        {},
        ["more than one LoRA", "first, second"],
    ),
    "one module twice": (
        GOOD | {"lora_unet_" + QKV.replace(".", "_") + f".lora_{w}.weight": t for w, t in (("down", A), ("up", B))},
        {},
        ["twice", QKV],
    ),
    "one factor twice": (GOOD | {f"{STEM_QKV}.lora_A.default.weight": A}, {}, ["mean the same"]),
    "loha of two shapes": (
        {f"{STEM_QKV}.hada_w{n}_{x}": randn(*s) for n in (1, 2) for x, s in (("a", (47 + n, 2)), ("b", (2, 16)))},
        {},
        ["one shape", QKV],
    ),
    "loha without a factor": ({f"{STEM_QKV}.hada_w1_a": A}, {}, ["without hada_w1_b", QKV]),
    "lokr without a factor": ({f"{STEM_QKV}.lokr_w1": A}, {}, ["without lokr_w2_a", QKV]),
    "lokr of another size": ({f"{STEM_QKV}.lokr_w1": A, f"{STEM_QKV}.lokr_w2": A}, {}, ["another size", "(16, 256)"]),
    "dora of another size": (GOOD | {f"{STEM_QKV}.dora_scale": torch.ones(7, 1)}, {}, ["magnitude", "(7, 1)"]),
    "bias of another size": (GOOD | {f"{STEM_QKV}.diff_b": torch.ones(7)}, {}, ["bias", "(7,)", "(48,)"]),
    "middle of another rank": (GOOD | {f"{STEM_QKV}.lora_mid.weight": randn(2, 2, 1, 1)}, {}, ["mid", QKV]),
    "convolution of another kernel": (
        {"transformer.img_in.proj.diff": randn(D, 8, 1, 3, 3)},
        {},
        ["another size", "(16, 8, 1, 3, 3)", "(16, 4, 1, 2, 2)"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_lora_is_refused_with_words(case: str, network: nn.Module, tmp_path: Path) -> None:
    tensors, metadata, words = BROKEN[case]
    with pytest.raises(UserError) as caught:
        bind_to(saved(tmp_path / "a.safetensors", tensors, metadata), network, LAYOUTS)
    for word in words:
        assert word in str(caught.value)


def test_the_good_one_beside_the_broken_ones(network: nn.Module, tmp_path: Path) -> None:
    assert bind_to(saved(tmp_path / "a.safetensors", GOOD), network, LAYOUTS).report.modules == (QKV,)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not run",)


def test_files_that_are_no_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a"
    with pytest.raises(FileError, match="cannot be read"):
        read_lora(path)
    with pytest.raises(UserError):
        read_lora(tmp_path)
    for content in (b"", b"<html>", b"\x00" * 100, b"PK\x03\x04 cut", b"\x80\x02 cut", b"GGUF\x00\x00"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_lora(path)
    torch.save({"transformer.x.lora_A.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="plain tensors"):
        read_lora(path)
    assert capsys.readouterr().out == ""
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no LoRA"):
        read_lora(path)
    save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cut short"):
        read_lora(path)
