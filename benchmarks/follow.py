"""Does the tiny checkpoint do what it is told? Unseen prompts are rendered and the videos measured in closed form.

``python -m vidgen.benchmarks.follow --n 256 --seed 1 [--split seen|heldout] [--json]``

For each scene drawn from the seed, its caption is rendered at the checkpoint's default settings and judged by
``training/data/detect.py``. "seen" draws combinations of attributes that training has met (in other instances);
"heldout" only those that it never met. Printed with it, so that the figures can be read:

* the ceiling: the same detectors on the codec's round trip of the true clips, and its PSNR;
* chance: what agreement is left when the videos are compared with the captions of other scenes;
* the Frechet distance of fixed random-feature video statistics between the renders and a disjoint set of true
  clips, as a ratio to the distance between two disjoint sets of true clips of the same size. Both are means over
  two dozen true sets: between two sets of 256 the distance is anything from 0.5 to 2.7, as backgrounds fall out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..training.data import detect, shapes

if TYPE_CHECKING:
    from ..vidgen_core.generate import Sampling

NUM_FEATURES = 48
FEATURE_SEED = 20240229
NUM_TRUE_SETS = 24
"""disjoint sets of true clips that the renders are compared with, and each other"""
CHUNK = 8  # scenes per job


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process renders and judges."""

    model: str | None
    split: str
    seed: int
    indices: tuple[int, ...]
    sampling: tuple[tuple[str, Any], ...] = ()


def scene_and_caption(split: str, seed: int, index: int) -> tuple[shapes.Scene, str]:
    """The scene ``index`` of an evaluation and what it is called; no training seed leads here."""
    rng = np.random.default_rng([0x5EED, seed, ("seen", "heldout", "all").index(split), index])
    scene = shapes.sample_scene(rng, split)
    return scene, shapes.caption(scene, rng)


def true_clip(split: str, seed: int, index: int) -> np.ndarray:
    return shapes.render(scene_and_caption(split, seed, index)[0])


# ---------------------------------------------------------------------------------------------
# one job


@dataclass(frozen=True, slots=True)
class Asked:
    """One scene of a task."""

    index: int
    caption: str
    truth: np.ndarray
    """the clip that shows it: (3, T, H, W) uint8"""
    wanted: dict[str, Any]
    """what the detectors should see"""
    settings: Sampling

    def row(self, render: np.ndarray, **figures: Any) -> dict[str, Any]:
        """What is kept of it."""
        seen = detect.detect(render)
        return {"index": self.index, "caption": self.caption, "wanted": self.wanted, "seen": seen, **figures}


def asked(task: Task) -> Iterator[Asked]:
    """The scenes of a task, in a process of its own with one thread."""
    import torch

    from ..vidgen_core.generate import Sampling

    torch.set_num_threads(1)
    settings = Sampling(**dict(task.sampling))
    for index in task.indices:
        scene, caption = scene_and_caption(task.split, task.seed, index)
        wanted = {name: getattr(scene, name) for name in detect.JUDGED}
        own = replace(settings, seed=task.seed * 100_003 + index)
        yield Asked(index, caption, shapes.render(scene), wanted, own)


def run_task(task: Task) -> list[dict[str, Any]]:
    """Render, judge and describe the scenes of a task (in a process of its own)."""
    from ..training.pictures import to_pixels
    from ..vidgen_core.generate import generate

    bundle, rows = bundle_of(task.model), []
    for one in asked(task):
        started = time.perf_counter()
        video = generate(bundle, one.caption, settings=one.settings)
        seconds = time.perf_counter() - started
        render, reconstruction = to_pixels(video[0]), round_trip(bundle.codec, one.truth)
        figures = {
            "ceiling": detect.detect(reconstruction),
            "psnr_db": psnr_db(reconstruction, one.truth),
            "features": features(render).tolist(),
            "seconds": seconds,
        }
        rows.append(one.row(render, **figures))
    return rows


@lru_cache(maxsize=1)
def bundle_of(model: str | None) -> Any:
    """Loaded once in each process, not once for each of its tasks."""
    from ..vidgen_core.bundle import load_bundle

    return load_bundle(model)


