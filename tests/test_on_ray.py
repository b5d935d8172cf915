"""`vidgen render --ray`: a cluster of two workers on this machine, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vidgen.headless.batch import Results, run_batch
from vidgen.headless.cli import main
from vidgen.headless.on_ray import ActorSettings, cluster, workers_of
from vidgen.headless.stop import Stop
from vidgen.vidgen_core.errors import SettingsError

sys.path.insert(0, str(Path(__file__).parent))
import batch_work as work


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one machine with two CPUs, to connect to as a user does; nothing else that runs here is touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 otherwise: on a busy machine an actor would wait for all others
        from ray.cluster_utils import Cluster

        has = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 100 * 2**20}
        machines = Cluster(initialize_head=True, head_node_args={**has, "include_dashboard": False})
        yield machines.address
        machines.shutdown()


def settings_in(folder: Path) -> ActorSettings:
    import vidgen

    return ActorSettings(
        device="cpu", folders=[], custom_nodes=[work.LAB], working_folder=folder, version=vidgen.__version__
    )


def test_sixteen_prompts_on_two_actors_one_of_which_is_killed(address: str, tmp_path: Path) -> None:
    jobs, notes, out, stop = work.sixteen(tmp_path), tmp_path / "notes", tmp_path / "out", Stop()
    told: list[tuple[Any, ...]] = []
    work.kill_the_stubborn(notes)
    with cluster(address):
        workers = workers_of(settings_in(tmp_path), num_jobs=16, num_cpus=1, stop=stop)
        assert len(workers) == 2
        assert all(worker.ready() for worker in workers)  # or the first may be done before the second has begun
        outcome = run_batch(jobs, workers, Results(out), stop=stop, tell=lambda *event: told.append(event))
    assert not outcome.failed
    assert [about["name"] for kind, about in told if kind == "lost"] == [f"seed-{work.STUBBORN}"]
    finished = [about["name"] for kind, about in told if kind == "finished"]
    assert sorted(finished) == sorted(job.name for job in jobs)  # each once
    drawn = [int(pid) for pid, _ in work.noted(notes, "draw")]
    assert len(drawn) == 17
    loaded = [int(pid) for (pid,) in work.noted(notes, "load")]
    assert len(loaded) == len(set(loaded))  # each actor loads once
    assert len(set(drawn)) >= 2
    assert set(drawn) == set(loaded)
    assert os.getpid() not in drawn
    assert work.contents(out) == work.sequential(jobs, tmp_path / "alone")
    record = [json.loads(line)["name"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(record) == sorted(finished)


def test_the_command_finds_files_beside_it_and_tells_what_failed(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flow.json").write_text(json.dumps(work.workflow("notes")))  # a name, not a path: actors begin elsewhere
    Path("packs").symlink_to(work.LAB.parent)
    lines = work.seeds(3)
    lines[1]["set"]["LabDraw.mood"] = "bad"
    lines[2]["set"]["LabKeep.copies"] = 2
    work.write_lines(Path("p.jsonl"), lines)
    command = [
        "render",
        "flow.json",
        "--prompts",
        "p.jsonl",
        "--custom-nodes",
        "packs",
        "-o",
        "out",
        "-q",
        "--ray",
        address,
    ]
    command += ["--device", "cpu", "--ray-cpus", "2"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out.split() == ["out/seed-1.txt", "out/seed-3.txt", "out/seed-3.2.txt"]
    assert "line 2 (seed-2): Node 2 (LabDraw): seed 2 is not in the mood" in said.err
    assert len(work.noted(tmp_path / "notes", "load")) == 1  # one actor, because each has two CPUs
    assert set(work.contents(tmp_path / "out")) == {"seed-1.txt", "seed-3.txt", "seed-3.2.txt"}
    assert main([*command[:-1], "3"]) == 1
    assert "Given: --ray-cpus 3. Expected: from 1 to 2" in capsys.readouterr().err


def test_an_address_without_a_cluster_is_an_error() -> None:
    with pytest.raises(SettingsError, match="no Ray cluster"), cluster("nowhere"):
        pass
