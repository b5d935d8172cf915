"""Does a render take what the plan says? Predicted and measured peaks over many sizes, dtypes, budgets and stages.

Every measurement is a process of its own: a fork of one that has imported everything and computed nothing. It runs the
stage once on a tiny model, takes what is resident then as its baseline, and runs the combination; the peak is VmHWM
above that baseline, weights included. Combinations below about 100 MB are left out: there, a few megabytes of kernels
and Python objects would be all that is measured. Checkpoints are the bundled one and random ones, written to a
temporary folder.

    python -m vidgen.benchmarks.plan --json benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .render import MIB, forget_peak, machine, peak_bytes, status_bytes

PROMPT = "a red star spins on a blue background"
NUM_TOKENS = 9
"""of the prompt, start and end counted"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One combination."""

    stage: str
    """sample, decode, encode, render"""
    model: str
    frames: int
    height: int
    width: int
    dtype: str = "float32"
    """or "float8": how the linear weights are stored; computed is in float32"""
    videos: int = 1
    guidance: str = "off"
    """off, batched, in turn"""
    tiles: tuple[int, int] | None = None
    """px and frames of the tiles; None is one pass"""
    bound: int | None = None
    """which of the bounds for exact coding, from 0, the fastest"""
    budget: float | None = None
    """as a share of what the fastest way takes"""

    @property
    def num_steps(self) -> int:
        """Two where weights may be streamed: after the first one, all that stays is there."""
        return 1 if self.budget is None else 2

    @property
    def name(self) -> str:
        size = f"{self.frames}x{self.height}x{self.width}"
        more = [f"batch {self.videos}"] if self.videos > 1 else []
        more += [f"cfg {self.guidance}"] if self.guidance != "off" else []
        more += [f"tiles {self.tiles[0]}x{self.tiles[1]}"] if self.tiles else []
        more += [f"bound {self.bound}"] if self.bound is not None else []
        more += [f"budget {self.budget:g}"] if self.budget else []
        return " ".join([self.stage, self.model, size, self.dtype, *more])


def cases() -> Iterator[Case]:
    """What is measured: no more than about a second of work each."""
    both = ("float32", "bfloat16")
    for dtype in both:
        for model, frames, height, width in (
            ("small", 65, 256, 256),
            ("wide", 33, 240, 240),
            ("wide", 17, 320, 352),
            ("large", 9, 128, 192),
        ):
            for guidance in ("off", "batched", "in turn"):
                if (model, dtype, guidance) != ("small", "bfloat16", "off"):  # far below 100 MB
                    yield Case(
                        stage="sample",
                        model=model,
                        frames=frames,
                        height=height,
                        width=width,
                        dtype=dtype,
                        guidance=guidance,
                    )
    yield Case(stage="sample", model="wide", frames=17, height=320, width=320, videos=3)
    yield Case(stage="sample", model="bundled", frames=33, height=160, width=160, guidance="batched")
    for dtype in both:
        for model, frames, height, width in (
            ("small", 17, 192, 192),
            ("small", 17, 128, 192),
            ("wide", 17, 128, 160),
            ("wide", 5, 256, 256),
            ("wide", 1, 512, 512),
        ):
            if dtype == "bfloat16":
                frames = 2 * frames - 1
            yield Case(stage="decode", model=model, frames=frames, height=height, width=width, dtype=dtype)
            yield Case(stage="encode", model=model, frames=frames, height=height, width=width, dtype=dtype)
    yield Case(stage="decode", model="small", frames=17, height=128, width=192, videos=3)
    yield Case(stage="decode", model="bundled", frames=17, height=96, width=96)
    for tiles in ((128, 16), (128, 32)):
        yield Case(stage="decode", model="wide", frames=33, height=256, width=256, tiles=tiles)
        yield Case(stage="encode", model="wide", frames=33, height=192, width=256, tiles=tiles)
    for bound, frames in ((0, 17), (2, 49), (3, 49)):
        yield Case(stage="decode", model="wide", frames=frames, height=256, width=320, bound=bound)
    for bound, frames in ((0, 33), (1, 65), (3, 97)):
        yield Case(stage="encode", model="wide", frames=frames, height=256, width=320, bound=bound)
    for model, frames, height, width, guidance in (
        ("small", 17, 128, 192, "off"),
        ("wide", 9, 128, 192, "batched"),
        ("large", 5, 128, 128, "off"),
        ("large", 5, 96, 128, "batched"),
        ("bundled", 17, 96, 96, "batched"),
    ):
        yield Case(stage="render", model=model, frames=frames, height=height, width=width, guidance=guidance)
    yield Case(stage="render", model="wide", frames=9, height=128, width=192, dtype="bfloat16")
    for share, model, frames, height, width in (
        (0.85, "large", 5, 128, 128),
        (0.6, "large", 5, 128, 128),
        (0.7, "wide", 17, 192, 192),
        (0.5, "wide", 17, 192, 192),
        (0.6, "wide", 5, 256, 384),
        (0.4, "small", 65, 192, 192),
    ):
        yield Case(
            stage="render", model=model, frames=frames, height=height, width=width, guidance="batched", budget=share
        )
    yield from _cogvideox()
    # Far too little: these must be refused, and rightly.
    for model, frames, height, width in (
        ("large", 5, 128, 128),
        ("wide", 17, 192, 192),
        ("wide", 5, 256, 384),
        ("small", 33, 192, 192),
        ("bundled", 17, 128, 128),
        ("cogvideox", 9, 128, 192),
    ):
        yield Case(
            stage="render", model=model, frames=frames, height=height, width=width, guidance="batched", budget=0.1
        )


