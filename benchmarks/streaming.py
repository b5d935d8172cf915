"""Does a network that is larger than the memory render? Peak memory of a whole render under a budget.

A checkpoint of about 2 GB in bfloat16 with random weights is written to a temporary folder (deleted afterwards), and
``vidgen generate --budget`` makes a small video with it in a process of its own. With ``--compare`` the same video is
made with everything in memory, to see that it is the same to the bit. ``--profile DIR`` draws when blocks are brought
and when they run: reading and running on a CPU, copies and kernels on a GPU.

    python -m vidgen.benchmarks.streaming --json benchmarks/results/streaming.json
    python -m vidgen.benchmarks.streaming --profile pictures
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..vidgen_core.errors import UserError
from .full_size import commit, tell, write_random
from .render import machine, peak_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..vidgen_core.families.hunyuan.config import NetworkConfig
    from ..vidgen_core.model import VideoModel

BUDGET = "700MB"
PROMPT = "a red star"
PICTURE = "overlap.png"


class Span(NamedTuple):
    """A piece of work on a time line."""

    lane: str
    """"bring", "wait" or "run" """
    start_s: float
    end_s: float


# ---------------------------------------------------------------------------------------------
# the model


def network_config(num_double: int = 40, num_single: int = 66) -> NetworkConfig:
    """A HunyuanVideo of a billion weights: 2 GB in bfloat16, in blocks of 30 and 12 MB."""
    from ..vidgen_core.families.hunyuan.config import NetworkConfig

    return NetworkConfig(
        hidden_size=640,
        num_heads=10,
        num_double_blocks=num_double,
        num_single_blocks=num_single,
        rope_axes=(16, 24, 24),
        text_width=32,
        pooled_width=32,
        guidance_embed=False,
    )


def write_model(folder: Path, config: NetworkConfig) -> int:
    """A folder with the network in random bfloat16 weights, a tiny VAE and tiny text encoders; the network's bytes."""
    import torch

    from ..training.export import FILES, export_bundle
    from ..training.text import caption_tokenizer, tiny_text_config
    from ..vidgen_core.families.hunyuan.config import CodecConfig
    from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
    from ..vidgen_core.families.hunyuan.text import TextStack
    from ..vidgen_core.families.hunyuan.vae import CausalVAE
    from ..vidgen_core.types import Defaults
    from ..vidgen_core.weights.config import config_to_json
    from ..vidgen_core.weights.header import read_header

    torch.manual_seed(0)
    codec = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
    defaults = Defaults(num_frames=5, height_px=64, width_px=64, fps=8, num_steps=2, shift=1.0, cfg=1.0)
    with torch.device("meta"):
        weights = HunyuanVideoTransformer(config).state_dict()
    paths = export_bundle(
        folder,
        network=({"none": torch.zeros(1)}, config, defaults),  # for what is said beside the weights
        codec=(CausalVAE(codec), codec),
        text=TextStack(tiny_text_config(width=config.text_width), caption_tokenizer()),
    )
    path = paths["network"]
    metadata = dict(read_header(path).metadata) | {"vidgen.config": config_to_json(config)}
    entries = [(name, tuple(tensor.shape), "BF16") for name, tensor in weights.items()]
    assert path.name == FILES["network"]
    return write_random(path, entries, metadata=metadata)


# ---------------------------------------------------------------------------------------------
# a render


def measure(model: Path, output: Path, budget: str | None, storage: str | None) -> dict[str, Any]:
    """``vidgen generate`` in this process; its seconds, its peak memory, and a hash of the frames."""
    from ..headless.cli import main as vidgen

    command = ["generate", PROMPT, "--model", str(model), "-o", str(output), "--device", "cpu", "-q", "--crf", "0"]
    command += [] if budget is None else ["--budget", budget]
    command += [] if storage is None else ["--storage", storage]
    started = time.perf_counter()
    status = vidgen(command)
    if status:
        raise SystemExit(status)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    from ..vidgen_core.media import read_video

    frames, _ = read_video(output)
    return {
        "command": "vidgen " + " ".join(command[:2] + command[6:]),
        "seconds": round(seconds, 2),
        "peak_rss_bytes": peak,
        "frames": {"shape": list(frames.shape), "sha256": hashlib.sha256(frames.tobytes()).hexdigest()},
    }


