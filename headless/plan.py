"""``vidgen plan``: what a workflow will take, read from its nodes; and the same plan for a render that has a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import SettingsError
from .executor import Prompt, as_link

if TYPE_CHECKING:
    import torch

    from ..vidgen_core.families import Found
    from ..vidgen_core.memory.plan import Plan
    from ..vidgen_core.planning import Planner, Wish
    from ..vidgen_core.weights.header import Header

CHARACTERS_PER_TOKEN = 4
"""of English; a few tokens more or less do not show beside a video's"""


def plan_prompt(
    prompt: Prompt,
    *,
    budget_bytes: int | None = None,
    device: str | None = None,
    folders: Sequence[Path] = (),
) -> tuple[Plan, Planner, Wish]:
    """The plan of a workflow in API format, what made it, and what the workflow wants.

    Raises:
        UserError: a file is not there, or the workflow makes no video with these nodes.
    """
    import torch

    from ..vidgen_core.memory.host import default_device
    from ..vidgen_core.planning import Planner

    headers, found = model_files(prompt, folders)
    on = torch.device(device) if device is not None else default_device()
    planner = Planner(headers, found, device=on)
    asked = wish(prompt, headers, found)
    return planner.plan(asked, budget_bytes), planner, asked


def plan_that_fits(prompt: Prompt, *, budget_bytes: int, device: str | None, folders: Sequence[Path]) -> Plan:
    """The plan of a workflow that keeps to its budget.

    Raises:
        UserError: nothing fits, with what would; or as :func:`plan_prompt`.
    """
    planned, planner, asked = plan_prompt(prompt, budget_bytes=budget_bytes, device=device, folders=folders)
    return planned if planned.fits else planner.check(asked, planned.budget_bytes)


def plan_dict(
    prompt: Prompt, *, budget_bytes: int | None = None, device: str | None = None, folders: Sequence[Path] = ()
) -> dict[str, Any]:
    """:func:`plan_prompt` as plain values, with ``nearest``: sizes that fit where this one does not."""
    plan, planner, asked = plan_prompt(prompt, budget_bytes=budget_bytes, device=device, folders=folders)
    nearest = [] if plan.fits else planner.nearest(asked, plan.budget_bytes)
    sizes = [{"frames": one.num_frames, "width": one.width_px, "height": one.height_px} for one in nearest]
    return plan.to_dict() | {"nearest": sizes}


# --- which files ------------------------------------------------------------------------------------------------------


def model_files(prompt: Prompt, folders: Sequence[Path]) -> tuple[dict[str, Header], dict[str, Found]]:
    """(part -> header, part -> what it is) of what the loaders of a workflow will load."""
    from ..nodes.host import LocalNodeHost
    from ..vidgen_core.bundle import find_parts

    host = LocalNodeHost(folders=list(folders))
    sampler = _one_of(prompt, "VidGenSampler", "VidGenDecode", "VidGenEncodeVideo", "VidGenEncodePrompt")
    near = [prompt[node_id] for node_id in _upstream(prompt, sampler)] + list(prompt.values())
    for node in near:
        if node.get("class_type") == "VidGenLoadAll":
            return find_parts(host.find_model_folder(str(node["inputs"]["model_folder"])))
    named = {"VidGenLoadModel": ("network", "model_name"), "VidGenLoadVAE": ("codec", "vae_name")}
    paths = {}
    for node in near:
        kind, name = named.get(str(node.get("class_type")), (None, ""))
        if kind is not None:
            paths.setdefault(kind, host.find(kind, str(node["inputs"][name])))
        if node.get("class_type") == "VidGenLoadTextEncoders":
            inputs = node["inputs"]
            chosen = (("text", "text_name"), ("text", "second_name"), ("vision", "vision_name"))
            for kind, name in chosen:
                if inputs.get(name, "none") != "none":
                    paths.setdefault(name, host.find(kind, str(inputs[name])))
    if not paths:
        raise SettingsError("No node of this workflow loads a model", expected="Load All, or Load Model and Load VAE")
    return find_parts(list(dict.fromkeys(paths.values())))


# --- what is wanted ---------------------------------------------------------------------------------------------------

OF_PICTURES = {"VidGenImageToVideo", "VidGenKeyframesToVideo"}
"""nodes that encode single pictures"""


