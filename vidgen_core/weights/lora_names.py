"""A LoRA matched to a network: every name that its modules go by, and which of their rows each name stands for.

A name is looked up among those that the family's key maps make of the modules, never guessed: ``img_attn_qkv`` and
``img_attn.qkv`` are the same once the dots are gone. A projection that is fused here and split there becomes a change
of some rows of the fused weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .adapters import Change, Decomposed, rank_of
from .keymap import KeyMap
from .lora import PEFT_RAW_PREFIX, TENCENT_PREFIX, Entry, Lora, shape_text

_DOTTED_PREFIXES = (
    PEFT_RAW_PREFIX,
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
)
_JOINED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", TENCENT_PREFIX)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name leads: a module, and which of its rows in which order."""

    module: str
    start: int
    length: int
    order: Tensor | None
    """row j of the name is row order[j] of the module; None where they follow each other"""


class ModuleNames:
    """Every name that a network's modules go by, and their shapes.

    Args:
        shapes: module -> shape of its weight, for all modules that have one.
        layouts: the foreign namings of the family; they give names and say which rows a part of a fused weight is.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], layouts: Mapping[str, KeyMap]) -> None:
        self.shapes = dict(shapes)
        self.layouts = ("native", *layouts)
        self._parts = {layout: _parts(self.shapes, layouts.get(layout)) for layout in self.layouts}
        self._dotted: dict[str, Place] = {}
        self._joined: dict[str, Place] = {}
        self._layouts_of: dict[str, set[str]] = {}
        for layout, parts in self._parts.items():
            for place, name in ((place, name) for named in parts.values() for name, place in named):
                old = name.removesuffix(".0") if name.endswith(".to_out.0") else name  # as old diffusers files say
                for alias in (name, old):
                    self._dotted.setdefault(alias, place)
                    self._joined.setdefault(alias.replace(".", "_"), place)
                    self._layouts_of.setdefault(alias.replace(".", "_"), set()).add(layout)

    def find(self, name: str) -> tuple[Place, set[str]] | None:
        """Where a file's name leads, and the layouts that call it so."""
        for bare in _bare_names(name.replace(".processor.", ".")):
            if bare in self._dotted:
                return self._dotted[bare], self._layouts_of[bare.replace(".", "_")]
        for prefix in _JOINED_PREFIXES:
            # Two underscores follow the prefix where the trainer's root module has no name.
            bare = name.removeprefix(prefix).lstrip("_")
            if bare != name and bare in self._joined:
                return self._joined[bare], self._layouts_of[bare]
        return None

    def parts(self, module: str, layout: str) -> list[tuple[str, Place]]:
        """The names of a module in a layout, with the rows that each stands for."""
        return self._parts[layout].get(module, [])


def _parts(shapes: Mapping[str, tuple[int, ...]], layout: KeyMap | None) -> dict[str, list[tuple[str, Place]]]:
    """module -> (name, rows) of each of its parts; the numbers of the rows go through the map like a weight."""
    parts: dict[str, list[tuple[str, Place]]] = {}
    for module, shape in shapes.items():
        if layout is None:
            parts[module] = [(module, Place(module, 0, shape[0], None))]
            continue
        try:
            foreign = layout.to_foreign({f"{module}.weight": torch.arange(shape[0], device="cpu")})
        except CheckpointError:  # a map need not name every module, nor be able to cut each
            continue
        parts[module] = [(name.removesuffix(".weight"), _place(module, rows)) for name, rows in foreign.items()]
    return parts


def _place(module: str, rows: Tensor) -> Place:
    first = int(rows[0])
    follows = torch.equal(rows, torch.arange(first, first + len(rows), device="cpu"))
    return Place(module, first if follows else 0, len(rows), None if follows else rows)


def _bare_names(name: str) -> Iterator[str]:
    """``name`` and what is left of it under each wrapper's prefix."""
    yield name
    for prefix in _DOTTED_PREFIXES:
        if name.startswith(prefix):
            yield from _bare_names(name[len(prefix) :])


# --- matching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One change of one module, in native names and rows."""

    module: str
    change: Change | None
    bias: Tensor | None
    start: int
    """first output row that it changes"""
    length: int
    """number of rows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a file."""

    path: Path
    digest: str
    dialect: str
    modules: tuple[str, ...]
    """that it changes"""
    unmatched: tuple[str, ...]
    """keys of the file that belong to no module of the network"""
    num_keys: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    """scale * rank, for the forms that have a rank"""
    made_for: str | None = None
    """the base model in the file's own words"""

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundLora:
    """A LoRA matched to a network."""

    patches: tuple[Patch, ...]
    report: Report
    widened: Mapping[str, int] = field(default_factory=dict)
    """input layers that it enlarges -> their new number of input channels"""


def bind(lora: Lora, names: ModuleNames) -> BoundLora:
    """Match a LoRA to a network.

    Raises:
        CheckpointError: nothing in it belongs to this network, or a change has another size than its module.
    """
    found, report = match(lora, names)
    if not found:
        some = f" such as {report.unmatched[0]}" if report.unmatched else ""
        raise CheckpointError(
            "Nothing in this LoRA belongs to this network",
            given=f"{lora.path} with {report.num_keys} keys{some}",
            expected="names like " + ", ".join(list(names.shapes)[:2]),
            do=f"it looks like {looks_like(lora)}: use it with that model",
        )
    patches: dict[tuple[str, int, int], Patch] = {}
    for entry, place in found:
        patch = _patch(entry, _part_of(place, entry), names.shapes[place.module], lora.path)
        rows = patch.module, patch.start, patch.length
        if rows in patches:
            raise CheckpointError(
                f"The LoRA changes {patch.module} twice",
                given=f"{entry.name} beside another name for it in {lora.path}",
                do="use a file that names each module once",
            )
        patches[rows] = patch
    return BoundLora(
        patches=tuple(patches.values()), report=report, widened=_widened(list(patches.values()), names.shapes)
    )


