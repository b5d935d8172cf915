"""The executor on small nodes of its own: what runs, in which order, with what values, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from vidgen.headless.executor import (
    MAX_PROBLEMS,
    Cache,
    Event,
    NodeError,
    PromptError,
    as_link,
    check,
    coerce,
    examine,
    execute,
    failed,
    order,
)
from vidgen.vidgen_core.errors import Cancelled, SettingsError

ran: list[str] = []


class Number:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"value": ("INT", {"min": 0, "max": 10})},
            "optional": {"kind": (["odd", "even"], {}), "exact": ("BOOLEAN", {}), "note": ("STRING", {})},
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    def run(self, value: int, kind: str = "odd", exact: bool = False, note: str = "", node_id: str = "") -> tuple[int]:
        assert type(value) is int
        ran.append(node_id)
        return (value,)


class Add:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"a": ("INT", {}), "b": ("INT", {})}, "hidden": {"node_id": "UNIQUE_ID"}}

    def run(self, a: int, b: int, node_id: str) -> tuple[int]:
        ran.append(node_id)
        return (a + b,)


class Show:
    RETURN_TYPES = ()
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        hidden = {"prompt": "PROMPT", "extra": "EXTRA_PNGINFO", "node_id": "UNIQUE_ID"}
        return {"required": {"value": ("INT,FLOAT", {})}, "hidden": hidden}

    def run(self, value: int, prompt: Any, extra: Any, node_id: str) -> dict[str, Any]:
        ran.append(node_id)
        return {"ui": {"value": [value], "nodes": [len(prompt)], "extra": [extra]}}


class Text:
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, text: str) -> bool | str:
        return True if text == "fine" else "the text must be 'fine'"

    def run(self, text: str) -> tuple[str]:
        if text == "fine":
            raise SettingsError("The text is too fine")
        return (text,)


class Big:
    """Gives an object whose life can be watched."""

    RETURN_TYPES = ("BIG",)
    FUNCTION = "run"
    made: ClassVar[list[weakref.ref[Any]]] = []

    class Value:
        pass

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}, "optional": {"before": ("BIG", {})}}

    def run(self, before: Any = None) -> tuple[Any]:
        value = Big.Value()
        Big.made.append(weakref.ref(value))
        return (value,)


class Weigh:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"big": ("BIG", {})}}

    def run(self, big: Any) -> tuple[int]:
        gc.collect()
        return (sum(ref() is not None for ref in Big.made),)


class Choose:
    """Asks for one of two inputs."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        lazy = ("INT", {"lazy": True})
        return {"required": {"first": ("BOOLEAN", {}), "a": lazy, "b": lazy}}

    def check_lazy_status(self, first: bool, a: int | None, b: int | None) -> list[str]:
        return ["a"] if first else ["b"]

    def run(self, first: bool, a: int | None, b: int | None) -> tuple[int | None]:
        return (a if first else b,)


class Counter:
    """Its list is read one value at a time, unless the reader takes lists."""

    RETURN_TYPES = ("INT", "INT")
    OUTPUT_IS_LIST = (True, False)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"up_to": ("INT", {})}}

    async def run(self, up_to: int) -> tuple[list[int], int]:
        return list(range(up_to)), up_to


class Total:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"values": ("INT", {}), "factor": ("INT", {})}}

    def run(self, values: list[int], factor: list[int]) -> tuple[int]:
        assert len(factor) == 1
        return (sum(values) * factor[0],)


