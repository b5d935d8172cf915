"""Many prompts of one workflow: read and checked before anything runs, rendered by workers, each result kept once.

A worker renders one prompt at a time: this process (:mod:`local`), a server (:mod:`remote`) or an actor of a Ray
cluster (:mod:`on_ray`). Workers may die and a prompt may then be rendered twice; but only this process gives results
their names and writes them down, so each is there once. The same command goes on after whatever was written down.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..nodes.host import make_folder, numbered
from ..vidgen_core.errors import Cancelled, FileError, SettingsError, UserError
from ..vidgen_core.media import check_writable
from ..vidgen_core.weights.save import write_error
from .events import Tell
from .executor import Classes, Prompt, as_link, order
from .render import override_by_name
from .stop import Stop

RECORD = "results.jsonl"
"""in the folder of results: one line for each that is finished"""
UNFINISHED = ".unfinished"
"""in the folder of results: what is being rendered"""
MAX_TRIES = 3
"""of one prompt, where the workers that had it were lost: it may be what they die of"""
MAX_NAME = 100
_NAME = re.compile(r"\w([\w -]*\w)?")
STOP_S = 20.0
"""how long the workers may take to stop by themselves, so that unfinished runs are kept"""
CLOSE_S = 2.0
"""how long they may take to notice that they are closed"""
_LOOK_S = 0.2

T = TypeVar("T")


class WorkerLost(Exception):
    """A worker is gone, or has forgotten its prompt: another one can render it."""


class JobFailed(Exception):
    """This prompt cannot be rendered, by whomever: the others can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One prompt of a batch."""

    name: str
    """of its result, without an ending; no two are the same, also where capitals do not count"""
    prompt: Prompt
    line: int | None = None
    """where it stands in the file of prompts"""
    shared: frozenset[str] = field(default_factory=frozenset)
    """nodes whose results another prompt of the batch needs too, such as loaders"""

    @property
    def digest(self) -> str:
        """Of everything that decides what it looks like."""
        return hashlib.sha256(json.dumps(self.prompt, sort_keys=True).encode()).hexdigest()[:16]

    def about(self) -> dict[str, Any]:
        """Which job it is, for events."""
        return {"name": self.name} | ({} if self.line is None else {"line": self.line})


class Worker(Protocol):
    """Whoever renders, one prompt at a time, in a thread that is not the main one."""

    name: str

    def render(self, job: Job, folder: Path, tell: Tell) -> list[Path]:
        """Render into ``folder``, which is empty but for what an interrupted run left; the files, in order.

        Raises:
            WorkerLost, JobFailed, Cancelled; UserError for what ends the whole batch.
        """
        ...

    def ready(self) -> bool:
        """At the beginning, and after it was lost: wait a while until it can take prompts; False: it never will."""
        ...

    def close(self) -> None:
        """No more prompts; also while :meth:`ready` waits, which then ends soon."""
        ...


# --- the file of prompts ----------------------------------------------------------------------------------------------


def read_jobs(path: Path, prompt: Prompt, classes: Classes, check: Callable[[Prompt], object]) -> list[Job]:
    """The jobs of a file with a table of JSON on each line: ``{"name": "star", "set": {"Prompt.prompt": "a star"}}``.

    Args:
        prompt: the workflow in API format that each line changes.
        classes: node types, for the inputs' names.
        check: raises UserError for a prompt that cannot run.

    Raises:
        FileError: the file cannot be read, or holds no prompts.
        SettingsError: lines that cannot be used, all of them with their numbers.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FileError(
            "The prompts are not a text file", given=path, expected="a table of JSON on each line"
        ) from error
    except OSError as error:
        raise FileError(f"The prompts cannot be read ({error.strerror})", given=path, do="check the path") from error
    jobs: list[Job] = []
    wrong: list[str] = []
    taken: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            job = _read_line(text, number, prompt, classes)
            earlier = taken.setdefault(job.name.casefold(), number)
            if earlier != number:
                raise SettingsError("The name is taken", given=job.name, expected=f"another one than line {earlier}")
            jobs.append(job)
            check(job.prompt)
        except UserError as error:
            wrong.append(f"line {number}: {error}")
    if wrong:
        count = "1 line cannot be used" if len(wrong) == 1 else f"{len(wrong)} lines cannot be used"
        raise _Lines(f"{path}: {count}, so nothing was rendered", wrong)
    if not jobs:
        raise FileError("There are no prompts in the file", given=path, expected="a table of JSON on each line")
    return with_shared(jobs, classes)


