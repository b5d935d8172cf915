"""One run as ComfyUI's protocol documents it, message by message; and what many listeners at once are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from serving import Running, node, running

from vidgen.headless.server.clients import MAX_UNSENT_PREVIEWS, MAX_UNSENT_STATES, Client, Event


class Steps:
    """Counts with progress, previews what it has, and shows a result."""

    RETURN_TYPES = ("INT",)
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"steps": ("INT", {"default": 2}), "key": ("INT", {})}})

    def run(self, steps: int, key: int) -> dict[str, Any]:
        import torch

        from vidgen.nodes.host import current

        host = current()
        for step in range(steps):
            time.sleep(0.11)  # a preview is sent ten times a second at most
            host.check_cancelled()
            host.preview(lambda: torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
            host.progress("count", step + 1, steps)
        shown = {"filename": "a.mp4", "subfolder": "", "type": "output"}
        return {"ui": {"images": [shown], "animated": (True,)}, "result": (steps,)}


class Number:
    """Quick, and no output."""

    RETURN_TYPES = ("INT",)
    FUNCTION, CATEGORY = "run", "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("INT", {"default": 0})}})

    def run(self, value: int) -> tuple[int]:
        return (value,)


class Breaks:
    RETURN_TYPES = ("INT",)
    FUNCTION, CATEGORY = "run", "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})

    def run(self) -> tuple[int]:
        raise RuntimeError("it broke")


class Says:
    """Shows a text of any length."""

    RETURN_TYPES = ()
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"text": ("STRING", {}), "times": ("INT", {"default": 1})}})

    def run(self, text: str, times: int) -> dict[str, Any]:
        return {"ui": {"text": [text * times]}}


CLASSES: dict[str, type] = {"Steps": Steps, "Number": Number, "Breaks": Breaks, "Says": Says}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("VidGen"), CLASSES) as asked:
        yield asked


class Ear:
    """A WebSocket that writes down what it hears."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.heard: list[tuple[str, Any]] = []

    async def until(self, *kinds: str) -> None:
        """Listen until one of these, or ``end``, the last message of a run."""
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                kind, length = struct.unpack(">II", message.data[:8])
                self.heard.append((f"binary {kind}", json.loads(message.data[8 : 8 + length])))
                assert message.data[8 + length :].startswith(b"\xff\xd8\xff")
                continue
            said = json.loads(message.data)
            assert set(said) == {"type", "data"}
            self.heard.append((said["type"], said["data"]))
            is_end = said["type"] == "executing" and said["data"]["node"] is None
            if said["type"] in kinds or ("end" in kinds and is_end):
                return
        raise AssertionError("the connection ended")


@contextlib.asynccontextmanager
async def listening(server: Running, client_id: str) -> Any:
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
        session.ws_connect("/ws", params={"clientId": client_id}) as socket,
    ):
        ear = Ear(socket)
        ear.session = session  # type: ignore[attr-defined]
        yield ear


async def post(ear: Any, path: str, body: Any) -> Any:
    async with ear.session.post(path, json=body) as answer:
        return answer.status, await answer.json()


def hear(server: Running, prompt: Any, *, interrupt: bool = False) -> tuple[str, list[tuple[str, Any]]]:
    """(prompt id, what a fresh client hears from its connection to the end of its run)."""

    async def whole() -> tuple[str, list[tuple[str, Any]]]:
        async with listening(server, "the client") as ear:
            await ear.until("status")
            flags = {"supports_preview_metadata": True, "supports_progress_text_metadata": True}
            await ear.socket.send_json({"type": "feature_flags", "data": flags})
            await ear.until("feature_flags")
            status, told = await post(ear, "/api/prompt", {"prompt": prompt, "client_id": "the client"})
            assert status == 200
            assert set(told) == {"prompt_id", "number", "node_errors"}
            assert told["node_errors"] == {}
            if interrupt:
                await ear.until("progress")
                assert await post(ear, "/api/interrupt", {"prompt_id": told["prompt_id"]}) == (200, {})
            await ear.until("end")
            return told["prompt_id"], ear.heard

    return asyncio.run(asyncio.wait_for(whole(), 60))


TIME, ANY = "a time", "anything"


def state(node_id: str, value: int, most: int, how: str, prompt_id: str) -> dict[str, Any]:
    names = {"node_id": node_id, "display_node_id": node_id, "real_node_id": node_id, "parent_node_id": None}
    return {"value": value, "max": most, "state": how, "prompt_id": prompt_id, **names}


