"""The host: whatever runs the core (ComfyUI, the command line, a script) and what the core asks of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from ..errors import Cancelled, FileError

PARTS = ("network", "codec", "text", "vision")
"""kinds of files: diffusion network, VAE, text encoders (together or one by one), LLaVA's image encoder"""

FIRST = "vidgen-tiny-hunyuan"
"""the bundled model of those who name none"""

FOLDERS = {
    "network": "diffusion_models",
    "codec": "vae",
    "text": "text_encoders",
    "vision": "clip_vision",
    "lora": "loras",
}
"""ComfyUI's folder of each kind, and of LoRAs, under ``models/``"""

OLD_FOLDERS = {"text": ("clip",)}
"""folders that ComfyUI still reads besides"""


def folders_of(kind: str) -> tuple[str, ...]:
    """The folders of a kind under ``models/``, the usual one first."""
    return FOLDERS.get(kind, kind), *OLD_FOLDERS.get(kind, ())


class Host(Protocol):
    """What the core may ask for. ``nodes/host.py`` answers with ComfyUI's manager, :class:`LocalHost` elsewhere."""

    def device(self) -> torch.device:
        """Where networks run."""
        ...

    def make_room(self, num_bytes: int) -> None:
        """Free device memory, e.g. by unloading other models, before ``num_bytes`` are needed."""
        ...

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``what`` (``"sample"``, ``"decode"``, ...) are finished."""
        ...

    def preview(self, frames: Callable[[], Tensor]) -> None:
        """A small preview is available: ``frames()`` computes (T, H, W, 3) uint8 on the CPU, only if called."""
        ...

    def check_cancelled(self) -> None:
        """Raise :class:`Cancelled` (or the host's own signal) when the user asked to stop. Called often."""
        ...

    def find(self, kind: str, name: str) -> Path:
        """The file or folder of ``kind`` (a key of :data:`FOLDERS`) that the user calls ``name``."""
        ...


@dataclass(slots=True, kw_only=True)
class LocalHost:
    """A host without ComfyUI: callbacks for progress and previews, an event for cancelling.

    ``folders`` are searched for models, each laid out as ComfyUI's ``models/`` or as one folder per model;
    the bundled checkpoints are always found.
    """

    run_on: torch.device | str | None = None
    """None: the first GPU if there is one, else the CPU"""
    folders: Sequence[Path] = ()
    on_progress: Callable[[str, int, int], None] | None = None
    on_preview: Callable[[Tensor], None] | None = None
    cancelled: Event = field(default_factory=Event)

    def device(self) -> torch.device:
        return torch.device(self.run_on) if self.run_on is not None else default_device()

    def make_room(self, num_bytes: int) -> None:
        """Nothing else is loaded by a local host; the allocator's cache is all there is to give back."""
        if self.device().type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device())
            if free < num_bytes:
                torch.cuda.empty_cache()

    def progress(self, what: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(what, done, total)

    def preview(self, frames: Callable[[], Tensor]) -> None:
        if self.on_preview is not None:
            self.on_preview(frames())

    def check_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled("stopped by the user")

    def cancel(self) -> None:
        """Ask the running work to stop; safe from another thread or a signal handler."""
        self.cancelled.set()

    def find(self, kind: str, name: str) -> Path:
        """Raises FileError, with the names that exist, when there is no such file."""
        direct = Path(name).expanduser()
        if name and direct.exists():
            return direct
        bundled = bundled_models()
        # Names come from workflows of strangers as well: they must not lead out of the folders.
        if ".." not in Path(name.replace("\\", "/")).parts and not direct.is_absolute():
            model, _, file = name.replace("\\", "/").partition("/")
            places = [root / folder / name for root in self.folders for folder in (*folders_of(kind), "")]
            places += [bundled_folder(kind, bundled[model]) / file] if model in bundled and file else []
            for place in places:
                if name and place.exists():
                    return place
        files = _bundled_files(kind, bundled)
        listed = ", or one of " + ", ".join(files) if files else ""
        raise FileError(
            f"No {kind} checkpoint of this name was found",
            given=name,
            expected=f"a path to a checkpoint{listed}",
        )


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU. Asked when needed, never at import."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def bundled_models() -> dict[str, Path]:
    """name -> folder of the checkpoints that come with the package; the first one is what who names none gets."""
    root = Path(__file__).resolve().parents[2] / "models"
    if not root.is_dir():
        return {}
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: (path.name != FIRST, path))
    return {path.name: path for path in folders if any(path.glob("*.safetensors"))}


def bundled_folder(kind: str, model: Path) -> Path:
    """Where a bundled model's files of a kind lie: its parts beside each other, its LoRAs in a folder of their own."""
    return model / FOLDERS[kind] if kind == "lora" else model


def _bundled_files(kind: str, models: Mapping[str, Path]) -> list[str]:
    folders = {name: bundled_folder(kind, root) for name, root in models.items()}
    return [f"{name}/{file.name}" for name, root in folders.items() for file in sorted(root.glob("*.safetensors"))]


def available_memory() -> int:
    """Bytes of main memory that are free for this process (system and container limits, where the system tells)."""
    free = 8 * 2**30  # a usual laptop, where nothing tells
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


def total_memory() -> int:
    """Bytes of main memory of the machine, or of the container where it has a limit."""
    total = 8 * 2**30
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    return total


def memory_in_use(device: torch.device | str) -> int:
    """Bytes that this process holds: on a GPU what torch has given out there, else resident main memory; 0 where the
    system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    if not status.is_file():
        return 0
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_cores() -> int:
    """CPU cores this process may use (affinity and container limits, where the system tells)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().strip().partition(" ")
        if limit.isdigit() and period.isdigit() and int(period):
            cores = min(cores, max(1, round(int(limit) / int(period))))
    return max(1, cores)
