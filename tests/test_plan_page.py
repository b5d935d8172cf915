"""``POST /vidgen/plan``: what a page is told of a workflow while its widgets change, through both servers."""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from vidgen.headless import plan as plans
from vidgen.headless.plan import MAX_NODES, MAX_SAMPLERS, MAX_WAITING, Plans, answer, around, plan_dict
from vidgen.headless.render import shipped
from vidgen.headless.server.app import MAX_JSON_BYTES, ServerSettings
from vidgen.headless.server.start import new_server
from vidgen.nodes import host as hosts
from vidgen.vidgen_core import planning
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.memory.cancel import check_cancelled


@pytest.fixture
def flow() -> dict[str, Any]:
    """Node 1 loads, 4 says the size, 5 samples, 6 decodes."""
    prompt = shipped("hunyuan_t2v")
    prompt["1"]["inputs"]["model_folder"] = "random-tiny"
    prompt["4"]["inputs"] |= {"width": 32, "height": 32, "num_frames": 9}
    return prompt


@pytest.fixture
def host(tiny_bundle_dir: Path) -> hosts.LocalNodeHost:
    return hosts.LocalNodeHost(folders=[tiny_bundle_dir.parent], run_on="cpu")


@pytest.fixture
def ask(host: hosts.LocalNodeHost) -> Callable[[Any], dict[str, Any]]:
    def told(body: Any) -> dict[str, Any]:
        with hosts.using(host):
            return answer(body)

    return told


def asked_over_http(app: web.Application, address: str, **request: Any) -> tuple[int, dict[str, Any]]:
    async def conversation() -> tuple[int, dict[str, Any]]:
        async with TestClient(TestServer(app, host="127.0.0.1")) as client:
            response = await client.post(address, **request)
            return response.status, await response.json()

    return asyncio.run(conversation())


def ours(tmp_path: Path, tiny_bundle_dir: Path) -> web.Application:
    models = (tiny_bundle_dir.parent,)
    return new_server(ServerSettings(folder=tmp_path, has_page=False, device="cpu", models=models)).application()


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_plan_is_the_one_of_the_command(
    ask: Callable[[Any], Any], flow: dict[str, Any], tiny_bundle_dir: Path
) -> None:
    (plan,) = ask({"prompt": flow})["plans"]
    same = plan_dict(flow, device="cpu", folders=[tiny_bundle_dir.parent])
    assert plan["badges"] == {"1": "all", "5": "sample", "6": "decode"}
    assert plan["fits"]
    # What a module makes once and keeps, such as tables of positions, is counted by the first of the two only.
    assert plan["seconds"] == pytest.approx(same["seconds"], abs=0.005)
    assert plan["subject"] == same["subject"] | {"frames": 9, "width": 32, "height": 32}
    assert [stage["name"] for stage in plan["stages"]] == ["encode prompt", "sample", "decode", "write"]
    # Both begin with what this process takes at the time.
    more = plan["peak_bytes"] - plan["baseline_bytes"]
    assert more == pytest.approx(same["peak_bytes"] - same["baseline_bytes"], rel=0.02)


def test_it_follows_the_widgets(ask: Callable[[Any], Any], flow: dict[str, Any]) -> None:
    before = ask({"prompt": flow})["plans"][0]
    flow["4"]["inputs"]["num_frames"] = "17"  # ComfyUI takes texts that are numbers
    flow["5"]["inputs"]["steps"] = 8
    after = ask({"prompt": flow})["plans"][0]
    assert after["subject"]["frames"] == 17
    assert after["subject"]["steps"] == 8
    assert after["peak_bytes"] > before["peak_bytes"]
    assert after["seconds"] > before["seconds"]


def test_what_does_not_fit_is_told_with_what_does(
    ask: Callable[[Any], Any], flow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "room_on", lambda device: 0)
    monkeypatch.setattr(planning, "memory_in_use", lambda device: 300_000_000)
    sizes = [{"frames": 5, "width": 2048, "height": 2048}]
    monkeypatch.setattr(plans, "nearest_sizes", lambda plan, planner, asked: sizes)
    flow["4"]["inputs"] |= {"width": 2048, "height": 2048, "num_frames": 33}
    (plan,) = ask({"prompt": flow})["plans"]
    assert not plan["fits"]
    assert plan["peak_bytes"] > 12 * 33 * 2048**2 > plan["budget_bytes"] == 300_000_000
    assert plan["nearest"] == []  # it takes long, and was not asked for
    assert ask({"prompt": flow, "nearest": True})["plans"][0]["nearest"] == sizes


