"""Does every shipped workflow make the same frames as its API twin, to the bit?

Each of ``workflows/`` is rendered twice, from the editor's file and from the API-format one, and the hashes of what the
files hold are compared: of the frames of videos, of the tensors of encoded prompts.

    python -m vidgen.benchmarks.workflows --json benchmarks/results/workflows.json
    python -m vidgen.benchmarks.workflows hunyuan_t2v --steps 2
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..headless.render import WORKFLOWS, render_workflow, shipped
from ..vidgen_core.errors import UserError
from .full_size import commit
from .render import machine

STEPPED = ("VidGenSampler", "VidGenCalibrateCache")
"""nodes with a number of steps"""

Changes = Mapping[str, Mapping[str, Any]]
"""class of a node -> values for its inputs"""


def names() -> list[str]:
    return sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))


def content_hash(path: Path) -> str:
    """Of what a file holds, not of its bytes: a video has its workflow inside."""
    from safetensors.numpy import load_file

    from ..vidgen_core.media import read_video

    digest = hashlib.sha256()
    if path.suffix == ".safetensors":
        parts = sorted(load_file(path).items())
    else:
        frames, fps = read_video(path)
        parts = [(f"{fps}", frames)]
    for name, numbers in parts:
        digest.update(f"{name} {numbers.dtype} {numbers.shape}".encode())
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def hashes(path: Path, changes: Changes, models: Sequence[Path]) -> dict[str, str]:
    """Name of each file that the workflow makes -> hash of what it holds.

    Raises:
        UserError: it cannot run here, as where its models are missing.
    """
    # The ids of the nodes are the same in both formats.
    values = {
        f"{node_id}.{name}": value
        for node_id, node in shipped(path.stem).items()
        for name, value in changes.get(node["class_type"], {}).items()
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        render_workflow(path, output=folder, models=models, values=values)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): content_hash(file) for file in files}


def compare(name: str, changes: Changes, models: Sequence[Path] = ()) -> dict[str, Any]:
    """The hashes of both formats, and whether they are the same."""
    started = time.perf_counter()
    try:
        ui, api = (
            hashes(path, changes, models) for path in (WORKFLOWS / f"{name}.json", WORKFLOWS / "api" / f"{name}.json")
        )
    except UserError as error:
        return {"same": None, "why": " ".join(str(error).split())[:200]}
    seconds = round(time.perf_counter() - started, 1)
    return {"same": bool(ui) and ui == api, "seconds": seconds, "files": ui, "twin": {} if ui == api else api}


def told(row: Mapping[str, Any]) -> str:
    if row["same"] is None:
        return f"cannot run here: {row['why']}"
    return "the same" if row["same"] else "NOT THE SAME"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vidgen.benchmarks.workflows", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="workflows; all of them by default")
    parser.add_argument("--steps", type=int, help="of every sampler, where a look is enough; as shipped by default")
    parser.add_argument(
        "--models", type=Path, action="append", default=[], help="a folder of models besides the bundled"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 if every workflow that can run here makes the same twice, else 1."""
    arguments = parse(argv)
    changes = {} if arguments.steps is None else {kind: {"steps": arguments.steps} for kind in STEPPED}
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "steps": arguments.steps or "as shipped",
        "workflows": {},
    }
    for name in arguments.names or names():
        row = report["workflows"][name] = compare(name, changes, arguments.models)
        print(f"{name}: {told(row)}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["same"] is not False for row in report["workflows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
