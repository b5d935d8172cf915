"""The parts of a model together: found in a folder by their content, checked against each other, loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .codec import Codec
from .errors import CheckpointError, FileError, SettingsError
from .families import TITLES, Found, TextEncoder, identify, identify_parts
from .memory.cancel import listening
from .memory.host import Host, LocalHost, bundled_models, memory_in_use
from .memory.place import AUTO, check_choice
from .model import TextFiles, VideoModel, build_part, inspect_header, network_of, text_config_of, text_of
from .preview import LatentRGB, fit_preview
from .types import VideoShape
from .weights.header import Header, read_header
from .weights.shards import ENDINGS, checkpoints_in

log = logging.getLogger("vidgen")


@dataclass(slots=True, kw_only=True)
class Bundle:
    """Network, VAE and text encoders that belong together."""

    model: VideoModel
    codec: Codec
    text: TextEncoder
    headers: dict[str, Header] = field(default_factory=dict)
    """part -> the file it came from"""
    preview: LatentRGB | None = None

    @property
    def default_shape(self) -> VideoShape:
        defaults = self.model.defaults
        return VideoShape(num_frames=defaults.num_frames, height_px=defaults.height_px, width_px=defaults.width_px)

    def info(self) -> dict[str, Any]:
        """part -> what ``inspect_file`` says of its file."""
        return {part: inspect_header(header) for part, header in self.headers.items()}

    def latent_rgb(self) -> LatentRGB:
        """The preview matrix: the checkpoint's, else fitted to the VAE at the first call."""
        if self.preview is None:
            self.preview = self.model.preview or fit_preview(self.codec)
        return self.preview


Source = str | Path | Sequence[str | Path] | None


def load_bundle(
    source: Source = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    host: Host | None = None,
    storage: str = AUTO,
    budget: int | None = None,
) -> Bundle:
    """All three parts of a model, wherever each one is recognised by its content.

    Args:
        source: a folder of checkpoints (or of folders with one each, as diffusers lays them out), the name of a
            bundled model, the files, or one file with what it lacks beside it; None takes the first bundled model.
            Of two networks in a folder, the one that needs no picture is taken.
        dtype: of the weights; None chooses for the device.
        device: None asks the host.
        storage: how the linear weights of the network's blocks are held, one of ``memory.place.CHOICES``.
        budget: bytes that this process may take on the device; None: no limit. See ``model.load_network``.

    Raises:
        FileError, CheckpointError: a part is missing, is there twice, is damaged, or does not fit the others.
    """
    check_choice(storage)
    host = host or LocalHost()
    device = torch.device(device) if device is not None else host.device()
    with listening(host):
        headers, found = find_parts(source)
        for header in {header.path: header for header in headers.values()}.values():
            host.make_room(header.num_bytes)
        before = memory_in_use(device)
        # First, because it may lack a tokenizer.
        text = text_of(_text_files(headers, found), dtype=dtype, device=device, stream=None, budget=budget)
        codec_module = build_part(headers["codec"], found["codec"], dtype=dtype, device=device)
        if budget is not None:
            budget -= max(0, before + _main_bytes(text, codec_module) - memory_in_use(device))
        model = network_of(
            headers["network"],
            found["network"],
            dtype=dtype,
            device=device,
            stream=None,
            storage=storage,
            budget=budget,
        )
    return Bundle(
        model=model,
        codec=found["codec"].family.codec(codec_module, found["codec"].config),
        text=text,  # type: ignore[arg-type]
        headers=headers,
    )