def test_the_next_question_ends_the_search_for_sizes(
    host: hosts.LocalNodeHost, flow: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, searching = Plans(), threading.Event()

    def search(plan: Any, planner: Any, asked: Any) -> list[Any]:
        searching.set()
        while True:
            check_cancelled()
            time.sleep(0.01)

    monkeypatch.setattr(plans, "nearest_sizes", search)
    told: list[Any] = []

    def ask_thoroughly() -> None:
        with hosts.using(host):
            told.append(desk.answer({"prompt": flow, "nearest": True}))

    thread = threading.Thread(target=ask_thoroughly)
    thread.start()
    assert searching.wait(120)
    with hosts.using(host):
        assert desk.answer({"prompt": flow})["plans"][0]["fits"]
    thread.join(120)
    assert told[0]["plans"][0]["nearest"] == []
    monkeypatch.setattr(plans, "SEARCH_S", 0.1)
    with hosts.using(host):
        assert desk.answer({"prompt": flow, "nearest": True})["plans"][0]["nearest"] == []


def test_a_value_that_a_widget_would_not_take_is_told_instead(ask: Callable[[Any], Any], flow: dict[str, Any]) -> None:
    flow["4"]["inputs"]["width"] = 10**6
    (plan,) = ask({"prompt": flow})["plans"]
    assert set(plan) == {"badges", "problem"}
    assert "width" in plan["problem"]["what"]
    assert "maximum of 8192" in plan["problem"]["what"]
    assert plan["problem"]["given"] == str(10**6)


@pytest.mark.parametrize(
    ("node_id", "name", "value", "words"),
    [
        ("1", "model_folder", "../../no-such-folder", "no such model"),
        ("1", "model_folder", 5, "cannot be read"),
        ("1", "model_folder", {"a": 1}, "cannot be read"),
        ("1", "model_folder", ["2", 0], "not known which model_folder"),
        ("1", "model_folder", None, "not known which model_folder"),
        ("5", "sampler", "best", "not one of"),
        ("5", "denoise", {"a": 1}, "cannot be read"),
        ("4", "num_frames", [1, 2, 3], "cannot be read"),
        ("5", "steps", "nan", "cannot be read"),
    ],
)
def test_a_workflow_that_cannot_run_is_no_error_of_the_page(
    ask: Callable[[Any], Any], flow: dict[str, Any], node_id: str, name: str, value: Any, words: str
) -> None:
    flow[node_id]["inputs"][name] = value
    (plan,) = ask({"prompt": flow})["plans"]
    assert words in plan["problem"]["what"]


def test_widgets_that_come_through_links_are_left_to_the_checkpoint(
    ask: Callable[[Any], Any], flow: dict[str, Any]
) -> None:
    for node_id, name in (("5", "steps"), ("5", "cfg"), ("5", "denoise"), ("4", "width"), ("2", "prompt")):
        flow[node_id]["inputs"][name] = ["99", 0]
    (plan,) = ask({"prompt": flow})["plans"]
    assert plan["subject"]["steps"] == 3
    assert plan["subject"]["width"] == 32


def test_a_graph_that_is_being_built_is_no_error(ask: Callable[[Any], Any], flow: dict[str, Any]) -> None:
    assert ask({"prompt": {}}) == {"plans": []}
    assert ask({"prompt": {"1": flow["1"]}}) == {"plans": []}
    for missing in ("1", "4", "5", "6"):
        rest = {node_id: node for node_id, node in flow.items() if node_id != missing}
        told = ask({"prompt": rest})["plans"]
        assert len(told) == (0 if missing == "5" else 1)
        assert ("problem" in told[0] if missing == "1" else "fits" in told[0]) if told else True
    bare = {"5": {"class_type": "VidGenSampler"}}
    assert "problem" in ask({"prompt": bare})["plans"][0]


def test_nodes_of_others_are_passed_over(ask: Callable[[Any], Any], flow: dict[str, Any]) -> None:
    (alone,) = ask({"prompt": flow})["plans"]
    flow["50"] = {"class_type": "SomebodysNode", "inputs": {"images": ["6", 0], "width": -1}}
    flow["51"] = {"class_type": None, "inputs": {}}
    (beside,) = ask({"prompt": flow})["plans"]
    for plan in (alone, beside):
        plan.pop("budget_bytes")  # what is free changes
    assert beside == alone
    assert ask({"prompt": {"50": flow["50"]}}) == {"plans": []}


def test_each_sampler_has_its_own_plan(ask: Callable[[Any], Any], flow: dict[str, Any]) -> None:
    """Two on one loader, of two sizes; and a third that refines what the first made."""
    for old, new in (("4", "14"), ("5", "15"), ("6", "16"), ("5", "25"), ("6", "26")):
        flow[new] = copy.deepcopy(flow[old])
    flow["14"]["inputs"]["num_frames"] = 17
    flow["15"]["inputs"]["latent"] = ["14", 0]
    flow["16"]["inputs"]["latent"] = ["15", 0]
    flow["25"]["inputs"] |= {"latent": ["5", 0], "steps": 7}
    flow["26"]["inputs"]["latent"] = ["25", 0]
    first, second, third = ask({"prompt": flow})["plans"]
    assert first["badges"] == {"1": "all", "5": "sample", "6": "decode"}
    assert second["badges"] == {"1": "all", "15": "sample", "16": "decode"}
    assert [plan["subject"]["frames"] for plan in (first, second, third)] == [9, 17, 9]
    assert third["subject"]["steps"] == 7
    assert {"25", "26"} <= third["badges"].keys()
    assert "6" not in third["badges"]


def test_a_sampler_is_planned_with_the_nearest_loader(flow: dict[str, Any]) -> None:
    other = copy.deepcopy(flow)
    both = {f"9{node_id}": node for node_id, node in flow.items()} | other
    assert "91" not in around(both, "5")
    assert next(iter(around(both, "5"))) == "5"


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        None, 3, "text", [], {}, {"prompt": None}, {"prompt": 3}, {"prompt": []}, {"prompt": {"1": 3}},
        {"prompt": {"1": []}}, {"prompt": {"1": {"class_type": 5}}}, {"prompt": {"1": {"inputs": []}}},
        {"prompt": {"nodes": [], "links": []}},
    ],
)  # fmt: skip
def test_a_request_that_cannot_be(ask: Callable[[Any], Any], body: Any) -> None:
    with pytest.raises(ValueError, match="workflow"):
        ask(body)


