"""Checkpoints as others publish them: every layout at its full size, every kind of file, three meanings of float8."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vidgen
from vidgen.vidgen_core.errors import CheckpointError, FileError, SettingsError, UserError
from vidgen.vidgen_core.families import FAMILIES, Found, identify
from vidgen.vidgen_core.families.hunyuan.config import (
    I2V_LATENT_CONCAT,
    T2V_720P,
    VAE_884_16C,
    CodecConfig,
    NetworkConfig,
)
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS, VAE_LAYOUTS
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.model import choose_dtype, inspect_file, load_codec, load_network, must_stream
from vidgen.vidgen_core.weights.header import Header, TensorInfo, read_header
from vidgen.vidgen_core.weights.load import check_names, load_module, read_tensors
from vidgen.vidgen_core.weights.packing import PACKINGS, unpack
from vidgen.vidgen_core.weights.quantise import Float8Linear, PackedLinear, QuantisedLinear, fit, quantise_linears

CONTRACTS = Path(__file__).parent / "contracts"
NETWORKS = sorted(path.name.removesuffix(".json.gz") for path in CONTRACTS.glob("hunyuan_dit_*"))
VAES = sorted(path.name.removesuffix(".json.gz") for path in CONTRACTS.glob("hunyuan_vae_*"))

TINY = NetworkConfig(
    hidden_size=32,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=32,
    pooled_width=32,
)
TINY_VAE = replace(VAE_884_16C, block_channels=(32, 32, 64, 64), layers_per_block=1)


def contract(name: str) -> dict[str, Any]:
    with gzip.open(CONTRACTS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def header_of(name: str, prefix: str | None = None) -> Header:
    """The header of a published file, without the file; ``prefix`` replaces ComfyUI's."""
    table = contract(name)["tensors"]
    if prefix is not None:
        table = {prefix + key.removeprefix("model.model."): tensor for key, tensor in table.items()}
    tensors = {key: TensorInfo(tuple(t["shape"]), getattr(torch, t["dtype"])) for key, t in table.items()}
    return Header(path=Path(name), tensors=tensors, metadata={}, num_bytes=1, digest="")


