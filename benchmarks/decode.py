"""Exact coding within a bound against one pass and against blended tiles: memory, time and error of each.

HunyuanVideo's VAE at a quarter of its width with random weights, float32, one thread. Every measurement is a process
of its own; its memory is the peak above what was resident when the weights were there, its time that of the CPU, so
that other work on the machine counts little. The ways alternate within a round.

    python -m vidgen.benchmarks.decode --json benchmarks/results/decode.json

``--add`` goes on with a file of figures, e.g. with one case at a time on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .full_size import commit
from .render import forget_peak, machine, peak_bytes, status_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.codec import Codec
    from ..vidgen_core.families.hunyuan.codec import HunyuanCodec
    from ..vidgen_core.types import VideoShape

CASES = ("decode:33x320x448", "decode:65x240x320", "encode:33x320x448", "encode:65x240x320")
LIMITED_CASE = "decode:17x160x224"
WAYS = ("one_pass", "memory", "disk", "tiles", "layers")
"""one pass as it is; exact in memory; exact with a file; blended tiles; one pass with whole tensors in every layer"""
SHARE = {"memory": 0.25, "disk": 0.10}
"""of the peak of one pass that the exact ways are allowed"""
MARGIN = 0.97
"""of that share, as the bound that is given"""
MAX_ERROR = 1e-4
MAX_CPU_RATIO = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One measurement."""

    case: str
    way: str
    budget_bytes: int = 0
    reference: str = ""
    """file of what one pass gives: written by one pass, compared with by the others"""
    limit_bytes: int = 0
    """what the process may allocate beyond the weights, as the kernel enforces it; 0: no limit"""

    @property
    def direction(self) -> str:
        return self.case.partition(":")[0]

    @property
    def shape(self) -> VideoShape:
        from ..vidgen_core.types import VideoShape

        frames, height, width = map(int, self.case.partition(":")[2].split("x"))
        return VideoShape(num_frames=frames, height_px=height, width_px=width)


# ---------------------------------------------------------------------------------------------
# one measurement


def build() -> HunyuanCodec:
    """The codec of every measurement."""
    import torch

    from ..vidgen_core.families.hunyuan.codec import HunyuanCodec
    from ..vidgen_core.families.hunyuan.config import CodecConfig
    from ..vidgen_core.families.hunyuan.vae import CausalVAE

    torch.manual_seed(0)
    return HunyuanCodec(CausalVAE(CodecConfig(block_channels=(32, 64, 128, 128), num_groups=8)).eval())