class _Lines(SettingsError):
    """Several findings, one a line."""

    def __init__(self, what: str, lines: Iterable[str]) -> None:
        super().__init__(what)
        self.args = ("\n  ".join([f"{what}.", *(line.replace("\n", "\n  ") for line in lines)]),)


def _read_line(text: str, number: int, prompt: Prompt, classes: Classes) -> Job:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"This is no JSON ({error})", given=text[:80]) from error
    expected = '{"name": "star", "set": {"Prompt.prompt": "a star"}}, each part may be left out'
    if not isinstance(said, Mapping) or said.keys() - {"name", "set"}:
        raise SettingsError("This is not what a line says", given=text[:80], expected=expected)
    name, changes = said.get("name", f"{number:05d}"), said.get("set", {})
    if not isinstance(changes, Mapping):
        raise SettingsError("This is not what a line says", given=text[:80], expected=expected)
    if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name):
        expected = f"at most {MAX_NAME} letters, digits, - and _, with spaces between them"
        raise SettingsError("A result cannot have this name", given=repr(name)[:150], expected=expected)
    return Job(name=name, line=number, prompt=override_by_name(prompt, classes, changes))


def with_shared(jobs: Sequence[Job], classes: Classes) -> list[Job]:
    """The jobs, each with the nodes that compute the same in another one. Output nodes have to run each time."""
    signatures = [_signatures(job.prompt) for job in jobs]
    count = Counter(signature for of_job in signatures for signature in set(of_job.values()))

    def is_shared(job: Job, node_id: str, signature: str) -> bool:
        return count[signature] > 1 and not getattr(classes[job.prompt[node_id]["class_type"]], "OUTPUT_NODE", False)

    return [
        replace(job, shared=frozenset(node_id for node_id, one in of_job.items() if is_shared(job, node_id, one)))
        for job, of_job in zip(jobs, signatures, strict=True)
    ]


def _signatures(prompt: Prompt) -> dict[str, str]:
    """node -> the same text for the same node that is fed by the same nodes."""
    found: dict[str, str] = {}
    for node_id in order(prompt, list(prompt)):
        inputs = {}
        for name, value in prompt[node_id].get("inputs", {}).items():
            link = as_link(value)
            inputs[name] = value if link is None else [found.get(link.node_id), link.output]
        whole = json.dumps([prompt[node_id]["class_type"], inputs], sort_keys=True)
        found[node_id] = hashlib.sha256(whole.encode()).hexdigest()
    return found


# --- what is finished -------------------------------------------------------------------------------------------------


class Store(Protocol):
    """Where results go."""

    def finished(self, job: Job) -> list[Path] | None:
        """The files of this very job, if it is finished and they are still there."""
        ...

    def begin(self, job: Job) -> Path:
        """The folder to render it in: empty, but for what an interrupted run of this very job left."""
        ...

    def keep(self, job: Job, files: Sequence[Path]) -> list[Path]:
        """Give the files their names; the paths they have then."""
        ...

    def close(self) -> None:
        """Leave nothing behind but what goes on later."""
        ...