def _cogvideox() -> Iterator[Case]:
    for model, frames, height, width, dtype, guidance in (
        ("cogvideox", 17, 320, 352, "float32", "off"),
        ("cogvideox", 17, 240, 352, "float32", "in turn"),
        ("cogvideox", 9, 320, 352, "bfloat16", "batched"),
        ("cogvideox", 17, 320, 352, "float8", "off"),
        ("cogvideox large", 9, 192, 256, "float8", "batched"),
        ("cogvideox large", 9, 256, 256, "bfloat16", "off"),
        ("cogvideox 1.5", 33, 320, 352, "float32", "off"),
    ):
        yield Case(
            stage="sample", model=model, frames=frames, height=height, width=width, dtype=dtype, guidance=guidance
        )
    for stage, (rows, columns) in (("decode", (128, 160)), ("encode", (160, 192))):
        for model, frames, height, width, dtype in (
            ("cogvideox", 17, rows, columns, "float32"),
            ("cogvideox", 33, rows, columns, "float32"),
            ("cogvideox", 9, 256, 256, "bfloat16"),
            ("cogvideox 1.5", 9, 128, 160, "float32"),
        ):
            yield Case(stage=stage, model=model, frames=frames, height=height, width=width, dtype=dtype)
    yield Case(stage="decode", model="cogvideox", frames=9, height=192, width=256, tiles=(128, 16))
    for model, dtype, guidance, share in (
        ("cogvideox", "float32", "batched", None),
        ("cogvideox", "bfloat16", "off", None),
        ("cogvideox large", "float32", "batched", 0.8),
        ("cogvideox", "float32", "batched", 0.6),
    ):
        yield Case(
            stage="render", model=model, frames=9, height=128, width=192, dtype=dtype, guidance=guidance, budget=share
        )


# --- models -----------------------------------------------------------------------------------------------------------