def given(task: Task) -> Tensor:
    """Smooth random latents or frames: noise, a little of which is shared by neighbours."""
    import torch
    import torch.nn.functional as F

    grid = build_grid()
    shape = task.shape
    size = shape.latent_shape(grid) if task.direction == "decode" else (3, *asdict(shape).values())
    generator = torch.Generator().manual_seed(1)
    coarse = [max(1, -(-side // 4)) for side in size[1:]]
    smooth = F.interpolate(torch.randn(1, size[0], *coarse, generator=generator), size[1:], mode="trilinear")
    fine = torch.randn(1, *size, generator=generator)
    both = 0.8 * smooth + 0.6 * fine
    return both if task.direction == "decode" else both.mul_(0.5).clamp_(-1, 1)


def build_grid() -> Any:
    """Pixels and frames per latent of :func:`build`."""
    from ..vidgen_core.types import Grid

    return Grid(channels=16, spatial=8, temporal=4)


def way_of(codec: HunyuanCodec, task: Task, folder: Path) -> Codec:
    """The codec that works in the way of the task."""
    from ..vidgen_core.bounded import exact
    from ..vidgen_core.families.hunyuan import vae
    from ..vidgen_core.nn import convolution
    from ..vidgen_core.tiling import tiled

    if task.way == "tiles":
        return tiled(codec)
    if task.way in SHARE:
        return exact(codec, task.budget_bytes, spill=folder if task.way == "disk" else None)
    if task.way == "layers":
        vae.PART_BYTES = vae.PART_OPERATIONS = convolution.PART_OPERATIONS = 1 << 62
    return codec


def measure(task: Task) -> dict[str, Any]:
    """Peak, CPU time and error in this process."""
    import torch

    torch.set_num_threads(1)
    codec = build()
    x = given(task)
    result: dict[str, Any] = {"case": task.case, "way": task.way, "budget_bytes": task.budget_bytes}
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        codec.decode(torch.zeros(1, 16, 1, 4, 4))  # libraries are loaded and their buffers are made
        way = way_of(codec, task, Path(folder))
        if task.way in SHARE:
            result |= _planned(codec, task)
        if task.limit_bytes:
            _limit(task.limit_bytes)
        forget_peak()
        before, started, started_cpu = status_bytes("self", "VmRSS"), time.perf_counter(), time.process_time()
        try:
            out = way.decode(x) if task.direction == "decode" else torch.cat(way.moments(x), dim=1)
        except (MemoryError, RuntimeError) as error:
            if not task.limit_bytes:
                raise
            return result | {"failed": type(error).__name__}
        result |= {
            "cpu_s": round(time.process_time() - started_cpu, 3),
            "wall_s": round(time.perf_counter() - started, 3),
            "peak_bytes": max(0, peak_bytes() - before),
        }
    return result | compare(out, task)


def _planned(codec: HunyuanCodec, task: Task) -> dict[str, Any]:
    from ..vidgen_core.bounded import plan

    direction = "decode" if task.direction == "decode" else "encode"
    planned = plan(codec, direction, task.shape, task.budget_bytes, spills=task.way == "disk")
    return {
        "planned_peak_bytes": planned.peak_bytes,
        "planned_spilled_bytes": planned.spilled_bytes,
        "relative_multiplications": round(planned.relative_cost, 3),
    }


def _limit(num_bytes: int) -> None:
    """Let the kernel refuse allocations beyond ``num_bytes`` more than what there is now (Linux)."""
    import resource

    most = status_bytes("self", "VmData") + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def compare(out: Tensor, task: Task) -> dict[str, Any]:
    """Errors against one pass, whose own result goes to the file."""
    import numpy as np

    reference = Path(task.reference)
    if task.way == "one_pass" and not task.limit_bytes:
        np.save(reference, out.numpy())
        return {"deviation": float(out.std())}
    whole = np.load(reference, mmap_mode="r")
    apart = np.abs(out.numpy() - whole)
    root = float(np.sqrt(np.mean(np.square(apart, dtype=np.float64))))
    spread = float(whole.max() - whole.min())
    return {
        "max_abs_error": float(apart.max()),
        "rms_error": root,
        "psnr_db": round(20 * float(np.log10(spread / root)), 2) if root else None,
    }


def measure_fresh(task: Task) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--once", json.dumps(asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------
# all of them, and what they say together


def rounds(cases: Sequence[str], ways: Sequence[str], num_runs: int, folder: Path, report: Report) -> None:
    """``num_runs`` times every way of every case, one way after the other."""
    for case in cases:
        for _ in range(num_runs):
            for way in ways:
                reference = str(folder / f"{case.replace(':', '_')}.npy")
                budget = int(report.one_pass_peak(case) * SHARE[way] * MARGIN) if way in SHARE else 0
                report.add(measure_fresh(Task(case=case, way=way, budget_bytes=budget, reference=reference)))


def limited(folder: Path, report: Report) -> None:
    """A process that may not allocate what one pass needs: one pass fails, the exact way gives the same."""
    reference = str(folder / "limited.npy")
    whole = measure_fresh(Task(case=LIMITED_CASE, way="one_pass", reference=reference))
    limit = whole["peak_bytes"] // 2
    for way, budget in (("one_pass", 0), ("disk", limit // 2)):
        task = Task(case=LIMITED_CASE, way=way, budget_bytes=budget, reference=reference, limit_bytes=limit)
        report.add_limited({**measure_fresh(task), "limit_bytes": limit, "one_pass_bytes": whole["peak_bytes"]})


class Report:
    """All measurements so far, written after each."""

    def __init__(self, path: Path | None, *, adds: bool) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "summary": {},
            "limited": [],
            "measurements": [],
        }
        if adds and path is not None and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            self.content |= {key: old[key] for key in ("limited", "measurements")}

    def add(self, measured: dict[str, Any]) -> None:
        self.content["measurements"].append(measured)
        print(json.dumps(measured), flush=True)
        self._write()

    def add_limited(self, measured: dict[str, Any]) -> None:
        self.content["limited"].append(measured)
        print(json.dumps(measured), flush=True)
        self._write()

    def one_pass_peak(self, case: str) -> int:
        found = [one["peak_bytes"] for one in self._of(case, "one_pass")]
        if not found:
            raise SystemExit(f"{case}: one_pass is measured first; the bounds are shares of its peak")
        return int(median(found))

    def _of(self, case: str, way: str) -> list[dict[str, Any]]:
        return [one for one in self.content["measurements"] if (one["case"], one["way"]) == (case, way)]

    def _write(self) -> None:
        cases = dict.fromkeys(one["case"] for one in self.content["measurements"])
        self.content["summary"] = {case: self._summary(case) for case in cases if self._of(case, "one_pass")}
        if self.path is not None:
            self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def _summary(self, case: str) -> dict[str, Any]:
        """Of each way, medians against one pass, and whether the bars are kept."""
        summary: dict[str, Any] = {}
        base_peak = self.one_pass_peak(case)
        base_cpu = median(one["cpu_s"] for one in self._of(case, "one_pass"))
        tiles = [one["cpu_s"] for one in self._of(case, "tiles")]
        for way in WAYS:
            found = self._of(case, way)
            if not found:
                continue
            peak, cpu = median(one["peak_bytes"] for one in found), median(one["cpu_s"] for one in found)
            summary[way] = {
                "peak_mb": round(peak / 1e6, 1),
                "peak_ratio": round(peak / base_peak, 3),
                "cpu_s": round(cpu, 2),
                "cpu_ratio": round(cpu / base_cpu, 3),
            }
            if way == "one_pass":
                continue
            error = max(one["max_abs_error"] for one in found)
            summary[way] |= {"max_abs_error": error, "psnr_db": min(one["psnr_db"] or 999.0 for one in found)}
            if way in SHARE:
                summary[way] |= {
                    "planned_peak_mb": round(found[-1]["planned_peak_bytes"] / 1e6, 1),
                    "bar_kept": {
                        "error": error <= MAX_ERROR,
                        "peak": peak <= SHARE[way] * base_peak,
                        "cpu": cpu <= MAX_CPU_RATIO * base_cpu,
                        "cpu_below_tiles": cpu < median(tiles) if tiles else None,
                    },
                }
        return summary


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.decode", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--case", action="append", metavar="DIRECTION:TxHxW", help="may be given several times")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be given several times; all by default")
    parser.add_argument("--runs", type=int, default=1, help="rounds; medians are reported (default 1)")
    parser.add_argument("--folder", type=Path, help="where results of one pass lie meanwhile; a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--add", action="store_true", help="to those that FILE has")
    parser.add_argument("--limited", action="store_true", help="only the case that does not fit into one pass")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.once is not None:
        print(json.dumps(measure(Task(**json.loads(arguments.once)))))
        return
    report = Report(arguments.json, adds=arguments.add)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not arguments.limited:
            rounds(arguments.case or CASES, arguments.way or WAYS, max(1, arguments.runs), folder, report)
        if arguments.limited or not (arguments.case or arguments.way):
            limited(folder, report)
    print(json.dumps(report.content["summary"], indent=1))


if __name__ == "__main__":
    main()