class Transcript:
    """What the protocol says a run tells, in order."""

    def __init__(self, prompt_id: str) -> None:
        self.id = prompt_id
        self.lines: list[tuple[str, Any]] = []
        self.states: dict[str, Any] = {}

    def add(self, kind: str, **data: Any) -> None:
        self.lines.append((kind, data))

    def begin(self, cached: list[str]) -> None:
        self.add("status", status={"exec_info": {"queue_remaining": 0}}, sid="the client")
        features = {"supports_preview_metadata": True, "supports_progress_text_metadata": True}
        self.add("feature_flags", **features, max_upload_size=104857600, node_replacements=False)
        self.add("status", status={"exec_info": {"queue_remaining": 1}})
        self.add("execution_start", prompt_id=self.id, timestamp=TIME)
        self.add("execution_cached", nodes=cached, prompt_id=self.id, timestamp=TIME)

    def progress_state(self, node_id: str, value: int, most: int, how: str) -> None:
        self.states[node_id] = state(node_id, value, most, how, self.id)
        self.add("progress_state", prompt_id=self.id, nodes=dict(self.states))

    def start(self, node_id: str) -> None:
        self.progress_state(node_id, 0, 1, "running")
        self.add("executing", node=node_id, display_node=node_id, prompt_id=self.id)

    def step(self, node_id: str, value: int, most: int) -> None:
        self.progress_state(node_id, value, most, "running")
        names = {"node_id": node_id, "display_node_id": node_id, "real_node_id": node_id, "parent_node_id": None}
        self.add("binary 4", **names, prompt_id=self.id, image_type="image/jpeg")
        self.add("progress", value=value, max=most, prompt_id=self.id, node=node_id)

    def executed(self, node_id: str) -> None:
        shown = {"images": [{"filename": "a.mp4", "subfolder": "", "type": "output"}], "animated": [True]}
        self.add("executed", node=node_id, display_node=node_id, output=shown, prompt_id=self.id)

    def finish(self, node_id: str) -> None:
        self.progress_state(node_id, 1, 1, "finished")

    def end(self, how: str, **data: Any) -> None:
        self.add(how, prompt_id=self.id, timestamp=TIME, **data)
        self.add("status", status={"exec_info": {"queue_remaining": 0}})
        self.add("executing", node=None, prompt_id=self.id)

    def compare(self, heard: list[tuple[str, Any]]) -> None:
        assert [kind for kind, _ in heard] == [kind for kind, _ in self.lines]
        for (kind, data), (_, wanted) in zip(heard, self.lines, strict=True):
            assert set(data) == set(wanted), kind
            for name, value in wanted.items():
                if value is TIME:
                    assert abs(data[name] - time.time() * 1000) < 120_000
                elif value is not ANY:
                    assert data[name] == value, (kind, name)


def graph(key: int) -> dict[str, Any]:
    return {"1": node("Number", value=2), "2": node("Steps", steps=["1", 0], key=key)}


def test_a_run_and_the_same_again(server: Running) -> None:
    server.post("/free", {"free_memory": True})
    prompt_id, heard = hear(server, graph(1))
    wanted = Transcript(prompt_id)
    wanted.begin([])
    wanted.start("1")
    wanted.finish("1")
    wanted.start("2")
    wanted.step("2", 1, 2)
    wanted.step("2", 2, 2)
    wanted.executed("2")
    wanted.finish("2")
    wanted.end("execution_success")
    wanted.compare(heard)
    record = server.get(f"/history/{prompt_id}").json()[prompt_id]
    assert record["status"]["status_str"] == "success"
    assert record["status"]["completed"] is True
    told = [kind for kind, _ in record["status"]["messages"]]
    assert told == ["execution_start", "execution_cached", "execution_success"]
    number, job_id, prompt, extra, outputs = record["prompt"]
    assert (job_id, prompt, outputs, extra["client_id"]) == (prompt_id, graph(1), ["2"], "the client")
    assert isinstance(number, int)
    assert record["outputs"]["2"]["animated"] == [True]
    assert set(record["meta"]) == {"2"}

    prompt_id, heard = hear(server, graph(1))
    wanted = Transcript(prompt_id)
    wanted.begin(["1", "2"])
    wanted.executed("2")
    wanted.finish("2")
    wanted.end("execution_success")
    wanted.compare(heard)


def test_a_run_that_fails(server: Running) -> None:
    prompt_id, heard = hear(server, {"1": node("Breaks"), "2": node("Steps", steps=["1", 0], key=0)})
    wanted = Transcript(prompt_id)
    wanted.begin([])
    wanted.start("1")
    error = {"node_id": "1", "node_type": "Breaks", "executed": [], "exception_message": "it broke"}
    error |= {"exception_type": "RuntimeError", "traceback": ANY, "current_inputs": {}, "current_outputs": []}
    wanted.end("execution_error", **error)
    wanted.compare(heard)
    status = server.get(f"/history/{prompt_id}").json()[prompt_id]["status"]
    assert (status["status_str"], status["completed"]) == ("error", False)
    assert [kind for kind, _ in status["messages"]][-1] == "execution_error"