def test_too_much_is_refused(ask: Callable[[Any], Any], flow: dict[str, Any]) -> None:
    many = {str(number): {"class_type": "VidGenDecode", "inputs": {}} for number in range(MAX_NODES + 1)}
    with pytest.raises(SettingsError, match="too large"):
        ask({"prompt": many})
    samplers = {f"s{number}": flow["5"] for number in range(MAX_SAMPLERS + 1)}
    assert len(ask({"prompt": flow | samplers})["plans"]) == MAX_SAMPLERS
    busy = Plans()
    for _ in range(MAX_WAITING):
        busy._waiting.acquire()
    with pytest.raises(SettingsError, match="at once"):
        busy.answer({"prompt": flow})


# --- the doors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": 3}', 400),
        (b"\xff\xfe", 400),
        (b" " * (MAX_JSON_BYTES + 1), 413),
    ],
)
def test_our_server_refuses(tmp_path: Path, tiny_bundle_dir: Path, content: bytes, status: int) -> None:
    told = asked_over_http(ours(tmp_path, tiny_bundle_dir), "/api/vidgen/plan", data=content)
    assert told[0] == status
    assert told[1]["error"]["message"]


def test_our_server_and_comfyuis_tell_the_same(
    tmp_path: Path,
    tiny_bundle_dir: Path,
    flow: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    host: hosts.LocalNodeHost,
) -> None:
    status, here = asked_over_http(ours(tmp_path, tiny_bundle_dir), "/vidgen/plan", json={"prompt": flow})
    assert status == 200
    assert here["plans"][0]["fits"]

    server = ModuleType("server")
    routes = web.RouteTableDef()
    server.PromptServer = SimpleNamespace(instance=SimpleNamespace(routes=routes))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server", server)
    monkeypatch.setattr(hosts, "ComfyHost", lambda: host)
    monkeypatch.setitem(sys.modules, "comfy.model_management", ModuleType("comfy.model_management"))
    hosts.offer_plans(answer)

    def there(**request: Any) -> tuple[int, Any]:
        app = web.Application()
        app.add_routes(routes)
        return asked_over_http(app, "/vidgen/plan", **request)

    status, told = there(json={"prompt": flow})
    assert status == 200
    for plan in (*here["plans"], *told["plans"]):
        plan.pop("budget_bytes")  # what is free changes
    assert told == here
    for content in (b"{", b"[" * 100_000, b'{"prompt": 3}', b"\xff\xfe"):
        status, told = there(data=content)
        assert status == 400
        assert told["error"]["message"]


def test_without_comfyuis_server_nothing_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ModuleType("server")
    server.PromptServer = SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server", server)
    hosts.offer_plans(lambda body: {})


def test_planners_and_their_findings_are_kept(
    flow: dict[str, Any], host: hosts.LocalNodeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = planning.Planner

    class Counted(real):
        def __init__(self, *args: Any, **named: Any) -> None:
            made.append(self)
            super().__init__(*args, **named)

    monkeypatch.setattr(planning, "Planner", Counted)
    fresh = Plans()
    with hosts.using(host):
        for steps in (3, 4, 5):
            flow["5"]["inputs"]["steps"] = steps
            assert fresh.answer({"prompt": flow})["plans"][0]["fits"]
    assert len(made) == 1
