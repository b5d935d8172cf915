"""Who may import whom, read from the source with `ast`: nothing is imported, nothing runs.

The table below is the law and `docs/ARCHITECTURE.md` draws it. Each rule has a planted violation, so that a
checker which has gone blind fails as loudly as a bad import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ("benchmarks", "headless", "nodes", "training", "vidgen_core")
BASE = frozenset({"types", "errors"})
MATHS = frozenset({"diffusion", "timesteps", "noise", "guidance", "finite", "sampling"})
PARTS = frozenset({"codec", "weights", "memory"})
TRICKS = frozenset({"blocks", "caching", "tricks", "windows"})
FAMILIES = frozenset({"hunyuan", "cogvideox", "svd", "pixeldance", "snapvideo"})

MAY_IMPORT: dict[str, frozenset[str]] = {
    # the core, from the ground up; a unit is a module or a folder of vidgen_core
    "errors": frozenset(),
    "types": frozenset({"errors"}),
    "stop": frozenset(),
    "diffusion": BASE,
    "noise": BASE,
    "timesteps": BASE | {"diffusion"},
    "guidance": BASE | {"diffusion"},
    "finite": frozenset(),
    "sampling": BASE | {"diffusion", "noise", "finite", "timesteps"},
    "codec": BASE,
    "memory": BASE | {"stop"},
    "weights": BASE | {"memory"},
    "media": BASE | {"memory", "weights"},
    "nn": BASE | {"stop"},
    "text": BASE | {"weights"},
    "tiling": BASE | {"codec"},
    "bounded": BASE | {"codec", "memory", "nn"},
    "preview": BASE | {"codec"},
    "embeddings": BASE | PARTS | {"families", "text"},
    "health": BASE | {"codec", "memory", "finite"},
    "resume": BASE | {"finite", "sampling"},
    "block_names": BASE,
    "caching": BASE,
    "windows": BASE,
    "blocks": BASE | {"block_names", "caching", "families", "nn"},
    "tricks": BASE | {"blocks", "caching", "diffusion", "families", "windows"},
    "lora": BASE | {"block_names", "weights"},
    "families": BASE | MATHS | PARTS | {"nn", "text", "keyframes", "families.*"},
    "families.*": BASE | MATHS | PARTS | {"nn", "text", "keyframes", "families"},
    "keyframes": BASE | {"codec"},
    "model": BASE | MATHS | PARTS | TRICKS | {"families", "lora", "nn", "preview", "text"},
    "bundle": BASE | PARTS | {"families", "model", "preview"},
    "planning": BASE | MATHS | PARTS | {"bounded", "families", "model", "tiling"},
    "generate": BASE
    | MATHS
    | PARTS
    | TRICKS
    | {"bounded", "bundle", "families", "health", "keyframes", "model", "nn", "preview", "resume", "tiling"},
    # the front ends; "core" is any unit above. The headless host runs the nodes and starts the training.
    "nodes": frozenset({"core"}),
    "training": frozenset({"core"}),
    "headless": frozenset({"core", "nodes", "training", "root"}),
    "benchmarks": frozenset({"core", "headless", "training"}),
    "root": frozenset({"nodes", "headless"}),
}
FRONT_ENDS = frozenset({"nodes", "training", "headless", "benchmarks", "root"})

NEVER = {
    "torchvision": "its binaries must match torch's exactly; one mismatch hides the pack",
    "torchaudio": "its binaries must match torch's exactly; one mismatch hides the pack",
    "torchcodec": "its binaries must match torch's exactly; one mismatch hides the pack",
    "diffusers": "it is an oracle of the tests and what benchmarks compare with, not a part of the product",
}
MEASURED_AGAINST = frozenset({"diffusers"})
"""what benchmarks may import inside the functions that run it"""
COMFYUI = frozenset(
    {"app", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras"}
    | {"execution", "folder_paths", "latent_preview", "node_helpers", "server"}
)
COMFYUI_DOOR = "nodes/host.py"
OURS = frozenset((*PACKAGES, "vidgen", "tests"))
HEAVY = frozenset(
    {"accelerate", "aiohttp", "cv2", "imageio_ffmpeg", "matplotlib", "ray"}
    | {"sentencepiece", "tensorboard", "tokenizers", "transformers"}
)
"""Libraries that are imported inside the function that needs them, so that importing the pack stays cheap."""
AT_HOME = {"aiohttp": "headless/server/"}
"""where such a library may be imported at the top, because nothing else imports that folder before it is needed"""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module: dotted for an absolute import, a path from the repository root for a relative one."""

    line: int
    target: tuple[str, ...]
    relative: bool
    at_import: bool
    """it runs when the module is imported: not inside a function, not under TYPE_CHECKING"""


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node with whether it runs at import."""
    for child in ast.iter_child_nodes(node):
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield child, at_import
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                yield statement, False
                yield from walk(statement, False)
            for statement in child.orelse:
                yield statement, at_import
                yield from walk(statement, at_import)
            continue
        yield from walk(child, at_import and not deferred)


def dynamic_target(node: ast.Call) -> str | None:
    """The module named by ``import_module("x")`` or ``__import__("x")``, where it is a literal."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    if name not in ("import_module", "__import__", "find_spec") or not node.args:
        return None
    literal = node.args[0]
    return literal.value if isinstance(literal, ast.Constant) and isinstance(literal.value, str) else None


