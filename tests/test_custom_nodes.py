"""`--custom-nodes`: packs of strangers, those that load and those that cannot, for the command line and the server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.custom_nodes import PACKAGE, Packs, load_packs, own_packs
from vidgen.headless.graph import to_ui
from vidgen.headless.server.app import Server, ServerSettings
from vidgen.headless.server.start import new_server
from vidgen.vidgen_core.errors import FileError

sys.path.insert(0, str(Path(__file__).parent))
import batch_work as work

GOOD = """
class Count:
    RETURN_TYPES = ("INT",)
    FUNCTION = "count"
    CATEGORY = "tests"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"n": ("INT", {"default": 1, "step": {1}})}}
    def count(self, n):
        return (n,)
NODE_CLASS_MAPPINGS = {NAME: Count}
"""


@pytest.fixture(autouse=True)
def _forget_packs() -> Iterator[None]:
    """Packs of one test are none of the next."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(PACKAGE):
            del sys.modules[name]


def pack(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.py" if "/" not in name else folder / name / "__init__.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file


def good(node_id: str) -> str:
    return GOOD.replace("NAME", repr(node_id))


def test_a_pack_with_modules_and_pages_loads() -> None:
    packs = load_packs([work.LAB], own_packs())
    assert packs.problems == []
    assert set(packs.classes) - set(own_packs().classes) == {"LabLoad", "LabDraw", "LabKeep"}
    assert packs.titles["LabDraw"] == "Draw Numbers"
    assert packs.titles["LabKeep"] == "LabKeep"
    assert packs.modules["LabDraw"] == "custom_nodes.lab"
    assert packs.web == {"lab": work.LAB / "web"}
    drawn = to_ui(work.workflow(), packs.classes)  # also with names and lists that are not quite as they should be
    assert drawn["nodes"][1]["outputs"][0]["name"] == "numbers"
    assert "torch" in sys.modules[packs.classes["LabDraw"].__module__].__dict__


def test_a_folder_is_searched_for_packs_and_what_sleeps_is_left_alone(tmp_path: Path) -> None:
    pack(tmp_path, "single", good("Single"))
    pack(tmp_path, "some-pack 2.0/", good("Dashed"))
    pack(tmp_path, "old.disabled/", good("Asleep"))
    pack(tmp_path, ".hidden/", good("Hidden"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "readme.txt").write_text("no pack")
    packs = load_packs([tmp_path], Packs())
    assert set(packs.classes) == {"Single", "Dashed"}
    assert packs.modules == {"Single": "custom_nodes.single", "Dashed": "custom_nodes.some-pack 2.0"}
    assert packs.problems == []
    again = load_packs([tmp_path / "single.py", tmp_path / "some-pack 2.0"], Packs())
    assert again.classes == packs.classes  # the very classes: a module is not run a second time


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import folder_paths", "need ComfyUI itself (they import folder_paths)"),
        ("from comfy.utils import x", "need ComfyUI itself (they import comfy"),
        ("import surely_not_installed.part", "the package surely_not_installed is not installed"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('bye')", "SystemExit: bye"),
        ("x = 1", "no NODE_CLASS_MAPPINGS"),
        ("async def comfy_entrypoint(): pass", "V3 API"),
        (good("Good") + "NODE_CLASS_MAPPINGS['Bad'] = Count()", "The node Bad of one cannot be used: it is no class"),
        (good("VidGenSampler"), "a node of this name is there already"),
        (good("Bad").replace('FUNCTION = "count"', 'FUNCTION = "run"'), "FUNCTION names no method"),
        (good("Bad").replace('("INT",)\n', '"INT"\n'), "no list of RETURN_TYPES"),
        (good("Bad").replace("return {", "return missing or {"), "INPUT_TYPES cannot be read (NameError"),
        (good("Bad").replace('{"default": 1, "step": {1}}', "5"), "no tables"),
        (good("Good") + "WEB_DIRECTORY = '../other'", "The pages of one cannot be used"),
    ],
)
def test_what_cannot_be_loaded_is_told_and_the_others_load(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "other").mkdir()
    pack(tmp_path, "one/", text)
    pack(tmp_path, "two", good("Two"))
    packs = load_packs([tmp_path], own_packs())
    (problem,) = packs.problems
    assert words in problem
    assert "Two" in packs.classes
    assert "Bad" not in packs.classes
    assert packs.classes["VidGenSampler"] is vidgen.NODE_CLASS_MAPPINGS["VidGenSampler"]
    assert packs.web == {}


def test_two_packs_of_one_name_do_not_mix(tmp_path: Path) -> None:
    pack(tmp_path / "a", "same/", good("First"))
    pack(tmp_path / "b", "same/", good("Second"))
    packs = load_packs([tmp_path / "a", tmp_path / "b"], Packs())
    assert set(packs.classes) == {"First"}
    assert "another pack of this name" in packs.problems[0]


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such folder of nodes"):
        load_packs([tmp_path / "nowhere"], Packs())


def test_nothing_is_loaded_that_was_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(tmp_path, "custom_nodes/sly/", "raise SystemExit('loaded')")
    monkeypatch.chdir(tmp_path)
    server = new_server(ServerSettings(folder=tmp_path, has_page=False))
    assert server.packs.problems == []
    assert not [name for name in sys.modules if name.startswith(f"{PACKAGE}_sly")]


# --- the command line and the server ----------------------------------------------------------------------------------


def test_render_runs_a_graph_of_strangers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(tmp_path, "packs/broken/", "import comfy")
    for file, graph in (("api.json", work.workflow()), ("ui.json", to_ui(work.workflow(), work.lab_classes()))):
        (tmp_path / file).write_text(json.dumps(graph))
        options = ["--custom-nodes", str(work.LAB), "--custom-nodes", str(tmp_path / "packs"), "-o", str(tmp_path)]
        assert main(["render", str(tmp_path / file), *options, "--set", "LabDraw.seed=3"]) == 0
        said = capsys.readouterr()
        assert "The nodes of broken cannot be loaded: they need ComfyUI itself" in said.err
        numbers = Path(said.out.strip()).read_text().split()
        assert len(numbers) == 64


def test_the_server_has_nodes_pages_and_help_of_packs(tmp_path: Path) -> None:
    pack(tmp_path, "packs/broken/", "import comfy")
    pack(tmp_path, "packs/flaky", good("Flaky") + FLAKY)
    places = [work.LAB, tmp_path / "packs"]
    server = new_server(ServerSettings(folder=tmp_path, has_page=False, custom_nodes=places))
    assert len(server.packs.problems) == 1

    async def conversation(client: Any, server: Server) -> None:
        listed = await (await client.get("/extensions")).json()
        assert "/extensions/lab/lab.js" in listed
        assert "labWasHere" in await (await client.get("/extensions/lab/lab.js")).text()
        assert "# Draw" in await (await client.get("/extensions/lab/docs/LabDraw.md")).text()
        assert (await client.get("/extensions/lab/..%2f__init__.py")).status in (403, 404)
        info = await (await client.get("/object_info")).json()
        assert info["LabDraw"]["python_module"] == "custom_nodes.lab"
        assert info["LabDraw"]["display_name"] == "Draw Numbers"
        assert info["LabDraw"]["input"]["required"]["mood"][0] == ["good", "bad", "stubborn"]
        assert info["LabDraw"]["output_name"] == ["numbers"]
        assert "Flaky" in info  # also what JSON has no word for
        server.classes["Flaky"].is_tired = True  # type: ignore[attr-defined]
        info = await (await client.get("/object_info")).json()
        assert "Flaky" not in info
        assert "VidGenSampler" in info
        server.classes["Flaky"].is_tired = False  # type: ignore[attr-defined]
        wrong = {**work.workflow(), "4": {"class_type": "Flaky", "inputs": {"n": 1}}}
        refused = await client.post("/prompt", json={"prompt": wrong})
        said = (await refused.json())["node_errors"]["4"]["errors"]
        assert [one["type"] for one in said] == ["exception_during_validation"]
        answer = await client.post("/prompt", json={"prompt": work.workflow()})
        prompt_id = (await answer.json())["prompt_id"]
        for _ in range(100):
            record = (await (await client.get(f"/history/{prompt_id}")).json()).get(prompt_id)
            if record is not None:
                break
            await asyncio.sleep(0.05)
        (file,) = record["outputs"]["3"]["files"]
        assert len((await (await client.get("/view", params=file)).text()).split()) == 64

    async def whole() -> None:
        async with TestClient(TestServer(server.application())) as client:
            await asyncio.wait_for(conversation(client, server), 60)

    asyncio.run(whole())


FLAKY = """
def inputs(cls):
    if cls.is_tired:
        raise RuntimeError("tired")
    return {"required": {"n": ("INT", {"default": 1, "step": {1}})}}
def validate(cls, n):
    raise RuntimeError("cannot say")
Count.is_tired = False
Count.OUTPUT_NODE = True
Count.INPUT_TYPES = classmethod(inputs)
Count.VALIDATE_INPUTS = classmethod(validate)
"""
