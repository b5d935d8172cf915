"""One render on several processes of this machine: started, watched and ended together.

The process that the user started computes nothing. It starts one process per part of the video, each of which runs the
same workflow up to the sampler; the first one also decodes and writes. Whatever happens to one of them, or to this one,
ends all: nobody waits for a process that is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from ..vidgen_core.errors import Cancelled, SettingsError
from .stop import Stop

if TYPE_CHECKING:
    from ..vidgen_core.nn.parallel import Team

MAX_MEMBERS = 64
STOP_S = 10.0
"""how long the first process may take to stop by itself, so that the unfinished run is kept"""
FOLLOW_S = 5.0
"""how long it may take to say by itself what another one has found wrong with the input"""
_BAD_INPUT = 1
_CRASHED = 70


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a team, before it has met the others."""

    rank: int
    size: int
    method: str
    folder: str
    """for the file in which they find each other, and for what they have to say"""

    @property
    def words(self) -> Path:
        return Path(self.folder) / f"process_{self.rank}.txt"

    def device(self, name: str | None) -> str:
        return devices(name, self.size)[self.rank]

    @contextmanager
    def joined(self, device: str) -> Iterator[Team]:
        """Part of the team until the block ends. A block that fails leaves the others to whoever watches them."""
        import torch

        from ..vidgen_core.nn.parallel import end_team, start_team

        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        store = str(Path(self.folder) / "meeting")
        yield start_team(self.rank, self.size, store, torch.device(device), self.method)  # type: ignore[arg-type]
        end_team()


def devices(name: str | None, size: int) -> list[str]:
    """The device of each of ``size`` processes: a GPU each, or all on the CPU.

    Raises:
        SettingsError: there are not that many GPUs, or the processes cannot talk to each other there.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    if name == "cpu" or (name is None and num_gpus == 0 and not torch.backends.mps.is_available()):
        return ["cpu"] * size
    if name not in (None, "cuda") or size > num_gpus:
        raise SettingsError(
            "There are not enough GPUs for one each",
            given=f"{size} processes on {name or 'the default device'}",
            expected=f"at most {num_gpus}" if num_gpus else "--device cpu, as there is no GPU that can take part",
            do="lower --context-parallel, or give --device cpu",
        )
    if not torch.distributed.is_nccl_available():
        raise SettingsError(
            "GPUs cannot exchange tensors with this build of torch",
            given=f"{size} processes on cuda",
            expected="torch with NCCL (Linux)",
            do="leave --context-parallel out",
        )
    return [f"cuda:{rank}" for rank in range(size)]


def check_team(size: int, device: str | None) -> None:
    """Raise SettingsError unless so many processes can render together here."""
    if not 1 <= size <= MAX_MEMBERS:
        raise SettingsError(
            "The number of processes cannot be used", given=size, expected=f"a whole number from 1 to {MAX_MEMBERS}"
        )
    devices(device, size)


Work = Callable[[Member, Stop], int]
"""what each process does, to be found by its name in its module; gives the exit status"""


def run_team(work: Work, size: int, method: str, stop: Stop) -> int:
    """Run ``work`` in ``size`` processes; the exit status of the first one.

    ``stop`` asks the first process to stop, which ends all; a KeyboardInterrupt here ends them at once.

    Raises:
        Cancelled: it was asked to, and ended before it could say anything itself.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="vidgen-team-") as folder:
        members = [Member(rank, size, method, folder) for rank in range(size)]
        processes = [context.Process(target=_main, args=(work, member), daemon=True) for member in members]
        try:
            for process in processes:
                process.start()
            failed = _watch(processes, stop)
        finally:
            _end(processes)
        if failed is not None:
            _report(members[failed], processes[failed])
        status = processes[0].exitcode
        if stop.event.is_set() and (status is None or status < 0):
            raise Cancelled("stopped by the user")
        return status if status is not None and status >= 0 else 1


def _watch(processes: Sequence[BaseProcess], stop: Stop) -> int | None:
    """Wait for the first process. The rank of another one, if that is what went wrong."""
    patience: float | None = None
    culprit: int | None = None
    asked = False
    while processes[0].is_alive():
        connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=0.1)
        now = time.monotonic()
        if stop.event.is_set() and not asked:
            processes[0].terminate()  # it listens, and keeps the run
            asked, patience = True, now + STOP_S
        lost = [rank for rank, process in enumerate(processes) if rank and process.exitcode not in (None, 0)]
        if lost and culprit is None and not asked:
            culprit = lost[0]
            # Bad input is bad for all, and the first one says so. A crash is not, and the first one waits for nothing.
            patience = now + (FOLLOW_S if processes[culprit].exitcode == _BAD_INPUT else 0.0)
        if patience is not None and now > patience:
            return culprit
    return culprit if culprit is not None and processes[culprit].exitcode != _BAD_INPUT else None


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is not None and process.is_alive():
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()


def _report(member: Member, process: BaseProcess) -> None:
    said = member.words.read_text("utf-8", errors="replace").strip() if member.words.exists() else ""
    last = said.splitlines()[-1] if said else f"it ended with status {process.exitcode}"
    sys.stderr.write(f"vidgen: process {member.rank + 1} of {member.size} failed: {last}\n")


# --- inside a process -------------------------------------------------------------------------------------------------


def _main(work: Work, member: Member) -> None:
    _end_with_parent()
    stop = Stop()
    # Ctrl-C reaches every process of a terminal; here it is for the one that watches.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: stop.event.set())
    if member.rank:
        said = open(member.words, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  open until the process ends
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    status = _CRASHED
    try:
        status = work(member, stop)
    finally:
        if status == _CRASHED:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the ordinary end: it might wait for exchanges that nobody answers any more.
        os._exit(status)


def _end_with_parent() -> None:
    """This process is no use without the one that watches it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by run_team"
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="vidgen-parent").start()
