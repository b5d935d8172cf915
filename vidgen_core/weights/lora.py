"""LoRA files in every naming that people have on disk: read, matched to a network's modules, and written again.

A file is read on its own (:func:`read_lora`); only :func:`bind` needs to know a network, by its modules' names and
shapes and its family's key maps. A name is looked up among those that the maps make of the modules, never guessed:
``img_attn_qkv`` and ``img_attn.qkv`` are the same once the dots are gone. A projection that is fused here and split
there becomes a change of some rows of the fused weight.

The scale of up @ down, by the spelling of the names: kohya and musubi write ``alpha`` and mean alpha / rank; PEFT
says it in metadata or beside the file and means 1 where it says nothing; Tencent's own loader reads no alpha.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError
from .adapters import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Product, Replacement, fuse, rank_of
from .header import read_header
from .keymap import KeyMap
from .load import read_tensors
from .save import save_tensors

# --- what is read -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a file says of one module, still under the file's name for it."""

    name: str
    keys: tuple[str, ...]
    """the tensors it was made of"""
    change: Change | None
    """None where only a bias is changed"""
    bias: Tensor | None = None
    """added to the module's bias"""
    part: tuple[int, int] | None = None
    """(i, n): the i-th of n equal parts of the module's rows"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """One file, not yet matched to a network."""

    path: Path
    digest: str
    style: str
    """the spelling of its names: "kohya", "PEFT", "old diffusers", "SAT", "LyCORIS" or "full differences" """
    entries: tuple[Entry, ...]
    other_keys: tuple[str, ...] = ()
    """tensors that are no part of a LoRA as far as this program knows"""
    metadata: Mapping[str, str] = field(default_factory=dict)


_LOW_RANK = (
    # (ending, style); {} is down / up, A / B
    (re.compile(r"(?P<name>.+)\.lora_(?P<which>down|up|mid)\.weight"), "kohya"),
    (re.compile(r"(?P<name>.+)\.lora_(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"), "PEFT"),
    (re.compile(r"(?P<name>.+)\.lora_(?P<which>[AB])"), "PEFT"),
    (re.compile(r"(?P<name>.+?)[._]lora\.(?P<which>down|up)\.weight"), "old diffusers"),
    (re.compile(r"(?P<name>.+)\.matrix_(?P<which>[AB])\.(?P<part>\d+)"), "SAT"),
)
_ROLE = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid"}
_BIAS_OF_UP = re.compile(r"(?P<name>.+)\.lora_(?:B(?:\.(?P<adapter>[^.]+))?|up)\.bias")
_MAGNITUDE = re.compile(r"(?P<name>.+)\.(?:dora_scale|lora_magnitude_vector(?:\.(?P<adapter>[^.]+?))??(?:\.weight)?)")
_PLAIN = {
    **{f"hada_{x}": "LyCORIS" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{x}": "LyCORIS" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **dict.fromkeys(("diff", "diff_b", "set_weight"), "full differences"),
    **dict.fromkeys(("alpha", "reshape_weight"), None),
}
"""ending -> style, None where it does not tell"""

TENCENT_PREFIX = "Hunyuan_video_I2V_lora_"
_PEFT_RAW_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class _Key:
    """One tensor's name taken apart."""

    name: str
    role: str
    style: str | None
    adapter: str = "default"
    part: int | None = None


def _parse_key(key: str) -> _Key | None:
    for pattern, style in _LOW_RANK:
        if match := pattern.fullmatch(key):
            found = match.groupdict()
            part = found.get("part")
            adapter = found.get("adapter") or "default"
            return _Key(found["name"], _ROLE[found["which"]], style, adapter, None if part is None else int(part))
    for pattern, role in ((_BIAS_OF_UP, "up_bias"), (_MAGNITUDE, "magnitude")):
        if match := pattern.fullmatch(key):
            return _Key(match["name"], role, None, match["adapter"] or "default")
    name, _, ending = key.rpartition(".")
    return _Key(name, ending, _PLAIN[ending]) if name and ending in _PLAIN else None


