"""Who runs the nodes: ComfyUI or this process itself. The only file that imports ComfyUI, and only inside functions.

Nodes ask :func:`current` for the core's host (device, room, progress, preview, cancel) and for what only nodes
need: lists for the combos, input files, and where a video is saved.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..vidgen_core.embeddings import PART
from ..vidgen_core.errors import FileError, UserError
from ..vidgen_core.memory.host import FOLDERS, Host, LocalHost, bundled_folder, bundled_models, folders_of
from ..vidgen_core.weights.header import read_header
from ..vidgen_core.weights.lora import holds_lora
from ..vidgen_core.weights.shards import INDEX, checkpoints_in, shards_of

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("vidgen")

EMBEDDINGS_FOLDER = Path("embeddings") / "vidgen"
"""under ``models/``"""
VIDEO_ENDINGS = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp"})
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
EXAMPLES = Path(__file__).resolve().parents[1] / "workflows" / "inputs"
"""what the shipped workflows read, so that they run before anything is uploaded"""


class NodeHost(Host, Protocol):
    """The core's host and what nodes need besides."""

    def names(self, kind: str) -> list[str]:
        """Checkpoints of ``kind`` (a key of ``FOLDERS``) for a loader's list, the bundled ones first."""
        ...

    def text_folders(self) -> list[Path]:
        """The folders of text encoders, whose ``llama`` and ``clip`` may hold tokenizers."""
        ...

    def find_tokenizers(self, name: str) -> Path:
        """The folder of tokenizers that the user calls ``name``; FileError if there is none."""
        ...

    def model_folders(self) -> dict[str, Path]:
        """name -> folder that holds all parts of a model, the bundled ones first."""
        ...

    def find_model_folder(self, name: str) -> Path:
        """The folder that the user calls ``name``, or the file of a network in it; FileError if there is none."""
        ...

    def inputs(self, endings: Collection[str]) -> list[str]:
        """Names for the list of Load Video or Load Image: files with one of these endings, the examples last."""
        ...

    def find_input(self, name: str) -> Path:
        """The file of an input video or image; FileError if there is none."""
        ...

    def ending(self, chosen: str) -> str:
        """The ending (``mp4``) that a file saved with ``chosen`` will have: one exact output file has its own."""
        ...

    def output_path(self, prefix: str, suffix: str) -> tuple[Path, str]:
        """(file to write, its folder relative to the output folder); the file does not exist yet, its folder does.
        Without a suffix it is a folder to make."""
        ...

    def embeddings(self) -> dict[str, Path]:
        """name -> file of encoded prompts: those in ``models/embeddings/vidgen``, those in the output folder, then the
        examples."""
        ...

    def find_embeddings(self, name: str) -> Path:
        """The file of encoded prompts that the user calls ``name``; FileError if there is none."""
        ...

    def embeddings_path(self, prefix: str) -> tuple[Path, str]:
        """As :meth:`output_path`, for encoded prompts."""
        ...

    def scratch_folder(self) -> Path:
        """Where large temporary files may lie."""
        ...

    def keeps_metadata(self) -> bool:
        """Whether the workflow goes into the files."""
        ...

    def resume_path(self, node_id: str) -> Path | None:
        """Where the node keeps an interrupted run, a file or a folder of them; None if runs are not kept."""
        ...

    def result_saved(self) -> None:
        """A video is safe in its file: the runs that led to it need not be kept."""
        ...

    def manage(self, module: Any) -> None:
        """A part of a model was loaded: from now on it may be moved off the device when others need the room."""
        ...

    def need(self, module: Any) -> None:
        """A part is about to run: bring it back to the device if it was moved off."""
        ...


_host: ContextVar[NodeHost | None] = ContextVar("vidgen_host", default=None)


def current() -> NodeHost:
    """The host set with :func:`using`, else ComfyUI's where it runs, else a plain local one."""
    host = _host.get()
    if host is not None:
        return host
    # ComfyUI has loaded its model manager long before any pack; merely being installable does not count.
    return ComfyHost() if "comfy.model_management" in sys.modules else LocalNodeHost()


