"""One video on several processes: the same numbers as one process, and an end for all of them together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.headless import team as teams
from vidgen.headless.cli import main
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.generate import Sampling, load_bundle, sample_latents
from vidgen.vidgen_core.media import read_video
from vidgen.vidgen_core.nn import backends, parallel
from vidgen.vidgen_core.nn.parallel import Split, Team, choose_method, in_team, merge, ring, ulysses

sys.path.insert(0, str(Path(__file__).parent))
import context_parallel_work as work

SAME = 1e-5
"""relative to the largest number: float32 sums in another order, through four blocks; a lost token is off by 1e-2"""


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes computed for all cases; started once, as most of their time is importing torch."""
    folder = tmp_path_factory.mktemp("team")
    shutil.copytree(tiny_bundle_dir, folder / "model")
    torch.save({"context": torch.randn(1, 5, 32), "pooled": torch.randn(1, 32)}, folder / "cond.pt")
    done = subprocess.run(
        [sys.executable, work.__file__, "compute", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"results_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("method", work.METHODS)
@pytest.mark.parametrize("name", work.CASES)
def test_two_processes_compute_what_one_does(name: str, method: str, results: list[dict[str, Any]]) -> None:
    found = [result[f"{name}/{method}"] for result in results]
    if not work.can_run(work.CASES[name], method):
        assert isinstance(found[0], str)
        assert found[0] == found[1]
        assert "heads" in found[0]
        return
    assert error(found[0], work.forward(work.CASES[name])) < SAME
    assert torch.equal(found[0], found[1])  # or their samplers would drift apart


def test_a_run_is_the_same_and_only_one_process_keeps_it(folder: Path, results: list[dict[str, Any]]) -> None:
    bundle = load_bundle(folder / "model", device="cpu")
    cond = work_conditioning(folder)
    plain = sample_latents(bundle.model, cond, None, (1, 16, 2, 4, 6), Sampling(num_steps=2, cfg=1.0))
    assert error(results[0]["sampled"], plain) < SAME
    assert torch.equal(results[0]["sampled"], results[1]["sampled"])
    assert results[0]["kept"]


def work_conditioning(folder: Path) -> Any:
    from vidgen.vidgen_core.types import Conditioning

    return Conditioning(**torch.load(folder / "cond.pt", weights_only=True))


def test_a_helper_writes_no_run_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "gather", lambda x, size: torch.stack([x] * size))
    monkeypatch.setattr(parallel, "exchange", lambda x: x)
    bundle = load_bundle(folder / "model", device="cpu")
    for rank in (1, 0):
        path = tmp_path / "run"
        with in_team(Team(rank, 2)):
            settings = Sampling(num_steps=1, cfg=1.0, resume_path=path)
            sample_latents(bundle.model, work_conditioning(folder), None, (1, 16, 2, 4, 6), settings)
        assert path.exists() == (rank == 0)


# --- more of them, as threads -----------------------------------------------------------------------------------------


class Hub:
    """Exchanges between threads that stand for processes."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._slots: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)
        self._mine = threading.local()
        hub = self

        class Passing:
            def __init__(self, x: Tensor, team: Team) -> None:
                self._all = hub.swap(x)
                self._from = (team.rank - 1) % team.size

            def arrived(self) -> Tensor:
                return self._all[self._from]

        monkeypatch.setattr(
            parallel, "exchange", lambda x: torch.stack([other[self._mine.rank] for other in self.swap(x)])
        )
        monkeypatch.setattr(parallel, "gather", lambda x, size: torch.stack(self.swap(x)))
        monkeypatch.setattr(parallel, "_Passing", Passing)

    def swap(self, x: Tensor) -> list[Tensor]:
        self._slots[self._mine.rank] = x.clone()
        self._barrier.wait()
        everybody = list(self._slots)
        self._barrier.wait()
        return everybody

    def run(self, function: Callable[[int], Tensor]) -> list[Tensor]:
        """``function`` of each rank."""
        results: list[Any] = [None] * len(self._slots)

        def one(rank: int) -> None:
            self._mine.rank = rank
            with torch.no_grad():
                results[rank] = function(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_text", [0, 5])
@pytest.mark.parametrize("grid", [(2, 3, 4), (3, 1, 7), (1, 1, 2)])
@pytest.mark.parametrize(("method", "size"), [("ulysses", 1), ("ulysses", 4), ("ring", 3), ("ring", 4)])
def test_parts_attend_as_the_whole(
    method: str, size: int, grid: tuple[int, int, int], num_text: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with more processes than tokens in a frame, where some hold nothing."""
    if masked and not num_text:
        num_text = 1
    generator = torch.Generator().manual_seed(size)
    split, num_video = Split(grid, size), grid[0] * grid[1] * grid[2]
    whole = [torch.randn(2, 4, num_video + num_text, 8, generator=generator) for _ in range(3)]
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, num_video + num_text, dtype=torch.bool)
        mask[1, ..., num_video:] = False
    expected = backends.plain(*whole, mask)

    def one(rank: int) -> Tensor:
        team = Team(rank, size)
        attend = ulysses(team, split, backends.plain) if method == "ulysses" else ring(team, split)
        parts = [torch.cat([split.take(x[:, :, :num_video], rank, 2), x[:, :, num_video:]], dim=2) for x in whole]
        return attend(*parts, mask)

    found = Hub(size, monkeypatch).run(one)
    num_part = split.frames * split.share
    video = split.join(torch.stack([x[:, :, :num_part] for x in found]), dim=2)
    assert error(video, expected[:, :, :num_video]) < SAME
    for text in found if num_text else ():
        assert error(text[:, :, num_part:], expected[:, :, num_video:]) < SAME


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("grid", [(3, 2, 4), (1, 1, 2), (2, 3, 3)])
def test_what_is_dealt_out_comes_back(grid: tuple[int, int, int], size: int) -> None:
    split = Split(grid, size)
    for dim, shape in ((0, (-1, 2)), (1, (2, -1, 3)), (2, (1, 2, -1))):
        length = grid[0] * grid[1] * grid[2]
        x = torch.randn(*(length if n == -1 else n for n in shape))
        parts = [split.take(x, rank, dim) for rank in range(size)]
        assert len({part.shape for part in parts}) == 1
        assert torch.equal(split.join(torch.stack(parts), dim), x)
        real = [split.real(part, rank, dim) for rank, part in enumerate(parts)]
        assert sum(part.shape[dim] for part in real) == length