class Clock:
    """Reads something outside the prompt."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    now: ClassVar[float] = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"zone": ("INT", {})}}

    @classmethod
    def IS_CHANGED(cls, zone: int) -> float:
        return cls.now + zone

    def run(self, zone: int) -> tuple[int]:
        ran.append("clock")
        return (int(Clock.now) + zone,)


CLASSES: dict[str, type] = {
    cls.__name__: cls for cls in (Number, Add, Show, Text, Big, Weigh, Choose, Counter, Total, Clock)
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    ran.clear()
    Big.made.clear()


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def sums() -> dict[str, dict[str, Any]]:
    """(2 + 3) + 2 shown by node 9; node 8 is not needed by anyone."""
    return {
        "9": node("Show", value=["5", 0]),
        "8": node("Number", value=1),
        "5": node("Add", a=["4", 0], b=["1", 0]),
        "4": node("Add", a=["1", 0], b=["2", 0]),
        "1": node("Number", value=2),
        "2": node("Number", value="3"),
    }


def test_values_flow_through_links() -> None:
    shown = execute(sums(), CLASSES, extra_pnginfo={"workflow": 1})
    assert shown == {"9": {"value": [7], "nodes": [6], "extra": [{"workflow": 1}]}}


def test_each_needed_node_runs_once_after_its_inputs() -> None:
    execute(sums(), CLASSES)
    assert sorted(ran) == ["1", "2", "4", "5", "9"]
    assert ran.index("1") < ran.index("4") < ran.index("5") < ran.index("9")


def test_events_tell_what_runs() -> None:
    events: list[Event] = []
    execute(sums(), CLASSES, on_event=events.append)
    assert [(e.kind, e.node_id) for e in events[-2:]] == [("executing", "9"), ("executed", "9")]
    assert events[-1].ui["value"] == [7]
    assert len(events) == 10


def test_cancelling_between_two_nodes() -> None:
    def stop(event: Event) -> None:
        if event.node_id == "5":
            raise Cancelled

    with pytest.raises(Cancelled):
        execute(sums(), CLASSES, on_event=stop)
    assert "5" not in ran


def test_results_are_dropped_after_their_last_reader() -> None:
    """Of three big values in a row only the last is alive when it is weighed: the others have no reader left."""
    prompt = {
        "a": node("Big"),
        "b": node("Big", before=["a", 0]),
        "c": node("Big", before=["b", 0]),
        "w": node("Weigh", big=["c", 0]),
        "s": node("Show", value=["w", 0]),
    }
    assert execute(prompt, CLASSES)["s"]["value"] == [1]


def test_a_deep_workflow_is_no_recursion() -> None:
    prompt = {"0": node("Number", value=1)}
    prompt |= {str(n): node("Add", a=[str(n - 1), 0], b=["0", 0]) for n in range(1, 3000)}
    prompt["s"] = node("Show", value=["2999", 0])
    assert execute(prompt, CLASSES)["s"]["value"] == [3000]


def test_an_error_names_its_node() -> None:
    prompt = {"1": node("Text", text="fine"), "2": node("Number", value=1), "s": node("Show", value=["2", 0])}
    classes = CLASSES | {"Text": type("Loud", (Text,), {"OUTPUT_NODE": True})}
    with pytest.raises(NodeError, match=r"Node 1 \(Text\): The text is too fine") as caught:
        execute(prompt, classes)
    assert isinstance(caught.value.__cause__, SettingsError)
    assert caught.value.node_id == "1"


def change(node_id: str, **inputs: Any) -> Callable[[dict[str, Any]], None]:
    return lambda prompt: prompt[node_id]["inputs"].update(inputs)


def add(node_id: str, class_type: str, **inputs: Any) -> Callable[[dict[str, Any]], None]:
    return lambda prompt: prompt.update({node_id: node(class_type, **inputs)})


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (lambda p: p["1"]["inputs"].clear(), "required_input_missing", "Node 1 (Number), input 'value'"),
        (change("1", value="three"), "invalid_input_type", "cannot be read as INT"),
        (change("1", value=2.5), "invalid_input_type", "cannot be read as INT"),
        (change("1", value=True), "invalid_input_type", "cannot be read as INT"),
        (change("1", value=None), "invalid_input_type", "cannot be read as INT"),
        (change("1", value=-1), "value_smaller_than_min", "below the minimum of 0 (given: -1)"),
        (change("1", value=11), "value_bigger_than_max", "above the maximum of 10 (given: 11)"),
        (change("1", kind="prime"), "value_not_in_list", "not one of: odd, even"),
        (change("1", exact="perhaps"), "invalid_input_type", "cannot be read as BOOLEAN"),
        (change("1", note={"a": 1}), "invalid_input_type", "cannot be read as STRING"),
        (change("4", a=["77", 0]), "bad_linked_input", "the node it is linked to does not exist"),
        (change("4", a=["1", 1]), "bad_linked_input", "Node 1 (Number) has no such output"),
        (change("4", a=["1", -1]), "bad_linked_input", "has no such output"),
        (lambda p: (add("t", "Text", text="fine")(p), change("4", a=["t", 0])(p)), "return_type_mismatch", "STRING"),
        (lambda p: (add("t", "Text")(p), change("4", a=["t", 0])(p)), "required_input_missing", "input 'text'"),
        (lambda p: (add("t", "Text", text="bad")(p), change("4", a=["t", 0])(p)), "custom_validation_failed", "'fine'"),
    ],
)
def test_a_bad_input_is_found_before_anything_runs(edit: Callable[[Any], None], kind: str, words: str) -> None:
    prompt = sums()
    edit(prompt)
    with pytest.raises(PromptError) as caught:
        execute(prompt, CLASSES)
    assert words in str(caught.value)
    assert kind in {problem.kind for found in caught.value.problems.values() for problem in found}
    assert caught.value.kind == "prompt_outputs_failed_validation"
    assert ran == []


def test_every_problem_is_told_at_once() -> None:
    prompt = sums()
    prompt["1"]["inputs"] = {"value": -1, "kind": "prime"}
    prompt["2"]["inputs"] = {}
    with pytest.raises(PromptError) as caught:
        check(prompt, CLASSES)
    assert {node_id: len(found) for node_id, found in caught.value.problems.items()} == {"1": 2, "2": 1}
    body = caught.value.to_json()
    assert body["error"]["type"] == "prompt_outputs_failed_validation"
    assert body["node_errors"]["2"]["errors"][0]["extra_info"]["input_name"] == "value"


def test_only_what_is_needed_is_checked() -> None:
    prompt = sums()
    prompt["8"]["inputs"] = {"value": 99}
    assert execute(prompt, CLASSES)["9"]["value"] == [7]


@pytest.mark.parametrize(
    ("prompt", "kind", "words"),
    [
        ({}, "prompt_no_outputs", "no output node"),
        ({"1": node("Number", value=1)}, "prompt_no_outputs", "no output node"),
        ({"1": node("Magic")}, "invalid_prompt", "'Magic' is not known"),
        ({"1": {}}, "invalid_prompt", "is not known"),
        ({"1": 5}, "invalid_prompt", "not a workflow in API format"),
        ([1, 2], "invalid_prompt", "not a workflow in API format"),
        ({"nodes": {}, "links": {}}, "invalid_prompt", "UI format"),
        (
            {"1": node("Add", a=["2", 0], b=1), "2": node("Add", a=["1", 0], b=1), "s": node("Show", value=["1", 0])},
            "dependency_cycle",
            "needs its own output",
        ),
    ],
)
def test_what_is_no_prompt(prompt: Any, kind: str, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        execute(prompt, CLASSES)
    assert caught.value.kind == kind
    assert words in str(caught.value)


def test_order_is_told_by_the_links_alone() -> None:
    assert order(sums(), ["9"]) == ["1", "2", "4", "5", "9"]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("INT", "12", 12),
        ("INT", 3.0, 3),
        ("INT", 2**63 + 1, 2**63 + 1),
        ("INT", str(2**63 + 1), 2**63 + 1),
        ("FLOAT", "0.5", 0.5),
        ("FLOAT", 2, 2.0),
        ("BOOLEAN", "False", False),
        ("BOOLEAN", 1, True),
        ("STRING", 5, "5"),
        ("ANYTHING", [1], [1]),
    ],
)
def test_values_are_read_as_their_widget(kind: str, value: Any, expected: Any) -> None:
    read = coerce(kind, value)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize("value", [["1"], ["1", 0, 0], ["1", "0"], [1, 0], ["1", 0.0], ["1", True], "1", None])
def test_what_is_no_link(value: Any) -> None:
    assert as_link(value) is None


# --- what a server needs besides --------------------------------------------------------------------------------------


def again(prompt: Any, cache: Cache) -> tuple[Any, list[str]]:
    """What a run with this cache shows, and which nodes ran."""
    ran.clear()
    return execute(prompt, CLASSES, cache=cache), list(ran)


def test_what_has_not_changed_does_not_run_again() -> None:
    cache, prompt = Cache(), sums()
    assert again(prompt, cache)[1] == ["1", "2", "4", "5", "9"]
    shown, nodes = again(prompt, cache)
    assert nodes == []
    assert shown["9"]["value"] == [7]
    prompt["2"]["inputs"]["value"] = 4
    shown, nodes = again(prompt, cache)
    assert nodes == ["2", "4", "5", "9"]
    assert shown["9"]["value"] == [8]


def test_a_cache_holds_the_last_prompt_only() -> None:
    cache = Cache()
    again(sums(), cache)
    assert len(cache) == 5
    again({"1": node("Number", value=2), "s": node("Show", value=["1", 0])}, cache)
    assert len(cache) == 2


def test_a_failed_run_goes_on_where_it_failed() -> None:
    cache, prompt = Cache(), sums()
    prompt["t"] = node("Text", text="fine")
    prompt["z"] = node("Show", value=["t", 0])
    with pytest.raises(NodeError):
        execute(prompt, CLASSES, outputs=["9", "z"], cache=cache)
    ran.clear()
    execute(prompt, CLASSES, outputs=["9"], cache=cache)
    assert ran == []


def test_cached_results_are_told() -> None:
    cache, events = Cache(), list[Event]()
    execute(sums(), CLASSES, cache=cache)
    prompt = sums()
    prompt["5"]["inputs"]["b"] = 9
    execute(prompt, CLASSES, cache=cache, on_event=events.append)
    assert events[0].kind == "cached"
    assert sorted(events[0].nodes) == ["1", "2", "4"]
    told = [(event.kind, event.node_id, event.is_cached) for event in events[1:]]
    assert told == [
        ("executed", "4", True),
        *(("executing", "5", False), ("executed", "5", False)),
        *(("executing", "9", False), ("executed", "9", False)),
    ]


def test_is_changed_speaks_for_files_and_clocks() -> None:
    cache = Cache()
    prompt = {"c": node("Clock", zone=2), "s": node("Show", value=["c", 0])}
    assert "clock" in again(prompt, cache)[1]
    assert "clock" not in again(prompt, cache)[1]
    Clock.now = 5
    shown, nodes = again(prompt, cache)
    assert shown["s"]["value"] == [7]
    assert "clock" in nodes
    Clock.now = float("nan")  # never the same
    with pytest.raises(NodeError):
        again(prompt, cache)
    Clock.now = 0


@pytest.mark.parametrize("first", [True, False])
def test_lazy_inputs_run_when_they_are_asked_for(first: bool) -> None:
    prompt = {
        "1": node("Number", value=3),
        "2": node("Number", value=4),
        "c": node("Choose", first=first, a=["1", 0], b=["2", 0]),
        "s": node("Show", value=["c", 0]),
    }
    assert execute(prompt, CLASSES)["s"]["value"] == [3 if first else 4]
    assert ran == ["1" if first else "2", "s"]


def test_lists_are_read_one_by_one_or_whole() -> None:
    prompt = {
        "c": node("Counter", up_to=4),
        "t": node("Total", values=["c", 0], factor=2),
        "a": node("Add", a=["c", 0], b=["c", 1]),
        "s": node("Show", value=["t", 0]),
        "e": node("Show", value=["a", 0]),
    }
    shown = execute(prompt, CLASSES)
    assert shown["s"]["value"] == [12]
    assert shown["e"]["value"] == [4, 5, 6, 7]


def test_outputs_that_can_run_are_told_from_those_that_cannot() -> None:
    prompt = sums()
    prompt["bad"] = node("Number", value=99)
    prompt["sum"] = node("Add", a=["bad", 0], b=["1", 0])
    prompt["s"] = node("Show", value=["sum", 0])
    checked = examine(prompt, CLASSES)
    assert checked.outputs == ["9"]
    errors = failed(prompt, checked).to_json()["node_errors"]
    assert list(errors) == ["bad"]
    assert errors["bad"]["dependent_outputs"] == ["s"]
    assert errors["bad"]["class_type"] == "Number"
    extra = errors["bad"]["errors"][0]["extra_info"]
    assert extra == {"input_name": "value", "input_config": ["INT", {"min": 0, "max": 10}], "received_value": 99}
    assert execute(prompt, CLASSES, outputs=checked.outputs)["9"]["value"] == [7]


def test_targets_leave_other_outputs_out() -> None:
    prompt = sums() | {"s": node("Show", value=["8", 0])}
    assert examine(prompt, CLASSES, {"s"}).outputs == ["s"]
    with pytest.raises(PromptError, match="no output node"):
        examine(prompt, CLASSES, {"8"})


# --- graphs and classes of strangers ----------------------------------------------------------------------------------


class Counts:
    """Counts how often it is asked for its inputs."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("INT",), "run", True
    asked = 0

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        cls.asked += 1
        return {"required": {"a": ("INT", {"min": 0})}}


