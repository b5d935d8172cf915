"""What the frontend is told of the nodes: ComfyUI's ``/object_info``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..executor import Classes, output_names
from ..graph import widget_names

log = logging.getLogger("vidgen")

_FLAGS = ("DEPRECATED", "EXPERIMENTAL", "DEV_ONLY")


def object_info(classes: Classes, titles: Mapping[str, str], modules: Mapping[str, str]) -> dict[str, Any]:
    """Node id -> declaration. ``modules``: node id -> where it comes from, such as ``custom_nodes.vidgen``."""
    declared = {}
    for name, cls in classes.items():
        try:
            declared[name] = _declaration(name, cls, titles.get(name, name), modules[name])
        except Exception:  # a class of strangers: without the others there would be no page at all
            log.exception("The node %s cannot say what it is, and is left out", name)
    return declared


def _declaration(name: str, cls: Any, title: str, module: str) -> dict[str, Any]:
    inputs = cls.INPUT_TYPES()
    returns = list(cls.RETURN_TYPES)
    info = {
        "input": inputs,
        "input_order": {group: list(fields) for group, fields in inputs.items()},
        "is_input_list": bool(getattr(cls, "INPUT_IS_LIST", False)),
        "output": returns,
        "output_is_list": list(getattr(cls, "OUTPUT_IS_LIST", [False] * len(returns))),
        "output_name": output_names(cls),
        "output_tooltips": list(getattr(cls, "OUTPUT_TOOLTIPS", ())),
        "name": name,
        "display_name": title,
        "description": getattr(cls, "DESCRIPTION", ""),
        "python_module": module,
        "category": getattr(cls, "CATEGORY", "nodes"),
        "output_node": bool(getattr(cls, "OUTPUT_NODE", False)),
        "search_aliases": list(getattr(cls, "SEARCH_ALIASES", ())),
        # Widgets are only ever appended, so today's order reads every older file.
        "fallbackWidgetsValuesNames": widget_names(cls),
    }
    return info | {flag.lower(): True for flag in _FLAGS if getattr(cls, flag, False)}