def test_attention_to_some_and_to_others_is_attention_to_all() -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    some, others = (backends.with_lse(q, k[:, :, rows], v[:, :, rows]) for rows in (slice(0, 4), slice(4, 9)))
    assert error(merge(some, others)[0], backends.plain(q, k, v, None)) < SAME
    assert torch.equal(merge(some, parallel._nothing(q))[0], some[0])


def test_heads_decide_on_the_method() -> None:
    assert choose_method("auto", 24, 4) == "ulysses"
    assert choose_method("auto", 24, 5) == "ring"
    assert choose_method("ring", 24, 4) == "ring"
    with pytest.raises(SettingsError, match="5 processes"):
        choose_method("ulysses", 24, 5)
    with pytest.raises(SettingsError, match="no such way"):
        Team(0, 2, "star")  # type: ignore[arg-type]


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
def test_all_processes_end_together_however_one_ends(tmp_path: Path) -> None:
    """A process that crashes, raises, refuses, is asked to stop, does not listen, or is simply done."""
    command = [sys.executable, work.__file__, "ends"]
    env = os.environ | {"TEAM_READY": str(tmp_path / "ready")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True, env=env)
    found = json.loads(done.stdout)
    said = dict(part.split("\n", 1) for part in done.stderr.split("-- ")[1:])
    for name in ("crash_beside_one_that_waits", "raise_beside_one_that_waits"):
        assert found[name][0] == 1
        assert "process 2 of 2 failed" in said[name]
        assert "the last words" in said[name].splitlines()[-1]
    assert found["refuse"][0] == 1
    assert said["refuse"] == "the input is bad\n"
    assert found["stop_when_asked"][0] == 130
    assert said["stop_when_asked"] == "kept\n"
    assert found["never_stop"][0] == "cancelled"
    assert found["end_well"][0] == 0
    assert all(seconds < 300 for _, seconds in found.values())  # each of them would sleep for 600 s


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs a POSIX system with /proc")
def test_a_stopped_render_of_two_goes_on_in_one(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C to all of them, as a terminal sends it; then the same command without help makes the same video."""
    words = ["generate", "a red star", "--model", str(tiny_bundle_dir), "--crf", "0", "--device", "cpu"]
    words += ["--steps", "150", "--frames", "5"]
    out, plain = tmp_path / "a.mp4", tmp_path / "b.mp4"
    terminal, end = os.openpty()  # the progress bar is drawn at every step
    process = subprocess.Popen(
        [sys.executable, "-m", "vidgen", *words, "-o", str(out), "--context-parallel", "2"],
        stderr=end,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(end)
    said = heard_until(terminal, rb"sampling: .*\] [1-9]\d*/150")
    members = children(process.pid)
    assert len(members) >= 2
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    said += heard_until(terminal, None)
    assert process.wait() == 130, said
    assert b"the same command goes on from" in said
    assert time.monotonic() - begin < 60  # a second, on a machine that is not busy
    while any(map(runs, members)) and time.monotonic() - begin < 60:
        time.sleep(0.05)
    assert not any(map(runs, members))
    assert [path.suffix for path in tmp_path.iterdir()] == [".unfinished"]
    assert main([*words, "-q", "-o", str(out)]) == 0
    assert main([*words, "-q", "-o", str(plain)]) == 0
    difference = read_video(out)[0].astype(int) - read_video(plain)[0].astype(int)
    assert abs(difference).max() <= 1


def heard_until(terminal: int, pattern: bytes | None) -> bytes:
    """What is written to a terminal until a pattern is in it; None: until nobody writes to it any more."""
    said = b""
    while pattern is None or not re.search(pattern, said):
        try:
            some = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side is closed
            some = b""
        if not some:
            assert pattern is None, said
            break
        said += some
    return said


def runs(pid: int) -> bool:
    """Whether a process is there, and not only waiting for someone to take notice of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context-parallel", "0"], "number of processes"),
        (["--context-parallel", "999"], "from 1 to 64"),
        (["--context-parallel", "2", "--device", "cuda:1"], "not enough GPUs"),
        (["--context-parallel", "2", "--parallel-method", "ulysses", "--size", "31x32"], "width"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_started(
    options: list[str],
    words: str,
    tiny_bundle_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teams, "_watch", lambda *given: pytest.fail("processes were started"))
    command = ["generate", "a red star", "--model", str(tiny_bundle_dir), "-o", str(tmp_path / "a.mp4")]
    assert main([*command, *options]) == 1
    assert words in capsys.readouterr().err


def test_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert teams.devices(None, 2) == ["cuda:0", "cuda:1"]
    assert teams.devices("cuda", 4) == [f"cuda:{rank}" for rank in range(4)]
    assert teams.devices("cpu", 3) == ["cpu"] * 3
    with pytest.raises(SettingsError, match="at most 4"):
        teams.devices(None, 5)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(SettingsError, match="NCCL"):
        teams.devices(None, 2)
