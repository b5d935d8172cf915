"""Does a LoRA of a style do what it was trained for, and nothing else? Unseen prompts with it and without, measured.

``python -m vidgen.benchmarks.follow_lora --n 32 --seed 1 [--strength 1] [--json]``

Each prompt is rendered twice from the same noise. The style's measure is the mean luminance of the background
(``training/data/styles.py``), whose change is compared with what the style itself does to the true clips of the same
scenes; ``training/data/detect.py`` says whether the prompt is still followed under the LoRA. Scenes, bundles and
intervals are those of ``benchmarks/follow.py``.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..training.data import detect, styles
from .follow import (
    Task,
    asked,
    bundle_of,
    chunks_of,
    judged_rows,
    new_parser,
    tell,
    wilson,
)

LORA = "vidgen-tiny-hunyuan/night.safetensors"
BAR_MOVED = 0.5
"""share of the style's own change that the LoRA must bring"""
BAR_FOLLOWED = 0.9
"""share of the scenes whose colour and whose motion must still be followed"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTask(Task):
    """What one process renders and judges."""

    lora: str = LORA
    style: str = "night"
    strength: float = 1.0


def run_task(task: LoraTask) -> list[dict[str, Any]]:
    """Render and judge the scenes of a task (in a process of its own)."""
    from ..training.pictures import to_pixels
    from ..vidgen_core.generate import generate
    from ..vidgen_core.memory.host import LocalHost
    from ..vidgen_core.weights.lora import read_lora

    plain = bundle_of(task.model)
    lora = read_lora(LocalHost().find("lora", task.lora))
    styled = replace(plain, model=plain.model.with_lora(lora, task.strength))
    rows = []
    for one in asked(task):
        started = time.perf_counter()
        videos = [generate(bundle, one.caption, settings=one.settings) for bundle in (plain, styled)]
        seconds = (time.perf_counter() - started) / 2
        without, render = (to_pixels(video[0]) for video in videos)
        figures = {
            "light": styles.background_light(render),
            "light_without": styles.background_light(without),
            "true_light": styles.background_light(styles.STYLES[task.style](one.truth)),
            "true_light_without": styles.background_light(one.truth),
            "seconds": seconds,
        }
        rows.append(one.row(render, **figures))
    return rows


def follow_lora(
    *,
    num: int,
    seed: int,
    split: str = "seen",
    model: str | None = None,
    lora: str = LORA,
    style: str = "night",
    strength: float = 1.0,
    processes: int = 2,
    sampling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures and whether they reach the bars; see the module's text."""
    started = time.perf_counter()
    task = LoraTask(
        model=model,
        split=split,
        seed=seed,
        indices=(),
        sampling=tuple(sorted((sampling or {}).items())),
        lora=lora,
        style=style,
        strength=strength,
    )
    tasks = [replace(task, indices=chunk) for chunk in chunks_of(num)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = judged_rows(pool, run_task, tasks, num)
    return summary(rows) | {
        "n": num, "seed": seed, "split": split, "model": model or "bundled", "lora": lora, "style": style,
        "strength": strength, "sampling": sampling or {}, "wall_s": time.perf_counter() - started, "rows": rows,
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of judged scenes."""
    num = len(rows)
    result: dict[str, Any] = {
        name: sum(row["seen"][name] == row["wanted"][name] for row in rows) / num for name in detect.JUDGED
    }
    result["interval_95"] = {name: wilson(result[name], num) for name in detect.JUDGED}
    for name in ("light", "light_without", "true_light", "true_light_without", "seconds"):
        result[name] = float(np.mean([row[name] for row in rows]))
    moved = result["light_without"] - result["light"]
    result["moved"] = moved / (result["true_light_without"] - result["true_light"])
    result["passes"] = {
        "moved": result["moved"] >= BAR_MOVED,
        "colour": result["colour"] >= BAR_FOLLOWED,
        "motion": result["motion"] >= BAR_FOLLOWED,
    }
    return result


def report(result: dict[str, Any]) -> str:
    """The figures as a table for people."""
    verdict = {True: "reached", False: "not reached"}
    lines = [
        f"{result['n']} {result['split']} scenes, seed {result['seed']}, {result['lora']} at {result['strength']:g}",
        "",
        f"{'':12}  {'followed':>8}  {'95 % interval':>15}",
    ]
    for name in detect.JUDGED:
        low, high = result["interval_95"][name]
        bar = f"  bar {BAR_FOLLOWED:.0%} {verdict[result['passes'][name]]}" if name in result["passes"] else ""
        lines.append(f"{name:12}  {result[name]:8.1%}  {low:6.1%} - {high:6.1%}{bar}")
    lines += [
        "",
        f"light of the background {result['light_without']:.3f} -> {result['light']:.3f}; the style itself "
        f"{result['true_light_without']:.3f} -> {result['true_light']:.3f}",
        f"{result['moved']:.1%} of the style's change; bar {BAR_MOVED:.0%} {verdict[result['passes']['moved']]}",
        f"{result['seconds']:.1f} s per video on one core, {result['wall_s']:.0f} s in all",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether or not the bars are reached: ``passes`` in the JSON says it."""
    parser = new_parser("follow_lora", __doc__, num=32, help_of_n="scenes to render, each with the LoRA and without")
    parser.add_argument("--lora", default=LORA, help="a file, or a bundled one")
    parser.add_argument(
        "--style",
        choices=[s for s in styles.STYLES if s != "plain"],
        default="night",
        help="what the LoRA was trained on",
    )
    parser.add_argument("--strength", type=float, default=1.0)
    arguments = parser.parse_args(argv)
    result = follow_lora(
        num=arguments.n,
        seed=arguments.seed,
        split=arguments.split,
        model=arguments.model,
        lora=arguments.lora,
        style=arguments.style,
        strength=arguments.strength,
        processes=arguments.processes,
        sampling={} if arguments.num_steps is None else {"num_steps": arguments.num_steps},
    )
    return tell(result, arguments, report)


if __name__ == "__main__":
    sys.exit(main())
