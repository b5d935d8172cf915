"""Run a workflow in ComfyUI's API format: check it, find the order, call the nodes.

A prompt maps a node's id to ``{"class_type": name, "inputs": {name: value or [node id, output index]}}``.
Checks and error kinds follow ComfyUI's server, so that the same front end can show them. Nothing here
knows a node of ours: the classes come in as a mapping, and everything is V1-shaped (``INPUT_TYPES``,
``RETURN_TYPES``, ``FUNCTION``, ``OUTPUT_NODE``).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from ..vidgen_core.errors import Cancelled, UserError

Prompt: TypeAlias = Mapping[str, Mapping[str, Any]]
Classes: TypeAlias = Mapping[str, type]


class Link(NamedTuple):
    """An input that is fed by another node."""

    node_id: str
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with one node; ``kind`` is ComfyUI's word for it."""

    kind: str
    message: str
    details: str = ""
    input_name: str | None = None
    received: object = None

    def to_json(self) -> dict[str, Any]:
        extra = {} if self.input_name is None else {"input_name": self.input_name, "received_value": self.received}
        return {"type": self.kind, "message": self.message, "details": self.details, "extra_info": extra}


class PromptError(UserError):
    """The prompt cannot run. ``problems`` lists what is wrong by node id; it is empty when there is no graph at all."""

    def __init__(self, prompt: Prompt, problems: Mapping[str, list[Problem]], *, kind: str, what: str) -> None:
        self.kind, self.problems = kind, dict(problems)
        lines = [what.rstrip(".") + "."]
        for node_id, found in problems.items():
            for problem in found:
                where = describe(prompt, node_id) + (f", input '{problem.input_name}'" if problem.input_name else "")
                lines.append(f"  {where}: {problem.message}" + (f" ({problem.details})" if problem.details else ""))
        super().__init__("\n".join(lines))
        self.args = ("\n".join(lines),)  # several lines, each a finding: not one sentence

    def to_json(self) -> dict[str, Any]:
        """The body of ComfyUI's answer 400 to ``POST /prompt``."""
        node_errors = {node: {"errors": [p.to_json() for p in found]} for node, found in self.problems.items()}
        error = {"type": self.kind, "message": self.what, "details": "", "extra_info": {}}
        return {"error": error, "node_errors": node_errors}


