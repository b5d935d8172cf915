"""``vidgen train RECIPE``: read a recipe, start the processes, run the stage it names."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..vidgen_core.errors import RecipeError, UserError

log = logging.getLogger("vidgen")

STAGES = ("text", "vae", "dit")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vidgen train``; returns the exit status."""
    arguments = _parser().parse_args(argv)
    _log_to_stderr()
    overrides = list(arguments.set)
    if arguments.processes is not None:
        overrides.append(f"run.processes={arguments.processes}")
    try:
        train(arguments.recipe, overrides, resume=not arguments.restart, finish_now=arguments.finish)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def train(recipe: str | Path, overrides: Sequence[str] = (), *, resume: bool = True, finish_now: bool = False) -> None:
    """Train by a recipe file with as many processes as it asks for; this process is the first of them.

    Args:
        overrides: ``table.key=value``, see :func:`~.recipe.read_recipe`.
        resume: go on from the newest checkpoint of the run's folder.
        finish_now: no training; write the result of the newest checkpoint.
    """
    from .loop import check_settings
    from .recipe import read_table

    table = read_table(recipe, overrides)
    if table.get("stage") == "text":
        _train_text(recipe, overrides, finish_now=finish_now)
        return
    settings, _ = _stage(recipe, overrides)
    check_settings(settings.run, settings.optimizer, settings.schedule)
    processes = 1 if finish_now else settings.run.processes
    if processes == 1:
        run_stage(str(recipe), overrides, resume, finish_now)
        return
    prepare(str(recipe), overrides)
    _run_processes(processes, str(recipe), overrides, resume)


def _train_text(recipe: str | Path, overrides: Sequence[str], *, finish_now: bool) -> None:
    """The text encoders have a short loop of their own: no checkpoints, no processes."""
    from .text_recipe import read_text_recipe, train_by_recipe

    settings = read_text_recipe(recipe, overrides)
    if finish_now:
        raise RecipeError("This stage keeps no checkpoints", given='stage = "text"', do="train it anew, for minutes")
    train_by_recipe(settings)


def run_stage(recipe: str, overrides: Sequence[str], resume: bool = True, finish_now: bool = False) -> None:
    """One process's share of a run."""
    import torch

    from .loop import Loop
    from .recipe import read_table

    settings, objective_type = _stage(recipe, overrides)
    torch.set_num_threads(settings.run.threads)
    loop = Loop(
        objective_type(settings),
        run=settings.run,
        optimizer=settings.optimizer,
        schedule=settings.schedule,
        extra=read_table(recipe, overrides),
    )
    if finish_now:
        loop.finish_now()
    else:
        loop.train(resume=resume)


def prepare(recipe: str, overrides: Sequence[str]) -> None:
    """Fill the caches once, before several processes look for them."""
    settings, objective_type = _stage(recipe, overrides)
    objective_type(settings)


def _stage(recipe: str | Path, overrides: Sequence[str]) -> tuple[Any, Any]:
    """The recipe as a dataclass, and the objective's class."""
    from .recipe import read_recipe, read_table

    stage = read_table(recipe, overrides).get("stage")
    if stage == "vae":
        from .vae import VaeObjective, VaeRecipe

        return read_recipe(recipe, VaeRecipe, overrides), VaeObjective
    if stage == "dit":
        from .dit import DitObjective, DitRecipe

        return read_recipe(recipe, DitRecipe, overrides), DitObjective
    raise RecipeError("The recipe's stage is not known", given=f"stage = {stage!r}", expected=", ".join(STAGES))


# ---- processes -----------------------------------------------------------------------------------------------


def _run_processes(num: int, recipe: str, overrides: Sequence[str], resume: bool) -> None:
    """Processes 1..num-1 are spawned; this one is process 0, so signals and the terminal belong to it."""
    import torch.multiprocessing

    port = _free_port()
    context = torch.multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_worker, args=(rank, num, port, recipe, tuple(overrides), resume), daemon=True)
        for rank in range(1, num)
    ]
    for process in others:
        process.start()
    try:
        _join_group(0, num, port)
        run_stage(recipe, overrides, resume)
    finally:
        _leave_group()
        for process in others:
            process.join(timeout=30)
            if process.is_alive():
                process.terminate()


def _worker(rank: int, num: int, port: int, recipe: str, overrides: Sequence[str], resume: bool) -> None:
    _join_group(rank, num, port)
    try:
        run_stage(recipe, overrides, resume)
    finally:
        _leave_group()


def _join_group(rank: int, num: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num),
        LOCAL_WORLD_SIZE=str(num),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- command line ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vidgen train", description="Train a model by a recipe (a TOML file).")
    parser.add_argument("recipe", help="e.g. training/recipes/tiny_hunyuan_vae.toml")
    parser.add_argument("--processes", type=int, help="data-parallel processes (default: the recipe's)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="override a value of the recipe"
    )
    parser.add_argument("--restart", action="store_true", help="do not go on from the run's newest checkpoint")
    parser.add_argument("--finish", action="store_true", help="write the result of the newest checkpoint and stop")
    return parser


def _log_to_stderr() -> None:
    if log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
