"""Run by test_context_parallel.py as a script, because processes of a team find their work by the name of its module.

torch is imported inside functions: a process that is only there to crash should start at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vidgen.headless import team as teams
from vidgen.headless.stop import Stop
from vidgen.headless.team import Member, run_team
from vidgen.vidgen_core.errors import Cancelled


@dataclass(frozen=True)
class Case:
    """A network and its inputs, small enough for a blink."""

    num_heads: int = 2
    image_condition: str = "none"
    frames: int = 3
    height: int = 6
    width: int = 10
    padded: bool = True
    frame_times: bool = False
    tiles: bool = False


CASES = {
    "text to video": Case(),
    "one text length": Case(padded=False),
    "a rest in every frame": Case(height=6, width=6),
    "one frame": Case(frames=1, height=4, width=6),
    "image to video, token replace": Case(image_condition="token_replace"),
    "token replace with a rest": Case(image_condition="token_replace", height=6, width=6),
    "a time per frame": Case(frame_times=True),
    "three heads": Case(num_heads=3),
    "sliding tiles": Case(tiles=True),
}
METHODS = ("ulysses", "ring")


def can_run(case: Case, method: str) -> bool:
    """With two processes."""
    return method == "ring" if case.num_heads % 2 else not (case.tiles and method == "ring")


def forward(case: Case, around: Callable[[Any], Any] | None = None) -> Any:
    """The network's output in float32; ``around`` gives what stands around the call."""
    import contextlib

    import torch

    from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
    from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
    from vidgen.vidgen_core.nn.joint_blocks import sliding_over
    from vidgen.vidgen_core.nn.sliding_tiles import SlidingTiles

    generator = torch.Generator().manual_seed(0)
    network = HunyuanVideoTransformer(
        NetworkConfig(
            in_channels=4,
            out_channels=4,
            hidden_size=16 * case.num_heads,
            num_heads=case.num_heads,
            num_double_blocks=2,
            num_single_blocks=2,
            num_refiner_blocks=1,
            rope_axes=(4, 6, 6),
            text_width=24,
            pooled_width=20,
            guidance_embed=False,
            image_condition=case.image_condition,  # type: ignore[arg-type]
        )
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, context, pooled = normal(2, 4, case.frames, case.height, case.width), normal(2, 7, 24), normal(2, 20)
    times = torch.tensor([731.5, 12.25])
    if case.frame_times:
        times = times[:, None] * torch.linspace(0, 1, case.frames)
    mask = torch.arange(7) < torch.tensor([[3], [6]]) if case.padded else None
    tiles = SlidingTiles(tile=(1, 2, 2), window=(1, 1, 3)) if case.tiles else None
    # Tiles stand outside of the split, as in a model.
    split = around(network) if around else contextlib.nullcontext()
    with torch.inference_mode(), split, sliding_over(network, tiles):
        return network(x, times, context, mask, pooled)


def compute(folder: str, member: Member, stop: Stop) -> int:
    """Every case in every way, and what is refused; saved under the rank."""
    import torch

    from vidgen.vidgen_core.errors import SettingsError
    from vidgen.vidgen_core.generate import Sampling, load_bundle, sample_latents
    from vidgen.vidgen_core.nn.parallel import Team, in_team, split_over
    from vidgen.vidgen_core.types import Conditioning

    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with member.joined("cpu") as team:
        for name, case in CASES.items():
            for method in METHODS:
                own = Team(team.rank, team.size, method)
                try:
                    results[f"{name}/{method}"] = forward(case, lambda network, own=own: split_over(network, own))
                except SettingsError as error:
                    results[f"{name}/{method}"] = str(error)
        bundle = load_bundle(Path(folder) / "model", device="cpu")
        cond = Conditioning(**torch.load(Path(folder) / "cond.pt", weights_only=True))
        with in_team(team):
            settings = Sampling(num_steps=2, cfg=1.0, resume_path=Path(folder) / "run")
            results["sampled"] = sample_latents(bundle.model, cond, None, (1, 16, 2, 4, 6), settings)
        results["kept"] = (Path(folder) / "run").exists()
    torch.save(results, Path(folder) / f"results_{member.rank}.pt")
    return 0


# --- processes that end in other ways ---------------------------------------------------------------------------------


def crash_beside_one_that_waits(member: Member, stop: Stop) -> int:
    if member.rank:
        sys.stderr.write("something\nthe last words\n")
        os._exit(9)
    time.sleep(600)
    return 0


def raise_beside_one_that_waits(member: Member, stop: Stop) -> int:
    if member.rank:
        raise KeyError("the last words")
    time.sleep(600)
    return 0


def refuse(member: Member, stop: Stop) -> int:
    """As for bad input: all of them find the same."""
    sys.stderr.write("the input is bad\n")
    return 1


def stop_when_asked(member: Member, stop: Stop) -> int:
    """The first keeps its run and ends; the other would go on for ever, deaf to everything."""
    if member.rank:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    READY.touch()
    stop.event.wait(600)
    sys.stderr.write("kept\n")
    return 130


def never_stop(member: Member, stop: Stop) -> int:
    READY.touch()
    time.sleep(600)
    return 0


def end_well(member: Member, stop: Stop) -> int:
    """The first is done; the other is no longer needed."""
    if member.rank:
        time.sleep(600)
    return 0


WORKS = (crash_beside_one_that_waits, raise_beside_one_that_waits, refuse, stop_when_asked, never_stop, end_well)


READY = Path(os.environ.get("TEAM_READY", "ready"))
"""a file that says that the first process listens"""


def ask_to_stop(stop: Stop) -> None:
    while not READY.exists():
        time.sleep(0.02)
    READY.unlink()
    stop.event.set()


def ends() -> None:
    """How each of :data:`WORKS` ends: its status and seconds, as JSON on standard output."""
    found = {}
    for work in WORKS:
        stop = Stop()
        teams.STOP_S = 1.0 if work is never_stop else 60.0  # a busy machine is slow to stop
        if work in (stop_when_asked, never_stop):
            threading.Thread(target=ask_to_stop, args=(stop,)).start()
        sys.stderr.write(f"-- {work.__name__}\n")
        sys.stderr.flush()
        begin = time.monotonic()
        try:
            status: int | str = run_team(work, 2, "auto", stop)
        except Cancelled:
            status = "cancelled"
        found[work.__name__] = [status, time.monotonic() - begin]
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1] == "compute":
        sys.exit(run_team(partial(compute, sys.argv[2]), 2, "auto", Stop()))
    ends()
