"""``stage = "text"``: the tiny text encoders by a recipe. They learn in minutes, so a run has no checkpoints."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..vidgen_core.errors import FileError, RecipeError
from ..vidgen_core.families.cogvideox.config import TextConfig as T5TextConfig
from ..vidgen_core.families.hunyuan.config import TextConfig
from ..vidgen_core.weights.config import unknown_name
from ..vidgen_core.weights.save import save_json
from .recipe import read_recipe, read_table, require_positive
from .text import tiny_t5_config, tiny_text_config, train_text

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
    """HunyuanVideo's LLaMA and CLIP."""

    width: int = 128
    """of both encoders"""
    num_heads: int = 4
    llama_layers: int = 3
    skip_layers: int = 1
    """so many of LLaMA's last layers are neither built nor stored: the states are taken before them"""
    clip_layers: int = 2
    max_length: int = 32
    """tokens of a prompt"""

    def config(self) -> TextConfig:
        """Raises RecipeError for sizes that do not go together."""
        _check_heads(self.width, self.num_heads, multiple=2)
        if not 0 <= self.skip_layers < self.llama_layers:
            raise RecipeError(
                "No layer of LLaMA would be left",
                given=f"model.skip_layers = {self.skip_layers}, model.llama_layers = {self.llama_layers}",
                expected="fewer layers skipped than there are",
            )
        return tiny_text_config(**asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Sizes:
    """CogVideoX's T5."""

    width: int = 128
    num_heads: int = 4
    num_layers: int = 3
    intermediate_size: int = 384
    """of the gated feed-forward layers"""
    max_length: int = 32
    """tokens of a prompt, the end-of-text token and padding counted; the network attends to all of them"""

    def config(self) -> T5TextConfig:
        """Raises RecipeError for sizes that do not go together."""
        _check_heads(self.width, self.num_heads)
        return tiny_t5_config(**asdict(self))


def _check_heads(width: int, num_heads: int, multiple: int = 1) -> None:
    if width % (multiple * num_heads):
        raise RecipeError(
            "The width cannot be split over the heads",
            given=f"model.width = {width}, model.num_heads = {num_heads}",
            expected=f"a multiple of {'twice ' if multiple == 2 else ''}the number of heads",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What the recipes of all families have."""

    stage: Literal["text"]
    run: TextRunSettings
    schedule: TextScheduleSettings = field(default_factory=TextScheduleSettings)
    optimizer: TextOptimizerSettings = field(default_factory=TextOptimizerSettings)
    num_test: int = 2000
    """captions of combinations never trained on, for the scores"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe(_Recipe):
    """``stage = "text"`` of HunyuanVideo."""

    family: Literal["hunyuan"] = "hunyuan"
    model: TextSizes = field(default_factory=TextSizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Recipe(_Recipe):
    """``stage = "text"`` of CogVideoX."""

    family: Literal["cogvideox"]
    model: T5Sizes = field(default_factory=T5Sizes)


RECIPES: Mapping[str, type[TextRecipe] | type[T5Recipe]] = {"hunyuan": TextRecipe, "cogvideox": T5Recipe}
"""by the recipe's ``family``; HunyuanVideo's where it names none"""


def read_text_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TextRecipe | T5Recipe:
    """The recipe in a TOML file as its family has it; see :func:`~.recipe.read_recipe`."""
    family = str(read_table(path, overrides).get("family", "hunyuan"))
    if family not in RECIPES:
        raise unknown_name("family of text encoders", family, list(RECIPES), where=str(path), error=RecipeError)
    return read_recipe(path, RECIPES[family], overrides)


def train_by_recipe(recipe: TextRecipe | T5Recipe) -> dict[str, float]:
    """Train and write ``text.safetensors``, ``loss.csv`` and ``scores.json`` into the run's folder.

    Returns:
        The scores, see :func:`~.text.train_text`.

    Raises:
        RecipeError: a number cannot work.
        FileError: the folder cannot be written.
    """
    config = _config(recipe)
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
        config,
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


def _config(recipe: TextRecipe | T5Recipe) -> TextConfig | T5TextConfig:
    """The encoders' configuration, once every number of the recipe is known to work."""
    sizes = asdict(recipe.model)
    require_positive(
        {
            "schedule.steps": recipe.schedule.steps,
            "optimizer.batch_size": recipe.optimizer.batch_size,
            "optimizer.lr": recipe.optimizer.lr,
            "run.threads": recipe.run.threads,
            "num_test": recipe.num_test,
            **{f"model.{name}": value for name, value in sizes.items() if name != "skip_layers"},
        }
    )
    return recipe.model.config()


def _append(path: Path, row: Mapping[str, Any]) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
