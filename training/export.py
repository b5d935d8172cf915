"""Writing a trained model as the files that the loaders read: one safetensors per part, config and all inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..vidgen_core.errors import FileError
from ..vidgen_core.families.hunyuan.codec import HunyuanCodec
from ..vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
from ..vidgen_core.families.hunyuan.text import TextStack
from ..vidgen_core.families.hunyuan.vae import CausalVAE
from ..vidgen_core.preview import METADATA_KEY as PREVIEW_KEY
from ..vidgen_core.preview import LatentRGB, fit_preview
from ..vidgen_core.types import Defaults
from ..vidgen_core.weights.save import save_checkpoint

FILES = {"network": "network.safetensors", "codec": "vae.safetensors", "text": "text.safetensors"}
"""part -> file name inside a model's folder"""

State = Mapping[str, torch.Tensor]


def export_network(
    path: Path,
    network: nn.Module | State,
    config: Any,
    defaults: Defaults,
    *,
    family: str = "hunyuan",
    preview: LatentRGB | None = None,
    dtype: torch.dtype | None = None,
    **notes: str,
) -> None:
    """The diffusion network, or the state dict of its moving average.

    Args:
        preview: how unfinished latents are shown (``fit_preview(codec)``).
        config: the family's ``NetworkConfig``.
        notes: become ``modelspec.`` metadata: title, author, description, license, ...
    """
    metadata = {"vidgen.defaults": json.dumps(asdict(defaults)), **_notes(notes)}
    if preview is not None:
        metadata[PREVIEW_KEY] = preview.to_json()
    _save(path, network, family=family, part="network", config=config, metadata=metadata, dtype=dtype)


def export_codec(
    path: Path, vae: nn.Module | State, config: CodecConfig, *, dtype: torch.dtype | None = None, **notes: str
) -> None:
    """The VAE; ``config.scaling_factor`` must already be the measured one."""
    _save(path, vae, part="codec", config=config, metadata=_notes(notes), dtype=dtype)


def export_text(path: Path, text: TextStack, *, dtype: torch.dtype | None = None, **notes: str) -> None:
    """Both text encoders with their tokenizers."""
    _save(path, text, part="text", config=text.config, metadata={**text.metadata(), **_notes(notes)}, dtype=dtype)


def export_bundle(
    folder: Path,
    *,
    network: tuple[nn.Module | State, NetworkConfig, Defaults],
    codec: tuple[CausalVAE, CodecConfig],
    text: TextStack,
    dtype: torch.dtype | None = None,
    **notes: str,
) -> dict[str, Path]:
    """All three parts into ``folder`` (made if needed); part -> file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The folder cannot be made ({error.strerror})", given=folder) from error
    paths = {part: folder / name for part, name in FILES.items()}
    preview = fit_preview(HunyuanCodec(*codec))
    export_network(paths["network"], *network, preview=preview, dtype=dtype, **notes)
    export_codec(paths["codec"], *codec, dtype=dtype, **notes)
    export_text(paths["text"], text, dtype=dtype, **notes)
    return paths


def _save(
    path: Path,
    weights: nn.Module | State,
    *,
    part: str,
    config: Any,
    metadata: State | Mapping[str, str],
    dtype: Any,
    family: str = "hunyuan",
) -> None:
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    save_checkpoint(path, state, family=family, part=part, config=config, metadata=metadata, dtype=dtype)


def _notes(notes: Mapping[str, str]) -> dict[str, str]:
    return {f"modelspec.{key}": value for key, value in notes.items()}