def measure_fresh(model: Path, budget: str | None, storage: str | None = None) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="vidgen-streaming-") as folder:
        command = [sys.executable, "-m", __spec__.name, "--once", str(model), "--output", str(Path(folder) / "a.mp4")]
        command += [] if budget is None else ["--budget", budget]
        command += [] if storage is None else ["--storage", storage]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write, render, delete; the whole report."""
    from ..vidgen_core.memory.place import parse_bytes

    budget = parse_bytes(arguments.budget or BUDGET)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "budget_bytes": budget,
    }
    with tempfile.TemporaryDirectory(prefix="vidgen-streaming-", dir=arguments.folder) as place:
        num_bytes = write_model(Path(place), _config(arguments))
        report["network"] = {"bytes": num_bytes, "dtype": "bfloat16"}
        report["render"] = measure_fresh(Path(place), arguments.budget or BUDGET, arguments.storage)
        report["within_budget"] = report["render"]["peak_rss_bytes"] <= budget
        if arguments.compare:
            report["resident"] = measure_fresh(Path(place), None, arguments.storage)
            report["same_frames"] = report["resident"]["frames"] == report["render"]["frames"]
    return report


def _config(arguments: argparse.Namespace) -> NetworkConfig:
    depth = {"num_double": arguments.double, "num_single": arguments.single}
    return network_config(**{name: number for name, number in depth.items() if number is not None})


# ---------------------------------------------------------------------------------------------
# a profile


def profile(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One forward of the streamed network, drawn into ``folder``; how much of the bringing was hidden."""
    import torch

    from ..vidgen_core.memory.host import LocalHost
    from ..vidgen_core.model import load_network
    from ..vidgen_core.types import Conditioning

    folder.mkdir(parents=True, exist_ok=True)
    device = LocalHost(run_on=arguments.device).device()
    with tempfile.TemporaryDirectory(prefix="vidgen-streaming-", dir=arguments.folder) as place:
        write_model(Path(place), _config(arguments))
        model = load_network(Path(place) / "network.safetensors", device=device, stream=True)
        generator = torch.Generator().manual_seed(1)
        cond = Conditioning(
            context=torch.randn(1, 16, model.config.text_width, generator=generator),
            pooled=torch.randn(1, model.config.pooled_width, generator=generator),
        ).to(device)
        side = arguments.side
        noise = torch.randn(1, 16, 2, side, side, generator=generator).to(device)

        def ask() -> None:
            with torch.inference_mode():
                model.predict(noise, torch.tensor(0.8), cond)

        drawn = draw_forward(ask, model, device, folder)
    return {"video_tokens": 2 * side * side // 4, **drawn}


def draw_forward(ask: Callable[[], object], model: VideoModel, device: torch.device, folder: Path) -> dict[str, Any]:
    """Draw what ``ask`` does, which runs a streamed network once, into ``folder``; the sums over its time line."""
    import torch

    ask()  # the first one starts libraries
    spans = gpu_spans(ask, folder) if device.type == "cuda" else cpu_spans(ask, model.network)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    report = {"device": device_name, **overlap(spans)}
    draw(spans, folder / PICTURE, report)
    return report


def cpu_spans(ask: Callable[[], object], network: nn.Module) -> list[Span]:
    """What the stream of a network tells while it is asked once."""
    from ..vidgen_core.memory.stream import stream_of

    spans: list[Span] = []
    stream = stream_of(network)
    assert stream is not None, "the network is streamed"
    stream.watch = lambda what, number, start, end: spans.append(Span("bring" if what == "read" else what, start, end))
    started = time.perf_counter()
    ask()
    stream.watch = None
    return [Span(lane, start - started, end - started) for lane, start, end in spans]


def gpu_spans(ask: Callable[[], object], folder: Path) -> list[Span]:
    """Copies to the GPU and kernels on it, as torch's profiler saw them; its trace goes into ``folder`` as well."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        ask()
        torch.cuda.synchronize()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    return trace_spans(json.loads(trace.read_text("utf-8"))["traceEvents"])


def trace_spans(events: Iterable[Mapping[str, Any]]) -> list[Span]:
    """Spans of a trace's events; times in it are microseconds."""
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]
    begin = min((event["ts"] for event in work), default=0.0)
    spans = []
    for event in work:
        is_copy = event["cat"] == "gpu_memcpy"
        if is_copy and "HtoD" not in event["name"]:
            continue
        start = (event["ts"] - begin) / 1e6
        spans.append(Span("bring" if is_copy else "run", start, start + event["dur"] / 1e6))
    return spans