class NodeError(Exception):
    """A node raised: ``__cause__`` is what, ``node_id`` where; ``kept`` are files from which the run can go on."""

    def __init__(self, prompt: Prompt, node_id: str, cause: Exception) -> None:
        self.kept: list[Path] = []
        self.node_id, self.class_type = node_id, prompt[node_id]["class_type"]
        super().__init__(f"{describe(prompt, node_id)}: {cause}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happens during a run, told to ``on_event`` before (``executing``) and after (``executed``) each node."""

    kind: Literal["executing", "executed"]
    node_id: str
    ui: Mapping[str, Any] = field(default_factory=dict)
    """what an ``executed`` output node shows, e.g. ``{"images": [...]}``"""


def describe(prompt: Prompt, node_id: str) -> str:
    """``Node 5 (VidGenSampler)``, for messages."""
    class_type = prompt.get(node_id, {}).get("class_type")
    return f"Node {node_id} ({class_type})" if class_type else f"Node {node_id}"


def as_link(value: object) -> Link | None:
    """The link that ``value`` is, or None for a plain value: a link is ``[node id, output index]``."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return Link(value[0], value[1])
    return None


def input_specs(cls: type) -> Iterator[tuple[str, Any, Mapping[str, Any], bool]]:
    """(name, type, options, required) of each visible input, in the order of the widgets."""
    declared = cls.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, spec in declared.get(group, {}).items():
            yield name, spec[0], spec[1] if len(spec) > 1 else {}, group == "required"


# --- checking -------------------------------------------------------------------------------------------------------


def check_shape(prompt: object) -> None:
    """Raise PromptError unless ``prompt`` is a table of nodes."""
    if isinstance(prompt, Mapping) and "nodes" in prompt and "links" in prompt:
        raise PromptError({}, {}, kind="invalid_prompt", what="This is a workflow in UI format; use Export (API)")
    if not isinstance(prompt, Mapping) or not all(isinstance(node, Mapping) for node in prompt.values()):
        raise PromptError({}, {}, kind="invalid_prompt", what="This is not a workflow in API format")


def check(prompt: Prompt, classes: Classes) -> list[str]:
    """Ids of the output nodes, after checking every node they need.

    Raises:
        PromptError: unknown node, missing input, wrong type or value, a cycle, or no output node.
    """
    check_shape(prompt)
    unknown = {
        node_id: [Problem(kind="missing_node_type", message=f"the node type {node.get('class_type')!r} is not known")]
        for node_id, node in prompt.items()
        if node.get("class_type") not in classes
    }
    if unknown:
        raise PromptError(prompt, unknown, kind="invalid_prompt", what="The workflow has nodes that are not known here")
    outputs = [n for n, node in prompt.items() if getattr(classes[node["class_type"]], "OUTPUT_NODE", False)]
    if not outputs:
        what = "The workflow has no output node, such as Save Video"
        raise PromptError(prompt, {}, kind="prompt_no_outputs", what=what)
    problems = {}
    for node_id in order(prompt, outputs):
        found = list(_node_problems(prompt, classes, node_id))
        if found:
            problems[node_id] = found
    if problems:
        raise PromptError(prompt, problems, kind="prompt_outputs_failed_validation", what="The workflow cannot run")
    return outputs


def order(prompt: Prompt, outputs: list[str]) -> list[str]:
    """The nodes that ``outputs`` need, each after what it needs itself; PromptError on a cycle."""
    done: dict[str, None] = {}
    for output in outputs:
        # An explicit stack: a workflow may be deeper than Python's recursion limit.
        path: dict[str, Iterator[str]] = {output: _sources(prompt, output)}
        while path:
            node_id = next(reversed(path))
            source = next((s for s in path[node_id] if s not in done and s in prompt), None)
            if source is None:
                done[node_id] = None
                path.popitem()
            elif source in path:
                found = {source: [Problem(kind="dependency_cycle", message="the node needs its own output")]}
                raise PromptError(prompt, found, kind="dependency_cycle", what="The workflow goes in a circle")
            else:
                path[source] = _sources(prompt, source)
    return list(done)


def _sources(prompt: Prompt, node_id: str) -> Iterator[str]:
    for value in prompt[node_id].get("inputs", {}).values():
        if link := as_link(value):
            yield link.node_id


def _node_problems(prompt: Prompt, classes: Classes, node_id: str) -> Iterator[Problem]:
    node = prompt[node_id]
    cls = classes[node["class_type"]]
    inputs = node.get("inputs", {})
    validate = getattr(cls, "VALIDATE_INPUTS", None)
    own_checks = inspect.signature(validate).parameters if validate else {}
    plain: dict[str, Any] = {}
    for name, kind, options, required in input_specs(cls):
        if name not in inputs:
            if required:
                yield Problem(kind="required_input_missing", message="the input is missing", input_name=name)
            continue
        value = inputs[name]
        if link := as_link(value):
            yield from _link_problems(prompt, classes, name, kind, link)
            continue
        try:
            plain[name] = coerce(kind, value)
        except (TypeError, ValueError):
            yield _problem("invalid_input_type", f"the value cannot be read as {kind}", name, value)
            continue
        # As in ComfyUI, a value that the class checks itself is not checked here.
        if name not in own_checks:
            yield from _value_problems(name, kind, options, plain[name])
    # What comes through a link is not known yet.
    if validate and all(
        name in plain or parameter.default is not parameter.empty for name, parameter in own_checks.items()
    ):
        verdict = validate(**{name: value for name, value in plain.items() if name in own_checks})
        if verdict is not True:
            yield Problem(kind="custom_validation_failed", message=str(verdict))


def _problem(kind: str, message: str, name: str, value: object) -> Problem:
    return Problem(kind=kind, message=message, details=f"given: {value!r}", input_name=name, received=value)


def _link_problems(prompt: Prompt, classes: Classes, name: str, kind: Any, link: Link) -> Iterator[Problem]:
    if link.node_id not in prompt:
        yield _problem("bad_linked_input", "the node it is linked to does not exist", name, list(link))
        return
    returned = classes[prompt[link.node_id]["class_type"]].RETURN_TYPES
    if not 0 <= link.output < len(returned):
        yield _problem("bad_linked_input", f"{describe(prompt, link.node_id)} has no such output", name, list(link))
    elif not _fits(returned[link.output], kind):
        message = f"it takes {kind}, and {describe(prompt, link.node_id)} gives {returned[link.output]}"
        yield _problem("return_type_mismatch", message, name, list(link))


def _fits(given: Any, wanted: Any) -> bool:
    """Types are comma-separated alternatives; ``*`` is any; a combo takes the same list, or a string."""
    if isinstance(given, list) or isinstance(wanted, list):
        return given == wanted or "STRING" in (given, wanted) or "*" in (given, wanted)
    one, other = set(given.split(",")), set(wanted.split(","))
    return bool(one & other) or "*" in one | other


def coerce(kind: Any, value: Any) -> Any:
    """``value`` as the widget type ``kind``, as ComfyUI's server reads it; ValueError or TypeError if it is none."""
    if kind == "INT":
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, bool) or int(number) != number:
            raise ValueError(value)
        return int(value) if isinstance(value, str) and value.lstrip("+-").isdigit() else int(number)
    if kind == "FLOAT":
        if isinstance(value, bool):
            raise TypeError(value)
        return float(value)
    if kind == "BOOLEAN":
        if isinstance(value, str) and value.lower() not in ("true", "false"):
            raise ValueError(value)
        return value.lower() == "true" if isinstance(value, str) else bool(value)
    if kind == "STRING":
        if not isinstance(value, str | int | float):
            raise TypeError(value)
        return str(value)
    return value


