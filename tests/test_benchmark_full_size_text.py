"""The full-size text benchmark at a tiny size: its files are encoders, and streamed float8 is resident float8."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidgen.benchmarks import full_size_text
from vidgen.vidgen_core.families.hunyuan.config import ClipDims, LlamaDims
from vidgen.vidgen_core.model import load_text
from vidgen.vidgen_core.text.dims import T5Dims
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.quantise import Float8Linear

LLAMA = replace(LlamaDims(), hidden_size=256, num_layers=5, num_heads=2, num_kv_heads=1, intermediate_size=64)
CLIP = replace(ClipDims(), hidden_size=64, num_layers=2, num_heads=1, intermediate_size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("encoders")
    full_size_text.write_encoders(place, LLAMA, CLIP)
    return place


def test_the_file_has_the_names_of_the_published_one() -> None:
    path = Path(__file__).parent / "contracts" / "hunyuan_te_llama__comfy_llava_llama3_fp8_scaled.json.gz"
    with gzip.open(path, "rt") as file:
        tensors = json.load(file)["tensors"]
    kinds = {"F16": "float16", "F8_E4M3": "float8_e4m3fn", "F32": "float32"}
    ours = {name: (list(shape), kinds[kind]) for name, shape, kind in full_size_text.llama_entries(LlamaDims())}
    assert ours == {name: (entry["shape"], entry["dtype"]) for name, entry in tensors.items()}


def test_one_prompt_is_measured(folder: Path) -> None:
    report = full_size_text.measure(folder)
    assert report["layers"] == 3
    assert report["output"]["context"] == [1, 256, 256]
    assert report["output"]["pooled"] == [1, 64]
    assert report["output"]["finite"]
    assert report["output"]["deviation"] > 0
    assert report["tokens"] > 95
    assert set(report["seconds"]) == {"import", "load", "encode"}
    assert report["peak_rss_bytes"] >= report["peak_rss_after_load_bytes"] > 0


T5 = T5Dims(vocab_size=160, hidden_size=256, num_layers=3, num_heads=2, intermediate_size=64)


def test_the_file_of_t5_has_the_names_of_the_published_one() -> None:
    path = Path(__file__).parent / "contracts" / "te_t5xxl__comfy_fp8_e4m3fn_scaled.json.gz"
    with gzip.open(path, "rt") as file:
        tensors = json.load(file)["tensors"]
    kinds = {"F16": "float16", "F8_E4M3": "float8_e4m3fn", "F32": "float32"}
    ours = {name: (list(shape), kinds[kind]) for name, shape, kind in full_size_text.t5_entries(T5Dims())}
    assert ours == {name: (entry["shape"], entry["dtype"]) for name, entry in tensors.items()}


def test_one_prompt_of_t5_is_measured(tmp_path: Path) -> None:
    full_size_text.write_t5(tmp_path, T5)
    report = full_size_text.measure(tmp_path)
    assert report["family"] == "cogvideox"
    assert report["layers"] == 3
    assert report["output"]["context"] == [1, 226, 256]
    assert report["output"]["finite"]
    assert report["output"]["deviation"] > 0
    text = load_text(tmp_path / "t5.safetensors")
    ids = text.tokenize([full_size_text.PROMPT])[0]
    assert len(set(ids.tolist())) > 15  # its words, the end and padding
    assert 2 not in ids  # none of them unknown


def test_streamed_layers_give_the_bits_of_resident_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both give the numbers of weights that were widened by hand."""
    monkeypatch.setattr("vidgen.vidgen_core.model._is_small", lambda header, device: header.num_parameters < 10**7)
    files = folder / "llama.safetensors", folder / "clip.safetensors"
    streamed = load_text(*files, dtype=None, stream=True)
    assert all(p.is_meta for p in streamed.llama.layers.state_dict().values())
    assert isinstance(streamed.llama.layers[0].mlp.up_proj, Float8Linear)
    one = streamed.encode([full_size_text.PROMPT])
    assert all(p.is_meta for p in streamed.llama.layers.state_dict().values())
    widened = load_text(*files, dtype=torch.float32)
    other = widened.encode([full_size_text.PROMPT])
    assert type(widened.llama.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.pooled, other.pooled)
    raw = dict(_raw(files[0]))
    name = "model.layers.2.self_attn.k_proj"
    by_hand = raw[f"{name}.weight"].float() * raw[f"{name}.scale_weight"].float()
    assert torch.equal(widened.llama.layers[2].self_attn.k_proj.weight, by_hand)


def _raw(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_what_is_not_needed_stays_in_the_file(folder: Path) -> None:
    """Two layers, the norm and the head: 5 layers on the disk, 3 in the module."""
    header = read_header(folder / "llama.safetensors")
    assert "model.layers.4.mlp.up_proj.weight" in header.tensors
    stack = load_text(folder / "llama.safetensors", folder / "clip.safetensors")
    assert len(stack.llama.layers) == 3
    assert not any("lm_head" in name or name.startswith("llama.norm") for name in stack.state_dict())
