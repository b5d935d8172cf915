"""What the pack adds to the page, in both renderers: the plan badge, the moving preview and the player; drops."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import vidgen
from vidgen.vidgen_core.media import write_video

sys.path.insert(0, str(Path(__file__).parent))
from browser import RUN_S, Visit, address, browser, needs_browser, small, visit

pytestmark = needs_browser

WAIT_MS = 1000 * RUN_S
"""for a plan; the machine may be busy"""


def badge(visit: Visit, words: str) -> str:
    """The first text of a plan that has these words in it."""
    found = visit.page.locator(".vidgen-plan > div").filter(has_text=words).first
    found.wait_for(timeout=WAIT_MS)
    return str(found.inner_text())


def frame_shown(visit: Visit) -> int:
    """Counted from 0, as the first video's own time says."""
    return int(visit.page.evaluate("document.querySelector('.vidgen-player video').currentTime") * 8 + 0.01)


@pytest.mark.parametrize("renderer", ["classic", "vue"])
def test_plan_preview_and_player(visit: Visit, renderer: str) -> None:
    visit.open()
    visit.settings(Comfy_VueNodes_Enabled=renderer == "vue", Comfy_ColorPalette="dark")
    visit.open_template()
    small(visit)
    page = visit.page

    # the badge, on three nodes, and after a change
    badge(visit, "5 frames · 64 × 64 px · 3 steps")
    assert page.locator(".vidgen-plan > div.fits").count() == 3
    visit.set("VidGenEmptyLatent", num_frames=9)
    badge(visit, "9 frames · 64 × 64 px · 3 steps")
    visit.picture(f"badge_{renderer}")
    visit.set("VidGenEmptyLatent", num_frames=1025, width=8192, height=8192)
    assert "Does not fit" in badge(visit, "1025 frames")
    assert page.locator(".vidgen-plan > div.wrong").count() == 1
    colour = page.locator(".vidgen-plan > div.wrong").first.evaluate("(one) => getComputedStyle(one).backgroundColor")
    red, green, blue = (int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))
    assert red > 2 * max(green, blue)
    visit.picture(f"badge_red_{renderer}")
    visit.set("VidGenEmptyLatent", num_frames=9, width=64, height=64)
    badge(visit, "9 frames")

    # the preview moves: the page is shown single frames, one after the other, not the sheet that the server sends
    page.evaluate(
        """() => {
            window.sizes = [];
            window.widths = [];
            window.app.api.addEventListener("b_preview_with_metadata", async ({detail}) => {
                window.sizes.push(detail.blob.size);
                window.widths.push((await createImageBitmap(detail.blob)).width);
            });
        }"""
    )
    visit.set("VidGenSampler", steps=60, seed=len(renderer))  # not made before, and long enough to look at
    visit.run()
    visit.wait_for("binary")
    page.wait_for_function("new Set(window.sizes).size > 2", timeout=1000 * RUN_S)
    visit.picture(f"preview_{renderer}")
    visit.wait_for("execution_success")
    assert set(page.evaluate("window.widths")) == {256}

    # the player, by keyboard
    page.wait_for_function("document.querySelector('video')?.readyState >= 2", timeout=WAIT_MS)
    press_player(visit)
    page.locator(".vidgen-player[open] .at").filter(has_text="of 9").wait_for(timeout=WAIT_MS)
    page.wait_for_function("document.querySelector('.vidgen-player video').currentTime > 0", timeout=WAIT_MS)
    page.keyboard.press("Home")
    page.locator(".vidgen-player .at").filter(has_text="frame 1 of 9").wait_for(timeout=WAIT_MS)
    for key, frame in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("Shift+ArrowRight", 8),
        ("Home", 0),
        ("End", 8),
    ):
        page.keyboard.press(key)
        page.locator(".vidgen-player .at").filter(has_text=f"frame {frame + 1} of 9 ").wait_for(timeout=WAIT_MS)
        page.wait_for_function("!document.querySelector('.vidgen-player video').seeking", timeout=WAIT_MS)
        assert frame_shown(visit) == frame
    assert "8 fps" in page.locator(".vidgen-player .at").inner_text()
    loop = page.get_by_label("Loop", exact=True)
    assert loop.get_attribute("aria-pressed") == "true"
    page.keyboard.press("l")
    assert loop.get_attribute("aria-pressed") == "false"
    nodes = page.evaluate("window.app.graph._nodes.length")
    page.keyboard.press("Delete")  # it is the dialog's, not the graph's
    assert page.evaluate("window.app.graph._nodes.length") == nodes
    visit.picture(f"player_{renderer}")
    page.keyboard.press("Escape")
    assert page.locator(".vidgen-player[open]").count() == 0
    assert visit.errors == []
    assert visit.outside == []


