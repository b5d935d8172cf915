"""The loop that every stage of training runs through.

A stage is an :class:`Objective`: a module that draws its own batches and turns one into a loss. The loop owns
everything else: optimizers, learning rate, moving average, precision, processes, checkpoints, logs, the clock.

A batch depends on nothing but (seed, step, sample), so a resumed run sees exactly the batches it would have
seen, and N processes see together what one process with the same batch size sees alone.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..vidgen_core.errors import CheckpointError, MissingLibraryError, NumericsError, RecipeError
from . import checkpoint
from .journal import Journal
from .optim import Average, Learner, learning_rate_factor
from .recipe import OptimizerSettings, RunSettings, ScheduleSettings, require_positive
from .team import ALONE, Team

log = logging.getLogger("vidgen")

MAX_BAD_STEPS = 20
"""so many steps in a row without finite numbers end the run"""
_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """One well-spread 63-bit seed from several integers (the finaliser of splitmix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state = ((state ^ (state >> 31)) + 0x9E3779B97F4A7C15) & _MASK
    return state >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """The randomness of one step, as one process sees it."""

    seed: int
    step: int
    batch_size: int
    """samples of the step over all processes"""
    rank: int = 0
    world: int = 1
    position: float = 0.0
    """share of the run that is over"""

    def shared(self, salt: int = 0) -> torch.Generator:
        """For choices that all processes must make alike (the kind of batch)."""
        return torch.Generator().manual_seed(mix(self.seed, self.step, -1, salt))

    def samples(self, num: int | None = None) -> list[torch.Generator]:
        """One generator for each of this process's samples out of ``num`` (default: the batch size)."""
        num = self.batch_size if num is None else num
        share = num // self.world
        return [
            torch.Generator().manual_seed(mix(self.seed, self.step, i))
            for i in range(self.rank * share, (self.rank + 1) * share)
        ]


class Objective(nn.Module):
    """What a stage of training is. Sub-modules whose parameters require a gradient are trained and saved."""

    metrics: tuple[str, ...] = ()
    """names of the parts of the loss that are logged"""

    def batch(self, draw: Draw) -> Any:
        """The batch of one step; all randomness comes from ``draw``."""
        raise NotImplementedError

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """``loss`` and any of :attr:`metrics`, all of them 0-dim."""
        raise NotImplementedError

    def is_hidden(self, name: str) -> bool:
        """Whether Muon may take the matrix of this name: not embeddings, first or last layers."""
        return True

    def helpers(self) -> Mapping[str, OptimizerSettings]:
        """Sub-modules that learn beside the model and are no part of the result, such as a discriminator.

        Each has an optimizer and a limit on its gradient of its own and is not averaged. All of them and the model
        take their gradients from the one ``loss``: terms for one must hold the others' weights still.
        """
        return {}

    def evaluate(self, folder: Path, step: int, team: Team = ALONE) -> dict[str, float]:
        """Judge the model (which holds the averaged weights now); pictures go to ``folder``.

        Every process of ``team`` calls it and may do a share; the first one's figures count.
        """
        return {}

    def finish(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Write the result (the model holds the averaged weights now)."""


@dataclass
class Progress:
    """What changes as a run goes on, besides tensors."""

    step: int = 0
    elapsed_s: float = 0.0
    bad_steps: int = 0


class Loop:
    """One run of one stage.

    Args:
        objective: the stage.
        run: where and how.
        optimizer: the optimizer's numbers.
        schedule: the length and the learning rate.
        extra: written into every checkpoint (the recipe's table).
    """

    def __init__(
        self,
        objective: Objective,
        *,
        run: RunSettings,
        optimizer: OptimizerSettings,
        schedule: ScheduleSettings,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        check_settings(run, optimizer, schedule)
        helpers = objective.helpers()
        self.run_settings, self.optimizer_settings, self.schedule = run, optimizer, schedule
        self.extra = dict(extra or {})
        self.folder = Path(run.folder) / run.name
        self.accelerator = _accelerator(run, some_rest=bool(helpers))
        self.team = Team(self.accelerator.process_index, self.accelerator.num_processes)
        self.rank, self.world = self.team.rank, self.team.world
        if optimizer.batch_size % self.world:
            raise RecipeError(
                "The batch cannot be split over the processes",
                given=f"batch_size {optimizer.batch_size}, {self.world} processes",
                expected="a multiple of the number of processes",
            )
        self.objective = objective.to(self.accelerator.device)
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.names = {p: name for name, p in self.parameters.items()}
        self.learners = self._learners(optimizer, helpers)
        self.optimizers = [each for learner in self.learners for each in learner.optimizers]
        self.average = Average(self.learners[0].parameters, optimizer.ema_decay)
        self.progress = Progress()
        self.wrapped = self.accelerator.prepare(objective)
        self.journal = Journal(self.folder, objective.metrics, run) if self.rank == 0 else None
        self._asked_to_stop = False

    def _learners(self, settings: OptimizerSettings, helpers: Mapping[str, OptimizerSettings]) -> list[Learner]:
        """The model first, then its helpers."""
        rest = dict(self.parameters)
        learners = []
        for helper, own_settings in helpers.items():
            own = {name: rest.pop(name) for name in self.parameters if name.startswith(f"{helper}.")}
            assert own, f"{helper} has nothing to train"
            learners.append(Learner.of(own, own_settings, is_hidden=self.objective.is_hidden, team=self.team))
        return [Learner.of(rest, settings, is_hidden=self.objective.is_hidden, team=self.team), *learners]

    # ---- the run -------------------------------------------------------------------------------------------

    def train(self, *, resume: bool = True, stop_after: int | None = None) -> Progress:
        """Train until the schedule ends, a signal arrives, or ``stop_after`` more steps are done.

        With ``resume`` the newest checkpoint of the run's folder is continued, else what the folder holds of an
        earlier run is forgotten. Ends with a checkpoint in every
        case, and with the objective's ``finish`` only at the end of the schedule.
        """
        if resume:
            self._load_newest()
        else:
            self._forget()
        started = time.monotonic() - self.progress.elapsed_s
        last_checkpoint = last_evaluation = time.monotonic()
        first_step = self.progress.step
        self.wrapped.train()
        with self._signals():
            while not self._finished():
                if self._agree_to_stop() or (stop_after is not None and self.progress.step - first_step >= stop_after):
                    break
                self._step()
                self.progress.elapsed_s = self._agree_on_time(time.monotonic() - started)
                now, run = time.monotonic(), self.run_settings
                if self._due(run.evaluate_steps, run.evaluate_minutes, now - last_evaluation):
                    self._evaluate()
                    last_evaluation = time.monotonic()
                if self._due(run.checkpoint_steps, run.checkpoint_minutes, now - last_checkpoint):
                    self._save()
                    last_checkpoint = time.monotonic()
        self._save()
        if self._finished():
            self._finish()
        if self.journal is not None:
            self.journal.close()
        return self.progress

    def finish_now(self) -> None:
        """Write the result of the newest checkpoint without more training."""
        self._load_newest()
        self._finish()

    def _step(self) -> None:
        draw = Draw(
            seed=self.run_settings.seed,
            step=self.progress.step,
            batch_size=self.optimizer_settings.batch_size,
            rank=self.rank,
            world=self.world,
            position=self.position(),
        )
        # Dropout and the like draw from the global generator: it too is a function of the step.
        torch.manual_seed(mix(self.run_settings.seed, self.progress.step, -2, self.rank))
        factor = learning_rate_factor(self.schedule, step=self.progress.step, position=self.position())
        losses = self.wrapped(self.objective.batch(draw))
        self.accelerator.backward(losses["loss"])
        norms = [learner.clip() for learner in self.learners]
        if all(bool(torch.isfinite(norm)) for norm in norms):
            for learner in self.learners:
                learner.step(factor)
            self.average.update()
            self.progress.bad_steps = 0
        else:
            self._count_bad_step()
        for parameter in self.parameters.values():
            parameter.grad = None
        self.progress.step += 1
        if self.journal is not None:
            values = {name: float(value.detach()) for name, value in losses.items()}
            self.journal.step(
                self.progress, self.position(), factor * self.learners[0].peaks[0], float(norms[0]), values
            )

    def _count_bad_step(self) -> None:
        self.progress.bad_steps += 1
        log.warning("Step %d has no finite gradient and is left out", self.progress.step)
        if self.progress.bad_steps >= MAX_BAD_STEPS:
            raise NumericsError(
                "Training has diverged",
                given=f"{MAX_BAD_STEPS} steps in a row without finite gradients",
                do="lower the learning rate, or use precision fp32",
            )

    # ---- the clock -----------------------------------------------------------------------------------------

    def position(self) -> float:
        """Share of the run that is over, in 0..1."""
        if self.schedule.steps is not None:
            return min(1.0, self.progress.step / self.schedule.steps)
        assert self.schedule.budget_minutes is not None
        return min(1.0, self.progress.elapsed_s / (60 * self.schedule.budget_minutes))

    def _finished(self) -> bool:
        return self.position() >= 1.0

    def _due(self, steps: int | None, minutes: float | None, since_s: float) -> bool:
        if steps is not None and self.progress.step % steps == 0:
            return True
        return minutes is not None and self._agree(since_s >= 60 * minutes)

    # ---- processes -----------------------------------------------------------------------------------------

    def _agree_on_time(self, elapsed_s: float) -> float:
        """The first process's clock rules: learning rates must be the same everywhere."""
        if self.world == 1:
            return elapsed_s
        clock = torch.tensor([elapsed_s], dtype=torch.float64)
        torch.distributed.broadcast(clock, src=0)
        return float(clock)

    def _agree(self, flag: bool) -> bool:
        return bool(self._agree_on_time(float(flag)))

    def _agree_to_stop(self) -> bool:
        return self._agree(self._asked_to_stop)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand. Only the first process listens."""

        def ask(number: int, frame: object) -> None:
            log.info("Stopping after this step (signal %d)", number)
            self._asked_to_stop = True

        handler = ask if self.rank == 0 else signal.SIG_IGN
        try:
            before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where signals cannot be caught
            before = {}
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    # ---- state ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.rank == 0:
            tensors, numbers = checkpoint.pack_optimizers(self.optimizers, self.names)
            tensors |= {f"weights.{name}": p for name, p in self.parameters.items()}
            tensors |= {f"average.{name}": value for name, value in self.average.values.items()}
            tensors["random"] = torch.get_rng_state()
            rest = {
                "step": self.progress.step,
                "elapsed_s": self.progress.elapsed_s,
                "average_updates": self.average.num_updates,
                "numbers": numbers,
                "recipe": self.extra,
            }
            checkpoint.save(self.folder / "checkpoints", self.progress.step, tensors, rest)
        self._wait()

    def _load_newest(self) -> None:
        found = checkpoint.complete(self.folder / "checkpoints")
        if not found:
            return
        tensors, rest = checkpoint.load(found[-1])
        self._check_fits(tensors, found[-1])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
            for name, value in self.average.values.items():
                value.copy_(tensors[f"average.{name}"])
        checkpoint.unpack_optimizers(self.optimizers, self.names, tensors, rest["numbers"])
        torch.set_rng_state(tensors["random"])
        self.average.num_updates = rest["average_updates"]
        self.progress.step, self.progress.elapsed_s = rest["step"], rest["elapsed_s"]
        if self.journal is not None:
            self.journal.rewind(self.progress.step)
        log.info("Resumed at step %d, %.1f min", self.progress.step, self.progress.elapsed_s / 60)

    def _check_fits(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        wanted = {f"weights.{name}": p for name, p in self.parameters.items()}
        wanted |= {f"average.{name}": value for name, value in self.average.values.items()}
        wrong = [name for name, t in wanted.items() if name not in tensors or tensors[name].shape != t.shape]
        if wrong:
            raise CheckpointError(
                "The run was begun with another model or other settings than this recipe's",
                given=f"{path}, which lacks {wrong[0]!r} or has it in another shape",
                do="give the run another name, or forget the old one (--restart)",
            )

    def _forget(self) -> None:
        """An earlier run of this name would else be taken up again later, and its checkpoints count as newer."""
        if self.journal is not None:
            for path in checkpoint.complete(self.folder / "checkpoints"):
                shutil.rmtree(path)
            self.journal.rewind(-1)
        self._wait()

    # ---- judging -------------------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        """Figures of the averaged model."""
        self.objective.eval()
        with self.average.applied(), torch.no_grad():
            figures = self.objective.evaluate(self.folder, self.progress.step, self.team)
        self.objective.train()
        if self.journal is not None:
            self.journal.evaluation(self.progress, figures)
        self._wait()
        return figures

    def _finish(self) -> None:
        figures = self._evaluate()
        if self.rank == 0:
            self.objective.eval()
            summary = {
                "steps": self.progress.step,
                "minutes": round(self.progress.elapsed_s / 60, 1),
                "processes": self.world,
                "seed": self.run_settings.seed,
                "figures": figures,
            }
            with self.average.applied(), torch.no_grad():
                self.objective.finish(self.folder, summary)
        self._wait()


def check_settings(run: RunSettings, optimizer: OptimizerSettings, schedule: ScheduleSettings) -> None:
    """Raise :class:`RecipeError` for numbers that cannot work."""
    if (schedule.steps is None) == (schedule.budget_minutes is None):
        raise RecipeError(
            "The length of the run is not clear",
            given=f"steps = {schedule.steps}, budget_minutes = {schedule.budget_minutes}",
            expected="exactly one of steps and budget_minutes",
        )
    require_positive(
        {
            "schedule.steps": schedule.steps,
            "schedule.budget_minutes": schedule.budget_minutes,
            "optimizer.batch_size": optimizer.batch_size,
            "run.processes": run.processes,
            "run.threads": run.threads,
        }
    )


def _accelerator(run: RunSettings, *, some_rest: bool) -> Any:
    """The library's handle on devices and processes; ``some_rest``: not every weight gets a gradient in every step."""
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState, PartialState
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "Training needs a library that is not installed",
            given="accelerate",
            do="pip install 'comfyui-vidgen[train]'",
        ) from error
    os.environ.setdefault("OMP_NUM_THREADS", str(run.threads))
    if not torch.distributed.is_initialized():
        # The library keeps these as process-wide singletons: a second run must not inherit the first one's precision.
        AcceleratorState._reset_state()
        PartialState._reset_state()
    return Accelerator(
        cpu=run.device == "cpu",
        mixed_precision="no" if run.precision == "fp32" else "bf16",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=some_rest)],
    )