def write_models(folder: Path) -> dict[str, Path]:
    """name -> folder of a checkpoint with random weights; written by a process of its own, which is forgotten."""
    sizes = {
        # hidden size, heads, double and single blocks; channels of the VAE
        "tiny": (32, 2, 1, 1, (8, 8, 8, 8)),
        "small": (192, 4, 1, 1, (8, 16, 32, 32)),
        "wide": (512, 8, 1, 2, (16, 24, 32, 48)),
        "large": (768, 12, 2, 4, (16, 32, 32, 32)),
    }

    def write() -> None:
        import torch

        from ..training.export import export_bundle
        from ..training.text import caption_tokenizer, tiny_text_config
        from ..vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
        from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
        from ..vidgen_core.families.hunyuan.text import TextStack
        from ..vidgen_core.families.hunyuan.vae import CausalVAE
        from ..vidgen_core.types import Defaults

        torch.manual_seed(0)
        for name, (width, heads, double, single, channels) in sizes.items():
            axis = width // heads // 4
            network_config = NetworkConfig(
                hidden_size=width,
                num_heads=heads,
                num_double_blocks=double,
                num_single_blocks=single,
                num_refiner_blocks=1,
                rope_axes=(2 * axis, axis, axis),
                text_width=64,
                pooled_width=64,
                guidance_embed=False,
            )
            codec_config = CodecConfig(block_channels=channels, layers_per_block=1, num_groups=8, scaling_factor=0.7)
            defaults = Defaults(num_frames=5, height_px=32, width_px=32, fps=8, num_steps=1, shift=1.0, cfg=1.0)
            network = HunyuanVideoTransformer(network_config)
            for parameter in network.parameters():
                parameter.detach().mul_(0.5)
            export_bundle(
                folder / name,
                network=(network, network_config, defaults),
                codec=(CausalVAE(codec_config), codec_config),
                text=TextStack(tiny_text_config(width=64), caption_tokenizer()),
            )

    in_a_process(write)
    return {name: folder / name for name in sizes} | _write_cogvideox(folder)