def random_weights(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(HunyuanVideoTransformer(TINY))


# --- every published layout, at its full size -------------------------------------------------------------------------


def assert_complete(header: Header, found: Found) -> int:
    """Built, translated and checked on the meta device as loading does it; the number of parameters."""
    part = found.family.parts[found.part]
    with torch.device("meta"):
        module = part.build(found.config, {})
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    tensors = header.meta_tensors()
    native = tensors if found.layout == "native" else part.layouts[found.layout].to_native(tensors)
    quantise_linears(module, native, dtype=torch.bfloat16)
    wanted = module.state_dict()
    check_names(wanted, fit(native, wanted, torch.bfloat16), where=str(header.path))
    return num_parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_every_published_network_is_known_and_complete(name: str) -> None:
    header = header_of(name)
    found = identify(header)
    is_v1 = "33ch_v1" in name
    assert (found.family.name, found.part) == ("hunyuan", "network")
    assert found.config == (I2V_LATENT_CONCAT if is_v1 else T2V_720P)
    assert found.layout == {"diffusers": "diffusers", "comfy_internal_model_model": "comfy"}.get(
        name.split("__")[1], "native"
    )
    assert found.is_told == is_v1
    assert assert_complete(header, found) == header.num_parameters == (12_810_991_680 if is_v1 else 12_821_012_544)


def test_all_the_contracts_are_there() -> None:
    assert (len(NETWORKS), len(VAES)) == (14, 4)


@pytest.mark.parametrize("prefix", ["", "model.", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("hunyuan_dit_t2v__comfy_internal_model_model", "comfy"), ("hunyuan_dit_t2v__official_pt", "prefixed")],
)
def test_prefixes_of_other_programs(name: str, layout: str, prefix: str) -> None:
    header = header_of(name, prefix)
    found = identify(header)
    assert found.layout == ("native" if layout == "prefixed" and not prefix else layout)
    assert found.config == T2V_720P
    assert_complete(header, found)


@pytest.mark.parametrize("name", VAES)
def test_every_published_vae_is_known_and_complete(name: str) -> None:
    header = header_of(name)
    found = identify(header)
    assert (found.family.name, found.part, found.config) == ("hunyuan", "codec", VAE_884_16C)
    assert found.layout == ("ldm" if "ldm" in name else "native")
    assert assert_complete(header, found) == header.num_parameters == 246_478_803


def test_a_vae_under_a_prefix_leaves_the_rest_of_its_file_alone() -> None:
    plain = header_of("hunyuan_vae__official_pt")
    tensors = {f"vae.{name}": info for name, info in plain.tensors.items()}
    header = replace(plain, tensors={**tensors, "loss.logvar": TensorInfo((1,), torch.float32)})
    found = identify(header)
    assert (found.part, found.layout) == ("codec", "prefixed")
    assert_complete(header, found)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, replace(TINY, in_channels=33, guidance_embed=False)], ids=["t2v", "v1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_survive_every_layout_bit_for_bit(config: NetworkConfig, layout: str) -> None:
    source = random_weights(HunyuanVideoTransformer(config))
    again = LAYOUTS[layout].to_native(LAYOUTS[layout].to_foreign(source))
    assert again.keys() == source.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("layout", VAE_LAYOUTS)
def test_vaes_survive_every_layout_bit_for_bit(layout: str) -> None:
    source = random_weights(CausalVAE(TINY_VAE))
    foreign = VAE_LAYOUTS[layout].to_foreign(source)
    again = VAE_LAYOUTS[layout].to_native(foreign)
    assert again.keys() == source.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in source.items())
    if layout == "ldm":
        assert foreign["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1, 1)
        assert (
            foreign["decoder.up.3.block.0.conv1.conv.weight"]
            is source["decoder.up_blocks.0.resnets.0.conv1.conv.weight"]
        )


def test_a_vae_of_comfy_org_decodes_as_ours(published: Callable[..., Path], tmp_path: Path) -> None:
    vae = CausalVAE(TINY_VAE).eval()
    vae.load_state_dict(random_weights(vae))
    foreign = VAE_LAYOUTS["ldm"].to_foreign(vae.state_dict())
    codec = load_codec(published("safetensors", tmp_path, foreign))
    z = torch.randn(1, 16, 2, 4, 4)
    with torch.no_grad():
        assert torch.equal(codec.decode(z), vae.decode(z / VAE_884_16C.scaling_factor))


# --- every kind of file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "shards", "folder", "torch", "torch_bare"])
@pytest.mark.parametrize("layout", ["native", "diffusers", "comfy"])
def test_a_network_loads_from_every_container_bit_for_bit(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, layout: str
) -> None:
    foreign = weights if layout == "native" else LAYOUTS[layout].to_foreign(weights)
    path = published(kind, tmp_path, foreign)
    info = inspect_file(path)
    assert info["container"] == ("torch" if kind.startswith("torch") else "safetensors")
    assert (info["layout"], info["num_parameters"]) == (layout, sum(t.numel() for t in weights.values()))
    assert info["num_bytes"] == sum(
        file.stat().st_size for file in tmp_path.iterdir() if not file.name.endswith(".json")
    )
    state = load_network(path).network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("wrapper", ["module", "ema", "state_dict", "model"])
def test_wrappers_of_torch_files(weights: dict[str, Tensor], tmp_path: Path, wrapper: str) -> None:
    torch.save({"step": 3, "optimizer": {"lr": 0.1}, wrapper: weights}, tmp_path / "a.ckpt")
    assert load_network(tmp_path / "a.ckpt").config == TINY


def test_tensors_of_a_torch_file_that_share_memory_or_lie_across(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "rows": base[1:3], "column": base[:, 2], "none": torch.empty(0, 3)}
    torch.save(tensors, tmp_path / "a.pt")
    for mapped in (True, False):
        read = read_tensors(read_header(tmp_path / "a.pt"), mapped=mapped)
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_shard_stands_for_its_set(published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path) -> None:
    index = published("shards", tmp_path, weights)
    whole = read_header(index)
    for shard in sorted(tmp_path.glob("*.safetensors")):
        assert read_header(shard).tensors == whole.tensors
    index.unlink()
    assert read_header(shard).tensors.keys() == whole.tensors.keys()


@pytest.mark.parametrize(
    ("told", "condition"), [({"image_condition_type": "token_replace"}, "token_replace"), ({}, "none"), (None, "none")]
)
def test_a_diffusers_folder_says_what_its_network_is_for(
    published: Callable[..., Path],
    weights: dict[str, Tensor],
    tmp_path: Path,
    told: dict[str, Any] | None,
    condition: str,
) -> None:
    folder = tmp_path / "transformer"
    published("folder", folder, LAYOUTS["diffusers"].to_foreign(weights))
    if told is not None:
        (folder / "config.json").write_text(json.dumps({"_class_name": "HunyuanVideoTransformer3DModel", **told}))
    assert load_network(folder).config.image_condition == condition


# --- float8 and GGUF --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float8", "float8_scaled", "float8_noted", "float8_map"])
def test_three_meanings_of_float8(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    path = published(kind, tmp_path, weights)
    name = "double_blocks.0.img_attn_qkv"
    dense = load_network(path).network.get_submodule(name).weight
    scale = 1.0 if kind == "float8" else weights[f"{name}.weight"].abs().amax() / 448
    assert torch.equal(dense, (weights[f"{name}.weight"] / scale).to(torch.float8_e4m3fn).float() * scale)
    # e4m3 keeps 3 bits of the fraction, so it rounds by 1/16 at most; a plain cast loses what is below 2^-10 as well.
    assert torch.allclose(dense, weights[f"{name}.weight"], rtol=1 / 16, atol=2**-10)
    header = read_header(path)
    assert header.num_parameters == sum(tensor.numel() for tensor in weights.values())
    assert len(header.scales) == (0 if kind == "float8" else 2 * 5 + 2 * 3 + 5)


def load_small(path: Path) -> nn.Module:
    return load_module(read_header(path), lambda: HunyuanVideoTransformer(TINY), dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "packing"), [("float8", ""), ("float8_scaled", ""), ("float8_map", ""), ("gguf", "Q8_0"), ("gguf", "Q5_1")]
)
def test_quantised_weights_stay_small_and_compute_as_widened_ones(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, packing: str
) -> None:
    path = published(kind, tmp_path, weights, packing=packing)
    small = load_small(path)
    dense = load_module(
        read_header(path), lambda: HunyuanVideoTransformer(TINY), dtype=torch.float32, keep_quantised=False
    )
    layers = [module for module in small.modules() if isinstance(module, QuantisedLinear)]
    assert len(layers) == 2 * 5 + 2 * 3 + 5
    assert all(isinstance(layer, PackedLinear if kind == "gguf" else Float8Linear) for layer in layers)
    assert all(layer.state_dict()["stored"].dtype.itemsize == 1 for layer in layers)
    assert not any(isinstance(module, QuantisedLinear) for module in dense.modules())
    inputs = (torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32), None, torch.randn(1, 32))
    with torch.no_grad():
        assert torch.equal(small(*inputs, guidance=torch.tensor([6.0])), dense(*inputs, guidance=torch.tensor([6.0])))
    layer, twin = small.double_blocks[0].img_mlp.fc1, dense.double_blocks[0].img_mlp.fc1
    assert torch.equal(layer.dense_weight(), twin.weight)
    assert torch.equal(layer.weight, twin.weight)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_weights_widen_as_the_library_says(packing: str) -> None:
    import gguf
    import numpy as np

    kind, rng = PACKINGS[packing], np.random.default_rng(0)
    packed = rng.integers(0, 256, (5, 3 * kind.num_block_bytes), dtype=np.uint8)
    blocks = packed.reshape(-1, kind.num_block_bytes)
    for start in (208,) if packing == "Q6_K" else (0, 2) if kind.block == 256 or packing.endswith("_1") else (0,):
        # Random bytes would be NaN now and then where they are read as half precision.
        blocks[:, start : start + 2] = rng.standard_normal(len(blocks)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[packing]))
    assert torch.equal(unpack(torch.from_numpy(packed), packing), expected)


