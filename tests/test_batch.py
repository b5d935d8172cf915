"""`vidgen render --prompts`: lines read and checked first, results kept once, runs that go on, workers that die."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vidgen.headless.batch import MAX_TRIES, Job, JobFailed, Outcome, Results, WorkerLost, run_batch
from vidgen.headless.cli import main
from vidgen.headless.local import LocalWorker
from vidgen.headless.stop import Stop
from vidgen.vidgen_core.errors import Cancelled, FileError, UserError
from vidgen.vidgen_core.media import read_video

sys.path.insert(0, str(Path(__file__).parent))

import batch_work as work  # noqa: E402  the workflow and its nodes

Told = list[tuple[str, dict[str, Any]]]


def rendered(
    jobs: list[Job], folder: Path, *, stop: Stop | None = None, at: Callable[[str, int], None] | None = None
) -> tuple[Outcome, Told]:
    """A batch in this process; ``at`` is called with each event and how many of its kind there were."""
    told: Told = []

    def tell(event: str, about: Mapping[str, Any]) -> None:
        told.append((event, dict(about)))
        if at is not None:
            at(event, sum(kind == event for kind, _ in told))

    stop = stop or Stop()
    worker = LocalWorker(classes=work.lab_classes(), stop=stop, device="cpu")
    return run_batch(jobs, [worker], Results(folder), stop=stop, tell=tell), told


def names(told: Told, event: str) -> list[str]:
    return [about["name"] for kind, about in told if kind == event]


# --- the file of prompts ----------------------------------------------------------------------------------------------


def test_every_bad_line_is_named_and_nothing_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes"
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(work.workflow(notes)))
    lines: list[Any] = [
        {"name": "good"},
        "",
        "{not json",
        [1, 2],
        {"nam": "typo"},
        {"name": "../up"},
        {"name": "Good"},
        {"set": ["LabDraw.seed"]},
        {"set": {"LabDraw.seeed": 1}},
        {"set": {"LabDraw.seed": 1001}},
        {"set": {"LabDraw.mood": "angry"}},
        {"set": {"nobody": 1}},
        {"name": 7},
        {"set": {"2.model": ["9", 0]}},
    ]
    file = work.write_lines(tmp_path / "p.jsonl", lines)
    options = ["--prompts", str(file), "--custom-nodes", str(work.LAB), "-o", str(tmp_path / "out")]
    assert main(["render", str(flow), *options]) == 1
    said = capsys.readouterr().err
    found = {
        3: "no JSON",
        4: "not what a line says",
        5: "not what a line says",
        6: "cannot have this name",
        7: "another one than line 1",
        8: "not what a line says",
        9: "did you mean seed",
        10: "above the maximum of 1000",
        11: "not one of: good, bad",
        12: "No node has this input",
        13: "cannot have this name",
        14: "does not exist",
    }
    assert "12 lines cannot be used, so nothing was rendered" in said
    for number, words in found.items():
        finding = said[said.index(f"line {number}:") :].partition("\n  line ")[0]
        assert words in finding, (number, finding)
    assert "line 1:" not in said
    assert not notes.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\n \n", "no prompts in the file"), (b"\xff\xfe{", "not a text file"), (None, "cannot be read")],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FileError, match=words):
        work.jobs_of(file, work.workflow())


def test_a_line_without_a_name_has_its_number(tmp_path: Path) -> None:
    file = work.write_lines(tmp_path / "p.jsonl", ["", {"set": {"seed": 3}}, {"name": "ein Stück 2"}])
    jobs = work.jobs_of(file, work.workflow())
    assert [(job.name, job.line) for job in jobs] == [("00002", 2), ("ein Stück 2", 3)]
    assert [job.prompt["2"]["inputs"]["seed"] for job in jobs] == [3, 0]


# --- results ----------------------------------------------------------------------------------------------------------


def test_what_prompts_share_is_computed_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    lines = [*work.seeds(3), {"name": "again", "set": {"LabDraw.seed": 2}}]
    jobs = work.jobs_of(work.write_lines(tmp_path / "p.jsonl", lines), work.workflow(notes))
    assert [job.shared for job in jobs] == [{"1"}, {"1", "2"}, {"1"}, {"1", "2"}]  # Keep has to run each time
    outcome, told = rendered(jobs, tmp_path / "out")
    assert not outcome.failed
    assert len(work.noted(notes, "load")) == 1
    # What the prompt in between did not need was let go, so that memory holds one prompt's things and not all.
    assert [seed for _, seed in work.noted(notes, "draw")] == ["1", "2", "3", "2"]
    made = work.contents(tmp_path / "out")
    assert set(made) == {"seed-1.txt", "seed-2.txt", "seed-3.txt", "again.txt"}
    assert made["again.txt"] == made["seed-2.txt"] != made["seed-1.txt"]
    assert names(told, "finished") == ["seed-1", "seed-2", "seed-3", "again"]


def test_a_batch_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    notes, out = tmp_path / "notes", tmp_path / "out"
    file = work.write_lines(tmp_path / "p.jsonl", work.seeds(5))
    jobs = work.jobs_of(file, work.workflow(notes))
    stop = Stop()

    def after_two(event: str, count: int) -> None:
        if (event, count) == ("finished", 2):
            stop.event.set()

    with pytest.raises(Cancelled):
        rendered(jobs, out, stop=stop, at=after_two)
    before = work.contents(out)
    assert set(before) >= {"seed-1.txt", "seed-2.txt"}
    drawn = len(work.noted(notes, "draw"))
    _, told = rendered(jobs, out)
    assert set(names(told, "kept")) == {Path(name).stem for name in before}
    assert len(work.noted(notes, "draw")) == drawn + 5 - len(before)
    assert set(work.contents(out)) == {f"seed-{seed}.txt" for seed in range(1, 6)}
    _, told = rendered(jobs, out)
    assert names(told, "started") == []
    assert len(names(told, "kept")) == 5
    record = [json.loads(line)["name"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(record) == [f"seed-{seed}" for seed in range(1, 6)]


def test_only_what_changed_or_is_gone_is_rendered_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = work.seeds(4)
    lines[0]["set"]["LabKeep.copies"] = 3
    file = work.write_lines(tmp_path / "p.jsonl", lines)
    rendered(work.jobs_of(file, work.workflow()), out)
    first = work.contents(out)
    assert {name for name in first if name.startswith("seed-1")} == {"seed-1.txt", "seed-1.2.txt", "seed-1.3.txt"}
    del lines[0]["set"]["LabKeep.copies"]  # two of its files have no place any more
    lines[1]["set"]["LabDraw.seed"] = 9
    (out / "seed-3.txt").write_text("half")
    with (out / "results.jsonl").open("a") as record:
        record.write('{"name": "seed-4", "dig')  # a crash in the middle of a line
    work.write_lines(file, lines)
    _, told = rendered(work.jobs_of(file, work.workflow()), out)
    assert names(told, "kept") == ["seed-4"]
    second = work.contents(out)
    assert set(second) == {f"seed-{seed}.txt" for seed in range(1, 5)}
    assert second["seed-2.txt"] != first["seed-2.txt"]
    assert second["seed-3.txt"] == first["seed-3.txt"]
    _, told = rendered(work.jobs_of(file, work.workflow()), out)  # what stands behind the half line is read
    assert len(names(told, "kept")) == 4


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "seed-1", "files": []},
        ["seed-1"],
        {"name": "seed-1", "digest": "x", "files": [{"file": "../a", "bytes": 1}]},
    ],
)
def test_a_strange_record_is_no_result(tmp_path: Path, entry: object) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(entry) + "\n")
    job = Job(name="seed-1", prompt={})
    results = Results(tmp_path)
    assert results.finished(job) is None
    made = results.begin(job) / "a.txt"
    made.write_text("1")
    assert results.keep(job, [made]) == [tmp_path / "seed-1.txt"]
    assert Results(tmp_path).finished(job) == [tmp_path / "seed-1.txt"]


def test_a_prompt_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    notes, out = tmp_path / "notes", tmp_path / "out"
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(work.workflow(notes)))
    lines = work.seeds(3)
    lines[1]["set"]["LabDraw.mood"] = "bad"
    file = work.write_lines(tmp_path / "p.jsonl", lines)
    command = ["render", str(flow), "--prompts", str(file), "--custom-nodes", str(work.LAB), "-o", str(out), "-q"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.out.split() == [str(out / "seed-1.txt"), str(out / "seed-3.txt")]
    assert "line 2 (seed-2): Node 2 (LabDraw): seed 2 is not in the mood" in said.err
    assert "1 of 3 prompts failed" in said.err
    assert "Traceback" in caplog.text  # a bug of the node: whoever wrote it will want to see where
    lines[1]["set"]["LabDraw.mood"] = "good"
    work.write_lines(file, lines)
    assert main(command) == 0
    assert sorted(capsys.readouterr().out.split()) == [str(out / f"seed-{seed}.txt") for seed in (1, 2, 3)]
    assert [seed for _, seed in work.noted(notes, "draw")] == ["1", "2", "3", "2"]


# --- workers that die -------------------------------------------------------------------------------------------------


class Mortal:
    """A worker that is lost over some prompts, and comes back as often as it has lives."""

    def __init__(self, name: str, dies_at: Callable[[Job], bool], lives: int) -> None:
        self.name, self.dies_at, self.lives = name, dies_at, lives
        self.began: list[str] = []
        self.is_closed = False

    def ready(self) -> bool:
        self.lives -= 1
        return self.lives >= 0

    def render(self, job: Job, folder: Path, tell: Callable[[str, Mapping[str, Any]], None]) -> list[Path]:
        self.began.append(job.name)
        path = folder / "half.txt"
        path.write_text("half")
        if self.dies_at(job):
            raise WorkerLost("it died")
        if job.name == "seed-7":
            raise JobFailed("nobody can")
        path.write_text(job.name)
        return [path]

    def close(self) -> None:
        self.is_closed = True


def mortal_batch(folder: Path, workers: list[Mortal], count: int = 16) -> tuple[Outcome, Told]:
    told: Told = []
    jobs = [Job(name=f"seed-{seed}", prompt={}, line=seed) for seed in range(1, count + 1)]
    outcome = run_batch(
        jobs, workers, Results(folder), stop=Stop(), tell=lambda event, about: told.append((event, dict(about)))
    )
    return outcome, told


def test_lost_work_is_done_by_another_worker_and_kept_once(tmp_path: Path) -> None:
    weak, strong = Mortal("weak", lambda job: True, 1), Mortal("strong", lambda job: False, 1)
    outcome, told = mortal_batch(tmp_path, [weak, strong])
    assert len(weak.began) == 1
    assert weak.began[0] in strong.began
    assert outcome.failed == {"seed-7": "nobody can"}
    expected = {f"seed-{seed}.txt": f"seed-{seed}".encode() for seed in range(1, 17) if seed != 7}
    assert work.contents(tmp_path) == expected
    assert sorted(names(told, "finished")) == sorted(Path(name).stem for name in expected)
    assert names(told, "lost") == weak.began
    assert weak.is_closed
    assert strong.is_closed


def test_a_prompt_that_kills_workers_is_given_up(tmp_path: Path) -> None:
    workers = [Mortal(name, lambda job: job.name == "seed-2", 9) for name in ("one", "two")]
    outcome, _ = mortal_batch(tmp_path, workers, 4)
    assert set(outcome.files) == {"seed-1", "seed-3", "seed-4"}
    assert f"{MAX_TRIES} workers were lost over it" in outcome.failed["seed-2"]
    assert sum(one.began.count("seed-2") for one in workers) == MAX_TRIES


def test_no_worker_left_ends_the_batch_and_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No worker is left"):
        mortal_batch(tmp_path, [Mortal("one", lambda job: job.name == "seed-3", 1)], 4)
    assert set(work.contents(tmp_path)) == {"seed-1.txt", "seed-2.txt"}  # and nothing that is half
    outcome, told = mortal_batch(tmp_path, [Mortal("two", lambda job: False, 1)], 4)
    assert names(told, "started") == ["seed-3", "seed-4"]
    assert len(outcome.files) == 4


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_bundled_kind_of_model_gives_what_single_renders_give(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """From a cache or fresh: the same frames; and the loader runs once."""
    flow = Path(sys.modules["vidgen"].__file__ or "").parent / "workflows" / "api" / "hunyuan_t2v.json"
    small = ["--set", "VidGenSampler.steps=1", "--set", "VidGenEmptyLatent.num_frames=5", "--device", "cpu", "-q"]
    small += ["--set", f"VidGenLoadAll.model_folder={tiny_bundle_dir}", "--set", "VidGenEmptyLatent.width=32"]
    small += ["--set", "VidGenEmptyLatent.height=32"]
    texts = ["a red star", "a blue heart"]
    lines = [{"name": f"p{number}", "set": {"Prompt.prompt": text}} for number, text in enumerate(texts)]
    file = work.write_lines(tmp_path / "p.jsonl", lines)
    assert main(["render", str(flow), *small, "--prompts", str(file), "-o", str(tmp_path / "out")]) == 0
    for number, text in enumerate(texts):
        alone = tmp_path / f"alone{number}.mp4"
        assert main(["render", str(flow), *small, "--set", f"Prompt.prompt={text}", "-o", str(alone)]) == 0
        frames, _ = read_video(tmp_path / "out" / f"p{number}.mp4")
        assert (frames == read_video(alone)[0]).all()
    assert not (read_video(tmp_path / "out" / "p0.mp4")[0] == frames).all()


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_events_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(work.workflow()))
    common = ["render", str(flow), "--custom-nodes", str(work.LAB), "--json", "-o"]
    assert main([*common, str(tmp_path)]) == 0
    told = events_of(capsys.readouterr().out)
    assert [(event["event"], event.get("class_type")) for event in told] == [
        *(("node", name) for name in ("LabLoad", "LabDraw", "LabKeep")),
        ("finished", None),
    ]
    assert Path(told[-1]["files"][0]).read_text().startswith("0 ")
    file = work.write_lines(tmp_path / "p.jsonl", work.seeds(2))
    assert main([*common, str(tmp_path / "out"), "--prompts", str(file)]) == 0
    told = events_of(capsys.readouterr().out)
    assert told[0] | {"time": 0} == {"event": "batch", "time": 0, "prompts": 2, "kept": 0, "workers": ["this process"]}
    finished = [event for event in told if event["event"] == "finished"]
    assert [(event["name"], event["line"]) for event in finished] == [("seed-1", 1), ("seed-2", 2)]
    assert finished[0]["files"] == [str(tmp_path / "out" / "seed-1.txt")]
    assert told[-1]["event"] == "end"
    assert told[-1]["finished"] == 2
    assert main([*common, str(tmp_path), "--set", "2.seed=-1"]) == 1
    said = capsys.readouterr()
    (failed,) = events_of(said.out)
    assert failed["event"] == "failed"
    assert "below the minimum of 0" in failed["error"]
    assert failed["error"] in said.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ray"], "needs no cluster"),
        (["--prompts", "p", "--ray", "--budget", "8GB"], "--budget and --ray"),
        (["--prompts", "p", "--context-parallel", "2"], "--context-parallel and --prompts"),
        (["--server", "http://127.0.0.1:1", "--models", "m"], "--models and --server"),
        (["--prompts", "p", "-o", "a.mp4"], "need a folder"),
        (["--server", "ftp://a"], "no address of a server"),
        (["--server", "a:1,http://a:1"], "given twice"),
        (["--prompts", "p", "--custom-nodes", "nowhere"], "no such folder of nodes"),
    ],
)
def test_options_that_cannot_be_together(tmp_path: Path, options: list[str], words: str, capsys: Any) -> None:
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(work.workflow()))
    assert main(["render", str(flow), *options]) == 1
    assert words in capsys.readouterr().err
