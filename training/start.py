"""Starting a run from the weights of a file: ``init`` in a recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..vidgen_core.errors import RecipeError
from ..vidgen_core.model import build_part, open_part


def start_from(path: str | Path, part: str, module: nn.Module, config: Any, *, ignore: Collection[str] = ()) -> Any:
    """Copy a checkpoint's weights into ``module``, as float32; files of every layout that the loaders know will do.

    Args:
        part: "network" or "codec".
        config: of ``module``; the file's must be equal.
        ignore: fields of ``config`` that may differ.

    Returns:
        the file's config.

    Raises:
        FileError, CheckpointError: the file cannot be read, is damaged, or is another part.
        RecipeError: it holds another model than the recipe describes.
    """
    header, found = open_part(path, part)
    if type(found.config) is not type(config):
        raise RecipeError("The file to start from is of another family", given=f"{path}: {found.title}")
    names = [field.name for field in fields(config) if field.name not in ignore]
    other = [name for name in names if getattr(found.config, name) != getattr(config, name)]
    if other:
        raise RecipeError(
            "The file to start from holds another model than the recipe describes",
            given=", ".join(f"model.{name} = {getattr(config, name)!r}" for name in other) + f" for {path}",
            expected=", ".join(f"{name} = {getattr(found.config, name)!r}" for name in other),
        )
    module.load_state_dict(build_part(header, found, dtype=torch.float32).state_dict())
    return found.config
