"""A server on a real socket in a thread of its own, asked byte by byte: what the tests of its robustness share."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from vidgen.headless.server.app import Server, ServerSettings
from vidgen.headless.server.start import new_runner, new_server

TIMEOUT_S = 60
"""of one request; the machine may be busy, a server that hangs answers never"""


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str | None:
        """ComfyUI's word for the error."""
        return self.json()["error"]["type"]


class Running:
    """A server that runs, and a client that sends it whatever it is told to."""

    def __init__(self, server: Server, port: int) -> None:
        self.server, self.port = server, port

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            # The server may answer, and close, before it has read all of a body that it refuses.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, body: Any = None) -> Answer:
        return self.ask("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def raw(self, request: bytes) -> bytes:
        """What comes back for these bytes and the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_S) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
                while chunk := connection.recv(65536):
                    answer += chunk
            return answer

    def upload(self, content: bytes, name: str, **fields: str) -> Answer:
        boundary = "boundary-of-the-test"
        parts = [
            f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()
        ]
        parts.append(f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + content)
        body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts) + f"--{boundary}--".encode()
        return self.ask("POST", "/upload/image", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})

    def run(self, prompt: Any, **more: Any) -> dict[str, Any]:
        """The record of a prompt in the history, when it has ended."""
        answer = self.post("/prompt", {"prompt": prompt, **more})
        assert answer.status == 200, answer.body
        job_id = answer.json()["prompt_id"]
        end = time.monotonic() + 2 * TIMEOUT_S
        while time.monotonic() < end:
            history = self.get(f"/history/{job_id}").json()
            if history:
                return history[job_id]
            time.sleep(0.02)
        raise AssertionError("the prompt does not end")

    def error_of(self, prompt: Any) -> str:
        """What a run of this prompt ended with."""
        told = dict(self.run(prompt)["status"]["messages"])
        return told["execution_error"]["exception_message"]


@contextlib.contextmanager
def running(
    folder: Path, classes: dict[str, type] | None = None, *, has_page: bool = False, **settings: Any
) -> Iterator[Running]:
    """A server with its files in ``folder``, and ``classes`` besides the real nodes."""
    server = new_server(ServerSettings(folder=folder, has_page=has_page, **settings))
    server.classes = server.jobs.classes = {**server.classes, **(classes or {})}
    server.modules = {**server.modules, **dict.fromkeys(classes or {}, "tests")}
    loop, ready, ports = asyncio.new_event_loop(), threading.Event(), []
    stop = asyncio.Event()

    async def serve() -> None:
        runner = new_runner(server)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ports.append(runner.addresses[0][1])
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(TIMEOUT_S)
    try:
        yield Running(server, ports[0])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
        loop.close()
