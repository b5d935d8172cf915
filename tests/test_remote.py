"""`vidgen render --server`: two real servers, one of which is killed, and a stranger that answers well or badly."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from vidgen.headless import remote
from vidgen.headless.batch import Job, JobFailed, Results, WorkerLost, run_batch
from vidgen.headless.cli import main
from vidgen.headless.custom_nodes import own_packs
from vidgen.headless.executor import PromptError, check
from vidgen.headless.remote import Address, ServerWorker, connect, named_files, parse_servers, stand_ins
from vidgen.headless.stop import Stop
from vidgen.nodes.host import LocalNodeHost, using
from vidgen.vidgen_core.errors import Cancelled, SettingsError
from vidgen.vidgen_core.media import read_metadata

sys.path.insert(0, str(Path(__file__).parent))
import batch_work as work
from serving import node, running

Told = list[tuple[str, dict[str, Any]]]
START = "import sys; from vidgen.headless.cli import main; sys.exit(main(sys.argv[1:]))"


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, as a user starts it: where it is, and the process."""
    options = ["--port", "0", "--api-only", "--folder", str(folder), "--custom-nodes", str(work.LAB), "--device", "cpu"]
    command = [sys.executable, "-c", START, "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Two of them; the last test ends one."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with serving(first) as one, serving(second) as two:
        yield dict([one, two])


def test_one_prompt_goes_to_a_server_and_comes_back_under_its_name(
    servers: dict[str, subprocess.Popen[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, *_ = servers
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(work.workflow()))

    def render(output: Path, *settings: str) -> int:
        changes = [word for setting in settings for word in ("--set", setting)]
        return main(["render", str(flow), "--server", url, "-o", str(output), "-q", *changes])

    assert render(tmp_path, "Draw Numbers.seed=1") == 1
    assert "There is no such node" in capsys.readouterr().err
    assert render(tmp_path, "LabDraw.seed=1001") == 1
    assert "above the maximum of 1000" in capsys.readouterr().err  # before it is sent
    assert render(tmp_path / "a.mp4", "LabDraw.seed=5", "LabKeep.copies=2") == 0
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "a.txt"), str(tmp_path / "a_2.txt")]  # the ending is the file's own
    assert said.err == ""
    assert render(tmp_path, "LabDraw.mood=bad") == 1
    assert "flow: Node 2 (LabDraw): seed 0 is not in the mood" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "a_2.txt", "flow.json"]