def test_a_run_that_is_stopped(server: Running) -> None:
    prompt_id, heard = hear(server, {"1": node("Steps", steps=100, key=9)}, interrupt=True)
    wanted = Transcript(prompt_id)
    wanted.begin([])
    wanted.start("1")
    for step in range(sum(kind == "progress" for kind, _ in heard)):
        wanted.step("1", step + 1, 100)
    wanted.end("execution_interrupted", node_id="1", node_type="Steps", executed=[])
    wanted.compare(heard)
    status = server.get(f"/history/{prompt_id}").json()[prompt_id]["status"]
    assert status["status_str"] == "error"
    assert [kind for kind, _ in status["messages"]][-1] == "execution_interrupted"


def test_a_prompt_that_cannot_run_says_why_in_comfyuis_words(server: Running) -> None:
    answer = server.post("/api/prompt", {"prompt": {"1": node("Steps", steps="x"), "2": node("Number")}})
    assert answer.status == 400
    told = answer.json()
    assert set(told) == {"error", "node_errors"}
    assert set(told["error"]) == {"type", "message", "details", "extra_info"}
    assert told["error"]["type"] == "prompt_outputs_failed_validation"
    wrong, missing = told["node_errors"]["1"]["errors"]
    assert told["node_errors"]["1"]["dependent_outputs"] == ["1"]
    assert told["node_errors"]["1"]["class_type"] == "Steps"
    assert wrong["type"] == "invalid_input_type"
    assert wrong["extra_info"] == {
        "input_name": "steps",
        "input_config": ["INT", {"default": 2}],
        "received_value": "x",
    }
    assert (missing["type"], missing["extra_info"]["input_name"]) == ("required_input_missing", "key")


def test_a_prompt_of_nobody_is_told_to_nobody(server: Running) -> None:
    """Without a client_id only the queue is anybody's business."""

    async def whole() -> list[tuple[str, Any]]:
        async with listening(server, "a bystander") as ear:
            await ear.until("status")
            await post(ear, "/api/prompt", {"prompt": graph(2)})
            await ear.until("status")
            await ear.until("status")
            return ear.heard

    assert [kind for kind, _ in asyncio.run(asyncio.wait_for(whole(), 60))] == ["status"] * 3


# --- many listeners ---------------------------------------------------------------------------------------------------


def half_a_frame(client_id: str) -> bytes:
    """A WebSocket's greeting, and the beginning of a text frame of which more is promised."""
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    greeting = f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
    greeting += f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    return greeting.encode() + b"\x81\xfe\x10\x00" + b"mask" + b"only a few of 4096 bytes"


def test_twenty_listeners_of_which_two_die(server: Running) -> None:
    """Each of twenty queues its own prompts and hears each of them whole, while one dies in the middle of a message
    that it sends, and another in the middle of one that it is sent."""
    prompts_each, long = 5, 200_000

    async def one(number: int, ready: asyncio.Barrier | asyncio.Event) -> None:
        async with listening(server, f"c{number}") as ear:
            await ear.until("status")
            assert isinstance(ready, asyncio.Event)
            await ready.wait()
            ids = []
            for turn in range(prompts_each):
                prompt = {"1": node("Says", text=f"{number} {turn} ", times=long)}
                _, told = await post(ear, "/prompt", {"prompt": prompt, "client_id": f"c{number}"})
                ids.append(told["prompt_id"])
            for _ in ids:
                await ear.until("end")
            for turn, prompt_id in enumerate(ids):
                own = [(kind, data) for kind, data in ear.heard if data.get("prompt_id") == prompt_id]
                assert [kind for kind, _ in own] == [
                    *("execution_start", "execution_cached", "progress_state", "executing"),
                    *("executed", "progress_state", "execution_success", "executing"),
                ]
                assert own[4][1]["output"]["text"] == [f"{number} {turn} " * long]
            foreign = {data["prompt_id"] for _, data in ear.heard if "prompt_id" in data} - set(ids)
            assert foreign == set()

    async def dies_while_sending() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(half_a_frame("dead1"))
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.abort()

    async def dies_while_receiving() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.write(half_a_frame("dead2").partition(b"\x81")[0])
        await reader.readuntil(b"\r\n\r\n")
        body = {"prompt": {"1": node("Says", text="dead", times=10**6)}, "client_id": "dead2"}
        assert (await asyncio.to_thread(server.post, "/prompt", body)).status == 200
        await asyncio.sleep(0.3)
        await reader.read(100)
        writer.transport.abort()

    async def whole() -> None:
        ready = asyncio.Event()
        listeners = [asyncio.create_task(one(number, ready)) for number in range(20)]
        while len(server.server.clients) < 20:
            await asyncio.sleep(0.02)
        ready.set()
        await asyncio.gather(dies_while_sending(), dies_while_receiving(), *listeners)

    asyncio.run(asyncio.wait_for(whole(), 150))
    assert server.get("/users").status == 200
    deadline = time.monotonic() + 30
    while server.server.clients and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.server.clients == {}


