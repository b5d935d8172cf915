"""``vidgen render`` with many prompts, or elsewhere: which options go together, and the workers that they mean."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..vidgen_core.errors import SettingsError
from ..vidgen_core.media import FORMATS
from .batch import Job, Results, SingleResult, Store, Worker, read_jobs, run_batch
from .custom_nodes import load_packs, own_packs
from .events import BatchWords, Tell
from .executor import Prompt, check
from .render import check_device, load_prompt, override


def render_batch(arguments: argparse.Namespace, folders: Sequence[Path], tell: Tell | None) -> int:
    """Run ``vidgen render`` with --prompts, --server or --ray: 0, or 1 where a prompt could not be rendered.

    Args:
        folders: where to look for models.
        tell: is told what happens; None says it in words.

    Raises:
        UserError: before anything is rendered, or where nothing more can be.
        Cancelled: asked to stop; what is finished is kept.
    """
    _check_together(arguments)
    tell = tell or BatchWords(sys.stdout, sys.stderr, is_quiet=arguments.quiet)
    classes: Mapping[str, type]
    workers: Sequence[Worker] = ()
    if arguments.server is not None:
        from .remote import connect, parse_servers

        workers, classes = connect(parse_servers(arguments.server), arguments.stop, arguments.input)
    else:
        packs = load_packs(arguments.custom_nodes, own_packs())
        packs.tell_problems()
        classes = packs.classes
    prompt = override(load_prompt(arguments.file, classes), classes, arguments.set)
    checks = _checks(arguments, classes, folders)
    jobs: list[Job]
    store: Store
    if arguments.prompts is None:
        checks(prompt)
        jobs, store = [Job(name=arguments.file.stem, prompt=prompt)], SingleResult(arguments.output)
    else:
        jobs = read_jobs(arguments.prompts, prompt, classes, checks)
        store = Results(arguments.output or Path("output"))
    num_open = sum(store.finished(job) is None for job in jobs)
    with contextlib.ExitStack() as stack:
        if num_open and not workers:
            workers = _workers(arguments, classes, folders, num_open, stack)
        outcome = run_batch(jobs, workers, store, stop=arguments.stop, tell=tell)
    if outcome.failed and len(jobs) > 1 and not arguments.json:
        sys.stderr.write(
            f"vidgen: {len(outcome.failed)} of {len(jobs)} prompts failed; the same command tries them again\n"
        )
    return 1 if outcome.failed else 0


def _check_together(arguments: argparse.Namespace) -> None:
    is_many, is_remote, is_ray = (value is not None for value in (arguments.prompts, arguments.server, arguments.ray))
    if is_ray and not is_many:
        raise SettingsError("One prompt needs no cluster", given="--ray", expected="--prompts FILE.jsonl with it")
    own = {"--custom-nodes": arguments.custom_nodes, "--models": arguments.models, "--device": arguments.device}
    refused = {
        "--context-parallel": arguments.context_parallel != 1,
        "--budget": arguments.budget is not None and (is_remote or is_ray),
        **{option: bool(value) and is_remote for option, value in own.items()},  # a server has its own
    }
    other = "--server" if is_remote else "--ray" if is_ray else "--prompts"
    for option, is_refused in refused.items():
        if is_refused:
            raise SettingsError("These options do not go together", given=f"{option} and {other}", do="leave one out")
    output = arguments.output
    if is_many and output is not None and output.suffix.lower() in FORMATS and not output.is_dir():
        raise SettingsError("Many results need a folder", given=f"-o {output}", expected="a folder, such as -o results")


def _checks(
    arguments: argparse.Namespace, classes: Mapping[str, type], folders: Sequence[Path]
) -> Callable[[Prompt], None]:
    """Raises UserError for a prompt that cannot run: asked of every one before the first is rendered."""
    from ..nodes import host as hosts

    host = hosts.LocalNodeHost(folders=folders, input_folder=arguments.input)

    def checks(prompt: Prompt) -> None:
        with hosts.using(host):
            check(prompt, classes)
        if arguments.budget is not None:
            _plan(arguments, folders, prompt)

    return checks


def _plan(arguments: argparse.Namespace, folders: Sequence[Path], prompt: Prompt) -> Any:
    from ..vidgen_core.memory.place import parse_bytes
    from .plan import plan_that_fits

    device = check_device(arguments.device)
    return plan_that_fits(prompt, budget_bytes=parse_bytes(arguments.budget), device=device, folders=folders)


def _workers(
    arguments: argparse.Namespace,
    classes: Mapping[str, type],
    folders: Sequence[Path],
    num_jobs: int,
    stack: contextlib.ExitStack,
) -> Sequence[Worker]:
    """This process, or the actors of a cluster that ``stack`` disconnects from."""
    if arguments.ray is None:
        from .local import LocalWorker

        device = check_device(arguments.device)
        plan_of = None if arguments.budget is None else lambda prompt: _plan(arguments, folders, prompt)
        return [
            LocalWorker(
                classes=classes,
                stop=arguments.stop,
                device=device,
                folders=folders,
                input_folder=arguments.input,
                plan_of=plan_of,
            )
        ]
    from .. import __version__
    from .on_ray import ActorSettings, cluster, workers_of

    settings = ActorSettings(
        device=arguments.device,
        folders=[folder.resolve() for folder in folders],
        input_folder=arguments.input.resolve(),
        custom_nodes=[place.resolve() for place in arguments.custom_nodes],
        working_folder=Path.cwd(),
        version=__version__,
    )
    stack.enter_context(cluster(arguments.ray or None))
    return workers_of(settings, num_jobs=num_jobs, num_cpus=arguments.ray_cpus, stop=arguments.stop)
