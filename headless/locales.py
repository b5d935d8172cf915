"""The texts of the nodes for ComfyUI's translations: ``locales/LANGUAGE/nodeDefs.json``.

``python -m vidgen.headless.locales`` writes the English file from the node classes and says what the others lack.
ComfyUI serves the folder by itself. Names, titles and descriptions are compiled by its frontend as messages, in which
``@ { } | %`` have a meaning, so they must do without; tooltips are shown as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .executor import Classes, input_specs

FOLDER = Path(__file__).resolve().parents[1] / "locales"
FILE = "nodeDefs.json"

Texts = dict[str, dict[str, Any]]


def english(classes: Classes, titles: Mapping[str, str]) -> Texts:
    """Node id -> display_name, description, and name and tooltip of each input (by name) and output (by number)."""
    return {node_id: _texts(cls, titles[node_id]) for node_id, cls in classes.items()}


def _texts(cls: Any, title: str) -> dict[str, Any]:
    inputs = {name: _slot(name, options.get("tooltip")) for name, _, options, _ in input_specs(cls)}
    names = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)
    tooltips = getattr(cls, "OUTPUT_TOOLTIPS", (None,) * len(names))
    outputs = {str(i): _slot(*pair) for i, pair in enumerate(zip(names, tooltips, strict=True))}
    texts = {"display_name": title, "description": cls.DESCRIPTION, "inputs": inputs, "outputs": outputs}
    return {key: value for key, value in texts.items() if value}


def _slot(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def flat(texts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """(``Node.inputs.steps.tooltip``, text) of every text."""
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def read(language: str) -> Texts:
    return json.loads((FOLDER / language / FILE).read_text("utf-8"))


def differences(wanted: Texts, given: Texts) -> list[str]:
    """One line for each text that a translation lacks, or has for no node of ours."""
    here, there = dict(flat(wanted)), dict(flat(given))
    lacking = [
        f"missing: {key} = {json.dumps(text, ensure_ascii=False)}" for key, text in here.items() if key not in there
    ]
    return lacking + [f"of no use: {key}" for key in there if key not in here]


def main() -> int:
    from .. import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    texts = english(NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS)
    path = FOLDER / "en" / FILE
    path.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"Wrote {path}\n")
    problems = 0
    for language in sorted(folder.name for folder in FOLDER.iterdir() if folder.name != "en"):
        found = differences(texts, read(language))
        problems += len(found)
        sys.stdout.write("".join(f"{language} {line}\n" for line in found))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
