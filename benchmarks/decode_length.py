"""Memory of a decode by the length of the video: CogVideoX's VAE, which goes through a video group by group.

The published width with random weights, float32, one thread. Each length is a process of its own; its memory is the
peak above what was resident when the weights were there. Frames are handed on as they come and dropped; ``--write``
hands them to the writer of video files (ffmpeg, whose memory is its own), ``--whole`` keeps the video as a tensor.
``--count`` counts bytes on the meta device and computes nothing. The C library gives freed tensors back at once, as in
a render with a budget; ``--keep-freed`` leaves it as it is: then holes of up to 32 MB are counted as well.

    python -m vidgen.benchmarks.decode_length --frames 49 --frames 97 --size 240x360 --json FILE
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .full_size import commit
from .render import forget_peak, machine, peak_bytes, status_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.families.cogvideox.codec import CogVideoXCodec

MAX_GROWTH = 1.10
"""of the peak from the shortest to the longest video"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One measurement."""

    frames: int
    size: str
    """ROWSxCOLUMNS in pixels"""
    part_of_width: int = 1
    """the VAE has the published channels divided by it"""
    whole: bool = False
    write: bool = False
    count: bool = False
    keep_freed: bool = False


def build(part: int) -> CogVideoXCodec:
    """The codec of every measurement."""
    from ..vidgen_core.families.cogvideox.codec import CogVideoXCodec
    from ..vidgen_core.families.cogvideox.config import VAE_5B, CodecConfig
    from ..vidgen_core.families.cogvideox.vae import CogVideoXVAE

    widths = tuple(width // part for width in VAE_5B.block_channels)
    return CogVideoXCodec(CogVideoXVAE(CodecConfig(block_channels=widths, num_groups=max(1, 32 // part))).eval())


def write(codec: CogVideoXCodec, latents: Tensor) -> None:
    """Into an mp4 in a temporary folder, by the functions of the main path."""
    from ..vidgen_core.bounded import Bound
    from ..vidgen_core.generate import decode_frames
    from ..vidgen_core.media import images_to_frames, video_to_images, write_video

    frames = decode_frames(codec, latents, bound=Bound())  # this codec needs none
    images = (video_to_images(frame[None, :, None])[0] for frame in frames)
    with tempfile.TemporaryDirectory(prefix="vidgen-decode-length-") as folder:
        write_video(Path(folder) / "video.mp4", images_to_frames(images), fps=8)


def measure(task: Task) -> dict[str, Any]:
    """Peak and CPU time in this process."""
    import torch

    from ..vidgen_core.memory.live import cost_of
    from ..vidgen_core.memory.plan import return_freed_memory
    from ..vidgen_core.types import VideoShape

    if not task.keep_freed:
        return_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta" if task.count else "cpu"), torch.inference_mode():
        codec = build(task.part_of_width)
        rows, columns = map(int, task.size.split("x"))
        shape = VideoShape(num_frames=task.frames, height_px=rows, width_px=columns)
        shape.check(codec.grid)
        latents = torch.randn(1, *shape.latent_shape(codec.grid))

        def run(given: Any) -> Any:
            if task.write:
                return write(codec, given)
            return codec.decode(given) if task.whole else sum(part.shape[1] for part in codec.frames(given))

        if task.count:
            return asdict(task) | {"peak_bytes": cost_of(run, latents, modules=[codec]).peak - latents.nbytes}
        first = torch.zeros(1, 16, 1, 8, 8)  # libraries are loaded and their buffers are made
        write(codec, first) if task.write else codec.decode(first)
        forget_peak()
        before, started = status_bytes("self", "VmRSS"), time.process_time()
        run(latents)
        cpu_s = round(time.process_time() - started, 2)
        return asdict(task) | {"peak_bytes": peak_bytes() - before, "cpu_s": cpu_s}


def measure_fresh(task: Task) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--once", json.dumps(asdict(task))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def report(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """All measurements, and how much more the longest video took than the shortest."""
    by_length = sorted(measured, key=lambda one: one["frames"])
    growth = by_length[-1]["peak_bytes"] / by_length[0]["peak_bytes"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "growth": round(growth, 4),
        "bar_kept": growth <= MAX_GROWTH,
        "measurements": measured,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.decode_length", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--frames", action="append", type=int, help="8 n + 1; several times (default 49 and 97)")
    parser.add_argument("--size", default="240x360", metavar="ROWSxCOLUMNS", help="in pixels (default 240x360)")
    parser.add_argument("--part-of-width", type=int, default=1, help="divide the VAE's channels (default 1)")
    parser.add_argument("--whole", action="store_true", help="keep the video as a tensor")
    parser.add_argument("--write", action="store_true", help="write the frames into a video file as they come")
    parser.add_argument("--count", action="store_true", help="count on the meta device, compute nothing")
    parser.add_argument(
        "--keep-freed", action="store_true", help="let the C library keep what is freed, as it likes to"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.whole or arguments.count):
        parser.error("--write hands frames on as they come, and computes them")
    if arguments.once is not None:
        print(json.dumps(measure(Task(**json.loads(arguments.once)))))
        return
    how = {
        name: getattr(arguments, name) for name in ("size", "part_of_width", "whole", "write", "count", "keep_freed")
    }
    measured = []
    for frames in arguments.frames or (49, 97):
        measured.append(measure_fresh(Task(frames=frames, **how)))
        print(json.dumps(measured[-1]), flush=True)
    content = report(measured)
    print(f"{content['growth']:.3f} times the memory for the longest video")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