@contextmanager
def using(host: NodeHost) -> Iterator[NodeHost]:
    """Run the nodes of this thread under ``host``."""
    token = _host.set(host)
    try:
        yield host
    finally:
        _host.reset(token)


# --- what both hosts share ------------------------------------------------------------------------------------------


def bundled_names(kind: str) -> list[str]:
    """``model/file`` of each bundled checkpoint of ``kind``; told from the headers, so a damaged file is left out."""
    names = []
    for model, folder in bundled_models().items():
        for path in sorted(bundled_folder(kind, folder).glob("*.safetensors")):
            try:
                header = read_header(path)
            except UserError:  # it must not hide the others; loading it by name says what is wrong
                continue
            found = "lora" if holds_lora(header.tensors) else header.metadata.get("vidgen.part")
            if found == kind:
                names.append(f"{model}/{path.name}")
    return names


def checkpoints_below(place: Path) -> list[Path]:
    """Every checkpoint in a folder and the folders in it; a set of shards counts once."""
    folders = [place, *(path for path in sorted(place.glob("**/*")) if path.is_dir())] if place.is_dir() else []
    return [path for folder in folders for path in checkpoints_in(folder)]


def shards_below(place: Path) -> list[Path]:
    """The shards of the sets among :func:`checkpoints_below`."""
    return [path for index in place.glob(f"**/*{INDEX}") for path in shards_of(index)]


def folders_with_checkpoints(root: Path) -> list[Path]:
    """The folders in ``root`` that hold checkpoints, or folders with them, as diffusers lays a model out."""
    folders = subfolders(root) if root.is_dir() else []
    return [folder for folder in folders if checkpoints_in(folder) or any(map(checkpoints_in, subfolders(folder)))]


def subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def find_bundled(kind: str, name: str) -> Path | None:
    model, _, file = name.replace("\\", "/").partition("/")
    root = bundled_models().get(model)
    if root is None:
        return None
    return _file_in(bundled_folder(kind, root), file)


def example_names(endings: Collection[str]) -> list[str]:
    return sorted(path.name for path in EXAMPLES.glob("*") if path.suffix.lower() in endings)


def find_example(name: str) -> Path | None:
    return _file_in(EXAMPLES, name)


def _file_in(folder: Path, name: str) -> Path | None:
    """By its listed name: no name from elsewhere leads out of the folder, or is too much for the file system."""
    return next((path for path in folder.glob("*") if path.name == name and path.is_file()), None)


def files_below(folder: Path, endings: Collection[str]) -> list[str]:
    """Names of the files with one of these endings, with ``/`` between folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in endings)


def file_below(folder: Path, name: str) -> Path | None:
    """A file in ``folder`` or in the folders in it; None for a name that leads elsewhere, also through a link."""
    parts, root = Path(name.replace("\\", "/")), folder.resolve()
    # A name too long for the file system, or with a zero in it, names no file either.
    with suppress(OSError, ValueError):
        path = (root / parts).resolve()
        if ".." not in parts.parts and path.is_relative_to(root) and path.is_file():
            return path
    return None


def known_folder(host: NodeHost, name: str) -> Path:
    """A folder of ``host.model_folders()`` or, as ``FOLDER/FILE``, a file in it; FileError with the names there are."""
    folders = host.model_folders()
    if name in folders:
        return folders[name]
    folder, _, file = name.replace("\\", "/").partition("/")
    for path in checkpoints_in(folders[folder]) if folder in folders else ():
        if path.name == file:
            return path
    raise FileError("There is no such model", given=name, expected="one of " + (", ".join(folders) or "none at all"))


def known_subfolder(roots: Sequence[Path], name: str) -> Path:
    """A folder below one of ``roots``; FileError if there is none, or if the name leads elsewhere."""
    parts = Path(name.replace("\\", "/")).parts
    if parts and ".." not in parts and not Path(name).is_absolute():
        for root in roots:
            # A name too long for the file system names no folder either.
            with suppress(OSError):
                if (root / name).is_dir():
                    return root / name
    places = " or ".join(str(root) for root in roots) or "the folder of text encoders"
    raise FileError(
        "There is no such folder of tokenizers",
        given=name,
        expected=f"the name of a folder in {places}",
        do="put the folder there, or leave tokenizer_folder empty",
    )


INPUT_MARK, OUTPUT_MARK = " [input]", " [output]"
"""ComfyUI's marks of a file in the input folder, which may be left out, and in the output folder"""


