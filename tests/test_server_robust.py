"""Requests, graphs and files that cannot be, by the hundred: each is answered with a reason, nothing leaves its folder
or enters it unasked, and the server renders afterwards as it did before."""

from __future__ import annotations

import concurrent.futures
import gzip
import io
import json
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.render import shipped
from vidgen.headless.server.app import MAX_DEPTH, MAX_NODES

sys.path.insert(0, str(Path(__file__).parent))
from serving import Answer, Running, node, running

SECRET = b"nobody-may-read-this"
INPUTS = Path(vidgen.__file__).resolve().parent / "workflows" / "inputs"
EXAMPLES = {"bodies": 80, "graphs": 80, "addresses": 100, "raw": 60, "forms": 60, "pictures": 30}
"""made by hypothesis, each of them a request"""


class Exits:
    """A node that takes its thread with it."""

    RETURN_TYPES = ()
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"key": ("INT", {"default": 0})}})

    def run(self, key: int) -> tuple[()]:
        raise SystemExit(key)


class Mute:
    """A node that cannot even say what it needs."""

    RETURN_TYPES = ("INT",)
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        raise RuntimeError("no list today")


class Add:
    RETURN_TYPES = ("INT",)
    FUNCTION, OUTPUT_NODE, CATEGORY = "run", True, "tests"
    INPUT_TYPES = classmethod(lambda cls: {"required": {"a": ("INT", {"default": 0}), "b": ("INT", {"default": 0})}})

    @classmethod
    def VALIDATE_INPUTS(cls, a: int = 0) -> bool:
        if a == 13:
            raise KeyError("thirteen")
        return True

    def run(self, a: int, b: int) -> tuple[int]:
        return (a + b,)


CLASSES: dict[str, type] = {"Exits": Exits, "Mute": Mute, "Add": Add}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the server's lies, with what it must not touch."""
    place = tmp_path_factory.mktemp("place")
    for name in ("secret.png", "secret.mp4", "secret.json", "secret.safetensors"):
        (place / name).write_bytes(SECRET)
    return place


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Running]:
    """One server for all of it. After the last test it must render, and nothing beside its folder may have changed."""
    with running(place / "VidGen", CLASSES) as asked:
        before = {name: content for name, content in tree(place).items() if not name.startswith("VidGen/")}
        yield asked
        asked.post("/queue", {"clear": True})
        asked.post("/interrupt")
        assert asked.get("/users").status == 200
        record = asked.run(small_render())
        assert record["status"]["status_str"] == "success", record["status"]
        (shown,) = record["outputs"]["7"]["images"]
        assert asked.get(f"/view?filename={shown['filename']}&subfolder={shown['subfolder']}").body[4:8] == b"ftyp"
        after = {name: content for name, content in tree(place).items() if not name.startswith("VidGen/")}
        assert after == before
        left = [name for name in tree(place / "VidGen") if ".upload-" in name or name.endswith(".tmp")]
        assert left == []


def small_render() -> dict[str, Any]:
    prompt = shipped("hunyuan_t2v")
    small = {"VidGenSampler": {"steps": 1}, "VidGenEmptyLatent": {"width": 32, "height": 32, "num_frames": 5}}
    for one in prompt.values():
        one["inputs"] |= small.get(one["class_type"], {})
    return prompt


def harmless(answer: Answer) -> Answer:
    assert answer.status < 500, (answer.status, answer.body[:500])
    assert SECRET not in answer.body
    return answer


def refused(answer: Answer, *, status: int = 400, kind: str | None = None, word: str = "") -> None:
    """Refused with a reason in ComfyUI's shape."""
    harmless(answer)
    assert answer.status == status, (answer.status, answer.body[:500])
    assert kind in (None, answer.kind), answer.body[:500]
    assert word in answer.body.decode(), answer.body[:500]


# --- bodies -----------------------------------------------------------------------------------------------------------

GZIP_BOMB = gzip.compress(b'{"prompt": "' + b" " * 20_000_000 + b'"}')
TAKES_JSON = ["prompt", "queue", "history", "interrupt", "free", "jobs/cancel", "settings"]
NO_TABLES = {
    "list": b"[]",
    "null": b"null",
    "number": b"5",
    "text": b'"x"',
    "open": b"{",
    "two": b"{} {}",
    "no_utf8": b"\xff\xfe{}",
    "deep": b'{"prompt": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "bottomless": b"[" * 200_000,
    "bottomless_tables": b'{"a":' * 100_000,
    "long_number": b'{"prompt": ' + b"9" * 5000 + b"}",
    "quotes": b'{"a": "' + b'\\"' * 500_000,
}


