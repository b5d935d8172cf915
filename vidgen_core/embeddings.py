"""Encoded prompts in a file, so that a small machine, or the next run, never loads the language model.

A safetensors file with ``context``, ``context_mask`` and ``pooled`` as the encoders made them, bit for bit. Its
metadata say of which family they are, which prompt and template they came from, the encoders' config and the
fingerprint of their files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import CheckpointError, SettingsError
from .families import FAMILIES, Config, Family
from .text.features import TextFeatures
from .weights.config import config_from_json, config_to_json
from .weights.header import Header, read_header
from .weights.load import read_tensors
from .weights.save import FORMAT, save_tensors

PART = "embeddings"
"""``vidgen.part`` of such a file"""

_RANKS = {"context": 3, "context_mask": 2, "pooled": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Prompts as the text encoders understood them."""

    features: TextFeatures
    text_config: Config
    """of the encoders, to tell whether they belong to a network"""
    prompt: str
    template: str = ""
    """its kind, for people: "video", "image", "i2v video", "i2v image", "custom" """
    fingerprint: str = ""
    """of the encoders' files"""


def save_embeddings(path: str | Path, embeddings: Embeddings) -> None:
    """Write a file in one step: a temporary name, then the right one.

    Raises:
        SettingsError: the prompt was not encoded by encoders of a family here.
        FileError: no permission, full disk, missing folder.
    """
    family = next(
        (name for name, f in FAMILIES.items() if isinstance(embeddings.text_config, f.parts["text"].config)), None
    )
    if family is None:
        raise SettingsError(
            "This conditioning cannot be saved",
            given="a prompt that was not encoded by our text encoders",
            expected="a conditioning of Encode Prompt",
            do="encode the prompt with Encode Prompt, then save it",
        )
    features = embeddings.features
    save_tensors(
        path,
        {"context": features.context, "context_mask": features.context_mask, "pooled": features.pooled},
        {
            "vidgen.format": FORMAT,
            "vidgen.family": family,
            "vidgen.part": PART,
            "vidgen.config": config_to_json(embeddings.text_config),
            "vidgen.prompt": embeddings.prompt,
            "vidgen.template": embeddings.template,
            "vidgen.fingerprint": embeddings.fingerprint,
        },
    )


def load_embeddings(path: str | Path) -> Embeddings:
    """Read what :func:`save_embeddings` wrote.

    Raises:
        FileError: the file is missing or cannot be read.
        CheckpointError: it holds no encoded prompts, is damaged or cut short, or does not fit its own config.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("vidgen.part") != PART or set(header.tensors) != set(_RANKS):
        raise CheckpointError(
            "This file holds no encoded prompts",
            given=f"{path} with {', '.join(list(header.tensors)[:3])}",
            expected="a file of Save Embeddings",
            do="choose a file that Save Embeddings wrote",
        )
    family = metadata.get("vidgen.family", "")
    if family not in FAMILIES:
        raise _unfit(header, f"the family {family!r}", "one of " + ", ".join(FAMILIES))
    where = str(path)
    config = config_from_json(FAMILIES[family].parts["text"].config, metadata.get("vidgen.config", ""), where=where)
    _check_shapes(header, FAMILIES[family], config)
    tensors = read_tensors(header, mapped=False)
    for name in ("context", "pooled"):
        if not bool(torch.isfinite(tensors[name]).all()):
            raise _unfit(header, f"{name!r} with numbers that are not finite", "finite numbers")
    return Embeddings(
        features=TextFeatures(**tensors),
        text_config=config,
        prompt=metadata.get("vidgen.prompt", ""),
        template=metadata.get("vidgen.template", ""),
        fingerprint=metadata.get("vidgen.fingerprint", ""),
    )


def _check_shapes(header: Header, family: Family, config: Config) -> None:
    shapes, dtypes = header.shapes, {name: info.dtype for name, info in header.tensors.items()}
    for name, rank in _RANKS.items():
        # A family without a pooled vector has one of width 0; whether that is right, the widths tell.
        if len(shapes[name]) != rank or 0 in shapes[name][: 1 if name == "pooled" else rank]:
            raise _unfit(header, f"{name!r} of shape {shapes[name]}", f"{rank} dimensions, none of them empty")
    floating = dtypes["context"].is_floating_point and dtypes["pooled"].is_floating_point
    if dtypes["context_mask"] != torch.bool or not floating:
        raise _unfit(header, f"numbers of {', '.join(map(str, dtypes.values()))}", "floating states and a bool mask")
    if shapes["context"][:2] != shapes["context_mask"] or shapes["context"][0] != shapes["pooled"][0]:
        raise _unfit(header, ", ".join(f"{name} {shape}" for name, shape in shapes.items()), "the same prompts in all")
    widths, wanted = (shapes["context"][2], shapes["pooled"][1]), family.text.widths(config)
    if widths != wanted:
        raise _unfit(header, f"states {widths[0]} and {widths[1]} wide", f"{wanted[0]} and {wanted[1]}")


def _unfit(header: Header, given: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "The encoded prompts are damaged",
        given=f"{given} in {header.path}",
        expected=expected,
        do="encode the prompt again",
    )
