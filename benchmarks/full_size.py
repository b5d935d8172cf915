"""Does a published network run in the memory of a laptop? Peak memory and seconds of one real forward.

A float8 checkpoint of a family's full size with random weights is written to a temporary folder (HunyuanVideo's has
13 GB, CogVideoX's 5.6 GB; deleted afterwards), loaded with block streaming, and asked once on the CPU. Loading and
asking run in a process of their own, so that the peak is theirs.

    python -m vidgen.benchmarks.full_size --json benchmarks/results/full_size.json
    python -m vidgen.benchmarks.full_size --family cogvideox
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import FileError, UserError
from .render import machine, peak_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.families import Config

GIB = 2**30
BAR_BYTES = {"hunyuan": 5 * GIB, "cogvideox": 3 * GIB}
"""what the whole process may take at its peak"""
PAGE = 1 << 22
"""random numbers are drawn once for this many weights and repeated"""
LATENTS = (1, 16, 2, 24, 24)
"""two latent frames of 24 x 24: 288 video tokens"""
NUM_TEXT_TOKENS = {"hunyuan": 64, "cogvideox": 226}


# ---------------------------------------------------------------------------------------------
# the checkpoint


Entry = tuple[str, tuple[int, ...], str]
"""name, shape and the format's name of a dtype"""


