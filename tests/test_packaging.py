"""What pip, ComfyUI-Manager and a cold start see: the package list, the data files, the dependencies, the imports."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "accelerate",
    "aiohttp",
    "cv2",
    "diffusers",
    "imageio_ffmpeg",
    "matplotlib",
    "ray",
    "sentencepiece",
    "transformers",
)
PACKAGE_FOLDERS = ("benchmarks", "headless", "nodes", "training", "vidgen_core")
IMPORT_NAMES = {"imageio-ffmpeg": "imageio_ffmpeg", "pillow": "PIL"}
"""Where a distribution's import name is not its own."""


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def folders_with_code() -> set[str]:
    inits = (file for name in PACKAGE_FOLDERS for file in (ROOT / name).rglob("__init__.py"))
    return {".".join(("vidgen", *file.parent.relative_to(ROOT).parts)) for file in inits}


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    """A forgotten one works from a checkout and is missing from the wheel."""
    assert set(pyproject["tool"]["setuptools"]["packages"]) == {"vidgen"} | folders_with_code()


def test_every_folder_with_code_is_a_package() -> None:
    bare = {
        file.parent.relative_to(ROOT).as_posix()
        for name in PACKAGE_FOLDERS
        for file in (ROOT / name).rglob("*.py")
        if not (file.parent / "__init__.py").exists()
    }
    assert not bare


@pytest.mark.parametrize("folder", ["locales", "models", "training/recipes", "web", "workflows"])
def test_every_data_file_is_in_the_wheel(pyproject: dict[str, Any], folder: str) -> None:
    patterns = pyproject["tool"]["setuptools"]["package-data"]["vidgen"]
    shipped = {file for pattern in patterns for file in ROOT.glob(pattern)}
    present = {file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file.relative_to(ROOT).as_posix() for file in present - shipped} == set()


def test_requirements_txt_says_the_same(pyproject: dict[str, Any]) -> None:
    """ComfyUI-Manager installs requirements.txt, pip reads pyproject.toml."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if line.strip()] == pyproject["project"]["dependencies"]


def imported_modules(source: str) -> set[str]:
    """Top-level names of the absolute imports of a file, wherever in it they stand."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def dependency_names(lines: list[str]) -> set[str]:
    found = (re.match(r"[A-Za-z0-9_.-]+", line) for line in lines)
    return {match.group().lower() for match in found if match}


def test_dependencies_are_what_the_code_imports(pyproject: dict[str, Any]) -> None:
    """Nothing is imported that is not declared, and nothing is declared that nobody uses."""
    files = [*ROOT.glob("*.py"), *(file for name in PACKAGE_FOLDERS for file in (ROOT / name).rglob("*.py"))]
    used = set().union(*(imported_modules(file.read_text("utf-8")) for file in files))
    used -= set(sys.stdlib_module_names) | {"_typeshed"}  # the latter exists for type checkers only
    comfyui = imported_modules((ROOT / "nodes" / "host.py").read_text("utf-8"))
    project = pyproject["project"]
    core = dependency_names(project["dependencies"])
    optional = dependency_names(
        [line for name in ("bench", "ray", "serve", "train") for line in project["optional-dependencies"][name]]
    )
    declared = {IMPORT_NAMES.get(name, name) for name in core | optional}
    assert used - comfyui - declared == set()
    assert {name for name in core if IMPORT_NAMES.get(name, name) not in used} == set()


def test_nothing_tied_to_one_torch_build_is_required(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    every = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    assert dependency_names(every).isdisjoint({"torchvision", "torchaudio", "torchcodec", "xformers", "triton"})
    torch = [line for line in every if line.startswith("torch>") or line == "torch"]
    assert torch == ["torch>=2.6"]  # a floor and no ceiling: the user's torch is the user's


def test_comfy_section_is_complete(pyproject: dict[str, Any]) -> None:
    comfy = pyproject["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= comfy.keys()
    assert pyproject["project"]["version"]


def test_every_place_says_the_same_version(pyproject: dict[str, Any]) -> None:
    version = pyproject["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f'__version__ = "{version}"' in (ROOT / "__init__.py").read_text("utf-8")


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md", "docs/BATCH.md", "docs/FAMILIES.md", "docs/TRAINING.md"],
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    file = ROOT / document
    links = re.findall(r"\]\(([^)#\s]+)", file.read_text("utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (file.parent / link).exists()] == []


def drawn_paths(page: str) -> set[str]:
    """The paths of an indented file tree: two spaces a level, a name, two or more spaces, a phrase."""
    folders: list[str] = []
    found = set()
    for line in page.split("```")[1].strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = [*folders[:depth], name.rstrip("/")]
        found.add("/".join(folders))
    return found


def test_the_tree_of_the_architecture_page_is_the_tree() -> None:
    """Everything drawn exists, and every unit of the core is drawn."""
    drawn = drawn_paths((ROOT / "docs" / "ARCHITECTURE.md").read_text("utf-8"))
    assert {path for path in drawn if not (ROOT / path).exists()} == set()
    units = {path for path in (ROOT / "vidgen_core").iterdir() if not path.name.startswith("__")}
    assert {path.relative_to(ROOT).as_posix() for path in units} <= drawn


IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import vidgen
for module in pkgutil.walk_packages(vidgen.__path__, "vidgen."):
    # The server's modules are imported by `vidgen serve` alone, and are about aiohttp.
    is_server = module.name.startswith("vidgen.headless.server")
    if module.name.split(".")[1] in {folders} and not is_server and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch
print(json.dumps([sorted(set(sys.modules) & {heavy}), torch.cuda.is_initialized()]))
"""


def test_importing_every_module_loads_nothing_heavy() -> None:
    """One broken optional library must not hide the pack; a cold start must stay cheap."""
    code = IMPORT_EVERYTHING.format(folders=set(PACKAGE_FOLDERS), heavy=set(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], False]
