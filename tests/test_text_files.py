"""Published text encoders: known from their headers at full size, put together from several files, with tokenizers.

The contracts list every tensor of a published file. Nothing here has the weights: they are on the meta device.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.vidgen_core.errors import CheckpointError
from vidgen.vidgen_core.families import FAMILIES, identify, identify_parts
from vidgen.vidgen_core.families.hunyuan.config import ClipDims, LlamaDims, TextConfig, VisionDims
from vidgen.vidgen_core.families.hunyuan.text import TextStack
from vidgen.vidgen_core.weights.header import Header, TensorInfo, read_header
from vidgen.vidgen_core.weights.load import check_names
from vidgen.vidgen_core.weights.safetensors_file import DTYPES

CONTRACTS = Path(__file__).parent / "contracts"
Write = Callable[[Mapping[str, TensorInfo]], Header]
HUNYUAN = FAMILIES["hunyuan"]

LLAMA_FILES = {
    "hunyuan_te_llama__comfy_llava_llama3_fp16": "causal_lm",
    "hunyuan_te_llama__comfy_llava_llama3_fp8_scaled": "causal_lm",
    "hunyuan_te_llama__official_text_encoder_dir": "causal_lm",
    "hunyuan_te_llama__diffusers_text_encoder": "diffusers",
    "hunyuan_te_llava__hf_original_layout": "llava",
    "hunyuan_te_llava__transformers_v5_in_memory_layout": "llava_v5",
}
CLIP_FILES = {
    "hunyuan_te_clipL__comfy_clip_l": "clip",
    "hunyuan_te_clipL__diffusers_text_encoder_2": "clip",
    "hunyuan_te_clipL__official_openai_clip_vit_large_patch14": "clip",
}
VISION_FILES = {
    "hunyuan_clip_vision_llava__comfy": "comfyui",
    "hunyuan_te_llava__hf_original_layout": "llava",
    "hunyuan_te_llava__transformers_v5_in_memory_layout": "llava_v5",
}
CASES = [
    (name, part, layout)
    for part, files in (("llama", LLAMA_FILES), ("clip", CLIP_FILES), ("vision", VISION_FILES))
    for name, layout in files.items()
]


def contract(name: str) -> dict[str, TensorInfo]:
    with gzip.open(CONTRACTS / f"{name}.json.gz", "rt") as file:
        entries = json.load(file)["tensors"]
    return {key: TensorInfo(tuple(e["shape"]), getattr(torch, e["dtype"])) for key, e in entries.items()}


@pytest.fixture
def header_of(tmp_path: Path) -> Write:
    """A file of the full size, read as any other: its data are a hole that takes no room on the disk."""

    def write(tensors: Mapping[str, TensorInfo]) -> Header:
        names = {dtype: name for name, dtype in DTYPES.items()}
        table, end = {}, 0
        for name, info in tensors.items():
            start, end = end, end + info.num_bytes
            table[name] = {"dtype": names[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
        head = json.dumps(table).encode()
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(head)) + head)
            file.truncate(8 + len(head) + end)
        return read_header(path)

    return write


# --- every published file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part", "layout"), CASES)
def test_published_encoders_are_known_and_complete(header_of: Write, name: str, part: str, layout: str) -> None:
    """0 missing, 0 unknown, and the dimensions are the published ones."""
    header = header_of(contract(name))
    found = {item.part: item for item in identify_parts(header)}[part]
    assert (found.family.name, found.layout) == ("hunyuan", layout)
    assert found.config == {"llama": LlamaDims(), "clip": ClipDims(), "vision": VisionDims()}[part]
    record = HUNYUAN.parts[part]
    native = record.layouts[layout].to_native(header.meta_tensors())
    with torch.device("meta"):
        module = record.build(found.config, {})
    check_names(module.state_dict(), native, where=name)


@pytest.mark.parametrize("name", [*LLAMA_FILES, *CLIP_FILES, "hunyuan_clip_vision_llava__comfy"])
def test_a_file_is_first_of_all_what_it_is_for(header_of: Write, name: str) -> None:
    parts = [found.part for found in identify_parts(header_of(contract(name)))]
    expected = ["llama"] if name in LLAMA_FILES else ["clip"] if name in CLIP_FILES else ["vision"]
    assert parts == expected + (["vision"] if "llava__" in name and name in LLAMA_FILES else [])


def test_scales_of_float8_weights_keep_their_place(header_of: Write) -> None:
    """One of each Linear that is kept: 30 layers of 7. They travel under ComfyUI's name for a scale."""
    header = header_of(contract("hunyuan_te_llama__comfy_llava_llama3_fp8_scaled"))
    names = [name for weight in header.tensors for name in header.stored_names(weight)]
    native = HUNYUAN.parts["llama"].layouts["causal_lm"].native_names(names)
    scales = [name for name in native.values() if name.endswith(".scale_weight")]
    assert len(scales) == 30 * 7
    assert {scale.replace("scale_weight", "weight") for scale in scales} <= set(native.values())


