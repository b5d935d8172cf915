"""Everything that needs a GPU, in one go: HunyuanVideo and CogVideoX at their published sizes, random weights.

    benchmarks/gpu.sh results            # all of it, under 9 minutes on a card of an H200's class
    benchmarks/gpu.sh --dry-run results  # every item at a tiny size on the CPU

Each item runs in a process of its own, with the time that is left as its limit, and the results are written after each
one: an item that fails, runs out of memory or takes too long costs nobody else's figures. What the program cannot do
yet is listed as "not built yet" with the module that was looked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.weights.save import atomic_path, save_json
from . import gpu_cogvideox
from .full_size import GIB, commit, write_checkpoint
from .gpu_tools import drawn, figure, forget, peak_gib, seconds_of
from .render import machine

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
    from ..vidgen_core.model import VideoModel
    from ..vidgen_core.text.features import TextFeatures
    from .compare_cogvideox import Sizes
    from .contest import Latents

MINUTES = 8.75
"""for all items; what is left of nine goes to starting and writing"""
VALID_TEXT, NUM_TEXT = 64, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What an item is measured with."""

    device: str
    network: NetworkConfig
    codec: CodecConfig
    warm: Latents
    """a first run, which loads the kernels"""
    short: Latents
    middle: Latents
    long: Latents
    matmul: int
    """side of the square matrices"""
    tile_px: int
    budgets_gib: tuple[float, ...]
    """for weights on the card"""
    decode_budget_gib: float
    num_steps: int
    """of a run with a step cache"""
    cogvideox: Sizes
    folder: Path
    """where pictures go"""

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16


def full_scale(folder: Path) -> Scale:
    """320x512x61, 544x960x129 and 720x1280x129 through the 13 B network, on the GPU."""
    from ..vidgen_core.families.hunyuan.config import T2V_720P, VAE_884_16C
    from .compare_cogvideox import PUBLISHED_5B

    return Scale(
        device="cuda",
        network=T2V_720P,
        codec=VAE_884_16C,
        warm=(2, 16, 16),
        short=(16, 40, 64),
        middle=(33, 68, 120),
        long=(33, 90, 160),
        matmul=16384,
        tile_px=256,
        budgets_gib=(2.0, 6.0, 10.0),
        decode_budget_gib=24.0,
        num_steps=12,
        cogvideox=PUBLISHED_5B,
        folder=folder,
    )


def dry_scale(folder: Path) -> Scale:
    """The same steps in a moment, on the CPU."""
    from .compare_cogvideox import TINY as TINY_COGVIDEOX
    from .compare_hunyuan import TINY

    small = (2, 4, 4)
    return Scale(
        device="cpu",
        network=TINY.network,
        codec=TINY.codec,
        warm=(1, 4, 4),
        short=small,
        middle=small,
        long=(5, 6, 6),
        matmul=64,
        tile_px=32,
        budgets_gib=(16.0, 24.0, 32.0),
        decode_budget_gib=1.0,
        num_steps=8,
        cogvideox=TINY_COGVIDEOX,
        folder=folder,
    )


# ---------------------------------------------------------------------------------------------
# what is measured with


def step_flops(config: NetworkConfig, video: int, text: int) -> dict[str, float]:
    """Of one forward, two for each multiplication: in the blocks' linear layers, and in attention.

    A block has 12 D^2 weights for each token: 3 of them for q, k, v, one behind the attention, 8 of the MLP.
    """
    tokens, width = video + text, config.hidden_size
    blocks = config.num_double_blocks + config.num_single_blocks
    per_token = (4 + 2 * config.mlp_ratio) * width**2
    return {"linear": 2 * blocks * tokens * per_token, "attention": 4 * blocks * tokens**2 * width}


