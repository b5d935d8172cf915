"""Turn a UI-format workflow, as ComfyUI's editor saves it, into the API-format prompt that runs.

What only the editor knows is resolved here as the editor does it when Run is pressed: reroutes, primitive nodes, named
wires (Set/Get nodes), muted and bypassed nodes, and subgraphs, whose nodes get ids like ``12:3``.
The format: https://docs.comfy.org/specs/workflow_json
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .executor import Classes, Problem, PromptError, input_specs
from .graph import has_seed_control, is_widget

MUTED, BYPASSED = 2, 4
"""values of a node's ``mode``; everything else runs"""

NOTES = frozenset({"Note", "MarkdownNote"})
SETTERS, GETTERS = frozenset({"SetNode", "Set"}), frozenset({"GetNode", "Get"})
CONTROLS = frozenset({"fixed", "increment", "decrement", "randomize"})
"""values of the widget behind a seed"""

INPUT_NODE, OUTPUT_NODE = -10, -20
"""ids of a subgraph's own ends, in its links"""

MAX_DEPTH = 32
"""of subgraphs in subgraphs"""
MAX_NODES = 20_000
"""with those in subgraphs, which a small file can multiply without end"""
MAX_WIRES = 250
"""that make one: a chain of reroutes that bites its own tail has no beginning"""


class _End(NamedTuple):
    """Where a wire begins: an output of a node."""

    node: int | str
    slot: int


@dataclass(slots=True)
class _Graph:
    """One level: the workflow, or the inside of one subgraph node."""

    prefix: str
    """of the ids in the prompt: "" or "12:" """
    nodes: dict[str, Mapping[str, Any]]
    links: dict[Any, tuple[_End, _End]]
    """number of a link -> where it begins and ends"""
    outer: _Graph | None = None
    node: Mapping[str, Any] | None = None
    """the subgraph node that this is the inside of"""
    definition: Mapping[str, Any] = field(default_factory=dict)
    muted: bool = False
    inner: dict[str, _Graph] = field(default_factory=dict)


class _Missing(Exception):
    """A wire that ends at a muted node, or nowhere."""


@dataclass(frozen=True, slots=True)
class _Value:
    """What a wire brings when it begins at a widget and not at a node."""

    value: Any


def is_ui(workflow: object) -> bool:
    """Whether this is what the editor saves, and not an API-format prompt."""
    return isinstance(workflow, Mapping) and isinstance(workflow.get("nodes"), list)


def to_prompt(workflow: Mapping[str, Any], classes: Classes) -> dict[str, dict[str, Any]]:
    """The API-format prompt of a UI-format workflow.

    Raises:
        PromptError: the workflow is damaged, or has node types that are not in ``classes``.
    """
    try:
        definitions = {d["id"]: d for d in (workflow.get("definitions") or {}).get("subgraphs") or []}
        root = _read(workflow, definitions, itertools.count(), prefix="")
        return _prompt(root, classes)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        what = f"The workflow is damaged: {type(error).__name__} at {error}"
        raise PromptError({}, {}, kind="invalid_prompt", what=what) from error


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(
    graph: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
    counted: Iterator[int],
    *,
    prefix: str,
    outer: _Graph | None = None,
    node: Mapping[str, Any] | None = None,
    depth: int = 0,
) -> _Graph:
    if depth > MAX_DEPTH:
        raise PromptError({}, {}, kind="invalid_prompt", what="A subgraph of the workflow contains itself")
    read = _Graph(
        prefix=prefix,
        nodes={str(inner["id"]): inner for inner in graph["nodes"]},
        links=dict(map(_link, graph.get("links") or [])),
        outer=outer,
        node=node,
        definition=graph,
        muted=node is not None and ((outer is not None and outer.muted) or node.get("mode") == MUTED),
    )
    for name, inner in read.nodes.items():
        if next(counted) >= MAX_NODES:
            raise PromptError({}, {}, kind="invalid_prompt", what=f"The workflow has more than {MAX_NODES} nodes")
        # A bypassed subgraph is bypassed as a node: nothing inside it runs.
        if inner["type"] in definitions and inner.get("mode") != BYPASSED:
            read.inner[name] = _read(
                definitions[inner["type"]],
                definitions,
                counted,
                prefix=f"{prefix}{name}:",
                outer=read,
                node=inner,
                depth=depth + 1,
            )
    return read