def _main_bytes(*modules: Any) -> int:
    """What modules take in main memory; weights that are mapped to a file only do when they are used."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")


def find_parts(source: Source = None) -> tuple[dict[str, Header], dict[str, Found]]:
    """(part -> header, part -> what it is) of a model that :func:`load_bundle` would load; no weights are read.

    Raises:
        FileError, CheckpointError: as :func:`load_bundle`.
    """
    headers, found = _sort_parts(*_files(source))
    families = {item.family.name for item in found.values()}
    if len(families) > 1:
        raise CheckpointError(
            "The parts belong to different families",
            given=", ".join(f"{item.title} in {headers[part].path}" for part, item in found.items()),
            do="use network, VAE and text encoders of one family",
        )
    _check_fit(headers, found)
    return headers, found


def _of_part(folder: Path) -> list[Path]:
    """The checkpoints of a folder; of one alone the folder itself, whose config.json says more than its tensors do."""
    files = checkpoints_in(folder)
    return [folder] if len(files) == 1 else files


def sees_images(headers: Mapping[str, Header], found: Mapping[str, Found]) -> bool:
    """Whether the text encoders of :func:`find_parts` can be shown a picture."""
    family = found["network"].family
    return family.text.sees_images(text_config_of(_text_files(headers, found)))


def _text_files(headers: Mapping[str, Header], found: Mapping[str, Found]) -> TextFiles:
    return {part: (headers[part], item) for part, item in found.items() if part in item.family.text.parts}


def _files(source: Source) -> tuple[list[Path], list[Path]]:
    """(the files that are meant, those that may add what is missing)."""
    if source is None:
        bundled = bundled_models()
        if not bundled:
            raise FileError("No checkpoint comes with this installation", do="name a folder or files")
        return _files(next(iter(bundled.values())))
    if not isinstance(source, (str, Path)):
        return [Path(item) for item in source], []
    path = Path(source).expanduser()
    name, _, file = str(source).partition("/")
    if not path.exists() and name in bundled_models():
        path = bundled_models()[name] / file
    if path.is_dir():
        inner = sorted(folder for folder in path.iterdir() if folder.is_dir())
        files = checkpoints_in(path) or [file for folder in inner for file in _of_part(folder)]
        if not files:
            expected = "files ending in " + ", ".join(ENDINGS)
            raise FileError("There is no checkpoint in this folder", given=path, expected=expected)
        return files, []
    if not path.exists():
        names = ", ".join(bundled_models()) or "none"
        expected = f"a folder, files, or the name of a bundled model ({names})"
        raise FileError("There is no such model", given=source, expected=expected)
    return [path], [other for other in checkpoints_in(path.parent) if other != path]


def _sort_parts(files: Sequence[Path], beside: Sequence[Path]) -> tuple[dict[str, Header], dict[str, Found]]:
    """(part -> header, part -> what it is). Other files do no harm, as long as it is clear which ones to take."""
    candidates, problems = _identified(files)
    missing = _missing(candidates)
    if missing and beside:
        others, _ = _identified(beside)
        candidates |= {part: found for part, found in others.items() if part not in candidates and part != "network"}
        missing = _missing(candidates)
    if missing and problems:
        raise problems[0]
    if missing:
        raise CheckpointError(
            f"The model lacks its {' and '.join(TITLES[part] for part in missing)}",
            given=", ".join(str(path) for path in files),
            expected="one file each for network, VAE and text encoders",
        )
    chosen = {part: _only(part, found) for part, found in candidates.items()}
    return {part: header for part, (header, _) in chosen.items()}, {part: item for part, (_, item) in chosen.items()}


_Candidates = dict[str, list[tuple[Header, Found]]]


def _identified(files: Sequence[Path]) -> tuple[_Candidates, list[CheckpointError]]:
    """(part -> the files that hold one, why the others hold none)."""
    candidates: _Candidates = {}
    problems: list[CheckpointError] = []
    for path in files:
        try:
            header = read_header(path)
            found = identify_parts(header) or [identify(header)]
        except CheckpointError as problem:
            problems.append(problem)
            continue
        for item in found:
            candidates.setdefault(item.part, []).append((header, item))
    return candidates, problems


def _missing(candidates: _Candidates) -> list[str]:
    missing = [part for part in ("network", "codec") if part not in candidates]
    if not any(part in items[0][1].family.text.parts for part, items in candidates.items()):
        missing.append("text")
    return missing


def _only(part: str, candidates: list[tuple[Header, Found]]) -> tuple[Header, Found]:
    """The one there is, or of two networks the one that makes videos from text alone."""
    if len(candidates) > 1 and part == "network":
        free = [one for one in candidates if not _needs_picture(one[1])]
        if len(free) == 1:
            others = ", ".join(header.path.name for header, _ in candidates if header is not free[0][0])
            log.info("Took %s; name %s to go on from a picture", free[0][0].path.name, others)
            return free[0]
    if len(candidates) > 1:
        raise CheckpointError(
            f"There are two files with a {TITLES[part]}",
            given=f"{candidates[0][0].path} and {candidates[1][0].path}",
            do="name one of them in place of the folder, or load each part by itself",
        )
    return candidates[0]


def network_for_picture(source: str | Path) -> Path | None:
    """The file of the network that goes on from a picture, where a folder holds others beside just one of those.

    Raises:
        FileError: there is no such model.
    """
    candidates = _identified(_files(source)[0])[0].get("network", [])
    found = [header.path for header, item in candidates if _needs_picture(item)]
    return found[0] if len(found) == 1 < len(candidates) else None


def _needs_picture(network: Found) -> bool:
    family, config = network.family, network.config
    try:
        family.keyframes.check(config, (), family.defaults(config).num_frames)
    except SettingsError:
        return True
    return False


def _check_fit(headers: Mapping[str, Header], found: Mapping[str, Found]) -> None:
    family, config = found["network"].family, found["network"].config
    wanted, given = family.latent_channels(config), family.grid(found["codec"].config).channels
    if wanted != given:
        raise CheckpointError(
            "The VAE does not belong to this network",
            given=f"{given} latent channels in {headers['codec'].path}",
            expected=f"{wanted}, as {headers['network'].path} has",
        )
    problem = family.fits_text(config, text_config_of(_text_files(headers, found)))
    if problem:
        raise CheckpointError(
            "The text encoders do not belong to this network", given=problem, do="use the files of one model"
        )
