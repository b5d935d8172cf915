"""Turn an API-format prompt into a UI-format workflow, so that the video opens in ComfyUI as a readable graph.

API format is what runs (values and links by name); UI format is what the editor draws (positions, sizes,
numbered links, widget values in order): https://docs.comfy.org/specs/workflow_json
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .executor import Classes, Prompt, as_link, input_specs, order, output_names

CELL_PX = (360, 60)
"""gap-included column width, and the height of a node's title and margins"""
_NODE_WIDTH_PX = 300
_ROW_PX = 26  # one socket or one-line widget
_TEXT_PX = 110  # a multi-line text widget


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a shipped workflow tells beside its graph."""

    note: str
    """Markdown"""
    models: Sequence[Mapping[str, str]] = ()
    """name, url and directory of files that are not in the box: the editor offers to fetch what is missing"""


PACK_ID = "comfyui-vidgen"
"""the registry's name of this pack: ComfyUI-Manager offers it where our nodes are missing"""

_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
_SEEDS = frozenset({"seed", "noise_seed"})


_STAGES = {
    "loaders": "Model",
    "image": "Pictures",
    "conditioning": "Prompt",
    "latent": "Size and latents",
    "tricks": "Tricks",
    "sampling": "Sampling",
    "video": "Video",
}
"""last part of a node's category -> what its group is called"""
_COLOURS = ("#3f789e", "#8a8", "#b06634", "#88a", "#a1309b", "#8aa")
_PADDING_PX, _HEAD_PX, _FOOT_PX = 15, 80, 130
"""around the nodes of a group; above them for a node's and the group's own title; below them for what nodes grow by:
plans and previews"""


def to_ui(prompt: Prompt, classes: Classes, about: About | None = None) -> dict[str, Any]:
    """The UI-format workflow (version 0.4) of ``prompt``: a column per step, each node right of what it needs, and a
    group around the columns of a stage.

    Args:
        about: a note for people beside the graph, and where the files are that it loads.
    """
    ids = _number(prompt)
    depth = _depths(prompt)
    links: list[list[Any]] = []
    nodes = {node_id: _node(prompt, classes, node_id, ids) for node_id in prompt}
    for node_id in prompt:
        for slot, socket in enumerate(nodes[node_id]["inputs"]):
            link = as_link(prompt[node_id].get("inputs", {}).get(socket["name"]))
            if link is None:
                continue
            socket["link"] = len(links) + 1
            output = nodes[link.node_id]["outputs"][link.output]
            output["links"].append(socket["link"])
            links.append([socket["link"], ids[link.node_id], link.output, ids[node_id], slot, output["type"]])
    _place(nodes, depth)
    groups = _groups(prompt, classes, nodes, depth)
    drawn = sorted(nodes.values(), key=lambda node: node["id"])
    if about is not None:
        for node in drawn:
            known = [one for one in about.models if one["name"] in node["widgets_values"]]
            if known:
                node["properties"]["models"] = known
        first = groups[0]["bounding"]
        drawn.append(_note(about, max(ids.values(), default=0) + 1, first[1] + first[3] + _HEAD_PX))
    return {
        # The same prompt gives the same id, and so the same file.
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, repr(sorted(prompt.items(), key=lambda item: item[0])))),
        "revision": 0,
        "last_node_id": max((node["id"] for node in drawn), default=0),
        "last_link_id": len(links),
        "nodes": drawn,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _number(prompt: Prompt) -> dict[str, int]:
    """Whole numbers for the ids: the editor's are numbers, a prompt's may be any text (``12:3`` in subgraphs)."""
    taken = {int(node_id) for node_id in prompt if node_id.isdigit()}
    free = iter(n for n in range(1, len(prompt) + len(taken) + 1) if n not in taken)
    return {node_id: int(node_id) if node_id.isdigit() else next(free) for node_id in prompt}


def _depths(prompt: Prompt) -> dict[str, int]:
    """How many steps lie before each node, at most: its column."""
    depth: dict[str, int] = {}
    for node_id in order(prompt, list(prompt)):
        links = filter(None, map(as_link, prompt[node_id].get("inputs", {}).values()))
        depth[node_id] = max((depth[link.node_id] + 1 for link in links if link.node_id in depth), default=0)
    return depth


def is_widget(kind: Any, options: Mapping[str, Any]) -> bool:
    """Whether the editor draws this input as a widget and not only as a socket."""
    return (isinstance(kind, list) or kind in _WIDGET_TYPES) and not options.get("forceInput")


def widget_names(cls: type) -> list[str]:
    """The widgets of a node in the order of ``widgets_values``, with the extra one behind a seed."""
    names = []
    for name, kind, options, _ in input_specs(cls):
        if is_widget(kind, options):
            names.append(name)
            if has_seed_control(name, kind, options):
                names.append("control_after_generate")
    return names


