"""The timeline of Keyframes to Video in the real frontend, drawn on the canvas and by Vue ("Nodes 2.0")."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import START_S, Visit, address, browser, needs_browser

pytestmark = needs_browser

RENDERERS = {"classic": False, "vue": True}
WAIT_MS = 20_000
"""for what happens at once: other work may share the machine"""
FIRST, LAST = 0, 1
"""the places of the shipped workflow's pictures on the timeline"""


class Timeline:
    """The timeline on a page with the shipped workflow of keyframes."""

    def __init__(self, visit: Visit) -> None:
        self.visit, self.page = visit, visit.page
        self.root = visit.page.locator(".vidgen-timeline")
        self.keys = self.root.get_by_role("slider").filter(has=visit.page.locator(".card"))

    def open(self, *, vue: bool, **settings: Any) -> None:
        self.visit.open_template("hunyuan_keyframes")
        self.page.wait_for_function("app.graph._nodes.some((one) => one.type === 'VidGenKeyframe')")
        for name, value in {"Comfy.VueNodes.Enabled": vue, **settings}.items():
            self.page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
        self.centre()
        self.keys.nth(LAST).wait_for(timeout=START_S * 1000)

    def open_dropped(self, workflow: Any) -> None:
        """A workflow dropped onto a page with another one."""
        has = "app.graph._nodes.some((one) => one.type === '{}')"
        self.visit.open_template()
        self.page.wait_for_function(has.format("VidGenEmptyLatent"))  # the page first shows what was there last
        self.visit.drop("saved.json", json.dumps(workflow).encode(), "application/json")
        self.page.wait_for_function(has.format("VidGenKeyframe"))
        self.centre()

    def centre(self) -> None:
        """The node in the middle of the page, at its true size."""
        self.page.evaluate(
            """() => {
                const node = app.graph._nodes.find((one) => one.type === "VidGenKeyframesToVideo");
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [800 - node.pos[0] - node.size[0] / 2, 480 - node.pos[1] - node.size[1] / 2];
                app.canvas.setDirty(true, true);
            }"""
        )

    def paint(self, palette: str) -> None:
        """In the colours of the frontend, whatever they are."""
        colour = "getComputedStyle(document.querySelector('.vidgen-timeline')).color"
        before = self.page.evaluate(colour)
        self.page.evaluate("(name) => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
        self.page.wait_for_function(f"(before) => {colour} !== before", arg=before)

    def queued(self) -> list[dict[str, Any]]:
        """Frame, strength and until of the keyframes in the prompt that Run would queue, in their row."""
        prompt = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        keys = {name: one["inputs"] for name, one in prompt.items() if one["class_type"] == "VidGenKeyframe"}
        (host,) = (one["inputs"] for one in prompt.values() if one["class_type"] == "VidGenKeyframesToVideo")
        assert "timeline" not in host
        row, link = [], host.get("keyframes")
        while link:
            row.insert(0, {name: keys[link[0]][name] for name in ("frame", "strength", "until")})
            link = keys[link[0]].get("keyframes")
        return row

    def frames(self) -> list[int]:
        return [one["frame"] for one in self.queued()]

    def x_of(self, frame: int) -> float:
        """Where a frame of the 17 is on the page."""
        track = self.root.locator(".track").bounding_box()
        assert track is not None
        return track["x"] + track["width"] * frame / 16

    def centre_of(self, number: int) -> tuple[float, float]:
        box = self.keys.nth(number).bounding_box()
        assert box is not None
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def drag(self, number: int, frame: int, *, off_px: float = 0.0) -> None:
        x, y = self.centre_of(number)
        self.page.mouse.move(x + 5, y)
        self.page.mouse.down()
        self.page.mouse.move((x + self.x_of(frame)) / 2, y + 30, steps=3)
        self.page.mouse.move(self.x_of(frame) + 5 + off_px, y, steps=3)
        self.page.mouse.up()

    def says(self, number: int, name: str) -> str | None:
        return self.keys.nth(number).get_attribute(name)

    def wait_for(self, number: int, frame: int) -> None:
        where = f"document.querySelectorAll('.vidgen-timeline .key')[{number}]"
        self.page.wait_for_function(f"{where}?.getAttribute('aria-valuenow') === '{frame}'")

    def focused(self) -> str | None:
        return self.page.evaluate("document.activeElement.getAttribute('aria-label')")


@pytest.fixture(scope="module", params=RENDERERS)
def visited(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[tuple[Timeline, bool]]:
    """One page for a renderer: opening it is what takes long."""
    visit = Visit(browser, address)
    yield Timeline(visit), RENDERERS[request.param]
    visit.context.close()


@pytest.fixture
def timeline(visited: tuple[Timeline, bool]) -> Timeline:
    one, vue = visited
    one.visit.errors.clear()
    one.open(vue=vue)
    return one


def test_mouse_and_keyboard_change_the_queued_prompt(timeline: Timeline, request: pytest.FixtureRequest) -> None:
    page, keys = timeline.page, timeline.keys
    nodes = page.evaluate("app.graph._nodes.length")
    positions = "app.graph._nodes.map((one) => [...one.pos])"
    stood = page.evaluate(positions)
    assert timeline.frames() == [0, -1]
    assert keys.count() == 2
    page.wait_for_function(
        "[...document.querySelectorAll('.vidgen-timeline .card img')].every((one) => one.naturalWidth === 64)"
    )

    # by mouse: to the nearest place of the VAE, never onto another picture
    timeline.drag(FIRST, 8, off_px=6)
    assert timeline.frames() == [8, -1]
    timeline.drag(LAST, 8)
    assert timeline.frames() == [8, 12]
    timeline.drag(LAST, 16, off_px=200)
    assert timeline.frames() == [8, -1]
    assert page.evaluate(positions) == stood  # neither a node nor the canvas moved
    assert timeline.x_of(8) == pytest.approx(timeline.centre_of(FIRST)[0], abs=1.5)

    # each move is a step of undo, and the timeline follows
    page.keyboard.press("Control+z")
    timeline.wait_for(LAST, 12)
    assert timeline.frames() == [8, 12]
    page.keyboard.press("Control+y")
    timeline.wait_for(LAST, 16)
    assert timeline.frames() == [8, -1]

    # by keyboard: Tab goes from key to key, arrows move one step past what is there
    keys.nth(FIRST).focus()
    page.keyboard.press("Tab")
    assert timeline.focused() == "Keyframe 2: Last Picture"
    page.keyboard.press("ArrowLeft")
    assert timeline.frames() == [8, 12]
    page.keyboard.press("ArrowLeft")
    assert timeline.frames() == [8, 4]
    page.keyboard.press("Shift+ArrowRight")
    assert timeline.frames() == [8, -1]  # as far as there is room
    page.keyboard.press("Home")
    assert timeline.frames() == [8, 0]
    page.keyboard.press("End")
    page.keyboard.press("Shift+Tab")
    assert timeline.focused() == "Keyframe 1: First Picture"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert timeline.frames() == [4, -1]
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    assert timeline.queued()[FIRST] == {"frame": 4, "strength": 0.8, "until": 0}
    assert timeline.says(FIRST, "aria-valuenow") == "4"
    assert timeline.says(FIRST, "aria-valuetext") == "frame 4, strength 0.8, release 0"

    # the settings below, by keyboard too
    release = timeline.root.get_by_label("Release").last
    release.focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    number = timeline.root.get_by_role("spinbutton")
    number.fill("11")
    number.press("Enter")
    assert timeline.queued() == [{"frame": 12, "strength": 0.8, "until": 0.3}, {"frame": -1, "strength": 1, "until": 0}]
    renderer = request.node.callspec.params["visited"]
    timeline.visit.picture(f"timeline-{renderer}")
    timeline.paint("light")
    timeline.visit.picture(f"timeline-{renderer}-light")
    timeline.paint("dark")

    # Delete resets, and neither a node nor a wire is gone
    keys.nth(FIRST).focus()
    page.keyboard.press("Delete")
    page.keyboard.press("Delete")
    assert timeline.queued()[FIRST] == {"frame": 0, "strength": 1, "until": 0}
    assert timeline.frames() == [0, -1]
    assert page.evaluate("app.graph._nodes.length") == nodes
    assert timeline.visit.errors == []
    assert timeline.visit.outside == []


def test_it_shows_what_the_graph_says(timeline: Timeline) -> None:
    page, visit = timeline.page, timeline.visit
    visit.set("VidGenKeyframe", frame=8, strength=0.5)
    timeline.wait_for(FIRST, 8)
    # a longer video: -1 is still the last frame
    visit.set("VidGenKeyframesToVideo", num_frames=33)
    timeline.wait_for(LAST, 32)
    # what the run would refuse is marked, and said
    visit.set("VidGenKeyframe", frame=40)
    page.get_by_text("frame 40 is outside of the video").wait_for(timeout=WAIT_MS)
    assert timeline.says(FIRST, "aria-invalid") == "true"
    visit.set("VidGenKeyframe", frame=31)
    page.get_by_text("another picture is at this place").wait_for(timeout=WAIT_MS)
    # a bypassed key is not there, and without any there is a word on what to do
    page.evaluate("app.graph._nodes.filter((one) => one.type === 'VidGenKeyframe')[0].mode = 4")
    page.wait_for_function("document.querySelectorAll('.vidgen-timeline .key').length === 1")
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find((one) => one.type === "VidGenKeyframesToVideo");
            node.disconnectInput(node.inputs.findIndex((one) => one.name === "keyframes"));
        }"""
    )
    page.get_by_text("Connect a Keyframe node").wait_for(timeout=WAIT_MS)
    assert visit.errors == []


def test_a_saved_workflow_keeps_the_positions(timeline: Timeline) -> None:
    page = timeline.page
    timeline.drag(FIRST, 4)
    timeline.keys.nth(LAST).focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    wanted = [{"frame": 4, "strength": 1, "until": 0}, {"frame": 12, "strength": 0.95, "until": 0}]
    assert timeline.queued() == wanted
    saved = page.evaluate("app.graph.serialize()")
    host = next(one for one in saved["nodes"] if one["type"] == "VidGenKeyframesToVideo")
    assert len(host["widgets_values"]) == 8  # the timeline has no value of its own
    timeline.open_dropped(saved)
    timeline.keys.nth(LAST).wait_for(timeout=WAIT_MS)
    assert timeline.queued() == wanted
    assert [timeline.says(number, "aria-valuenow") for number in (FIRST, LAST)] == ["4", "12"]
    # a file without the names, as an older version wrote it
    for node in saved["nodes"]:
        node.pop("widgets_values_named", None)
        if node["type"] == "VidGenKeyframe":
            node["widgets_values"] = node["widgets_values"][:1]
    timeline.open_dropped(saved)
    assert timeline.queued() == [one | {"strength": 1} for one in wanted]
