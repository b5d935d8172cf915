"""What each step cache skips, saves and costs, against the same runs without one.

For every prompt the same seed is sampled with every step and with each method at each quality. "skipped" is counted at
the network itself: of all its forwards, how many did not run the last block. CPU seconds are those of sampling alone.
The error is the PSNR to the run with every step, of latents (peak: their range) and of the decoded video (peak 2, as
pixels lie in [-1, 1]). Beside it: as many fewer steps as a cache skips, without a cache, since that is what a cache has
to beat.

    python -m vidgen.benchmarks.caching --json benchmarks/results/caching.json --curve magcache.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from .full_size import commit, tell
from .render import machine

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.bundle import Bundle
    from ..vidgen_core.generate import Sampling
    from ..vidgen_core.model import VideoModel
    from ..vidgen_core.types import Conditioning

PROMPTS = (
    "a red star spins on a blue background",
    "a large green circle moves left on a yellow background",
    "a small white square moves up on a black background",
    "a blue heart grows on an orange background",
)


@dataclass(slots=True)
class Count:
    """Forwards of a network, and those of them that ran its last block."""

    forwards: int = 0
    ran: int = 0

    @property
    def skipped(self) -> float:
        """As a share."""
        return 1 - self.ran / max(1, self.forwards)


@contextmanager
def counted(model: VideoModel) -> Iterator[Count]:
    """Counts while the ``with`` block runs; of the last block a layer inside, which no skipped forward reaches."""
    from torch import nn

    count = Count()

    def forward(*_: object) -> None:
        count.forwards += 1

    def ran(*_: object) -> None:
        count.ran += 1

    last = model.network.get_submodule(model.block_paths[-1])
    layer = next(module for module in last.modules() if isinstance(module, nn.Linear))
    hooks = model.network.register_forward_pre_hook(forward), layer.register_forward_pre_hook(ran)
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, slots=True)
class Run:
    latents: Tensor
    video: Tensor
    skipped: float
    """of the forwards"""
    cpu_s: float


class Bench:
    """One bundle, and how it samples."""

    def __init__(self, bundle: Bundle, settings: Sampling) -> None:
        from ..vidgen_core.generate import encode_prompts

        self.bundle, self.model = bundle, bundle.model
        self.settings = settings.resolved(bundle.model.defaults)
        self.shape = (1, *bundle.default_shape.latent_shape(bundle.codec.grid))
        assert self.settings.negative_prompt is not None
        self.negative = encode_prompts(bundle.text, self.model, [self.settings.negative_prompt])

    def encode(self, prompt: str) -> Conditioning:
        from ..vidgen_core.generate import encode_prompts

        return encode_prompts(self.bundle.text, self.model, [prompt])

    def run(self, model: VideoModel, cond: Conditioning, **changes: Any) -> Run:
        from ..vidgen_core.generate import decode_latents, sample_latents

        settings = replace(self.settings, **changes)
        with counted(model) as count:
            begun = time.process_time()
            latents = sample_latents(model, cond, self.negative, self.shape, settings)
            cpu_s = time.process_time() - begun
        video = decode_latents(self.bundle.codec, latents, threads=1)
        return Run(latents, video, count.skipped, cpu_s)


def psnr_db(found: Tensor, expected: Tensor, peak: float) -> float:
    error = float((found - expected).double().square().mean())
    return 10 * math.log10(peak**2 / max(error, 1e-20))


def measure(model: str | None, prompts: Sequence[str], settings: Sampling, curve_file: Path | None) -> dict[str, Any]:
    """The whole report."""
    from ..vidgen_core.caching import METHODS, QUALITIES, StepCache
    from ..vidgen_core.generate import load_bundle, measure_curve
    from ..vidgen_core.tricks import Tricks

    bench = Bench(load_bundle(model), settings)
    conds = [bench.encode(prompt) for prompt in prompts]
    curve = measure_curve(bench.model, conds[0], bench.negative, bench.shape, bench.settings)
    if curve_file is not None:
        curve_file.write_text(curve.to_json() + "\n", encoding="utf-8")
    before = [bench.run(bench.model, cond) for cond in conds]

    def row(name: str, quality: str, run: Callable[[Conditioning], Run]) -> dict[str, Any]:
        runs = [run(cond) for cond in conds]
        videos = [psnr_db(found.video, off.video, 2.0) for found, off in zip(runs, before, strict=True)]
        latents = [
            psnr_db(found.latents, off.latents, float(off.latents.max() - off.latents.min()))
            for found, off in zip(runs, before, strict=True)
        ]
        return {
            "method": name,
            "quality": quality,
            "skipped": round(mean(found.skipped for found in runs), 3),
            "cpu_s": round(mean(found.cpu_s for found in runs), 3),
            "video_psnr_db": round(mean(videos), 1),
            "video_psnr_worst_db": round(min(videos), 1),
            "latents_psnr_db": round(mean(latents), 1),
        }

    rows = []
    for method in METHODS:
        for quality in QUALITIES[1:]:
            cache = StepCache.preset(method, quality, curve=curve)
            cached = bench.model.with_tricks(Tricks(cache=cache))
            rows.append(row(method, quality, lambda cond, cached=cached: bench.run(cached, cond)))
    num_steps = bench.settings.num_steps
    assert num_steps is not None
    for left in sorted({round(num_steps * (1 - done["skipped"])) for done in rows}, reverse=True):
        fewer = row("fewer steps", str(left), lambda cond, left=left: bench.run(bench.model, cond, num_steps=left))
        rows.append(fewer | {"skipped": round(1 - left / num_steps, 3)})
    after = [bench.run(bench.model, cond) for cond in conds]
    off_s = mean(done.cpu_s for done in (*before, *after))
    for done in rows:
        done["forwards_ratio"] = round(1 / (1 - done["skipped"]), 2)
        done["cpu_ratio"] = round(off_s / done["cpu_s"], 2)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "checkpoint": bench.model.fingerprint,
        "shape": list(bench.shape),
        "settings": {key: value for key, value in asdict(bench.settings).items() if value is not None},
        "prompts": list(prompts),
        "off_cpu_s": {"before": mean(d.cpu_s for d in before), "after": mean(d.cpu_s for d in after)},
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = ["| method | quality | forwards skipped | CPU, times faster | PSNR of the video | worst | of latents |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        quality = f"{row['quality']} steps" if row["method"] == "fewer steps" else row["quality"]
        lines.append(
            f"| {row['method']} | {quality} | {100 * row['skipped']:.0f} % | {row['cpu_ratio']:.2f} | "
            f"{row['video_psnr_db']:.1f} dB | {row['video_psnr_worst_db']:.1f} dB | {row['latents_psnr_db']:.1f} dB |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.caching", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", help="a bundled name or a folder; the first bundled model by default")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of {len(PROMPTS)}")
    parser.add_argument("--steps", type=int, help="the checkpoint's by default")
    parser.add_argument("--cfg", type=float, help="the checkpoint's by default")
    parser.add_argument("--sequential", action="store_true", help="with and without the prompt one after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="write MagCache's curve of the model here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)

    def measured() -> dict[str, Any]:
        from ..vidgen_core.generate import Sampling

        settings = Sampling(
            num_steps=arguments.steps,
            cfg=arguments.cfg,
            seed=arguments.seed,
            cfg_batched=not arguments.sequential,
        )
        report = measure(arguments.model, PROMPTS[: arguments.prompts], settings, arguments.curve)
        print(table(report))
        return report

    tell(measured, arguments.json)


if __name__ == "__main__":
    main()
