"""T5's weights in the layouts that people have on disk, and its dimensions from a file's names and shapes.

Native names are those of :class:`.text.T5Text`: ``t5.`` before those of the encoder in ``transformers``. Published
files hold the embedding once (``shared``), twice, or under the encoder's name only, and some the decoder as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import CheckpointError
from ...text.dims import T5Dims
from ...weights.keymap import KeyMap, Row
from .config import TextConfig

Shapes = Mapping[str, tuple[int, ...]]

_ATTENTION = ("q", "k", "v", "o")
_LAYERS = {
    **{f"layer.0.SelfAttention.{name}": f"attn_{name}" for name in _ATTENTION},
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
"""module of a block in ``transformers`` -> the same in llama.cpp's GGUF files"""
_EXTRAS = ("spiece_model", "scaled_fp8", "logit_scale")
"""the tokenizer as bytes, and ComfyUI's mark of a file with scaled float8 weights"""


def _huggingface(title: str, embedding: str, *unneeded: str, encoder: str = "encoder.") -> KeyMap:
    return KeyMap(
        [
            Row("t5.embed_tokens", embedding),
            *(Row(f"t5.block.*.{name}", f"{encoder}block.*.{name}") for name in _LAYERS),
            Row("t5.final_layer_norm", f"{encoder}final_layer_norm"),
        ],
        foreign=title,
        prefixes=("t5xxl.transformer.", "text_encoders.t5xxl.transformer.", "text_encoder.", "model."),
        unneeded=(*_EXTRAS, *unneeded),
    )


T5_LAYOUTS: Mapping[str, KeyMap] = {
    "huggingface": _huggingface("T5EncoderModel", "shared", "encoder.embed_tokens.", "decoder.", "lm_head."),
    "embedding_once": _huggingface("T5EncoderModel without its shared name", "encoder.embed_tokens"),
    "gguf": KeyMap(
        [
            Row("t5.embed_tokens", "token_embd"),
            *(Row(f"t5.block.*.{native}", f"enc.blk.*.{name}") for native, name in _LAYERS.items()),
            Row("t5.final_layer_norm", "enc.output_norm"),
        ],
        foreign="llama.cpp",
        unneeded=("dec.", "output."),
    ),
}
"""every layout besides the native one: ComfyUI's files and diffusers' folders are "huggingface", with or without
scales"""


def t5_dims(shapes: Shapes) -> T5Dims | None:
    """T5's dimensions; None when the names are not its own, or when there are other weights as well.

    Shapes do not tell the distance from which on relative positions are alike; that of every published T5 is taken.
    """
    first, bias = "t5.block.0.layer", "t5.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    needed = (
        "t5.embed_tokens.weight",
        bias,
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    if any(name not in shapes for name in needed) or not all(name.startswith("t5.") for name in shapes):
        return None
    if bias.replace("block.0", "block.1") in shapes:
        return None  # UMT5: every layer has a bias of its own
    (vocab_size, hidden_size), (buckets, heads), queries, inner = (shapes[name] for name in needed)
    return T5Dims(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=len({match[1] for name in shapes if (match := re.match(r"t5\.block\.(\d+)\.", name))}),
        num_heads=heads,
        head_size=queries[0] // max(1, heads),
        intermediate_size=inner[0],
        num_buckets=buckets,
    )


def check_published(config: TextConfig) -> None:
    """Raise CheckpointError where an encoder that was told by its shapes cannot be CogVideoX's."""
    found, wanted = config.t5, T5Dims()
    if found.hidden_size == wanted.hidden_size and found.num_layers != wanted.num_layers:
        raise CheckpointError(
            "The T5 file is not complete",
            given=f"{found.num_layers} layers",
            expected=f"{wanted.num_layers} layers",
            do="fetch it again, or name all files that it was cut into",
        )
    if found.vocab_size <= max(config.pad_token_id, config.eos_token_id):
        raise CheckpointError(
            "This T5 is not CogVideoX's",
            given=f"{found.vocab_size} rows in its embedding",
            expected=f"{wanted.vocab_size} rows: the encoder of T5 v1.1 XXL",
            do="use t5xxl_fp16.safetensors or the text_encoder folder of CogVideoX",
        )


STRANGERS = (
    ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "an old T5 without gates, where CogVideoX reads T5 v1.1 XXL"),
    (
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
        "a UMT5 text encoder, where CogVideoX reads T5 v1.1 XXL",
    ),
)
"""a name that tells what another encoder is, for messages"""


def stranger(shapes: Shapes) -> str | None:
    """What a file is that is no encoder of CogVideoX, if that can be told."""
    return next((what for name, what in STRANGERS if name in shapes), None)
