"""The embedded server over real HTTP and a real WebSocket: ComfyUI's protocol, and everything it must refuse."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

import vidgen
from vidgen.headless.render import shipped
from vidgen.headless.server.app import MAX_NODES, PACK, Server, ServerSettings
from vidgen.headless.server.places import Places
from vidgen.headless.server.start import new_server
from vidgen.nodes import host as hosts
from vidgen.nodes.host import EXAMPLES
from vidgen.vidgen_core.errors import FileError, UserError
from vidgen.vidgen_core.media import read_metadata, read_sound

UUID = "0b5b8a1e-6f0f-4c1c-9a55-0a5f6f5d8f11"


class Slow:
    """Counts up with progress, and can be stopped in between."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "run"
    OUTPUT_NODE = True
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"steps": ("INT", {"default": 3, "min": 0, "max": 1000}), "key": ("INT", {"default": 0})}}

    def run(self, steps: int, key: int) -> dict[str, Any]:
        import torch

        from vidgen.nodes.host import current

        host = current()
        for step in range(steps):
            host.check_cancelled()
            host.preview(lambda: torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
            host.progress("count", step + 1, steps)
            time.sleep(0.01)
        return {"ui": {"text": (str(steps),)}, "result": (steps,)}


class Wrong:
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"how": (["user", "bug"], {})}}

    def run(self, how: str) -> tuple[int]:
        if how == "user":
            raise UserError("It cannot be", given="5", expected="6", do="write 6")
        raise RuntimeError("broken")


def server_at(folder: Path, **settings: Any) -> Server:
    server = new_server(ServerSettings(folder=folder, has_page=False, **settings))
    server.classes = server.jobs.classes = {**server.classes, "Slow": Slow, "Wrong": Wrong}
    server.modules = {**server.modules, "Slow": "tests", "Wrong": "tests"}
    return server


@contextlib.asynccontextmanager
async def talking(server: Server, host: str = "127.0.0.1") -> AsyncIterator[TestClient[web.Request, web.Application]]:
    async with TestClient(TestServer(server.application(), host=host)) as client:
        yield client


Talk = Callable[[Callable[[TestClient[web.Request, web.Application], Server], Awaitable[None]]], None]


@pytest.fixture
def talk(tmp_path: Path) -> Talk:
    """Runs a conversation with a fresh server."""

    def run(conversation: Callable[[TestClient[web.Request, web.Application], Server], Awaitable[None]]) -> None:
        async def whole() -> None:
            server = server_at(tmp_path)
            async with talking(server) as client:
                await asyncio.wait_for(conversation(client, server), 60)

        asyncio.run(whole())

    return run


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


async def listen(socket: aiohttp.ClientWebSocketResponse, until: str) -> list[tuple[str, dict[str, Any]]]:
    """(type, data) up to the message ``until``, or ``executing`` with no node."""
    heard: list[tuple[str, dict[str, Any]]] = []
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            kind, length = struct.unpack(">II", message.data[:8])
            about = json.loads(message.data[8 : 8 + length])
            Image.open(io.BytesIO(message.data[8 + length :])).verify()
            heard.append((f"binary {kind}", about))
            continue
        said = json.loads(message.data)
        heard.append((said["type"], said["data"]))
        if said["type"] == until or (until == "end" and said["type"] == "executing" and said["data"]["node"] is None):
            break
    return heard