def wish(prompt: Prompt, headers: Mapping[str, Header], found: Mapping[str, Found]) -> Wish:
    """What a workflow makes, as far as its widgets say it; the checkpoint's defaults stand for the rest."""
    from ..vidgen_core.model import defaults_of
    from ..vidgen_core.planning import Wish
    from ..vidgen_core.types import VideoShape

    defaults = defaults_of(headers["network"], found["network"])
    sampler = prompt[_one_of(prompt, "VidGenSampler")]["inputs"]
    latent = as_link(sampler.get("latent"))
    sources = list(_upstream(prompt, latent.node_id)) if latent else []
    size = _first_numbers(prompt, sources, {"width": "width", "height": "height"})
    frames = _first_numbers(prompt, sources, {"num_frames": "frames", "max_frames": "frames"})
    batch = _first_numbers(prompt, sources, {"batch_size": "videos"})
    shape = VideoShape(
        num_frames=frames.get("frames") or defaults.num_frames,
        height_px=size.get("height") or defaults.height_px,
        width_px=size.get("width") or defaults.width_px,
    )
    family = found["network"].family
    shape = shape.nearest(family.grid(found["codec"].config), patch=family.patch(found["network"].config))
    classes = {str(prompt[node_id].get("class_type")) for node_id in sources}
    cfg = sampler.get("cfg") or defaults.cfg
    heun = (sampler.get("sampler") or defaults.sampler) == "heun"
    denoise = sampler.get("denoise", 1.0)
    return Wish(
        shape=shape,
        num_videos=batch.get("videos", 1),
        num_steps=max(1, round((sampler.get("steps") or defaults.num_steps) * (denoise or 1.0))),
        evaluations=2.0 if heun else 1.0,
        guided=cfg != 1.0,
        may_batch=bool(sampler.get("cfg_batched", True)),
        num_text_tokens=_text_tokens(prompt),
        dtype=_dtype(prompt),
        storage=_widget(prompt, "storage", "auto"),
        encodes_frames=shape.num_frames if "VidGenEncodeVideo" in classes else int(not OF_PICTURES.isdisjoint(classes)),
    )


def _dtype(prompt: Prompt) -> torch.dtype | None:
    import torch

    name = _widget(prompt, "weight_dtype", "auto")
    return None if name == "auto" else getattr(torch, name)


def _widget(prompt: Prompt, name: str, default: str) -> str:
    """What the loader of the network says."""
    loaders = ("VidGenLoadAll", "VidGenLoadModel")
    values = [node["inputs"].get(name) for node in prompt.values() if node.get("class_type") in loaders]
    return next((str(value) for value in values if isinstance(value, str)), default)


def _text_tokens(prompt: Prompt) -> int:
    texts = [
        str(node["inputs"].get("prompt", ""))
        for node in prompt.values()
        if node.get("class_type") == "VidGenEncodePrompt"
    ]
    return max((2 + -(-len(text) // CHARACTERS_PER_TOKEN) for text in texts), default=64)


def _first_numbers(prompt: Prompt, nodes: Sequence[str], names: Mapping[str, str]) -> dict[str, int]:
    """The first whole number above 0 that a widget of these names has, from the sampler upwards."""
    found: dict[str, int] = {}
    for node_id in nodes:
        for name, value in prompt[node_id].get("inputs", {}).items():
            if name in names and type(value) is int and value > 0:
                found.setdefault(names[name], value)
    return found


def _one_of(prompt: Prompt, *class_types: str) -> str:
    for class_type in class_types:
        for node_id, node in prompt.items():
            if node.get("class_type") == class_type:
                return node_id
    raise SettingsError(
        "There is nothing to plan for in this workflow",
        expected="a node " + " or ".join(class_types).replace("VidGen", ""),
    )


def _upstream(prompt: Prompt, node_id: str) -> Iterator[str]:
    """The node and what feeds it, the nearest first."""
    seen, coming = {node_id}, [node_id]
    while coming:
        current = coming.pop(0)
        if current not in prompt:
            continue
        yield current
        for value in prompt[current].get("inputs", {}).values():
            link = as_link(value)
            if link is not None and link.node_id not in seen:
                seen.add(link.node_id)
                coming.append(link.node_id)