def test_a_long_run_is_told_whole_to_who_listens(server: Running) -> None:
    """Thousands of messages at once; only a state that a later one repeats may be left out."""
    prompt = {str(n): node("Says", text=str(n), times=1) for n in range(1500)}
    _, heard = hear(server, prompt)
    assert [data["node"] for kind, data in heard if kind == "executed"] == list(prompt)
    assert [data["node"] for kind, data in heard if kind == "executing"][:-1] == list(prompt)
    last = [data for kind, data in heard if kind == "progress_state"][-1]
    assert list(last["nodes"]) == list(prompt)
    assert {one["state"] for one in last["nodes"].values()} == {"finished"}


def test_who_does_not_read_is_let_go(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidgen.headless.server.clients.MAX_UNSENT", 50)

    async def whole() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        writer.write(half_a_frame("deaf").partition(b"\x81")[0])
        await reader.readuntil(b"\r\n\r\n")
        for turn in range(40):
            body = {"prompt": {"1": node("Says", text=os.urandom(500).hex(), times=1000 + turn)}, "client_id": "deaf"}
            await asyncio.to_thread(server.post, "/prompt", body)
        while "deaf" in server.server.clients:
            await asyncio.sleep(0.05)
        writer.transport.abort()

    asyncio.run(asyncio.wait_for(whole(), 60))
    assert server.run(graph(3))["status"]["completed"]


def test_a_second_page_of_a_client_takes_over(server: Running) -> None:
    async def whole() -> None:
        async with listening(server, "twice") as first:
            await first.until("status")
            async with listening(server, "twice") as second:
                await second.until("status")
                message = await asyncio.wait_for(first.socket.receive(), 20)
                assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
                body = {"prompt": {"1": node("Says", text="a", times=1)}, "client_id": "twice"}
                await post(second, "/prompt", body)
                await second.until("end")

    asyncio.run(asyncio.wait_for(whole(), 60))


@pytest.mark.parametrize(
    "said",
    ["", "nonsense", "5", "[]", '{"type": 5}', '{"type": "feature_flags"}', "[" * 5000, "x" * 1_000_000],
)
def test_a_listener_that_talks_nonsense(server: Running, said: str) -> None:
    async def whole() -> None:
        async with listening(server, "odd") as ear:
            await ear.until("status")
            await ear.socket.send_str(said)
            await ear.socket.send_bytes(said[:100].encode())
            await ear.socket.send_str('{"type": "feature_flags", "data": {}}')
            await ear.until("feature_flags")

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_a_message_that_unpacks_to_too_much(server: Running) -> None:
    """A WebSocket may pack its messages, too."""

    async def whole() -> None:
        async with aiohttp.ClientSession() as session:
            address = f"ws://127.0.0.1:{server.port}/ws?clientId=bomb"
            async with session.ws_connect(address, compress=15) as socket:
                await socket.receive()
                with contextlib.suppress(ConnectionError):
                    await socket.send_str(" " * 50_000_000)
                kinds = [(await socket.receive()).type for _ in range(2)]
                assert aiohttp.WSMsgType.CLOSE in kinds or aiohttp.WSMsgType.CLOSED in kinds

    asyncio.run(asyncio.wait_for(whole(), 60))
    assert server.get("/users").status == 200


class Wire:
    """A connection that takes everything at once and keeps it."""

    closed = False

    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def send_str(self, text: str) -> None:
        self.sent.append(json.loads(text))

    async def send_bytes(self, content: bytes) -> None:
        self.sent.append(content)


def test_what_a_client_that_lags_is_spared() -> None:
    """States that later ones repeat, and previews; never anything else, and never the order."""
    wire = Wire()
    client = Client(wire)  # type: ignore[arg-type]
    for n in range(200):
        client.push(Event("progress_state", {"n": n}))
        client.push(bytes([n]))
        client.push(Event("executed", {"n": n}))

    async def write() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.write_out(), 0.5)
        client.push(b"again")  # there is room again
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.write_out(), 0.5)

    asyncio.run(write())
    assert wire.sent.pop() == b"again"
    texts = [one for one in wire.sent if isinstance(one, dict)]
    assert [one["data"]["n"] for one in texts if one["type"] == "executed"] == list(range(200))
    states = [one["data"]["n"] for one in texts if one["type"] == "progress_state"]
    assert states == list(range(200 - MAX_UNSENT_STATES, 200))
    assert [one for one in wire.sent if isinstance(one, bytes)] == [bytes([n]) for n in range(MAX_UNSENT_PREVIEWS)]
    numbers = [one["data"]["n"] for one in texts]
    assert numbers == sorted(numbers)
