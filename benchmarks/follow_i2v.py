"""Does the tiny checkpoint go on from a given first frame? Unseen scenes begin with their true one and are measured.

``python -m vidgen.benchmarks.follow_i2v --n 32 --seed 1 [--split seen|heldout] [--json]``

For each scene drawn from the seed the first frame of its true clip and its caption are given. Measured are the PSNR
of the rendered first frame against the given one (with the codec's round trip of that frame as the ceiling), how
much changes from it to the next frame and between later ones (true clips have 1: more is a jump or flicker), and
whether ``training/data/detect.py`` sees the motion that the caption asks for. Scenes, bundles and intervals are those
of ``benchmarks/follow.py``.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.data import detect
from .follow import (
    Task,
    asked,
    bundle_of,
    chunks_of,
    judged_rows,
    new_parser,
    psnr_db,
    round_trip,
    tell,
    wilson,
)

BAR_PSNR_DB = 30.0
"""mean PSNR of the first frame that a checkpoint must reach"""
BAR_MOTION = 0.90
"""share of the scenes whose motion must be followed"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTask(Task):
    """What one process renders and judges."""

    method: str = "auto"
    mode: str | None = None


def run_task(task: ImageTask) -> list[dict[str, Any]]:
    """Render and judge the scenes of a task (in a process of its own)."""
    import torch

    from ..training.pictures import to_pixels
    from ..vidgen_core.generate import generate
    from ..vidgen_core.keyframes import Keyframe

    bundle, rows = bundle_of(task.model), []
    for one in asked(task):
        given = one.truth[:, :1]
        image = torch.from_numpy(given).permute(1, 0, 2, 3).float() / 127.5 - 1
        started = time.perf_counter()
        video = generate(
            bundle,
            one.caption,
            settings=one.settings,
            keyframes=[Keyframe(image=image)],
            method=task.method,
            mode=task.mode,
        )
        seconds = time.perf_counter() - started
        render = to_pixels(video[0])
        figures = {
            "first_frame_psnr_db": psnr_db(render[:, :1], given),
            "ceiling_psnr_db": psnr_db(round_trip(bundle.codec, one.truth)[:, :1], given),
            "steps": steps_of(render),
            "true_steps": steps_of(one.truth),
            "seconds": seconds,
        }
        rows.append(one.row(render, **figures))
    return rows


def steps_of(clip: np.ndarray) -> list[float]:
    """Root mean square change from each frame of (3, T, H, W) to the next one, in 8-bit levels."""
    changes = np.diff(clip.astype(np.float64), axis=1)
    return [float(value) for value in np.sqrt(np.square(changes).mean(axis=(0, 2, 3)))]


def follow_i2v(
    *,
    num: int,
    seed: int,
    split: str = "seen",
    model: str | None = None,
    method: str = "auto",
    mode: str | None = None,
    processes: int = 2,
    sampling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Figures and whether they reach the bars; see the module's text."""
    started = time.perf_counter()
    settings = tuple(sorted((sampling or {}).items()))
    tasks = [
        ImageTask(
            model=model,
            split=split,
            seed=seed,
            indices=chunk,
            sampling=settings,
            method=method,
            mode=mode,
        )
        for chunk in chunks_of(num)
    ]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = judged_rows(pool, run_task, tasks, num)
    result = summary(rows)
    result |= {
        "n": num, "seed": seed, "split": split, "model": model or "bundled", "method": method, "mode": mode,
        "sampling": sampling or {}, "wall_s": time.perf_counter() - started, "rows": rows,
    }  # fmt: skip
    return result


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of judged scenes."""
    num = len(rows)
    result: dict[str, Any] = {
        name: sum(row["seen"][name] == row["wanted"][name] for row in rows) / num for name in detect.JUDGED
    }
    result["interval_95"] = {name: wilson(result[name], num) for name in detect.JUDGED}
    psnr = np.asarray([row["first_frame_psnr_db"] for row in rows])
    result["first_frame_psnr_db"] = float(psnr.mean())
    result["first_frame_psnr_db_lowest"] = float(psnr.min())
    result["ceiling_psnr_db"] = float(np.mean([row["ceiling_psnr_db"] for row in rows]))
    steps, truth = (np.asarray([row[name] for row in rows]).mean(axis=0) for name in ("steps", "true_steps"))
    result["first_step_ratio"] = float(steps[0] / truth[0])
    result["step_ratio"] = float(steps[1:].mean() / truth[1:].mean())
    result["seconds_per_video"] = float(np.median([row["seconds"] for row in rows]))
    result["passes"] = {
        "first_frame": result["first_frame_psnr_db"] >= BAR_PSNR_DB,
        "motion": result["motion"] >= BAR_MOTION,
    }
    return result


def report(result: dict[str, Any]) -> str:
    """The figures as a table for people."""
    lines = [f"{result['n']} {result['split']} scenes from their first frame, seed {result['seed']}", ""]
    lines.append(f"{'':12}  {'followed':>8}  {'95 % interval':>15}")
    for name in detect.JUDGED:
        low, high = result["interval_95"][name]
        lines.append(f"{name:12}  {result[name]:8.1%}  {low:6.1%} - {high:6.1%}")
    verdict = {True: "reached", False: "not reached"}
    lines += [
        "",
        f"first frame {result['first_frame_psnr_db']:.2f} dB, lowest {result['first_frame_psnr_db_lowest']:.2f} dB, "
        f"codec alone {result['ceiling_psnr_db']:.2f} dB; bar {BAR_PSNR_DB:.0f} dB "
        + verdict[result["passes"]["first_frame"]],
        f"change from the given frame to the next {result['first_step_ratio']:.2f} times that of true clips, between "
        f"later frames {result['step_ratio']:.2f} times",
        f"motion {result['motion']:.1%}; bar {BAR_MOTION:.0%} {verdict[result['passes']['motion']]}",
        f"{result['seconds_per_video']:.1f} s per video on one core, {result['wall_s']:.0f} s in all",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 whether or not the bars are reached: ``passes`` in the JSON says it."""
    parser = new_parser("follow_i2v", __doc__, num=32)
    parser.add_argument(
        "--method", default="auto", help="token_replace for files that do not say that they take an image"
    )
    parser.add_argument("--mode", choices=("stability", "dynamic"))
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--shift", type=float)
    arguments = parser.parse_args(argv)
    names = ("cfg", "num_steps", "shift")
    result = follow_i2v(
        num=arguments.n,
        seed=arguments.seed,
        split=arguments.split,
        model=arguments.model,
        method=arguments.method,
        mode=arguments.mode,
        processes=arguments.processes,
        sampling={name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    )
    return tell(result, arguments, report)


if __name__ == "__main__":
    sys.exit(main())