def overlap(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of bringing, of running, of both at once, and which share of the bringing was hidden; of waiting, where
    somebody told of it: a trace of a GPU does not."""
    parts = {lane: _union([span for span in spans if span.lane == lane]) for lane in ("bring", "run", "wait")}
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in parts["bring"] for b in parts["run"])
    seconds = {lane: sum(end - start for start, end in own) for lane, own in parts.items()}
    return {
        "bring_s": round(seconds["bring"], 4),
        "run_s": round(seconds["run"], 4),
        **({"wait_s": round(seconds["wait"], 4)} if parts["wait"] else {}),
        "both_s": round(both, 4),
        "hidden": round(both / seconds["bring"], 4) if seconds["bring"] else 1.0,
    }


def _union(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """(start, end) of what the spans cover, without counting anything twice."""
    parts: list[tuple[float, float]] = []
    for _, start, end in sorted(spans, key=lambda span: span.start_s):
        if parts and start <= parts[-1][1]:
            parts[-1] = parts[-1][0], max(parts[-1][1], end)
        else:
            parts.append((start, end))
    return parts


def draw(spans: Sequence[Span], path: Path, report: Mapping[str, Any]) -> None:
    """A lane for each kind of work; without matplotlib (extra ``train``) there is no picture."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No picture: matplotlib is not installed", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes = figure.subplots()
    lanes = [lane for lane in ("run", "wait", "bring") if any(span.lane == lane for span in spans)]
    colours = {"run": "tab:green", "wait": "tab:red", "bring": "tab:blue"}
    for height, lane in enumerate(lanes):
        bars = [(span.start_s, span.end_s - span.start_s) for span in spans if span.lane == lane]
        axes.broken_barh(bars, (height - 0.4, 0.8), facecolors=colours[lane], edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("seconds")
    axes.set_title(f"{report['device']}: {100 * report['hidden']:.0f} % of the time of bringing blocks is hidden")
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.streaming", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--budget", help=f"what vidgen generate is told (default {BUDGET})")
    parser.add_argument("--storage", help="what vidgen generate is told of storage")
    parser.add_argument("--compare", action="store_true", help="render with everything in memory as well (4 GB)")
    parser.add_argument("--double", type=int, help="double blocks, for a trial (40 by default)")
    parser.add_argument("--single", type=int, help="single blocks, for a trial (66 by default)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written; the system's temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--profile", type=Path, metavar="DIR", help=f"draw one forward into DIR/{PICTURE} instead")
    parser.add_argument("--device", help="of the profile; a GPU if there is one")
    parser.add_argument("--side", type=int, default=32, help="of the profile's two latent frames (default 32)")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.once is not None:
        try:
            print(json.dumps(measure(arguments.once, arguments.output, arguments.budget, arguments.storage)))
        except UserError as error:
            raise SystemExit(str(error)) from error
    elif arguments.profile is not None:
        tell(lambda: profile(arguments.profile, arguments), arguments.json)
    else:
        tell(lambda: run(arguments), arguments.json)


if __name__ == "__main__":
    main()