def num_tokens(config: NetworkConfig, latents: Latents) -> int:
    sizes = zip(latents, config.patch, strict=True)
    frames, rows, columns = (size // step for size, step in sizes)
    return frames * rows * columns


def random_network(config: NetworkConfig, device: str, dtype: torch.dtype) -> VideoModel:
    """Weights of deviation 1 / sqrt(inputs), drawn on the device."""
    import torch

    from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
    from ..vidgen_core.model import VideoModel

    with torch.device("meta"):
        network = HunyuanVideoTransformer(config)
    return VideoModel.of("hunyuan", config, drawn(network, device, dtype))


@dataclass(frozen=True, slots=True)
class Step:
    """One forward, as a render asks for it."""

    model: VideoModel
    noise: Tensor
    features: TextFeatures

    @classmethod
    def of(cls, model: VideoModel, latents: Latents, device: str, dtype: torch.dtype) -> Step:
        from .compare_hunyuan import network_inputs

        return cls(model, *network_inputs(model.config, latents, VALID_TEXT, device, dtype))

    def __call__(self) -> Tensor:
        import torch

        from .compare_hunyuan import forward_ours

        with torch.inference_mode():
            return forward_ours(self.model, self.noise, self.features)


def _steps(scale: Scale, model: VideoModel, *sizes: Latents) -> list[Step]:
    """A step of each size, after one that loads the kernels."""
    Step.of(model, scale.warm, scale.device, scale.torch_dtype)()
    return [Step.of(model, latents, scale.device, scale.torch_dtype) for latents in sizes]


# ---------------------------------------------------------------------------------------------
# the items


def matmul_rate(scale: Scale) -> dict[str, Any]:
    """The card's dense rate, which steps are held against."""
    import torch

    side, device = scale.matmul, scale.device
    a, b = (torch.randn(side, side, device=device, dtype=scale.torch_dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    seconds = seconds_of(lambda: torch.mm(a, b, out=out), device, times=10)
    found: dict[str, Any] = {"side": side, "bf16_tflops": _tflops(2 * side**3, seconds)}
    if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        small = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        one = torch.ones((), device=device)

        def product() -> Tensor:
            return torch._scaled_mm(*small, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        product()
        found["fp8_tflops"] = _tflops(2 * side**3, seconds_of(product, device, times=10))
    return found


def step_of(size: str) -> Callable[[Scale], dict[str, Any]]:
    def measure(scale: Scale) -> dict[str, Any]:
        latents: Latents = getattr(scale, size)
        model = random_network(scale.network, scale.device, scale.torch_dtype)
        (step,) = _steps(scale, model, latents)
        forget(scale.device)
        flow = step()  # the first one of a size chooses kernels; it is not timed
        finite = bool(flow.isfinite().all())
        seconds = seconds_of(step, scale.device)
        flops = step_flops(scale.network, num_tokens(scale.network, latents), VALID_TEXT)
        total = sum(flops.values())
        return {
            "seconds": figure(seconds),
            "tflops": _tflops(total, seconds),
            "pflop": figure(total / 1e15),
            "attention_share": round(flops["attention"] / total, 3),
            "peak_gib": peak_gib(scale.device),
            "weights_gib": round(sum(p.numel() * p.itemsize for p in model.network.parameters()) / GIB, 3),
            "finite": finite,
        }

    return measure


def peer_of(size: str) -> Callable[[Scale], dict[str, Any]]:
    """diffusers with the very same weights, as its pipeline calls it: padded text and a mask."""

    def measure(scale: Scale) -> dict[str, Any]:
        import torch

        from ..vidgen_core.families.hunyuan.keys import LAYOUTS
        from .compare import difference
        from .compare_hunyuan import diffusers_network, forward_theirs

        model = random_network(scale.network, scale.device, scale.torch_dtype)
        (step,) = _steps(scale, model, getattr(scale, size))
        forget(scale.device)
        answer = step()
        ours = {"seconds": seconds_of(step, scale.device), "peak_gib": peak_gib(scale.device)}

        with torch.device("meta"):
            twin = diffusers_network(scale.network).to(scale.torch_dtype)
        twin.load_state_dict(LAYOUTS["diffusers"].to_foreign(model.network.state_dict()), assign=True)
        twin.eval().requires_grad_(False)

        def peer(noise: Tensor, features: TextFeatures) -> Tensor:
            with torch.no_grad():
                return forward_theirs(twin, noise, features, scale.torch_dtype)

        warm = Step.of(model, scale.warm, scale.device, scale.torch_dtype)
        peer(warm.noise, warm.features)
        forget(scale.device)
        answers: list[Tensor] = []
        seconds = seconds_of(lambda: answers.append(peer(step.noise, step.features)), scale.device)
        theirs = {"seconds": seconds, "peak_gib": peak_gib(scale.device)}
        return {
            "seconds": {"ours": figure(ours["seconds"]), "diffusers": figure(seconds)},
            "ratio": round(ours["seconds"] / seconds, 4),
            "peak_gib": {"ours": ours["peak_gib"], "diffusers": theirs["peak_gib"]},
            "peak_ratio": round(ours["peak_gib"] / theirs["peak_gib"], 4),
            "difference": difference(answer, answers[0])["relative"],
        }

    return measure


def float8_linears(scale: Scale) -> dict[str, Any]:
    """bfloat16 and float8 products of linear layers, where they are most of the work."""
    from ..vidgen_core.memory.place import STORAGES, store_linears
    from .compare import difference

    model = random_network(scale.network, scale.device, scale.torch_dtype)
    (step,) = _steps(scale, model, scale.short)
    exact = step()
    wide = seconds_of(step, scale.device, times=3)
    store_linears(model.network, STORAGES["float8 matmul"], model.family.blocks)
    rounded = step()
    small = seconds_of(step, scale.device, times=3)
    return {
        "tokens": num_tokens(scale.network, scale.short) + VALID_TEXT,
        "seconds": {"bf16": figure(wide), "fp8": figure(small)},
        "times_faster": round(wide / small, 3),
        "difference": difference(rounded, exact)["relative"],
    }


def attention_backends(scale: Scale) -> dict[str, Any]:
    """One step of the middle size with every kernel that is installed and takes these tensors."""
    from ..vidgen_core.nn.attention import attending_with
    from ..vidgen_core.nn.backends import BACKENDS, AttentionChoice, Dispatcher
    from .compare import difference

    model = random_network(scale.network, scale.device, scale.torch_dtype)
    (step,) = _steps(scale, model, scale.middle)
    exact = step()
    found: dict[str, Any] = {"auto": {"seconds": figure(seconds_of(step, scale.device))}}
    for name, backend in BACKENDS.items():
        if name == "sdpa_math" or not backend.is_installed or (backend.needs_gpu and scale.device == "cpu"):
            continue
        with attending_with(Dispatcher(AttentionChoice(backend=name))):
            answer = step()
            seconds = seconds_of(step, scale.device)
        found[name] = {"seconds": figure(seconds), "difference": difference(answer, exact)["relative"]}
    return found


def compiled_blocks(scale: Scale) -> dict[str, Any]:
    """Blocks by way of torch.compile: the first step, and the ones after it."""
    if scale.device == "cpu":
        return {"note": "a compiler takes minutes on a CPU; measured on a GPU only"}
    from ..vidgen_core.memory.compiled import compiled

    model = random_network(scale.network, scale.device, scale.torch_dtype)
    (step,) = _steps(scale, model, scale.short)
    plain = seconds_of(step, scale.device, times=3)
    with compiled(model.network, model.family.blocks) as is_compiled:
        first = seconds_of(step, scale.device)
        after = seconds_of(step, scale.device, times=3)
    seconds = {"plain": figure(plain), "first": figure(first), "compiled": figure(after)}
    return {"seconds": seconds, "times_faster": round(plain / after, 3), "is_compiled": is_compiled}


def cached_steps(scale: Scale) -> dict[str, Any]:
    """A whole run at the short size, with every step and with step caches.

    What is skipped depends on the weights: these are random, so the figures show what a skipped step saves. How much a
    trained network skips, and at what error, is measured by ``benchmarks.caching``.
    """
    import torch

    from ..vidgen_core.caching import StepCache
    from ..vidgen_core.generate import Sampling, measure_curve, sample_latents
    from ..vidgen_core.tricks import Tricks
    from .caching import counted
    from .compare import difference
    from .compare_hunyuan import GUIDANCE, network_inputs

    model = random_network(scale.network, scale.device, scale.torch_dtype)
    noise, features = network_inputs(scale.network, scale.short, VALID_TEXT, scale.device, scale.torch_dtype)
    cond = model.conditioning(features, guidance=GUIDANCE)
    settings = Sampling(num_steps=scale.num_steps, cfg=1.0, seed=0, shift=7.0, sampler="euler")
    curve = measure_curve(model, cond, None, noise.shape, settings)  # a run of every step, which is not timed
    answers: list[Tensor] = []
    found: dict[str, Any] = {"steps": scale.num_steps}
    whole = 0.0  # the first way's seconds
    ways = {"off": None, "first_block": StepCache.preset("first_block", "fast")}
    ways |= {f"magcache {how}": StepCache.preset("magcache", how, curve=curve) for how in ("careful", "fast")}
    for name, cache in ways.items():
        run = model if cache is None else model.with_tricks(Tricks(cache=cache))
        with counted(run) as count, torch.inference_mode():
            seconds = seconds_of(
                lambda run=run: answers.append(sample_latents(run, cond, None, noise.shape, settings)), scale.device
            )
        whole = seconds if cache is None else whole
        found[name] = {
            "seconds": figure(seconds),
            "times_faster": round(whole / seconds, 3),
            "skipped": round(count.skipped, 3),
            "difference": difference(answers[-1], answers[0])["relative"],
        }
    return found


def streamed_from_file(scale: Scale) -> dict[str, Any]:
    """A float8 checkpoint whose blocks are read from the file as they run, and the same one resident."""
    return _streamed(scale, {"resident": {"stream": False}, "streamed": {"stream": True}})


def streamed_from_pinned(scale: Scale) -> dict[str, Any]:
    """The same checkpoint in pinned memory, with as many blocks on the card as a budget for weights allows."""
    ways: dict[str, dict[str, Any]] = {"resident": {"stream": False}}
    for gib in scale.budgets_gib:
        ways[f"{gib:g} GiB"] = {"stream": True, "budget": int(gib * GIB)}
    return _streamed(scale, ways)


def _streamed(scale: Scale, ways: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One step of the middle size for each way to load a network; the first is what the others are held against."""
    from ..vidgen_core.model import load_network
    from .compare import difference

    found: dict[str, Any] = {}
    answers: list[Tensor] = []
    with tempfile.TemporaryDirectory(prefix="vidgen-gpu-", dir=_roomy_folder()) as place:
        path = Path(place) / "network.safetensors"
        found["checkpoint_gib"] = round(write_checkpoint(path, scale.network) / GIB, 2)
        for name, choices in ways.items():
            forget(scale.device)
            model = load_network(path, device=scale.device, **choices)
            (step,) = _steps(scale, model, scale.middle)
            answers.append(step().float())
            seconds = seconds_of(step, scale.device)
            found[name] = {
                "seconds": figure(seconds),
                "peak_gib": peak_gib(scale.device),
                "difference": difference(answers[-1], answers[0])["relative"],
            }
            del model, step
    return found


def streamed_profile(scale: Scale) -> dict[str, Any]:
    """Copies of blocks beside the computing of one step of the middle size, drawn; nothing stays on the card."""
    import torch

    from ..vidgen_core.model import load_network
    from .streaming import PICTURE, draw_forward

    with tempfile.TemporaryDirectory(prefix="vidgen-gpu-", dir=_roomy_folder()) as place:
        path = Path(place) / "network.safetensors"
        write_checkpoint(path, scale.network)
        model = load_network(path, device=scale.device, stream=True)
        (step,) = _steps(scale, model, scale.middle)
        report = draw_forward(step, model, torch.device(scale.device), scale.folder)
    return {"picture": PICTURE, **report}


def _roomy_folder() -> Path | None:
    """Main memory where it is a folder, so that the disk is not what is measured."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else None


def decoded_in_tiles(scale: Scale) -> dict[str, Any]:
    """The longest video with the published tiles. One pass would hold tensors of 30 GiB at 720p, several at a time."""
    import torch

    from ..vidgen_core.tiling import Tiling, tiled

    codec, latents = _random_codec(scale)
    tiling = Tiling(tile_px=scale.tile_px, stride_px=scale.tile_px * 3 // 4)
    decoder = tiled(codec, tiling)
    forget(scale.device)
    videos: list[Tensor] = []
    with torch.inference_mode():
        seconds = seconds_of(lambda: videos.append(decoder.decode(latents)), scale.device)
    return {
        "seconds": figure(seconds),
        "video": list(videos[0].shape[2:]),
        "peak_gib": peak_gib(scale.device),
        "finite": bool(videos[0].isfinite().all()),
    }


def decoded_exactly(scale: Scale) -> dict[str, Any]:
    """The same video with the result of one pass, in a bounded part of the card."""
    import torch

    from ..vidgen_core.bounded import exact

    codec, latents = _random_codec(scale)
    spill = "ram" if scale.device == "cuda" else None
    decoder = exact(codec, int(scale.decode_budget_gib * GIB), spill=spill)
    forget(scale.device)
    videos: list[Tensor] = []
    with torch.inference_mode():
        seconds = seconds_of(lambda: videos.append(decoder.decode(latents)), scale.device)
    return {
        "seconds": figure(seconds),
        "budget_gib": scale.decode_budget_gib,
        "peak_gib": peak_gib(scale.device),
        "finite": bool(videos[0].isfinite().all()),
    }


def decoded_by_peer(scale: Scale) -> dict[str, Any]:
    """diffusers with ``enable_tiling()``: tiles of 256 px and 16 frames."""
    import torch

    from .compare_hunyuan import diffusers_vae

    codec, latents = _random_codec(scale)
    twin = diffusers_vae(scale.codec)
    twin.load_state_dict(codec.vae.state_dict())
    twin.to(scale.device, scale.torch_dtype).eval().requires_grad_(False)
    del codec
    side, stride = scale.tile_px, scale.tile_px * 3 // 4
    twin.enable_tiling(side, side, 16, stride, stride, 12)
    forget(scale.device)
    with torch.no_grad():
        seconds = seconds_of(lambda: twin.decode(latents / scale.codec.scaling_factor), scale.device)
    return {"seconds": figure(seconds), "peak_gib": peak_gib(scale.device)}


def _random_codec(scale: Scale) -> tuple[Any, Tensor]:
    import torch

    from ..vidgen_core.families.hunyuan.codec import HunyuanCodec
    from ..vidgen_core.families.hunyuan.vae import CausalVAE
    from .compare_parts import random_latents

    torch.manual_seed(0)
    vae: nn.Module = CausalVAE(scale.codec).to(scale.device, scale.torch_dtype).eval().requires_grad_(False)
    latents = random_latents(scale.codec, scale.long, scale.device, scale.torch_dtype)
    return HunyuanCodec(vae, scale.codec), latents  # type: ignore[arg-type]


def _tflops(flops: float, seconds: float) -> float:
    return figure(flops / seconds / 1e12)


@dataclass(frozen=True, slots=True)
class Item:
    """One line of the list."""

    title: str
    measure: Callable[[Scale], dict[str, Any]] | None
    """None: the list looks for what it needs, and cannot measure it yet"""
    seconds: float = 0.0
    """that a card of an H200's class needs; it is left out where less is left"""
    needs: str | None = None
    """a module of this package, beginning with a dot, or a library; without it the item cannot be done"""


ITEMS: Mapping[str, Item] = {
    "rate": Item("dense matrix products", matmul_rate, 15),
    "step_540p": Item("one step at 544x960x129, bf16", step_of("middle"), 40),
    "step_720p": Item("one step at 720x1280x129, bf16", step_of("long"), 75),
    "peer_540p": Item("diffusers' masked attention beside it, 544x960x129", peer_of("middle"), 75, "diffusers"),
    "decode_tiled": Item("720x1280x129 decoded in published tiles", decoded_in_tiles, 45),
    "decode_peer": Item("720x1280x129 decoded by diffusers' tiling", decoded_by_peer, 50, "diffusers"),
    "fp8": Item("float8 products at 320x512x61 (10 304 tokens)", float8_linears, 25, ".vidgen_core.memory.place"),
    "attention": Item("every attention kernel at 544x960x129", attention_backends, 60, ".vidgen_core.nn.backends"),
    "compile": Item("compiled blocks at 320x512x61", compiled_blocks, 60, ".vidgen_core.memory.compiled"),
    "decode_exact": Item("720x1280x129 decoded exactly in bounded memory", decoded_exactly, 60, ".vidgen_core.bounded"),
    "stream_pinned": Item(
        "float8 blocks in pinned memory under three budgets, 544x960x129",
        *(streamed_from_pinned, 90, ".vidgen_core.memory.place"),
    ),
    "stream_file": Item("float8 blocks read from the file, 544x960x129", streamed_from_file, 60),
    "stream_profile": Item("a picture of float8 blocks on their way, 544x960x129", streamed_profile, 60),
    "peer_720p": Item("diffusers' masked attention beside it, 720x1280x129", peer_of("long"), 150, "diffusers"),
    "step_cache": Item("12 steps with a cache at 320x512x61", cached_steps, 60, ".vidgen_core.caching"),
    "cogvideox": Item(
        "CogVideoX-5B beside diffusers: a step and a decode at 480x720x49, bf16",
        *(gpu_cogvideox.beside_peer, 60, "diffusers"),
    ),
    "svd": Item("Stable Video Diffusion", None, needs=".vidgen_core.families.svd"),
}
"""in the order of their worth, as time may run out"""


# ---------------------------------------------------------------------------------------------
# running them


def missing(item: Item) -> str | None:
    """Why an item cannot be measured here, or None."""
    if item.needs is not None and item.needs.startswith("."):
        root = (__package__ or "").rpartition(".")[0]
        if not _exists(root + item.needs):
            return f"not built yet: {item.needs.removeprefix('.')}"
    elif item.needs is not None and not _exists(item.needs):
        return f"not installed: {item.needs}"
    return "not measured yet: its module is there, this list does not use it" if item.measure is None else None


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def run_here(item: Item, scale: Scale) -> dict[str, Any]:
    assert item.measure is not None
    return {"status": "done", **item.measure(scale)}


def run_apart(command: Sequence[str], limit: float) -> dict[str, Any]:
    """What a process prints as its last line, or how it ended without."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"status": f"stopped after {limit:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"status": f"failed with exit code {done.returncode}", "log": done.stderr.splitlines()[-12:]}
    return json.loads(lines[-1])


def run_all(folder: Path, names: Sequence[str], *, dry: bool, minutes: float) -> dict[str, Any]:
    """All items, and the report after each one in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * minutes
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "device": _device(dry),
        "dry_run": dry,
        "items": {},
    }
    write(folder, report)
    scale = dry_scale(folder) if dry else None
    for name in names:
        item, left = ITEMS[name], ends - time.monotonic()
        started = time.monotonic()
        reason = missing(item)
        if reason is not None:
            found: dict[str, Any] = {"status": reason}
        elif scale is not None:
            found = run_here(item, scale)
        elif left < item.seconds:
            found = {"status": f"no time left: needs {item.seconds:.0f} s of {left:.0f}"}
        else:
            command = [sys.executable, "-m", f"{__package__}.gpu", f"--once={name}", str(folder)]
            found = run_apart(command, left)
        report["items"][name] = {"title": item.title, **found, "took_s": round(time.monotonic() - started, 1)}
        report["against_rate"] = against_rate(report["items"])
        write(folder, report)
        print(f"{name}: {found['status']}", flush=True)
    return report


def against_rate(items: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Each step's rate as a share of the card's dense bfloat16 rate in the same job."""
    rate = items.get("rate", {}).get("bf16_tflops")
    return {name: round(item["tflops"] / rate, 3) for name, item in items.items() if rate and "tflops" in item}


def _device(dry: bool) -> dict[str, Any]:
    import torch

    if dry or not torch.cuda.is_available():
        return {"name": "cpu", "torch": torch.__version__}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 1),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """``gpu.json`` and ``gpu.md``, each whole at every moment."""
    save_json(folder / "gpu.json", dict(report))
    with atomic_path(folder / "gpu.md") as temporary:
        temporary.write_text(markdown(report), encoding="utf-8")


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    device = ", ".join(f"{name} {value}" for name, value in report["device"].items())
    lines = [
        "# Published sizes on a GPU" + (" (a dry run: tiny sizes, CPU)" if report["dry_run"] else ""),
        "",
        f"{report['date']}, commit {report['commit']}, {device}.",
        "",
        "| item | status | figures | took |",
        "|---|---|---|---|",
    ]
    for item in report["items"].values():
        figures = {key: value for key, value in item.items() if key not in ("title", "status", "took_s", "log")}
        told = "; ".join(f"{key} {_told(value)}" for key, value in figures.items())
        lines.append(f"| {item['title']} | {item['status']} | {told} | {item['took_s']} s |")
    shares = report.get("against_rate") or {}
    if shares:
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        lines += ["", f"Of the dense bfloat16 rate measured in this job: {told}."]
    return "\n".join(lines) + "\n"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _one_thread(dry: bool) -> Iterator[None]:
    """Tiny tensors are slower on many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if dry else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("gpu_results"), help="where results go")
    parser.add_argument("--dry-run", action="store_true", help="every item at a tiny size on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all items (default {MINUTES})")
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=tuple(ITEMS), metavar="ITEM")
    parser.add_argument("--once", choices=ITEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.once is not None:
        print(json.dumps(run_here(ITEMS[arguments.once], full_scale(arguments.folder))))
        return
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. What to do: add --dry-run, or run this where there is one.")
    with _one_thread(arguments.dry_run):
        run_all(arguments.folder, arguments.only, dry=arguments.dry_run, minutes=arguments.minutes)
    print(f"written to {arguments.folder / 'gpu.json'} and gpu.md")


if __name__ == "__main__":
    main()