def test_a_class_is_asked_once_for_all_its_nodes() -> None:
    """A loader reads its folders each time."""
    Counts.asked = 0
    examine({str(n): {"class_type": "Counts", "inputs": {"a": n}} for n in range(100)}, {"Counts": Counts})
    assert Counts.asked == 1


def test_who_needs_what_is_wrong() -> None:
    """A wrong node is told with the outputs that need it, and the others run."""
    inputs = {"1": {"a": -1}, "2": {"a": ["1", 0]}, "3": {"a": ["2", 0]}, "4": {"a": 1}, "5": {"a": -1}}
    prompt = {node_id: {"class_type": "Counts", "inputs": given} for node_id, given in inputs.items()}
    checked = examine(prompt, {"Counts": Counts})
    assert checked.outputs == ["4"]
    assert checked.dependents == {"1": ["1", "2", "3"], "5": ["5"]}
    assert checked.num_more == 0


def test_only_so_many_problems_are_listed() -> None:
    prompt = {str(n): {"class_type": "Counts", "inputs": {"a": -1}} for n in range(MAX_PROBLEMS + 7)}
    checked = examine(prompt, {"Counts": Counts})
    assert checked.outputs == []
    assert len(checked.problems) == MAX_PROBLEMS
    assert "7 more nodes" in str(failed(prompt, checked))


class Raises:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("INT",), "run", True
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {})}})

    @classmethod
    def VALIDATE_INPUTS(cls, a: int) -> bool:
        raise OSError(36, "File name too long")


class Nameless:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("INT",), "run", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        raise RuntimeError("no list today")


@pytest.mark.parametrize("cls", [Raises, Nameless])
def test_a_check_that_raises_is_a_problem_of_its_node(cls: type) -> None:
    checked = examine({"1": {"class_type": "It", "inputs": {"a": 1}}}, {"It": cls})
    (problem,) = checked.problems["1"]
    assert problem.kind == "exception_during_validation"
    assert "Error: " in problem.details