@pytest.mark.parametrize("path", TAKES_JSON)
@pytest.mark.parametrize("name", NO_TABLES)
def test_a_body_that_is_no_table(server: Running, path: str, name: str) -> None:
    started = time.monotonic()
    refused(server.ask("POST", f"/{path}", NO_TABLES[name]))
    assert time.monotonic() - started < 20, "an answer must not take longer the odder the request is"


@pytest.mark.parametrize("path", [*TAKES_JSON, "settings/a", "userdata/a.json"])
@pytest.mark.parametrize("packing", ["gzip", "deflate", "br", "zstd", "nonsense"])
def test_packed_bodies_are_not_unpacked(server: Running, path: str, packing: str) -> None:
    body = GZIP_BOMB if packing == "gzip" else zlib.compress(b"{}")
    refused(server.ask("POST", f"/{path}", body, {"Content-Encoding": packing}), status=415)


@pytest.mark.parametrize("path", ["prompt", "settings/a"])
def test_an_unknown_charset(server: Running, path: str) -> None:
    refused(server.ask("POST", f"/{path}", b"{}", {"Content-Type": "application/json; charset=klingon"}))


@pytest.mark.parametrize("path", [*TAKES_JSON, "settings/a", "userdata/big.json"])
def test_a_body_that_is_too_large(server: Running, path: str) -> None:
    refused(server.ask("POST", f"/{path}", b" " * (17 * 2**20)), status=413, kind="too_large")


@pytest.mark.parametrize(
    "body",
    [
        b"5\r\nabcdefgh",
        b"ffffffffffffffffff\r\nab\r\n0\r\n\r\n",
        b"xyz\r\n",
        b"-1\r\n\r\n",
        b"1\r\na\r\n",
    ],
)
def test_chunks_that_lie(server: Running, body: bytes) -> None:
    head = b"POST /prompt HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = server.raw(head + body)
    assert answer == b"" or answer.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4")), answer[:200]


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["prompt", "client_id", "number", "front", "extra_data", "prompt_id", "partial_execution_targets"]
NAMES += ["delete", "clear", "job_ids", "unload_models", "free_memory", "enabled", "clientId", "extra_pnginfo"]
THOROUGH = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(THOROUGH, max_examples=EXAMPLES["bodies"])
@given(
    path=st.sampled_from([*TAKES_JSON, "settings/a%20b", "jobs/x/cancel", "internal/logs/subscribe"]),
    body=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), junk, max_size=5) | junk,
)
def test_any_json(server: Running, path: str, body: Any) -> None:
    method = "PATCH" if path.startswith("internal") else "POST"
    harmless(server.ask(method, f"/{path}", json.dumps(body).encode()))


def test_what_a_prompt_brings_along_does_not_break_the_lists(server: Running) -> None:
    prompt = {"1": node("Add", a=1, b=1)}
    for extra in (5, [], "x", True):
        refused(server.post("/prompt", {"prompt": prompt, "extra_data": {"extra_pnginfo": extra}}))
    for workflow in (5, [], "x", {"id": 5}):
        server.run(prompt, extra_data={"extra_pnginfo": {"workflow": workflow}})
    for path in ("jobs", "history", "queue"):
        assert harmless(server.get(f"/{path}")).status == 200


# --- graphs -----------------------------------------------------------------------------------------------------------


def chain(length: int, first: Any) -> dict[str, Any]:
    return {str(n): node("Add", a=[str(n - 1), 0] if n else first, b=0) for n in range(length)}