class Results:
    """A folder of finished files, and the record that says which job they are of.

    A job with one file has ``NAME.mp4``; more of them are ``NAME.2.mp4``, ``NAME.3.png``, ...

    Raises:
        FileError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._record = folder / RECORD
        self._known: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self._record.read_text("utf-8", errors="replace") if self._record.exists() else ""
            # A crash may have left half a line, and nothing may be written behind it.
            self._begin = "" if not text or text.endswith("\n") else "\n"
        except OSError as error:
            raise FileError(f"The folder of results cannot be used ({error.strerror})", given=folder) from error
        for line in text.splitlines():
            entry = _entry(line)
            if entry is not None:
                self._known[entry["name"]] = entry

    def finished(self, job: Job) -> list[Path] | None:
        entry = self._known.get(job.name)
        if entry is None or entry["digest"] != job.digest:
            return None
        files = [(self.folder / one["file"], one["bytes"]) for one in entry["files"]]
        is_whole = all(path.is_file() and path.stat().st_size == size for path, size in files)
        return [path for path, _ in files] if is_whole else None

    def begin(self, job: Job) -> Path:
        folder = self.folder / UNFINISHED / f"{job.name}-{job.digest}"
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        return folder

    def keep(self, job: Job, files: Sequence[Path]) -> list[Path]:
        named = [job.name if place == 1 else f"{job.name}.{place}" for place in range(1, len(files) + 1)]
        kept = [self.folder / f"{name}{path.suffix}" for name, path in zip(named, files, strict=True)]
        try:
            return self._keep(job, dict(zip(files, kept, strict=True)))
        except OSError as error:
            raise write_error(self.folder / job.name, error) from error

    def _keep(self, job: Job, moves: Mapping[Path, Path]) -> list[Path]:
        for path, final in moves.items():
            os.replace(path, final)
        kept = list(moves.values())
        before = self._known.get(job.name, {"files": []})["files"]
        for one in before:  # of the same name, by another prompt
            if self.folder / one["file"] not in kept:
                (self.folder / one["file"]).unlink(missing_ok=True)
        sizes = [{"file": path.name, "bytes": path.stat().st_size} for path in kept]
        entry = {"name": job.name, "digest": job.digest, "files": sizes}
        with self._record.open("a", encoding="utf-8") as record:
            record.write(f"{self._begin}{json.dumps(entry)}\n")
            record.flush()
            os.fsync(record.fileno())
        self._begin, self._known[job.name] = "", entry
        shutil.rmtree(self.folder / UNFINISHED / f"{job.name}-{job.digest}", ignore_errors=True)
        return kept

    def close(self) -> None:
        place = self.folder / UNFINISHED
        for folder in place.iterdir() if place.is_dir() else ():
            _sweep(folder)
            if not any(folder.iterdir()):
                folder.rmdir()
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _sweep(folder: Path) -> None:
    """Leave nothing but an interrupted run."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != UNFINISHED:
            path.unlink()


class SingleResult:
    """One prompt without a record: its files get the name that the user gave, or the next number in a folder.

    Raises:
        FileError, SettingsError: nothing can be written there.
    """

    def __init__(self, output: Path | None) -> None:
        is_folder = output is None or output.is_dir()
        self._file = None if output is None or is_folder else check_writable(output)
        self._folder = output or Path("output") if self._file is None else self._file.parent
        make_folder(self._folder)
        self._place = Path(tempfile.mkdtemp(prefix=".vidgen-", dir=self._folder))

    def finished(self, job: Job) -> list[Path] | None:
        return None

    def begin(self, job: Job) -> Path:
        shutil.rmtree(self._place)
        self._place.mkdir()
        return self._place

    def keep(self, job: Job, files: Sequence[Path]) -> list[Path]:
        kept = []
        for place, path in enumerate(files, start=1):
            if self._file is None:
                final = numbered(self._folder, "VidGen", path.suffix)
            else:
                final = self._file.with_name(f"{self._file.stem}{f'_{place}' if place > 1 else ''}{path.suffix}")
            os.replace(path, final)
            kept.append(final)
        return kept

    def close(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)


