"""What a LoRA changes in one weight: a small class for each published form, which knows its dense difference.

Every difference is float32 and at strength 1. A form that speaks of the weight it changes (:attr:`needs_base`) is
given that weight. Sources: LoRA (arXiv:2106.09685), LyCORIS (arXiv:2309.14859) for Hadamard and Kronecker products
and the Tucker forms of convolutions, DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError

Move = Callable[[Tensor], Tensor]
"""a tensor to another device or dtype"""


class Change(Protocol):
    """A change of one weight, or of some of its output rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that is changed: (out, in), (out, in, *kernel), or (n,) of a norm."""
        ...

    @property
    def needs_base(self) -> bool:
        """Whether :meth:`delta` must be told the weight."""
        ...

    def delta(self, base: Tensor | None = None) -> Tensor:
        """What is added to the weight, float32. ``base`` has its shape."""
        ...

    def rows(self, index: Tensor) -> Change:
        """The change of these output rows alone, in this order."""
        ...

    def map(self, move: Move) -> Change:
        """With ``move`` applied to every tensor inside."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """scale * up @ down."""

    down: Tensor
    """(rank, in) or (rank, in, *kernel); (rank, in, 1, ...) where there is a ``mid``"""
    up: Tensor
    """(out, rank) or (out, rank, 1, ...)"""
    mid: Tensor | None = None
    """(rank, rank, *kernel): the core of a convolution's Tucker form"""
    scale: float = 1.0
    needs_base = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    def delta(self, base: Tensor | None = None) -> Tensor:
        up, down = self.up.float().flatten(1), self.down.float()
        if self.mid is not None:
            down = torch.einsum("sr...,ri->si...", self.mid.float(), down.flatten(1))
        return (self.scale * up @ down.flatten(1)).reshape(self.shape)

    def rows(self, index: Tensor) -> LowRank:
        return replace(self, up=self.up[index])

    def map(self, move: Move) -> LowRank:
        mid = None if self.mid is None else move(self.mid)
        return replace(self, down=move(self.down), up=move(self.up), mid=mid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """left @ right, or its Tucker form around ``core``."""

    left: Tensor
    """(out, rank); (rank, out) where there is a core"""
    right: Tensor
    """(rank, in)"""
    core: Tensor | None = None
    """(rank, rank, *kernel)"""

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.core is None:
            return self.left.shape[0], *self.right.shape[1:]
        return self.left.shape[1], self.right.shape[1], *self.core.shape[2:]

    def dense(self) -> Tensor:
        left, right = self.left.float(), self.right.float()
        if self.core is None:
            return (left @ right.flatten(1)).reshape(self.shape)
        return torch.einsum("ij...,jr,ip->pr...", self.core.float(), right, left)

    def rows(self, index: Tensor) -> Product:
        return replace(self, left=self.left[index] if self.core is None else self.left[:, index])

    def map(self, move: Move) -> Product:
        core = None if self.core is None else move(self.core)
        return Product(left=move(self.left), right=move(self.right), core=core)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hadamard:
    """LoHa: scale * (first * second), element by element."""

    first: Product
    second: Product
    scale: float = 1.0
    needs_base = False

    @property
    def rank(self) -> int:
        return self.first.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    def delta(self, base: Tensor | None = None) -> Tensor:
        return self.scale * self.first.dense() * self.second.dense()

    def rows(self, index: Tensor) -> Hadamard:
        return replace(self, first=self.first.rows(index), second=self.second.rows(index))

    def map(self, move: Move) -> Hadamard:
        return replace(self, first=self.first.map(move), second=self.second.map(move))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kronecker:
    """LoKr: scale * kron(first, second); each factor is a matrix or a product of two."""

    first: Tensor | Product
    second: Tensor | Product
    """(out, in) or (out, in, *kernel)"""
    scale: float = 1.0
    needs_base = False

    @property
    def rank(self) -> int | None:
        """None where both factors are whole."""
        ranks = [factor.rank for factor in (self.first, self.second) if isinstance(factor, Product)]
        return ranks[-1] if ranks else None

    @property
    def shape(self) -> tuple[int, ...]:
        a, b = self.first.shape, self.second.shape
        return a[0] * b[0], a[1] * b[1], *b[2:]

    def delta(self, base: Tensor | None = None) -> Tensor:
        first, second = (
            factor.dense() if isinstance(factor, Product) else factor.float() for factor in (self.first, self.second)
        )
        # kron wants its operands laid out plainly, which an einsum does not promise.
        first = first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim))
        return self.scale * torch.kron(first.contiguous(), second.contiguous())

    def rows(self, index: Tensor) -> Difference:
        """Some rows of a Kronecker product are none themselves."""
        return Difference(tensor=self.delta()[index])

    def map(self, move: Move) -> Kronecker:
        moved = (f.map(move) if isinstance(f, Product) else move(f) for f in (self.first, self.second))
        return Kronecker(first=next(moved), second=next(moved), scale=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The whole difference, not factored."""

    tensor: Tensor
    needs_base = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:
        return self.tensor.float()

    def rows(self, index: Tensor) -> Difference:
        return Difference(tensor=self.tensor[index])

    def map(self, move: Move) -> Difference:
        return Difference(tensor=move(self.tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """Another weight in place of the base: strength 1 is the new one, 0 the old one."""

    tensor: Tensor
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:
        assert base is not None
        return self.tensor.float() - base.float()

    def rows(self, index: Tensor) -> Replacement:
        return Replacement(tensor=self.tensor[index])

    def map(self, move: Move) -> Replacement:
        return Replacement(tensor=move(self.tensor))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposed:
    """DoRA: the direction of base + inner at a learned magnitude.

    weight = magnitude * (base + inner) / |base + inner|, with norms over each output row or each input column.
    """

    inner: Change
    magnitude: Tensor
    """(out, 1, ...) for norms of rows, (1, in, ...) for norms of columns"""
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return getattr(self.inner, "rank", None)

    @property
    def by_rows(self) -> bool:
        return self.magnitude.shape[0] == self.shape[0]

    def delta(self, base: Tensor | None = None) -> Tensor:
        assert base is not None
        base = base.float()
        moved = base + self.inner.delta(base).reshape(base.shape)
        kept = 0 if self.by_rows else 1
        norm = moved.norm(dim=[dim for dim in range(moved.ndim) if dim != kept], keepdim=True)
        magnitude = self.magnitude.float().reshape(norm.shape)
        return magnitude * moved / norm.clamp(min=torch.finfo(torch.float32).tiny) - base

    def rows(self, index: Tensor) -> Decomposed:
        if not self.by_rows:
            # The norm of a column goes over every row: a part of them has another one.
            complete = torch.equal(index.sort().values.cpu(), torch.arange(self.shape[0]))
            if not complete:
                raise CheckpointError(
                    "A DoRA with a magnitude per input column cannot be cut into parts",
                    given=f"{len(index)} of {self.shape[0]} rows",
                    do="write it in a layout with fused projections",
                )
        magnitude = self.magnitude[index] if self.by_rows else self.magnitude
        return Decomposed(inner=self.inner.rows(index), magnitude=magnitude)

    def map(self, move: Move) -> Decomposed:
        return Decomposed(inner=self.inner.map(move), magnitude=move(self.magnitude))


def rank_of(change: Change) -> int | None:
    """None for a change that is not factored."""
    return getattr(change, "rank", None)


def pad_inputs(tensor: Tensor, num_inputs: int) -> Tensor:
    """(out, in, ...) with zeros for the inputs beyond its own: how an input layer is enlarged."""
    missing = num_inputs - tensor.shape[1]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, missing)) if missing > 0 else tensor


def fuse(parts: list[tuple[int, Change]], num_rows: int) -> Change:
    """One change of ``num_rows`` rows from changes of row ranges, given as (first row, change).

    Low-rank parts stay low-rank: with one ``down`` their ``up`` are stacked, else the factors become block-diagonal.
    """
    if len(parts) == 1 and parts[0][1].shape[0] == num_rows:
        return parts[0][1]
    if all(isinstance(change, LowRank) and change.mid is None for _, change in parts):
        return _fuse_low_rank([(first, change) for first, change in parts if isinstance(change, LowRank)], num_rows)
    if any(change.needs_base for _, change in parts):
        raise CheckpointError(
            "Changes that speak of the weight itself (DoRA, set_weight) cannot be put together",
            given=f"{len(parts)} parts of a fused projection",
            do="write it in a layout with split projections",
        )
    whole = torch.zeros(num_rows, *parts[0][1].shape[1:])
    for first, change in parts:
        whole[first : first + change.shape[0]] += change.delta()
    return Difference(tensor=whole)


def _fuse_low_rank(parts: list[tuple[int, LowRank]], num_rows: int) -> LowRank:
    scales = {part.scale for _, part in parts}
    scale = scales.pop() if len(scales) == 1 else None
    downs = [part.down for _, part in parts]
    shared = all(down.shape == downs[0].shape and torch.equal(down, downs[0]) for down in downs[1:])
    down = downs[0] if shared else torch.cat(downs)
    kept = parts[0][1].up
    up = torch.zeros(num_rows, down.shape[0], *kept.shape[2:], dtype=kept.dtype if scale is not None else torch.float32)
    column = 0
    for first, part in parts:
        values = part.up if scale is not None else part.scale * part.up.float()
        up[first : first + len(values), column : column + part.rank] += values
        column += 0 if shared else part.rank
    return LowRank(down=down, up=up, scale=1.0 if scale is None else scale)
