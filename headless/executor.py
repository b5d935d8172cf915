"""Run a workflow in ComfyUI's API format: check it, find the order, call the nodes.

A prompt maps a node's id to ``{"class_type": name, "inputs": {name: value or [node id, output index]}}``.
Checks and error kinds follow ComfyUI's server, so that the same front end can show them. Nothing here
knows a node of ours: the classes come in as a mapping, and everything is V1-shaped (``INPUT_TYPES``,
``RETURN_TYPES``, ``FUNCTION``, ``OUTPUT_NODE``).
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from ..vidgen_core.errors import Cancelled, UserError

Prompt: TypeAlias = Mapping[str, Mapping[str, Any]]
Classes: TypeAlias = Mapping[str, type]

MAX_PROBLEMS = 100
"""nodes whose problems are listed; a reader needs no more, and an answer must not be larger than what it answers"""


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
    config: object = None
    """the input's declaration"""

    def to_json(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.input_name is not None:
            extra = {"input_name": self.input_name, "input_config": self.config, "received_value": self.received}
        return {"type": self.kind, "message": self.message, "details": self.details, "extra_info": extra}


class PromptError(UserError):
    """The prompt cannot run. ``problems`` lists what is wrong by node id; it is empty when there is no graph at all.
    ``dependents`` are the output nodes that need each of these nodes."""

    def __init__(
        self,
        prompt: Prompt,
        problems: Mapping[str, list[Problem]],
        *,
        kind: str,
        what: str,
        dependents: Mapping[str, list[str]] | None = None,
    ) -> None:
        self.kind, self.problems = kind, dict(problems)
        self.node_errors = node_errors(prompt, problems, dependents or {})
        lines = [what.rstrip(".") + "."]
        for node_id, found in problems.items():
            for problem in found:
                where = describe(prompt, node_id) + (f", input '{problem.input_name}'" if problem.input_name else "")
                lines.append(f"  {where}: {problem.message}" + (f" ({problem.details})" if problem.details else ""))
        super().__init__("\n".join(lines))
        self.args = ("\n".join(lines),)  # several lines, each a finding: not one sentence

    def to_json(self) -> dict[str, Any]:
        """The body of ComfyUI's answer 400 to ``POST /prompt``."""
        details = self.args[0].partition("\n")[2].strip()
        error = {"type": self.kind, "message": self.what, "details": details, "extra_info": {}}
        return {"error": error, "node_errors": self.node_errors}


def node_errors(
    prompt: Prompt, problems: Mapping[str, list[Problem]], dependents: Mapping[str, list[str]]
) -> dict[str, Any]:
    """ComfyUI's table of what is wrong with which node."""
    return {
        node_id: {
            "errors": [problem.to_json() for problem in found],
            "dependent_outputs": list(dependents.get(node_id, ())),
            "class_type": prompt.get(node_id, {}).get("class_type"),
        }
        for node_id, found in problems.items()
    }


class NodeError(Exception):
    """A node raised: ``__cause__`` is what, ``node_id`` where; ``kept`` are files from which the run can go on."""

    def __init__(self, prompt: Prompt, node_id: str, cause: Exception) -> None:
        self.kept: list[Path] = []
        self.node_id, self.class_type = node_id, prompt[node_id]["class_type"]
        super().__init__(f"{describe(prompt, node_id)}: {cause}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happens during a run, told to ``on_event``: once the nodes whose results are known from an earlier run
    (``cached``, only with a cache), then before (``executing``) and after (``executed``) each node."""

    kind: Literal["cached", "executing", "executed"]
    node_id: str = ""
    ui: Mapping[str, Any] = field(default_factory=dict)
    """what an ``executed`` output node shows, e.g. ``{"images": [...]}``"""
    nodes: tuple[str, ...] = ()
    """of ``cached``"""
    is_cached: bool = False
    """this ``executed`` node did not run again"""


@dataclass(frozen=True, slots=True)
class Returned:
    """What a node returned: the list of values of each output (one value, unless it makes lists), and its ``ui``."""

    outputs: tuple[list[Any], ...]
    ui: Mapping[str, Any]


class Cache:
    """What the nodes of the last run returned, by a digest of everything that went into them."""

    def __init__(self) -> None:
        self._results: dict[str, Returned] = {}

    def __len__(self) -> int:
        return len(self._results)

    def get(self, digest: str) -> Returned | None:
        return self._results.get(digest)

    def put(self, digest: str, returned: Returned) -> None:
        self._results[digest] = returned

    def keep(self, digests: Collection[str]) -> None:
        """Forget everything else."""
        self._results = {digest: self._results[digest] for digest in digests if digest in self._results}

    def clear(self) -> None:
        self._results.clear()


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
            kind = spec[0] if isinstance(spec[0], str) else list(spec[0])  # a list of choices may come as a tuple
            yield name, kind, spec[1] if len(spec) > 1 else {}, group == "required"


def output_names(cls: Any) -> list[Any]:
    """A name for each output: what the class calls it, else its type. Strangers give too few, or one as a text."""
    given, types = getattr(cls, "RETURN_NAMES", ()), list(cls.RETURN_TYPES)
    names = [given] if isinstance(given, str) else list(given)[: len(types)]
    return names + types[len(names) :]


# --- checking -------------------------------------------------------------------------------------------------------


def check_shape(prompt: object) -> None:
    """Raise PromptError unless ``prompt`` is a table of nodes."""
    if isinstance(prompt, Mapping) and "nodes" in prompt and "links" in prompt:
        raise PromptError({}, {}, kind="invalid_prompt", what="This is a workflow in UI format; use Export (API)")
    if not isinstance(prompt, Mapping) or not all(map(_is_node, prompt.values())):
        raise PromptError({}, {}, kind="invalid_prompt", what="This is not a workflow in API format")


def _is_node(node: object) -> bool:
    return (
        isinstance(node, Mapping)
        and isinstance(node.get("class_type"), str | None)
        and isinstance(node.get("inputs", {}), Mapping)
    )


@dataclass(frozen=True, slots=True)
class Checked:
    """The output nodes that can run, and what is wrong with the nodes that the others need."""

    outputs: list[str]
    problems: dict[str, list[Problem]]
    dependents: dict[str, list[str]]
    """node with a problem -> the output nodes that need it"""
    num_more: int = 0
    """nodes with a problem that are not listed, because there are too many"""


def check(prompt: Prompt, classes: Classes) -> list[str]:
    """Ids of the output nodes, after checking every node they need.

    Raises:
        PromptError: unknown node, missing input, wrong type or value, a cycle, or no output node.
    """
    checked = examine(prompt, classes)
    if checked.problems:
        raise failed(prompt, checked)
    return checked.outputs


def failed(prompt: Prompt, checked: Checked) -> PromptError:
    """The error for a prompt of which nothing should run."""
    kind, what = "prompt_outputs_failed_validation", "The workflow cannot run"
    what += f"; {checked.num_more} more nodes are wrong than are listed" if checked.num_more else ""
    return PromptError(prompt, checked.problems, kind=kind, what=what, dependents=checked.dependents)


def examine(prompt: Prompt, classes: Classes, targets: Collection[str] | None = None) -> Checked:
    """Check every node that the output nodes need, or those of them that are in ``targets``.

    Raises:
        PromptError: unknown node, a cycle, or no output node.
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
    if targets is not None:
        wanted = frozenset(targets)
        outputs = [node_id for node_id in outputs if node_id in wanted]
    if not outputs:
        what = "The workflow has no output node, such as Save Video"
        raise PromptError(prompt, {}, kind="prompt_no_outputs", what=what)
    needed = order(prompt, outputs)
    declared = {kind: _declared(classes[kind]) for kind in {prompt[node_id]["class_type"] for node_id in needed}}
    problems = {}
    for node_id in needed:
        found = list(_node_problems(prompt, classes, node_id, declared[prompt[node_id]["class_type"]]))
        if found:
            problems[node_id] = found
    if not problems:
        return Checked(outputs, {}, {})
    readers = _readers(prompt, outputs, needed)
    spoiled = 0
    for node_id in problems:
        spoiled |= readers[node_id]
    listed = dict(itertools.islice(problems.items(), MAX_PROBLEMS))
    dependents = {node_id: _named(outputs, readers[node_id]) for node_id in listed}
    return Checked(_named(outputs, ~spoiled), listed, dependents, len(problems) - len(listed))


def _readers(prompt: Prompt, outputs: list[str], needed: list[str]) -> dict[str, int]:
    """Which output nodes need each node, as bits in the order of ``outputs``: thousands of each are no work so."""
    readers = dict.fromkeys(needed, 0) | {output: 1 << place for place, output in enumerate(outputs)}
    for node_id in reversed(needed):
        for source in _sources(prompt, node_id):
            if source in readers:
                readers[source] |= readers[node_id]
    return readers


def _named(outputs: list[str], bits: int) -> list[str]:
    return [output for place, output in enumerate(outputs) if bits >> place & 1]


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


@dataclass(frozen=True, slots=True)
class _Declared:
    """What a class asks for, read once for all its nodes: a loader reads its folders for its lists."""

    specs: list[tuple[str, Any, Mapping[str, Any], bool]]
    validate: Callable[..., Any] | None
    own_checks: Mapping[str, inspect.Parameter]
    broken: Problem | None = None


def _declared(cls: type) -> _Declared:
    validate = getattr(cls, "VALIDATE_INPUTS", None)
    try:
        own_checks = inspect.signature(validate).parameters if validate else {}
        return _Declared(list(input_specs(cls)), validate, own_checks)
    except Exception as error:  # a class of strangers must not take the others with it
        return _Declared([], None, {}, _raised("the node cannot say what it needs", error))


def _raised(what: str, error: Exception) -> Problem:
    return Problem(kind="exception_during_validation", message=what, details=f"{type(error).__name__}: {error}")


def _node_problems(prompt: Prompt, classes: Classes, node_id: str, declared: _Declared) -> Iterator[Problem]:
    if declared.broken is not None:
        yield declared.broken
        return
    inputs = prompt[node_id].get("inputs", {})
    validate, own_checks = declared.validate, declared.own_checks
    plain: dict[str, Any] = {}
    for name, kind, options, required in declared.specs:
        if name not in inputs:
            if required:
                missing = Problem(kind="required_input_missing", message="the input is missing", input_name=name)
                yield from _with_config([missing], kind, options)
            continue
        value = inputs[name]
        if link := as_link(value):
            yield from _with_config(_link_problems(prompt, classes, name, kind, link), kind, options)
            continue
        try:
            plain[name] = coerce(kind, value)
        except (TypeError, ValueError, OverflowError):
            wrong = _problem("invalid_input_type", f"the value cannot be read as {kind}", name, value)
            yield from _with_config([wrong], kind, options)
            continue
        # As in ComfyUI, a value that the class checks itself is not checked here.
        if name not in own_checks:
            yield from _with_config(_value_problems(name, kind, options, plain[name]), kind, options)
    # What comes through a link is not known yet.
    if validate and all(
        name in plain or parameter.default is not parameter.empty for name, parameter in own_checks.items()
    ):
        try:
            verdict = validate(**{name: value for name, value in plain.items() if name in own_checks})
        except Exception as error:  # as above
            yield _raised("the node cannot check its inputs", error)
            return
        if verdict is not True:
            yield Problem(kind="custom_validation_failed", message=str(verdict))


def value_problems(cls: type, inputs: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the plain values of a node, where some are missing or come through links."""
    plain = {name: value for name, value in inputs.items() if as_link(value) is None}
    found = _node_problems({"": {"class_type": "", "inputs": plain}}, {"": cls}, "", _declared(cls))
    return [problem for problem in found if problem.kind != "required_input_missing"]


def _with_config(problems: Iterable[Problem], kind: Any, options: Mapping[str, Any]) -> Iterator[Problem]:
    for problem in problems:
        yield replace(problem, config=[kind, dict(options)])


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
    outputs: list[str] | None = None,
    cache: Cache | None = None,
    keep: Collection[str] | None = None,
    extra_pnginfo: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], None] | None = None,
    up_to: Collection[str] = (),
) -> dict[str, Mapping[str, Any]]:
    """Run the output nodes of ``prompt`` and what they need.

    Args:
        outputs: that were checked already (see :func:`examine`); None checks the prompt and runs all of them.
        cache: of an earlier run; nodes whose inputs are the same do not run again. It then holds this run's results,
            also when the run fails. Without one, a result goes as soon as its last reader has run.
        keep: the nodes whose results go into the cache; those of the others go as without one. None: all nodes.
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
    outputs = check(prompt, classes) if outputs is None else outputs
    if up_to:
        outputs = [node_id for node_id in order(prompt, outputs) if prompt[node_id]["class_type"] in up_to]
    run = _Run(prompt, classes, extra_pnginfo or {}, on_event or (lambda event: None))
    if cache is not None:
        run.remember(cache, keep, order(prompt, outputs))
    if cache is None or keep is not None:
        run.count_readers(order(prompt, outputs))
    for output in outputs:
        run.reach(output)
    return {output: run.shown.get(output, {}) for output in outputs}


class _Run:
    """One run of a prompt. Nodes run when somebody needs them, each once."""

    def __init__(
        self, prompt: Prompt, classes: Classes, extra_pnginfo: Mapping[str, Any], tell: Callable[[Event], None]
    ) -> None:
        self.prompt, self.classes, self.extra_pnginfo, self.tell = prompt, classes, extra_pnginfo, tell
        self.results: dict[str, Returned] = {}
        self.shown: dict[str, Mapping[str, Any]] = {}
        self.specs = {
            kind: list(input_specs(classes[kind])) for kind in {node["class_type"] for node in prompt.values()}
        }
        # Once for each class: a loader reads its folders for its lists.
        self.hidden = {kind: classes[kind].INPUT_TYPES().get("hidden", {}) for kind in self.specs}
        self.readers: Counter[str] | None = None
        self.cache: Cache | None = None
        self.keep: Collection[str] | None = None
        self.digests: dict[str, str] = {}

    def count_readers(self, needed: list[str]) -> None:
        # A result lives until its last reader has run: a text encoder must not fill memory during decoding.
        self.readers = Counter(source for node_id in needed for source in set(_sources(self.prompt, node_id)))

    def remember(self, cache: Cache, keep: Collection[str] | None, needed: list[str]) -> None:
        """Take the cache's results for nodes whose inputs have not changed; forget the others."""
        self.cache, self.keep = cache, keep
        for node_id in needed:
            self.digests[node_id] = self._digest(node_id)
        cache.keep(set(self.digests.values()))
        known = tuple(node_id for node_id, digest in self.digests.items() if cache.get(digest) is not None)
        self.tell(Event(kind="cached", nodes=known))

    def _digest(self, node_id: str) -> str:
        """Of the node and everything that goes into it."""
        node, cls = self.prompt[node_id], self._class(node_id)
        parts: list[Any] = [node["class_type"], self._changed(node_id)]
        if getattr(cls, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in self._hidden(node_id).values():
            parts.append(node_id)
        for name, value in sorted(node.get("inputs", {}).items()):
            link = as_link(value)
            parts.append([name, [self.digests[link.node_id], link.output, "linked"] if link else value])
        return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=repr).encode(), digest_size=20).hexdigest()

    def _changed(self, node_id: str) -> str:
        """What the class says of changes outside the prompt, such as the date of a file."""
        is_changed = getattr(self._class(node_id), "IS_CHANGED", None)
        if is_changed is None:
            return ""
        arguments = {name: values[0] for name, values in self._plain(node_id).items()}
        wanted = inspect.signature(is_changed).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
        arguments = {name: arguments.get(name) for name in (arguments if takes_all else wanted) if name != "kwargs"}
        try:
            verdict = is_changed(**arguments)
        except Exception:  # a class of strangers that cannot tell: run it again, and it will say what is wrong
            verdict = math.nan
        return os.urandom(16).hex() if verdict != verdict else repr(verdict)

    def _class(self, node_id: str) -> type:
        return self.classes[self.prompt[node_id]["class_type"]]

    def _hidden(self, node_id: str) -> Mapping[str, Any]:
        return self.hidden[self.prompt[node_id]["class_type"]]

    def reach(self, output: str) -> None:
        """Run ``output`` after everything that it needs. An explicit stack: graphs may be deep."""
        stack = [output]
        while stack:
            node_id = stack[-1]
            if node_id in self.results or node_id in self.shown or self._recall(node_id):
                stack.pop()
                continue
            waiting = self._waiting(node_id)
            if waiting:
                stack += reversed(waiting)
                continue
            self._run(node_id)
            stack.pop()

    def _recall(self, node_id: str) -> bool:
        known = None if self.cache is None else self.cache.get(self.digests[node_id])
        if known is None:
            return False
        self._finish(node_id, known, is_cached=True)
        return True

    def _waiting(self, node_id: str) -> list[str]:
        """What has to run before this node can: linked inputs; lazy ones if the node asks for them."""
        inputs = self.prompt[node_id].get("inputs", {})
        specs = self.specs[self.prompt[node_id]["class_type"]]
        links = {name: link for name, *_ in specs if (link := as_link(inputs.get(name))) is not None}
        missing = {name: link.node_id for name, link in links.items() if link.node_id not in self.results}
        lazy = {name for name, _, options, _ in specs if options.get("lazy")} & missing.keys()
        now = [source for name, source in missing.items() if name not in lazy]
        if now or not lazy:
            return list(dict.fromkeys(now))
        cls = self._class(node_id)
        if not hasattr(cls, "check_lazy_status"):
            return [missing[name] for name in missing if name in lazy]
        arguments = {name: values[0] if values else None for name, values in self._arguments(node_id).items()}
        try:
            asked = cls().check_lazy_status(**arguments) or ()
        except Exception as error:  # as below
            raise NodeError(self.prompt, node_id, error) from error
        return [missing[name] for name in missing if name in lazy and name in asked]

    def _arguments(self, node_id: str) -> dict[str, list[Any]]:
        """Input -> its values; None for lazy inputs that nobody asked for."""
        arguments = {}
        inputs = self.prompt[node_id].get("inputs", {})
        plain = self._plain(node_id)
        for name, _, _, _ in self.specs[self.prompt[node_id]["class_type"]]:
            link = as_link(inputs.get(name))
            if link is not None:
                known = self.results.get(link.node_id)
                arguments[name] = [None] if known is None else known.outputs[link.output]
            elif name in plain:
                arguments[name] = plain[name]
        return arguments | {name: plain[name] for name in self._hidden(node_id)}

    def _plain(self, node_id: str) -> dict[str, list[Any]]:
        """The inputs that are values of the prompt, and the hidden ones."""
        inputs = self.prompt[node_id].get("inputs", {})
        plain = {
            name: [coerce(kind, inputs[name])]
            for name, kind, _, _ in self.specs[self.prompt[node_id]["class_type"]]
            if name in inputs and as_link(inputs[name]) is None
        }
        hidden = {"PROMPT": self.prompt, "EXTRA_PNGINFO": self.extra_pnginfo, "UNIQUE_ID": node_id}
        for name, kind in self._hidden(node_id).items():
            plain[name] = [hidden.get(kind)]
        return plain

    def _run(self, node_id: str) -> None:
        self.tell(Event(kind="executing", node_id=node_id))
        arguments = self._arguments(node_id)
        try:
            returned = _call(self._class(node_id), arguments)
        except Cancelled:
            raise
        except Exception as error:  # whatever a node raises is reported with the node it came from
            raise NodeError(self.prompt, node_id, error) from error
        finally:
            del arguments
        if self.cache is not None and (self.keep is None or node_id in self.keep):
            self.cache.put(self.digests[node_id], returned)
        if self.readers is not None:
            for source in set(_sources(self.prompt, node_id)):
                self.readers[source] -= 1
                if not self.readers[source]:
                    self.results.pop(source, None)
        self._finish(node_id, returned)

    def _finish(self, node_id: str, returned: Returned, *, is_cached: bool = False) -> None:
        self.results[node_id] = returned
        if getattr(self._class(node_id), "OUTPUT_NODE", False):
            self.shown[node_id] = returned.ui
        self.tell(Event(kind="executed", node_id=node_id, ui=returned.ui, is_cached=is_cached))


def _call(cls: type, arguments: Mapping[str, list[Any]]) -> Returned:
    """Call a node with lists of values: once for each place in the lists (the last value of shorter ones repeats), or
    once with the lists themselves if the class says INPUT_IS_LIST."""
    method = getattr(cls(), cls.FUNCTION)
    length = max(map(len, arguments.values()), default=1)
    if getattr(cls, "INPUT_IS_LIST", False):
        answers = [method(**arguments)]
    else:
        answers = [method(**_place(arguments, place)) for place in range(length)]
    makes_list = getattr(cls, "OUTPUT_IS_LIST", None) or [False] * len(cls.RETURN_TYPES)
    outputs: tuple[list[Any], ...] = tuple([] for _ in cls.RETURN_TYPES)
    ui: dict[str, Any] = {}
    for answer in answers:
        if inspect.iscoroutine(answer):
            answer = asyncio.run(answer)
        given = answer.get("result", ()) if isinstance(answer, Mapping) else answer
        for values, value, is_list in zip(outputs, given or (), makes_list, strict=False):
            values += value if is_list else [value]
        for key, shown in (answer.get("ui", {}) if isinstance(answer, Mapping) else {}).items():
            ui[key] = [*ui[key], *shown] if key in ui else shown
    return Returned(outputs, ui)


def _place(arguments: Mapping[str, list[Any]], place: int) -> dict[str, Any]:
    return {name: values[min(place, len(values) - 1)] for name, values in arguments.items() if values}
