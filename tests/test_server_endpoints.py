"""Every address that the frontend knows, and what it expects there: ComfyUI's table, line by line."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import vidgen
from vidgen.headless.server.app import PACK

sys.path.insert(0, str(Path(__file__).parent))
from serving import Running, node, running

BUNDLED = "vidgen-tiny-hunyuan"
PREFIXES = ["", "/api"]


class Slow:
    """Runs until it is stopped, or for a moment."""

    RETURN_TYPES = ()
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "tests"
    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"key": ("INT", {}), "is_long": ("BOOLEAN", {"default": False})}}
    )

    def run(self, key: int, is_long: bool = False) -> dict[str, Any]:
        from vidgen.nodes.host import current

        while is_long:
            current().check_cancelled()
            time.sleep(0.005)
        logging.getLogger("vidgen").warning("ran %d", key)
        shown = {"filename": f"{key}.png", "subfolder": "", "type": "output"}
        return {"ui": {"images": [shown]}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with a LoRA of the user's."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "loras" / "deep").mkdir(parents=True)
    bundled = Path(vidgen.__file__).resolve().parent / "models" / BUNDLED / "loras" / "night.safetensors"
    (folder / "loras" / "deep" / "mine.safetensors").write_bytes(bundled.read_bytes())
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("VidGen"), {"Slow": Slow}, models=(models,)) as asked:
        yield asked


def told(server: Running, path: str) -> Any:
    answer = server.get(path)
    assert answer.status == 200, (path, answer.body[:300])
    assert answer.headers["content-type"].startswith("application/json")
    return answer.json()


# --- what is asked at the start ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/user.css", "/api/userdata/user.css"])
def test_user_css(server: Running, path: str) -> None:
    answer = server.get(path)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-type"].startswith("text/css")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_features(server: Running, prefix: str) -> None:
    assert told(server, f"{prefix}/features") == {
        "supports_preview_metadata": True,
        "supports_progress_text_metadata": True,
        "max_upload_size": 104857600,
        "node_replacements": False,
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_users(server: Running, prefix: str) -> None:
    assert told(server, f"{prefix}/users") == {"storage": "server", "migrated": True}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_system_stats(server: Running, prefix: str) -> None:
    stats = told(server, f"{prefix}/system_stats")
    assert set(stats["system"]) >= {"os", "ram_total", "ram_free", "comfyui_version", "python_version"}
    assert set(stats["system"]) >= {"pytorch_version", "embedded_python", "required_frontend_version"}
    assert "--disable-api-nodes" in stats["system"]["argv"]
    (device,) = stats["devices"]
    assert set(device) == {
        *("name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free"),
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_settings(server: Running, prefix: str) -> None:
    assert server.post(f"{prefix}/settings/Comfy.A", {"deep": [1]}).status == 200
    assert server.post(f"{prefix}/settings", {"Comfy.B": 2, "Comfy.TutorialCompleted": True}).status == 200
    assert told(server, f"{prefix}/settings") == {"Comfy.A": {"deep": [1]}, "Comfy.B": 2}
    assert told(server, f"{prefix}/settings/Comfy.B") == 2
    assert told(server, f"{prefix}/settings/Comfy.Unknown") is None


@pytest.mark.parametrize("prefix", PREFIXES)
def test_userdata(server: Running, prefix: str) -> None:
    name = f"{prefix}/userdata/workflows%2F{'a' if prefix else 'b'}.json"
    answer = server.ask("POST", f"{name}?overwrite=false&full_info=true", b'{"x": 1}')
    info = answer.json()
    assert set(info) == {"path", "size", "modified", "created"}
    assert info["size"] == 8
    assert abs(info["modified"] - time.time() * 1000) < 120_000
    assert server.ask("POST", f"{name}?overwrite=false", b"{}").status == 409
    assert server.get(name).body == b'{"x": 1}'
    listed = told(server, f"{prefix}/userdata?dir=workflows&recurse=true&split=false&full_info=true")
    assert [one["path"] for one in listed] == [info["path"].removeprefix("workflows/")]
    split = told(server, f"{prefix}/userdata?dir=workflows&recurse=true&split=true")
    assert split == [[listed[0]["path"], listed[0]["path"]]]
    moved = server.ask("POST", f"{name}/move/workflows%2Fmoved.json?overwrite=true")
    assert moved.json()["path"] == "workflows/moved.json"
    assert server.ask("DELETE", f"{prefix}/userdata/workflows%2Fmoved.json").status == 204
    assert server.get(f"{prefix}/userdata/workflows%2Fmoved.json").status == 404
    assert told(server, f"{prefix}/userdata?dir=nowhere") == []
    # These two are asked for at every start; a 404 would be an error on the page's console.
    assert told(server, f"{prefix}/userdata/comfy.templates.json") == []
    assert told(server, f"{prefix}/userdata/workflows%2F.index.json") == {"favorites": []}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_i18n(server: Running, prefix: str) -> None:
    languages = told(server, f"{prefix}/i18n")
    for language in ("en", "zh"):
        assert set(languages[language]["nodeDefs"]["VidGenSampler"]) >= {"display_name", "inputs"}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_extensions(server: Running, prefix: str) -> None:
    scripts = told(server, f"{prefix}/extensions")
    assert scripts
    for path in scripts:
        answer = server.get(path)
        assert answer.status == 200
        assert "javascript" in answer.headers["content-type"]
        assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_object_info(server: Running, prefix: str) -> None:
    info = told(server, f"{prefix}/object_info")
    keys = {"input", "input_order", "output", "output_is_list", "output_name", "output_tooltips", "name"}
    keys |= {"display_name", "description", "python_module", "category", "output_node", "search_aliases"}
    for name, declared in info.items():
        assert keys <= set(declared), name
        assert len(declared["output"]) == len(declared["output_name"]) == len(declared["output_is_list"]), name
    assert info["VidGenSampler"]["python_module"] == f"custom_nodes.{PACK}"
    assert told(server, f"{prefix}/object_info/VidGenSampler") == {"VidGenSampler": info["VidGenSampler"]}
    assert told(server, f"{prefix}/object_info/Nothing") == {}
    # A file that is dropped onto the page becomes one of these.
    assert {"LoadImage", "LoadVideo", "LoadAudio"} <= set(info)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_is_empty_here(server: Running, prefix: str) -> None:
    assert told(server, f"{prefix}/global_subgraphs") == {}
    assert server.get(f"{prefix}/global_subgraphs/x").status == 404
    assert told(server, f"{prefix}/node_replacements") == {}
    assert told(server, f"{prefix}/embeddings") == []


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_models(server: Running, models: Path, prefix: str) -> None:
    assert {"diffusion_models", "vae", "text_encoders", "loras"} <= set(told(server, f"{prefix}/models"))
    names = told(server, f"{prefix}/models/loras")
    assert names == [f"{BUNDLED}/night.safetensors", "deep/mine.safetensors"]
    places = {one["name"]: one["folders"] for one in told(server, f"{prefix}/experiment/models")}
    assert set(places) == set(told(server, f"{prefix}/models"))
    listed = told(server, f"{prefix}/experiment/models/loras")
    assert listed == [{"name": names[0], "pathIndex": 0}, {"name": names[1], "pathIndex": 1}]
    assert Path(places["loras"][1]) == models / "loras"
    for path in ("models/nothing", "experiment/models/nothing", "view_metadata/nothing?filename=a"):
        assert server.get(f"{prefix}/{path}").status == 404
    metadata = told(server, f"{prefix}/view_metadata/vae?filename={BUNDLED}/vae.safetensors")
    assert metadata["vidgen.part"] == "codec"
    assert server.get(f"{prefix}/view_metadata/vae?filename=nothing.safetensors").status == 404


def test_folder_paths(server: Running, models: Path) -> None:
    assert str(models / "loras") in told(server, "/internal/folder_paths")["loras"]


# --- prompts and jobs -------------------------------------------------------------------------------------------------


def queue(server: Running, prefix: str, key: int, *, is_long: bool = False, **more: Any) -> str:
    body = {"prompt": {"1": node("Slow", key=key, is_long=is_long)}, **more}
    answer = server.post(f"{prefix}/prompt", body)
    assert answer.status == 200, answer.body
    return answer.json()["prompt_id"]


def settled(server: Running) -> None:
    deadline = time.monotonic() + 60
    while told(server, "/prompt")["exec_info"]["queue_remaining"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def begun(server: Running, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while [entry[1] for entry in told(server, "/queue")["queue_running"]] != [job_id]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_queue_and_interrupt(server: Running, prefix: str) -> None:
    first = queue(server, prefix, 1, is_long=True)
    begun(server, first)
    others = [queue(server, prefix, key) for key in (2, 3, 4)]
    waiting = told(server, f"{prefix}/queue")["queue_pending"]
    assert [entry[1] for entry in waiting] == others
    number, job_id, prompt, extra, outputs = waiting[0]
    assert (prompt, outputs) == ({"1": node("Slow", key=2, is_long=False)}, ["1"])
    assert "create_time" in extra
    assert server.post(f"{prefix}/queue", {"delete": [others[1]]}).status == 200
    assert [entry[1] for entry in told(server, f"{prefix}/queue")["queue_pending"]] == [others[0], others[2]]
    assert told(server, f"{prefix}/prompt") == {"exec_info": {"queue_remaining": 3}}
    assert server.post(f"{prefix}/queue", {"clear": True}).status == 200
    # Not this one: it does not run.
    assert server.post(f"{prefix}/interrupt", {"prompt_id": others[0]}).status == 200
    assert [entry[1] for entry in told(server, f"{prefix}/queue")["queue_running"]] == [first]
    assert server.ask("POST", f"{prefix}/interrupt").status == 200
    settled(server)
    assert told(server, f"{prefix}/history/{first}")[first]["status"]["status_str"] == "error"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_history(server: Running, prefix: str) -> None:
    server.post(f"{prefix}/history", {"clear": True})
    ids = [queue(server, prefix, key) for key in (11, 12, 13)]
    settled(server)
    assert list(told(server, f"{prefix}/history")) == ids
    assert list(told(server, f"{prefix}/history?max_items=2")) == ids[1:]
    record = told(server, f"{prefix}/history/{ids[0]}")[ids[0]]
    assert set(record) == {"prompt", "outputs", "status", "meta"}
    assert set(record["status"]) == {"status_str", "completed", "messages"}
    assert record["outputs"] == {"1": {"images": [{"filename": "11.png", "subfolder": "", "type": "output"}]}}
    assert server.post(f"{prefix}/history", {"delete": [ids[0]]}).status == 200
    assert list(told(server, f"{prefix}/history")) == ids[1:]
    assert told(server, f"{prefix}/history/{ids[0]}") == {}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_jobs(server: Running, prefix: str) -> None:
    server.post(f"{prefix}/history", {"clear": True})
    more = {"extra_data": {"extra_pnginfo": {"workflow": {"id": "of the page"}}}}
    done = queue(server, prefix, 21, **more)
    settled(server)
    running_id = queue(server, prefix, 22, is_long=True)
    begun(server, running_id)
    waiting = queue(server, prefix, 23)
    listed = told(server, f"{prefix}/jobs?status=in_progress,pending&limit=200&offset=0")
    assert [(job["id"], job["status"]) for job in listed["jobs"]] == [(running_id, "in_progress"), (waiting, "pending")]
    assert listed["pagination"] == {"offset": 0, "limit": 200, "total": 2, "has_more": False}
    page = told(server, f"{prefix}/jobs?limit=1&offset=1")
    assert [job["id"] for job in page["jobs"]] == [waiting]
    assert page["pagination"] == {"offset": 1, "limit": 1, "total": 3, "has_more": True}
    (job,) = told(server, f"{prefix}/jobs?status=completed,failed,cancelled&limit=64&offset=0")["jobs"]
    assert job["id"] == done
    assert job["workflow_id"] == "of the page"
    assert job["outputs_count"] == job["previewable_outputs_count"] == 1
    output = {"filename": "21.png", "subfolder": "", "type": "output", "nodeId": "1", "mediaType": "images"}
    assert job["preview_output"] == output
    assert job["create_time"] <= job["execution_start_time"] <= job["execution_end_time"]
    whole = told(server, f"{prefix}/jobs/{done}")
    assert whole["outputs"]["1"]["images"][0]["filename"] == "21.png"
    assert whole["workflow"]["extra_data"]["extra_pnginfo"] == more["extra_data"]["extra_pnginfo"]
    assert whole["workflow"]["prompt"] == {"1": node("Slow", key=21, is_long=False)}
    assert server.get(f"{prefix}/jobs/nothing").status == 404
    assert server.post(f"{prefix}/jobs/{waiting}/cancel").json() == {"cancelled": True}
    assert server.post(f"{prefix}/jobs/cancel", {"job_ids": [running_id]}).json() == {"cancelled": True}
    settled(server)
    cancelled = told(server, f"{prefix}/jobs?status=cancelled")["jobs"]
    assert running_id in [job["id"] for job in cancelled]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_free(server: Running, prefix: str) -> None:
    """What was kept of the last run is gone: the same prompt runs again."""
    queue(server, prefix, 31)
    settled(server)
    assert len(server.server.jobs.cache) == 1
    assert server.post(f"{prefix}/free", {"unload_models": True, "free_memory": True}).status == 200
    deadline = time.monotonic() + 60
    while len(server.server.jobs.cache):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", PREFIXES)
def test_view_and_upload(server: Running, prefix: str) -> None:
    content = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    (server.server.places.folder("output") / "deep").mkdir(exist_ok=True)
    (server.server.places.folder("output") / "deep" / "a b.png").write_bytes(content)
    where = f"{prefix}/view?filename=a%20b.png&subfolder=deep&type=output&rand=0.5"
    whole = server.get(where)
    assert (whole.status, whole.body) == (200, content)
    assert whole.headers["content-type"] == "image/png"
    assert whole.headers["x-content-type-options"] == "nosniff"
    for asked, status, given in (
        ("bytes=0-9", 206, content[:10]),
        ("bytes=8-", 206, content[8:]),
        ("bytes=-4", 206, content[-4:]),
        ("bytes=9999-", 416, None),
    ):
        part = server.get(where, Range=asked)
        assert part.status == status, asked
        assert given in (None, part.body)
    size = server.ask("HEAD", where)
    assert (size.status, size.headers["content-length"]) == (200, str(len(content)))
    assert server.get(f"{prefix}/view?filename=nothing.png").status == 404
    marked = server.get(f"{prefix}/view?filename=deep/a%20b.png%20%5Boutput%5D&type=input")
    assert marked.body == content


def test_files_of_a_folder(server: Running) -> None:
    (server.server.places.folder("input") / "z.png").write_bytes(b"x")
    assert "z.png" in told(server, "/internal/files/input")
    assert isinstance(told(server, "/internal/files/output"), list)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_workflow_templates(server: Running, prefix: str) -> None:
    names = told(server, f"{prefix}/workflow_templates")[PACK]
    assert names.index("hunyuan_t2v") < names.index("cogvideox_5b_t2v")  # what runs as installed comes first
    for name in names:
        assert told(server, f"{prefix}/workflow_templates/{PACK}/{name}.json")["nodes"]
    assert server.get(f"{prefix}/workflow_templates/{PACK}/hunyuan_t2v.jpg").body.startswith(b"\xff\xd8\xff")
    assert server.get(f"{prefix}/workflow_templates/{PACK}/nothing.json").status == 404


def test_templates_of_the_frontend(server: Running) -> None:
    assert told(server, "/templates/index.json") == []
    assert told(server, "/templates/index.de.json") == []
    assert told(server, "/templates/index_logo.json") == {}


def test_node_help(server: Running) -> None:
    for name in vidgen.NODE_CLASS_MAPPINGS:
        answer = server.get(f"/extensions/{PACK}/docs/{name}.md")
        assert answer.status == 200, name
        assert "html" not in answer.headers["content-type"]
    assert server.get(f"/extensions/{PACK}/docs/VidGenSampler/de.md").status == 404


# --- logs -------------------------------------------------------------------------------------------------------------


def test_logs_are_kept_and_told_to_who_asks(server: Running) -> None:
    import asyncio

    async def whole() -> list[dict[str, Any]]:
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session,
            session.ws_connect("/ws?clientId=logs") as socket,
        ):
            await socket.receive()
            subscription = {"enabled": True, "clientId": "logs"}
            for key, is_on in ((41, True), (42, False), (43, True)):
                body = subscription | {"enabled": is_on}
                async with session.patch("/internal/logs/subscribe", json=body) as answer:
                    assert answer.status == 200
                await asyncio.to_thread(queue, server, "", key)
                await asyncio.to_thread(settled, server)
            heard = []
            async for message in socket:
                said = json.loads(message.data)
                heard += said["data"]["entries"] if said["type"] == "logs" else []
                if len(heard) == 2:
                    return heard
            return heard

    heard = asyncio.run(asyncio.wait_for(whole(), 60))
    assert [entry["m"] for entry in heard] == ["ran 41\n", "ran 43\n"]
    raw = told(server, "/internal/logs/raw")
    assert set(raw["size"]) == {"cols", "rows"}
    assert set(raw["entries"][-1]) == {"t", "m"}
    assert "ran 42\n" in [entry["m"] for entry in raw["entries"]]
    assert "ran 42\n" in told(server, "/internal/logs")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page(tmp_path: Path) -> None:
    with running(tmp_path, has_page=True) as asked:
        page = asked.get("/")
        assert page.status == 200
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["x-frame-options"] == "SAMEORIGIN"
        assert b"<html" in page.body.lower()
        scripts = told(asked, "/api/extensions")
        assert any(path.startswith("/extensions/core/") for path in scripts)
        assert any(path.startswith(f"/extensions/{PACK}/") for path in scripts)
        assert asked.get(next(path for path in scripts if "/core/" in path)).status == 200
        assert asked.get("/scripts/app.js").status == 200
        for path in ("/..%2f..%2fcomfyui_frontend_package", "/assets/..%2f..%2f..%2f__init__.py", "/assets"):
            assert asked.get(path).status in (403, 404)


def test_without_the_page(server: Running) -> None:
    assert "POST /prompt" in told(server, "/")["vidgen"]
