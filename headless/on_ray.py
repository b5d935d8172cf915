"""Workers of a batch on a Ray cluster: an actor for each GPU, or for every few CPUs, each with models of its own.

The package has to be installed on every machine of the cluster, and the folders of models and packs have to lie at the
same place. Results come back through Ray, so no folder is shared.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vidgen_core.errors import Cancelled, MissingLibraryError, SettingsError
from .batch import Job, JobFailed, WorkerLost
from .custom_nodes import load_packs, own_packs
from .events import Tell
from .local import LocalWorker
from .stop import Stop

log = logging.getLogger("vidgen")

START_S = 600.0
"""how long an actor may take to begin: a machine may have to be started for it"""
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSettings:
    """What each actor is told; paths are whole, because an actor begins in another folder."""

    device: str | None
    folders: Sequence[Path]
    input_folder: Path | None = None
    custom_nodes: Sequence[Path]
    working_folder: Path
    """where names in the prompts begin, if the machine has it"""
    version: str


class Renderer:
    """What an actor is: a worker of this very kind in another process."""

    def __init__(self, settings: ActorSettings) -> None:
        from .. import __version__

        if settings.version != __version__:
            raise RuntimeError(f"this machine has VidGen {__version__}, the batch was started by {settings.version}")
        if settings.working_folder.is_dir():
            os.chdir(settings.working_folder)
        packs = load_packs(settings.custom_nodes, own_packs())
        self.worker = LocalWorker(
            classes=packs.classes,
            stop=Stop(),
            device=settings.device,
            folders=settings.folders,
            input_folder=settings.input_folder,
        )

    def ready(self) -> bool:
        """Answered as soon as the actor has begun."""
        return True

    def render(self, job: Job) -> tuple[list[tuple[str, bytes]], str | None]:
        """(name and content of each file, None), or (nothing, what is wrong with the prompt)."""
        with tempfile.TemporaryDirectory(prefix="vidgen-ray-") as folder:
            try:
                files = self.worker.render(job, Path(folder), lambda event, about: None)
            except JobFailed as failed:
                return [], str(failed)
            return [(path.name, path.read_bytes()) for path in files], None


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connected to the cluster at ``address``; to the one of this machine, or a new one on it, if that is None.

    Raises:
        MissingLibraryError: Ray is not installed.
        SettingsError: there is no cluster at the address.
    """
    # Nothing is told to anybody unless the user says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingLibraryError(
            "Ray is not installed", expected="ray", do='pip install "comfyui-vidgen[ray]"'
        ) from error
    if ray.is_initialized():  # by a program that has us as a library
        yield
        return
    with _own_signals():
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SettingsError(
                f"There is no Ray cluster ({error})",
                given=f"--ray {address or ''}".strip(),
                do="give the address of its head, such as 10.0.0.5:6379, or --ray alone to use this machine",
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own answer to SIGTERM in the place of ours."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def workers_of(settings: ActorSettings, *, num_jobs: int, num_cpus: int, stop: Stop) -> list[RayWorker]:
    """A worker for each GPU of the cluster, or for every ``num_cpus`` CPUs where it has none; not more than jobs.

    Raises:
        SettingsError: no machine of the cluster has so many CPUs.
    """
    import ray

    has = ray.cluster_resources()
    num_gpus = 0 if settings.device == "cpu" else int(has.get("GPU", 0))
    if num_gpus:
        needs, count = {"num_gpus": 1, "num_cpus": 1}, num_gpus
    else:
        most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
        if not 1 <= num_cpus <= most:
            raise SettingsError(
                "An actor cannot have so many CPUs", given=f"--ray-cpus {num_cpus}", expected=f"from 1 to {most}"
            )
        needs = {"num_cpus": num_cpus}
        count = sum(int(node["Resources"].get("CPU", 0)) // num_cpus for node in ray.nodes() if node["Alive"])
    return [
        RayWorker(f"actor {number}", settings, needs, stop) for number in range(1, max(1, min(count, num_jobs)) + 1)
    ]


class RayWorker:
    """An actor, and another one in its place when it is lost."""

    def __init__(self, name: str, settings: ActorSettings, needs: Mapping[str, float], stop: Stop) -> None:
        self.name, self.settings, self.needs, self.stop = name, settings, needs, stop
        self.is_closed = False
        self.actor: Any = self._new()

    def _new(self) -> Any:
        import ray

        return ray.remote(Renderer).options(**self.needs).remote(self.settings)

    def ready(self) -> bool:
        import ray

        self.actor = self.actor or self._new()
        answer = self.actor.ready.remote()
        end = time.monotonic() + START_S
        while not (self.is_closed or self.stop.event.is_set()) and time.monotonic() < end:
            if ray.wait([answer], timeout=_LOOK_S)[0]:
                return _is_true(answer)
        return False

    def render(self, job: Job, folder: Path, tell: Tell) -> list[Path]:
        import ray

        answer = self.actor.render.remote(job)
        while not ray.wait([answer], timeout=_LOOK_S)[0]:
            if self.stop.event.is_set():
                raise Cancelled("stopped by the user")
            if self.is_closed:  # asking once more, after the end, would make Ray begin anew
                raise WorkerLost("it is not needed any more")
        try:
            files, failed = ray.get(answer)
        # The actor is gone, or the machine on which its result lay.
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            ray.kill(self.actor)
            self.actor = None
            raise WorkerLost(" ".join(str(error).split())) from error
        if failed is not None:
            raise JobFailed(failed)
        paths = [folder / f"{number:05d}{Path(name).suffix}" for number, (name, _) in enumerate(files, start=1)]
        for path, (_, content) in zip(paths, files, strict=True):
            path.write_bytes(content)
        return paths

    def close(self) -> None:
        import ray

        self.is_closed = True
        if self.actor is not None:
            ray.kill(self.actor)


def _is_true(answer: Any) -> bool:
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayActorError as error:
        log.warning("An actor could not begin: %s", error)
        return False
