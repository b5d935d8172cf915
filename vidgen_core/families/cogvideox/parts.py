"""Stand-ins for VAE and text encoder until theirs are merged: the record needs their shapes, nothing runs on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ...errors import CheckpointError
from .. import Part, TextAssembly


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecConfig:
    latent_channels: int = 16
    spatial_compression: int = 8
    temporal_compression: int = 4
    scaling_factor: float = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    width: int = 4096


def _not_yet(*_: Any) -> NoReturn:
    raise CheckpointError("CogVideoX's VAE and text encoder are not here yet")


CODEC = Part(config=CodecConfig, build=_not_yet, recognise=lambda shapes: None)
T5 = Part(config=TextConfig, build=_not_yet, recognise=lambda shapes: None)
TEXT = Part(config=TextConfig, build=_not_yet, recognise=lambda shapes: None)
TEXT_ASSEMBLY = TextAssembly(
    parts=("text", "t5"),
    config=_not_yet,
    tokenizers=_not_yet,
    join=_not_yet,
    blocks={},
    later=(),
    widths=lambda config: (config.width, 0),
    sees_images=lambda config: False,
    stranger=lambda shapes: None,
    activation=lambda config, num_tokens: (0, 0.0),
)
build_codec = _not_yet