def test_sixteen_prompts_on_two_servers_one_of_which_is_killed(
    servers: dict[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    jobs, notes, out = work.sixteen(tmp_path), tmp_path / "notes", tmp_path / "out"
    told: list[tuple[Any, ...]] = []
    work.kill_the_stubborn(notes)
    workers, classes = connect(parse_servers(",".join(servers)), Stop())
    assert {"LabDraw", "VidGenSampler", "LoadImage"} <= classes.keys()
    outcome = run_batch(jobs, workers, Results(out), stop=Stop(), tell=lambda *event: told.append(event))
    assert not outcome.failed
    (lost,) = [about for kind, about in told if kind == "lost"]
    assert lost["name"] == f"seed-{work.STUBBORN}"
    finished = [about for kind, about in told if kind == "finished"]
    assert sorted(about["name"] for about in finished) == sorted(job.name for job in jobs)  # each once
    assert [about["worker"] for about in finished if about["name"] == lost["name"]] != [lost["worker"]]
    assert len(work.noted(notes, "draw")) == 17
    assert work.contents(out) == work.sequential(jobs, tmp_path / "alone")


def test_a_server_that_does_not_answer_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(work.workflow()))
    assert main(["render", str(flow), "--server", "http://127.0.0.1:9", "-o", str(tmp_path)]) == 1
    assert "The server does not answer" in capsys.readouterr().err


# --- files that prompts name ------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """``red.png``, the same once more in a folder, and a blue one under a name that servers would not take."""
    folder = tmp_path / "inputs"
    (folder / "sub").mkdir(parents=True)
    for name, colour in (("red.png", "red"), ("sub/again.png", "red"), ("b\u00e4 <1>.PNG", "blue")):
        Image.new("RGB", (32, 16), colour).save(folder / name)
    (tmp_path / "secret.png").write_bytes((folder / "red.png").read_bytes())
    return folder


def saving(*names: str) -> dict[str, Any]:
    """A workflow that saves these pictures again."""
    loaders = {str(n): node("LoadImage", image=name) for n, name in enumerate(names, 1)}
    savers = {f"{n}0": node("SaveImage", images=[n, 0], filename_prefix=f"p{n}") for n in loaders}
    return {**loaders, **savers}


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is uploaded to servers of this process, by the name that was asked for."""
    from vidgen.headless.server import uploads

    keep, names = uploads.keep, []

    async def noted(form: Any, places: Any) -> dict[str, str]:
        names.append(form.name)
        return await keep(form, places)

    monkeypatch.setattr(uploads, "keep", noted)
    return names


def test_named_files_are_sent_once_and_come_back_rendered(
    inputs: Path, uploads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = tmp_path / "flow.json"
    flow.write_text(json.dumps(saving("red.png", "sub/again.png [input]", "b\u00e4 <1>.PNG", "vidgen-black.png")))
    with running(tmp_path / "server") as server:
        url = f"http://127.0.0.1:{server.port}"
        (server.server.places.folder("input") / "red.png").write_bytes((inputs / "b\u00e4 <1>.PNG").read_bytes())
        for number in (1, 2):
            out = tmp_path / f"out{number}"
            out.mkdir()
            assert main(["render", str(flow), "--server", url, "--input", str(inputs), "-o", str(out), "-q"]) == 0
            found = sorted(out.iterdir())
            assert [Image.open(path).getpixel((0, 0)) for path in found[:3]] == [(255, 0, 0), (255, 0, 0), (0, 0, 255)]
            assert len(found) == 4  # the example was there already
        kept = sorted(path.name for path in (server.server.places.folder("input") / "vidgen").iterdir())
    assert sorted(uploads) == kept  # one for each content, in the first of two renders
    assert len(kept) == 2
    prompt = json.loads(read_metadata(found[0])["prompt"])
    assert {prompt[n]["inputs"]["image"] for n in "123"} == {f"vidgen/{name}" for name in kept}
    assert prompt["4"]["inputs"]["image"] == "vidgen-black.png"
    assert capsys.readouterr().err == ""


def test_nothing_else_is_sent(inputs: Path, uploads: list[str], tmp_path: Path) -> None:
    """Paths of a stranger's workflow; but a whole path is good where it lies in the folder."""
    (inputs / "link.png").symlink_to(tmp_path / "secret.png")
    classes = own_packs().classes
    outside = saving("../secret.png", str(tmp_path / "secret.png"), "link.png", "red.png [output]", "nothing.png")
    with using(LocalNodeHost()):
        assert list(named_files(outside, classes, inputs)) == []
        assert list(named_files(saving("red.png"), classes, None)) == []
        inside = saving(str(inputs / "red.png"), "sub\\again.png")
        assert [path.name for _, _, path in named_files(inside, classes, inputs)] == ["red.png", "again.png"]
    with running(tmp_path / "server") as server:
        worker = ServerWorker(Address(f"http://127.0.0.1:{server.port}"), Stop(), classes, inputs)
        with using(LocalNodeHost()), pytest.raises(JobFailed, match="cannot be used in the input folder"):
            worker.render(Job(name="a", prompt=saving("../secret.png")), tmp_path, lambda event, about: None)
    assert uploads == []


def test_a_file_that_the_server_refuses_fails_its_prompt(inputs: Path, tmp_path: Path) -> None:
    (inputs / "words.png").write_text("no picture")
    with running(tmp_path / "server") as server:
        worker = ServerWorker(Address(f"http://127.0.0.1:{server.port}"), Stop(), own_packs().classes, inputs)
        job = Job(name="a", prompt=saving("words.png"))
        with (
            using(LocalNodeHost()),
            pytest.raises(JobFailed, match=r"does not take words\.png: The file is no picture"),
        ):
            worker.render(job, tmp_path, lambda event, about: None)


def test_a_stop_is_heard_while_files_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_LOOK_S", 0.05)
    stop, ended = Stop(), []
    stop.event.set()

    async def sending() -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    worker = ServerWorker(Address("http://127.0.0.1:9"), stop, {})
    with pytest.raises(Cancelled):
        asyncio.run(worker._unless_stopped(sending()))
    assert ended == [True]


# --- addresses and stand-ins ------------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert parse_servers("127.0.0.1:8188, https://b/comfy/?token=se%20cret,") == [
        Address("http://127.0.0.1:8188"),
        Address("https://b/comfy", "se cret"),
    ]
    for wrong in ("", "http://", "http://a:99999", "a:0", "file:///etc"):
        with pytest.raises(SettingsError):
            parse_servers(wrong)


