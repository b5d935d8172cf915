"""What torch.compile of a network's blocks gains, what it takes, and when it compiles again.

Two networks on the CPU, each sampled with guidance as a render does it: the bundled one with real prompts, and a
random one of middle size. Compiled and plain blocks take turns, A B A B, with the same weights and noise; the ratio is
that of each pair. Code is compiled into an empty folder, so the first render waits as long as a user's first one.

Compiled graphs are counted where torch makes them. More steps, other prompts and other seeds must make none; other
lengths may. The exit status is 1 where they do.

    python -m vidgen.benchmarks.compiling --json benchmarks/results/compiling.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .compare import SIDES, alternate, clock_of, difference, spread, timed
from .contest import Side
from .full_size import commit, tell
from .render import machine

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.generate import Sampling
    from ..vidgen_core.model import VideoModel
    from ..vidgen_core.types import Conditioning

NETWORKS = ("bundled", "middle")
PROMPTS = (
    "a red star spins on a blue background",
    "a large green circle moves left on a yellow background, then it turns around and comes back",
    "a heart",
)
"""of several lengths"""
TEXT_TOKENS = (24, 40, 9)
"""of the random network's prompts"""
NUM_STEPS = 4
RUNS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A network and what it is asked."""

    model: VideoModel
    prompts: Sequence[Conditioning]
    negative: Conditioning
    shape: tuple[int, ...]
    """of the latents: (1, C, T, H, W)"""
    settings: Sampling
    lengths: Sequence[int] = field(default=())
    """latent frames of other videos"""

    def sample(self, model: VideoModel, *, prompt: int = 0, frames: int | None = None, **changes: Any) -> Tensor:
        from ..vidgen_core.generate import sample_latents

        batch, channels, own_frames, *size = self.shape
        shape = (batch, channels, frames or own_frames, *size)
        return sample_latents(model, self.prompts[prompt], self.negative, shape, replace(self.settings, **changes))


def bundled(source: str | None, num_steps: int) -> Subject:
    """The first bundled model, or another one, at its own size."""
    from ..vidgen_core.generate import Sampling, encode_prompts, load_bundle

    bundle = load_bundle(source, device="cpu")
    shape = (1, *bundle.default_shape.latent_shape(bundle.codec.grid))
    prompts, negative = (
        [encode_prompts(bundle.text, bundle.model, [text]) for text in texts] for texts in (PROMPTS, [""])
    )
    return Subject(
        model=bundle.model,
        prompts=prompts,
        negative=negative[0],
        shape=shape,
        settings=Sampling(num_steps=num_steps, cfg=2.0, seed=0, threads=None),
        lengths=[shape[2] + more for more in (1, 2, 4)],
    )


def middle(num_steps: int, hidden_size: int = 512, side: int = 16) -> Subject:
    """Random weights: 2 double and 4 single blocks."""
    import torch

    from ..vidgen_core.families.hunyuan.config import NetworkConfig
    from ..vidgen_core.generate import Sampling
    from ..vidgen_core.types import Conditioning
    from .gpu import random_network

    config = NetworkConfig(
        hidden_size=hidden_size,
        num_heads=hidden_size // 128,
        num_double_blocks=2,
        num_single_blocks=4,
        num_refiner_blocks=1,
        rope_axes=(16, 56, 56),
        text_width=64,
        pooled_width=64,
        guidance_embed=False,
    )
    generator = torch.Generator().manual_seed(0)

    def text(num_tokens: int) -> Conditioning:
        return Conditioning(
            context=torch.randn(1, num_tokens, config.text_width, generator=generator),
            pooled=torch.randn(1, config.pooled_width, generator=generator),
        )

    return Subject(
        model=random_network(config, "cpu", torch.float32),
        prompts=[text(number) for number in TEXT_TOKENS],
        negative=text(5),
        shape=(1, config.in_channels, 5, side, side),
        settings=Sampling(num_steps=num_steps, cfg=2.0, seed=0, threads=None),
        lengths=(6, 7, 9),
    )


def num_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def count_graphs(subject: Subject, fast: VideoModel) -> dict[str, int]:
    """How many graphs each change makes, one after the other; ``fast`` was sampled once before."""
    num_steps = subject.settings.num_steps
    assert num_steps is not None
    changes: dict[str, list[dict[str, Any]]] = {
        "steps": [{"num_steps": num_steps + 3}],
        "prompts": [{"prompt": number, "num_steps": 1} for number in range(1, len(subject.prompts))],
        "seeds": [{"seed": 1, "num_steps": 1}],
        "first_other_length": [{"frames": frames, "num_steps": 1} for frames in subject.lengths[:1]],
        "more_lengths": [{"frames": frames, "num_steps": 1} for frames in subject.lengths[1:]],
        "without_guidance": [{"cfg": 1.0, "num_steps": 1}],
    }
    made = {}
    for name, runs in changes.items():
        before = num_graphs()
        for changed in runs:
            subject.sample(fast, **changed)
        made[name] = num_graphs() - before
    return made


def measure(subject: Subject, runs: int, clock: str) -> dict[str, Any]:
    """Seconds of a step, compiled and plain, and the graphs."""
    import torch

    torch._dynamo.reset()
    fast, num_steps = subject.model.with_compile(), subject.settings.num_steps
    assert num_steps is not None
    sides = [Side(run=lambda model=model: subject.sample(model), answer=lambda x: x) for model in (fast, subject.model)]
    before = num_graphs()
    first, _ = timed(sides[0], "cpu")
    compiled = num_graphs() - before
    seconds, answers = alternate(sides[0], sides[1], runs, "cpu")
    again = num_graphs() - before - compiled
    steps = {side: [spent[clock] / num_steps for spent in seconds[side]] for side in SIDES}
    ratios = [a / b for a, b in zip(*steps.values(), strict=True)]
    graphs = {"first_render": compiled, "again": again, **count_graphs(subject, fast)}
    needless = sum(graphs[change] for change in ("again", "steps", "prompts", "seeds"))
    wall = {side: median(spent["wall"] for spent in seconds[side]) for side in SIDES}
    return {
        "parameters": sum(parameter.numel() for parameter in subject.model.network.parameters()),
        "latents": list(subject.shape),
        "compile_s": round(first["wall"] - wall["ours"], 1),
        "step_s": {name: _summary(steps[side]) for name, side in zip(("compiled", "plain"), SIDES, strict=True)},
        "ratio_median": round(median(ratios), 3),
        "ratio_spread": {name: round(value, 3) for name, value in spread(ratios).items()},
        "difference": difference(answers["ours"], answers["peer"]),
        "graphs": graphs,
        "within_bar": compiled > 0 and needless == 0,
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in {"median": median(values), **spread(values)}.items()}


def report_on(names: Sequence[str], model: str | None, num_steps: int, runs: int) -> dict[str, Any]:
    """The whole report."""
    import torch

    host = machine()
    clock = clock_of("cpu", host["load_average_before"])
    made = {"bundled": lambda: bundled(model, num_steps), "middle": lambda: middle(num_steps)}
    networks = {name: measure(made[name](), runs, clock) for name in names}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {**host, "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "clock": clock,
        "steps": num_steps,
        "runs": runs,
        "networks": networks,
        "within_bar": all(network["within_bar"] for network in networks.values()),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vidgen.benchmarks.compiling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--network", choices=NETWORKS, action="append", help="one of them; both by default")
    parser.add_argument("--model", help="in the place of the first bundled one: a bundled name or a folder")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"of each turn (default {NUM_STEPS})")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"turns of each (default {RUNS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where nothing is compiled again within a size, else 1."""
    arguments = parse(argv)
    report: dict[str, Any] = {}

    def measured() -> dict[str, Any]:
        report.update(report_on(arguments.network or NETWORKS, arguments.model, arguments.steps, arguments.runs))
        return report

    with tempfile.TemporaryDirectory(prefix="vidgen-compiling-") as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        tell(measured, arguments.json)
    return 0 if report["within_bar"] else 1


if __name__ == "__main__":
    sys.exit(main())
