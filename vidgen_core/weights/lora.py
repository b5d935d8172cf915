"""LoRA files in every spelling that people have on disk, read on their own: no network is needed here.

:mod:`lora_names` matches what was read to a network, :mod:`lora_write` spells it again.

The scale of up @ down depends on the spelling: kohya and musubi write ``alpha`` and mean alpha / rank; PEFT says it
in metadata or beside the file and means 1 where it says nothing; Tencent's own loader reads no alpha.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError
from .adapters import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Product, Replacement
from .header import read_header
from .load import read_tensors


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
    tells_alpha: bool = True
    """false where it was neither in the file nor given, so that up @ down counts in full"""


_LOW_RANK = (
    # (ending, style); {} is down / up, A / B
    (re.compile(r"(?P<name>.+)\.lora_(?P<which>down|up|mid)\.weight"), "kohya"),
    (re.compile(r"(?P<name>.+)\.lora_(?P<which>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"), "PEFT"),
    (re.compile(r"(?P<name>.+)\.lora_(?P<which>[AB])"), "PEFT"),
    (re.compile(r"(?P<name>.+?)[._]lora(?:_linear_layer)?\.(?P<which>down|up)\.weight"), "old diffusers"),
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
_SYNONYMS = {"w_norm": "diff", "b_norm": "diff_b"}
"""LyCORIS' endings for the weight and the bias of a norm"""

TENCENT_PREFIX = "Hunyuan_video_I2V_lora_"
PEFT_RAW_PREFIX = "base_model.model."


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
    ending = _SYNONYMS.get(ending, ending)
    return _Key(name, ending, _PLAIN[ending]) if name and ending in _PLAIN else None


def holds_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA's."""
    return any((key := _parse_key(name)) is not None and key.style is not None for name in names)


def read_lora(path: str | Path, *, alpha: float | None = None) -> Lora:
    """Read a LoRA: safetensors, or a ``.pt`` of plain tensors.

    Args:
        alpha: of the factors of which the file says none; None: their rank.

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
    told = scaling.alpha is not None or any("alpha" in fields for fields in grouped.values())
    scaling = replace(scaling, assumed=alpha)
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
        tells_alpha=told or alpha is not None or not any("up" in fields for fields in grouped.values()),
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
    assumed: float | None = None
    """where nothing says it, also of factors in other spellings"""

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> _PeftScaling:
        """From the file's metadata; a raw PEFT file keeps it in ``adapter_config.json`` beside itself."""
        sidecar = path.with_name("adapter_config.json")
        where, values = f"the metadata of {path}", dict[str, Any](metadata)
        try:
            if "lora_adapter_metadata" in metadata:
                values = json.loads(metadata["lora_adapter_metadata"])
            elif all(name.startswith(PEFT_RAW_PREFIX) for name in names) and sidecar.is_file():
                where, values = str(sidecar), json.loads(sidecar.read_text("utf-8"))
            found = {
                key.rpartition(".")[2]: value for key, value in values.items() if not key.startswith("text_encoder")
            }
            alpha, by_module = found.get("lora_alpha"), found.get("alpha_pattern") or {}
            if isinstance(by_module, str):  # plain metadata holds nothing but texts
                by_module = json.loads(by_module)
            return cls(
                alpha=None if alpha in (None, "None", "null") else float(alpha),
                by_module={name: float(value) for name, value in by_module.items()},
                root=str(found.get("use_rslora", False)).lower() == "true",
            )
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                "The LoRA's alpha cannot be read", given=where, expected="lora_alpha as a number"
            ) from error

    def scale(self, name: str, rank: int) -> float:
        own = [alpha for end, alpha in self.by_module.items() if name == end or name.endswith("." + end)]
        alpha = own[0] if own else self.alpha
        alpha = self.assumed if alpha is None else alpha
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
                f"The LoRA of {name} has a tensor of no use",
                given=f"{fields[role][0]} of {shape_text(tensor)} in {path}",
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
    if is_peft or scaling.assumed is None:
        return scaling.scale(name, rank) if is_peft else 1.0
    return scaling.assumed / rank


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
            raise self._broken(f"{shape_text(down)} and {shape_text(up)}", "matrices (rank, in) and (out, rank)")
        if up.shape[1] != down.shape[0]:
            raise self._broken(f"rank {down.shape[0]} in A and rank {up.shape[1]} in B", "one rank in both")
        if mid is not None and tuple(mid.shape[:2]) != (up.shape[1], down.shape[0]):
            raise self._broken(f"a middle of {shape_text(mid)}", f"({up.shape[1]}, {down.shape[0]}, ...)")
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
            raise self._broken(f"{shape_text(a)} and {shape_text(b)} in {left} and {right}", "factors of one rank")
        return Product(left=a, right=b, core=t)

    def magnitude(self, shape: tuple[int, ...]) -> Tensor:
        """As (out, 1, ...) or (1, in, ...)."""
        given = self._tensors["magnitude"]
        ones = (1,) * (len(shape) - 2)
        by_rows = given.ndim == 1 or given.shape[0] != 1 or shape[0] == 1
        if given.numel() == shape[0 if by_rows else 1]:
            return given.reshape(shape[0], 1, *ones) if by_rows else given.reshape(1, shape[1], *ones)
        raise self._broken(f"a DoRA magnitude of shape {shape_text(given)}", f"({shape[0]}, 1) or (1, {shape[1]})")

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


def shape_text(tensor: Tensor) -> str:
    """For messages."""
    return str(tuple(tensor.shape))