def imports(path: str, source: str) -> Iterator[Import]:
    package = path.split("/")[:-1]
    for node, at_import in walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, tuple(alias.name.split(".")), False, at_import)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level == 0:
                yield Import(node.lineno, tuple(module), False, at_import)
                continue
            kept = len(package) - (node.level - 1)
            base = [*package[:kept], *module] if kept >= 0 else [".."]
            for alias in node.names:
                yield Import(node.lineno, (*base, alias.name), True, at_import)
        elif isinstance(node, ast.Call):
            target = dynamic_target(node)
            if target and not target.startswith("."):
                yield Import(node.lineno, tuple(target.split(".")), False, at_import)


def unit(target: tuple[str, ...]) -> str:
    """The row of the table a path belongs to, and `families.NAME` for a file of one family."""
    if target[0] != "vidgen_core":
        return target[0] if target[0] in PACKAGES else "root"
    if len(target) == 1 or target[1] == "__init__":
        return "vidgen_core"
    is_family = target[1] == "families" and len(target) > 2 and target[2] in FAMILIES
    return f"families.{target[2]}" if is_family else target[1]


def direction(path: str, item: Import) -> str | None:
    """Why a relative import goes the wrong way, or None."""
    if item.target[0] == "..":
        return "climbs out of the package"
    here, there = unit(tuple(path.removesuffix(".py").split("/"))), unit(item.target)
    if here == there or here == "vidgen_core" == there:
        return None
    row = "families.*" if here.startswith("families.") else here
    column = "families.*" if there.startswith("families.") else there
    if row not in MAY_IMPORT:
        return f"`{here}` is not in the table of tests/test_architecture.py; give it a row"
    allowed = MAY_IMPORT[row]
    is_core = column not in FRONT_ENDS
    if column in allowed or ("core" in allowed and is_core):
        return None
    return f"`{here}` must not import `{there}`"


def guard(path: str, item: Import) -> str | None:
    """Why an absolute import is forbidden, or None."""
    top = item.target[0]
    if top in NEVER and not (top in MEASURED_AGAINST and path.startswith("benchmarks/") and not item.at_import):
        return f"`{top}` is never imported: {NEVER[top]}"
    if top in OURS:
        return f"`{top}` is imported by an absolute name; use a relative import"
    if top in COMFYUI and path != COMFYUI_DOOR:
        return f"`{top}` is ComfyUI's; only {COMFYUI_DOOR} may import it"
    is_at_home = top in AT_HOME and path.startswith(AT_HOME[top])
    if top in COMFYUI | HEAVY and item.at_import and not is_at_home:
        return f"`{top}` is imported while the module loads; import it inside the function that needs it"
    return None


def violations(path: str, source: str) -> list[str]:
    """What is wrong with one file of the package, one line each."""
    check = {True: direction, False: guard}
    found = ((item.line, check[item.relative](path, item)) for item in imports(path, source))
    return [f"{path}:{line}: {why}" for line, why in found if why]