def _entry(line: str) -> dict[str, Any] | None:
    """A line of the record; None for one that is damaged, or that would lead out of the folder."""
    try:
        entry = json.loads(line)
        files = [(one["file"], one["bytes"]) for one in entry["files"]]
        is_sound = isinstance(entry["name"], str) and isinstance(entry["digest"], str)
        is_sound &= all(Path(name).name == name and isinstance(size, int) for name, size in files)
    except (ValueError, KeyError, TypeError):
        return None
    return entry if is_sound else None


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Outcome:
    """How a batch went."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    """name -> its result"""
    failed: dict[str, str] = field(default_factory=dict)
    """name -> why"""


def run_batch(jobs: Sequence[Job], workers: Sequence[Worker], results: Store, *, stop: Stop, tell: Tell) -> Outcome:
    """Render what ``results`` does not have yet: each worker takes the next job when it is done with one.

    Raises:
        Cancelled: asked to stop. What is finished is kept.
        UserError: no worker is left, or the results cannot be written.
    """
    run = _Run(workers, results, tell)
    for job in jobs:
        files = results.finished(job)
        if files is None:
            run.todo.append(job)
        else:
            run.outcome.files[job.name] = files
    tell("batch", {"prompts": len(jobs), "kept": len(run.outcome.files), "workers": [one.name for one in workers]})
    for job in jobs:
        if job.name in run.outcome.files:
            tell("kept", job.about() | {"files": run.outcome.files[job.name]})
    try:
        while run.is_going():
            stop.check()
            run.hand_out()
            run.look()
    except Cancelled:
        run.wait_for_stop()
        raise
    finally:
        run.close()
        results.close()
        tell("end", {"finished": len(run.outcome.files), "failed": len(run.outcome.failed)})
    return run.outcome


class _Run:
    def __init__(self, workers: Sequence[Worker], results: Store, tell: Tell) -> None:
        self.results, self.tell = results, tell
        self.todo: deque[Job] = deque()
        self.workers = workers
        self.coming = {_in_thread(worker.ready): worker for worker in workers}
        self.idle: list[Worker] = []
        self.busy: dict[Future[list[Path]], tuple[Worker, Job, float]] = {}
        self.losses: Counter[str] = Counter()
        self.outcome = Outcome()

    def is_going(self) -> bool:
        return bool(self.todo or self.busy)

    def hand_out(self) -> None:
        while self.todo and self.idle:
            worker, job = self.idle.pop(0), self.todo.popleft()
            about = job.about() | {"worker": worker.name}
            self.tell("started", about)
            folder = self.results.begin(job)
            work = _Work(worker, job, folder, self.tell)
            self.busy[_in_thread(work)] = (worker, job, time.monotonic())
        if self.todo and not (self.busy or self.coming or self.idle):
            raise UserError(
                "No worker is left",
                given=f"{len(self.todo)} prompts that are not rendered",
                do="see what happened to them; the same command goes on with the prompts that are left",
            )

    def look(self) -> None:
        """Take what has come back, or wait a moment for it."""
        wait([*self.busy, *self.coming], timeout=_LOOK_S, return_when=FIRST_COMPLETED)
        for future in [future for future in self.coming if future.done()]:
            worker = self.coming.pop(future)
            if future.result():
                self.idle.append(worker)
        for future in [future for future in self.busy if future.done()]:
            self._take(future)

    def _take(self, future: Future[list[Path]]) -> None:
        worker, job, began = self.busy.pop(future)
        try:
            files = future.result()
        except WorkerLost as lost:
            self._lost(worker, job, str(lost))
        except JobFailed as failed:
            self.idle.append(worker)
            self._failed(job, str(failed))
        else:
            self.idle.append(worker)
            kept = self.outcome.files[job.name] = self.results.keep(job, files)
            seconds = round(time.monotonic() - began, 3)
            self.tell("finished", job.about() | {"worker": worker.name, "files": kept, "seconds": seconds})

    def _lost(self, worker: Worker, job: Job, why: str) -> None:
        self.losses[job.name] += 1
        self.tell("lost", job.about() | {"worker": worker.name, "error": f"{worker.name} was lost ({why})"})
        self.coming[_in_thread(worker.ready)] = worker
        if self.losses[job.name] < MAX_TRIES:
            self.todo.appendleft(job)
        else:
            self._failed(job, f"{MAX_TRIES} workers were lost over it; the last one: {why}")

    def _failed(self, job: Job, why: str) -> None:
        self.outcome.failed[job.name] = why
        self.tell("failed", job.about() | {"error": why})

    def wait_for_stop(self) -> None:
        """The workers hear of a stop by themselves; a result that is ready by then is kept."""
        wait(list(self.busy), timeout=STOP_S)
        for future in [future for future in self.busy if future.done()]:
            if future.exception() is None:
                self._take(future)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        wait([*self.coming, *self.busy], timeout=CLOSE_S)


@dataclass(frozen=True, slots=True)
class _Work:
    worker: Worker
    job: Job
    folder: Path
    tell: Tell

    def __call__(self) -> list[Path]:
        return self.worker.render(self.job, self.folder, self._tell)

    def _tell(self, event: str, about: Mapping[str, Any]) -> None:
        self.tell(event, self.job.about() | {"worker": self.worker.name} | dict(about))


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """A thread that nobody waits for at exit: a second ctrl-C ends the program at once."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised again where the result is taken
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="vidgen-batch").start()
    return future
