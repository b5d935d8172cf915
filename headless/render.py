"""Render a prompt in this process: host, progress, ctrl-C, and the file it ends in."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..vidgen_core.errors import Cancelled, FileError, SettingsError
from ..vidgen_core.memory.host import bundled_models
from . import FILES
from .events import Tell
from .executor import Cache, Event, NodeError, Prompt, as_link, check, check_shape, describe, execute, input_specs
from .graph import About, to_ui
from .progress import ProgressBar
from .stop import Stop
from .team import Member
from .ui import is_ui, to_prompt

SAMPLERS = ("VidGenSampler",)
"""nodes that all processes of a team run together"""
WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
MEDIA = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".png", ".webp"})


def load_prompt(path: Path, classes: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """The API-format prompt of a .json file in API or UI format, or of a video or picture that carries one.

    Raises:
        FileError: missing, unreadable, or not JSON.
        PromptError: JSON, but not a workflow, or one in UI format with nodes that are not in ``classes``.
        SettingsError: a video or picture without a workflow.
    """
    if path.suffix.lower() in MEDIA:
        from ..vidgen_core.media import read_metadata

        metadata = read_metadata(path)
        text = metadata.get("prompt") or metadata.get("workflow")
        if text is None:
            raise SettingsError("This file carries no workflow", given=path, expected="a file saved by Save Video")
    else:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise FileError("The workflow is not a text file", given=path, expected="a workflow as JSON") from error
        except OSError as error:
            raise FileError(
                f"The workflow cannot be read ({error.strerror})", given=path, do="check the path"
            ) from error
    try:
        prompt = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"The workflow is not valid JSON ({error})", given=path, do="export it again") from error
    if is_ui(prompt):
        return to_prompt(prompt, classes)
    check_shape(prompt)
    return prompt


def shipped(name: str) -> dict[str, dict[str, Any]]:
    """The API-format prompt ``workflows/api/NAME.json`` of the package."""
    return load_prompt(WORKFLOWS / "api" / f"{name}.json", {})


def runs_as_installed(name: str) -> bool:
    """Whether a workflow of ours names no model but those that come with the package."""
    given = [
        str(value)
        for node in shipped(name).values()
        for key, value in node["inputs"].items()
        if key in ("model_folder", "model_name", "vae_name", "text_name", "lora_name")
    ]
    bundled = bundled_models()
    return all(value.partition("/")[0] in bundled for value in given)


def about(name: str) -> About:
    """What is told beside the shipped workflow ``name``: ``workflows/notes``."""
    notes = WORKFLOWS / "notes"
    models = notes / f"{name}.models.json"
    return About(
        note=(notes / f"{name}.md").read_text("utf-8").strip(),
        models=json.loads(models.read_text("utf-8")) if models.is_file() else (),
    )


def node_of(prompt: Prompt, class_type: str, title: str | None = None) -> str:
    """The id of the node of this class (and title) in a workflow of ours."""
    found = [
        node_id
        for node_id, node in prompt.items()
        if node["class_type"] == class_type and title in (None, node.get("_meta", {}).get("title"))
    ]
    assert len(found) == 1, f"{class_type} {title or ''}: {found}"
    return found[0]


def override(prompt: Prompt, classes: Mapping[str, type], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``prompt`` with ``NODE.INPUT=VALUE`` applied; NODE is an id, a title or a class name.

    Raises:
        SettingsError: malformed, or the node, input or value does not exist.
    """
    changed = copy.deepcopy({node_id: dict(node) for node_id, node in prompt.items()})
    for setting in settings:
        left, equals, value = setting.partition("=")
        node, dot, name = left.rpartition(".")
        if not (equals and dot and node and name):
            raise SettingsError("A --set cannot be read", given=setting, expected="NODE.INPUT=VALUE, such as 5.seed=7")
        node_id = _find_node(changed, node)
        changed[node_id].setdefault("inputs", {})[name] = _read_value(changed, classes, node_id, name, value)
    return changed


