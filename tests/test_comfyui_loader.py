"""Load the pack the way ComfyUI does: a folder in custom_nodes, as a module named by its path, in a busy process.

Each test runs a fresh interpreter, because what is imported cannot be forgotten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vidgen

ROOT = Path(vidgen.__file__).resolve().parent

LOAD = """
import importlib.util, json, sys, types

folder = sys.argv[1]
import torch
foreign = types.ModuleType("nodes")  # ComfyUI's own
for name in ("nodes", "server", "execution", "headless", "training"):
    sys.modules[name] = foreign
before = set(sys.modules)

def load():
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
"""

HEAVY = ("transformers", "tokenizers", "imageio_ffmpeg", "PIL", "matplotlib", "aiohttp", "torchvision", "accelerate")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack as custom_nodes/comfyui-vidgen.dev: names with dashes and dots are common there."""
    folder = tmp_path_factory.mktemp("ComfyUI") / "custom_nodes" / "comfyui-vidgen.dev"
    folder.parent.mkdir()
    folder.symlink_to(ROOT, target_is_directory=True)
    return folder


def run(code: str, *arguments: object, cwd: Path) -> Any:
    """What the code prints last, as JSON. -I: neither this folder nor PYTHONPATH is searched; -B: no __pycache__."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-B", "-c", LOAD + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


IMPORT = """
import os
touched, known = [], [os.path.realpath(p) for p in (folder, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))]

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        reads = not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (reads and any(path.startswith(place + os.sep) for place in known)):
            touched.append([event, path])
    elif event.split(".")[0] in ("socket", "subprocess", "urllib", "shutil") or event in (
        "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.system", "os.posix_spawn", "os.putenv", "os.fork"
    ):
        touched.append([event, str(arguments)])

def no_device(*_, **__):
    raise AssertionError("a device was asked while importing")

for name in ("is_available", "device_count", "current_device", "get_device_properties", "init"):
    setattr(torch.cuda, name, no_device)
handlers = list(__import__("logging").getLogger().handlers)
sys.addaudithook(watch)
module = load()
seen, watched = list(touched), sys.modules.keys() - before
print(json.dumps({
    "touched": seen,
    "new": sorted(watched),
    "nodes": sys.modules["nodes"] is foreign,
    "handlers": handlers == __import__("logging").getLogger().handlers,
    "ids": sorted(module.NODE_CLASS_MAPPINGS),
    "web": os.path.isdir(os.path.join(folder, module.WEB_DIRECTORY)),
    "named": module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys(),
}))
"""


@pytest.fixture(scope="module")
def imported(pack: Path) -> dict[str, Any]:
    return run(IMPORT, pack, cwd=pack.parent)


def test_it_loads_beside_a_foreign_nodes_module(imported: dict[str, Any]) -> None:
    assert imported["nodes"]
    assert imported["named"]
    assert imported["web"]
    assert imported["ids"] == sorted(vidgen.NODE_CLASS_MAPPINGS)


def test_importing_touches_nothing(imported: dict[str, Any]) -> None:
    """No network, no process, no file outside the pack and Python itself, no logging set up; no device is asked."""
    assert imported["touched"] == []
    assert imported["handlers"]


def test_importing_brings_no_heavy_library(imported: dict[str, Any]) -> None:
    """Time is not measured here: what is not imported takes none. Beyond torch it is our own few modules."""
    tops = {name.partition(".")[0] for name in imported["new"]}
    assert tops.isdisjoint(HEAVY)
    ours = [name for name in imported["new"] if "comfyui-vidgen_x_dev" in name]
    assert len(ours) < 20


def test_no_module_of_ours_takes_a_common_name(imported: dict[str, Any]) -> None:
    """ComfyUI and other packs have their own `nodes`, `training`, `headless`."""
    common = {"nodes", "headless", "training", "vidgen_core", "vidgen", "benchmarks"}
    assert common.isdisjoint(name for name in imported["new"] if "/" not in name)


RUN = """
bundle = sys.argv[2]
module = load()
N = module.NODE_CLASS_MAPPINGS

def call(name, **inputs):
    cls = N[name]
    cls.INPUT_TYPES()
    result = getattr(cls(), cls.FUNCTION)(**inputs)
    return result["ui"] if isinstance(result, dict) else result

model, vae, text = call("VidGenLoadAll", model_folder=bundle, weight_dtype="auto")
conds = [call("VidGenEncodePrompt", text_encoders=text, prompt=p, template="video")[0] for p in ("a red star", "")]
(latent,) = call("VidGenEmptyLatent", vae=vae, width=32, height=32, num_frames=5, batch_size=1)
(latent,) = call("VidGenSampler", model=model, positive=conds[0], negative=conds[1], latent=latent, seed=1, steps=2,
                 cfg=2.0, guidance=0.0, shift=0.0, sampler="auto", schedule="auto", denoise=1.0, node_id="3")
(images,) = call("VidGenDecode", vae=vae, latent=latent)
shown = call("VidGenSaveVideo", images=images, fps=8.0, filename_prefix="video/VidGen", format="mp4", crf=17,
             prompt={"1": {}}, extra_pnginfo={"workflow": {}})
again, fps, number, sound = call("VidGenLoadVideo", video="output/video/VidGen_00001.mp4", start_frame=0, max_frames=0)
print(json.dumps({"shown": shown, "shape": list(again.shape), "nodes": sys.modules["nodes"] is foreign,
                  "known": "vidgen" in sys.modules or "vidgen_core" in sys.modules}))
"""


def test_the_node_functions_run(pack: Path, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    result = run(RUN, pack, tiny_bundle_dir, cwd=tmp_path)
    image = {"filename": "VidGen_00001.mp4", "subfolder": "video", "type": "output"}
    assert result["shown"] == {"images": [image], "animated": [True]}
    assert result["shape"] == [5, 32, 32, 3]
    assert result["nodes"]
    assert not result["known"]


OFFER = """
offered = []

class Routes:
    def post(self, address):
        return lambda handler: offered.append(address)

server = types.ModuleType("server")
server.PromptServer = types.SimpleNamespace(instance=types.SimpleNamespace(routes=Routes()))
sys.modules["server"] = server
for name in ("comfy", "comfy.model_management"):
    sys.modules[name] = types.ModuleType(name)
load()
print(json.dumps(offered))
"""


def test_comfyuis_server_is_offered_the_plan(pack: Path) -> None:
    assert run(OFFER, pack, cwd=pack.parent) == ["/vidgen/plan"]


def test_the_bare_init_file_is_harmless() -> None:
    """pytest and some tools run the root's __init__.py on its own, as a module without a package."""
    code = "import runpy, sys; print(sorted(runpy.run_path(sys.argv[1])['__name__']) != [])"
    done = subprocess.run([sys.executable, "-I", "-c", code, ROOT / "__init__.py"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_mappings_can_be_read_without_running() -> None:
    """ComfyUI-Manager finds the nodes of a pack by parsing its source."""
    import ast

    tree = ast.parse((ROOT / "__init__.py").read_text("utf-8"))
    dicts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "NODE_CLASS_MAPPINGS"
    ]
    assert len(dicts) == 1
    assert isinstance(dicts[0], ast.Dict)
    assert [ast.literal_eval(key) for key in dicts[0].keys if key] == list(vidgen.NODE_CLASS_MAPPINGS)
