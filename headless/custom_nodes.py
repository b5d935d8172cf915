"""Node packs of others, from folders that the user named: V1 classes that need nothing of ComfyUI.

Loading a pack runs its code with the rights of this process. Nothing is looked for by itself: no folder is read that
was not named on the command line, and no workflow and no request can name one.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from ..vidgen_core.errors import FileError
from .executor import input_specs
from .graph import PACK_ID

PACKAGE = "vidgen_custom_nodes"
"""before the module names of packs, so that they hide nothing"""
COMFYUI = frozenset(
    {"app", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras"}
    | {"execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "server"}
)
"""modules that are there only inside ComfyUI"""


@dataclass(slots=True)
class Packs:
    """What was found in the named folders."""

    classes: dict[str, type] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    """node id -> where it comes from, such as ``custom_nodes.NAME``"""
    web: dict[str, Path] = field(default_factory=dict)
    """pack -> its files for the page"""
    problems: list[str] = field(default_factory=list)
    """a sentence for each pack or node that could not be loaded"""

    def tell_problems(self) -> None:
        for problem in self.problems:
            sys.stderr.write(f"vidgen: {problem}\n")


def own_packs() -> Packs:
    """This pack's own nodes, and those of ComfyUI's that ordinary graphs need, before any others."""
    from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .core_nodes import NODES, TITLES

    modules = dict.fromkeys(NODE_CLASS_MAPPINGS, f"custom_nodes.{PACK_ID}") | dict.fromkeys(NODES, "nodes")
    return Packs({**NODE_CLASS_MAPPINGS, **NODES}, {**NODE_DISPLAY_NAME_MAPPINGS, **TITLES}, modules)


def load_packs(places: Sequence[Path], known: Packs) -> Packs:
    """``known`` with the packs at ``places``: a pack, or a folder with packs in it. What is known already stays.

    Raises:
        FileError: a place does not exist.
    """
    for place in places:
        for path in _packs_at(place):
            _add(path, known)
    return known


def _packs_at(place: Path) -> Iterator[Path]:
    """A pack is a folder with ``__init__.py``, or a file of Python."""
    place = place.expanduser().resolve()
    if _is_pack(place):
        yield place
        return
    if not place.is_dir():
        raise FileError(
            "There is no such folder of nodes",
            given=place,
            expected="a pack (a folder with __init__.py, or a .py file), or a folder with packs in it",
        )
    # As in ComfyUI, what begins with a dot or ends in .disabled sleeps.
    names = sorted(path for path in place.iterdir() if not path.name.startswith((".", "__")))
    yield from (path for path in names if _is_pack(path))


def _is_pack(path: Path) -> bool:
    return (path / "__init__.py").is_file() and path.suffix != ".disabled" if path.is_dir() else path.suffix == ".py"


def _add(path: Path, packs: Packs) -> None:
    name = path.name if path.is_dir() else path.stem
    try:
        module = _import(path, name)
    # A stranger's code may raise anything, and exit: the others, and the server, go on.
    except (Exception, SystemExit) as error:
        packs.problems.append(f"The nodes of {name} cannot be loaded: {_why(error)}")
        return
    classes = getattr(module, "NODE_CLASS_MAPPINGS", None)
    if not isinstance(classes, Mapping):
        is_new = hasattr(module, "comfy_entrypoint")
        why = "they need ComfyUI's V3 API" if is_new else "it has no NODE_CLASS_MAPPINGS"
        packs.problems.append(f"The nodes of {name} cannot be loaded: {why}")
        return
    titles = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None)
    for node_id, cls in classes.items():
        why = "a node of this name is there already" if node_id in packs.classes else _flaw(node_id, cls)
        if why is not None:
            packs.problems.append(f"The node {node_id} of {name} cannot be used: {why}")
            continue
        packs.classes[node_id] = cls
        packs.titles[node_id] = str(titles.get(node_id, node_id)) if isinstance(titles, Mapping) else node_id
        packs.modules[node_id] = f"custom_nodes.{name}"
    _add_web(path, name, module, packs)


def _import(path: Path, name: str) -> ModuleType:
    module_name = f"{PACKAGE}_{re.sub(r'[^0-9A-Za-z_]', '_', name)}"
    if module_name in sys.modules:
        if sys.modules[module_name].__file__ == str(path / "__init__.py" if path.is_dir() else path):
            return sys.modules[module_name]
        raise ImportError("another pack of this name is loaded already")
    if path.is_dir():
        file, inside = path / "__init__.py", [str(path)]
    else:
        file, inside = path, None
    spec = importlib.util.spec_from_file_location(module_name, file, submodule_search_locations=inside)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for loaded in [one for one in sys.modules if one == module_name or one.startswith(f"{module_name}.")]:
            del sys.modules[loaded]
        raise
    return module


def _why(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        if top in COMFYUI:
            return f"they need ComfyUI itself (they import {error.name})"
        return f"the package {top} is not installed; its requirements.txt says which one that is"
    return f"{type(error).__name__}: {error}"


def _flaw(node_id: object, cls: Any) -> str | None:
    """Why the executor could not use the class; None: it can."""
    if not isinstance(node_id, str) or not isinstance(cls, type):
        return "it is no class under a name"
    if not isinstance(getattr(cls, "RETURN_TYPES", None), (tuple, list)):
        return "it has no list of RETURN_TYPES"
    function = getattr(cls, "FUNCTION", None)
    if not isinstance(function, str) or not callable(getattr(cls, function, None)):
        return "its FUNCTION names no method"
    try:
        options = [options for _, _, options, _ in input_specs(cls)]
        hidden = cls.INPUT_TYPES().get("hidden", {})  # type: ignore[attr-defined]
    except Exception as error:  # a stranger's code, as above
        return f"its INPUT_TYPES cannot be read ({type(error).__name__}: {error})"
    are_tables = all(isinstance(one, Mapping) for one in (*options, hidden))
    return None if are_tables else "options of its inputs are no tables"


def _add_web(path: Path, name: str, module: ModuleType, packs: Packs) -> None:
    named = getattr(module, "WEB_DIRECTORY", None)
    if named is None:
        return
    folder = path / str(named)
    if path.is_dir() and folder.is_dir() and folder.resolve().is_relative_to(path):
        packs.web[name] = folder.resolve()
    else:
        packs.problems.append(f"The pages of {name} cannot be used: {named} is no folder in it")
