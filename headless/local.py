"""A worker of a batch that renders in this process. What several prompts need, such as the models, is loaded once."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vidgen_core.errors import UserError
from .batch import UNFINISHED, Job, JobFailed
from .events import Tell
from .executor import Cache, Classes, NodeError, Prompt
from .render import render
from .stop import Stop

log = logging.getLogger("vidgen")


@dataclass(slots=True, kw_only=True)
class LocalWorker:
    """Renders in this process.

    Args:
        classes: node types.
        device: None takes a GPU if there is one.
        folders: where to look for models besides the bundled ones.
        input_folder: whose files ComfyUI's own loaders name.
        plan_of: the plan that each prompt keeps to. Then nothing stays loaded: it would count against the budget.
    """

    classes: Classes
    stop: Stop
    device: str | None = None
    folders: Sequence[Path] = ()
    input_folder: Path | None = None
    plan_of: Callable[[Prompt], Any] | None = None
    name: str = "this process"
    _cache: Cache | None = None

    def __post_init__(self) -> None:
        self._cache = Cache() if self.plan_of is None else None

    def render(self, job: Job, folder: Path, tell: Tell) -> list[Path]:
        try:
            saved = render(
                job.prompt,
                self.classes,
                output=folder,
                stop=self.stop,
                device=self.device,
                folders=self.folders,
                input_folder=self.input_folder,
                quiet=True,
                plan=None if self.plan_of is None else self.plan_of(job.prompt),
                tell=tell,
                cache=self._cache,
                keep=job.shared,
            )
        except NodeError as error:
            if not isinstance(error.__cause__, UserError):  # a bug, of ours or of a pack: somebody will want to see it
                log.error("%s", "".join(traceback.format_exception(error.__cause__)))
            raise JobFailed(str(error)) from error
        except UserError as error:
            raise JobFailed(str(error)) from error
        made = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != UNFINISHED)
        return saved + [path for path in made if path not in saved]

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        self._cache = None
