"""Recipes: a TOML file in, frozen dataclasses out, and no silent typo in between.

Every table of the file is a dataclass. An unknown key, a missing one, or a value of the wrong type is a
:class:`RecipeError` that names the key and suggests the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..vidgen_core.errors import FileError, RecipeError
from ..vidgen_core.families import FAMILIES
from ..vidgen_core.weights.config import config_from_dict, unknown_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Where a run lives, how it computes and how often it looks up from its work."""

    name: str
    """its folder is FOLDER/NAME"""
    folder: str = "runs"
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast in the forward pass; weights, optimizer and EMA stay fp32"""
    device: Literal["cpu", "auto"] = "cpu"
    processes: int = 1
    """data-parallel copies on this machine; the batch is split over them"""
    threads: int = 1
    """threads of each process. More than one per process is slower wherever cores are shared"""
    log_steps: int = 20
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None
    evaluate_minutes: float | None = None
    evaluate_steps: int | None = None
    curve_minutes: float = 2.0
    """how often the picture of the loss curve is drawn anew"""
    tensorboard: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over a run. Exactly one of ``steps`` and ``budget_minutes`` ends the run."""

    steps: int | None = None
    budget_minutes: float | None = None
    """wall-clock length; the run is annealed by the clock and ends when the time is up, also after a resume"""
    warmup_steps: int = 100
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    final_ratio: float = 0.0
    """last learning rate / first learning rate"""
    hold: float = 0.0
    """share of the run at the full learning rate before the descent begins"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for hidden matrices, AdamW for everything else"""
    lr: float = 1e-3
    muon_lr: float = 1e-3
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """largest norm of the gradient; 0 turns clipping off"""
    ema_decay: float = 0.999
    """0 turns the moving average off"""
    batch_size: int = 32
    """samples of a step over all processes"""


def read_recipe(path: str | Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """The recipe in a TOML file as an instance of the dataclass ``kind``.

    Args:
        path: the file.
        overrides: ``table.key=value`` with the value in TOML's spelling (bare words count as strings).

    Raises:
        FileError: the file is not there.
        RecipeError: it is no TOML, or has an unknown key, lacks one, or a value has the wrong type.
    """
    return config_from_dict(kind, read_table(path, overrides), where=str(path), error=RecipeError)


def read_table(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The raw table of a recipe file with ``overrides`` applied."""
    file = Path(path)
    if not file.is_file():
        raise FileError("The recipe is not there", given=file, do="see training/recipes for the bundled ones")
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"The recipe cannot be read ({error.strerror})", given=file) from error
    except UnicodeDecodeError as error:
        raise RecipeError("The recipe is not a text file", given=file, expected="TOML in UTF-8") from error
    table = _parse_toml(text, what=str(file))
    for override in overrides:
        _apply_override(table, override)
    return table


def model_config(family: str, part: str, values: Mapping[str, Any]) -> Any:
    """The config of a family's "network", "codec" or "text" from the table ``[model]`` of a recipe.

    Raises:
        RecipeError: there is no such family, or the table has an unknown key or a value of the wrong type.
    """
    if family not in FAMILIES:
        raise unknown_name("family", family, list(FAMILIES), where="the recipe", error=RecipeError)
    return config_from_dict(FAMILIES[family].parts[part].config, values, where="model", error=RecipeError)


def require_positive(values: Mapping[str, float | None]) -> None:
    """Raise :class:`RecipeError` for the first of the named values that is not above 0; None counts as not given."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise RecipeError("A value of the recipe cannot be used", given=f"{name} = {value}", expected="more than 0")


def _parse_toml(text: str, *, what: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError("The recipe is not valid TOML", given=f"{what}: {error}") from error


def _apply_override(table: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise RecipeError("An override has no value", given=override, expected="table.key=value")
    try:
        value = _parse_toml(f"value = {text}", what=override)["value"]
    except RecipeError:
        value = text
    *parents, key = path.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError("An override goes into a value that is no table", given=override)
    table[key] = value