def embeddings_in(folders: Sequence[Path], output: Path) -> dict[str, Path]:
    """name -> file of encoded prompts, told by their headers; the examples last."""
    listed = {path.relative_to(folder).as_posix(): path for folder in folders for path in folder.rglob(_ENCODED)}
    made = {f"{path.relative_to(output).as_posix()}{OUTPUT_MARK}": path for path in output.rglob(_ENCODED)}
    listed, made = (dict(sorted(files.items())) for files in (listed, made))
    own = listed | made
    examples = {name: EXAMPLES / name for name in example_names({".safetensors"}) if name not in own}
    return {name: path for name, path in (own | examples).items() if holds_embeddings(path)}


_ENCODED = "*.safetensors"


def holds_embeddings(path: Path) -> bool:
    try:
        return read_header(path).metadata.get("vidgen.part") == PART
    except UserError:  # a damaged file must not hide the others; loading it by its path says what is wrong
        return False


def known_embeddings(host: NodeHost, name: str) -> Path:
    """A file of ``host.embeddings()``; FileError with the names that exist."""
    files = host.embeddings()
    if name not in files:
        some = ", ".join(list(files)[:8]) or "none at all"
        raise FileError(
            "There are no such encoded prompts",
            given=name,
            expected=f"one of {some}",
            do="put the file into models/embeddings/vidgen, or press R to read the folders again",
        )
    return files[name]