def read_lora(path: str | Path) -> Lora:
    """Read a LoRA: safetensors, or a ``.pt`` of plain tensors.

    Raises:
        FileError: it is missing or cannot be read.
        CheckpointError: it is damaged, holds no LoRA, or a factor is missing, not finite or of the wrong shape.
    """
    path = Path(path)
    tensors, metadata, digest = _read(path)
    grouped: dict[tuple[str, int | None], dict[str, tuple[str, Tensor]]] = {}
    others, styles, adapters = [], Counter[str](), set()
    for key, tensor in tensors.items():
        parsed = _parse_key(key)
        if parsed is None:
            others.append(key)
            continue
        fields = grouped.setdefault((parsed.name, parsed.part), {})
        if parsed.role in fields:
            raise CheckpointError(
                "Two tensors of this LoRA mean the same", given=f"{fields[parsed.role][0]} and {key} in {path}"
            )
        fields[parsed.role] = key, tensor
        adapters |= {parsed.adapter} if parsed.style == "PEFT" else set()
        styles.update([parsed.style] if parsed.style else [])
    if not styles:
        some = ", ".join(list(tensors)[:3]) or "no tensors at all"
        raise CheckpointError(
            "There is no LoRA in this file",
            given=f"{path} with {some}",
            expected="names that end in lora_down.weight, lora_A.weight, hada_w1_a, lokr_w1 or diff",
            do="pick another file; a whole network goes into Load Model",
        )
    if len(adapters) > 1:
        raise CheckpointError(
            "There is more than one LoRA in this file",
            given=f"{', '.join(sorted(adapters))} in {path}",
            do="save each adapter to a file of its own",
        )
    scaling = _PeftScaling.of(path, metadata, tensors)
    num_parts = Counter(name for name, part in grouped if part is not None)
    entries = []
    for (name, part), fields in grouped.items():
        where = None if part is None else (part, num_parts[name])
        entries.append(_entry(name, where, fields, scaling, path))
    return Lora(
        path=path,
        digest=digest,
        style=styles.most_common(1)[0][0],
        entries=tuple(entries),
        other_keys=tuple(others),
        metadata=metadata,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str], str]:
    """(tensors, metadata, digest)."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise FileError(f"The LoRA cannot be read ({error.strerror})", given=path, do="check the path") from error
    if start[:2] == b"\x80\x02" or start == b"PK\x03\x04":
        return _read_pt(path)
    header = read_header(path)
    return read_tensors(header), header.metadata, header.digest


def _read_pt(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str], str]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "This .pt file cannot be read as plain tensors",
            given=path,
            expected="tensors by name and nothing that runs code",
            do="convert it to safetensors",
        ) from error
    for wrapper in ("state_dict", "module", "lora"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {name: t for name, t in content.items() if isinstance(t, Tensor)} if isinstance(content, dict) else {}
    with path.open("rb") as file:
        hasher = hashlib.sha256()
        while block := file.read(1 << 20):
            hasher.update(block)
    return tensors, {}, hasher.hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PeftScaling:
    """What PEFT's configuration says of alpha, wherever it was kept."""

    alpha: float | None = None
    by_module: Mapping[str, float] = field(default_factory=dict)
    root: bool = False
    """divide by the root of the rank (rsLoRA)"""

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> _PeftScaling:
        """From the file's metadata; a raw PEFT file keeps it in ``adapter_config.json`` beside itself."""
        sidecar = path.with_name("adapter_config.json")
        where, values = f"the metadata of {path}", dict[str, Any](metadata)
        try:
            if "lora_adapter_metadata" in metadata:
                values = json.loads(metadata["lora_adapter_metadata"])
            elif all(name.startswith(_PEFT_RAW_PREFIX) for name in names) and sidecar.is_file():
                where, values = str(sidecar), json.loads(sidecar.read_text("utf-8"))
            found = {
                key.rpartition(".")[2]: value for key, value in values.items() if not key.startswith("text_encoder")
            }
            alpha = found.get("lora_alpha")
            return cls(
                alpha=None if alpha is None else float(alpha),
                by_module={name: float(value) for name, value in (found.get("alpha_pattern") or {}).items()},
                root=str(found.get("use_rslora", False)).lower() == "true",
            )
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                "The LoRA's alpha cannot be read", given=where, expected="lora_alpha as a number"
            ) from error

    def scale(self, name: str, rank: int) -> float:
        own = [alpha for end, alpha in self.by_module.items() if name == end or name.endswith("." + end)]
        alpha = own[0] if own else self.alpha
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def _entry(
    name: str,
    part: tuple[int, int] | None,
    fields: Mapping[str, tuple[str, Tensor]],
    scaling: _PeftScaling,
    path: Path,
) -> Entry:
    tensors = {role: tensor for role, (_, tensor) in fields.items()}
    for role, tensor in tensors.items():
        if tensor.numel() == 0 or (role == "alpha" and tensor.numel() != 1):
            raise CheckpointError(
                f"The LoRA of {name} has a tensor of no use", given=f"{fields[role][0]} of {_shape(tensor)} in {path}"
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"The LoRA of {name} has numbers that are not finite",
                given=f"{fields[role][0]} in {path}",
                do="download the file again; if that does not help, its training has failed",
            )
    reader = _Fields(name, tensors, path)
    change = reader.change(lambda rank: _scale(name, fields, rank, scaling))
    if "magnitude" in tensors and change is not None:
        change = Decomposed(inner=change, magnitude=reader.magnitude(change.shape))
    bias = tensors.get("diff_b")
    if "up_bias" in tensors:
        factor = change.scale if isinstance(change, LowRank) else 1.0
        bias = factor * tensors["up_bias"].float() + (0 if bias is None else bias.float())
    return Entry(name=name, keys=tuple(key for key, _ in fields.values()), change=change, bias=bias, part=part)


