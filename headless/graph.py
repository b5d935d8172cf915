"""Turn an API-format prompt into a UI-format workflow, so that the video opens in ComfyUI as a readable graph.

API format is what runs (values and links by name); UI format is what the editor draws (positions, sizes,
numbered links, widget values in order): https://docs.comfy.org/specs/workflow_json
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from .executor import Classes, Prompt, as_link, input_specs, order, output_names

CELL_PX = (360, 60)
"""gap-included column width, and the height of a node's title and margins"""
_NODE_WIDTH_PX = 300
_ROW_PX = 26  # one socket or one-line widget
_TEXT_PX = 110  # a multi-line text widget

PACK_ID = "comfyui-vidgen"
"""the registry's name of this pack: ComfyUI-Manager offers it where our nodes are missing"""

_WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"})
_SEEDS = frozenset({"seed", "noise_seed"})


def to_ui(prompt: Prompt, classes: Classes) -> dict[str, Any]:
    """The UI-format workflow (version 0.4) of ``prompt``: a column per step, each node right of what it needs."""
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
    return {
        # The same prompt gives the same id, and so the same file.
        "id": str(uuid.uuid5(uuid.NAMESPACE_OID, repr(sorted(prompt.items(), key=lambda item: item[0])))),
        "revision": 0,
        "last_node_id": max(ids.values(), default=0),
        "last_link_id": len(links),
        "nodes": sorted(nodes.values(), key=lambda node: node["id"]),
        "links": links,
        "groups": [],
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