def match(lora: Lora, names: ModuleNames) -> tuple[list[tuple[Entry, Place]], Report]:
    """Where each entry belongs by its name, whatever its size, and the report; for ``inspect`` and :func:`bind`."""
    found, unmatched, common = [], list(lora.other_keys), set(names.layouts)
    for entry in lora.entries:
        place = names.find(entry.name)
        if place is None:
            unmatched += entry.keys
            continue
        found.append((entry, place[0]))
        common &= place[1]
    layout = next((name for name in names.layouts if name in common), "mixed")
    changes = [entry.change for entry, _ in found if entry.change is not None]
    report = Report(
        path=lora.path,
        digest=lora.digest,
        dialect=f"{lora.style}, {layout} names" if found else lora.style,
        modules=tuple(dict.fromkeys(place.module for _, place in found)),
        unmatched=tuple(unmatched),
        num_keys=sum(len(entry.keys) for entry in lora.entries) + len(lora.other_keys),
        ranks=tuple(sorted({rank for change in changes if (rank := rank_of(change)) is not None})),
        alphas=tuple(sorted({round(alpha, 6) for change in changes if (alpha := _alpha_of(change)) is not None})),
        made_for=lora.metadata.get("modelspec.architecture") or lora.metadata.get("ss_base_model_version"),
    )
    return found, report


def _part_of(place: Place, entry: Entry) -> Place:
    if entry.part is None:
        return place
    index, count = entry.part
    if index >= count or place.length % count or place.order is not None:
        raise CheckpointError(
            f"The parts of {entry.name} do not make up the module", given=f"part {index} of {count}", expected="all"
        )
    length = place.length // count
    return replace(place, start=place.start + index * length, length=length)


def _patch(entry: Entry, place: Place, shape: tuple[int, ...], path: Path) -> Patch:
    change, bias = entry.change, entry.bias
    expected = (place.length, *shape[1:])
    if change is not None and not fits(change.shape, expected):
        raise CheckpointError(
            f"The LoRA of {entry.name} is for a model of another size",
            given=f"a change of {change.shape} in {path}",
            expected=f"{expected}, as {place.module} has",
            do="use a LoRA that was made for this model",
        )
    if bias is not None and tuple(bias.shape) != (place.length,):
        raise CheckpointError(
            f"The bias of {entry.name} is for a model of another size",
            given=f"{shape_text(bias)} in {path}",
            expected=f"({place.length},), as {place.module} has",
        )
    if place.order is not None:
        back = place.order.argsort()
        change = None if change is None else change.rows(back)
        bias = None if bias is None else bias[back]
    return Patch(module=place.module, change=change, bias=bias, start=place.start, length=place.length)


def fits(given: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a change can go onto a weight: the same shape, the same matrix, or more inputs of a convolution."""
    if given[0] != expected[0]:
        return False
    if math.prod(given) == math.prod(expected):
        return True
    wider = len(given) == len(expected) > 2 and given[1] > expected[1]
    return wider and given[2:] == expected[2:]


def _widened(patches: Sequence[Patch], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    widened: dict[str, int] = {}
    for patch in patches:
        shape = shapes[patch.module]
        if patch.change is not None and math.prod(patch.change.shape[1:]) > math.prod(shape[1:]):
            widened[patch.module] = max(patch.change.shape[1], widened.get(patch.module, 0))
    return widened


def _alpha_of(change: Change) -> float | None:
    inner = change.inner if isinstance(change, Decomposed) else change
    rank = rank_of(inner)
    return None if rank is None else getattr(inner, "scale", 1.0) * rank


_SIGNS = (
    # (what it looks like, parts of names that all must be there, one that must not)
    ("a LoRA for text encoders alone", (r"^(lora_te|text_encoder)",), "unet|transformer|blocks"),
    ("a CogVideoX LoRA", (r"attention.query_key_value",), None),
    ("a Stable Video Diffusion LoRA", (r"temporal_transformer_blocks|time_stack",), None),
    ("a Stable Diffusion LoRA", (r"(down|up|input|output)_blocks",), None),
    ("a HunyuanVideo or Flux LoRA", (r"double_blocks|single_blocks|single_transformer_blocks",), None),
    ("an LTX-Video or PixArt LoRA", (r"transformer_blocks.*attn1", r"attn2"), None),
    ("a CogVideoX LoRA", (r"transformer_blocks.*attn1",), None),
    ("a Stable Diffusion 3 LoRA", (r"joint_blocks",), None),
    ("a Wan LoRA", (r"blocks[._]\d+[._](self|cross)_attn",), None),
    ("a Mochi LoRA", (r"blocks.*qkv_x",), None),
)


def looks_like(lora: Lora) -> str:
    """The family that a LoRA's names remind of, in words."""
    names = "\n".join(entry.name for entry in lora.entries)
    for title, signs, absent in _SIGNS:
        here = all(re.search(sign, names, re.MULTILINE) for sign in signs)
        if here and not (absent and re.search(absent, names)):
            return title
    return "a LoRA for a model that is not known here"
