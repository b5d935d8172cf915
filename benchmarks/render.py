"""Seconds and memory of the default render, by phase: what someone waits for who types one sentence.

Every run is a fresh process, so that imports, loading and the first use of each kernel are counted as a user meets
them. The phases are those that :func:`vidgen_core.generate.generate` itself reports to its host; nothing of the main
path is repeated here.

    python -m vidgen.benchmarks.render --runs 3 --json benchmarks/results/render.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = "a red star spins on a blue background"
PHASES = ("import", "load", "text", "sample", "decode", "encode file")
AFTER_LOAD = ("text", "sample", "decode", "encode file")
MIB = 1024 * 1024


# ---------------------------------------------------------------------------------------------
# memory, as the kernel counts it


def status_bytes(pid: int | str, key: str) -> int:
    """A size from Linux' /proc/PID/status; 0 when the process is gone or the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line for line in lines if line.startswith(key + ":")]
    return int(found[0].split()[1]) * 1024 if found else 0


def peak_bytes() -> int:
    """Peak resident memory of this process since :func:`forget_peak`; since its start where there is no /proc."""
    peak = status_bytes("self", "VmHWM")
    if peak or sys.platform == "win32":
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Start the peak anew from what is resident now (Linux only; elsewhere peaks only grow)."""
    path = Path("/proc/self/clear_refs")
    if path.exists() and os.access(path, os.W_OK):
        path.write_text("5")


def children_bytes() -> int:
    """Peak resident memory of the child processes that live now (ffmpeg), added up."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = {pid for path in lists for pid in path.read_text().split()}
    return sum(status_bytes(pid, "VmHWM") for pid in pids)


# ---------------------------------------------------------------------------------------------
# one run


@dataclass(slots=True)
class Meter:
    """Cuts a run into phases: each call of :meth:`close` ends one."""

    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    """bytes, of this process"""
    since: float = field(default_factory=time.perf_counter)

    def close(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.peak[phase] = max(self.peak.get(phase, 0), peak_bytes())
        forget_peak()
        self.since = time.perf_counter()

    def on_progress(self, what: str, done: int, total: int) -> None:
        """Told by ``generate``: the end of ``encode`` closes the text, the start of ``decode`` closes sampling."""
        if what == "encode" and done == total:
            self.close("text")
        elif what == "decode" and done == 0:
            self.close("sample")
        elif what == "decode" and done == total:
            self.close("decode")


@contextmanager
def watched(reading: Callable[[], int]) -> Iterator[list[int]]:
    """A list whose only number is the largest reading that was seen meanwhile."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen[0] = max(seen[0], reading())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def measure(prompt: str, model: str | None, seed: int, threads: int | None) -> dict[str, Any]:
    """Render once in this process; seconds and peak bytes by phase, and what was rendered."""
    meter = Meter()
    import torch

    from ..vidgen_core.generate import Sampling, generate, load_bundle
    from ..vidgen_core.media import images_to_frames, video_to_images, write_video
    from ..vidgen_core.memory.host import LocalHost

    if threads is not None:
        torch.set_num_threads(threads)
    meter.close("import")
    host = LocalHost(on_progress=meter.on_progress)
    bundle = load_bundle(model, host=host)
    meter.close("load")
    settings = Sampling(seed=seed).resolved(bundle.model.defaults)
    video = generate(bundle, prompt, settings=settings, host=host)
    with tempfile.TemporaryDirectory() as folder, watched(children_bytes) as ffmpeg:
        frames = images_to_frames(video_to_images(video))
        path = write_video(Path(folder) / "out.mp4", frames, fps=bundle.model.defaults.fps)
        num_bytes = path.stat().st_size
    meter.close("encode file")
    return {
        "seconds": meter.seconds,
        "peak_bytes": meter.peak,
        "ffmpeg_peak_bytes": ffmpeg[0],
        "video": {"shape": list(video.shape), "fps": bundle.model.defaults.fps, "file_bytes": num_bytes},
        "settings": {key: value for key, value in asdict(settings).items() if value is not None},
        "checkpoint": {part: header.digest for part, header in bundle.headers.items()},
        "device": str(host.device()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------------------------------------
# several runs, and what they say together


def run_fresh(arguments: argparse.Namespace) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--once", "--prompt", arguments.prompt]
    command += ["--seed", str(arguments.seed)]
    command += [] if arguments.model is None else ["--model", arguments.model]
    command += [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the runs for seconds, the worst run for memory."""
    summary = {f"{phase}_s": median(run["seconds"][phase] for run in runs) for phase in PHASES}
    summary["after_load_s"] = median(sum(run["seconds"][phase] for phase in AFTER_LOAD) for run in runs)
    summary["total_s"] = median(sum(run["seconds"].values()) for run in runs)
    summary["peak_mib"] = max(max(run["peak_bytes"].values()) for run in runs) / MIB
    summary["ffmpeg_peak_mib"] = max(run["ffmpeg_peak_bytes"] for run in runs) / MIB
    return {key.replace(" ", "_"): round(value, 3) for key, value in summary.items()}


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and how busy it was."""
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model n")]
        if cpuinfo.exists()
        else []
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "system": platform.platform(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": load,
    }


def table(runs: list[dict[str, Any]], summary: dict[str, float]) -> str:
    """The report for people."""
    lines = [f"{'phase':<14}{'seconds':>9}{'peak MiB':>10}"]
    for phase in PHASES:
        peak = max(run["peak_bytes"][phase] for run in runs) / MIB
        lines.append(f"{phase:<14}{summary[phase.replace(' ', '_') + '_s']:>9.2f}{peak:>10.0f}")
    lines.append(f"{'after load':<14}{summary['after_load_s']:>9.2f}")
    lines.append(f"{'in all':<14}{summary['total_s']:>9.2f}{summary['peak_mib']:>10.0f}")
    lines.append(f"ffmpeg beside it: {summary['ffmpeg_peak_mib']:.0f} MiB")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vidgen.benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="fresh processes; medians are reported (default 3)")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--model", help="a bundled name or a folder; the first bundled model by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.once:
        print(json.dumps(measure(arguments.prompt, arguments.model, arguments.seed, arguments.threads)))
        return
    report: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine()}
    runs = [run_fresh(arguments) for _ in range(max(1, arguments.runs))]
    summary = summarise(runs)
    print(table(runs, summary))
    if arguments.json is not None:
        report |= {"prompt": arguments.prompt, "summary": summary, "runs": runs}
        arguments.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
