"""CogVideoX's text encoder from a file: its config, its tokenizer, and the module they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError
from ...text.sentencepiece import tokenizer_from_metadata, tokenizer_from_spiece, unigram_tokenizer
from ...text.t5 import build_t5
from ...text.tokenizer import METADATA_KEY, Tokenizer
from ...text.tokenizer_files import TokenizerPlaces, find_tokenizer
from ...weights.gguf_file import read_fields
from ...weights.load import read_tensors
from ...weights.records import Header
from .config import T5Dims, TextConfig
from .text import T5Text
from .text_keys import check_published


def build_text(config: TextConfig, metadata: Mapping[str, str]) -> nn.Module:
    """The module of a file of ours, with the tokenizer of its metadata."""
    return T5Text(config, _carried(metadata))


def build_t5_part(dims: T5Dims, metadata: Mapping[str, str]) -> nn.Module:
    return nn.ModuleDict({"t5": build_t5(dims)})


def stack_config(parts: Mapping[str, Any]) -> TextConfig:
    """The text config of what was found: "text" (a file of ours) or "t5" (a published one).

    Raises:
        CheckpointError: both are given, or a published encoder is not CogVideoX's.
    """
    if len(parts) > 1:
        raise CheckpointError(
            "The text encoder is given twice",
            given=" and ".join(parts),
            expected="one T5",
            do="load only one of them",
        )
    if "text" in parts:
        return parts["text"]
    config = TextConfig(t5=parts["t5"])
    check_published(config)
    return config


def find_t5_tokenizer(config: TextConfig, headers: Mapping[str, Header], places: TokenizerPlaces) -> Tokenizer:
    """T5's tokenizer: from a folder the user names, else from the file itself (its metadata, ComfyUI's
    ``spiece_model``, GGUF's fields), else from the places that ``text.tokenizer_files`` lists.

    Raises:
        FileError, CheckpointError: there is none. No weights were read by then.
    """
    header = headers.get("text") or headers["t5"]
    inside = None if places.named else _inside(header)
    if inside is not None and t5_misfit(config, inside) is None:
        return inside
    return find_tokenizer("t5", header.path, places, lambda found: t5_misfit(config, found))


def _carried(metadata: Mapping[str, str]) -> Tokenizer | None:
    return tokenizer_from_metadata(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None


def _inside(header: Header) -> Tokenizer | None:
    carried = _carried(header.metadata)
    if carried is not None:
        return carried
    if header.container == "gguf":
        return _of_gguf(header)
    info = header.tensors.get("spiece_model")
    if info is None or info.dtype != torch.uint8 or len(info.shape) != 1:
        return None
    try:
        return tokenizer_from_spiece(read_tensors(header, ["spiece_model"])["spiece_model"].numpy().tobytes())
    except CheckpointError:
        return None  # some other blob; the usual places may have a tokenizer


_VOCABULARY = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_MODEL, _CHARSMAP = "tokenizer.ggml.model", "tokenizer.ggml.precompiled_charsmap"


def _of_gguf(header: Header) -> Tokenizer | None:
    """The vocabulary that llama.cpp writes into the file of a T5."""
    fields = read_fields(header.path, [_MODEL, _CHARSMAP, *_VOCABULARY])
    words, scores, kinds = (fields.get(name, []) for name in _VOCABULARY)
    if fields.get(_MODEL) != "t5" or not len(words) == len(scores) == len(kinds):
        return None
    charsmap = bytes(number & 255 for number in fields.get(_CHARSMAP, []))
    try:
        return unigram_tokenizer(list(zip(words, scores, kinds, strict=True)), charsmap)
    except CheckpointError:
        return None


def t5_misfit(config: TextConfig, tokenizer: Tokenizer) -> str | None:
    """Why this is not the tokenizer that T5 was trained with, or None."""
    if tokenizer.num_ids > config.t5.vocab_size:
        return f"{tokenizer.num_ids} entries for {config.t5.vocab_size} rows of the embedding"
    if tokenizer.encode([""])[0][-1:] != [config.eos_token_id]:
        return f"another vocabulary: a text does not end with token {config.eos_token_id}"
    return None


def join_stack(
    config: TextConfig,
    parts: Mapping[str, nn.Module],
    tokenizer: Tokenizer,
    later: Mapping[str, Callable[[], nn.Module]] | None = None,
) -> nn.Module:
    """The module around an encoder that was loaded."""
    with torch.device("meta"):
        stack = T5Text(config, tokenizer)
    for module in parts.values():
        stack.t5 = module.get_submodule("t5")
    return stack.eval().requires_grad_(False)
