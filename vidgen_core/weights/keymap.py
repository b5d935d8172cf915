"""One table that renames a model's weights between two layouts, in both directions.

A row names a module in our (native) layout and the same module in a foreign one. Fused projections are rows with
several foreign names. A name that no row knows, or a part of a fused weight that is not there, is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Row:
    """One module under its two names. ``*`` stands for a block's number and is carried over.

    What follows a module's name (``.weight``, ``.bias``, ...) is kept as it is.
    """

    native: str
    foreign: str | tuple[str, ...]
    """one name, or the parts of a fused projection in the order of their output rows"""
    parts: tuple[float, ...] = ()
    """relative number of output rows of each part; empty for equal parts"""
    chunk_order: tuple[int, ...] = ()
    """which of as many equal chunks of the foreign output rows each of ours is; empty leaves them in place"""
    pointwise_dims: int = 0
    """the foreign weight is a convolution of one point with this many trailing dimensions of size 1, ours a matrix"""

    def __post_init__(self) -> None:
        names = self.names
        assert not self.parts or len(self.parts) == len(names), self
        assert not self.chunk_order or len(names) == 1, self
        assert all(name.count("*") == self.native.count("*") for name in names), self

    @property
    def names(self) -> tuple[str, ...]:
        return (self.foreign,) if isinstance(self.foreign, str) else self.foreign


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: row, part of it, and the name on the other side."""

    row: Row
    part: int
    numbers: tuple[str, ...]
    leaf: str

    def fill(self, pattern: str) -> str:
        numbers = iter(self.numbers)
        return re.sub(r"\*", lambda _: next(numbers), pattern) + self.leaf


class _Side:
    """Finds the row of a name in one of the two layouts."""

    def __init__(self, patterns: Sequence[tuple[str, Row, int]]) -> None:
        self._patterns = [(_compile(pattern), row, part) for pattern, row, part in patterns]
        self.names = [pattern for pattern, _, _ in patterns]

    def find(self, name: str) -> _Place | None:
        found = [
            _Place(row=row, part=part, numbers=match.groups()[:-1], leaf=match.groups()[-1])
            for regex, row, part in self._patterns
            if (match := regex.fullmatch(name))
        ]
        assert len(found) <= 1, f"{name} fits {len(found)} rows of the key map"
        return found[0] if found else None


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)") + r"((?:\..+)?)")