def numbered(folder: Path, stem: str, suffix: str) -> Path:
    """``stem_00001.mp4`` with the first number above all that are there, folders too."""
    pattern = re.compile(re.escape(stem) + r"_(\d+)_?(\.\w+)?")
    taken = [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    return folder / f"{stem}_{max(taken, default=0) + 1:05d}{suffix}"


# --- without ComfyUI ------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class LocalNodeHost(LocalHost):
    """Plain Python and the command line: files are named by path, videos go to a folder or to one exact file."""

    input_folder: Path | None = None
    """what :meth:`find_upload` knows, and what is no path is looked for in"""
    output_folder: Path = Path("output")
    output_file: Path | None = None
    """the first video saved goes here; more of them get ``_2``, ``_3``, ... before the ending"""
    run_id: str | None = None
    """keep an interrupted run beside its output under this name, to be taken up by the next with the same one"""
    scratch: Path | None = None
    """where large temporary files lie; None: beside the output, because /tmp is often memory"""
    saved: list[Path] = field(default_factory=list)
    """the videos that were saved, in order"""

    def names(self, kind: str) -> list[str]:
        places = [root / folder for root in self.folders for folder in folders_of(kind)]
        found = {path.relative_to(place).as_posix() for place in places for path in checkpoints_below(place)}
        return bundled_names(kind) + sorted(found)

    def model_folders(self) -> dict[str, Path]:
        kinds = {folder for kind in FOLDERS for folder in folders_of(kind)} | {EMBEDDINGS_FOLDER.parts[0]}
        own = {folder.name: folder for root in self.folders for folder in folders_with_checkpoints(root)}
        return bundled_models() | {name: own[name] for name in sorted(own.keys() - kinds)}

    def find_model_folder(self, name: str) -> Path:
        path = Path(name).expanduser()
        return path if path.exists() else known_folder(self, name)

    def inputs(self, endings: Collection[str]) -> list[str]:
        own = [] if self.input_folder is None else files_below(self.input_folder, endings)
        return own + [name for name in example_names(endings) if name not in own]

    def find_input(self, name: str) -> Path:
        path = Path(name).expanduser()
        return path if path.is_file() else self.find_upload(name)

    def find_upload(self, name: str) -> Path:
        """A file of the input folder by its name in it, as ComfyUI's own loaders have it; no path leads out of there.

        Raises:
            FileError: there is none.
        """
        is_made = name.endswith(OUTPUT_MARK)
        folder = self._output_root() if is_made else self.input_folder
        plain = name.removesuffix(OUTPUT_MARK if is_made else INPUT_MARK)
        found = None if folder is None else file_below(folder, plain)
        found = found or find_example(plain)
        if found is None:
            raise FileError(
                "There is no such file",
                given=name,
                expected="a path to a file" if folder is None else f"the name of a file in {folder}",
            )
        return found

    def ending(self, chosen: str) -> str:
        return chosen if self.output_file is None else self.output_file.suffix.lower().removeprefix(".")

    def output_path(self, prefix: str, suffix: str) -> tuple[Path, str]:
        subfolder = ""
        if self.output_file is None:
            place = inside(self.output_folder, prefix or "VidGen")
            make_folder(place.parent)
            path, subfolder = numbered(place.parent, place.name, suffix), Path(prefix).parent.as_posix()
        else:
            first, kind = self.output_file, suffix.lower()
            if kind != first.suffix.lower():  # pictures beside a video
                first = first.with_suffix(suffix)
            number = 1 + sum(path.suffix.lower() == kind for path in self.saved)
            path = first if number == 1 else first.with_name(f"{first.stem}_{number}{first.suffix}")
        self.saved.append(path)
        return path, subfolder.removeprefix(".")

    def preview_path(self, prefix: str, suffix: str) -> tuple[Path, str] | None:
        """As :meth:`output_path`, for what goes when the host does; None where nobody would see it."""
        return None

    def text_folders(self) -> list[Path]:
        return [root / folder for root in self.folders for folder in folders_of("text")]

    def find_tokenizers(self, name: str) -> Path:
        path = Path(name).expanduser()
        return path if path.is_dir() else known_subfolder(self.text_folders(), name)

    def embeddings(self) -> dict[str, Path]:
        folders = [root / EMBEDDINGS_FOLDER for root in self.folders]
        return embeddings_in(folders, self._output_root())

    def find_embeddings(self, name: str) -> Path:
        path = Path(name).expanduser()
        return path if path.is_file() else known_embeddings(self, name)

    def embeddings_path(self, prefix: str) -> tuple[Path, str]:
        place = inside(self._output_root(), prefix or "VidGen")
        make_folder(place.parent)
        subfolder = Path(prefix).parent.as_posix().removeprefix(".")
        return numbered(place.parent, place.name, ".safetensors"), subfolder

    def _output_root(self) -> Path:
        return self.output_folder if self.output_file is None else self.output_file.parent

    def scratch_folder(self) -> Path:
        folder = self.scratch or self._output_root()
        make_folder(folder)
        return folder

    def keeps_metadata(self) -> bool:
        return True

    def resume_path(self, node_id: str) -> Path | None:
        if self.run_id is None:
            return None
        folder, stem = self._run_place()
        return folder / f"{stem}.{self.run_id}-{node_id}.unfinished"

    def result_saved(self) -> None:
        """``headless.render`` removes the runs when the whole workflow is done: it may save several videos."""

    def manage(self, module: Any) -> None:
        """Nobody else needs the room."""

    def need(self, module: Any) -> None:
        """It is where it was loaded."""

    def unfinished_runs(self) -> list[Path]:
        """The kept runs: all for ``output_file``, also an earlier command's; only this command's in a shared folder."""
        folder, stem = self._run_place()
        begin = f"{stem}." if self.output_file is not None else f"{stem}.{self.run_id}-"
        return sorted(path for path in folder.glob("*.unfinished") if path.name.startswith(begin))

    def _run_place(self) -> tuple[Path, str]:
        if self.output_file is not None:
            return self.output_file.parent, self.output_file.name
        make_folder(self.output_folder)
        return self.output_folder, "run"


def inside(root: Path, prefix: str) -> Path:
    """``root / prefix``; FileError where that leads out of the folder."""
    place = root / prefix.replace("\\", "/")
    if root.resolve() not in place.resolve().parents or ".." in place.parts[len(root.parts) :]:
        raise FileError(
            "The file would lie outside of the output folder",
            given=prefix,
            expected=f"a name inside {root}",
            do="leave out .. and the beginning slash",
        )
    return place


def make_folder(folder: Path) -> None:
    """mkdir -p; FileError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The folder cannot be made ({error.strerror})", given=folder) from error


# --- inside ComfyUI -------------------------------------------------------------------------------------------------


class ComfyHost:
    """ComfyUI's model manager, progress bar, interrupt button and folders."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._total = 0
        self._done = 0

    def device(self) -> torch.device:
        import comfy.model_management

        return comfy.model_management.get_torch_device()

    def make_room(self, num_bytes: int) -> None:
        import comfy.model_management

        comfy.model_management.free_memory(num_bytes, self.device())

    def progress(self, what: str, done: int, total: int) -> None:
        import comfy.utils

        if self._bar is None or total != self._total:
            self._bar, self._total = comfy.utils.ProgressBar(total), total
        self._done = done
        self._bar.update_absolute(done, total)

    def preview(self, frames: Callable[[], Tensor]) -> None:
        """A contact sheet of the frames through the ordinary preview channel, which every frontend shows."""
        if self._bar is None:
            return
        sheet = contact_sheet(frames())
        # The last number is the size that ComfyUI makes of it: as it is.
        self._bar.update_absolute(self._done, self._total, ("JPEG", sheet, max(sheet.size)))

    def check_cancelled(self) -> None:
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()

    def names(self, kind: str) -> list[str]:
        import folder_paths

        listed = folder_paths.get_filename_list(FOLDERS[kind])
        # ComfyUI lists neither GGUF nor sets of shards, and each shard as if it were a checkpoint of its own.
        places = [Path(place) for place in folder_paths.get_folder_paths(FOLDERS[kind])]
        below = {path.relative_to(place): path for place in places for path in checkpoints_below(place)}
        shards = {path.relative_to(place) for place in places for path in shards_below(place)}
        more = {name.as_posix() for name in below} - {Path(name).as_posix() for name in listed}
        return bundled_names(kind) + [name for name in listed if Path(name) not in shards] + sorted(more)

    def find(self, kind: str, name: str) -> Path:
        import folder_paths

        found = find_bundled(kind, name) or folder_paths.get_full_path(FOLDERS[kind], name)
        if found is None:
            place = f"ComfyUI/models/{FOLDERS[kind]}"
            raise FileError("There is no such checkpoint", given=name, expected=f"a file in {place}", do="press R")
        return Path(found)

    def model_folders(self) -> dict[str, Path]:
        import folder_paths

        root = Path(folder_paths.models_dir) / "vidgen"
        return bundled_models() | {folder.name: folder for folder in folders_with_checkpoints(root)}

    def find_model_folder(self, name: str) -> Path:
        return known_folder(self, name)

    def inputs(self, endings: Collection[str]) -> list[str]:
        import folder_paths

        folder = Path(folder_paths.get_input_directory())
        own = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in endings)
        return own + [name for name in example_names(endings) if name not in own]

    def find_input(self, name: str) -> Path:
        import folder_paths

        if folder_paths.exists_annotated_filepath(name):
            return Path(folder_paths.get_annotated_filepath(name))
        found = find_example(name)
        if found is None:
            raise FileError("There is no such file", given=name, expected="a file in ComfyUI/input")
        return found

    def ending(self, chosen: str) -> str:
        return chosen

    def output_path(self, prefix: str, suffix: str) -> tuple[Path, str]:
        import folder_paths

        root = folder_paths.get_output_directory()
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
        return Path(folder) / f"{stem}_{counter:05}_{suffix}", subfolder

    def text_folders(self) -> list[Path]:
        import folder_paths

        return [Path(place) for place in folder_paths.get_folder_paths(FOLDERS["text"])]

    def find_tokenizers(self, name: str) -> Path:
        return known_subfolder(self.text_folders(), name)

    def embeddings(self) -> dict[str, Path]:
        import folder_paths

        return embeddings_in(
            [Path(folder_paths.models_dir) / EMBEDDINGS_FOLDER], Path(folder_paths.get_output_directory())
        )

    def find_embeddings(self, name: str) -> Path:
        return known_embeddings(self, name)

    def embeddings_path(self, prefix: str) -> tuple[Path, str]:
        return self.output_path(prefix, ".safetensors")

    def scratch_folder(self) -> Path:
        import folder_paths

        folder = Path(folder_paths.get_temp_directory())
        make_folder(folder)
        return folder

    def keeps_metadata(self) -> bool:
        from comfy.cli_args import args

        return not args.disable_metadata

    def resume_path(self, node_id: str) -> Path | None:
        """One folder for all nodes: the same inputs find their run again after a crash. ComfyUI empties its temp folder
        when it starts, so it is in the user's."""
        folder = self._runs()
        try:
            make_folder(folder)
        except FileError as error:  # a run that cannot be kept can still be made
            log.warning("%s", error)
            return None
        return folder

    def result_saved(self) -> None:
        from ..vidgen_core.resume import forget_finished

        forget_finished(self._runs())

    def _runs(self) -> Path:
        import folder_paths

        return Path(folder_paths.get_user_directory()) / "vidgen" / "unfinished"

    def manage(self, module: Any) -> None:
        device = self.device()
        if isinstance(module, nn.Module) and device.type != "cpu" and module not in _handles:
            _handles[module] = ModelHandle(module, device)
            self.need(module)

    def need(self, module: Any) -> None:
        handle = _handles.get(module) if isinstance(module, nn.Module) else None
        if handle is not None:
            import comfy.model_management

            # Whole: a network that is larger than the room streams its blocks, and those are not counted.
            comfy.model_management.load_models_gpu([handle], force_full_load=True)


