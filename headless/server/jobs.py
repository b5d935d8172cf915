"""The queue of a server: prompts wait, one runs in a thread of its own, and what became of each is kept.

It says what happens in ComfyUI's words and order, through one function; it knows nothing of HTTP.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Tensor

from ...nodes import host as hosts
from ...vidgen_core.errors import Cancelled, UserError
from ..executor import Cache, Classes, Event, NodeError, Prompt, execute
from . import messages
from .host import ServerHost

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("vidgen")

MAX_HISTORY = 1000
MAX_HISTORY_BYTES = 128 * 2**20
"""of the requests that are kept"""
_PREVIEW_EVERY_S = 0.1

Status = Literal["pending", "in_progress", "completed", "failed", "cancelled"]


class Say(Protocol):
    """Sends an event, or a binary frame as it is, to one client, or to all."""

    def __call__(self, event: str | bytes, data: Mapping[str, Any] | None = None, *, to: str | None = None) -> None: ...


class Overview(NamedTuple):
    """All jobs at one moment."""

    running: Job | None
    waiting: list[Job]
    """in the order they will run"""
    done: list[Job]
    """the oldest first"""


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One prompt on its way."""

    id: str
    number: float
    prompt: Prompt
    outputs: list[str]
    """ids of the output nodes to run"""
    extra_data: Mapping[str, Any]
    client_id: str | None = None
    num_bytes: int = 0
    """of the request: what waiting and remembering it takes"""
    status: Status = "pending"
    created_ms: int = field(default_factory=lambda: now_ms())
    started_ms: int | None = None
    ended_ms: int | None = None
    shown: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """node id -> what it shows, as far as it ran"""
    events: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """how the run went, for the history"""
    error: Mapping[str, Any] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def listener(self) -> str:
        """Who is told of the run: nobody, where the request named nobody."""
        return self.client_id or ""


def now_ms() -> int:
    return int(time.time() * 1000)


class Jobs:
    """Prompts that wait, run and are done.

    Args:
        classes: node types.
        new_host: makes the nodes' host for a run.
        say: told everything; called from several threads.
    """

    def __init__(self, classes: Classes, new_host: Callable[[], ServerHost], say: Say) -> None:
        self.classes, self._new_host, self._say = classes, new_host, say
        self._waiting: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self.running: Job | None = None
        self.done: OrderedDict[str, Job] = OrderedDict()
        self._num_done_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self.cache = Cache()
        self._forget = False
        self._thread = threading.Thread(target=self._work, name="vidgen-jobs", daemon=True)
        self._thread.start()

    # --- asked by the server ---

    def next_number(self) -> int:
        return next(self._numbers)

    def put(self, job: Job) -> bool:
        """Whether it waits now; not if there is a job of its id already."""
        with self._changed:
            if self.find(job.id) is not None:
                return False
            heapq.heappush(self._waiting, (job.number, next(self._order), job))
            self._changed.notify()
        self._tell_status()
        return True

    def overview(self) -> Overview:
        with self._changed:
            waiting = [job for *_, job in sorted(self._waiting, key=lambda entry: entry[:2])]
            return Overview(self.running, waiting, list(self.done.values()))

    def remaining(self) -> int:
        with self._changed:
            return len(self._waiting) + (self.running is not None)

    def num_waiting_bytes(self) -> int:
        with self._changed:
            return sum(job.num_bytes for *_, job in self._waiting)

    def find(self, job_id: str) -> Job | None:
        with self._changed:
            if self.running is not None and self.running.id == job_id:
                return self.running
            return self.done.get(job_id) or next((job for *_, job in self._waiting if job.id == job_id), None)

    def interrupt(self, job_id: str | None = None) -> bool:
        """Ask the running job to stop, if it is this one; whether one was asked."""
        with self._changed:
            if self.running is None or (job_id is not None and self.running.id != job_id):
                return False
            self.running.cancelled.set()
            return True

    def remove(self, job_ids: set[str] | None = None) -> None:
        """Take jobs out of the queue that have not begun; None takes all."""
        with self._changed:
            gone = [job for *_, job in self._waiting if job_ids is None or job.id in job_ids]
            self._waiting = [entry for entry in self._waiting if job_ids is not None and entry[2].id not in job_ids]
            heapq.heapify(self._waiting)
        for job in gone:
            job.status, job.ended_ms = "cancelled", now_ms()
        if gone:
            self._tell_status()

    def forget(self, job_ids: set[str] | None = None) -> None:
        """Delete from the history; None deletes all."""
        with self._changed:
            for job_id in list(self.done) if job_ids is None else job_ids & self.done.keys():
                self._num_done_bytes -= self.done.pop(job_id).num_bytes

    def free(self) -> None:
        """Drop the results, and with them the models, that are kept between runs; after the running job, if any."""
        with self._changed:
            self._forget = True
            self._changed.notify()

    def close(self) -> None:
        """Stop the running job and the thread."""
        with self._changed:
            self._closing = True
            self._waiting.clear()
            if self.running is not None:
                self.running.cancelled.set()
            self._changed.notify()
        self._thread.join(timeout=10)

    # --- the thread ---

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._forget and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                if self._forget:
                    self._forget = False
                    self.cache.clear()
                if not self._waiting:
                    continue
                *_, job = heapq.heappop(self._waiting)
                self.running = job
                job.status, job.started_ms = "in_progress", now_ms()
            _Running(self, job, self._new_host(), self._say).run()
            with self._changed:
                self.running = None
                job.ended_ms = now_ms()
                self.done[job.id] = job
                self._num_done_bytes += job.num_bytes
                while len(self.done) > MAX_HISTORY or self._num_done_bytes > MAX_HISTORY_BYTES:
                    self._num_done_bytes -= self.done.popitem(last=False)[1].num_bytes
            self._tell_status()
            self._say("executing", {"node": None, "prompt_id": job.id}, to=job.listener)

    def _tell_status(self) -> None:
        self._say("status", {"status": {"exec_info": {"queue_remaining": self.remaining()}}})


