"""The real frontend in a real browser on our server: what the browser tests share."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("VIDGEN_SCREENSHOTS")
"""a folder for a picture of each page"""
START_S, RUN_S = 120, 240
"""generous: other work may share the machine"""

needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed (apt install chromium)")

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in a process of its own, as a user starts it."""
    folder = tmp_path_factory.mktemp("VidGen")
    start = "import sys; from vidgen.headless.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "serve", "--port", "0", "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
        assert server.stdout is not None
        yield server.stdout.readline().split()[-1]
        server.terminate()
        assert server.wait(START_S) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page with an eye on its console, its requests and what it hears from the server."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.heard: list[tuple[float, str, Any]] = []
        self.page.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._on_request)
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._on_frame))

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.outside.append(request.url)

    def _on_frame(self, frame: str | bytes) -> None:
        if isinstance(frame, bytes):
            self.heard.append((time.monotonic(), "binary", frame))
        else:
            said = json.loads(frame)
            self.heard.append((time.monotonic(), said["type"], said["data"]))

    def open(self, path: str = "/") -> None:
        self.page.goto(self.address + path)
        self.page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=START_S * 1000)

    def open_template(self, name: str = "hunyuan_t2v") -> None:
        self.open(f"/?template={name}&source=comfyui-vidgen")
        self.page.wait_for_function("window.app.graph._nodes.length > 3", timeout=START_S * 1000)

    def set(self, kind: str, **values: Any) -> None:
        """Widgets of the first node of a kind."""
        self.page.evaluate(
            """([kind, values]) => {
                const node = window.app.graph._nodes.find((one) => one.type === kind);
                for (const [name, value] of Object.entries(values))
                    node.widgets.find((one) => one.name === name).value = value;
            }""",
            [kind, values],
        )

    def widgets(self, kind: str) -> dict[str, Any]:
        return self.page.evaluate(
            """(kind) => {
                const node = window.app.graph._nodes.find((one) => one.type === kind);
                const shown = node.widgets.filter((one) => !one.name.startsWith("$$")); // not the preview
                return Object.fromEntries(shown.map((one) => [one.name, one.value]));
            }""",
            kind,
        )

    def settings(self, **values: Any) -> None:
        """Of the frontend, with ``_`` for the dots in their names; the server keeps them for the next visit."""
        for name, value in values.items():
            call = "([name, value]) => window.app.extensionManager.setting.set(name, value)"
            self.page.evaluate(call, [name.replace("_", "."), value])

    def run(self) -> None:
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def wait_for(self, kind: str, seconds: float = RUN_S) -> Any:
        """The data of the first message of this kind from now on or before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _, heard, data in self.heard:
                if heard == kind:
                    return data
            self.page.wait_for_timeout(50)
        raise AssertionError(f"no {kind} in {seconds} s; heard {[heard for _, heard, _ in self.heard][-20:]}")

    def drop(self, name: str, content: bytes, kind: str) -> None:
        self.page.evaluate(
            """([name, content, kind]) => {
                const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
                const dropped = new DataTransfer();
                dropped.items.add(new File([bytes], name, {type: kind}));
                const canvas = document.querySelector("#graph-canvas");
                const options = {dataTransfer: dropped, bubbles: true, cancelable: true};
                for (const event of ["dragover", "drop"]) canvas.dispatchEvent(new DragEvent(event, options));
            }""",
            [name, base64.b64encode(content).decode(), kind],
        )

    def picture(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    one = Visit(browser, address)
    yield one
    one.context.close()


def small(visit: Visit) -> None:
    """A render of the bundled model that takes seconds."""
    visit.set("VidGenSampler", steps=3)
    visit.set("VidGenEmptyLatent", num_frames=5)
