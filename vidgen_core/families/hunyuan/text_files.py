"""HunyuanVideo's text encoders from one file or several: their config, their tokenizers, and the stack they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ...errors import CheckpointError
from ...text.clip import ClipText
from ...text.llama import build_llama
from ...text.tokenizer import Tokenizer, tokenizers_from_metadata
from ...text.tokenizer_files import TokenizerPlaces, find_tokenizer
from ...text.vision import LlavaVision
from ...weights.load import read_tensors
from ...weights.records import Header
from .config import IMAGE_MARK, ClipDims, LlamaDims, TextConfig, VisionDims
from .text import SLOT, TextStack
from .text_recognise import check_published

Tokenizers = tuple[Tokenizer, Tokenizer]
"""LLaMA's and CLIP's"""


def build_text(config: TextConfig, metadata: Mapping[str, str]) -> nn.Module:
    """The stack of a combined file, with the tokenizers of its metadata."""
    return TextStack(config, *(tokenizers_from_metadata(metadata) or (None, None)))


def build_llama_part(dims: LlamaDims, metadata: Mapping[str, str]) -> nn.Module:
    return nn.ModuleDict({"llama": build_llama(dims)})


def build_clip_part(dims: ClipDims, metadata: Mapping[str, str]) -> nn.Module:
    return nn.ModuleDict({"clip": ClipText(dims)})


def build_vision_part(dims: VisionDims, metadata: Mapping[str, str]) -> nn.Module:
    return nn.ModuleDict({"vision": LlavaVision(dims)})


def stack_config(parts: Mapping[str, Any]) -> TextConfig:
    """One config of encoders from several files.

    Args:
        parts: part ("text", or "llama", "clip" and "vision") -> its config.

    Raises:
        CheckpointError: an encoder is missing, or they do not belong together.
    """
    if "text" in parts:
        twice = [_ENCODERS[part] for part in ("llama", "clip") if part in parts]
        if twice:
            raise CheckpointError(
                "An encoder is given twice",
                given=f"{' and '.join(twice)} besides a file that holds both",
                expected="the file that holds both, or one file for each",
                do="load only one of them",
            )
        config = parts["text"]
        return config if "vision" not in parts else _with_vision(config, parts["vision"])
    missing = [_ENCODERS[part] for part in ("llama", "clip") if part not in parts]
    if missing:
        raise CheckpointError(
            f"The text encoders lack {' and '.join(missing)}",
            given=" and ".join(_ENCODERS[part] for part in parts),
            expected="LLaMA and CLIP: two files, or one that holds both",
            do=f"load {' and '.join(missing)} as well",
        )
    config = TextConfig(llama=parts["llama"], clip=parts["clip"])
    if "vision" in parts:
        config = _with_vision(config, parts["vision"])
    check_published(config)
    return config


_ENCODERS = {
    "llama": "LLaMA (llava_llama3)",
    "clip": "CLIP (clip_l)",
    "vision": "the image encoder (llava_llama3_vision)",
}


def _with_vision(config: TextConfig, vision: VisionDims) -> TextConfig:
    return replace(config, vision=vision)


def find_tokenizers(config: TextConfig, headers: Mapping[str, Header], places: TokenizerPlaces) -> Tokenizers:
    """LLaMA's and CLIP's tokenizers: from a folder the user names, else from the files themselves, else from the places
    that ``text.tokenizer_files`` lists.

    Args:
        headers: part -> the file it comes from.

    Raises:
        FileError, CheckpointError: one is not found. No weights were read by then.
    """
    own = [tokenizers_from_metadata(header.metadata) for header in headers.values()]
    carried = next((pair for pair in own if pair is not None), None)
    if carried is not None and places.named is None:
        return carried
    llama_file = headers.get("text") or headers["llama"]
    clip_file = headers.get("text") or headers["clip"]
    inside = None if places.named else _inside(llama_file)
    if inside is None or llama_misfit(config, inside) is not None:
        inside = find_tokenizer("llama", llama_file.path, places, lambda found: llama_misfit(config, found))
    return inside, find_tokenizer("clip", clip_file.path, places, lambda found: clip_misfit(config, found))


def _inside(header: Header) -> Tokenizer | None:
    """The tokenizer.json that some files carry as a tensor of bytes."""
    info = header.tensors.get("tokenizer")
    if info is None or info.dtype != torch.uint8 or len(info.shape) != 1:
        return None
    text = read_tensors(header, ["tokenizer"])["tokenizer"].numpy().tobytes()
    try:
        return Tokenizer.from_json(text.decode("utf-8"))
    except (CheckpointError, UnicodeDecodeError):
        return None  # some other blob; the usual places may have a tokenizer


def llama_misfit(config: TextConfig, tokenizer: Tokenizer) -> str | None:
    """Why this is not the tokenizer that LLaMA was trained with, or None.

    The words before the prompt in the video template must be as many tokens as are cut from the states.
    """
    if tokenizer.num_ids > config.llama.vocab_size:
        return f"{tokenizer.num_ids} entries for {config.llama.vocab_size} rows of the embedding"
    templates = [config.video_template] if config.vision is None else [config.video_template, config.i2v_video_template]
    for template in templates:
        parts = tokenizer.encode(template.text.split(SLOT)[0].split(IMAGE_MARK), special_tokens=False)
        bos = config.bos_token_id
        number = 1 + sum(token != bos for part in parts for token in part) + len(parts) - 1
        if template.crop_start and number != template.crop_start:
            return f"another vocabulary: it cuts the template into {number} tokens, not {template.crop_start}"
    return None


def clip_misfit(config: TextConfig, tokenizer: Tokenizer) -> str | None:
    """Why this is not CLIP's tokenizer, or None."""
    clip = config.clip
    if tokenizer.num_ids > clip.vocab_size:
        return f"{tokenizer.num_ids} entries for {clip.vocab_size} rows of the embedding"
    if tokenizer.encode([""])[0][-1:] != [clip.eos_token_id]:
        return f"another vocabulary: a text does not end with token {clip.eos_token_id}"
    return None


def join_stack(
    config: TextConfig,
    parts: Mapping[str, nn.Module],
    tokenizers: Tokenizers,
    later: Mapping[str, Callable[[], nn.Module]] | None = None,
) -> nn.Module:
    """The stack around encoders that were loaded, by part; ``later`` loads the image encoder when a picture comes."""
    with torch.device("meta"):
        stack = TextStack(config, *tokenizers)
    if later:
        read = later["vision"]
        stack.vision = None
        stack.read_vision = lambda: cast(LlavaVision, read().get_submodule("vision"))
    for module in parts.values():
        for name, encoder in module.named_children():
            setattr(stack, name, encoder)
    return stack.eval().requires_grad_(False)