def _scale(name: str, fields: Mapping[str, tuple[str, Tensor]], rank: int, scaling: _PeftScaling) -> float:
    if "alpha" in fields:
        if name.startswith(TENCENT_PREFIX):
            return 1.0
        alpha = float(fields["alpha"][1].flatten()[0])
        # A trainer that is given alpha 0 takes the rank.
        return alpha / rank if alpha else 1.0
    is_peft = "up" in fields and ".lora_B" in fields["up"][0]
    return scaling.scale(name, rank) if is_peft else 1.0


class _Fields:
    """The tensors of one module, taken for the form that their names say."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], path: Path) -> None:
        self._name, self._tensors, self._path = name, tensors, path

    def change(self, scale: Callable[[int], float]) -> Change | None:
        """``scale``: rank -> scale."""
        has = self._tensors.keys()
        if has & {"down", "up", "mid"}:
            return self._low_rank(scale)
        if any(role.startswith("hada_") for role in has):
            return self._hadamard(scale)
        if any(role.startswith("lokr_") for role in has):
            return self._kronecker(scale)
        if "diff" in has:
            return Difference(tensor=self._tensors["diff"])
        if "set_weight" in has:
            return Replacement(tensor=self._tensors["set_weight"])
        if has & {"diff_b", "up_bias"}:
            return None
        raise self._broken(f"only {', '.join(sorted(has))}", "the factors that belong to it")

    def _low_rank(self, scale: Callable[[int], float]) -> LowRank:
        down, up, mid = self._get("down"), self._get("up"), self._tensors.get("mid")
        if down.ndim < 2 or up.ndim < 2 or up[0, 0].numel() != 1:
            raise self._broken(f"{_shape(down)} and {_shape(up)}", "matrices (rank, in) and (out, rank)")
        if up.shape[1] != down.shape[0]:
            raise self._broken(f"rank {down.shape[0]} in A and rank {up.shape[1]} in B", "one rank in both")
        if mid is not None and tuple(mid.shape[:2]) != (up.shape[1], down.shape[0]):
            raise self._broken(f"a middle of {_shape(mid)}", f"({up.shape[1]}, {down.shape[0]}, ...)")
        return LowRank(down=down, up=up, mid=mid, scale=scale(down.shape[0]))

    def _hadamard(self, scale: Callable[[int], float]) -> Hadamard:
        first, second = (self._product(f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
        if first.shape != second.shape:
            raise self._broken(f"factors {first.shape} and {second.shape}", "two of one shape")
        return Hadamard(first=first, second=second, scale=scale(first.rank))

    def _kronecker(self, scale: Callable[[int], float]) -> Kronecker:
        factors: list[Tensor | Product] = []
        for n, core in ((1, ""), (2, "lokr_t2")):
            whole = self._tensors.get(f"lokr_w{n}")
            factors.append(self._product(f"lokr_w{n}_a", f"lokr_w{n}_b", core) if whole is None else whole)
        for factor in factors:
            if len(factor.shape) < 2:
                raise self._broken(f"a factor of shape {tuple(factor.shape)}", "matrices")
        change = Kronecker(first=factors[0], second=factors[1])
        # Two whole factors have no rank, and their trainers set alpha to what makes the scale 1.
        return change if change.rank is None else replace(change, scale=scale(change.rank))

    def _product(self, left: str, right: str, core: str) -> Product:
        a, b, t = self._get(left), self._get(right), self._tensors.get(core)
        ranks = (a.shape[1], b.shape[0]) if t is None else (a.shape[0], t.shape[0], b.shape[0], t.shape[1])
        if a.ndim < 2 or b.ndim < 2 or ranks[0] != ranks[1] or ranks[2:3] != ranks[3:]:
            raise self._broken(f"{_shape(a)} and {_shape(b)} in {left} and {right}", "factors of one rank")
        return Product(left=a, right=b, core=t)

    def magnitude(self, shape: tuple[int, ...]) -> Tensor:
        """As (out, 1, ...) or (1, in, ...)."""
        given = self._tensors["magnitude"]
        ones = (1,) * (len(shape) - 2)
        by_rows = given.ndim == 1 or given.shape[0] != 1 or shape[0] == 1
        if given.numel() == shape[0 if by_rows else 1]:
            return given.reshape(shape[0], 1, *ones) if by_rows else given.reshape(1, shape[1], *ones)
        raise self._broken(f"a DoRA magnitude of shape {_shape(given)}", f"({shape[0]}, 1) or (1, {shape[1]})")

    def _get(self, role: str) -> Tensor:
        if role not in self._tensors:
            raise self._broken(f"{', '.join(sorted(self._tensors))} without {role}", "every factor of the product")
        return self._tensors[role]

    def _broken(self, given: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"The LoRA of {self._name} cannot be put together",
            given=f"{given} in {self._path}",
            expected=expected,
            do="download or export the file again",
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


# --- names ------------------------------------------------------------------------------------------------------------

_DOTTED_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
)
_JOINED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", TENCENT_PREFIX)


@dataclass(frozen=True, slots=True)
class _Place:
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
        self._dotted: dict[str, _Place] = {}
        self._joined: dict[str, _Place] = {}
        self._layouts_of: dict[str, set[str]] = {}
        for layout, parts in self._parts.items():
            for place, name in ((place, name) for named in parts.values() for name, place in named):
                old = name.removesuffix(".0") if name.endswith(".to_out.0") else name  # as old diffusers files say
                for alias in (name, old):
                    self._dotted.setdefault(alias, place)
                    self._joined.setdefault(alias.replace(".", "_"), place)
                    self._layouts_of.setdefault(alias.replace(".", "_"), set()).add(layout)

    def find(self, name: str) -> tuple[_Place, set[str]] | None:
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

    def parts(self, module: str, layout: str) -> list[tuple[str, _Place]]:
        """The names of a module in a layout, with the rows that each stands for."""
        return self._parts[layout].get(module, [])


def _parts(shapes: Mapping[str, tuple[int, ...]], layout: KeyMap | None) -> dict[str, list[tuple[str, _Place]]]:
    """module -> (name, rows) of each of its parts; the numbers of the rows go through the map like a weight."""
    parts: dict[str, list[tuple[str, _Place]]] = {}
    for module, shape in shapes.items():
        if layout is None:
            parts[module] = [(module, _Place(module, 0, shape[0], None))]
            continue
        try:
            foreign = layout.to_foreign({f"{module}.weight": torch.arange(shape[0])})
        except CheckpointError:  # a map need not name every module, nor be able to cut each
            continue
        parts[module] = [(name.removesuffix(".weight"), _place(module, rows)) for name, rows in foreign.items()]
    return parts


def _place(module: str, rows: Tensor) -> _Place:
    first = int(rows[0])
    follows = torch.equal(rows, torch.arange(first, first + len(rows)))
    return _Place(module, first if follows else 0, len(rows), None if follows else rows)


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
    patches: dict[tuple[str, int, int], Patch] = {}
    unmatched = list(lora.other_keys)
    common = set(names.layouts)
    for entry in lora.entries:
        match = names.find(entry.name)
        if match is None:
            unmatched += entry.keys
            continue
        place, layouts = match
        patch = _patch(entry, _part_of(place, entry), names.shapes[place.module], lora.path)
        rows = patch.module, patch.start, patch.length
        if rows in patches:
            raise CheckpointError(
                f"The LoRA changes {patch.module} twice",
                given=f"{entry.name} beside another name for it in {lora.path}",
                do="use a file that names each module once",
            )
        patches[rows] = patch
        common &= layouts
    num_keys = sum(len(entry.keys) for entry in lora.entries) + len(lora.other_keys)
    if not patches:
        raise CheckpointError(
            "Nothing in this LoRA belongs to this network",
            given=f"{lora.path} with {num_keys} keys such as {unmatched[0]}" if unmatched else str(lora.path),
            expected="names like " + ", ".join(list(names.shapes)[:2]),
            do=f"it looks like {looks_like(lora)}: use it with that model",
        )
    changes = [patch.change for patch in patches.values() if patch.change is not None]
    layout = next((name for name in names.layouts if name in common), "mixed")
    report = Report(
        path=lora.path,
        digest=lora.digest,
        dialect=f"{lora.style}, {layout} names",
        modules=tuple(dict.fromkeys(module for module, _, _ in patches)),
        unmatched=tuple(unmatched),
        num_keys=num_keys,
        ranks=tuple(sorted({rank for change in changes if (rank := rank_of(change)) is not None})),
        alphas=tuple(sorted({round(alpha, 6) for change in changes if (alpha := _alpha_of(change)) is not None})),
    )
    found = tuple(patches.values())
    return BoundLora(patches=found, report=report, widened=_widened(found, names.shapes))


def _part_of(place: _Place, entry: Entry) -> _Place:
    if entry.part is None:
        return place
    index, count = entry.part
    if index >= count or place.length % count or place.order is not None:
        raise CheckpointError(
            f"The parts of {entry.name} do not make up the module", given=f"part {index} of {count}", expected="all"
        )
    length = place.length // count
    return replace(place, start=place.start + index * length, length=length)


def _patch(entry: Entry, place: _Place, shape: tuple[int, ...], path: Path) -> Patch:
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
            given=f"{_shape(bias)} in {path}",
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


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One way to spell a LoRA."""

    layout: str
    """whose module names: "native" or a key of the family's layouts"""
    prefix: str
    joined: bool = False
    """underscores for dots"""
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: bool = False
    """alpha is written and heeded; else the scale goes into the factors"""