def package_files() -> list[Path]:
    return [*ROOT.glob("*.py"), *(file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py")))]


def test_imports_go_one_way() -> None:
    files = package_files()
    assert len(files) > len(PACKAGES)
    found = [line for file in files for line in violations(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_tests_never_import_what_the_product_may_not() -> None:
    """diffusers is allowed here; the libraries tied to one torch build are not."""
    found = [
        f"{file.name}:{item.line}: {item.target[0]}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for item in imports(file.name, file.read_text("utf-8"))
        if not item.relative and item.target[0] in NEVER.keys() - {"diffusers"}
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("vidgen_core/sampling.py", "from .families import FAMILIES", "must not import `families`"),
        ("vidgen_core/sampling.py", "def f():\n    from .families.hunyuan import FAMILY", "must not import"),
        ("vidgen_core/families/hunyuan/codec.py", "from ...nodes import host", "must not import `nodes`"),
        ("vidgen_core/families/svd/vae.py", "from ..hunyuan.vae import CausalVAE", "must not import"),
        ("vidgen_core/memory/plan.py", "from ..model import VideoModel", "must not import `model`"),
        ("vidgen_core/nn/rope.py", "from ..diffusion import Diffusion", "must not import `diffusion`"),
        ("vidgen_core/errors.py", "from .types import Grid", "must not import `types`"),
        ("vidgen_core/magic.py", "from .types import Grid", "give it a row"),
        ("vidgen_core/types.py", "from ..... import anything", "climbs out"),
        ("nodes/sampler.py", "from ..headless import executor", "must not import `headless`"),
        ("training/loop.py", "from .. import nodes", "must not import `nodes`"),
        ("training/loop.py", "import vidgen_core.types", "absolute name"),
        ("headless/executor.py", "import nodes", "absolute name"),
        ("headless/cli.py", "from vidgen.training import loop", "absolute name"),
        ("headless/cli.py", "import torchvision.io", "never imported"),
        ("training/loop.py", "def f():\n    from torchaudio import load", "never imported"),
        ("nodes/video.py", "import importlib\nx = importlib.import_module('torchcodec')", "never imported"),
        ("vidgen_core/model.py", "def f():\n    import diffusers", "never imported"),
        ("benchmarks/render.py", "import diffusers", "never imported"),
        ("benchmarks/render.py", "def f():\n    import torchvision", "never imported"),
        ("nodes/loaders.py", "def f():\n    import folder_paths", "only nodes/host.py"),
        ("vidgen_core/generate.py", "def f():\n    import comfy.utils", "only nodes/host.py"),
        ("nodes/host.py", "import comfy.utils", "while the module loads"),
        ("vidgen_core/text/llama.py", "import transformers", "while the module loads"),
        (
            "vidgen_core/media.py",
            "try:\n    import imageio_ffmpeg\nexcept ImportError:\n    pass",
            "while the module loads",
        ),
        ("vidgen_core/media.py", "class A:\n    import cv2", "while the module loads"),
        ("training/loop.py", "if x:\n    pass\nelse:\n    import matplotlib.pyplot", "while the module loads"),
    ],
)
def test_a_planted_violation_is_caught(path: str, source: str, why: str) -> None:
    found = violations(path, source)
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nodes/host.py", "def f():\n    import comfy.model_management, folder_paths"),
        ("vidgen_core/text/llama.py", "def f():\n    from transformers import LlamaConfig"),
        ("vidgen_core/text/llama.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("vidgen_core/families/hunyuan/codec.py", "from ...codec import Codec\nfrom .config import CodecConfig"),
        ("vidgen_core/generate.py", "from .model import VideoModel\nfrom .sampling import sample"),
        ("headless/cli.py", "def f():\n    from ..training import loop\n    from .executor import run"),
        ("benchmarks/render.py", "from ..vidgen_core.generate import generate"),
        ("benchmarks/render.py", "def f():\n    from diffusers import FluxPipeline"),
        ("__init__.py", "if __package__:\n    from .nodes import NODE_CLASS_MAPPINGS"),
    ],
)
def test_the_checker_gives_no_false_alarm(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_every_row_of_the_table_names_rows() -> None:
    """A typo in the table would allow nothing or everything without a sound."""
    named = {name for row in MAY_IMPORT.values() for name in row}
    assert named <= MAY_IMPORT.keys() | {"core"}


def test_every_family_folder_is_known() -> None:
    """Or its imports would be judged as those of the registry."""
    folders = {file.parent.name for file in (ROOT / "vidgen_core" / "families").glob("*/__init__.py")}
    assert folders <= FAMILIES


def test_no_module_is_a_drawer() -> None:
    """A file called `utils` says nothing about what is in it; name the thing."""
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [file for file in package_files() if file.name in drawers] == []
