"""The nodes' host inside a server: only files of its own folders, and progress that goes to the browser."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ...nodes.host import (
    LocalNodeHost,
    example_names,
    files_below,
    find_bundled,
    find_example,
    known_embeddings,
    known_folder,
    known_subfolder,
    numbered,
)
from ...vidgen_core.errors import FileError
from ...vidgen_core.memory.host import folders_of
from .places import Places, without_mark


@dataclass(slots=True, kw_only=True)
class ServerHost(LocalNodeHost):
    """Names in a workflow come from strangers here: they name files in known folders, never paths."""

    places: Places

    def find(self, kind: str, name: str) -> Path:
        found = find_bundled(kind, name)
        if found is None and name in self.names(kind):
            candidates = (root / folder / name for root in self.folders for folder in folders_of(kind))
            found = next((path for path in candidates if path.exists()), None)
        if found is None:
            raise FileError(
                f"There is no such {kind} checkpoint",
                given=name,
                expected="one of " + (", ".join(self.names(kind)) or "none at all"),
                do="put the file into the folder of models, and press R to read the folders again",
            )
        return found

    def find_model_folder(self, name: str) -> Path:
        return known_folder(self, name)

    def find_tokenizers(self, name: str) -> Path:
        return known_subfolder(self.text_folders(), name)

    def find_embeddings(self, name: str) -> Path:
        return known_embeddings(self, name)

    def inputs(self, endings: Collection[str]) -> list[str]:
        own = files_below(self.places.folder("input"), endings)
        return own + [name for name in example_names(endings) if name not in own]

    def find_input(self, name: str) -> Path:
        return self.find_upload(name)

    def find_upload(self, name: str) -> Path:
        """ComfyUI's names: a file of the input folder, or of another one with its mark behind."""
        plain, kind = without_mark(name, "input")
        try:
            return self.places.find(kind, "", plain)
        except FileError:
            found = find_example(name)
            if found is None:
                raise
            return found

    def output_path(self, prefix: str, suffix: str) -> tuple[Path, str]:
        return self._numbered("output", prefix, suffix)

    def preview_path(self, prefix: str, suffix: str) -> tuple[Path, str]:
        return self._numbered("temp", prefix, suffix)

    def embeddings_path(self, prefix: str) -> tuple[Path, str]:
        return self._numbered("output", prefix, ".safetensors")

    def _numbered(self, kind: str, prefix: str, suffix: str) -> tuple[Path, str]:
        place = self.places.place(kind, prefix or "VidGen")
        place.parent.mkdir(parents=True, exist_ok=True)
        path = numbered(place.parent, place.name, suffix)
        subfolder = path.parent.relative_to(self.places.folder(kind).resolve()).as_posix()
        return path, "" if subfolder == "." else subfolder