def _write_cogvideox(folder: Path) -> dict[str, Path]:
    sizes = {
        # hidden size and blocks; channels of the VAE
        "cogvideox tiny": (64, 1, (8, 8, 8, 8)),
        "cogvideox": (512, 3, (16, 32, 32, 64)),
        "cogvideox large": (768, 3, (16, 16, 16, 32)),
        "cogvideox 1.5": (512, 3, (32, 64, 64, 128)),
    }

    def write() -> None:
        import torch

        from ..training.export import FILES
        from ..training.text import caption_tokenizer
        from ..vidgen_core.families.cogvideox.config import CodecConfig, NetworkConfig, TextConfig, defaults
        from ..vidgen_core.families.cogvideox.network import CogVideoXTransformer
        from ..vidgen_core.families.cogvideox.text import T5Text
        from ..vidgen_core.families.cogvideox.vae import CogVideoXVAE
        from ..vidgen_core.text.dims import T5Dims
        from ..vidgen_core.text.tokenizer import EOS, PAD
        from ..vidgen_core.weights.save import save_checkpoint

        torch.manual_seed(0)
        tokenizer = caption_tokenizer()
        dims = T5Dims(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            head_size=32,
            intermediate_size=128,
        )
        ids = {"pad_token_id": tokenizer.id_of(PAD), "eos_token_id": tokenizer.id_of(EOS)}
        for name, (width, layers, channels) in sizes.items():
            network = NetworkConfig(hidden_size=width, num_heads=width // 64, num_layers=layers, text_width=64)
            if name == "cogvideox 1.5":
                network = replace(network, patch=(2, 2, 2), trained_grid=(11, 150, 150), rope_fit="slice")
            codec = CodecConfig(block_channels=channels, layers_per_block=1, num_groups=8)
            text = T5Text(TextConfig(t5=dims, **ids), tokenizer)
            told = {
                "network": {"vidgen.defaults": json.dumps(asdict(defaults(network)))},
                "codec": {},
                "text": text.metadata(),
            }
            modules = {"network": CogVideoXTransformer(network), "codec": CogVideoXVAE(codec), "text": text}
            configs = {"network": network, "codec": codec, "text": text.config}
            (folder / name).mkdir()
            for part, module in modules.items():
                for parameter in module.parameters():
                    parameter.detach().mul_(0.5)
                save_checkpoint(
                    folder / name / FILES[part],
                    module.state_dict(),
                    family="cogvideox",
                    part=part,
                    config=configs[part],
                    metadata=told[part],
                )

    in_a_process(write)
    return {name: folder / name for name in sizes}


def in_a_process(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, as JSON, from a fork of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not text:
        raise RuntimeError("a measurement failed")
    return json.loads(text)


# --- predicting and measuring -----------------------------------------------------------------------------------------


class Bench:
    """The models, their planners, and one measurement after the other."""

    def __init__(self, models: Mapping[str, Path | None]) -> None:
        from ..vidgen_core.bundle import find_parts
        from ..vidgen_core.memory.plan import Rates
        from ..vidgen_core.planning import Planner

        self.models = models
        self.planners = {}
        for name, path in models.items():
            headers, found = find_parts(path)
            self.planners[name] = Planner(headers, found, rates=Rates(), baseline_bytes=0)

    def wish(self, case: Case) -> Any:
        from ..vidgen_core.planning import Wish
        from ..vidgen_core.types import VideoShape

        return Wish(
            shape=VideoShape(num_frames=case.frames, height_px=case.height, width_px=case.width),
            num_videos=case.videos,
            num_steps=case.num_steps,
            guided=case.guidance != "off",
            may_batch=case.guidance == "batched",
            num_text_tokens=NUM_TOKENS,
            dtype=_dtype(case),
            storage=_storage(case),
            encodes_frames=case.frames if case.stage == "encode" else 0,
        )

    def predict(self, case: Case) -> Any:
        """The plan for a case, above the baseline."""
        planner, wish = self.planners[case.model], self.wish(case)
        if case.budget is not None:
            fastest = planner.plan(wish, 10**15).peak_bytes
            return planner.plan(wish, round(case.budget * fastest))
        if case.stage == "render":
            return planner.plan(wish, 10**15)
        return self._one_stage(case, planner, wish)

    def _one_stage(self, case: Case, planner: Any, wish: Any) -> Any:
        from ..vidgen_core.memory.plan import choose

        name = {"encode": "encode video"}.get(case.stage, case.stage)
        stages = [stage for stage in planner.stages(wish) if stage.name == name]
        if case.tiles is not None:
            wanted = f"tiles of {case.tiles[0]} px and {case.tiles[1]} frames"
            stages = [replace(stage, ways=[way for way in stage.ways if way.name == wanted]) for stage in stages]
        if case.bound is not None:
            exact = [[way for way in stage.ways if way.name.startswith("exact")] for stage in stages]
            stages = [replace(stage, ways=[ways[case.bound]]) for stage, ways in zip(stages, exact, strict=True)]
        return choose(stages, 10**15, planner.rates, baseline_bytes=0)

    def measure(self, case: Case, plan: Any) -> dict[str, float]:
        """Bytes above the baseline, and seconds, in a process of its own."""

        def work() -> dict[str, float]:
            import torch

            from ..vidgen_core.memory.plan import following, return_freed_memory

            return_freed_memory()
            torch.set_num_threads(1)
            run = {"sample": sample, "decode": decode, "encode": encode, "render": render}[case.stage]
            name, frames = ("cogvideox tiny", 9) if case.model.startswith("cogvideox") else ("tiny", 5)
            run(
                replace(case, model=name, frames=frames, height=32, width=32, tiles=None, bound=None), self.models[name]
            )
            gc.collect()
            baseline = status_bytes("self", "VmRSS")
            forget_peak()
            started = time.process_time()
            with following(plan):
                run(case, self.models[case.model])
            return {"bytes": peak_bytes() - baseline, "seconds": time.process_time() - started, "baseline": baseline}

        return in_a_process(work)


def _dtype(case: Case) -> Any:
    import torch

    return None if case.dtype in ("float32", "float8") else getattr(torch, case.dtype)


def _storage(case: Case) -> str:
    from ..vidgen_core.memory.place import AUTO

    return "float8" if case.dtype == "float8" else AUTO


def sample(case: Case, path: Path | None) -> None:
    import torch

    from ..vidgen_core.bundle import find_parts
    from ..vidgen_core.generate import Sampling, sample_latents
    from ..vidgen_core.model import network_of
    from ..vidgen_core.types import Conditioning, VideoShape

    headers, found = find_parts(path)
    model = network_of(headers["network"], found["network"], dtype=_dtype(case), storage=_storage(case), stream=None)
    grid = found["network"].family.grid(found["codec"].config)
    shape = VideoShape(num_frames=case.frames, height_px=case.height, width_px=case.width).latent_shape(grid)
    config = found["network"].config

    def told(num_tokens: int) -> Conditioning:
        num_tokens = getattr(config, "text_length", num_tokens)
        pooled = torch.randn(1, getattr(config, "pooled_width", 0))
        return Conditioning(context=torch.randn(1, num_tokens, config.text_width), pooled=pooled)

    guided = case.guidance != "off"
    settings = Sampling(
        num_steps=1, cfg=6.0 if guided else 1.0, threads=None, cfg_batched=case.guidance == "batched", seed=0
    )
    sample_latents(model, told(NUM_TOKENS), told(2) if guided else None, (case.videos, *shape), settings)


def decode(case: Case, path: Path | None) -> None:
    import torch

    from ..vidgen_core.bundle import find_parts
    from ..vidgen_core.generate import decode_latents
    from ..vidgen_core.media import video_to_images
    from ..vidgen_core.model import load_codec
    from ..vidgen_core.types import VideoShape

    headers, _ = find_parts(path)
    codec = load_codec(headers["codec"].path, dtype=_dtype(case))
    shape = VideoShape(num_frames=case.frames, height_px=case.height, width_px=case.width).latent_shape(codec.grid)
    video_to_images(decode_latents(codec, torch.randn(case.videos, *shape)))


def encode(case: Case, path: Path | None) -> None:
    import torch

    from ..vidgen_core.bundle import find_parts
    from ..vidgen_core.generate import encode_video
    from ..vidgen_core.memory.plan import planned
    from ..vidgen_core.model import load_codec

    headers, _ = find_parts(path)
    codec = load_codec(headers["codec"].path, dtype=_dtype(case))
    video = torch.rand(1, 3, case.frames, case.height, case.width)
    encode_video(codec, video, tiling=planned("encode video", "tiling", None))


def render(case: Case, path: Path | None) -> None:
    from ..vidgen_core.generate import Sampling, generate, load_bundle
    from ..vidgen_core.media import images_to_frames, video_to_images
    from ..vidgen_core.types import VideoShape

    bundle = load_bundle(path, dtype=_dtype(case), storage=_storage(case))
    settings = Sampling(num_steps=case.num_steps, cfg=1.0 if case.guidance == "off" else 6.0, threads=None)
    shape = VideoShape(num_frames=case.frames, height_px=case.height, width_px=case.width)
    images = video_to_images(generate(bundle, PROMPT, shape, settings))
    for _ in images_to_frames(images):
        pass


# --- the report -------------------------------------------------------------------------------------------------------


def row_of(bench: Bench, case: Case) -> dict[str, Any]:
    started = time.process_time()
    plan = bench.predict(case)
    planning = time.process_time() - started
    measured = bench.measure(case, plan)
    return {
        "name": case.name,
        "case": asdict(case),
        "ways": {stage.name: stage.way for stage in plan.stages},
        "predicted": plan.peak_bytes,
        "measured": round(measured["bytes"]),
        "ratio": round(plan.peak_bytes / measured["bytes"], 4),
        "budget": plan.budget_bytes if case.budget else None,
        "fits": plan.fits,
        "cpu_seconds": round(measured["seconds"], 2),
        "cpu_seconds_planning": round(planning, 2),
        "baseline": round(measured["baseline"]),
    }


def predict_again(bench: Bench, file: Path, begins: tuple[str, ...]) -> None:
    """Give the rows of a result file the figures that the plan gives now; what was run with a budget stays."""
    report = json.loads(file.read_text("utf-8"))
    for row in report["rows"]:
        values = row["case"] | {"tiles": None if row["case"]["tiles"] is None else tuple(row["case"]["tiles"])}
        if row["budget"] is None and row["name"].startswith(begins):
            plan = bench.predict(Case(**values))
            row |= {"predicted": plan.peak_bytes, "ratio": round(plan.peak_bytes / row["measured"], 4)}
        print(line(row), flush=True)
    report["summary"] = summarise(report["rows"])
    print(json.dumps(report["summary"], indent=1))
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares and worst cases of what was not refused; what was refused was run the smallest way nevertheless."""
    ratios = sorted(row["ratio"] for row in rows if row["fits"])
    kept = [row for row in rows if row["budget"] and row["fits"]]
    refused = [row for row in rows if row["budget"] and not row["fits"]]
    return {
        "combinations": len(ratios),
        "within_10_percent": sum(0.97 <= ratio <= 1.1 for ratio in ratios),
        "lowest_ratio": ratios[0],
        "highest_ratio": ratios[-1],
        "median_ratio": ratios[len(ratios) // 2],
        "budgets": len(kept),
        "worst_measured_over_budget": max((row["measured"] / row["budget"] for row in kept), default=None),
        "refused": len(refused),
        "refused_rightly": sum(row["measured"] > row["budget"] for row in refused),
    }


def line(row: Mapping[str, Any]) -> str:
    text = f"{row['name']:<58}{row['predicted'] / MIB:>8.0f}{row['measured'] / MIB:>8.0f}{row['ratio']:>8.3f}"
    if row["budget"]:
        text += f"  of {row['budget'] / MIB:.0f}" + ("" if row["fits"] else ", refused")
    return text


def main(argv: list[str] | None = None) -> None:
    about = "predicted and measured peaks of memory over many sizes, dtypes, budgets and stages"
    parser = argparse.ArgumentParser(prog="python -m vidgen.benchmarks.plan", description=about)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every combination")
    parser.add_argument("--only", default="", help="combinations whose name begins with one of these: decode,encode")
    parser.add_argument("--predict", action="store_true", help="only predict again what FILE has, but for budgets")
    parser.add_argument("--missing", action="store_true", help="keep what is in FILE, and measure the others")
    arguments = parser.parse_args(argv)

    import torch
    import transformers  # noqa: F401  its code belongs to the baseline, not to a run

    from ..training import export, text  # noqa: F401
    from ..vidgen_core import generate  # noqa: F401

    torch.set_num_threads(1)
    begins = tuple(arguments.only.split(","))
    rows: list[dict[str, Any]] = []
    if arguments.missing and arguments.json is not None and arguments.json.is_file():
        rows = json.loads(arguments.json.read_text("utf-8"))["rows"]
    done = {row["name"] for row in rows}
    report = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine()}
    report |= {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench({"bundled": None, **write_models(Path(folder))})
        if arguments.predict and arguments.json is not None:
            predict_again(bench, arguments.json, begins)
            return
        print(f"{'':<58}{'plan':>8}{'real':>8}{'ratio':>8}   MiB")
        for case in cases():
            if case.name in done or not case.name.startswith(begins):
                continue
            rows.append(row_of(bench, case))
            print(line(rows[-1]), flush=True)
            if arguments.json is not None:
                text_ = json.dumps(report | {"summary": summarise(rows), "rows": rows}, indent=1)
                arguments.json.write_text(text_ + "\n", encoding="utf-8")
    print(json.dumps(summarise(rows), indent=1))


if __name__ == "__main__":
    main()
