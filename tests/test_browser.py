"""The real frontend in a real browser on our server: what a user sees and does."""

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

import numpy as np
import pytest
import torch

import vidgen
from vidgen.headless.graph import to_ui
from vidgen.headless.render import shipped
from vidgen.vidgen_core import media
from vidgen.vidgen_core.memory.host import bundled_models

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("VIDGEN_SCREENSHOTS")
"""a folder for a picture of each page"""
START_S, RUN_S = 120, 240
"""generous: other work may share the machine"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed (apt install chromium)")

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
        assert server.wait(30) == 0


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


def test_the_first_start_shows_our_workflows_and_asks_nobody_else(visit: Visit) -> None:
    visit.open()
    visit.page.get_by_text("hunyuan_t2v").first.wait_for(timeout=START_S * 1000)
    visit.picture("templates")
    assert visit.errors == []
    assert visit.outside == []


def small(visit: Visit) -> None:
    """A render of the bundled model that takes seconds."""
    visit.set("VidGenSampler", steps=3)
    visit.set("VidGenEmptyLatent", num_frames=5)


def test_a_sentence_becomes_a_video_and_the_video_its_workflow(visit: Visit, browser: Any, address: str) -> None:
    visit.open_template()
    text = visit.page.locator("textarea").first
    text.fill("a green circle moves to the left")
    small(visit)
    kinds = ("VidGenSampler", "VidGenEmptyLatent", "VidGenEncodePrompt", "VidGenSaveVideo")
    wanted = {kind: visit.widgets(kind) for kind in kinds}
    visit.run()
    visit.wait_for("execution_success")
    heard = [kind for _, kind, _ in visit.heard]
    assert heard.count("progress") >= 3
    assert "binary" in heard
    player = visit.page.locator("video").first
    player.wait_for(timeout=30_000)
    visit.page.wait_for_function("document.querySelector('video').readyState >= 2", timeout=30_000)
    visit.picture("run")
    assert visit.errors == []
    assert visit.outside == []
    shown = next(data for _, kind, data in visit.heard if kind == "executed" and data["output"].get("animated"))
    query = "&".join(f"{name}={value}" for name, value in shown["output"]["images"][0].items())
    video = visit.context.request.get(f"{address}/api/view?{query}").body()

    again = Visit(browser, address)
    again.open_template("hunyuan_v2v")  # another graph, to be replaced
    again.drop("made.mp4", video, "video/mp4")
    again.page.wait_for_function("window.app.graph._nodes.some((one) => one.type === 'VidGenEmptyLatent')")
    assert {kind: again.widgets(kind) for kind in kinds} == wanted
    again.context.close()


def test_cancel_stops_a_render_within_a_second(visit: Visit) -> None:
    visit.open_template()
    visit.set("VidGenSampler", steps=200, seed=5)
    visit.run()
    visit.wait_for("progress")
    pressed = time.monotonic()
    visit.page.evaluate("window.app.api.interrupt()")
    visit.wait_for("execution_interrupted", 30)
    stopped = next(when for when, kind, _ in visit.heard if kind == "execution_interrupted")
    assert stopped - pressed < 1


def test_an_error_says_what_to_do(visit: Visit) -> None:
    visit.open_template()
    visit.set("VidGenEmptyLatent", num_frames=6)
    visit.run()
    visit.wait_for("execution_error")
    visit.page.get_by_text("What to do: use 5 frames").first.wait_for(timeout=10_000)
    visit.picture("error")
    assert visit.page.get_by_text("The number of frames cannot be used").first.is_visible()


def test_a_workflow_of_an_older_version_restores_by_name(visit: Visit) -> None:
    visit.open_template()
    now = visit.widgets("VidGenSampler")
    flow = visit.page.evaluate("window.app.graph.serialize()")
    sampler = next(one for one in flow["nodes"] if one["type"] == "VidGenSampler")
    names = list(now)
    sampler["widgets_values"] = [99 if name == "seed" else now[name] for name in names[:3]]
    sampler.pop("widgets_values_named", None)
    visit.drop("old.json", json.dumps(flow).encode(), "application/json")
    visit.page.wait_for_function(
        "window.app.graph._nodes.find((one) => one.type === 'VidGenSampler').widgets.some((one) => one.value === 99)"
    )
    assert visit.widgets("VidGenSampler") == now | {"seed": 99}


@pytest.mark.parametrize("kind", ["api", "ui"])
def test_a_dropped_json_opens(visit: Visit, kind: str) -> None:
    folder = Path(vidgen.__file__).resolve().parent / "workflows"
    path = folder / "hunyuan_v2v.json" if kind == "ui" else folder / "api" / "hunyuan_v2v.json"
    visit.open_template()
    visit.drop(path.name, path.read_bytes(), "application/json")
    visit.page.wait_for_function("window.app.graph._nodes.some((one) => one.type === 'VidGenLoadVideo')")
    assert visit.widgets("VidGenLoadAll")["model_folder"] in bundled_models()


DROPPED = {
    "mp4": "video/mp4",  # with sound
    "webm": "video/webm",
    "av1.webm": "video/webm",
    "prores.mov": "video/quicktime",
    "webp": "image/webp",
    "png": "image/png",
}


@pytest.mark.parametrize("kind", DROPPED)
def test_a_dropped_file_of_every_kind_opens(visit: Visit, tmp_path: Path, kind: str) -> None:
    """With the braces of a prompt in it, which a webm does not take as they are."""
    prompt = shipped("hunyuan_exact_decode")
    prompt["2"]["inputs"]["prompt"] = "a } { { red circle"
    tags = {"prompt": prompt, "workflow": to_ui(prompt, vidgen.NODE_CLASS_MAPPINGS)}
    about = {"fps": 8, "metadata": {key: json.dumps(value) for key, value in tags.items()}}
    frames = np.zeros((3, 64, 64, 3), np.uint8)
    codec, _, ending = kind.rpartition(".")
    if ending == "png":
        path = media.write_series(tmp_path / "a", frames, **about)[1]
    else:
        sound = media.Sound(torch.zeros(1, 8000), 8000) if ending == "mp4" else None
        path = media.write_video(tmp_path / f"a.{ending}", frames, codec=codec or "auto", sound=sound, **about)
    visit.open_template()
    visit.drop(path.name, path.read_bytes(), DROPPED[kind])
    visit.page.wait_for_function("window.app.graph._nodes.some((one) => one.type === 'VidGenDecodeSave')")
    assert visit.widgets("VidGenEncodePrompt")["prompt"] == "a } { { red circle"
    assert visit.widgets("VidGenDecodeSave")["filename_prefix"] == "video/VidGen_exact"
    assert visit.errors == []