def _link(link: Any) -> tuple[Any, tuple[_End, _End]]:
    """Links are lists in the workflow and objects in subgraphs."""
    if isinstance(link, Mapping):
        begin, end = _End(link["origin_id"], link["origin_slot"]), _End(link["target_id"], link["target_slot"])
        return link["id"], (begin, end)
    number, origin, origin_slot, target, target_slot = link[:5]
    return number, (_End(origin, origin_slot), _End(target, target_slot))


# --- following wires --------------------------------------------------------------------------------------------------


def _source(graph: _Graph, number: Any, steps: int = 0) -> list[Any] | _Value:
    """What the link brings: ``[node id, output]`` of a node that runs, or a widget's value.

    Raises:
        _Missing: nothing.
    """
    if number is None or number not in graph.links or steps > MAX_WIRES:
        raise _Missing
    begin = graph.links[number][0]
    if begin.node == INPUT_NODE:
        return _from_outside(graph, begin.slot, steps + 1)
    name = str(begin.node)
    node = graph.nodes[name]
    if graph.muted or node.get("mode") == MUTED:
        raise _Missing
    if node.get("mode") == BYPASSED:
        return _source(graph, _bypass(node, begin.slot), steps + 1)
    if name in graph.inner:
        return _from_inside(graph.inner[name], begin.slot, steps + 1)
    kind = node["type"]
    if kind == "Reroute":
        return _source(graph, node["inputs"][0]["link"], steps + 1)
    if kind == "PrimitiveNode":
        return _Value(node["widgets_values"][0])
    if kind in GETTERS:
        return _source(graph, _setter(graph, _first_value(node))["inputs"][0]["link"], steps + 1)
    if kind in SETTERS:
        return _source(graph, node["inputs"][0]["link"], steps + 1)
    return [graph.prefix + name, begin.slot]


def _from_outside(graph: _Graph, slot: int, steps: int) -> list[Any] | _Value:
    """An input of a subgraph: the wire into its node outside, or the widget that the node shows for it."""
    assert graph.outer is not None
    assert graph.node is not None
    name = graph.definition["inputs"][slot]["name"]
    socket = next((socket for socket in graph.node.get("inputs") or [] if socket["name"] == name), None)
    if socket is not None and socket.get("link") is not None:
        return _source(graph.outer, socket["link"], steps)
    shown = _promoted(graph)
    if name in shown:
        return _Value(shown[name])
    raise _Missing


def _promoted(graph: _Graph) -> dict[str, Any]:
    """The values of the widgets that the subgraph's node shows."""
    assert graph.node is not None
    values = graph.node.get("widgets_values") or []
    if isinstance(values, Mapping):
        return dict(values)
    proxies = (graph.node.get("properties") or {}).get("proxyWidgets")
    if proxies:  # [node inside, widget]; -1 is the subgraph's own input, the others keep their value inside
        return {name: value for (inner, name), value in zip(proxies, values, strict=False) if str(inner) == "-1"}
    sockets = [socket["name"] for socket in graph.node.get("inputs") or [] if socket.get("widget")]
    return dict(zip(sockets, values, strict=False))


def _from_inside(inner: _Graph, slot: int, steps: int) -> list[Any] | _Value:
    """An output of a subgraph: what its own end gets."""
    for number, (_, end) in inner.links.items():
        if end == (OUTPUT_NODE, slot):
            return _source(inner, number, steps)
    raise _Missing


