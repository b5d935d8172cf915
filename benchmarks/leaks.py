"""Does memory come back, and is a stop heard at once? Many renders, many stops at any point, and resident memory.

One process renders and saves a tiny video again and again, then starts as many renders that are stopped, each at
another of the moments at which the program asks whether to stop. After a warm-up, resident memory must not grow. With
``--gaps`` the longest time between two of those moments is measured in a network of half a GB and in a VAE, for a
step of many seconds: nobody who stops waits longer.

    python -m vidgen.benchmarks.leaks --renders 50 --cancels 50 --gaps --json benchmarks/results/leaks.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import Cancelled
from ..vidgen_core.memory.host import LocalHost
from .full_size import commit
from .render import MIB, machine, status_bytes

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = "a red star spins on a blue background"
FRAMES, SIDE_PX, NUM_STEPS = 5, 32, 2
WARM_UP = 5
"""renders and stops before the measurement: the first ones fill caches that stay"""
BAR = 0.02
"""resident memory may grow by this share"""


def resident_bytes() -> int:
    """Resident memory of this process; what the allocator keeps for later is given back first, where it can be."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return status_bytes("self", "VmRSS")


@dataclass(slots=True, kw_only=True)
class CountingHost(LocalHost):
    """Counts the questions whether to stop, times the gaps between them, and stops at one of them."""

    stop_at: int | None = None
    asked: int = 0
    longest_s: float = 0.0
    longest_cpu_s: float = 0.0
    """in seconds of this process's own CPU time: what it would be on a machine with nothing else to do"""
    _wall: float = 0.0
    _cpu: float = 0.0

    def start(self) -> CountingHost:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def check_cancelled(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.longest_s = max(self.longest_s, wall - self._wall)
        self.longest_cpu_s = max(self.longest_cpu_s, cpu - self._cpu)
        self.asked += 1
        if self.asked == self.stop_at:
            raise Cancelled
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def render(host: LocalHost, model: str | None, folder: Path, seed: int) -> None:
    """Load, read the prompt, sample, decode and save: everything that a user may stop."""
    from ..vidgen_core.generate import Sampling, generate, load_bundle
    from ..vidgen_core.media import images_to_frames, video_to_images, write_video
    from ..vidgen_core.memory.cancel import listening
    from ..vidgen_core.types import VideoShape

    bundle = load_bundle(model, device="cpu", host=host)
    shape = VideoShape(num_frames=FRAMES, height_px=SIDE_PX, width_px=SIDE_PX)
    video = generate(bundle, PROMPT, shape, Sampling(num_steps=NUM_STEPS, seed=seed), host=host)
    with listening(host):
        write_video(folder / "a.mp4", images_to_frames(video_to_images(video)), fps=8)


def stopped(host: CountingHost, model: str | None, folder: Path, seed: int) -> bool:
    """A render that ``host`` stops; whether it did."""
    try:
        render(host.start(), model, folder, seed)
    except Cancelled:
        return True
    return False


def measure(num_renders: int, num_cancels: int, model: str | None) -> dict[str, Any]:
    """Resident memory after each render and each stop."""
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = CountingHost()
        for seed in range(WARM_UP):
            whole = CountingHost().start()
            render(whole, model, folder, seed)
            stopped(CountingHost(stop_at=1 + whole.asked * seed // WARM_UP), model, folder, seed)
        start = resident_bytes()
        report["questions_per_render"] = whole.asked
        report["longest_gap_s"] = whole.longest_s
        report["longest_gap_cpu_s"] = whole.longest_cpu_s
        for what, number in (("renders", num_renders), ("cancels", num_cancels)):
            after, count = [], 0
            for index in range(number):
                if what == "renders":
                    render(LocalHost(), model, folder, index)
                    count += 1
                else:
                    at = 1 + index * whole.asked // number
                    count += stopped(CountingHost(stop_at=at), model, folder, index)
                after.append(resident_bytes())
            growth = (after[-1] - start) / start if after and start else 0.0
            report[what] = {
                "count": count,
                "start_mib": round(start / MIB, 2),
                "end_mib": round((after[-1] if after else start) / MIB, 2),
                "highest_mib": round(max(after, default=start) / MIB, 2),
                "growth": round(growth, 5),
                "after_each_mib": [round(value / MIB, 2) for value in after],
            }
        report["files_left"] = sorted(path.name for path in folder.iterdir())
    report["passes"] = all(report[what]["growth"] < BAR for what in ("renders", "cancels"))
    return report


# ---------------------------------------------------------------------------------------------
# how long until a stop is heard


def gap_of(work: Callable[[], Tensor], module: object) -> dict[str, float]:
    """The longest time between two questions while ``work`` runs ``module``, and what a stop half-way leaves."""
    import torch

    from ..vidgen_core.memory.cancel import watched

    host = CountingHost(run_on="cpu")
    with torch.inference_mode(), watched(host, module):
        before, cpu = time.perf_counter(), time.process_time()
        host.start()
        work()
        host.stop_at = None
        host.check_cancelled()
        seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    start = resident_bytes()
    half = CountingHost(run_on="cpu", stop_at=max(1, host.asked // 2))
    was_stopped = False
    try:
        with torch.inference_mode(), watched(half.start(), module):
            work()
    except Cancelled:
        was_stopped = True
    return {
        "seconds": round(seconds, 3),
        "cpu_s": round(cpu, 3),
        "questions": host.asked,
        "longest_gap_s": round(host.longest_s, 3),
        "longest_gap_cpu_s": round(host.longest_cpu_s, 3),
        "stopped_half_way": float(was_stopped),
        "left_behind_mib": round((resident_bytes() - start) / MIB, 2),
    }


def network_gap(side_latents: int) -> dict[str, float]:
    """One forward of a network of 138 M parameters on 5 frames of ``side_latents`` squared."""
    import torch

    from ..vidgen_core.families.hunyuan.config import NetworkConfig
    from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer

    config = NetworkConfig(
        hidden_size=1024,
        num_heads=8,
        num_double_blocks=2,
        num_single_blocks=4,
        num_refiner_blocks=1,
        rope_axes=(16, 56, 56),
        text_width=64,
        pooled_width=64,
        guidance_embed=False,
    )
    network = HunyuanVideoTransformer(config).eval()
    x = torch.randn(1, config.in_channels, 5, side_latents, side_latents)
    inputs = (x, torch.tensor([500.0]), torch.randn(1, 32, 64), None, torch.randn(1, 64))
    return gap_of(lambda: network(*inputs), network)


def vae_gaps(side_latents: int) -> dict[str, dict[str, float]]:
    """With the published VAE's sizes: 5 frames are decoded, and 17 encoded, as a layer may take all frames at once."""
    import torch

    from ..vidgen_core.families.hunyuan.codec import HunyuanCodec
    from ..vidgen_core.families.hunyuan.config import CodecConfig
    from ..vidgen_core.families.hunyuan.vae import CausalVAE

    codec = HunyuanCodec(CausalVAE(CodecConfig()).eval())
    latents = torch.randn(1, 16, 2, side_latents, side_latents)
    video = torch.rand(1, 3, 17, 8 * side_latents, 8 * side_latents) * 2 - 1
    return {
        "vae": gap_of(lambda: codec.decode(latents), codec),
        "vae_encode": gap_of(lambda: codec.encode(video), codec),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for what in ("renders", "cancels"):
        row = report[what]
        lines.append(
            f"{row['count']:>4} {what}: {row['start_mib']:.1f} -> {row['end_mib']:.1f} MiB resident, "
            f"{100 * row['growth']:+.2f} % (bar {100 * BAR:.0f} %)"
        )
    lines.append(f"questions per render: {report['questions_per_render']}")
    for part, row in report.get("gaps", {}).items():
        lines.append(
            f"{part}: {row['cpu_s']:.1f} s of CPU, longest gap {row['longest_gap_cpu_s']:.2f} s of CPU "
            f"({row['longest_gap_s']:.2f} s by the clock), {row['left_behind_mib']:+.1f} MiB after a stop"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vidgen.benchmarks.leaks", description=__doc__.splitlines()[0])
    parser.add_argument("--renders", type=int, default=50, help="videos that are made (default 50)")
    parser.add_argument("--cancels", type=int, default=50, help="videos that are stopped (default 50)")
    parser.add_argument("--model", help="a bundled name or a folder; the first bundled model by default")
    parser.add_argument("--gaps", action="store_true", help="measure the longest time between two questions, too")
    parser.add_argument("--side", type=int, default=28, help="latents along a side for the network of --gaps")
    parser.add_argument("--tile", type=int, default=16, help="latents along a side for the VAE of --gaps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 if memory came back, else 1."""
    import torch

    arguments = parse(argv)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    report |= measure(arguments.renders, arguments.cancels, arguments.model)
    if arguments.gaps:
        report["gaps"] = {"network": network_gap(arguments.side), **vae_gaps(arguments.tile)}
    print(table(report))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written to {arguments.json}")
    return 0 if report["passes"] else 1


if __name__ == "__main__":
    sys.exit(main())