def has_seed_control(name: str, kind: Any, options: Mapping[str, Any]) -> bool:
    """The editor puts a fixed/increment/randomize widget behind a seed."""
    return bool(options.get("control_after_generate", kind == "INT" and name in _SEEDS))


def _node(prompt: Prompt, classes: Classes, node_id: str, ids: Mapping[str, int]) -> dict[str, Any]:
    node = prompt[node_id]
    cls = classes[node["class_type"]]
    sockets, values, named, height = [], [], {}, CELL_PX[1]
    for name, kind, options, _ in input_specs(cls):
        value = node.get("inputs", {}).get(name)
        linked = as_link(value) is not None
        if not is_widget(kind, options) or linked:
            socket = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": None}
            sockets.append(socket | ({"widget": {"name": name}} if is_widget(kind, options) else {}))
            height += _ROW_PX
        if is_widget(kind, options):
            # A widget that is fed by a link keeps its place in the list, with its default.
            shown = options.get("default") if linked or value is None else value
            values.append(shown)
            named[name] = shown
            height += _TEXT_PX if options.get("multiline") else _ROW_PX
            if has_seed_control(name, kind, options):
                values.append("fixed")
                named["control_after_generate"] = "fixed"
                height += _ROW_PX
    outputs = [
        {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "links": [], "slot_index": slot}
        for slot, (name, kind) in enumerate(zip(output_names(cls), cls.RETURN_TYPES, strict=True))
    ]
    drawn: dict[str, Any] = {
        "id": ids[node_id],
        "type": node["class_type"],
        "pos": [0, 0],
        "size": [_NODE_WIDTH_PX, max(height, CELL_PX[1] + _ROW_PX * len(outputs))],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": sockets,
        "outputs": outputs,
        "properties": {"cnr_id": PACK_ID, "Node name for S&R": node["class_type"]},
        "widgets_values": values,
        "widgets_values_named": named,
    }
    title = node.get("_meta", {}).get("title")
    return drawn | ({"title": title} if title else {})


def _place(nodes: Mapping[str, dict[str, Any]], depth: Mapping[str, int]) -> None:
    """Columns from left to right by depth, nodes of a column below each other; ``order`` is the order of running."""
    bottom: dict[int, float] = {}
    for step, node_id in enumerate(sorted(nodes, key=lambda n: depth[n])):
        column = depth[node_id]
        nodes[node_id]["pos"] = [40 + column * CELL_PX[0], 40 + bottom.get(column, 0)]
        nodes[node_id]["order"] = step
        bottom[column] = bottom.get(column, 0) + nodes[node_id]["size"][1] + 50


def _groups(
    prompt: Prompt, classes: Classes, nodes: Mapping[str, dict[str, Any]], depth: Mapping[str, int]
) -> list[dict[str, Any]]:
    """A frame around neighbouring columns of the same stages."""
    columns: dict[int, list[str]] = {}
    for node_id in nodes:
        columns.setdefault(depth[node_id], []).append(node_id)
    bands: list[tuple[str, list[str]]] = []
    for _, members in sorted(columns.items()):
        kinds = {str(getattr(classes[prompt[node_id]["class_type"]], "CATEGORY", "")) for node_id in members}
        stages = [name for ending, name in _STAGES.items() if any(kind.endswith(ending) for kind in kinds)]
        title = ", ".join([*stages[:1], *(name.lower() for name in stages[1:])]) or "Others"
        if bands and bands[-1][0] == title:
            bands[-1][1].extend(members)
        else:
            bands.append((title, members))
    groups = []
    for number, (title, members) in enumerate(bands):
        boxes = [(*nodes[node_id]["pos"], *nodes[node_id]["size"]) for node_id in members]
        left, top = (min(box[i] for box in boxes) for i in (0, 1))
        right, bottom = (max(box[i] + box[i + 2] for box in boxes) for i in (0, 1))
        size = [right - left + 2 * _PADDING_PX, bottom - top + _HEAD_PX + _FOOT_PX]
        bounding = [left - _PADDING_PX, top - _HEAD_PX, *size]
        colour = _COLOURS[number % len(_COLOURS)]
        look = {"color": colour, "font_size": 24, "flags": {}}
        groups.append({"id": number + 1, "title": title, "bounding": bounding, **look})
    return groups


def _note(about: About, number: int, top_px: float) -> dict[str, Any]:
    """Below the first group, where it makes the graph no wider; the editor alone knows this kind of node."""
    height = CELL_PX[1] + 26 * (2 + len(about.note) // 36 + about.note.count("\n"))
    return {
        "id": number,
        "type": "MarkdownNote",
        "pos": [40, top_px],
        "size": [_NODE_WIDTH_PX, height],
        "flags": {},
        "order": number,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [about.note],
        "title": "About",
    }