async def run_prompt(client: Any, prompt: Any, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    async with client.ws_connect("/ws?clientId=me") as socket:
        await listen(socket, "status")
        answer = await client.post("/api/prompt", json={"prompt": prompt, "client_id": "me", **more})
        assert answer.status == 200, await answer.text()
        return await listen(socket, "end")


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_is_told_in_comfyuis_order(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        prompt = {"1": node("Slow", steps=2, key=1), "2": node("Slow", steps=["1", 0], key=2)}
        heard = await run_prompt(client, prompt)
        assert [kind for kind, _ in heard if kind not in ("progress_state", "progress", "binary 4")] == [
            *("status", "execution_start", "execution_cached"),
            *("executing", "executed", "executing", "executed"),
            *("execution_success", "status", "executing"),
        ]
        first = [kind for kind, data in heard if data.get("node") == "1" or kind in ("binary 4", "progress_state")]
        assert first[:5] == ["progress_state", "executing", "progress_state", "binary 4", "progress"]
        states = [data["nodes"]["1"]["state"] for kind, data in heard if kind == "progress_state"]
        assert states[0] == "running"
        assert states[-1] == "finished"
        assert heard[-2][1] == {"status": {"exec_info": {"queue_remaining": 0}}}
        again = await run_prompt(client, prompt)
        assert next(data for kind, data in again if kind == "execution_cached")["nodes"] == ["1", "2"]
        assert [kind for kind, data in again if kind == "executing" and data["node"]] == []
        assert [data["node"] for kind, data in again if kind == "executed"] == ["1", "2"]

    talk(conversation)


def test_an_error_says_what_to_do_and_the_server_goes_on(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        heard = await run_prompt(client, {"1": node("Wrong", how="user"), "2": node("Slow", steps=["1", 0], key=0)})
        error = next(data for kind, data in heard if kind == "execution_error")
        assert (error["node_id"], error["node_type"], error["exception_type"]) == ("1", "Wrong", "UserError")
        assert error["vidgen"] == {"what": "It cannot be", "given": "5", "expected": "6", "do": "write 6"}
        heard = await run_prompt(client, {"1": node("Wrong", how="bug"), "2": node("Slow", steps=["1", 0], key=0)})
        error = next(data for kind, data in heard if kind == "execution_error")
        assert error["exception_message"] == "broken"
        assert "RuntimeError: broken" in error["traceback"][-1]
        history = await (await client.get("/api/history")).json()
        assert [one["status"]["status_str"] for one in history.values()] == ["error", "error"]
        jobs = await (await client.get("/api/jobs?status=failed")).json()
        assert jobs["jobs"][0]["execution_error"]["exception_message"] == "broken"
        assert (await run_prompt(client, {"2": node("Slow", steps=1, key=0)}))[-4][0] == "progress_state"

    talk(conversation)


def test_interrupt_stops_within_a_second(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        async with client.ws_connect("/ws?clientId=me") as socket:
            await client.post("/prompt", json={"prompt": {"1": node("Slow", steps=900, key=0)}, "client_id": "me"})
            await listen(socket, "progress")
            started = time.monotonic()
            await client.post("/interrupt", json={})
            heard = await listen(socket, "end")
            assert time.monotonic() - started < 1
            assert "execution_interrupted" in [kind for kind, _ in heard]
        jobs = (await (await client.get("/jobs")).json())["jobs"]
        assert [job["status"] for job in jobs] == ["cancelled"]

    talk(conversation)


def test_prompts_wait_in_their_order_and_can_be_taken_back(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        async def put(key: int, **more: Any) -> str:
            body = {"prompt": {"1": node("Slow", steps=100, key=key)}, **more}
            return (await (await client.post("/prompt", json=body)).json())["prompt_id"]

        running, later, gone = await put(0), await put(1), await put(2)
        first = await put(3, front=True)
        queue = await (await client.get("/queue")).json()
        assert [entry[1] for entry in queue["queue_running"]] == [running]
        assert [entry[1] for entry in queue["queue_pending"]] == [first, later, gone]
        await client.post("/queue", json={"delete": [gone]})
        await client.post(f"/jobs/{first}/cancel")
        pending = await (await client.get("/jobs?status=pending")).json()
        assert [job["id"] for job in pending["jobs"]] == [later]
        await client.post("/queue", json={"clear": True})
        await client.post("/interrupt")
        assert (await (await client.get("/prompt")).json())["exec_info"]["queue_remaining"] <= 1

    talk(conversation)


def test_only_the_asked_outputs_run_and_the_id_may_be_given(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        prompt = {"1": node("Slow", steps=1, key=1), "2": node("Slow", steps=1, key=2), "3": node("Slow")}
        more = {"prompt_id": UUID, "partial_execution_targets": ["2"]}
        heard = await run_prompt(client, prompt, **more)
        assert [data["node"] for kind, data in heard if kind == "executed"] == ["2"]
        assert {data["prompt_id"] for kind, data in heard if kind == "executed"} == {UUID}
        answer = await client.post("/prompt", json={"prompt": prompt, **more})
        assert answer.status == 409
        # One output lacks its inputs: the others run, and the answer says what is wrong.
        answer = await (await client.post("/prompt", json={"prompt": prompt})).json()
        assert list(answer["node_errors"]) == ["3"]

    talk(conversation)


def test_the_shipped_workflow_makes_a_video_over_http(
    tmp_path: Path, tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = shipped("hunyuan_t2v")
    for one in prompt.values():
        small = {"VidGenSampler": {"steps": 2}, "VidGenEmptyLatent": {"width": 32, "height": 32, "num_frames": 5}}
        one["inputs"] |= small.get(one["class_type"], {})
        if one["class_type"] == "VidGenLoadAll":
            one["inputs"]["model_folder"] = tiny_bundle_dir.name

    async def whole() -> None:
        server = server_at(tmp_path, models=(tiny_bundle_dir.parent,))
        async with talking(server) as client:
            extra = {"extra_pnginfo": {"workflow": {"id": "w", "nodes": []}}}
            heard = await asyncio.wait_for(run_prompt(client, prompt, extra_data=extra), 120)
            shown = next(data["output"] for kind, data in heard if kind == "executed" and "animated" in data["output"])
            assert any(kind == "binary 4" for kind, _ in heard)
            query = "&".join(f"{name}={value}" for name, value in shown["images"][0].items())
            answer = await client.get(f"/api/view?{query}")
            assert answer.status == 200
            assert answer.content_type == "video/mp4"
            (tmp_path / "got.mp4").write_bytes(await answer.read())
            part = await client.get(f"/api/view?{query}", headers={"Range": "bytes=0-9"})
            assert part.status == 206
            assert len(await part.read()) == 10
            jobs = await (await client.get("/api/jobs")).json()
            assert jobs["jobs"][0]["preview_output"]["mediaType"] == "video"
            one = await (await client.get(f"/api/jobs/{jobs['jobs'][0]['id']}")).json()
            assert one["workflow"]["prompt"] == prompt

    asyncio.run(whole())
    metadata = read_metadata(tmp_path / "got.mp4")
    assert json.loads(metadata["prompt"]) == prompt
    assert json.loads(metadata["workflow"]) == {"id": "w", "nodes": []}


# --- what the frontend reads at its start -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_everything_the_frontend_needs_is_there(talk: Talk, prefix: str) -> None:
    async def conversation(client: Any, server: Server) -> None:
        for path in ("features", "users", "system_stats", "settings", "extensions", "i18n", "queue", "history", "jobs"):
            answer = await client.get(f"{prefix}/{path}")
            assert answer.status == 200, path
        info = await (await client.get(f"{prefix}/object_info")).json()
        assert set(vidgen.NODE_CLASS_MAPPINGS) <= set(info)
        sampler = info["VidGenSampler"]
        assert sampler["python_module"] == f"custom_nodes.{PACK}"
        assert sampler["input_order"]["required"] == list(sampler["input"]["required"])
        assert "seed" in sampler["fallbackWidgetsValuesNames"]
        assert info["LoadImage"]["python_module"] == "nodes"
        assert "--disable-api-nodes" in (await (await client.get("/system_stats")).json())["system"]["argv"]
        templates = await (await client.get(f"{prefix}/workflow_templates")).json()
        assert "hunyuan_t2v" in templates[PACK]
        template = await client.get(f"{prefix}/workflow_templates/{PACK}/hunyuan_t2v.json")
        assert (await template.json())["nodes"]
        help_page = await client.get(f"/extensions/{PACK}/docs/VidGenSampler.md")
        assert help_page.status == 200
        assert "html" not in help_page.content_type

    talk(conversation)


def test_settings_and_files_of_the_user_are_kept(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        await client.post("/settings/Comfy.Locale", json="zh")
        await client.post("/settings", json={"Comfy.A": {"b": [1]}, "Comfy.TutorialCompleted": True})
        assert await (await client.get("/settings")).json() == {"Comfy.Locale": "zh", "Comfy.A": {"b": [1]}}
        name = "workflows%2Fmine.json"
        answer = await client.post(f"/userdata/{name}?overwrite=false&full_info=true", data=b'{"a":1}')
        assert (await answer.json())["path"] == "workflows/mine.json"
        assert (await client.post(f"/userdata/{name}?overwrite=false", data=b"{}")).status == 409
        assert await (await client.get(f"/userdata/{name}")).read() == b'{"a":1}'
        listed = await (await client.get("/userdata?dir=workflows&recurse=true&split=false&full_info=true")).json()
        assert [one["path"] for one in listed] == ["mine.json"]
        assert (await client.post(f"/userdata/{name}/move/workflows%2Fyours.json")).status == 200
        assert (await client.get(f"/userdata/{name}")).status == 404
        assert (await client.delete("/userdata/workflows%2Fyours.json")).status == 204

    talk(conversation)


def png(colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, "png")
    return out.getvalue()


async def upload(client: Any, content: bytes, name: str, **fields: str) -> Any:
    form = aiohttp.FormData()
    for key, value in fields.items():
        form.add_field(key, value)
    form.add_field("image", content, filename=name)
    return await client.post("/api/upload/image", data=form)


def test_an_upload_is_listed_used_and_kept_once(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        assert await (await upload(client, png(), "a.png")).json() == {
            "name": "a.png",
            "subfolder": "",
            "type": "input",
        }
        assert (await (await upload(client, png(), "a.png")).json())["name"] == "a.png"
        assert (await (await upload(client, png("blue"), "a.png")).json())["name"] == "a (1).png"
        assert (await (await upload(client, png("blue"), "a.png", overwrite="true")).json())["name"] == "a.png"
        assert (await (await upload(client, png(), "b.png", subfolder="deep")).json())["subfolder"] == "deep"
        info = (await (await client.get("/object_info/LoadImage")).json())["LoadImage"]
        names = info["input"]["required"]["image"][0]
        assert names[:3] == ["a (1).png", "a.png", "deep/b.png"]
        small = await client.get("/view?filename=a.png&type=input&preview=webp;50")
        assert small.content_type == "image/webp"
        prompt = {
            "1": node("LoadImage", image="deep/b.png"),
            "2": node("SaveImage", images=["1", 0], filename_prefix="p"),
        }
        heard = await run_prompt(client, prompt | {"3": node("PreviewImage", images=["1", 0])})
        shown = [data["output"]["images"][0] for kind, data in heard if kind == "executed"]
        assert [one["type"] for one in shown] == ["output", "temp"]
        picture = Image.open(server.places.find("output", "", shown[0]["filename"]))
        assert json.loads(picture.text["prompt"])["1"]["class_type"] == "LoadImage"  # type: ignore[attr-defined]

    talk(conversation)


def test_a_dropped_video_goes_through_ordinary_nodes(talk: Talk) -> None:
    """With its sound, into a file that carries the workflow; the sound is loaded from there as from any file."""

    async def conversation(client: Any, server: Server) -> None:
        prompt = {
            "1": node("LoadVideo", file="vidgen-sound.mp4"),
            "2": node("GetVideoComponents", video=["1", 0]),
            "3": node("CreateVideo", images=["2", 0], fps=["2", 2], audio=["2", 1]),
            "4": node("SaveVideo", video=["3", 0], filename_prefix="a/b", format="auto", codec="auto"),
        }
        heard = await run_prompt(client, prompt)
        shown = next(data["output"]["images"][0] for kind, data in heard if kind == "executed")
        assert shown == {"filename": "b_00001.mp4", "subfolder": "a", "type": "output"}
        assert json.loads(read_metadata(server.places.find("output", "a", "b_00001.mp4"))["prompt"]).keys() == set(
            "1234"
        )
        prompt = {
            "1": node("LoadAudio", audio="a/b_00001.mp4 [output]"),
            "2": node("LoadImage", image="vidgen-black.png"),
            "3": node("CreateVideo", images=["2", 0], fps=1, audio=["1", 0]),
            "4": node("SaveVideo", video=["3", 0], filename_prefix="c", format="mkv", codec="h264"),
        }
        heard = await run_prompt(client, prompt)
        shown = next(data["output"]["video"][0] for kind, data in heard if kind == "executed")
        sounds = [
            read_sound(path)
            for path in (EXAMPLES / "vidgen-sound.mp4", server.places.find("output", "", shown["filename"]))
        ]
        given, heard_again = (sound.waveform[:, :20000] for sound in sounds if sound is not None)
        # AAC and back, and FLAC, which loses nothing.
        assert float((given - heard_again).abs().mean()) < 0.01
        refused = await client.post(
            "/prompt",
            json={"prompt": prompt | {"4": {**prompt["4"], "inputs": {**prompt["4"]["inputs"], "format": "webm"}}}},
        )
        assert refused.status == 400
        assert "webm files do not hold this codec" in await refused.text()

    talk(conversation)


# --- what must be refused ---------------------------------------------------------------------------------------------

BAD_NAMES = [
    "../secret",
    "..\\secret",
    "/etc/passwd",
    "C:\\secret",
    "a/../../secret",
    "con",
    "a\0b",
    "a:b",
    "",
    ".",
    "x ",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_the_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("no")
    with pytest.raises(FileError):
        Places(tmp_path).place("output", name)


def test_no_link_leads_out_of_the_folders(tmp_path: Path) -> None:
    places = Places(tmp_path / "root")
    (tmp_path / "secret.png").write_bytes(png())
    (places.folder("output") / "link.png").symlink_to(tmp_path / "secret.png")
    (places.folder("output") / "folder").symlink_to(tmp_path)
    for name in ("link.png", "folder/secret.png"):
        with pytest.raises(FileError):
            places.find("output", "", name)


def test_the_examples_are_seen_where_the_loaders_find_them(talk: Talk) -> None:
    """The shipped workflows show their pictures before anything is uploaded; an own file of the name goes first."""

    async def conversation(client: Any, server: Server) -> None:
        where = "/view?filename=vidgen-last-frame.png"
        example = await client.get(f"{where}&type=input&subfolder=")
        assert await example.read() == (hosts.EXAMPLES / "vidgen-last-frame.png").read_bytes()
        for elsewhere in ("&type=output", "&type=input&subfolder=deep"):
            assert (await client.get(where + elsewhere)).status == 404
        assert (await client.get("/view?filename=../inputs/vidgen-last-frame.png&type=input")).status == 404
        await upload(client, png(), "vidgen-last-frame.png")
        assert await (await client.get(f"{where}&type=input")).read() == png()

    talk(conversation)


def test_names_over_http_stay_inside(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())

    async def conversation(client: Any, server: Server) -> None:
        for query in (
            "filename=../secret.png",
            "filename=secret.png&subfolder=..",
            "filename=..%5Csecret.png&type=temp",
        ):
            assert (await client.get(f"/view?{query}")).status == 404
        assert (await client.get("/view?filename=a&type=user")).status == 404
        assert (await client.get("/userdata/..%2F..%2Fsecret.png")).status == 404
        assert (await client.post("/userdata/..%2Fevil.json", data=b"{}")).status == 404
        assert (await upload(client, png(), "../evil.png")).status in (200, 404)
        assert (await upload(client, png(), "x.png", subfolder="../..")).status == 404
        for image in (str(tmp_path / "secret.png"), "../secret.png"):
            answer = await client.post(
                "/prompt",
                json={"prompt": {"1": node("PreviewImage", images=["2", 0]), "2": node("LoadImage", image=image)}},
            )
            assert answer.status == 400
            assert "custom_validation_failed" in await answer.text()
        prompt = {"1": node("VidGenLoadAll", model_folder=str(tmp_path)), "2": node("VidGenSaveVideo")}
        assert (await client.post("/prompt", json={"prompt": prompt})).status == 400

    talk(conversation)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["secret.png"]


def test_pages_in_the_output_folder_are_not_run(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        for name in ("a.html", "a.svg", "a.js", "a.xml"):
            (server.places.folder("output") / name).write_text("<script>alert(1)</script>")
            answer = await client.get(f"/view?filename={name}")
            assert answer.content_type == "application/octet-stream"
            assert answer.headers["Content-Disposition"].startswith("attachment")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"

    talk(conversation)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example:8188"},
        {"Host": "[", "Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_other_sites_cannot_use_the_server(talk: Talk, headers: dict[str, str]) -> None:
    async def conversation(client: Any, server: Server) -> None:
        answer = await client.post("/prompt", json={"prompt": {"1": node("Slow")}}, headers=headers)
        assert answer.status in (400, 403)
        assert server.jobs.remaining() == 0

    talk(conversation)


def test_others_need_the_token(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--token"):
        server_at(tmp_path, listen="0.0.0.0")

    async def whole() -> None:
        async with talking(server_at(tmp_path, listen="0.0.0.0", token="sesame")) as client:
            assert (await client.get("/object_info")).status == 401
            assert (await client.get("/ws")).status == 401
            assert (await client.get("/users?token=wrong")).status == 401
            assert (await client.get("/users", headers={"Authorization": "Bearer sesame"})).status == 200
            assert (await client.get("/users?token=sesame")).status == 200
            assert (await client.get("/object_info/VidGenSampler")).status == 200  # by the cookie

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"\xff\xfe", "bad_request"),
        (b"[]", "bad_request"),
        (b"{}", "no_prompt"),
        (b"[" * 5000, "bad_request"),
        (b'{"prompt": 5}', "invalid_prompt"),
        (b'{"prompt": {}}', "prompt_no_outputs"),
        (b'{"prompt": {"1": 5}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": "Nothing"}}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": "Slow"}}}', "prompt_outputs_failed_validation"),
        (b'{"prompt": {"1": {"class_type": "Slow", "inputs": []}}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": ["Slow"], "inputs": {}}}}', "invalid_prompt"),
        (b'{"prompt": {"1": {"class_type": "Slow", "inputs": {"steps": NaN, "key": 0}}}}', None),
        (b'{"prompt": {"1": {"class_type": "Slow", "inputs": {"steps": 1e999, "key": 0}}}}', None),
        (b'{"prompt": {"1": {"class_type": "Slow", "inputs": {"steps": ["1", 0], "key": 0}}}}', "dependency_cycle"),
    ],
)
def test_a_prompt_that_cannot_be(talk: Talk, body: bytes, kind: str | None) -> None:
    async def conversation(client: Any, server: Server) -> None:
        answer = await client.post("/prompt", data=body)
        assert answer.status == 400, await answer.text()
        if kind is not None:
            assert (await answer.json())["error"]["type"] == kind
        assert server.jobs.remaining() == 0
        assert (await client.get("/users")).status == 200

    talk(conversation)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("prompt_id", "x", "invalid_prompt_id"),
        ("prompt_id", 5, "invalid_prompt_id"),
        ("number", "x", "bad_request"),
        ("client_id", 5, "bad_request"),
        ("extra_data", 5, "bad_request"),
        ("partial_execution_targets", 5, "bad_request"),
        ("partial_execution_targets", [5], "bad_request"),
        ("partial_execution_targets", ["9"], "prompt_no_outputs"),
    ],
)
def test_a_request_that_cannot_be(talk: Talk, field: str, value: Any, kind: str) -> None:
    async def conversation(client: Any, server: Server) -> None:
        answer = await client.post("/prompt", json={"prompt": {"1": node("Slow", steps=1, key=0)}, field: value})
        assert answer.status == 400
        assert (await answer.json())["error"]["type"] == kind

    talk(conversation)


def test_too_much_is_refused(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        many = {str(number): node("Slow", steps=0, key=0) for number in range(MAX_NODES + 1)}
        answer = await client.post("/prompt", json={"prompt": many})
        assert answer.status == 400
        assert "nodes" in await answer.text()
        answer = await client.post("/prompt", data=b'{"prompt": "' + b"x" * 17 * 2**20 + b'"}')
        assert answer.status == 413

    talk(conversation)


def test_a_client_that_vanishes_takes_nothing_with_it(talk: Talk) -> None:
    async def conversation(client: Any, server: Server) -> None:
        sockets = [await client.ws_connect(f"/ws?clientId=c{number}") for number in range(20)]
        body = {"prompt": {"1": node("Slow", steps=20, key=0)}, "client_id": "c0"}
        await client.post("/prompt", json=body)
        await listen(sockets[0], "progress")
        sockets[3]._response.connection.transport.abort()  # type: ignore[union-attr]
        assert (await listen(sockets[0], "end"))[-3][0] == "execution_success"
        for number, socket in enumerate(sockets):
            if number != 3:
                await socket.send_str("nonsense")
                await socket.send_str('{"type": "feature_flags", "data": {}}')
                assert (await listen(socket, "feature_flags"))[-1][1]["supports_preview_metadata"]

    talk(conversation)