WRONG = "prompt_outputs_failed_validation"
ADD = node("Add", a=1, b=1)
PICTURE = node("LoadImage", image="vidgen-first-frame.png")
GRAPHS: dict[str, tuple[Any, str]] = {
    "a circle of one": ({"1": node("Add", a=["1", 0], b=0)}, "dependency_cycle"),
    "a circle of two": ({"1": node("Add", a=["2", 0], b=0), "2": node("Add", a=["1", 0], b=0)}, "dependency_cycle"),
    "a long circle": (chain(2000, ["1999", 0]), "dependency_cycle"),
    "too many nodes": ({str(n): ADD for n in range(10_000)}, "invalid_prompt"),
    "as many as are allowed, all wrong": (chain(MAX_NODES, "x"), WRONG),
    "thousands that are wrong each": (
        {str(n): node("Add", a="x", b="y") for n in range(MAX_NODES)},
        WRONG,
    ),
    "a link to nowhere": ({"1": node("Add", a=["9", 0], b=0)}, WRONG),
    "an output that is not there": (
        {"1": PICTURE, "2": node("Add", a=["1", 7], b=0)},
        WRONG,
    ),
    "an output before the first": (
        {"1": PICTURE, "2": node("Add", a=["1", -1], b=0)},
        WRONG,
    ),
    "a class that cannot say": ({"1": node("Mute")}, WRONG),
    "a check that raises": ({"1": node("Add", a=13, b=0)}, WRONG),
    "an endless name": ({"1": node("A" * 100_000)}, "invalid_prompt"),
    "an endless id": ({"1" * 100_000: node("A")}, "invalid_prompt"),
    "a number without end": ({"1": node("Add", a="9" * 4000, b=0)}, WRONG),
    "no class": ({"1": {"inputs": {}}}, "invalid_prompt"),
    "a class of another type": ({"1": {"class_type": 5, "inputs": {}}}, "invalid_prompt"),
    "nodes in a list": ([ADD], "invalid_prompt"),
    "a node of the editor": ({"nodes": [], "links": []}, "invalid_prompt"),
    "an unknown picture": (
        {"1": node("PreviewImage", images=["2", 0]), "2": node("LoadImage", image="no.png")},
        WRONG,
    ),
    "a picture with an endless name": (
        {"1": node("PreviewImage", images=["2", 0]), "2": node("LoadImage", image="a" * 5000)},
        WRONG,
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_cannot_be(server: Running, name: str) -> None:
    prompt, kind = GRAPHS[name]
    started = time.monotonic()
    answer = server.post("/prompt", {"prompt": prompt})
    refused(answer, kind=kind)
    assert time.monotonic() - started < 30
    assert len(answer.body) < 3 * 2**20


def test_values_that_are_nested_too_deep(server: Running) -> None:
    value: Any = 0
    for _ in range(MAX_DEPTH):
        value = [value]
    refused(server.post("/prompt", {"prompt": {"1": node("Add", a=value, b=0)}}), word="deep")


def test_a_node_that_exits_takes_only_itself(server: Running) -> None:
    record = server.run({"1": node("Exits", key=3)})
    assert dict(record["status"]["messages"])["execution_error"]["exception_type"] == "SystemExit"
    assert server.run({"1": node("Add", a=2, b=2)})["status"]["status_str"] == "success"


def test_a_class_that_cannot_say_what_it_needs_does_not_hide_the_others(server: Running) -> None:
    info = server.get("/object_info").json()
    assert "Mute" not in info
    assert "VidGenSampler" in info


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    """Real nodes with anything on their inputs."""
    ids = [str(number) for number in range(draw(st.integers(1, 5)))]
    names = sorted({**vidgen.NODE_CLASS_MAPPINGS, **CLASSES}) + ["LoadImage", "SaveVideo", "PreviewImage", "Nothing"]
    links = st.tuples(st.sampled_from(ids), st.integers(-1, 3)).map(list)
    graph = {}
    for number in ids:
        kind = draw(st.sampled_from(names))
        cls = vidgen.NODE_CLASS_MAPPINGS.get(kind) or CLASSES.get(kind)
        declared = {} if cls is None or cls is Mute else cls.INPUT_TYPES()
        known = [*declared.get("required", {}), *declared.get("optional", {})] or ["image", "images", "a"]
        inputs = {name: draw(links | junk) for name in known if draw(st.integers(0, 9))}
        graph[number] = {"class_type": kind, "inputs": inputs}
    return graph


@settings(THOROUGH, max_examples=EXAMPLES["graphs"])
@given(graphs())
def test_any_graph_of_real_nodes(server: Running, graph: dict[str, Any]) -> None:
    harmless(server.post("/prompt", {"prompt": graph}))


# --- addresses --------------------------------------------------------------------------------------------------------

WAYS_OUT = [
    "../secret.png",
    "../../secret.png",
    "..\\secret.png",
    "a/../../../secret.png",
    "/etc/passwd",
    "//etc/passwd",
    "C:\\secret.png",
    "file:///etc/passwd",
    "secret.png\0.png",
    "....//secret.png",
    "%2e%2e/secret.png",
    "\udcff",
    "~/secret.png",
    "con",
    "a" * 255,
    "a/" * 2000,
    "🙈" * 80,
]


@pytest.mark.parametrize("name", WAYS_OUT)
@pytest.mark.parametrize("way", ["filename", "subfolder", "type", "userdata", "post", "move", "dir", "preview"])
def test_no_address_leads_out(server: Running, way: str, name: str) -> None:
    told = quote(name.encode("utf-8", "surrogateescape"), safe="")
    if way == "userdata":
        answer = server.get(f"/userdata/{told}")
    elif way == "post":
        answer = server.ask("POST", f"/userdata/{told}", b"{}")
    elif way == "move":
        server.ask("POST", "/userdata/here.json", b"{}")
        answer = server.ask("POST", f"/userdata/here.json/move/{told}?overwrite=true")
    elif way == "dir":
        answer = server.get(f"/userdata?dir={told}&recurse=true")
    else:
        query = {"filename": "secret.png", "type": "input"} | {way: told}
        answer = server.get("/view?" + "&".join(f"{key}={value}" for key, value in query.items()))
        assert answer.status == 404
    harmless(answer)
    assert answer.status in (200, 400, 404, 414)


@pytest.mark.parametrize(
    "path",
    [
        "/extensions/comfyui-vidgen/../../../secret.png",
        "/extensions/comfyui-vidgen/..%2f..%2fpyproject.toml",
        "/extensions/comfyui-vidgen/%2e%2e/pyproject.toml",
        "/workflow_templates/comfyui-vidgen/..%2f..%2fpyproject.toml",
        "/workflow_templates/..%2f/hunyuan_t2v.json",
        "/internal/files/..",
        "/internal/files/user",
        "/models/..%2f",
        "/view_metadata/loras?filename=../secret.safetensors",
        "/view_metadata/vae?filename=" + "a" * 3000,
        "/object_info/..%2f",
        "/jobs/..%2f",
        "/history/%00",
    ],
)
def test_no_path_leads_out(server: Running, path: str) -> None:
    answer = harmless(server.get(path))
    assert answer.status in (200, 400, 403, 404)
    assert b"setuptools" not in answer.body


def test_a_folder_in_the_place_of_a_file(server: Running) -> None:
    assert server.ask("POST", "/userdata/deep%2Fa.json", b"{}").status == 200
    refused(server.ask("POST", "/userdata/deep", b"{}"), status=404)
    refused(server.ask("POST", "/userdata/deep%2Fa.json%2Fb.json", b"{}"), status=404)
    refused(server.ask("POST", "/userdata/deep%2Fa.json/move/deep?overwrite=true"), status=404)
    refused(server.ask("DELETE", "/userdata/deep"), status=404)
    assert server.upload(png(), "x.png", subfolder="x.d").status == 200
    refused(server.upload(png(), "x.d", overwrite="true"), status=404)
    assert server.get("/userdata/deep%2Fa.json").body == b"{}"


def test_links_are_not_followed_out(server: Running, place: Path) -> None:
    root = place / "VidGen"
    for folder in ("output", "input", "user/default"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "out").symlink_to(place)
        (root / folder / "out.png").symlink_to(place / "secret.png")
    try:
        for path in (
            "view?filename=out.png",
            "view?filename=secret.png&subfolder=out",
            "view?filename=out.png&type=input&preview=webp",
            "userdata/out.png",
            "userdata/out%2Fsecret.json",
        ):
            refused(server.get(f"/{path}"), status=404)
        refused(server.ask("POST", "/userdata/out%2Fnew.json", b"{}"), status=404)
        refused(server.upload(png(), "new.png", subfolder="out"), status=404)
        prompt = {"1": node("SaveImage", images=["2", 0], filename_prefix="out/x")}
        prompt |= {"2": node("LoadImage", image="vidgen-first-frame.png")}
        assert "output folder" in server.error_of(prompt)
    finally:
        for folder in ("output", "input", "user/default"):
            (root / folder / "out").unlink()
            (root / folder / "out.png").unlink()


@settings(THOROUGH, max_examples=EXAMPLES["addresses"])
@given(
    path=st.sampled_from(["view", "jobs", "history", "userdata", "queue", "view_metadata/vae", "internal/files/input"]),
    query=st.dictionaries(
        st.sampled_from(["filename", "subfolder", "type", "preview", "dir", "recurse", "split", "full_info"])
        | st.sampled_from(["limit", "offset", "status", "max_items", "token"]),
        st.binary(max_size=30) | st.sampled_from([b"-1", b"1e9", b"9" * 30, b"true", b"input", b"webp;999", b"../x"]),
        max_size=4,
    ),
    tail=st.binary(max_size=12),
)
def test_any_address(server: Running, path: str, query: dict[str, bytes], tail: bytes) -> None:
    extra = f"/{quote(tail, safe='')}" if tail and "/" not in path else ""
    asked = "&".join(f"{key}={quote(value, safe='')}" for key, value in query.items())
    harmless(server.get(f"/{path}{extra}?{asked}"))


HEAD_NAMES = [b"Host", b"Content-Length", b"Upgrade", b"Connection"]
HEADERS = [
    ("Range", "bytes=abc"),
    ("Range", "bytes=-"),
    ("Range", "bytes=99999999999-"),
    ("Range", "bytes=5-1"),
    ("Range", "bytes=0-1,3-4"),
    ("Range", "parsecs=1-2"),
    ("If-Range", "yesterday"),
    ("If-Modified-Since", "not a date"),
    ("If-None-Match", '"'),
    ("Accept-Encoding", "gzip;q=nonsense"),
    ("Authorization", "Bearer \xff\xfe"),
    ("Cookie", "vidgen_token=\xff; =; ;;"),
    ("Origin", "http://[::1"),
    ("Origin", "\xff"),
    ("Host", ""),
    ("Host", "127.0.0.1:99999999"),
    ("Sec-Fetch-Site", "\xff"),
    ("Expect", "200-maybe"),
]


@pytest.mark.parametrize(("name", "value"), HEADERS)
def test_headers_that_cannot_be(server: Running, name: str, value: str) -> None:
    server.upload(png(), "here.png")
    answer = harmless(server.get("/view?filename=here.png&type=input", **{name: value}))
    assert answer.status in (200, 206, 304, 400, 403, 416, 417)


@settings(THOROUGH, max_examples=EXAMPLES["raw"])
@given(
    line=st.sampled_from([b"GET / HTTP/1.1", b"POST /prompt HTTP/1.1", b"PUT /view HTTP/1.0", b"GET /ws HTTP/1.1"])
    | st.binary(max_size=40),
    headers=st.lists(st.tuples(st.sampled_from(HEAD_NAMES), st.binary()), max_size=4),
    body=st.binary(max_size=60),
)
def test_any_bytes(server: Running, line: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    lines = [line, *(name + b": " + value for name, value in headers)]
    answer = server.raw(b"\r\n".join(lines) + b"\r\n\r\n" + body)
    assert not answer.startswith(b"HTTP/1.1 5"), answer[:300]


# --- uploads ----------------------------------------------------------------------------------------------------------


def png(size: tuple[int, int] = (16, 16)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "png")
    return out.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int) -> bytes:
    """A picture of one colour: some thousand bytes that stand for gigabytes."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def png_with_text(kind: bytes) -> bytes:
    """A note that unpacks to 80 MB."""
    packed = zlib.compress(b"a" * 80_000_000, 9)
    body = b"workflow\0\0" + packed if kind == b"zTXt" else b"workflow\0\1\0\0\0" + packed
    plain = png()
    return plain[:33] + png_chunk(kind, body) + plain[33:]


LIES = {
    "a page": ("a.png", b"<html><script>alert(1)</script></html>"),
    "a drawing with a program": ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>"),
    "a program": ("a.jpg", b"\x7fELF" + b"\0" * 100),
    "a print job, which Pillow would give to another program": (
        "a.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ),
    "nothing at all": ("a.webp", b""),
    "a picture as a video": ("a.mp4", png()),
    "a playlist of this machine's files": ("a.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"),
    "a list of other files": ("a.webm", b"ffconcat version 1.0\nfile secret.mp4\n"),
    "a text as a sound": ("a.wav", b"hello"),
    "a picture that ends in its head": ("a.png", png()[:20]),
    "a picture of 2 gigapixels": ("a.png", png()[:16] + struct.pack(">II", 50_000, 40_000) + png()[24:]),
}


@pytest.mark.parametrize("name", LIES)
def test_an_upload_that_is_not_what_it_says(server: Running, name: str) -> None:
    file, content = LIES[name]
    refused(server.upload(content, file), status=404)


@pytest.mark.parametrize("size", [(8200, 8200), (20_000, 20_000)])
def test_a_picture_that_would_fill_the_memory(server: Running, place: Path, size: tuple[int, int]) -> None:
    """Also where it is in the folder already."""
    bomb = png_bomb(*size)
    assert len(bomb) < 100_000
    refused(server.upload(bomb, "bomb.png"), status=404, word="image")
    (place / "VidGen" / "input" / "bomb.png").write_bytes(bomb)
    assert server.get("/view?filename=bomb.png&type=input&preview=webp").body == bomb
    prompt = {"1": node("PreviewImage", images=["2", 0]), "2": node("LoadImage", image="bomb.png")}
    assert "image" in server.error_of(prompt)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_picture_with_endless_notes(server: Running, kind: bytes) -> None:
    harmless(server.upload(png_with_text(kind), "notes.png"))


FILE = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.bin"'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b",
        b"--b--",
        b"--b\r\n\r\n--b--",
        b"--b\r\nContent-Disposition: nonsense\r\n\r\nx\r\n--b--",
        b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--b--',
        b'--b\r\nContent-Disposition: form-data; name="image"; filename=""\r\n\r\nx\r\n--b--',
        FILE + b"\r\nContent-Length: 99\r\n\r\nx\r\n--b--",
        FILE + b"\r\nContent-Length: x\r\n\r\nx\r\n--b--",
        FILE + b"\r\n\r\nno end",
        b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--",
        b"--b\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\nx\r\n--b--",
        b"--b\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(2000)) + b"\r\nx\r\n--b--",
        b"--b\r\nno colon\r\n\r\nx\r\n--b--",
        b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % n for n in range(100)) + b"--b--",
        b'--b\r\nContent-Disposition: form-data; name="type"\r\n\r\n' + b"x" * 10_000 + b"\r\n--b--",
        b'--b\r\nContent-Disposition: form-data; name="type"\r\nContent-Transfer-Encoding: base64\r\n\r\n!\r\n--b--',
    ],
)
def test_a_form_that_cannot_be(server: Running, body: bytes) -> None:
    answer = harmless(server.ask("POST", "/upload/image", body, {"Content-Type": "multipart/form-data; boundary=b"}))
    # What a part says of its length is not asked, so that one with a lie in it is whole.
    assert answer.status in ((200, 400) if b"Content-Length" in body else (400, 404, 413))


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=", "text/plain", "nonsense"])
def test_a_form_without_a_frame(server: Running, kind: str) -> None:
    refused(server.ask("POST", "/upload/image", b"--b\r\n\r\nx\r\n--b--", {"Content-Type": kind}))


@pytest.mark.parametrize("name", [name for name in WAYS_OUT if "\0" not in name and "\udcff" not in name])
@pytest.mark.parametrize("where", ["filename", "subfolder"])
def test_no_upload_leads_out(server: Running, where: str, name: str) -> None:
    told = name.replace("\\", "\\\\")
    answer = server.upload(png(), told) if where == "filename" else server.upload(png(), "x.png", subfolder=told)
    assert harmless(answer).status in (200, 400, 404)


def test_an_upload_without_end(server: Running) -> None:
    head = b"POST /upload/image HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    head += b'Content-Disposition: form-data; name="image"; filename="endless.bin"\r\n\r\n'
    answer = server.raw(head + b"x" * (101 * 2**20))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert not (server.server.places.folder("input") / "endless.bin").exists()
    field = head.replace(b'name="image"; filename="endless.bin"', b'name="type"')
    answer = server.raw(field + b"x" * (2 * 2**20))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")


@settings(THOROUGH, max_examples=EXAMPLES["forms"])
@given(
    name=st.text(max_size=20),
    subfolder=st.text(max_size=20),
    kind=st.sampled_from(["input", "output", "temp", "user", "..", ""]) | st.text(max_size=5),
    content=st.binary(max_size=50),
)
def test_any_form(server: Running, name: str, subfolder: str, kind: str, content: bytes) -> None:
    harmless(server.upload(content, name, subfolder=subfolder, type=kind))


# --- files that are read ----------------------------------------------------------------------------------------------


@settings(THOROUGH, max_examples=EXAMPLES["pictures"])
@given(
    kind=st.sampled_from(["png", "jpeg", "webp", "bmp"]),
    place=st.floats(0, 1),
    bits=st.integers(1, 255),
    cut=st.booleans(),
)
def test_any_damage_to_a_picture(server: Running, kind: str, place: float, bits: int, cut: bool) -> None:
    out = io.BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(out, kind)
    content = bytearray(out.getvalue())
    at = int(place * (len(content) - 1))
    content = content[:at] if cut else content
    if not cut:
        content[at] ^= bits
    answer = harmless(server.upload(bytes(content), f"damaged.{kind}", overwrite="true"))
    if answer.status == 200:
        harmless(server.get(f"/view?filename=damaged.{kind}&type=input&preview=webp;70"))
        prompt = {"1": node("PreviewImage", images=["2", 0]), "2": node("LoadImage", image=f"damaged.{kind}")}
        record = server.run(prompt)
        told = dict(record["status"]["messages"])
        assert record["status"]["completed"] or "cannot be read" in told["execution_error"]["exception_message"]


def videos() -> dict[str, bytes]:
    good = (INPUTS / "vidgen-circle.mp4").read_bytes()
    return {
        "half": good[: len(good) // 2],
        "no index": good.replace(b"moov", b"junk"),
        "a size that lies": b"\xff\xff\xff\xff" + good[4:],
        "boxes in boxes": b"".join(struct.pack(">I4s", 8 * (2000 - n), b"moov") for n in range(2000)),
        "a playlist behind a box": b"\0\0\0\x08free#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
    }


@pytest.mark.parametrize("name", videos())
def test_a_video_that_is_damaged(server: Running, name: str) -> None:
    assert server.upload(videos()[name], "damaged.mp4", overwrite="true").status == 200
    prompt = {"1": node("VidGenSaveVideo", images=["2", 0], fps=8.0, filename_prefix="x", format="mp4", crf=20)}
    prompt |= {"2": node("VidGenLoadVideo", video="damaged.mp4", start_frame=0, max_frames=0)}
    assert "video" in server.error_of(prompt)


@pytest.mark.parametrize(
    "content", [b"#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile x.mp4\n"]
)
def test_a_playlist_in_the_folder_opens_nothing(server: Running, content: bytes) -> None:
    """ffmpeg knows playlists by their content, and would open whatever they name."""
    folder = server.server.places.folder("input")
    good = (INPUTS / "vidgen-circle.mp4").read_bytes()
    for name in ("secret.mp4", "x.mp4"):
        (folder / name).write_bytes(good)
    (folder / "list.mp4").write_bytes(content)
    prompt = {"1": node("SaveVideo", video=["2", 0], filename_prefix="x", format="mp4", codec="auto")}
    assert "no video" in server.error_of(prompt | {"2": node("LoadVideo", file="list.mp4")})
    assert server.run(prompt | {"2": node("LoadVideo", file="x.mp4")})["status"]["status_str"] == "success"


def test_a_video_that_would_fill_the_memory(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidgen.vidgen_core.media.read.available_memory", lambda: 100_000)
    prompt = {"1": node("SaveVideo", video=["2", 0], filename_prefix="big", format="mp4", codec="auto")}
    assert "memory" in server.error_of(prompt | {"2": node("LoadVideo", file="vidgen-circle.mp4")})


def zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    return out.getvalue()


CHECKPOINTS = {
    "a zip that unpacks to a thousand times its size": zip_bomb(),
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "a header without a bottom": struct.pack("<Q", 100_000) + b'{"a":' * 20_000,
    "tensors larger than the file": struct.pack("<Q", 60)
    + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}'[:60].ljust(60),
    "GGUF with counts that lie": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 2**62),
    "a pickle": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_in_the_output_folder(server: Running, name: str) -> None:
    """Every list of encoded prompts looks into these files."""
    started = time.monotonic()
    assert server.upload(CHECKPOINTS[name], "x.safetensors", type="output", overwrite="true").status == 200
    info = harmless(server.get("/object_info/VidGenLoadEmbeddings")).json()
    (server.server.places.folder("output") / "x.safetensors").unlink()
    names = info["VidGenLoadEmbeddings"]["input"]["required"]["embeddings_name"][0]
    assert "vidgen-prompt.safetensors" in names
    assert "x.safetensors [output]" not in names
    assert time.monotonic() - started < 20


def test_pages_are_sent_as_files(server: Running) -> None:
    for name in ("a.html", "a.svg", "a.js", "a.xml", "a.htm", "a.xhtml", "a.pdf", "a.css", "a.mhtml"):
        assert server.upload(b"<script>alert(1)</script>", name).status == 200
        answer = server.get(f"/view?filename={name}&type=input")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


# --- who may ask, and how much ----------------------------------------------------------------------------------------


def test_listening_for_others_needs_a_token(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for address in ("0.0.0.0", "::", "192.0.2.7"):
        assert main(["serve", "--listen", address, "--port", "0", "--folder", str(tmp_path), "--api-only"]) == 1
        said = capsys.readouterr().err
        assert "--token" in said or "cannot listen" in said  # not every machine has every address


CREDENTIALS: list[tuple[str, dict[str, str]]] = [
    ("", {}),
    ("?token=", {}),
    ("?token=wrong", {}),
    ("?token=sesam", {}),
    ("?token=sesame2", {}),
    ("?token=%FF%FE", {}),
    ("?token=%00", {}),
    ("", {"Authorization": "Bearer"}),
    ("", {"Authorization": "Bearer wrong"}),
    ("", {"Authorization": "Basic sesame"}),
    ("", {"Authorization": "Bearer \xff\xfe"}),
    ("", {"Cookie": "vidgen_token=wrong"}),
    ("", {"Cookie": "vidgen_token=\xff"}),
    ("", {"X-Forwarded-For": "127.0.0.1"}),
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("guarded"), listen="0.0.0.0", token="sesame") as asked:
        yield asked


@pytest.mark.parametrize(("query", "headers"), CREDENTIALS)
def test_without_the_token_there_is_nothing(guarded: Running, query: str, headers: dict[str, str]) -> None:
    for method, path in (
        ("GET", "/"),
        ("GET", "/view"),
        ("GET", "/ws"),
        ("POST", "/prompt"),
        ("POST", "/upload/image"),
    ):
        answer = guarded.ask(method, path + query, None, headers)
        assert (answer.status, answer.kind) == (401, "unauthorized")
        assert "set-cookie" not in answer.headers


def test_with_the_token_there_is_all(guarded: Running) -> None:
    assert guarded.get("/users", Authorization="Bearer sesame").status == 200
    first = guarded.get("/users?token=sesame")
    assert first.status == 200
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert guarded.get("/users", Cookie=cookie.partition(";")[0]).status == 200
    # The token does not let another site's page in.
    assert guarded.get("/users?token=sesame", Origin="https://evil.example").status == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:1234"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "0.0.0.0"}, 403),
        ({"Host": "["}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:81"}, 403),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost.evil.example"}, 403),
    ],
)
def test_the_names_under_which_a_page_may_ask(server: Running, headers: dict[str, str], status: int) -> None:
    assert server.get("/users", **headers).status == status
    # A WebSocket is a GET that only its Origin guards.
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    if status != 200:
        assert server.get("/ws", **headers, **upgrade, **{"Sec-WebSocket-Key": "x"}).status == status


def test_a_queue_that_is_full(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = {"prompt": {"1": ADD}}
    with monkeypatch.context() as patch:
        patch.setattr("vidgen.headless.server.app.MAX_WAITING", 0)
        refused(server.post("/prompt", prompt), status=429, kind="queue_full")
    with monkeypatch.context() as patch:
        patch.setattr("vidgen.headless.server.app.MAX_WAITING_BYTES", 10)
        refused(server.post("/prompt", prompt), status=429, kind="queue_full")
    with monkeypatch.context() as patch:
        patch.setattr("vidgen.headless.server.app.MAX_CLIENTS", 0)
        refused(server.get("/ws"), status=429, kind="too_many_clients")
    assert server.run(prompt["prompt"])["status"]["completed"]


def test_the_history_is_bounded_in_bytes(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand requests of 16 MB would be too much to remember."""
    server.post("/history", {"clear": True})
    monkeypatch.setattr("vidgen.headless.server.jobs.MAX_HISTORY_BYTES", 5000)
    for key in range(5):
        server.run({"1": node("Add", a=key, b=0)}, extra_data={"padding": "x" * 2000})
    assert len(server.get("/history").json()) == 2


def test_an_id_that_is_given_twice_at_once(server: Running) -> None:
    """Between the question whether it is free and taking it lies the check of the graph."""
    job_id = "0b5b8a1e-6f0f-4c1c-9a55-0a5f6f5d8f12"
    body = {"prompt": {"1": ADD}, "prompt_id": job_id}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.post("/prompt", body).status, range(16)))
    assert sorted(answers) == [200] + [409] * 15


def test_there_are_hundreds() -> None:
    by_hand = len(NO_TABLES) * len(TAKES_JSON) + len(GRAPHS) + len(WAYS_OUT) * 8 + len(HEADERS) + len(LIES)
    assert by_hand > 200
    assert sum(EXAMPLES.values()) > 300
