"""What a run tells its reader: a CSV of the loss, a CSV of evaluations, a curve as a picture, a progress line."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import MissingLibraryError

if TYPE_CHECKING:
    from .loop import Progress
    from .recipe import RunSettings

log = logging.getLogger("vidgen")

LOSSES = "loss.csv"
EVALUATIONS = "evaluation.csv"
CURVE = "loss.png"


class Journal:
    """The log files of one run in its folder."""

    def __init__(self, folder: Path, metrics: Sequence[str], run: RunSettings) -> None:
        self.folder, self.run = folder, run
        folder.mkdir(parents=True, exist_ok=True)
        self.columns = ["step", "minutes", "lr", "grad_norm", "steps_per_s", "loss", *metrics]
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._window_start = time.monotonic()
        self._last_curve = time.monotonic()
        self._board: Any = None
        if run.tensorboard:
            self._board = _board(folder / "tensorboard")

    def step(
        self, progress: Progress, position: float, lr: float, grad_norm: float, values: Mapping[str, float]
    ) -> None:
        """Note one step; every ``log_steps`` a row is written and a progress line logged."""
        for name, value in {**values, "grad_norm": grad_norm}.items():
            if math.isfinite(value):
                self._sums[name].append(value)
        if progress.step % self.run.log_steps:
            return
        now = time.monotonic()
        rate = self.run.log_steps / max(1e-9, now - self._window_start)
        means = {name: sum(items) / len(items) for name, items in self._sums.items() if items}
        row = {"step": progress.step, "minutes": progress.elapsed_s / 60, "lr": lr, "steps_per_s": rate, **means}
        self._append(LOSSES, self.columns, row)
        self._report(progress, position, rate, means)
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, progress.step)
        self._sums.clear()
        self._window_start = now
        if now - self._last_curve >= 60 * self.run.curve_minutes:
            self.draw_curve()

    def evaluation(self, progress: Progress, figures: Mapping[str, float]) -> None:
        """Note the figures of an evaluation."""
        if not figures:
            return
        row = {"step": progress.step, "minutes": progress.elapsed_s / 60, **figures}
        self._append(EVALUATIONS, list(row), row)
        log.info("evaluation at step %d: %s", progress.step, _spell(figures))
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"evaluation/{name}", value, progress.step)
        self._window_start = time.monotonic()

    def rewind(self, step: int) -> None:
        """Forget rows after ``step``: a resumed run writes them anew, and maybe with other parts of the loss."""
        for name in (LOSSES, EVALUATIONS):
            path = self.folder / name
            if not path.is_file():
                continue
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                kept = [row for row in reader if row["step"] and int(row["step"]) <= step]
                columns = self.columns if name == LOSSES else list(reader.fieldnames or [])
            path.unlink()
            for row in kept:
                self._append(name, columns, row)

    def draw_curve(self) -> None:
        """Draw the loss curve; without matplotlib there is none, and the CSV stays."""
        self._last_curve = time.monotonic()
        path = self.folder / LOSSES
        if not path.is_file():
            return
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            log.info("No picture of the loss curve: matplotlib is not installed")
            return
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if len(rows) < 2:
            return
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        _plot(figure.subplots(), rows, [c for c in self.columns if c == "loss" or c in self.columns[6:]])
        figure.savefig(self.folder / CURVE, dpi=110)

    def close(self) -> None:
        self.draw_curve()
        if self._board is not None:
            self._board.close()

    def _append(self, name: str, columns: Sequence[str], row: Mapping[str, Any]) -> None:
        path = self.folder / name
        is_new = not path.is_file()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
            if is_new:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})

    def _report(self, progress: Progress, position: float, rate: float, means: Mapping[str, float]) -> None:
        left_s = progress.elapsed_s * (1 - position) / position if position > 0 else math.inf
        left = f"{left_s / 60:.1f} min left" if math.isfinite(left_s) else "time left unknown"
        log.info("step %d  %.1f%%  %.2f steps/s  %s  %s", progress.step, 100 * position, rate, left, _spell(means))


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "The run's recipe asks for a library that is not installed",
            given="run.tensorboard = true, and no tensorboard",
            do="pip install 'comfyui-vidgen[train]', or set run.tensorboard = false",
        ) from error
    return SummaryWriter(str(folder))


def _spell(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _plot(axes: Any, rows: Sequence[Mapping[str, str]], columns: Sequence[str]) -> None:
    for name in columns:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        points = [(step, value) for step, value in points if value > 0]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        smooth = _smooth(values, max(1, len(values) // 50))
        (line,) = axes.plot(steps, smooth, label=name)
        axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Trailing mean over ``width`` values."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