LEFT_OUT = {
    "hunyuan_te_llama__comfy_llava_llama3_fp16": 2 * 9 + 2,
    "hunyuan_te_llama__comfy_llava_llama3_fp8_scaled": 2 * (9 + 7) + 3,
    "hunyuan_te_llama__official_text_encoder_dir": 2 * 9 + 2,
    "hunyuan_te_llama__diffusers_text_encoder": 2 * 9 + 1,
    "hunyuan_te_llava__hf_original_layout": 2 * 9 + 2 + 395,
    "hunyuan_te_llava__transformers_v5_in_memory_layout": 2 * 9 + 2 + 395,
    "hunyuan_te_clipL__comfy_clip_l": 0,
    "hunyuan_te_clipL__diffusers_text_encoder_2": 0,
    "hunyuan_te_clipL__official_openai_clip_vit_large_patch14": 592 - 196,
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_counted(name: str) -> None:
    """The last two layers, the final norm, the heads and projections, the other tower: no more and no fewer."""
    tensors = contract(name)
    part, layout = ("llama", LLAMA_FILES[name]) if name in LLAMA_FILES else ("clip", CLIP_FILES[name])
    needed = HUNYUAN.parts[part].layouts[layout].needed(list(tensors))
    assert len(tensors) - len(needed) == LEFT_OUT[name]


@pytest.mark.parametrize(("name", "part", "layout"), CASES)
def test_a_name_that_nobody_knows_is_an_error(header_of: Write, name: str, part: str, layout: str) -> None:
    tensors = contract(name)
    some = HUNYUAN.parts[part].layouts[layout].needed(list(tensors))[-1]
    strange = some.rsplit(".", 2)[0] + ".extra.weight"
    tensors[strange] = TensorInfo((1,), torch.float16)
    with pytest.raises(CheckpointError, match="extra.weight"):
        HUNYUAN.parts[part].layouts[layout].to_native(header_of(tensors).meta_tensors())


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("hunyuan_te_llama__comfy_llava_llama3_fp16", {"tokenizer": ((9_000_000,), torch.uint8)}),
        (
            "hunyuan_te_clipL__comfy_clip_l",
            {
                "text_projection.weight": ((768, 768), torch.float16),
                "logit_scale": ((), torch.float16),
                "text_model.embeddings.position_ids": ((1, 77), torch.int64),
            },
        ),
        (
            "hunyuan_te_llava__hf_original_layout",
            {"vision_tower.vision_model.embeddings.position_ids": ((1, 577), torch.int64)},
        ),
        (
            "hunyuan_clip_vision_llava__comfy",
            {
                "visual_projection.weight": ((768, 1024), torch.float16),
                "vision_model.embeddings.position_ids": ((1, 577), torch.int64),
            },
        ),
    ],
)
def test_known_extras_change_nothing(header_of: Write, name: str, extras: dict[str, Any]) -> None:
    plain, more = contract(name), contract(name)
    more |= {key: TensorInfo(*value) for key, value in extras.items()}
    expected, found = identify_parts(header_of(plain)), identify_parts(header_of(more))
    assert [(f.part, f.layout, f.config) for f in found] == [(f.part, f.layout, f.config) for f in expected]


def test_a_clip_saved_by_transformers_5_is_known(header_of: Write) -> None:
    tensors = contract("hunyuan_te_clipL__diffusers_text_encoder_2")
    bare = {name.removeprefix("text_model."): info for name, info in tensors.items()}
    found = identify(header_of(bare))
    assert (found.part, found.layout, found.config) == ("clip", "clip_v5", ClipDims())


def test_the_published_stack_is_put_together(header_of: Write) -> None:
    """From LLaVA and CLIP: the same modules, names and sizes as the stack of one file."""
    parts: dict[str, Any] = {}
    for name in ("hunyuan_te_llava__hf_original_layout", "hunyuan_te_clipL__comfy_clip_l"):
        header = header_of(contract(name))
        parts |= {item.part: item for item in identify_parts(header)}
    config = HUNYUAN.text.config({part: item.config for part, item in parts.items()})
    assert config == TextConfig(vision=VisionDims())
    with torch.device("meta"):
        modules = {part: HUNYUAN.parts[part].build(item.config, {}) for part, item in parts.items()}
        whole = TextStack(config)
    stack = HUNYUAN.text.join(config, modules, (None, None))
    shapes = {name: tensor.shape for name, tensor in stack.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in whole.state_dict().items()}
    projector, last_layer, pooled_norm = 20_979_712, 12_596_224, 2 * 1024
    tower = sum(p.numel() for p in stack.vision.vision_model.parameters())
    assert tower == 324_487_168 - projector - last_layer - pooled_norm