_KOHYA: dict[str, Any] = {"joined": True, "down": "lora_down.weight", "up": "lora_up.weight"}

DIALECTS: Mapping[str, Dialect] = {
    "musubi": Dialect(layout="native", prefix="lora_unet_", alpha=True, **_KOHYA),
    "kohya-comfy": Dialect(layout="comfy", prefix="lora_unet_", alpha=True, **_KOHYA),
    "tencent": Dialect(layout="native", prefix=TENCENT_PREFIX, **_KOHYA),
    "diffusion-pipe": Dialect(layout="native", prefix="transformer."),
    "comfy": Dialect(layout="native", prefix="diffusion_model."),
    "comfy-internal": Dialect(layout="comfy", prefix="diffusion_model."),
    "peft": Dialect(layout="native", prefix=_PEFT_RAW_PREFIX),
    "diffusers": Dialect(layout="diffusers", prefix="transformer."),
    "diffusers-old": Dialect(layout="diffusers", prefix="transformer.", down="lora.down.weight", up="lora.up.weight"),
}
"""what :func:`write_lora` can write; :func:`read_lora` reads these and more"""


def write_lora(
    path: str | Path,
    patches: Sequence[Patch],
    names: ModuleNames,
    dialect: str,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write changes in one of the :data:`DIALECTS`: fused projections are cut, or put together, as it needs.

    Raises:
        CheckpointError: a change cannot be cut or put together (a DoRA by columns, replaced weights in parts).
        FileError: the file cannot be written.
    """
    tensors = dialect_tensors(patches, names, dialect)
    save_tensors(path, tensors, {"format": "pt", **(metadata or {})})


def dialect_tensors(patches: Sequence[Patch], names: ModuleNames, dialect: str) -> dict[str, Tensor]:
    """The tensors that :func:`write_lora` writes."""
    form = DIALECTS[dialect]
    by_module: dict[str, list[Patch]] = {}
    for patch in patches:
        by_module.setdefault(patch.module, []).append(patch)
    tensors: dict[str, Tensor] = {}
    for module, own in by_module.items():
        parts = names.parts(module, form.layout)
        if not parts:
            raise CheckpointError(f"The layout has no name for {module}", given=dialect)
        for name, change, bias in _repart(own, parts):
            stem = form.prefix + (name.replace(".", "_") if form.joined else name)
            tensors |= {f"{stem}.{end}": tensor for end, tensor in _spell(change, bias, form)}
    return tensors


def _repart(
    patches: list[Patch], parts: list[tuple[str, _Place]]
) -> Iterator[tuple[str, Change | None, Tensor | None]]:
    """The changes of one module as changes of its named parts."""
    ranges = {(place.start, place.length): name for name, place in parts if place.order is None}
    if all((patch.start, patch.length) in ranges for patch in patches):
        for patch in patches:
            yield ranges[patch.start, patch.length], patch.change, patch.bias
        return
    num_rows = sum(place.length for _, place in parts)
    changes = [(patch.start, patch.change) for patch in patches if patch.change is not None]
    whole = fuse(changes, num_rows) if changes else None
    biases = [(patch.start, patch.bias) for patch in patches if patch.bias is not None]
    bias = torch.zeros(num_rows) if biases else None
    for start, values in biases:
        assert bias is not None
        bias[start : start + len(values)] += values.float()
    for name, place in parts:
        rows = torch.arange(place.start, place.start + place.length) if place.order is None else place.order
        complete = place.order is None and place.length == num_rows
        change = whole if whole is None or complete else whole.rows(rows)
        yield name, change, None if bias is None else bias[rows]


def _spell(change: Change | None, bias: Tensor | None, form: Dialect) -> Iterator[tuple[str, Tensor]]:
    """(ending, tensor) of one module."""
    if isinstance(change, Decomposed):
        yield "dora_scale", change.magnitude
        change = change.inner
    if isinstance(change, LowRank):
        up = change.up if form.alpha or change.scale == 1.0 else change.scale * change.up.float()
        yield form.down, change.down
        yield form.up, up
        if change.mid is not None:
            yield "lora_mid.weight", change.mid
        if form.alpha:
            yield "alpha", torch.tensor(change.scale * change.rank)
    elif isinstance(change, Hadamard):
        for n, factor in (("1", change.first), ("2", change.second)):
            yield from _spell_product(f"hada_w{n}", factor, f"hada_t{n}")
        yield "alpha", torch.tensor(change.scale * change.rank)
    elif isinstance(change, Kronecker):
        for n, factor in (("1", change.first), ("2", change.second)):
            if isinstance(factor, Product):
                yield from _spell_product(f"lokr_w{n}", factor, "lokr_t2")
            else:
                yield f"lokr_w{n}", factor
        if change.rank is not None:
            yield "alpha", torch.tensor(change.scale * change.rank)
    elif isinstance(change, Difference):
        yield "diff", change.tensor
    elif isinstance(change, Replacement):
        yield "set_weight", change.tensor
    if bias is not None:
        yield "diff_b", bias


def _spell_product(name: str, product: Product, core: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}_a", product.left
    yield f"{name}_b", product.right
    if product.core is not None:
        yield core, product.core
