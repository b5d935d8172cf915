"""What the executor and the server cost by themselves: graphs of nodes that do nothing, and a queue that is drained.

A graph of 1,000 trivial nodes is checked and run alone, and through the server for a client that listens. Then 1,000
prompts are queued and drained, three times over after a warm-up that fills the history; resident memory must not grow.
Times are this process's own, so that other work on the machine does not count; ``wall_s`` is the clock's.

    python -m vidgen.benchmarks.serving --json benchmarks/results/serving.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .full_size import commit
from .leaks import resident_bytes
from .render import MIB, machine

if TYPE_CHECKING:
    import aiohttp

NUM_NODES = 1000
NUM_PROMPTS = 1000
ROUNDS = 3
BAR_S = 1.0
"""for the executor, checks included"""
BAR = 0.02
"""resident memory may grow by this share"""


class Number:
    """A node that does nothing."""

    CATEGORY, FUNCTION, RETURN_TYPES = "benchmarks", "run", ("INT",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {"default": 0}), "b": ("INT", {"default": 0})}})

    def run(self, a: int, b: int) -> tuple[int]:
        return (a + b,)


class Show(Number):
    """One that ends a graph."""

    OUTPUT_NODE = True

    def run(self, a: int, b: int) -> Any:
        return {"ui": {"text": [str(a + b)]}, "result": (a + b,)}


CLASSES: dict[str, type] = {"Number": Number, "Show": Show}


def chain(num_nodes: int) -> dict[str, Any]:
    """Each node needs the one before."""
    nodes = {"0": {"class_type": "Number", "inputs": {"a": 1, "b": 1}}}
    for n in range(1, num_nodes):
        kind = "Number" if n < num_nodes - 1 else "Show"
        nodes[str(n)] = {"class_type": kind, "inputs": {"a": [str(n - 1), 0], "b": 1}}
    return nodes


def tree(num_nodes: int) -> dict[str, Any]:
    """Each node needs two."""
    nodes = {}
    for n in reversed(range(num_nodes)):
        left, right = 2 * n + 1, 2 * n + 2
        # No two alike: the cache would run only one of them.
        inputs = {name: [str(m), 0] if m < num_nodes else m for name, m in (("a", left), ("b", right))}
        nodes[str(n)] = {"class_type": "Number" if n else "Show", "inputs": inputs}
    return nodes


def flat(num_nodes: int) -> dict[str, Any]:
    """Only outputs."""
    return {str(n): {"class_type": "Show", "inputs": {"a": n, "b": 1}} for n in range(num_nodes)}


SHAPES: dict[str, Callable[[int], dict[str, Any]]] = {"chain": chain, "tree": tree, "flat": flat}


def executor_seconds(num_nodes: int, repeats: int) -> dict[str, dict[str, float]]:
    """Of each shape: checking and running it, the best of several runs; and again with everything in the cache."""
    from ..headless.executor import Cache, execute

    found = {}
    for name, shape in SHAPES.items():
        prompt = shape(num_nodes)
        times: dict[str, list[float]] = {"run_s": [], "run_with_cache_s": [], "run_again_s": []}
        for _ in range(repeats):
            cache = Cache()
            for what, kept in (("run_s", None), ("run_with_cache_s", cache), ("run_again_s", cache)):
                start = time.process_time()
                execute(prompt, CLASSES, cache=kept)
                times[what].append(time.process_time() - start)
        found[name] = {what: round(min(values), 5) for what, values in times.items()}
    return found


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of a server that knows these nodes."""
    import aiohttp

    from ..headless.custom_nodes import Packs
    from ..headless.server.app import Server, ServerSettings
    from ..headless.server.start import new_runner

    settings = ServerSettings(folder=folder, has_page=False)
    runner = new_runner(Server(settings, Packs(CLASSES, {}, dict.fromkeys(CLASSES, "benchmarks"))))
    await runner.setup()
    try:
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield session
    finally:
        await runner.cleanup()


async def server_seconds(session: aiohttp.ClientSession, num_nodes: int) -> dict[str, dict[str, float]]:
    """From the request to the last message, for a client that listens to all of them; the client's work is in it."""
    found = {}
    for name, shape in SHAPES.items():
        async with session.ws_connect("/ws", params={"clientId": "bench"}, max_msg_size=0) as socket:
            start, wall, num_messages = time.process_time(), time.perf_counter(), 0
            async with session.post("/prompt", json={"prompt": shape(num_nodes), "client_id": "bench"}) as answer:
                answer.raise_for_status()
            async for message in socket:
                num_messages += 1
                said = json.loads(message.data)
                if said["type"] == "executing" and said["data"]["node"] is None:
                    break
            seconds, wall = time.process_time() - start, time.perf_counter() - wall
            found[name] = {"seconds": round(seconds, 4), "wall_s": round(wall, 4), "messages": num_messages}
    return found


async def drain(session: aiohttp.ClientSession, num_prompts: int, first: int) -> float:
    """Queue that many prompts, each another; the seconds until all of them have run."""
    start = time.process_time()
    for n in range(num_prompts):
        prompt = {"1": {"class_type": "Show", "inputs": {"a": first + n, "b": 1}}}
        async with session.post("/prompt", json={"prompt": prompt, "client_id": "bench"}) as answer:
            answer.raise_for_status()
    while True:
        async with session.get("/prompt") as answer:
            if (await answer.json())["exec_info"]["queue_remaining"] == 0:
                return time.process_time() - start
        await asyncio.sleep(0.02)


async def measure_server(num_nodes: int, num_prompts: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        async with served(Path(folder)) as session:
            report: dict[str, Any] = {"graph": await server_seconds(session, num_nodes)}
            # The history keeps a number of jobs: once it is full, nothing may be added.
            await drain(session, 2 * num_prompts, 0)
            after, seconds = [resident_bytes()], []
            for turn in range(ROUNDS):
                seconds.append(await drain(session, num_prompts, (turn + 2) * num_prompts))
                after.append(resident_bytes())
            async with session.get("/history") as answer:
                kept = len(await answer.json())
    report["queue"] = {
        "prompts_per_round": num_prompts,
        "seconds_per_round": [round(value, 3) for value in seconds],
        "resident_mib": [round(value / MIB, 2) for value in after],
        "growth": round((after[-1] - after[0]) / after[0], 5) if after[0] else 0.0,
        "kept_in_history": kept,
    }
    return report


def measure(num_nodes: int = NUM_NODES, num_prompts: int = NUM_PROMPTS, repeats: int = 5) -> dict[str, Any]:
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "nodes": num_nodes,
        "executor": executor_seconds(num_nodes, repeats),
        "server": asyncio.run(measure_server(num_nodes, num_prompts)),
    }
    slowest = max(max(row.values()) for row in report["executor"].values())
    report["passes"] = slowest < BAR_S and report["server"]["queue"]["growth"] < BAR
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m vidgen.benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=NUM_NODES, help=f"in a graph (default {NUM_NODES})")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help=f"in a round (default {NUM_PROMPTS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 if the executor is quick and memory came back, else 1."""
    arguments = parse(argv)
    report = measure(arguments.nodes, arguments.prompts)
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    return 0 if report["passes"] else 1


if __name__ == "__main__":
    sys.exit(main())