class _Running:
    """A job while it runs: turns what the executor and the host tell into ComfyUI's messages."""

    def __init__(self, jobs: Jobs, job: Job, host: ServerHost, say: Say) -> None:
        self.jobs, self.job, self.host, self.say = jobs, job, host, say
        self.states: dict[str, dict[str, Any]] = {}
        self.executed: list[str] = []
        self.node = ""
        self.sheet: Image | None = None
        self.previewed = 0.0

    def run(self) -> None:
        job, host = self.job, self.host
        host.cancelled = job.cancelled
        host.on_progress, host.on_preview = self._on_progress, self._on_preview
        self._event("execution_start", {})
        try:
            with hosts.using(host):
                execute(
                    job.prompt,
                    self.jobs.classes,
                    outputs=job.outputs,
                    cache=self.jobs.cache,
                    extra_pnginfo=job.extra_data.get("extra_pnginfo") or {},
                    on_event=self._on_event,
                )
        except Cancelled:
            job.status = "cancelled"
            about = {"node_id": self.node, "node_type": self._type(self.node), "executed": self.executed}
            self._event("execution_interrupted", about)
        except NodeError as error:
            job.status = "failed"
            self._fail(error)
        except (Exception, SystemExit) as error:  # the thread must live: the next job may be fine
            log.error("The prompt %s failed outside of its nodes", job.id)
            job.status = "failed"
            self._tell_error(self.node, error)
        else:
            job.status = "completed"
            self._event("execution_success", {})

    def _event(self, event: str, data: Mapping[str, Any]) -> None:
        whole = {"prompt_id": self.job.id, **data, "timestamp": now_ms()}
        self.job.events.append((event, whole))
        self.say(event, whole, to=self.job.listener)

    def _type(self, node_id: str) -> str:
        return self.job.prompt.get(node_id, {}).get("class_type", "")

    def _on_event(self, event: Event) -> None:
        if event.kind == "cached":
            self._event("execution_cached", {"nodes": list(event.nodes)})
            return
        if self.job.cancelled.is_set():
            raise Cancelled("stopped by the user")
        node_id, to = event.node_id, self.job.listener
        named = {"node": node_id, "display_node": node_id, "prompt_id": self.job.id}
        if event.kind == "executing":
            self.node, self.sheet = node_id, None
            self._state(node_id, 0, 1, "running")
            self.say("executing", named, to=to)
            return
        if event.ui:
            ui = {**event.ui}
            self.job.shown[node_id] = ui
            self.say("executed", {**named, "output": ui}, to=to)
        self.executed.append(node_id)
        self._state(node_id, 1, 1, "finished")

    def _state(self, node_id: str, value: float, most: float, state: str) -> None:
        self.states[node_id] = {
            "value": value,
            "max": most,
            "state": state,
            "node_id": node_id,
            "prompt_id": self.job.id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        data = {"prompt_id": self.job.id, "nodes": dict(self.states)}
        self.say("progress_state", data, to=self.job.listener)

    def _on_progress(self, what: str, done: int, total: int) -> None:
        self._state(self.node, done, total, "running")
        if self.sheet is not None:
            self.say(messages.preview(self.sheet, prompt_id=self.job.id, node_id=self.node), to=self.job.listener)
            self.sheet = None
        data = {"value": done, "max": total, "prompt_id": self.job.id, "node": self.node}
        self.say("progress", data, to=self.job.listener)

    def _on_preview(self, frames: Tensor) -> None:
        now = time.monotonic()
        if now - self.previewed >= _PREVIEW_EVERY_S:
            self.previewed = now
            self.sheet = hosts.contact_sheet(frames)

    def _fail(self, error: NodeError) -> None:
        self._tell_error(error.node_id, error.__cause__ or error)

    def _tell_error(self, node_id: str, cause: BaseException) -> None:
        known = isinstance(cause, UserError)
        trace = [] if known else traceback.format_exception(cause)
        if not known:
            log.error("%s", "".join(trace))
        self.job.error = {
            "node_id": node_id,
            "node_type": self._type(node_id),
            "exception_message": str(cause),
            "exception_type": type(cause).__name__,
            "traceback": trace or [str(cause)],
        }
        inputs = self.job.prompt.get(node_id, {}).get("inputs", {})
        more = {"executed": self.executed, "current_inputs": dict(inputs), "current_outputs": sorted(self.job.shown)}
        if known:
            more["vidgen"] = cause.parts()
        self._event("execution_error", {**self.job.error, **more})