def test_a_gguf_file_keeps_its_shapes_and_plain_weights(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """The patch embedding has five dimensions, GGUF four."""
    path = published("gguf", tmp_path, weights)
    info = inspect_file(path)
    assert (info["container"], info["layout"]) == ("gguf", "native")
    assert info["metadata"]["gguf.general.architecture"] == "hyvid"
    assert set(info["dtypes"]) == {"Q8_0", "float32"}
    network = load_small(path)
    assert torch.equal(network.img_in.proj.weight, weights["img_in.proj.weight"])


def finish_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("numbers", [torch.float16, torch.bfloat16])
def test_a_gguf_file_of_half_precision(tmp_path: Path, numbers: torch.dtype) -> None:
    import gguf

    source, path = torch.randn(4, 6).to(numbers), tmp_path / "a.gguf"
    kind = gguf.GGMLQuantizationType["F16" if numbers == torch.float16 else "BF16"]
    writer = gguf.GGUFWriter(path, "any")
    writer.add_tensor("w", gguf.quants.quantize(source.float().numpy(), kind), raw_dtype=kind)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    assert torch.equal(read_tensors(read_header(path))["w"], source)


def test_scales_may_lie_in_another_shard(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    single = published("float8_scaled", tmp_path / "single", weights)
    tensors = read_file(single)
    shards = published("shards", tmp_path / "shards", dict(sorted(tensors.items(), key=lambda item: item[0][::-1])))
    assert read_header(shards).scales.keys() == read_header(single).scales.keys()
    first, second = (load_network(path).network.state_dict() for path in (single, shards))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def read_file(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_parts_with_scales_of_their_own_make_one_weight(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """diffusers' q, k and v each with its scale: ours is one matrix with a scale for each row."""
    plain = load_network(published("float8_scaled", tmp_path / "a", LAYOUTS["diffusers"].to_foreign(weights)))
    name = "single_blocks.1.linear1.weight"
    for part, loaded in zip(weights[name].split(32), plain.network.get_parameter(name).split(32), strict=True):
        assert torch.allclose(loaded, part, rtol=1 / 16, atol=float(part.abs().amax()) * 2**-9 / 448 + 1e-7)


# --- how much memory, and in which numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_loading_takes_hardly_more_than_the_file(tmp_path: Path, ending: str) -> None:
    """400 MB, then a sum over every weight, so that nothing is merely not read yet."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        import torch
        from torch import nn
        from vidgen.vidgen_core.weights.header import read_header
        from vidgen.vidgen_core.weights.load import load_module

        def resident(key):
            line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))
            return int(line.split()[1]) * 1024

        path = Path(sys.argv[1])
        header = read_header(path)
        build = lambda: nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))
        Path("/proc/self/clear_refs").write_text("5")
        start = resident("VmHWM")
        module = load_module(header, build)
        loaded = resident("VmHWM") - start
        total = sum(float(p.sum()) for p in module.parameters())
        print(loaded, resident("VmHWM") - start, header.num_bytes)
        """
    )
    tensors = {f"{number}.weight": torch.full((2048, 2048), 1.0) for number in range(24)}
    path = tmp_path / f"big.{ending}"
    if ending == "pt":
        torch.save({"module": tensors}, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    del tensors
    root = str(Path(vidgen.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    loaded, used, num_bytes = map(int, done.stdout.split())
    assert num_bytes > 400e6
    assert loaded < 0.05 * num_bytes
    assert 0.9 * num_bytes < used < 1.15 * num_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="needs a POSIX system with sparse files")
def test_a_file_larger_than_main_memory_is_mapped_all_the_same(tmp_path: Path) -> None:
    """Of 1 TB that the disk does not hold either, but for its last numbers."""
    length, path = 2**40, tmp_path / "huge.safetensors"
    table = {
        "huge": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]},
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [length, length + 8]},
    }
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.seek(length, 1)
        file.write(struct.pack("<2f", 3.0, 4.0))
    tensors = read_tensors(read_header(path))
    assert tensors["small"].tolist() == [3.0, 4.0]
    assert tensors["huge"][-2:].tolist() == [0, 0]


def test_mapped_weights_may_be_changed_without_changing_the_file(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = published("safetensors", tmp_path, weights)
    before = path.read_bytes()
    load_network(path).network.img_in.proj.weight.zero_()
    assert path.read_bytes() == before


def header_with(num_bytes: int, dtype: torch.dtype = torch.float8_e4m3fn, packing: str | None = None) -> Header:
    tensors = {"w": TensorInfo((num_bytes // 32 * 32,), dtype, packing)}
    return Header(path=Path("x"), tensors=tensors, metadata={}, num_bytes=num_bytes, digest="")


def test_large_quantised_files_stay_small_and_large_files_stream() -> None:
    huge, small = header_with(10**15), header_with(10**6)
    assert choose_dtype(huge, torch.device("cpu")) == torch.bfloat16
    assert choose_dtype(small, torch.device("cpu")) == torch.float32
    assert choose_dtype(huge, torch.device("cpu"), streamed=True) == torch.float32
    assert choose_dtype(header_with(10**15, torch.uint8, "Q8_0"), torch.device("cuda")) == torch.bfloat16
    assert must_stream(huge, "cpu")
    assert not must_stream(small, "cpu")


# --- what the weights cannot say --------------------------------------------------------------------------------------


def test_the_user_says_what_the_file_does_not(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = published("safetensors", tmp_path / "hunyuan_video_v2_replace_image_to_video", weights)
    with caplog.at_level("INFO", logger="vidgen"):
        assert load_network(path).config.image_condition == "none"
        assert "taken as image_condition 'none'" in caplog.text
        caplog.clear()
        assert load_network(path, image_condition="token_replace").config.image_condition == "token_replace"
        assert load_network(path, image_condition="none").config.image_condition == "none"
        assert caplog.text == ""


def test_a_word_against_the_files_own_is_noted(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published("folder", tmp_path, weights)
    (tmp_path / "config.json").write_text('{"image_condition_type": "token_replace"}')
    assert load_network(tmp_path, image_condition="none").config.image_condition == "none"
    assert "says that its image condition is 'token_replace'" in caplog.text


def test_a_condition_that_the_weights_do_not_allow(published: Callable[..., Path], tmp_path: Path) -> None:
    config = replace(TINY, in_channels=33, guidance_embed=False)
    path = published("safetensors", tmp_path, random_weights(HunyuanVideoTransformer(config)))
    assert load_network(path).config.image_condition == "latent_concat"
    with pytest.raises(SettingsError, match="one of auto, latent_concat"):
        load_network(path, image_condition="token_replace")


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(path: Path, load: Callable[[Path], Any] = load_network) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path)
    error = caught.value
    assert error.given is not None
    return error


def assert_says(error: UserError, *words: str) -> None:
    for word in words:
        assert word in str(error), str(error)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "gguf"])
@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_a_file_that_is_cut_short(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, kept: float
) -> None:
    path = published(kind, tmp_path, weights)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert_says(refusal(path), "cut short", str(path), "What to do: ")


@pytest.mark.parametrize("gone", ["first", "all"])
def test_half_a_set_of_shards(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, gone: str
) -> None:
    index = published("shards", tmp_path, weights)
    for number in (1,) if gone == "first" else (1, 2, 3):
        (tmp_path / f"model-{number:05d}-of-00003.safetensors").unlink()
    number = "1" if gone == "first" else "3"
    for given in (index, tmp_path, *tmp_path.glob("*.safetensors")):
        assert_says(refusal(given), f"{number} of the 3 shards", "model-00001-of-00003.safetensors", "download")


@pytest.mark.parametrize("table", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_is_no_index_or_leads_outside(tmp_path: Path, table: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(table)
    assert_says(refusal(path), "damaged", str(path), "What to do")


def test_weights_that_are_not_numbers(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    cases = (
        ("safetensors", "final_layer.linear.bias"),
        ("torch", "img_in.proj.weight"),
        ("float8", "txt_in.input_embedder.bias"),
    )
    for number, (kind, name) in enumerate(cases):
        broken = {**weights, name: torch.full_like(weights[name], float("nan"))}
        path = published(kind, tmp_path / str(number), broken)
        assert_says(refusal(path), repr(name), "not finite", str(path), "another copy")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the library packs what is infinite all the same
def test_scales_and_packed_weights_that_are_not_numbers(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    name = "double_blocks.0.img_attn_qkv.weight"
    broken = {**weights, name: torch.full_like(weights[name], float("inf"))}
    for kind in ("float8_scaled", "gguf"):
        assert_says(refusal(published(kind, tmp_path / kind, broken)), repr(name), "not finite")


def test_a_pickle_that_is_more_than_weights(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    torch.save({"module": {"w": torch.zeros(2)}, "extra": Evil()}, tmp_path / "a.pt")
    assert_says(refusal(tmp_path / "a.pt"), "more than weights", "weights_only=True", ".safetensors")
    assert not marker.exists()


def test_a_torch_file_without_weights(tmp_path: Path) -> None:
    for name, content in (("list", [torch.zeros(2)]), ("numbers", {"module": {"a": 1}}), ("tensor", torch.zeros(2))):
        torch.save(content, tmp_path / f"{name}.pt")
        assert_says(refusal(tmp_path / f"{name}.pt"), "holds no weights", "dictionary of tensors")


def test_a_zip_that_is_no_torch_file(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("readme.txt", "hello")
    assert_says(refusal(tmp_path / "a.pt"), "another kind of zip archive", "torch.save")


def test_a_gguf_of_another_architecture(published: Callable[..., Path], tmp_path: Path) -> None:
    tensors = {"token_embd.weight": torch.zeros(8, 32), "blk.0.attn_q.weight": torch.zeros(32, 32)}
    path = published("gguf", tmp_path, tensors, architecture="llama")
    assert_says(refusal(path), "architecture 'llama'", "token_embd.weight", "HunyuanVideo")


def test_a_gguf_that_is_packed_in_an_unknown_way(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path, writer = tmp_path / "a.gguf", gguf.GGUFWriter(tmp_path / "a.gguf", "hyvid")
    writer.add_tensor("w.weight", np.zeros((2, 84), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    assert_says(refusal(path), "'w.weight'", "Q2_K", "Q4_K", "another quantisation")


def test_float8_of_tencent_without_its_map(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = published("float8_map", tmp_path, weights)
    scales = torch.load(tmp_path / "model_map.pt", weights_only=True)
    (tmp_path / "model_map.pt").unlink()
    assert inspect_file(path)["title"] == "HunyuanVideo diffusion network"
    for stream in (False, True):
        error = refusal(path, lambda p, stream=stream: load_network(p, stream=stream))
        assert_says(error, "without their scales", str(tmp_path / "model_map.pt"), "beside it")
    del scales["single_blocks.1.linear2"]
    torch.save(scales, tmp_path / "model_map.pt")
    assert_says(refusal(path), "lacks 1 of 21 layers", "single_blocks.1.linear2", "published with this checkpoint")
    torch.save([1], tmp_path / "model_map.pt")
    assert_says(refusal(path), "not a map of float8 scales", "model_map.pt")


def test_a_lora_given_as_a_network(published: Callable[..., Path], tmp_path: Path) -> None:
    tensors = {f"transformer.single_blocks.0.linear1.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    assert_says(refusal(published("safetensors", tmp_path, tensors)), "LoRA", "lora_A", "apply the LoRA")


def test_another_family_and_another_part(published: Callable[..., Path], tmp_path: Path) -> None:
    other = published("safetensors", tmp_path / "a", {"conv_in.weight": torch.zeros(2, 2)})
    assert_says(refusal(other), "not of a family", "conv_in.weight", "pick another file")
    vae = published("torch", tmp_path / "b", random_weights(CausalVAE(TINY_VAE)))
    assert_says(refusal(vae), "is a VAE, not a diffusion network", "pick the diffusion network's file")


def test_a_network_that_lacks_a_weight_or_has_one_too_many(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    some = {name: tensor for name, tensor in weights.items() if name != "single_blocks.1.linear2.bias"}
    assert_says(refusal(published("torch", tmp_path / "a", some)), "lacks 1 of", "single_blocks.1.linear2.bias")
    more = {**weights, "double_blocks.0.img_attn_extra.weight": torch.zeros(2)}
    assert_says(refusal(published("torch", tmp_path / "b", more)), "does not know", "img_attn_extra")


def test_folders_without_a_checkpoint_or_with_several(tmp_path: Path, published: Callable[..., Path]) -> None:
    error = refusal(tmp_path)
    assert isinstance(error, FileError)
    assert_says(error, "no checkpoint in this folder", ".safetensors", "name the file")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").touch()
    error = refusal(tmp_path)
    assert isinstance(error, CheckpointError)
    assert_says(error, "several checkpoints", "a.safetensors, b.safetensors", "name the file")


def test_a_config_that_belongs_to_other_weights(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    published("folder", tmp_path, weights)
    for text, says in (('{"image_condition_type": "latent_concat"}', "does not belong"), ("{", "damaged")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=says):
            load_network(tmp_path)


def test_records_of_this_family_name_their_layouts() -> None:
    parts = FAMILIES["hunyuan"].parts
    assert set(parts["network"].layouts) == {"diffusers", "comfy", "prefixed"}
    assert set(parts["codec"].layouts) == {"ldm", "prefixed"}
    assert isinstance(VAE_884_16C, CodecConfig)