def round_trip(codec: Any, clip: np.ndarray) -> np.ndarray:
    import torch

    from ..training.pictures import to_pixels

    with torch.inference_mode():
        video = torch.from_numpy(clip).float()[None] / 127.5 - 1
        return to_pixels(codec.decode(codec.encode(video))[0].float())


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-9))


# ---------------------------------------------------------------------------------------------
# distribution distance


def features(clip: np.ndarray) -> np.ndarray:
    """Fixed random-feature statistics of a clip, (NUM_FEATURES,): two random 3-D convolutions with ReLU,
    averaged over space and time, then projected. Never trained, the same for everyone."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(FEATURE_SEED)

    def kernel(out: int, into: int, *size: int) -> torch.Tensor:
        scale = 1 / math.sqrt(into * math.prod(size))
        return torch.randn(out, into, *size, generator=generator) * scale

    first, second = kernel(24, 3, 3, 5, 5), kernel(64, 24, 3, 3, 3)
    mix = kernel(NUM_FEATURES, 128)
    with torch.inference_mode():
        x = torch.from_numpy(clip.astype(np.float32))[None] / 127.5 - 1
        x = F.relu(F.conv3d(x, first * 2, stride=(1, 2, 2)))
        x = F.relu(F.conv3d(x, second * 2, stride=(2, 2, 2)))
        stats = torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], 1)[0]
        return (mix @ stats).double().numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to rows of features (N, F)
    (Dowson and Landau 1982): |m - n|^2 + tr(S + R - 2 (S R)^(1/2))."""
    s, r = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(s)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ r @ root), 0, None)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s) + np.trace(r) - 2 * cross)


def distances(made: np.ndarray, true_sets: Sequence[np.ndarray]) -> dict[str, float]:
    """Frechet distances (N, F) to each of the true sets, and between any two of those; features in units of their
    spread over all true sets, so that no feature outweighs the others."""
    everything = np.concatenate(list(true_sets))
    mean, spread = everything.mean(0), everything.std(0) + 1e-9
    made, *rest = ((rows - mean) / spread for rows in (made, *true_sets))
    to_truth = [frechet_distance(made, one) for one in rest]
    between = [frechet_distance(one, other) for one, other in itertools.combinations(rest, 2)]
    return {
        "frechet": float(np.mean(to_truth)),
        "frechet_truth": float(np.mean(between)),
        "frechet_truth_lowest": min(between),
        "frechet_truth_highest": max(between),
        "frechet_ratio": float(np.mean(to_truth) / np.mean(between)),
    }


def _true_features(job: tuple[str, int, tuple[int, ...]]) -> list[np.ndarray]:
    import torch

    torch.set_num_threads(1)
    split, seed, indices = job
    return [features(true_clip(split, seed, index)) for index in indices]


# ---------------------------------------------------------------------------------------------
# the whole


def chunks_of(num: int) -> list[tuple[int, ...]]:
    """The numbers of the scenes of each job."""
    return [tuple(range(first, min(num, first + CHUNK))) for first in range(0, num, CHUNK)]


def judged_rows(
    pool: ProcessPoolExecutor, job: Callable[[Any], list[dict[str, Any]]], tasks: Sequence[Task], num: int
) -> list[dict[str, Any]]:
    """What ``job`` says of every scene, in order, with a count on the terminal meanwhile."""
    rows: list[dict[str, Any]] = []
    for part in pool.map(job, tasks):
        rows += part
        sys.stderr.write(f"\r{len(rows)} of {num} rendered ")
        sys.stderr.flush()
    sys.stderr.write("\n")
    return rows