def override_by_name(
    prompt: Prompt, classes: Mapping[str, type], values: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """``prompt`` with Python's values under ``NODE.INPUT``, or under ``INPUT`` alone where one node only has it.

    Raises:
        SettingsError: the node or input does not exist, or several nodes have the input.
    """
    changed = copy.deepcopy({node_id: dict(node) for node_id, node in prompt.items()})
    for key, value in values.items():
        node, _, name = key.rpartition(".")
        if node:
            node_id = _find_node(changed, node)
        else:
            having = [n for n in changed if name in _input_names(changed, classes, n)]
            if len(having) != 1:
                listed = ", ".join(f"{node_id}.{name}" for node_id in having) or "the name of an input"
                raise SettingsError(
                    "Several nodes have this input" if having else "No node has this input",
                    given=name,
                    expected=f"one of {listed}" if having else "the name of an input, or NODE.INPUT",
                )
            node_id = having[0]
        _check_input(changed, classes, node_id, name)
        changed[node_id].setdefault("inputs", {})[name] = value
    return changed


def _input_names(prompt: Prompt, classes: Mapping[str, type], node_id: str) -> list[str]:
    cls = classes.get(prompt[node_id].get("class_type", ""))
    return [] if cls is None else [spec[0] for spec in input_specs(cls)]


def _check_input(prompt: Prompt, classes: Mapping[str, type], node_id: str, name: str) -> None:
    names = _input_names(prompt, classes, node_id)
    if names and name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise SettingsError(
            f"{describe(prompt, node_id)} has no such input",
            given=name,
            expected="one of " + ", ".join(names),
            do=f"did you mean {near[0]}?" if near else None,
        )


def _find_node(prompt: Prompt, name: str) -> str:
    if name in prompt:
        return name
    names = {node_id: {node.get("class_type"), node.get("_meta", {}).get("title")} for node_id, node in prompt.items()}
    found = [node_id for node_id in prompt if name in names[node_id]]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{node_id} ({prompt[node_id].get('class_type')})" for node_id in found or prompt)
    what = "Several nodes have this name" if found else "There is no such node"
    raise SettingsError(what, given=name, expected=f"one of {listed}")


def _read_value(prompt: Prompt, classes: Mapping[str, type], node_id: str, name: str, value: str) -> Any:
    _check_input(prompt, classes, node_id, name)
    cls = classes.get(prompt[node_id].get("class_type", ""))
    specs = {} if cls is None else {spec[0]: spec[1] for spec in input_specs(cls)}
    if specs.get(name) == "STRING" or isinstance(specs.get(name), list):
        return value
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(value)
        link = as_link(value)
        if link is None or specs.get(name) is None or link.node_id in prompt:
            return value
    return value


def render_workflow(
    workflow: Mapping[str, Any] | str | Path,
    *,
    output: str | Path | None = None,
    device: str | None = None,
    models: Sequence[str | Path] = (),
    input_folder: str | Path | None = None,
    quiet: bool = True,
    values: Mapping[str, Any] | None = None,
) -> list[Path]:
    """What ``vidgen.render`` does; see there."""
    from .custom_nodes import own_packs

    classes: Mapping[str, type] = own_packs().classes

    if isinstance(workflow, str | Path):
        known = WORKFLOWS / "api" / f"{workflow}.json"
        is_name = isinstance(workflow, str) and Path(workflow).name == workflow and known.is_file()
        prompt = load_prompt(known if is_name else Path(workflow), classes)
    else:
        prompt = to_prompt(workflow, classes) if is_ui(workflow) else workflow
        check_shape(prompt)
    return render(
        override_by_name(prompt, classes, values or {}),
        classes,
        output=None if output is None else Path(output),
        stop=Stop(),
        device=device,
        folders=[Path(folder) for folder in models],
        input_folder=FILES / "input" if input_folder is None else Path(input_folder),
        quiet=quiet,
    )


class Stopped(Cancelled):
    """The user stopped a render; ``kept`` are the files from which the same command goes on."""

    def __init__(self, kept: Sequence[Path]) -> None:
        self.kept = list(kept)
        super().__init__("stopped by the user")


def check_device(name: str | None) -> str | None:
    """``name`` if torch has such a device here; SettingsError with those that it has."""
    if name is None:
        return None
    import torch

    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    known += ["mps"] if torch.backends.mps.is_available() else []
    if name not in known and not (name == "cuda" and "cuda:0" in known):
        raise SettingsError("There is no such device here", given=name, expected="one of " + ", ".join(known))
    return name


def render(
    prompt: Prompt,
    classes: Mapping[str, type],
    *,
    output: Path | None,
    stop: Stop,
    device: str | None = None,
    folders: Sequence[Path] = (),
    input_folder: Path | None = None,
    quiet: bool = False,
    plan: Any = None,
    scratch: Path | None = None,
    member: Member | None = None,
    tell: Tell | None = None,
    cache: Cache | None = None,
    keep: Collection[str] | None = None,
) -> list[Path]:
    """Run ``prompt``; the videos it saved.

    Args:
        output: the file of the first video, or a folder for all of them; None is the folder ``output``.
        stop: listening already; asked between nodes and, through the host, within them.
        device: None takes a GPU if there is one.
        folders: where to look for models besides the bundled ones.
        input_folder: whose files ComfyUI's own loaders name.
        plan: a ``memory.plan.Plan`` to keep to; None decides as it goes.
        scratch: where large temporary files lie; None is beside the output.
        member: this process's place among those that render together. Only the first of them gets past the sampler.
        tell: is told each ``node`` and its ``progress``, in the place of the bar.
        cache, keep: what stays for the next render; see :func:`executor.execute`.

    Raises:
        UserError, Cancelled, executor.NodeError.
    """
    stop.check()
    from ..nodes import host as hosts
    from ..vidgen_core.media import check_writable
    from ..vidgen_core.memory.plan import following, return_freed_memory
    from ..vidgen_core.nn.parallel import in_team

    leads = member is None or member.rank == 0
    run_on = check_device(device) if member is None else member.device(device)
    host = hosts.LocalNodeHost(
        run_on=run_on, folders=folders, cancelled=stop.event, scratch=scratch, input_folder=input_folder
    )
    if output is None or output.is_dir():
        host.output_folder = output or host.output_folder
    else:
        host.output_file = check_writable(output)
    # A changed command must not find the run of the one before.
    host.run_id = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:8]
    bar = ProgressBar(sys.stderr)
    host.on_progress = bar if leads and not quiet else None
    if tell is not None and leads:
        host.on_progress = lambda what, done, total: tell("progress", {"what": what, "done": done, "total": total})

    def between_nodes(event: Event) -> None:
        if event.kind == "executing":
            stop.check()
            if tell is not None and leads:
                tell("node", {"node": event.node_id, "class_type": prompt[event.node_id]["class_type"]})

    joined = contextlib.nullcontext() if member is None else member.joined(str(run_on))
    try:
        with hosts.using(host), following(plan):
            if plan is not None:
                return_freed_memory()
            check(prompt, classes)  # before drawing it, which needs known nodes
            workflow = {"workflow": to_ui(prompt, classes)}
            with joined as team, in_team(team):
                up_to = () if leads else SAMPLERS
                execute(
                    prompt,
                    classes,
                    cache=cache,
                    keep=keep,
                    extra_pnginfo=workflow,
                    on_event=between_nodes,
                    up_to=up_to,
                )
    except (Cancelled, KeyboardInterrupt) as stopped:
        raise Stopped(host.unfinished_runs()) from stopped
    except NodeError as error:
        error.kept = host.unfinished_runs()
        raise
    finally:
        bar.close()
    for path in host.unfinished_runs() if leads else ():
        path.unlink(missing_ok=True)
    return host.saved
