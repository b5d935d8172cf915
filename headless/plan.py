"""``vidgen plan``: what a workflow will take, read from its nodes; the same plan for a render that has a budget, and
for a page that shows it while widgets change."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import Cancelled, SettingsError, UserError
from .executor import Prompt, as_link, check_shape, coerce, describe, input_specs, value_problems
from .graph import is_widget

if TYPE_CHECKING:
    import torch

    from ..nodes.host import NodeHost
    from ..vidgen_core.families import Found
    from ..vidgen_core.memory.host import LocalHost
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

    from ..nodes.host import LocalNodeHost
    from ..vidgen_core.memory.host import default_device
    from ..vidgen_core.planning import Planner

    headers, found = model_files(prompt, LocalNodeHost(folders=list(folders)))
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
    return plan.to_dict() | {"nearest": nearest_sizes(plan, planner, asked)}


def nearest_sizes(plan: Plan, planner: Planner, asked: Wish) -> list[dict[str, int]]:
    """Sizes that fit where a plan does not."""
    nearest = [] if plan.fits else planner.nearest(asked, plan.budget_bytes)
    return [{"frames": one.num_frames, "width": one.width_px, "height": one.height_px} for one in nearest]


# --- for a page -------------------------------------------------------------------------------------------------------

MAX_NODES = 5000
MAX_SAMPLERS = 4
"""of one workflow; those after them have no plan"""
MAX_WAITING = 8
SEARCH_S = 30.0
"""for sizes that fit, where the asked one does not"""
_MAX_PLANNERS = 4
_MAX_ANSWERS = 200
"""of one planner, which keeps what it found out of every size"""

BADGES = {
    "VidGenLoadAll": "all",
    "VidGenLoadModel": "all",
    "VidGenSampler": "sample",
    "VidGenDecode": "decode",
    "VidGenDecodeSave": "decode",
}
"""class -> the stage of a plan that its node shows"""
_LOADERS = frozenset({"VidGenLoadAll", "VidGenLoadModel", "VidGenLoadVAE", "VidGenLoadTextEncoders"})


class Plans:
    """Answers a page that asks again and again, one question at a time: planners and their findings are kept."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._planners: OrderedDict[object, tuple[Planner, int]] = OrderedDict()
        self._baselines: dict[str, int] = {}
        self._search: LocalHost | None = None
        """stops looking for sizes that fit"""

    def answer(self, body: object) -> dict[str, Any]:
        """What ``POST /vidgen/plan`` answers, under the host of :func:`~vidgen.nodes.host.current`.

        Args:
            body: ``{"prompt": a workflow in API format, "nearest": whether to look for sizes that fit}``.

        Returns:
            ``{"plans": [...]}``, one for each sampler: ``badges`` (node id -> stage) beside ``Plan.to_dict`` and
            ``nearest``; or beside ``problem``, the parts of an error, where the workflow cannot run as it is. Nodes
            that are not ours are passed over.

        Raises:
            UserError: the body is no such request, or it asks for too much.
        """
        prompt = body.get("prompt") if isinstance(body, Mapping) else None
        if prompt is None:
            raise SettingsError("The request has no workflow", expected='{"prompt": a workflow in API format}')
        check_shape(prompt)
        if len(prompt) > MAX_NODES:
            raise SettingsError(
                "The workflow is too large", given=f"{len(prompt)} nodes", expected=f"up to {MAX_NODES}"
            )
        is_thorough = isinstance(body, Mapping) and body.get("nearest") is True
        samplers = [node_id for node_id, node in prompt.items() if node.get("class_type") == "VidGenSampler"]
        with self._in_turn():
            return {"plans": [self._told(around(prompt, one), is_thorough) for one in samplers[:MAX_SAMPLERS]]}

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._waiting.acquire(blocking=False):
            raise SettingsError("Too many plans are asked for at once", expected=f"up to {MAX_WAITING}")
        try:
            if (search := self._search) is not None:
                search.cancel()
            with self._turn:
                yield
        finally:
            self._waiting.release()

    def _told(self, prompt: Prompt, is_thorough: bool) -> dict[str, Any]:
        classes = {node_id: str(node["class_type"]) for node_id, node in prompt.items()}
        badges = {node_id: BADGES[name] for node_id, name in classes.items() if name in BADGES}
        try:
            read = read_values(prompt)
            planner, asked = self._planner(read)
            alone = planner.frames_alone(asked)
            plan = planner.plan(asked) if alone.fits else alone
            nearest = self._nearest(plan, planner, asked) if is_thorough else []
        except UserError as error:
            return {"badges": badges, "problem": error.parts()}
        return {"badges": badges, **plan.to_dict(), "nearest": nearest}

    def _nearest(self, plan: Plan, planner: Planner, asked: Wish) -> list[dict[str, int]]:
        """An empty list where the next question comes before they are found, or where it takes too long."""
        from ..vidgen_core.memory.cancel import listening
        from ..vidgen_core.memory.host import LocalHost

        self._search = search = LocalHost()
        limit = threading.Timer(SEARCH_S, search.cancel)
        limit.start()
        try:
            with listening(search):
                return nearest_sizes(plan, planner, asked)
        except Cancelled:
            return []
        finally:
            limit.cancel()
            self._search = None

    def _planner(self, prompt: Prompt) -> tuple[Planner, Wish]:
        """The planner for the files of a workflow, and what the workflow wants."""
        from ..nodes.host import current
        from ..vidgen_core.planning import Planner

        host = current()
        device = host.device()
        headers, found = model_files(prompt, host)
        files = tuple((part, header.path, Path(header.path).stat().st_mtime_ns) for part, header in headers.items())
        key = (files, str(device))
        planner, times = self._planners.pop(key, (None, 0))
        if planner is None or times >= _MAX_ANSWERS:
            planner, times = Planner(headers, found, device=device, baseline_bytes=self._baseline(device)), 0
        self._planners[key] = planner, times + 1
        while len(self._planners) > _MAX_PLANNERS:
            self._planners.popitem(last=False)
        return planner, wish(prompt, headers, found)

    def _baseline(self, device: torch.device) -> int:
        """What this process takes without models. It may hold some from the run before, which the next run uses or
        drops: so it is the least that was ever seen."""
        from ..vidgen_core.memory.host import memory_in_use
        from ..vidgen_core.planning import library_bytes

        now = memory_in_use(device) + library_bytes(device)
        self._baselines[str(device)] = least = min(now, self._baselines.get(str(device), now))
        return least