def press_player(visit: Visit) -> None:
    """The button on the node that saved the video."""
    visit.page.wait_for_function(
        "window.app.graph._nodes.some((one) => one.widgets?.some((two) => two.name === '$$vidgen_player'))",
        timeout=WAIT_MS,
    )
    shown = visit.page.get_by_role("button", name="Open in player")
    if shown.count():  # Nodes 2.0
        shown.first.click()
        return
    visit.page.evaluate(
        """() => {
            const all = window.app.graph._nodes.flatMap((one) => one.widgets ?? []);
            all.find((one) => one.name === "$$vidgen_player").callback();
        }"""
    )


def test_two_renders_beside_each_other(visit: Visit) -> None:
    visit.open_template()
    small(visit)
    for made in (1, 2):
        visit.set("VidGenSampler", seed=made)
        visit.run()
        while sum(kind == "execution_success" for _, kind, _ in visit.heard) < made:
            visit.page.wait_for_timeout(100)
    press_player(visit)
    page = visit.page
    choice = page.get_by_label("Compare with")
    page.wait_for_function("document.querySelector('.vidgen-player select').options.length > 1", timeout=WAIT_MS)
    choice.select_option(index=1)
    page.wait_for_function("document.querySelectorAll('.vidgen-player video')[1].readyState >= 2", timeout=WAIT_MS)
    names = page.locator(".vidgen-player .tag").all_inner_texts()
    assert len(set(names)) == 2
    page.get_by_label("Frame", exact=True).focus()
    page.keyboard.press("End")
    page.wait_for_function("!document.querySelector('.vidgen-player video').seeking", timeout=WAIT_MS)
    times = "[...document.querySelectorAll('.vidgen-player video')].map((one) => one.currentTime)"
    page.wait_for_function(f"(([a, b]) => Math.abs(a - b) < 0.06)({times})", timeout=WAIT_MS)
    for key, share in (("[", 45), ("]", 50), ("]", 55)):
        page.keyboard.press(key)
        clip = page.locator(".vidgen-player video").nth(1).evaluate("(one) => one.style.clipPath")
        assert clip.endswith(f"{share}%)")
    box = page.locator(".vidgen-player .stage").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, middle)
    page.mouse.up()
    assert page.get_by_label("Wipe").input_value() == "25"
    visit.picture("player_wipe")
    assert visit.errors == []
    assert visit.outside == []


def carrying(kind: str, folder: Path) -> bytes:
    """A picture or a video with the workflow of text to video in it, as our nodes and ComfyUI's write them."""
    root = Path(vidgen.__file__).resolve().parent / "workflows"
    flow = (root / "hunyuan_t2v.json").read_text("utf-8")
    prompt = (root / "api" / "hunyuan_t2v.json").read_text("utf-8")
    if kind == "png":
        notes, file = PngImagePlugin.PngInfo(), io.BytesIO()
        notes.add_text("workflow", json.dumps(json.loads(flow)))
        notes.add_text("prompt", json.dumps(json.loads(prompt)))
        Image.new("RGB", (32, 32), "navy").save(file, "PNG", pnginfo=notes)
        return file.getvalue()
    path = folder / "made.webm"
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    write_video(path, frames, fps=8, metadata={"workflow": flow, "prompt": prompt})
    return path.read_bytes()


@pytest.mark.parametrize(("kind", "mime"), [("png", "image/png"), ("webm", "video/webm")])
def test_a_dropped_picture_or_webm_opens_its_workflow(visit: Visit, kind: str, mime: str, tmp_path: Path) -> None:
    visit.open_template()
    visit.set("VidGenEncodePrompt", prompt="something else")
    visit.set("VidGenEmptyLatent", num_frames=5, width=32)
    visit.drop(f"made.{kind}", carrying(kind, tmp_path), mime)
    visit.page.wait_for_function(
        """() => window.app.graph._nodes.find((one) => one.type === "VidGenEncodePrompt")?.widgets.some(
            (one) => one.value === "a red heart bounces on a blue background")"""
    )
    assert visit.widgets("VidGenEmptyLatent") == {"width": 64, "height": 64, "num_frames": 17, "batch_size": 1}
    assert visit.errors == []
    assert visit.outside == []


def test_a_value_out_of_range_says_so_before_and_after_run(visit: Visit) -> None:
    visit.open_template()
    visit.set("VidGenEmptyLatent", width=9000)
    shown = badge(visit, "width: the value is above the maximum of 8192")
    assert "VidGenEmptyLatent" in shown
    with visit.page.expect_response("**/api/prompt") as answer:
        visit.run()
    assert answer.value.status == 400
    found = answer.value.json()["node_errors"]["4"]["errors"][0]
    assert found["message"] == "the value is above the maximum of 8192"
    visit.page.wait_for_timeout(1000)
    visit.picture("out_of_range")
    assert not any(kind == "execution_start" for _, kind, _ in visit.heard)
    assert visit.outside == []
