"""``stage = "text"``: the tiny text encoders by a recipe. They learn in minutes, so a run has no checkpoints."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..vidgen_core.errors import FileError, RecipeError
from ..vidgen_core.weights.save import save_json
from .recipe import require_positive
from .text import tiny_text_config, train_text

log = logging.getLogger("vidgen")

RESULT = "text.safetensors"
LOSSES = "loss.csv"
SCORES = "scores.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRunSettings:
    """Where a run lives. One process, float32, CPU: anything else would cost more than it saves."""

    name: str
    """its folder is FOLDER/NAME"""
    folder: str = "runs"
    seed: int = 0
    threads: int = 1
    """another number, another order of sums, and other weights in the last digits"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScheduleSettings:
    steps: int = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptimizerSettings:
    lr: float = 2e-3
    """of the encoders; the heads that are thrown away learn at five times this"""
    batch_size: int = 64
    """captions of a step"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSizes:
    width: int = 128
    """of both encoders"""
    num_heads: int = 4
    llama_layers: int = 3
    skip_layers: int = 1
    """so many of LLaMA's last layers are neither built nor stored: the states are taken before them"""
    clip_layers: int = 2
    max_length: int = 32
    """tokens of a prompt"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """``stage = "text"``."""

    stage: Literal["text"]
    run: TextRunSettings
    schedule: TextScheduleSettings = field(default_factory=TextScheduleSettings)
    optimizer: TextOptimizerSettings = field(default_factory=TextOptimizerSettings)
    model: TextSizes = field(default_factory=TextSizes)
    num_test: int = 2000
    """captions of combinations never trained on, for the scores"""


def train_by_recipe(recipe: TextRecipe) -> dict[str, float]:
    """Train and write ``text.safetensors``, ``loss.csv`` and ``scores.json`` into the run's folder.

    Returns:
        The scores, see :func:`~.text.train_text`.

    Raises:
        RecipeError: a number cannot work.
        FileError: the folder cannot be written.
    """
    _check(recipe)
    folder = Path(recipe.run.folder) / recipe.run.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOSSES).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"The run's folder cannot be used ({error.strerror})", given=folder) from error

    def report(step: int, parts: Mapping[str, float]) -> None:
        row = {"step": step, "loss": sum(parts.values()), **parts}
        log.info("step %d of %d  loss %.4g", step, recipe.schedule.steps, row["loss"])
        _append(folder / LOSSES, row)

    scores = train_text(
        tiny_text_config(**asdict(recipe.model)),
        steps=recipe.schedule.steps,
        seed=recipe.run.seed,
        threads=recipe.run.threads,
        out=folder / RESULT,
        on_log=report,
        batch=recipe.optimizer.batch_size,
        learning_rate=recipe.optimizer.lr,
        num_test=recipe.num_test,
    )
    save_json(folder / SCORES, {"scores": scores, "recipe": asdict(recipe)})
    log.info("Wrote %s and %s", folder / RESULT, folder / SCORES)
    return scores


def _check(recipe: TextRecipe) -> None:
    sizes = recipe.model
    require_positive(
        {
            "schedule.steps": recipe.schedule.steps,
            "optimizer.batch_size": recipe.optimizer.batch_size,
            "optimizer.lr": recipe.optimizer.lr,
            "run.threads": recipe.run.threads,
            "num_test": recipe.num_test,
            **{f"model.{name}": value for name, value in asdict(sizes).items() if name != "skip_layers"},
        }
    )
    if sizes.width % (2 * sizes.num_heads):
        raise RecipeError(
            "The width cannot be split over the heads",
            given=f"model.width = {sizes.width}, model.num_heads = {sizes.num_heads}",
            expected="a multiple of twice the number of heads",
        )
    if not 0 <= sizes.skip_layers < sizes.llama_layers:
        raise RecipeError(
            "No layer of LLaMA would be left",
            given=f"model.skip_layers = {sizes.skip_layers}, model.llama_layers = {sizes.llama_layers}",
            expected="fewer layers skipped than there are",
        )


def _append(path: Path, row: Mapping[str, Any]) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
