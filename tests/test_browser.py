"""The real frontend in a real browser on our server: what a user sees and does."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vidgen
from vidgen.vidgen_core.memory.host import bundled_models

sys.path.insert(0, str(Path(__file__).parent))
from browser import START_S, Visit, address, browser, needs_browser, small, visit

pytestmark = needs_browser


def test_the_first_start_shows_our_workflows_and_asks_nobody_else(visit: Visit) -> None:
    visit.open()
    visit.page.get_by_text("hunyuan_t2v").first.wait_for(timeout=START_S * 1000)
    visit.picture("templates")
    assert visit.errors == []
    assert visit.outside == []


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
