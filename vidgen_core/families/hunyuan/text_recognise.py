"""The text encoders' dimensions from the names and shapes in a published file, which carries no config of its own.

Shapes do not tell everything. By rule a head of LLaMA is 128 wide and one of CLIP 64, as in every published
checkpoint, and the special ids are the published ones; an encoder that cannot have these is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ...errors import CheckpointError
from .config import ClipDims, LlamaDims, TextConfig, VisionDims

Shapes = Mapping[str, tuple[int, ...]]

_LLAMA_HEAD, _CLIP_HEAD = 128, 64


def _count(shapes: Shapes, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in shapes if (match := pattern.match(name))})


def text_config(shapes: Shapes) -> TextConfig | None:
    """LLaMA and CLIP in one file, at the published sizes only: ids and templates cannot be guessed."""
    if "llama.embed_tokens.weight" not in shapes or not any(name.startswith("clip.") for name in shapes):
        return None
    published = TextConfig()
    width = shapes["llama.embed_tokens.weight"]
    if width != (LlamaDims().vocab_size, LlamaDims().hidden_size):
        return None
    clip = shapes.get("clip.text_model.embeddings.token_embedding.weight")
    return published if clip == (ClipDims().vocab_size, ClipDims().hidden_size) else None


def llama_dims(shapes: Shapes) -> LlamaDims | None:
    """LLaMA without its last layers; None when the names are not LLaMA's, or when there are other weights as well."""
    first = "llama.layers.0"
    needed = ("llama.embed_tokens.weight", f"{first}.self_attn.q_proj.weight", f"{first}.self_attn.k_proj.weight")
    if any(name not in shapes for name in (*needed, f"{first}.mlp.gate_proj.weight")):
        return None
    (vocab_size, hidden_size), queries, keys = (shapes[name] for name in needed)
    if not all(name.startswith("llama.") for name in shapes) or queries[0] % _LLAMA_HEAD or keys[0] % _LLAMA_HEAD:
        return None
    return LlamaDims(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=_count(shapes, "llama.layers") + LlamaDims().skip_layers,
        num_heads=queries[0] // _LLAMA_HEAD,
        num_kv_heads=keys[0] // _LLAMA_HEAD,
        intermediate_size=shapes[f"{first}.mlp.gate_proj.weight"][0],
    )


def clip_dims(shapes: Shapes) -> ClipDims | None:
    """CLIP's text tower; None when the names are not its own, or when there are other weights as well."""
    path = "clip.text_model"
    needed = (
        f"{path}.embeddings.token_embedding.weight",
        f"{path}.embeddings.position_embedding.weight",
        f"{path}.encoder.layers.0.mlp.fc1.weight",
    )
    if any(name not in shapes for name in needed) or not all(name.startswith("clip.") for name in shapes):
        return None
    (vocab_size, hidden_size), (max_length, _), (inner, _) = (shapes[name] for name in needed)
    return ClipDims(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=_count(shapes, f"{path}.encoder.layers"),
        num_heads=max(1, hidden_size // _CLIP_HEAD),
        intermediate_size=inner,
        max_length=max_length,
    )


def vision_dims(shapes: Shapes) -> VisionDims | None:
    """LLaVA's image encoder with its projector; None when the names are not its own, or when there are others."""
    path = "vision.vision_model"
    needed = (
        f"{path}.embeddings.patch_embedding.weight",
        f"{path}.embeddings.position_embedding.weight",
        f"{path}.encoder.layers.0.mlp.fc1.weight",
        "vision.multi_modal_projector.linear_2.weight",
    )
    if any(name not in shapes for name in needed) or not all(name.startswith("vision.") for name in shapes):
        return None
    (hidden_size, _, patch_size, _), (positions, _), (inner, _), (out_size, _) = (shapes[name] for name in needed)
    return VisionDims(
        image_size=patch_size * math.isqrt(positions - 1),
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_layers=_count(shapes, f"{path}.encoder.layers") + VisionDims().skip_layers,
        num_heads=max(1, hidden_size // _CLIP_HEAD),
        intermediate_size=inner,
        out_size=out_size,
    )


def check_published(config: TextConfig) -> None:
    """Raise CheckpointError where encoders that were told by their shapes cannot be HunyuanVideo's."""
    llama, clip, vision = config.llama, config.clip, config.vision
    ids = max(config.pad_token_id, config.image_token_id, config.bos_token_id)
    if llama.vocab_size <= ids:
        raise CheckpointError(
            "This LLaMA is not HunyuanVideo's",
            given=f"{llama.vocab_size} rows in its embedding",
            expected=f"{LlamaDims().vocab_size} rows: LLaMA-3-8B as it was trained for LLaVA",
            do="use llava_llama3 of HunyuanVideo, or xtuner's llava-llama-3-8b-v1_1-transformers",
        )
    if llama.hidden_size == LlamaDims().hidden_size and llama.num_layers != LlamaDims().num_layers:
        raise CheckpointError(
            "The LLaMA file is not complete",
            given=f"{llama.num_layers} layers",
            expected=f"{LlamaDims().num_layers} layers",
            do="fetch it again, or name all files that it was cut into",
        )
    if clip.vocab_size <= clip.eos_token_id or clip.hidden_size > ClipDims().hidden_size:
        raise CheckpointError(
            "This CLIP is not HunyuanVideo's",
            given=f"{clip.vocab_size} rows of {clip.hidden_size} in its embedding",
            expected=f"{ClipDims().vocab_size} rows of {ClipDims().hidden_size}: CLIP ViT-L/14",
            do="use clip_l.safetensors",
        )
    if vision is not None and vision.out_size != llama.hidden_size:
        raise CheckpointError(
            "The image encoder does not belong to this LLaMA",
            given=f"tokens {vision.out_size} wide for a LLaMA {llama.hidden_size} wide",
            expected="both of one LLaVA",
            do="use llava_llama3_vision.safetensors of HunyuanVideo",
        )


STRANGERS = (
    ("encoder.block.0.layer.0.SelfAttention.q.weight", "a T5 text encoder, which HunyuanVideo does not read"),
    ("text_model.encoder.layers.31.layer_norm1.weight", "a CLIP-G text encoder, which HunyuanVideo does not read"),
    ("vision_model.embeddings.patch_embedding.weight", "an image encoder without LLaVA's projector"),
    ("model.layers.0.self_attn.q_norm.weight", "another language model than LLaMA-3"),
    ("model.layers.0.self_attn.q_proj.bias", "another language model than LLaMA-3"),
)
"""a name that tells what another encoder is, for messages"""


def stranger(shapes: Shapes) -> str | None:
    """What a file is that is no encoder of HunyuanVideo, if that can be told."""
    return next((what for name, what in STRANGERS if name in shapes), None)