def follow(
    *,
    num: int,
    seed: int,
    split: str = "seen",
    model: str | None = None,
    processes: int = 2,
    sampling: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracies, ceilings, distances and times; see the module's text."""
    started = time.perf_counter()
    chunks = chunks_of(num)
    settings = tuple(sorted((sampling or {}).items()))
    tasks = [Task(model=model, split=split, seed=seed, indices=chunk, sampling=settings) for chunk in chunks]
    others = [(split, seed + 1_000_000 * (1 + number), chunk) for number in range(NUM_TRUE_SETS) for chunk in chunks]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        rows = judged_rows(pool, run_task, tasks, num)
        true = np.concatenate(list(map(np.asarray, pool.map(_true_features, others))))
    result = _summary(rows, np.split(true, NUM_TRUE_SETS))
    result |= {
        "n": num, "seed": seed, "split": split, "model": model or "bundled", "sampling": sampling or {},
        "wall_s": time.perf_counter() - started, "rows": rows,
    }  # fmt: skip
    return result


def _summary(rows: Sequence[dict[str, Any]], true_sets: Sequence[np.ndarray]) -> dict[str, Any]:
    num = len(rows)
    result: dict[str, Any] = {}
    for source, prefix in (("seen", ""), ("ceiling", "ceiling_")):
        for name in detect.JUDGED:
            result[prefix + name] = sum(row[source][name] == row["wanted"][name] for row in rows) / num
        result[f"{prefix}all_correct"] = sum(row[source] == row["wanted"] for row in rows) / num
    shift = max(1, num // 2)
    for name in detect.JUDGED:
        result[f"chance_{name}"] = (
            sum(rows[i]["seen"][name] == rows[(i + shift) % num]["wanted"][name] for i in range(num)) / num
        )
    result["interval_95"] = {name: wilson(result[name], num) for name in (*detect.JUDGED, "all_correct")}
    result["psnr_db"] = float(np.mean([row["psnr_db"] for row in rows]))
    if num > NUM_FEATURES:
        result |= distances(np.asarray([row["features"] for row in rows]), true_sets)
    result["seconds_per_video"] = float(np.median([row["seconds"] for row in rows]))
    for row in rows:
        del row["features"]
    return result


def wilson(share: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, centre - half), min(1.0, centre + half)


def report(result: dict[str, Any]) -> str:
    """The figures as a table for people."""
    lines = [f"{result['n']} {result['split']} scenes, seed {result['seed']}", ""]
    lines.append(f"{'':12}  {'followed':>8}  {'95 % interval':>15}  {'ceiling':>8}  {'chance':>7}")
    for name in (*detect.JUDGED, "all_correct"):
        low, high = result["interval_95"][name]
        chance = f"{result[f'chance_{name}']:7.1%}" if f"chance_{name}" in result else ""
        lines.append(
            f"{name:12}  {result[name]:8.1%}  {low:6.1%} - {high:6.1%}  {result[f'ceiling_{name}']:8.1%}  {chance}"
        )
    lines += ["", f"codec round trip {result['psnr_db']:.2f} dB"]
    if "frechet_ratio" in result:
        spread = f"{result['frechet_truth_lowest']:.2f} to {result['frechet_truth_highest']:.2f}"
        between = f"between true sets {result['frechet_truth']:.3f} ({spread})"
        lines.append(f"Frechet distance {result['frechet']:.3f}, {between}: ratio {result['frechet_ratio']:.2f}")
    lines.append(f"{result['seconds_per_video']:.1f} s per video on one core, {result['wall_s']:.0f} s in all")
    return "\n".join(lines)


def new_parser(name: str, text: str, *, num: int, help_of_n: str = "scenes to render") -> argparse.ArgumentParser:
    """The command line of the benchmark ``name`` with what all that render scenes have; ``text`` is its module's."""
    parser = argparse.ArgumentParser(prog=f"python -m vidgen.benchmarks.{name}", description=text.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=num, help=help_of_n)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--split", choices=("seen", "heldout"), default="seen")
    parser.add_argument("--model", help="a folder or bundled name (default: the bundled checkpoint)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, dest="num_steps")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--rows", type=Path, help="also write every scene with what was seen to this JSON file")
    return parser


def tell(result: dict[str, Any], arguments: argparse.Namespace, report: Callable[[dict[str, Any]], str]) -> int:
    """Print the figures and write the rows as the command line says; the exit status."""
    rows = result.pop("rows")
    if arguments.rows:
        arguments.rows.write_text(json.dumps(rows, indent=1))
    sys.stdout.write((json.dumps(result, indent=1) if arguments.json else report(result)) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = new_parser("follow", __doc__, num=256)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--sampler")
    arguments = parser.parse_args(argv)
    names = ("cfg", "num_steps", "shift", "sampler")
    sampling = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    result = follow(
        num=arguments.n,
        seed=arguments.seed,
        split=arguments.split,
        model=arguments.model,
        processes=arguments.processes,
        sampling=sampling,
    )
    return tell(result, arguments, report)


if __name__ == "__main__":
    sys.exit(main())