def offer_plans(answer: Callable[[object], dict[str, Any]]) -> None:
    """``POST /vidgen/plan`` on ComfyUI's server, where there is one; ``answer`` takes the request's JSON."""
    import asyncio

    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:  # ComfyUI's modules without its server: a script of somebody
        return
    from aiohttp import web

    async def plan(request: web.Request) -> web.Response:
        try:
            return web.json_response(await asyncio.to_thread(answer, await request.json()))
        except (ValueError, RecursionError) as error:  # no JSON, or a UserError
            kind, what = ("bad_request", str(error)) if isinstance(error, UserError) else ("invalid_json", "no JSON")
            body = {"error": {"type": kind, "message": what, "details": "", "extra_info": {}}}
            return web.json_response(body, status=400)

    server.routes.post("/vidgen/plan")(plan)


class ModelHandle:
    """A module as ComfyUI's model manager sees it, so that its "free" button and other models can move it off.

    It has the attributes and methods that the manager asks of a ``ModelPatcher``, and is none: its classes change.
    Blocks that are streamed are not here; they hold device memory only while the network runs. The manager keeps a weak
    reference to the handle, and the handle one to the module, so both go when the last workflow drops the module.
    """

    parent = None

    def __init__(
        self, module: nn.Module, load_device: torch.device, offload_device: torch.device | None = None
    ) -> None:
        self._module = weakref.ref(module)
        self.load_device = load_device
        self.offload_device = offload_device or torch.device("cpu")
        self._device: torch.device | None = load_device
        """None if moving it failed half-way"""

    @property
    def model(self) -> nn.Module | None:
        return self._module()

    # what it is

    def model_size(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def loaded_size(self) -> int:
        return self.model_size() if self._device == self.load_device else 0

    def current_loaded_device(self) -> torch.device:
        return self._device or self.offload_device

    def model_dtype(self) -> torch.dtype | None:
        return next((tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()), None)

    def is_clone(self, other: Any) -> bool:
        """Whether both hold the same weights; so does a handle with itself."""
        return self.model is not None and getattr(other, "model", None) is self.model

    def clone_has_same_weights(self, other: Any) -> bool:
        return self.is_clone(other)

    def is_dynamic(self) -> bool:
        return False

    def lowvram_patch_counter(self) -> int:
        return 0

    def get_ram_usage(self) -> int:
        return self.model_size() - self.loaded_size()

    def pinned_memory_size(self) -> int:
        return 0

    def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
        """(bytes of a mapped file in main memory, all bytes)."""
        return 0, self.model_size()

    def model_patches_models(self) -> list[Any]:
        return []

    def model_patches_to(self, where: torch.device | torch.dtype | None) -> None:
        """There are no patches: LoRAs are on a network only while it runs."""

    # moving it

    def partially_load(self, device: torch.device, extra_memory: float = 0, force_patch_weights: bool = False) -> int:
        """To the load device, all of it; the bytes that were moved."""
        before = self.loaded_size()
        self._move(device)
        return self.loaded_size() - before

    def partially_unload(self, device: torch.device, memory_to_free: float = 0, **_: Any) -> int:
        """Off the load device, all of it: a network with some of its weights elsewhere could not run."""
        before = self.loaded_size()
        self._move(device)
        return before - self.loaded_size()

    def partially_unload_ram(self, ram_to_unload: float) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> nn.Module | None:
        if unpatch_all:
            self._move(self.offload_device)
        return self.model

    def cleanup(self) -> None:
        """Nothing is left over between runs."""

    def _tensors(self) -> list[Tensor]:
        module = self.model
        if module is None:
            return []
        return [tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.is_meta]

    def _move(self, device: torch.device) -> None:
        """Every weight to ``device``, in the same parameters. Blocks that are streamed have none between two runs."""
        if device != self._device:
            self._device = None
            for tensor in self._tensors():
                tensor.data = moved(tensor.data, device)
            self._device = device


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device)