def _value_problems(name: str, kind: Any, options: Mapping[str, Any], value: Any) -> Iterator[Problem]:
    if kind in ("INT", "FLOAT"):
        low, high = options.get("min"), options.get("max")
        if value != value:
            yield _problem("invalid_input_type", "the value is not a number", name, value)
        if low is not None and value < low:
            yield _problem("value_smaller_than_min", f"the value is below the minimum of {low}", name, value)
        if high is not None and value > high:
            yield _problem("value_bigger_than_max", f"the value is above the maximum of {high}", name, value)
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices is not None and value not in choices:
        shown = ", ".join(map(str, choices[:20])) + (", ..." if len(choices) > 20 else "")
        message = f"the value is not one of: {shown}" if choices else "there is nothing to choose from"
        yield _problem("value_not_in_list", message, name, value)


# --- running --------------------------------------------------------------------------------------------------------


def execute(
    prompt: Prompt,
    classes: Classes,
    *,
    extra_pnginfo: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    up_to: Collection[str] = (),
) -> dict[str, Mapping[str, Any]]:
    """Check ``prompt`` and run its output nodes.

    Args:
        up_to: class names: run the nodes of these that the output nodes need, and nothing that comes after.
        extra_pnginfo: goes to nodes with a hidden EXTRA_PNGINFO, e.g. ``{"workflow": UI-format graph}``.
        on_event: told what runs; it may raise :class:`Cancelled` to stop between two nodes.

    Returns:
        node id -> what each output node shows (its ``ui`` dict).

    Raises:
        PromptError: before anything runs.
        NodeError: a node raised; the exception is its ``__cause__``.
        Cancelled: the user asked to stop.
    """
    outputs = check(prompt, classes)
    needed = order(prompt, outputs)
    if up_to:
        outputs = [node_id for node_id in needed if prompt[node_id]["class_type"] in up_to]
        needed = order(prompt, outputs)
    # A result lives until its last reader has run: a text encoder must not fill memory during decoding.
    readers = Counter(source for node_id in needed for source in set(_sources(prompt, node_id)))
    results: dict[str, tuple[Any, ...]] = {}
    shown: dict[str, Mapping[str, Any]] = {}
    for node_id in needed:
        if on_event is not None:
            on_event(Event(kind="executing", node_id=node_id))
        results[node_id], ui = _run_node(prompt, classes, node_id, results, extra_pnginfo)
        for source in set(_sources(prompt, node_id)):
            readers[source] -= 1
            if not readers[source]:
                del results[source]
        if node_id in outputs:
            shown[node_id] = ui
        if on_event is not None:
            on_event(Event(kind="executed", node_id=node_id, ui=ui))
    return shown


def _run_node(
    prompt: Prompt,
    classes: Classes,
    node_id: str,
    results: Mapping[str, tuple[Any, ...]],
    extra_pnginfo: Mapping[str, Any] | None,
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Call one node: (its outputs, its ``ui``)."""
    cls = classes[prompt[node_id]["class_type"]]
    inputs = prompt[node_id].get("inputs", {})
    arguments: dict[str, Any] = {}
    for name, kind, _, _ in input_specs(cls):
        if name in inputs:
            link = as_link(inputs[name])
            arguments[name] = results[link.node_id][link.output] if link else coerce(kind, inputs[name])
    hidden = {"PROMPT": prompt, "EXTRA_PNGINFO": extra_pnginfo or {}, "UNIQUE_ID": node_id}
    for name, kind in cls.INPUT_TYPES().get("hidden", {}).items():
        arguments[name] = hidden.get(kind)
    try:
        returned = getattr(cls(), cls.FUNCTION)(**arguments)
    except Cancelled:
        raise
    except Exception as error:  # whatever a node raises is reported with the node it came from
        raise NodeError(prompt, node_id, error) from error
    if isinstance(returned, Mapping):
        return tuple(returned.get("result", ())), returned.get("ui", {})
    return tuple(returned), {}
