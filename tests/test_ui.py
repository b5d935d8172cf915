"""A workflow as the editor saves it runs as the editor would have run it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

import vidgen
from vidgen.headless.executor import PromptError, execute
from vidgen.headless.graph import to_ui
from vidgen.headless.render import load_prompt, shipped
from vidgen.headless.ui import MAX_DEPTH, MAX_NODES, is_ui, to_prompt

WORKFLOWS = Path(vidgen.__file__).resolve().parent / "workflows"


class Number:
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "value": ("INT", {"default": 1}),
                "seed": ("INT", {"default": 0}),
                "way": (["up", "down"], {}),
            }
        }
    )
    RETURN_TYPES, FUNCTION = ("INT",), "run"

    def run(self, value: int, seed: int, way: str) -> tuple[int]:
        return (value + 1000 * seed if way == "up" else -value,)


class Add:
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"a": ("INT", {"forceInput": True}), "b": ("INT", {"default": 5})}}
    )
    RETURN_TYPES, FUNCTION = ("INT",), "run"

    def run(self, a: int, b: int) -> tuple[int]:
        return (a + b,)


class Show:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {"forceInput": True})}})
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()
    FUNCTION, OUTPUT_NODE = "run", True

    def run(self, a: int) -> dict[str, Any]:
        return {"ui": {"value": [a]}}


CLASSES: dict[str, type] = {"Number": Number, "Add": Add, "Show": Show}


def node(number: int, kind: str, values: Any = (), *, mode: int = 0, **sockets: Any) -> dict[str, Any]:
    """A node; ``sockets`` are its inputs by name: the number of a link, or (number, widget)."""
    inputs = []
    for name, link in sockets.items():
        link, is_widget = link if isinstance(link, tuple) else (link, False)
        inputs.append({"name": name, "type": "INT", "link": link} | ({"widget": {"name": name}} if is_widget else {}))
    outputs = [{"name": "INT", "type": "INT", "links": []}]
    values = values if isinstance(values, dict) else list(values)
    return {"id": number, "type": kind, "mode": mode, "inputs": inputs, "outputs": outputs, "widgets_values": values}


def workflow(nodes: list[dict[str, Any]], links: list[list[int]], subgraphs: list[Any] | None = None) -> dict[str, Any]:
    whole = {"nodes": nodes, "links": [[*link, "INT"] for link in links], "version": 0.4}
    return whole | ({"definitions": {"subgraphs": subgraphs}} if subgraphs else {})


def shown(flow: dict[str, Any]) -> dict[str, Any]:
    before = copy.deepcopy(flow)
    ui = execute(to_prompt(flow, CLASSES), CLASSES)
    assert flow == before
    return {node_id: value["value"][0] for node_id, value in ui.items()}


@pytest.mark.parametrize("name", sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")))
def test_every_shipped_workflow_is_its_api_twin(name: str) -> None:
    classes = vidgen.NODE_CLASS_MAPPINGS
    assert load_prompt(WORKFLOWS / f"{name}.json", classes) == shipped(name)


def test_there_and_back() -> None:
    prompt = {
        "1": {"class_type": "Number", "inputs": {"value": 3, "seed": 2, "way": "up"}},
        "2": {"class_type": "Add", "inputs": {"a": ["1", 0], "b": ["1", 0]}, "_meta": {"title": "Twice"}},
        "3": {"class_type": "Show", "inputs": {"a": ["2", 0]}},
    }
    assert to_prompt(to_ui(prompt, CLASSES), CLASSES) == prompt


@pytest.mark.parametrize(
    "values",
    [
        [3, 2, "fixed", "up"],
        [3, 2, "randomize", "up"],
        [3, 2, "up"],  # written by a program
        {"way": "up", "seed": 2, "value": 3},
        [3, 2],  # older than the last widget
        [3, 2, "fixed", "up", "image"],  # an extra one, such as an upload button
    ],
)
def test_widgets_in_every_form_that_is_saved(values: Any) -> None:
    assert shown(workflow([node(1, "Number", values), node(2, "Show", a=1)], [[1, 1, 0, 2, 0]])) == {"2": 2003}


def test_names_go_before_places() -> None:
    flow = workflow([node(1, "Number", ["nonsense"]), node(2, "Show", a=1)], [[1, 1, 0, 2, 0]])
    flow["nodes"][0]["widgets_values_named"] = {"value": 3, "seed": 0, "new": 1}
    assert shown(flow) == {"2": 3}


def test_reroutes_notes_and_primitives_are_only_drawn() -> None:
    flow = workflow(
        [
            node(1, "PrimitiveNode", [7, "fixed"]),
            node(2, "Number", [1, 0, "fixed", "up"], value=(1, True)),
            node(3, "Reroute", **{"": 2}),
            node(4, "Reroute", **{"": 3}),
            node(5, "Add", [5], a=4),
            node(6, "Show", a=5),
            node(7, "MarkdownNote", ["# hello"]),
        ],
        [[1, 1, 0, 2, 0], [2, 2, 0, 3, 0], [3, 3, 0, 4, 0], [4, 4, 0, 5, 0], [5, 5, 0, 6, 0]],
    )
    assert shown(flow) == {"6": 12}
    assert sorted(to_prompt(flow, CLASSES)) == ["2", "5", "6"]


def test_set_and_get_nodes_are_wires_with_names() -> None:
    flow = workflow(
        [node(1, "Number", [4]), node(2, "SetNode", ["n"], INT=1), node(3, "GetNode", ["n"]), node(4, "Show", a=2)],
        [[1, 1, 0, 2, 0], [2, 3, 0, 4, 0]],
    )
    assert shown(flow) == {"4": 4}


def test_a_bypassed_node_passes_its_input_on_and_a_muted_one_nothing() -> None:
    nodes = [node(1, "Number", [4]), node(2, "Add", [5], a=1), node(3, "Show", a=2), node(4, "Show", a=3)]
    links = [[1, 1, 0, 2, 0], [2, 2, 0, 3, 0], [3, 1, 0, 4, 0]]
    assert shown(workflow(nodes, links)) == {"3": 9, "4": 4}
    nodes[1]["mode"] = 4
    assert shown(workflow(nodes, links)) == {"3": 4, "4": 4}
    nodes[1]["mode"] = 2
    with pytest.raises(PromptError, match="missing"):
        shown(workflow(nodes, links))
    nodes[2]["mode"] = 2
    assert shown(workflow(nodes, links)) == {"4": 4}


def test_a_widget_whose_wire_ends_at_a_muted_node_shows_its_own_value() -> None:
    nodes = [node(1, "Number", [4], mode=2), node(2, "Number", [8], value=(1, True)), node(3, "Show", a=2)]
    assert shown(workflow(nodes, [[1, 1, 0, 2, 0], [2, 2, 0, 3, 0]])) == {"3": 8}


def adder(name: str, kind: str = "Add") -> dict[str, Any]:
    """A subgraph: its inputs ``a`` and ``b`` go to one node, whose output is its own."""
    return {
        "id": name,
        "inputs": [{"name": "a", "type": "INT"}, {"name": "b", "type": "INT"}],
        "outputs": [{"name": "sum", "type": "INT"}],
        "nodes": [node(1, kind, [5], a=1, b=(2, True))],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 0, "type": "INT"},
            {"id": 2, "origin_id": -10, "origin_slot": 1, "target_id": 1, "target_slot": 1, "type": "INT"},
            {"id": 3, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "INT"},
        ],
    }


@pytest.mark.parametrize("kind", ["inner", "outer"])
def test_subgraphs_open_also_within_each_other(kind: str) -> None:
    use = node(2, kind, [30], a=1, b=(None, True))
    flow = workflow(
        [node(1, "Number", [4]), use, node(3, "Show", a=2)],
        [[1, 1, 0, 2, 0], [2, 2, 0, 3, 0]],
        [adder("inner"), adder("outer", "inner")],
    )
    assert shown(flow) == {"3": 34}
    assert ("2:1" if kind == "inner" else "2:1:1") in to_prompt(flow, CLASSES)
    use["properties"] = {"proxyWidgets": [["-1", "b"]]}
    assert shown(flow) == {"3": 34}
    use["widgets_values"] = []
    assert shown(flow) == {"3": 9}
    use["mode"] = 4
    assert shown(flow) == {"3": 4}
    use["mode"] = 2
    with pytest.raises(PromptError, match="missing"):
        shown(flow)


def test_what_cannot_be_read_is_said() -> None:
    with pytest.raises(PromptError, match="'Magic' is not known"):
        to_prompt(workflow([node(1, "Magic")], []), CLASSES)
    with pytest.raises(PromptError, match="contains itself"):
        to_prompt(workflow([node(1, "loop")], [], [adder("loop", "loop")]), CLASSES)
    circle = workflow([node(1, "Reroute", **{"": 1}), node(2, "Show", a=1)], [[1, 1, 0, 1, 0]])
    with pytest.raises(PromptError, match="missing"):
        shown(circle)
    for broken in ({"nodes": [3]}, {"nodes": [{"id": 1}]}, workflow([node(1, "Show", a=1)], [[1, 9, 0, 1, 0]])):
        assert is_ui(broken)
        with pytest.raises(PromptError, match="damaged"):
            to_prompt(broken, CLASSES)
    assert MAX_DEPTH > 8
    assert not is_ui({"1": {"class_type": "Show"}})


def test_a_saved_workflow_is_read_from_a_file(tmp_path: Path) -> None:
    flow = workflow([node(1, "Number", [4]), node(2, "Show", a=1)], [[1, 1, 0, 2, 0]])
    (tmp_path / "flow.json").write_text(json.dumps(flow))
    assert load_prompt(tmp_path / "flow.json", CLASSES)["2"]["inputs"] == {"a": ["1", 0]}


def test_subgraphs_that_multiply_are_refused() -> None:
    """Ten in ten in ten: a small file, and more nodes than any memory holds."""
    levels = [
        {"id": f"L{level}", "nodes": [{"id": n, "type": f"L{level + 1}", "mode": 0} for n in range(10)], "links": []}
        for level in range(12)
    ]
    flow = {"nodes": [{"id": 1, "type": "L0", "mode": 0}], "links": [], "definitions": {"subgraphs": levels}}
    with pytest.raises(PromptError, match=f"more than {MAX_NODES} nodes"):
        to_prompt(flow, CLASSES)
