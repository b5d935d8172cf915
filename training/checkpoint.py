"""Checkpoints of a run: a folder per step with tensors in safetensors and everything else in JSON.

No pickle anywhere: a checkpoint from a stranger cannot run code. A folder appears under its final name only
when it is complete, so an interruption at any moment leaves the previous one in place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..vidgen_core.errors import CheckpointError, FileError

TENSORS = "state.safetensors"
REST = "state.json"


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], *, keep: int = 1) -> Path:
    """Write ``folder/step-N`` and delete all but the newest ``keep`` checkpoints.

    Raises:
        FileError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    from safetensors.torch import save_file

    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
        (temporary / REST).write_text(json.dumps(rest, indent=1), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise FileError("The checkpoint could not be written", given=f"{final}: {error}", do="free space") from error
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def complete(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / REST).is_file() and (path / TENSORS).is_file())


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest of one checkpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / TENSORS), json.loads((path / REST).read_text(encoding="utf-8"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            "The checkpoint is damaged",
            given=f"{path}: {error}",
            do="delete it; the run then starts from the one before",
        ) from error


def pack_optimizers(
    optimizers: list[torch.optim.Optimizer], names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer states by the parameters' names: tensors, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for optimizer in optimizers:
        kind = type(optimizer).__name__.lower()
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                target: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
                target[f"optimizer.{kind}.{key}.{names[parameter]}"] = value
    return tensors, numbers


def unpack_optimizers(
    optimizers: list[torch.optim.Optimizer],
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """The inverse of :func:`pack_optimizers`; parameters without a saved state start afresh."""
    saved = {**tensors, **numbers}
    for optimizer in optimizers:
        prefix = f"optimizer.{type(optimizer).__name__.lower()}."
        owned = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        for full_name, value in saved.items():
            if not full_name.startswith(prefix):
                continue
            key, name = full_name[len(prefix) :].split(".", 1)
            if name in owned:
                optimizer.state[owned[name]][key] = value.clone() if isinstance(value, Tensor) else value