_handles: weakref.WeakKeyDictionary[nn.Module, ModelHandle] = weakref.WeakKeyDictionary()
"""of the modules that ComfyUI's manager knows of"""


def contact_sheet(frames: Tensor, *, num_columns: int = 4, side_px: int = 256, most: int = 16) -> Image:
    """Up to ``most`` of the frames (T, H, W, 3) uint8, evenly spaced, in rows of one picture.

    Frames that are smaller than ``side_px`` (a preview has one px per latent) are enlarged smoothly. The picture's JPEG
    says in its comment how the frames lie, so that the pack's page can show them one after the other.
    """
    from PIL.Image import fromarray

    number = min(len(frames), most)
    frames = frames[torch.linspace(0, len(frames) - 1, number).round().long()]
    height, width = frames.shape[1:3]
    if (factor := side_px / max(height, width)) > 1:
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        pixels = nn.functional.interpolate(frames.permute(0, 3, 1, 2).float(), size=size, mode="bicubic")
        frames = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    num_columns = min(num_columns, number)
    missing = -number % num_columns
    frames = torch.cat([frames, frames.new_zeros(missing, *frames.shape[1:])])
    rows = frames.unflatten(0, (-1, num_columns))
    picture = fromarray(rows.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2).numpy())
    picture.info["comment"] = json.dumps({"vidgen": {"columns": num_columns, "frames": number}}).encode()
    return picture