def test_stand_ins_check_what_they_can_and_leave_the_rest_to_the_server() -> None:
    classes = stand_ins(
        {
            "Load": {
                "input": {"required": {"image": [["a.png"], {"image_upload": True}]}},
                "output": ["IMAGE"],
                "output_node": False,
            },
            "Pick": {
                "input": {
                    "required": {
                        "kind": ["COMBO", {"options": ["x", "y"]}],
                        "model": ["COMFY_DYNAMICCOMBO_V3", {"options": []}],
                        "on": ["*"],
                    },
                    "hidden": {"prompt": "PROMPT"},
                },
                "output": ["COMFY_MATCHTYPE_V3"],
                "output_name": None,
            },
            "Save": {"input": {"required": {"images": ["IMAGE"]}}, "output": [], "output_node": True},
        }
    )

    def prompt(kind: str) -> dict[str, Any]:
        return {
            "1": {"class_type": "Load", "inputs": {"image": "folder/b.png"}},
            "2": {"class_type": "Pick", "inputs": {"kind": kind, "model": "m", "model.size": 3, "on": ["1", 0]}},
            "3": {"class_type": "Save", "inputs": {"images": ["2", 0]}},
        }

    assert check(prompt("y"), classes) == ["3"]
    with pytest.raises(PromptError, match="not one of: x, y"):
        check(prompt("z"), classes)


# --- a stranger -------------------------------------------------------------------------------------------------------


class Stranger:
    """A server that says what it is told to say, on a thread of its own."""

    def __init__(self) -> None:
        self.posted: list[dict[str, Any]] = []
        self.asked: list[tuple[str, Any]] = []
        self.seen_token: str | None = None
        self.prompt_answer: tuple[int, Any] = (200, {"prompt_id": "p1", "number": 1, "node_errors": {}})
        self.history: Any = {}
        self.queue: Any = {"queue_running": [], "queue_pending": []}
        self.frames: list[Any] = []
        self.file: tuple[int, bytes, int | None] = (200, b"content", None)
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[Stranger]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        runner = asyncio.run_coroutine_threadsafe(self._start(), loop).result(30)
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)

    async def _start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/ws", self._socket)
        app.router.add_post("/prompt", self._prompt)
        app.router.add_get("/prompt", self._ok)
        app.router.add_post("/queue", self._noted)
        app.router.add_post("/interrupt", self._noted)
        app.router.add_get("/queue", self._queue)
        app.router.add_get("/history/p1", self._history)
        app.router.add_get("/view", self._view)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self.seen_token = request.headers.get("Authorization")
        for frame in self.frames:
            await (socket.send_bytes(frame) if isinstance(frame, bytes) else socket.send_str(frame))
        async for _ in socket:
            pass
        return socket

    async def _prompt(self, request: web.Request) -> web.Response:
        self.posted.append(await request.json())
        status, body = self.prompt_answer
        return web.Response(status=status, text=body if isinstance(body, str) else json.dumps(body))

    async def _ok(self, request: web.Request) -> web.Response:
        return web.json_response({})

    async def _noted(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, await request.json()))
        return web.json_response({})

    async def _queue(self, request: web.Request) -> web.Response:
        return web.json_response(self.queue)

    async def _history(self, request: web.Request) -> web.Response:
        return web.json_response(self.history)

    async def _view(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(("/view", dict(request.query)))
        status, content, length = self.file
        if length is None:
            return web.Response(status=status, body=content)
        answer = web.StreamResponse(headers={"Content-Length": str(length)})
        await answer.prepare(request)
        await answer.write(content)
        assert request.transport is not None
        request.transport.close()
        return answer


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stranger]:
    monkeypatch.setattr(remote, "QUIET_S", 0.5)
    monkeypatch.setattr(remote, "_LOOK_S", 0.05)
    with Stranger().running() as one:
        yield one


def message(kind: str, **data: Any) -> str:
    return json.dumps({"type": kind, "data": data})


END = message("executing", node=None, prompt_id="p1")
SAVED = {"filename": "x.png", "subfolder": "s", "type": "output"}


def record(*files: Mapping[str, Any], **status: Any) -> dict[str, Any]:
    status = status or {"status_str": "success", "completed": True, "messages": []}
    return {"p1": {"outputs": {"3": {"images": list(files), "text": ["words"], "animated": [True]}}, "status": status}}


def rendered(stranger: Stranger, folder: Path, stop: Stop | None = None) -> tuple[list[Path], Told]:
    told: Told = []
    worker = ServerWorker(Address(stranger.url, "secret"), stop or Stop(), work.lab_classes())
    job = Job(name="a", prompt=work.workflow())
    return worker.render(job, folder, lambda event, about: told.append((event, dict(about)))), told


