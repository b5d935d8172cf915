"""A workflow of trivial nodes, many prompts for it, and what its nodes noted: for the tests of batches."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgen.headless.batch import Job, Results, read_jobs, run_batch
from vidgen.headless.custom_nodes import load_packs, own_packs
from vidgen.headless.executor import check
from vidgen.headless.local import LocalWorker
from vidgen.headless.stop import Stop

LAB = Path(__file__).resolve().parent / "packs" / "lab"


def workflow(notes: Path | str = "") -> dict[str, Any]:
    """Load -> Draw -> Keep, in API format."""
    return {
        "1": {"class_type": "LabLoad", "inputs": {"notes": str(notes)}},
        "2": {
            "class_type": "LabDraw",
            "inputs": {"model": ["1", 0], "seed": 0, "mood": "good", "notes": str(notes)},
        },
        "3": {"class_type": "LabKeep", "inputs": {"numbers": ["2", 0], "copies": 1}},
    }


def lab_classes() -> Mapping[str, type]:
    packs = load_packs([LAB], own_packs())
    assert not packs.problems
    return packs.classes


def write_lines(file: Path, lines: Sequence[Any]) -> Path:
    """Each line as JSON; texts as they are."""
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return file


def seeds(count: int) -> list[dict[str, Any]]:
    """Lines ``seed-1``, ``seed-2``, ..."""
    return [{"name": f"seed-{seed}", "set": {"LabDraw.seed": seed}} for seed in range(1, count + 1)]


STUBBORN = 8
"""the seed at which the first worker hangs until it is killed"""


def sixteen(folder: Path) -> list[Job]:
    """Jobs of which one hangs in the first process that takes it; what they did is noted in ``folder / "notes"``."""
    lines = seeds(16)
    lines[STUBBORN - 1]["set"]["LabDraw.mood"] = "stubborn"
    return jobs_of(write_lines(folder / "p.jsonl", lines), workflow(folder / "notes"))


def kill_the_stubborn(notes: Path) -> None:
    """In a thread: end the process that hangs, as soon as one does."""

    def watch() -> None:
        while True:
            for pid, seed in noted(notes, "draw"):
                if int(seed) == STUBBORN:
                    os.kill(int(pid), signal.SIGKILL)
                    return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


def jobs_of(file: Path, prompt: Mapping[str, Any]) -> list[Job]:
    classes = lab_classes()
    return read_jobs(file, prompt, classes, lambda prompt: check(prompt, classes))


def sequential(jobs: Sequence[Job], folder: Path) -> dict[str, bytes]:
    """What one process makes of the jobs, one after the other."""
    worker = LocalWorker(classes=lab_classes(), stop=Stop(), device="cpu")
    run_batch(jobs, [worker], Results(folder), stop=Stop(), tell=lambda event, about: None)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    """file -> bytes, of everything but the record."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "results.jsonl"
    }


def noted(file: Path, kind: str) -> list[list[str]]:
    """The words behind ``kind`` on each line of that kind."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(f"{kind} ")]