def _bypass(node: Mapping[str, Any], slot: int) -> Any:
    """The link that a bypassed node passes on to its output: the input of the same place, else the first one of the
    output's type."""
    inputs = [socket for socket in node.get("inputs") or [] if not socket.get("widget")]
    kind = node["outputs"][slot]["type"]
    ordered = inputs[slot : slot + 1] + inputs
    return next((s["link"] for s in ordered if s["type"] == kind and s.get("link") is not None), None)


def _setter(graph: _Graph, name: Any) -> Mapping[str, Any]:
    for node in graph.nodes.values():
        if node["type"] in SETTERS and _first_value(node) == name:
            return node
    raise _Missing


def _first_value(node: Mapping[str, Any]) -> Any:
    values = node.get("widgets_values") or []
    return next(iter(values.values() if isinstance(values, Mapping) else values), None)


# --- writing ----------------------------------------------------------------------------------------------------------


def _prompt(root: _Graph, classes: Classes) -> dict[str, dict[str, Any]]:
    running = {graph.prefix + name: (graph, node) for graph, name, node in _running(root)}
    unknown = {
        node_id: [Problem(kind="missing_node_type", message=f"the node type {node['type']!r} is not known")]
        for node_id, (_, node) in running.items()
        if node["type"] not in classes
    }
    if unknown:
        shown = {node_id: {"class_type": running[node_id][1]["type"]} for node_id in unknown}
        raise PromptError(shown, unknown, kind="invalid_prompt", what="The workflow has nodes that are not known here")
    return {node_id: _node(graph, node, classes[node["type"]]) for node_id, (graph, node) in running.items()}


def _running(graph: _Graph) -> Iterator[tuple[_Graph, str, Mapping[str, Any]]]:
    """The nodes that are more than wires, of all levels."""
    if graph.muted:
        return
    for name, node in graph.nodes.items():
        if node.get("mode") in (MUTED, BYPASSED):
            continue
        if name in graph.inner:
            yield from _running(graph.inner[name])
        elif node["type"] not in {"Reroute", "PrimitiveNode"} | NOTES | SETTERS | GETTERS:
            yield graph, name, node


def _node(graph: _Graph, node: Mapping[str, Any], cls: type) -> dict[str, Any]:
    inputs = widget_values(node, cls)
    for socket in node.get("inputs") or []:
        if socket.get("link") is None:
            continue
        try:
            source = _source(graph, socket["link"])
        except _Missing:
            # What is fed by nothing has no value, and the check says so; a widget shows its own again.
            if not socket.get("widget"):
                inputs.pop(socket["name"], None)
            continue
        inputs[socket["name"]] = source.value if isinstance(source, _Value) else source
    title = node.get("title")
    return {"inputs": inputs, "class_type": node["type"]} | ({"_meta": {"title": title}} if title else {})


def widget_values(node: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Input -> value of the node's widgets: by name where the file has names, else by position.

    A list that is shorter than today's widgets comes from an older version: what it lacks takes its default.
    """
    widgets = [(name, kind, options) for name, kind, options, _ in input_specs(cls) if is_widget(kind, options)]
    named = node.get("widgets_values_named")
    values = node.get("widgets_values") or []
    if not isinstance(named, Mapping) and isinstance(values, Mapping):
        named = values
    if not isinstance(named, Mapping):
        named, position = {}, 0
        for name, kind, options in widgets:
            if position >= len(values):
                break
            named[name] = values[position]
            position += 1
            # Exports made by programs often lack the extra widget behind a seed.
            if (
                has_seed_control(name, kind, options)
                and values[position : position + 1]
                and _is_control(values[position])
            ):
                position += 1
    found = {}
    for name, kind, options in widgets:
        if name in named:
            found[name] = named[name]
        elif "default" in options:
            found[name] = options["default"]
        elif isinstance(kind, list) and kind:
            found[name] = kind[0]
    return found


def _is_control(value: Any) -> bool:
    return isinstance(value, str) and value in CONTROLS