def test_the_api_of_comfyui(stranger: Stranger, tmp_path: Path) -> None:
    stranger.frames = [
        message("status", status={"exec_info": {"queue_remaining": 1}}, sid="x"),
        message("executing", node="9", prompt_id="another"),
        message("executing", node=None, prompt_id="another"),
        b"\x00\x00\x00\x04preview",
        "no json",
        json.dumps(["no", "message"]),
        message("executing", node="2", prompt_id="p1"),
        message("progress", node="2", value=3, max=20, prompt_id="p1"),
        END,
    ]
    shown_only = {"filename": "t.png", "subfolder": "", "type": "temp"}
    evil = {"filename": "../../up.p ng", "subfolder": "", "type": "output"}
    stranger.history = record(SAVED, shown_only, evil)
    files, told = rendered(stranger, tmp_path)
    assert files == [tmp_path / "00001.png", tmp_path / "00002.bin"]
    assert files[0].read_bytes() == b"content"
    assert told == [("node", {"node": "2"}), ("progress", {"what": "node 2", "done": 3, "total": 20})]
    (posted,) = stranger.posted
    assert posted["prompt"] == work.workflow()
    assert [node["type"] for node in posted["extra_data"]["extra_pnginfo"]["workflow"]["nodes"]][0] == "LabLoad"
    assert stranger.seen_token == "Bearer secret"
    assert stranger.asked[0] == ("/view", SAVED)


def test_the_history_knows_where_the_socket_says_nothing(stranger: Stranger, tmp_path: Path) -> None:
    stranger.history = record(SAVED)
    files, _ = rendered(stranger, tmp_path)
    assert len(files) == 1


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((400, {"error": {"message": "bad"}, "node_errors": {"2": {"errors": [{"message": "no", "details": "d"}]}}}),
         JobFailed, r"bad; node 2 \(LabDraw\): no \(d\)"),
        ((400, {"error": "plain words"}), JobFailed, "plain words"),
        ((413, {}), JobFailed, "answers 413"),
        ((200, {"prompt_id": "p1", "node_errors": {"2": {"errors": [{"message": "no"}]}}}), JobFailed, "node 2"),
        ((429, {}), WorkerLost, "answers 429"),
        ((502, "<html>"), WorkerLost, "answers 502"),
        ((200, "<html>"), WorkerLost, "no JSON"),
    ],
)  # fmt: skip
def test_answers_to_a_prompt(
    stranger: Stranger, tmp_path: Path, answer: tuple[int, Any], error: type[Exception], words: str
) -> None:
    stranger.prompt_answer = answer
    with pytest.raises(error, match=words):
        rendered(stranger, tmp_path)


@pytest.mark.parametrize(
    ("history", "error", "words"),
    [
        ({}, WorkerLost, "forgotten the prompt"),
        (
            record(
                status_str="error",
                completed=False,
                messages=[["execution_error", {"node_id": "2", "node_type": "N", "exception_message": "boom"}]],
            ),
            JobFailed,
            r"Node 2 \(N\): boom",
        ),
        (
            record(status_str="error", completed=False, messages=[["execution_interrupted", {}]]),
            JobFailed,
            "stopped on the server",
        ),
    ],
)
def test_what_the_history_may_say(
    stranger: Stranger, tmp_path: Path, history: Any, error: type[Exception], words: str
) -> None:
    stranger.frames, stranger.history = [END], history
    with pytest.raises(error, match=words):
        rendered(stranger, tmp_path)


def test_a_file_that_is_cut_is_lost_work_and_one_that_is_gone_a_failure(stranger: Stranger, tmp_path: Path) -> None:
    stranger.frames, stranger.history = [END], record(SAVED)
    stranger.file = (200, b"half", 100)
    with pytest.raises(WorkerLost):
        rendered(stranger, tmp_path)
    stranger.file = (404, b"", None)
    with pytest.raises(JobFailed, match=re.escape("404 for the file x.png")):
        rendered(stranger, tmp_path)


def test_a_stop_takes_the_prompt_back(stranger: Stranger, tmp_path: Path) -> None:
    stranger.queue = {"queue_running": [[1, "p1", {}, {}, []]], "queue_pending": []}
    stop = Stop()
    threading.Timer(0.3, stop.event.set).start()
    with pytest.raises(Cancelled):
        rendered(stranger, tmp_path, stop)
    assert ("/queue", {"delete": ["p1"]}) in stranger.asked
    assert ("/interrupt", {"prompt_id": "p1"}) in stranger.asked


def test_a_server_that_is_gone_is_waited_for_until_nobody_needs_it(stranger: Stranger) -> None:
    worker = ServerWorker(Address(stranger.url), Stop(), {})
    assert worker.ready()
    worker = ServerWorker(Address("http://127.0.0.1:9"), Stop(), {})
    threading.Timer(0.3, worker.close).start()
    assert not worker.ready()
