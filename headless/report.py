"""What a file is (``vidgen inspect``) and what this machine can do (``vidgen doctor``): facts, then lines of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..vidgen_core.errors import UserError

MEDIA = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif", ".webp"})
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "gguf",
    "imageio-ffmpeg",
    "numpy",
    "pillow",
)
FP8_CAPABILITY = (8, 9)  # Ada and Hopper: the first with fp8 matrix units


# --- inspect --------------------------------------------------------------------------------------------------------


def inspection(path: Path) -> dict[str, Any]:
    """What a checkpoint, a LoRA, a kept run or a video is. Raises UserError for a file that is none of them."""
    if path.suffix.lower() in MEDIA:
        return _inspect_video(path)
    from ..vidgen_core.model import inspect_header, inspect_lora
    from ..vidgen_core.weights.header import read_header
    from ..vidgen_core.weights.lora import holds_lora

    header = read_header(path)
    if holds_lora(header.tensors):
        return {"kind": "LoRA"} | inspect_lora(header)
    if header.metadata.get("vidgen.part") == "sampler_state":
        return _inspect_run(path)
    return {"kind": "checkpoint"} | inspect_header(header)


def _inspect_video(path: Path) -> dict[str, Any]:
    import json

    from ..vidgen_core.media import read_metadata, read_video

    frames, fps = read_video(path)
    tags = read_metadata(path)
    num_frames, height, width, _ = frames.shape
    info: dict[str, Any] = {"kind": "video", "path": str(path), "num_bytes": path.stat().st_size}
    info |= {"num_frames": num_frames, "width_px": width, "height_px": height, "fps": fps, "tags": sorted(tags)}
    if "prompt" in tags:
        info["prompt"] = json.loads(tags["prompt"])
    return info


def _inspect_run(path: Path) -> dict[str, Any]:
    from ..vidgen_core.sampling import SamplerState

    state = SamplerState.load(path)
    assert state.ts is not None
    return {
        "kind": "unfinished run",
        "path": str(path),
        "sampler": state.sampler,
        "step": state.step,
        "num_steps": len(state.ts) - 1,
        "seeds": list(state.seeds),
    }


def inspect_lines(info: dict[str, Any]) -> Iterator[str]:
    """For people."""
    yield info["path"]
    if info["kind"] == "video":
        size = f"{info['width_px']} x {info['height_px']} px"
        yield f"  video: {info['num_frames']} frames of {size}, {info['fps']:g} per second"
        yield f"  tags: {', '.join(info['tags']) or 'none, so no workflow can be restored from it'}"
        for node in info.get("prompt", {}).values():
            if isinstance(text := node.get("inputs", {}).get("prompt"), str) and text:
                yield f"  {node.get('_meta', {}).get('title', node['class_type'])}: {text}"
        return
    if info["kind"] == "unfinished run":
        steps = f"{info['step']} of {info['num_steps']} steps"
        yield f"  unfinished run: {steps} with {info['sampler']}, seeds {info['seeds']}"
        yield "  the command that began it goes on from here"
        return
    dtypes = ", ".join(f"{name} {count / info['num_parameters']:.0%}" for name, count in info["dtypes"].items())
    if info["kind"] == "LoRA":
        yield from _lora_lines(info)
    else:
        layout = "" if info["layout"] == "native" else f", in the layout of {info['layout']}"
        yield f"  {info['title']}{layout}"
    yield f"  {quantity(info['num_parameters'])} parameters in {info['num_tensors']} tensors ({dtypes})"
    yield f"  {size_text(info['num_bytes'])}, fingerprint {info['fingerprint']}"
    for name in ("config", "defaults"):
        if name in info:
            yield f"  {name}"
            yield from _table(info[name])
    for key in ("title", "license", "date", "author"):
        if value := info["metadata"].get(f"modelspec.{key}"):
            yield f"  {key}: {value}"


def _lora_lines(info: dict[str, Any]) -> Iterator[str]:
    yield f"  {info['title']}: {info['dialect']}"
    factors = (f"{name} {', '.join(f'{value:g}' for value in info[f'{name}s'])}" for name in ("rank", "alpha"))
    yield f"  changes {info['num_modules']} modules" + (", " + ", ".join(factors) if info["ranks"] else "")
    if info["made_for"]:
        yield f"  made for: {info['made_for']}"
    if unmatched := info["unmatched"]:
        yield f"  {len(unmatched)} tensors belong to no module that is known here, such as {unmatched[0]}"


def _table(values: dict[str, Any]) -> Iterator[str]:
    """The plain values on one line, a line for each table inside."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if plain:
        yield "    " + _listed(plain)
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"    {key}: {_listed(value)}"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: object) -> str:
    text = " x ".join(map(str, value)) if isinstance(value, list | tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def quantity(number: float) -> str:
    """``12.8 billion``, ``3.1 million``, ``950``"""
    for step, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= step:
            return f"{number / step:.1f}{unit}"
    return f"{number:.0f}"


def size_text(num_bytes: float) -> str:
    """``26.1 GB``, in powers of 1000 as disks are sold."""
    for step, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= step:
            return f"{num_bytes / step:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


# --- doctor ---------------------------------------------------------------------------------------------------------


def diagnosis() -> dict[str, Any]:
    """What is installed, what the machine has, and what does not work. Asks the devices; loads no model."""
    import torch

    from .. import __version__
    from ..vidgen_core.memory.host import available_cores, bundled_models

    total, free = memory_bytes()
    info: dict[str, Any] = {
        "vidgen": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": available_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": total,
        "free_memory_bytes": free,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": list(_devices()),
        "ffmpeg": _ffmpeg(),
        "models": {name: _model(folder) for name, folder in bundled_models().items()},
        "published": _published(),
    }
    info["problems"] = list(_problems(info))
    return info


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_bytes() -> tuple[int | None, int | None]:
    """(total, available) main memory, as far as the system and a container's limit tell."""
    total = free = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total = min(total or int(text), int(text))
        free = min(free or int(text), int(text) - used)
    return total, free


def _devices() -> Iterator[dict[str, Any]]:
    import torch

    yield {"name": "cpu", "title": platform.processor() or platform.machine(), "dtypes": ["float32", "bfloat16"]}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        dtypes = ["float32", "float16"]
        if torch.cuda.is_bf16_supported():
            dtypes.append("bfloat16")
        if torch.version.cuda and (properties.major, properties.minor) >= FP8_CAPABILITY:
            dtypes.append("float8")
        free, total = torch.cuda.mem_get_info(index)
        yield {
            "name": f"cuda:{index}",
            "title": properties.name,
            "dtypes": dtypes,
            "memory_bytes": total,
            "free_memory_bytes": free,
        }
    if torch.backends.mps.is_available():
        yield {"name": "mps", "title": "Apple GPU", "dtypes": ["float32", "float16", "bfloat16"]}


def _ffmpeg() -> dict[str, Any] | None:
    """Its path and version; None if there is none that runs."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return None
    import imageio_ffmpeg

    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run([path, "-version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (RuntimeError, OSError, subprocess.SubprocessError):
        return None
    from ..vidgen_core.media import writable

    return {"path": path, "version": said.split()[2], "writes": writable()}


def _model(folder: Path) -> dict[str, Any]:
    """Size and defaults of a bundled model, or the error that keeps it from loading."""
    from ..vidgen_core.bundle import find_parts
    from ..vidgen_core.model import inspect_header

    try:
        headers, _ = find_parts(folder)
        info = {part: inspect_header(header) for part, header in headers.items()}
    except UserError as error:
        return {"error": str(error)}
    return {
        "num_bytes": sum(part["num_bytes"] for part in info.values()),
        "num_parameters": {part: values["num_parameters"] for part, values in info.items()},
        "defaults": info["network"]["defaults"],
    }


def _published() -> dict[str, Any]:
    """What the published network of each family needs at its own defaults in a 2-byte dtype."""
    import torch

    from ..vidgen_core.families import FAMILIES
    from ..vidgen_core.types import VideoShape

    needs = {}
    for name, family in FAMILIES.items():
        config = family.parts["network"].config()
        with torch.device("meta"):
            network = family.parts["network"].build(config, {})
        defaults = family.defaults(config)
        shape = VideoShape(num_frames=defaults.num_frames, height_px=defaults.height_px, width_px=defaults.width_px)
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        needs[name] = {
            "title": family.title,
            "num_parameters": num_parameters,
            "weight_bytes": 2 * num_parameters,
            "activation_bytes": family.activation_bytes(config, shape),
            "shape": [defaults.num_frames, defaults.height_px, defaults.width_px],
        }
    return needs


def _problems(info: dict[str, Any]) -> Iterator[str]:
    for name, version in info["libraries"].items():
        if version is None:
            yield f"{name} is not installed: pip install {name}"
    if info["ffmpeg"] is None:
        yield "no ffmpeg that runs: pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
    if not info["models"]:
        yield "no model comes with this installation: install it again from a complete checkout"
    for name, model in info["models"].items():
        if "error" in model:
            yield f"the bundled {name} cannot be loaded: {model['error']}"


def doctor_lines(info: dict[str, Any]) -> Iterator[str]:
    """For people: what there is, what it is good for, what is wrong."""
    yield f"VidGen {info['vidgen']}, Python {info['python']}, {info['system']}"
    versions = (f"{name} {version or 'missing'}" for name, version in info["libraries"].items())
    yield "  libraries: " + ", ".join(versions)
    yield f"  processor: {info['cores']} cores, {info['torch_threads']} torch threads, {_memory(info)}"
    for device in info["devices"]:
        memory = f", {_memory(device)}" if "memory_bytes" in device else ""
        yield f"  {device['name']}: {device['title']}{memory}; {', '.join(device['dtypes'])}"
    ffmpeg = info["ffmpeg"]
    yield f"  ffmpeg: {ffmpeg['version'] + ' at ' + ffmpeg['path'] if ffmpeg else 'missing'}"
    for line in ffmpeg["writes"] if ffmpeg else ():
        yield f"    {line}"
    yield "What it can do"
    for name, model in info["models"].items():
        if "error" not in model:
            shape = "{num_frames} frames of {width_px} x {height_px} px".format(**model["defaults"])
            yield f"  {name} (bundled, {size_text(model['num_bytes'])}): {shape}, on the cpu too"
    for need in info["published"].values():
        yield f"  {_verdict(need, info['devices'])}"
    yield "Problems" if info["problems"] else "No problems found"
    for problem in info["problems"]:
        yield f"  {problem}"


def _memory(info: dict[str, Any]) -> str:
    if info["memory_bytes"] is None:
        return "memory unknown"
    free = info["free_memory_bytes"]
    return size_text(info["memory_bytes"]) + " memory" + ("" if free is None else f", {size_text(free)} free")


def _verdict(need: dict[str, Any], devices: list[dict[str, Any]]) -> str:
    """Whether a published network fits into one of the GPUs as a whole."""
    frames, height, width = need["shape"]
    total = need["weight_bytes"] + need["activation_bytes"]
    text = (
        f"{need['title']} ({quantity(need['num_parameters'])} parameters), {frames} frames of {width} x {height} px: "
    )
    text += f"about {size_text(total)} for the network in bfloat16; "
    fits = [device["name"] for device in devices if device.get("memory_bytes", 0) >= total]
    return text + (f"fits on {', '.join(fits)}" if fits else "no GPU here has that much")