class KeyMap:
    """Translates whole state dicts, or single names, between the native and a foreign layout.

    Args:
        rows: the table. Every name must fit one row at most.
        foreign: what the other layout is called in messages.
        prefixes: stripped from foreign names where all of them carry it (a wrapper's ``model.``).
        only_prefixes: as ``prefixes``, where some names carry it; the others belong to something else and are left out.
        unneeded: names, behind a prefix, that are known and left out; one that ends in a dot stands for all below it.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        foreign: str,
        prefixes: Sequence[str] = (),
        only_prefixes: Sequence[str] = (),
        unneeded: Sequence[str] = (),
    ) -> None:
        self.title = foreign
        self._unneeded = frozenset(name for name in unneeded if not name.endswith("."))
        self._unneeded_below = tuple(name for name in unneeded if name.endswith("."))
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        self._only_prefixes = tuple(only_prefixes)
        self._native = _Side([(row.native, row, 0) for row in rows])
        self._foreign = _Side([(name, row, part) for row in rows for part, name in enumerate(row.names)])

    def native_name(self, foreign: str) -> str:
        """The native name of one foreign weight (without a prefix); the parts of a fused weight share theirs.

        Raises:
            CheckpointError: no row knows the name.
        """
        place = self._find(self._foreign, foreign, self.title)
        return place.fill(place.row.native)

    def foreign_names(self, native: str) -> tuple[str, ...]:
        """The foreign names of one native weight, several when it is fused.

        Raises:
            CheckpointError: no row knows the name.
        """
        place = self._find(self._native, native, "native")
        return tuple(place.fill(name) for name in place.row.names)

    def to_native(self, foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename, join the parts of fused weights and put rows in our order. Works on meta tensors.

        Raises:
            CheckpointError: an unknown name, or a fused weight that lacks a part; the message names it.
        """
        prefix = self._prefix(foreign)
        gathered: dict[str, tuple[_Place, dict[int, Tensor]]] = {}
        for name, place in self._places(foreign):
            gathered.setdefault(place.fill(place.row.native), (place, {}))[1][place.part] = foreign[name]
        native = {}
        for name, (place, parts) in gathered.items():
            missing = [prefix + place.fill(p) for part, p in enumerate(place.row.names) if part not in parts]
            if missing:
                raise CheckpointError(
                    f"The weight {name!r} cannot be put together",
                    given=f"a checkpoint in the {self.title} layout without {', '.join(missing)}",
                    do="use the complete file",
                )
            native[name] = _join([parts[part] for part in range(len(parts))], place.row, name)
        return native

    def native_names(self, foreign: Iterable[str]) -> dict[str, str]:
        """foreign name -> native name of a whole file's names; the parts of a fused weight share theirs.

        Raises:
            CheckpointError: no row knows a name.
        """
        return {name: place.fill(place.row.native) for name, place in self._places(foreign)}

    def to_foreign(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename, cut fused weights into their parts (views) and reorder rows. Works on meta tensors.

        Raises:
            CheckpointError: an unknown name.
        """
        foreign = {}
        for name, tensor in native.items():
            place = self._find(self._native, name, "native")
            for pattern, part in zip(place.row.names, _cut(tensor, place.row, name), strict=True):
                foreign[place.fill(pattern)] = part
        return foreign

    def _places(self, foreign: Iterable[str]) -> list[tuple[str, _Place]]:
        names = list(foreign)
        prefix = self._prefix(names)
        own = [name for name in names if name.startswith(prefix) and not self._is_unneeded(name[len(prefix) :])]
        return [(name, self._find(self._foreign, name[len(prefix) :], self.title)) for name in own]

    def _is_unneeded(self, name: str) -> bool:
        return name in self._unneeded or name.startswith(self._unneeded_below)

    def _prefix(self, names: Iterable[str]) -> str:
        names = list(names)
        for prefix in self._prefixes:
            if names and all(name.startswith(prefix) for name in names):
                return prefix
        for prefix in self._only_prefixes:
            if any(name.startswith(prefix) for name in names):
                return prefix
        return ""

    def _find(self, side: _Side, name: str, layout: str) -> _Place:
        place = side.find(name)
        if place is None:
            near = difflib.get_close_matches(name, side.names, n=1, cutoff=0.5)
            raise CheckpointError(
                f"No weight of this model is called {name!r}",
                given=f"a checkpoint read in the {layout} layout",
                expected=f"names like {near[0]}" if near else None,
                do="check that the file belongs to this model",
            )
        return place


def _join(parts: list[Tensor], row: Row, name: str) -> Tensor:
    if row.pointwise_dims:
        parts = [part.flatten(-1 - row.pointwise_dims) if part.ndim > row.pointwise_dims else part for part in parts]
    if len(parts) == 1:
        return _reordered(parts[0], row.chunk_order)
    if parts[0].ndim == 0:
        # A scale of the whole fused weight, repeated for each part.
        if any(not torch.equal(part, parts[0]) for part in parts[1:]):
            raise CheckpointError(
                f"The parts of {name!r} have different scales and cannot share one",
                given=", ".join(str(float(part)) for part in parts),
                do="use a checkpoint that is not quantised, or one in the native layout",
            )
        return parts[0]
    return torch.cat(parts)


def _cut(tensor: Tensor, row: Row, name: str) -> list[Tensor]:
    count = len(row.names)
    if count == 1:
        back = tuple(row.chunk_order.index(number) for number in range(len(row.chunk_order)))
        tensor = _reordered(tensor, back)
        is_point = row.pointwise_dims and tensor.ndim > 1
        return [tensor.reshape(*tensor.shape, *[1] * row.pointwise_dims) if is_point else tensor]
    if tensor.ndim == 0:
        return [tensor] * count
    parts = row.parts or (1.0,) * count
    sizes = [tensor.shape[0] * part / sum(parts) for part in parts]
    if any(size != int(size) for size in sizes):
        raise CheckpointError(
            f"The weight {name!r} cannot be cut into its parts",
            given=f"{tensor.shape[0]} rows",
            expected=f"rows in the proportion {' : '.join(f'{part:g}' for part in parts)}",
        )
    return list(tensor.split([int(size) for size in sizes]))


def _reordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """Chunk i of the result is chunk ``order[i]``; a scale of the whole weight stays."""
    if not order or tensor.ndim == 0:
        return tensor
    chunks = tensor.chunk(len(order))
    return torch.cat([chunks[number] for number in order])