answer = Plans().answer
"""one for the process: ComfyUI's server and ours ask the same"""


def around(prompt: Prompt, sampler: str) -> Prompt:
    """The nodes of the pack that a sampler needs, the nearest first, then those that its result goes to with theirs;
    but no other sampler that only has a node in common with it."""
    from .. import NODE_CLASS_MAPPINGS

    readers: dict[str, list[str]] = {}
    for node_id, node in prompt.items():
        for link in filter(None, map(as_link, node.get("inputs", {}).values())):
            readers.setdefault(link.node_id, []).append(node_id)
    reached, coming = set(), [sampler]
    while coming:
        for node_id in readers.get(coming.pop(), ()):
            if node_id not in reached and prompt[node_id].get("class_type") != "VidGenSampler":
                reached.add(node_id)
                coming.append(node_id)
    after = [node_id for node_id in prompt if node_id in reached]
    chosen = dict.fromkeys((*_upstream(prompt, sampler), *_upstream(prompt, *after, but="VidGenSampler")))
    return {node_id: prompt[node_id] for node_id in chosen if prompt[node_id].get("class_type") in NODE_CLASS_MAPPINGS}


def read_values(prompt: Prompt) -> Prompt:
    """The nodes with their values as the types of their widgets; a widget that is fed by a link is left out.

    Raises:
        SettingsError: a value that its widget would not take, or a file that comes through a link.
    """
    from .. import NODE_CLASS_MAPPINGS

    read = {}
    for node_id, node in prompt.items():
        cls, where = NODE_CLASS_MAPPINGS[node["class_type"]], describe(prompt, node_id)
        inputs = {name: value for name, value in node.get("inputs", {}).items() if value is not None}
        for name, kind, _, _ in input_specs(cls):
            value = inputs.get(name, "")
            if isinstance(kind, list) and not isinstance(value, str) and as_link(value) is None:
                raise SettingsError(f"{where}, {name}: the value cannot be read", given=value, expected="a name")
        for problem in value_problems(cls, inputs):
            at = f"{where}, {problem.input_name}" if problem.input_name else where
            raise SettingsError(f"{at}: {problem.message}", given=problem.received)
        values = {}
        for name, kind, options, required in input_specs(cls):
            value = inputs.get(name)
            if not is_widget(kind, options):
                values |= {} if value is None else {name: value}
            elif value is not None and as_link(value) is None:
                values[name] = coerce(kind, value)
            elif required and node["class_type"] in _LOADERS:
                raise SettingsError(f"{where}: it is not known which {name} it will be")
        read[node_id] = {"class_type": node["class_type"], "inputs": values}
    return read


# --- which files ------------------------------------------------------------------------------------------------------


def model_files(prompt: Prompt, host: NodeHost) -> tuple[dict[str, Header], dict[str, Found]]:
    """(part -> header, part -> what it is) of what the loaders of a workflow will load."""
    from ..vidgen_core.bundle import find_parts

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

    for part, loader in (("network", "Load Model"), ("codec", "Load VAE")):
        if part not in found:
            raise SettingsError(f"No node of this workflow loads a {part}", expected=f"Load All, or {loader}")
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
    takes_pictures = not OF_PICTURES.isdisjoint(classes)
    # A network that fills in is told its pictures as a whole video.
    fills_in = family.keyframes.fills_in(found["network"].config)
    encodes_video = "VidGenEncodeVideo" in classes or (takes_pictures and fills_in)
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
        encodes_frames=shape.num_frames if encodes_video else int(takes_pictures),
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


def _upstream(prompt: Prompt, *node_ids: str, but: str = "") -> Iterator[str]:
    """The nodes and what feeds them, the nearest first; not through nodes of the class ``but``."""
    seen, coming = set(node_ids), list(node_ids)
    while coming:
        current = coming.pop(0)
        if current not in prompt or (but and prompt[current].get("class_type") == but):
            continue
        yield current
        for value in prompt[current].get("inputs", {}).values():
            link = as_link(value)
            if link is not None and link.node_id not in seen:
                seen.add(link.node_id)
                coming.append(link.node_id)