def write_random(
    path: Path, entries: Sequence[Entry], *, seed: int = 0, metadata: Mapping[str, str] | None = None
) -> int:
    """A safetensors file of random numbers: float8 of deviation 1 with scales of 0.02, else of deviation 0.02.

    Returns:
        its size in bytes.

    Raises:
        FileError: the disk has no room for it.
    """
    import torch

    size = {"F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4}
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape, kind in entries:
        start, end = end, end + size[kind] * torch.Size(shape).numel()
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    head = json.dumps(table).encode()
    head += b" " * (-len(head) % 64)
    _check_room(path.parent, 8 + len(head) + end)

    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(PAGE, generator=generator)
    pages = {
        "F8_E4M3": normal.to(torch.float8_e4m3fn),
        "F16": (0.02 * normal).half(),
        "BF16": (0.02 * normal).to(torch.bfloat16),
        "F32": torch.full((1,), 0.02),
    }
    raw = {kind: _bytes(page) for kind, page in pages.items()}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, shape, kind in entries:
            left = size[kind] * torch.Size(shape).numel()
            while left:
                left -= file.write(raw[kind][: min(left, len(raw[kind]))])
    return path.stat().st_size


def write_checkpoint(path: Path, config: Config, *, seed: int = 0) -> int:
    """A safetensors file with native names: float8 and ComfyUI's scales in the blocks' linear layers, else bfloat16.

    Returns:
        its size in bytes.

    Raises:
        FileError: the disk has no room for it.
    """
    import torch

    from ..vidgen_core.families import FAMILIES
    from ..vidgen_core.weights.records import scale_name

    family = next(f for f in FAMILIES.values() if isinstance(config, f.parts["network"].config))
    with torch.device("meta"):
        weights = family.parts["network"].build(config, {}).state_dict()
    entries: list[Entry] = []
    blocks = tuple(f"{path}." for path in family.blocks)
    for name, tensor in weights.items():
        is_small = name.startswith(blocks) and name.endswith(".weight") and tensor.ndim == 2
        entries.append((name, tuple(tensor.shape), "F8_E4M3" if is_small else "BF16"))
        if is_small:
            entries.append((scale_name(name), (), "F32"))
    return write_random(path, entries, seed=seed)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.view(torch.uint8).numpy().data


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + GIB // 4:
        raise FileError(
            "The disk has no room for the checkpoint",
            given=f"{free / GIB:.1f} GiB free in {folder}",
            expected=f"{num_bytes / GIB + 0.25:.1f} GiB",
            do="free some space, or name another folder with --folder",
        )


# ---------------------------------------------------------------------------------------------
# loading and asking


def measure(path: Path) -> dict[str, Any]:
    """Load the network with block streaming and ask it once; seconds and the peak of this process."""
    started = time.perf_counter()
    import torch

    from ..vidgen_core.model import load_network
    from ..vidgen_core.types import Conditioning

    seconds = {"import": time.perf_counter() - started}
    started = time.perf_counter()
    model = load_network(path, stream=True)
    seconds["load"] = time.perf_counter() - started
    peak_after_load = peak_bytes()

    generator = torch.Generator().manual_seed(1)
    family = model.family.name
    cond = Conditioning(
        context=torch.randn(1, NUM_TEXT_TOKENS[family], model.config.text_width, generator=generator),
        pooled=torch.randn(1, getattr(model.config, "pooled_width", 0), generator=generator),
        scalars={"guidance": torch.tensor([6.0])},
    )
    noise = torch.randn(LATENTS, generator=generator)
    started = time.perf_counter()
    with torch.inference_mode():
        flow = model.predict(noise, torch.tensor(0.8), cond)
    seconds["forward"] = time.perf_counter() - started
    patch = model.config.patch
    return {
        "family": family,
        **cost(seconds, peak_after_load, BAR_BYTES[family]),
        "video_tokens": flow[0, 0].numel() // (patch[0] * patch[1] * patch[2]),
        "text_tokens": NUM_TEXT_TOKENS[family],
        "output": {
            "shape": list(flow.shape),
            "finite": bool(flow.isfinite().all()),
            "deviation": round(float(flow.std()), 6),
        },
        "dtype": str(flow.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cost(seconds: Mapping[str, float], peak_after_load: int, bar_bytes: int) -> dict[str, Any]:
    """Seconds and peak memory of this process, and whether it stayed under the bar."""
    peak = peak_bytes()
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_rss_bytes": peak,
        "peak_rss_after_load_bytes": peak_after_load,
        "peak_rss_gib": round(peak / GIB, 3),
        "bar_gib": bar_bytes / GIB,
        "within_bar": peak <= bar_bytes,
    }


def measure_fresh(module: str, *arguments: str) -> dict[str, Any]:
    """What a benchmark's module prints for these arguments, as its last line, in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def commit() -> str | None:
    """The commit of the checkout, None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run(config: Config, folder: Path | None) -> dict[str, Any]:
    """Write, load, ask, delete; the whole report."""
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(prefix="vidgen-full-size-", dir=folder) as place:
        path = Path(place) / "network.safetensors"
        started = time.perf_counter()
        num_bytes = write_checkpoint(path, config)
        report["checkpoint"] = {"bytes": num_bytes, "write_s": round(time.perf_counter() - started, 2)}
        return report | measure_fresh(__spec__.name, f"--once={path}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.full_size", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--family", choices=tuple(BAR_BYTES), default="hunyuan")
    parser.add_argument("--layers", type=int, help="CogVideoX's blocks, for a trial (42 by default)")
    parser.add_argument("--double", type=int, help="double blocks, for a trial (20 by default)")
    parser.add_argument("--single", type=int, help="single blocks, for a trial (40 by default)")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written; the system's temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.once is not None:
        print(json.dumps(measure(arguments.once)))
        return
    from ..vidgen_core.families.cogvideox.config import T2V_5B
    from ..vidgen_core.families.hunyuan.config import T2V_720P

    base, depth = T2V_720P, {"num_double_blocks": arguments.double, "num_single_blocks": arguments.single}
    if arguments.family == "cogvideox":
        base, depth = T2V_5B, {"num_layers": arguments.layers}
    config = replace(base, **{name: number for name, number in depth.items() if number is not None})
    tell(lambda: run(config, arguments.folder), arguments.json)


def tell(measured: Callable[[], dict[str, Any]], file: Path | None) -> None:
    """Print a report, and write it to a file where one is named; a UserError ends the program with its words."""
    try:
        text = json.dumps(measured(), indent=1)
    except UserError as error:
        raise SystemExit(str(error)) from error
    print(text)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
