"""How weights lie in memory: stored small and widened on use, and how many blocks stay there.

Plain modules in, plain modules out: :func:`store_linears` puts a layer that holds fewer bytes in the place of an
``nn.Linear``, and :meth:`Stored.undo` puts an ``nn.Linear`` back. Norms, biases and everything outside the given paths
stay as they are. What is stored depends on the weight alone, to the bit, on every device: a block that is read from a
file again and again is the same each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError
from .float8 import float8_linear

_PIECE = 1 << 22
"""weights that are converted at a time, so that a large layer needs little room besides itself"""

# The 16 numbers of NF4: quantiles of the normal distribution, each as likely as the others, with an exact 0, scaled to
# [-1, 1]. Source: Dettmers et al. 2023, "QLoRA" (arXiv 2305.14314), appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


# --- ways to store a matrix -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A way to store the (rows, columns) weight of a linear layer: ``stored`` numbers, and float32 ``scale``s."""

    dtype: torch.dtype
    """of the stored numbers; uint8 holds two of NF4's"""
    scaled: Literal["no", "tensor", "row", "block"] = "no"
    """how many weights share a scale"""
    block: int = 0
    """consecutive weights of a row that share a scale, where blocks do"""
    top: float = 1.0
    """the largest stored magnitude"""
    products: bool = False
    """inputs are rounded to float8 as well and multiplied in float8, where the chip can"""

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """name -> shape and dtype of what is stored for a matrix."""
        blocks = -(-columns // self.block) if self.block else 1
        packed = self.dtype == torch.uint8
        shapes = {"stored": ((rows, blocks * self.block // 2 if packed else columns), self.dtype)}
        if self.scaled != "no":
            shapes["scale"] = ((1 if self.scaled == "tensor" else rows, blocks), torch.float32)
        return shapes

    def num_bytes(self, rows: int, columns: int) -> int:
        return sum(a * b * dtype.itemsize for (a, b), dtype in self.shapes(rows, columns).values())

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """(rows, columns) of any floating dtype, also on the meta device -> the tensors of :meth:`shapes`."""
        rows, columns = weight.shape
        made = {
            name: torch.empty(shape, dtype=dtype, device=weight.device)
            for name, (shape, dtype) in self.shapes(rows, columns).items()
        }
        if weight.is_meta:
            return made
        if self.scaled == "tensor":
            made["scale"].copy_(self._scale(weight.flatten().unsqueeze(0)))
        for piece in _pieces(rows, columns):
            some = weight[piece].float()
            if self.scaled == "no":
                made["stored"][piece] = some.to(self.dtype)
                continue
            blocks = self._in_blocks(some)
            if self.scaled != "tensor":
                made["scale"][piece] = self._scale(blocks)
            scale = made["scale"] if self.scaled == "tensor" else made["scale"][piece]
            made["stored"][piece] = self._rounded(blocks / scale.unsqueeze(-1), columns)
        return made

    def decode(self, stored: Tensor, scale: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
        """What :meth:`encode` made -> (rows, columns) of ``dtype``; scaled in float32, then rounded once."""
        if scale is None:
            return stored.to(dtype)
        rows = stored.shape[0]
        weight = torch.empty((rows, columns), dtype=dtype, device=stored.device)
        for piece in _pieces(rows, columns):
            numbers = self._in_blocks(_unpacked(stored[piece]) if self.dtype == torch.uint8 else stored[piece].float())
            some = scale if self.scaled == "tensor" else scale[piece]
            weight[piece] = numbers.mul_(some.unsqueeze(-1)).flatten(1)[:, :columns]
        return weight

    def _in_blocks(self, rows: Tensor) -> Tensor:
        """(R, C) float32 -> (R, blocks, C / blocks), filled up with zeros; one block where rows are not cut."""
        if self.scaled != "block":
            return rows.unsqueeze(1)
        return F.pad(rows, (0, -rows.shape[1] % self.block)).unflatten(1, (-1, self.block))

    def _scale(self, blocks: Tensor) -> Tensor:
        """(..., n) -> (...): what the largest magnitude is divided by to become :attr:`top`; 1 for zeros."""
        low, high = blocks.aminmax(dim=-1)
        scale = torch.maximum(-low, high).float() / self.top
        return torch.where(scale > 0, scale, 1.0)

    def _rounded(self, blocks: Tensor, columns: int) -> Tensor:
        """(R, blocks, n) in [-top, top] -> rows as they are stored."""
        if self.dtype == torch.uint8:
            table = torch.tensor(NF4, device=blocks.device)
            codes = torch.bucketize(blocks.flatten(1), (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
            first, second = codes.unflatten(1, (-1, 2)).unbind(2)
            return first << 4 | second
        rows = blocks.flatten(1)[:, :columns]
        # A quotient may come out an ulp above the top, and float8 knows no saturation.
        return (rows.round_() if self.dtype == torch.int8 else rows).clamp_(-self.top, self.top).to(self.dtype)


def _unpacked(packed: Tensor) -> Tensor:
    """(R, n) uint8 -> (R, 2 n) float32 of :data:`NF4`."""
    table = torch.tensor(NF4, device=packed.device)
    pairs = torch.cartesian_prod(table, table)  # (256, 2): by the value of a byte
    return F.embedding(packed.int(), pairs).flatten(1)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _float8(dtype: torch.dtype, scaled: Literal["tensor", "row", "block"], *, products: bool = False) -> Storage:
    block = 128 if scaled == "block" else 0
    return Storage(dtype=dtype, scaled=scaled, block=block, top=torch.finfo(dtype).max, products=products)


STORAGES: Mapping[str, Storage] = {
    "float32": Storage(dtype=torch.float32),
    "bfloat16": Storage(dtype=torch.bfloat16),
    "float16": Storage(dtype=torch.float16),
    "float8": _float8(torch.float8_e4m3fn, "tensor"),
    "float8 per row": _float8(torch.float8_e4m3fn, "row"),
    "float8 per block": _float8(torch.float8_e4m3fn, "block"),
    "float8 e5m2": _float8(torch.float8_e5m2, "tensor"),
    "float8 e5m2 per row": _float8(torch.float8_e5m2, "row"),
    "float8 e5m2 per block": _float8(torch.float8_e5m2, "block"),
    "float8 matmul": _float8(torch.float8_e4m3fn, "row", products=True),
    "int8": Storage(dtype=torch.int8, scaled="row", top=127.0),
    "nf4": Storage(dtype=torch.uint8, scaled="block", block=64),
}
"""name -> how linear weights are stored; also what the user may choose"""

AUTO, AS_FILE = "auto", "as the file"
CHOICES = (AUTO, AS_FILE, *STORAGES)
"""what the user may say of storage: ``auto`` decides for the device, ``as the file`` converts nothing"""


def check_choice(name: str) -> None:
    """Raise SettingsError for a name that is none of :data:`CHOICES`."""
    if name not in CHOICES:
        raise SettingsError("There is no such way to store weights", given=name, expected=", ".join(CHOICES))


def held_as(name: str, dtype: torch.dtype | None) -> tuple[torch.dtype | None, Storage | None]:
    """A choice of storage -> dtype of the module, and how its linear weights are stored besides; None: as plain ones.

    Args:
        dtype: asked for; None: whatever suits the storage.
    """
    storage = STORAGES.get(name)
    if storage is not None and storage.scaled == "no" and dtype in (None, storage.dtype):
        return storage.dtype, None
    return dtype, storage


# --- layers -----------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Module):
    """``nn.Linear`` with a weight that is held in fewer bytes and widened on use.

    Args:
        linear: whose place it takes; only its sizes and whether it has a bias count.
        dtype: of :attr:`weight`, for code that looks at it.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias), requires_grad=False)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as numbers: (out_features, in_features) of ``dtype``, made anew at every call."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """:meth:`dense_weight` in the layer's dtype; costs as much as using the layer."""
        return self.dense_weight(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class StoredLinear(QuantisedLinear):
    """A weight in one of :data:`STORAGES`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, storage: Storage) -> None:
        super().__init__(linear, dtype)
        self.storage = storage
        self.register_buffer("scale", None)
        for name, (shape, kind) in storage.shapes(self.out_features, self.in_features).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=linear.weight.device))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.storage.decode(self.stored, self.scale, self.in_features, dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.storage.products:
            return float8_linear(x, self.stored, self.scale, self.bias)  # type: ignore[arg-type]
        return super().forward(x)


def linears_in(module: nn.Module, paths: Sequence[str]) -> dict[str, nn.Linear]:
    """path -> plain ``nn.Linear`` below one of ``paths``. Subclasses and layers used by their weight alone stay out."""
    begins = tuple(f"{path}." for path in paths)
    return {name: item for name, item in module.named_modules() if type(item) is nn.Linear and name.startswith(begins)}


def prepare_storage(module: nn.Module, storage: Storage, paths: Sequence[str], dtype: torch.dtype) -> list[str]:
    """Empty :class:`StoredLinear` layers, to be given stored tensors, in the place of linear ones; their paths."""
    linears = linears_in(module, paths)
    for path, linear in linears.items():
        module.set_submodule(path, StoredLinear(linear, dtype, storage))
    return list(linears)


def store_linears(module: nn.Module, storage: Storage, paths: Sequence[str], *, keep: bool = False) -> Stored:
    """Store the weights of the linear layers below ``paths`` after they were loaded, one after the other.

    Args:
        paths: of submodules, e.g. the lists of blocks.
        keep: hold on to the layers that were there, so that :meth:`Stored.undo` gives back their bits; else it gives
            back the stored weights, widened.
    """
    stored = Stored(module, keep=keep)
    for path, linear in linears_in(module, paths).items():
        assert not linear.weight.is_meta, f"{path} has no weight that could be stored"
        layer = StoredLinear(linear, linear.weight.dtype, storage)
        with torch.no_grad():
            for name, tensor in storage.encode(linear.weight.detach()).items():
                setattr(layer, name, tensor)
            if linear.bias is not None:
                layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        stored.exchange(path, linear, layer)
    return stored


class Stored:
    """Layers that :func:`store_linears` put into a module."""

    def __init__(self, module: nn.Module, *, keep: bool) -> None:
        self._module, self._keep = module, keep
        self._before: dict[str, nn.Linear | None] = {}

    def exchange(self, path: str, linear: nn.Linear, layer: StoredLinear) -> None:
        self._module.set_submodule(path, layer.train(linear.training))
        self._before[path] = linear if self._keep else None

    def undo(self) -> None:
        """The module has plain linear layers again. A second call does nothing."""
        while self._before:
            path, linear = self._before.popitem()
            layer = self._module.get_submodule(path)
            assert isinstance(layer, StoredLinear), f"{path} was exchanged since"
            self._module.set_submodule(path, _plain(layer) if linear is None else linear)


def _plain(layer: StoredLinear) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear.train(layer.training)


# --- which blocks stay ------------------------------------------------------------------------------------------------


def resident_blocks(sizes: Sequence[int], staging: Sequence[int], room: int) -> frozenset[int]:
    """Numbers of the blocks that stay in memory; the others are brought for each run.

    They are spread evenly, so that while one of them runs there is time to bring the next one that is not there.

    Args:
        sizes: bytes of each block.
        staging: bytes that streaming needs where this block is the largest of those that are streamed.
        room: bytes for both.

    Raises:
        SettingsError: there is not even room to stream every block.
    """
    number = len(sizes)
    for count in range(number, -1, -1):
        kept = frozenset(i for i in range(number) if (i + 1) * count // number > i * count // number)
        rest = [staging[i] for i in range(number) if i not in kept]
        if sum(sizes[i] for i in kept) + max(rest, default=0) <= room:
            return kept
    raise too_small(max(staging), room)


def too_small(needed: int, room: int) -> SettingsError:
    """For a budget that has no room for ``needed`` bytes."""
    return SettingsError(
        "The memory budget is too small for this network",
        given=f"{max(0, room) / 1e9:.3g} GB left for what needs {needed / 1e9:.3g} GB at a time",
        do=f"raise the budget by {(needed - room) / 1e9:.3g} GB, stream the blocks, or choose a smaller storage",
    )


_UNITS = {"": 1e9, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}


def parse_bytes(text: str) -> int:
    """``"700MB"``, ``"8 GB"``, ``"7.5GiB"`` or ``"8"`` (GB) -> bytes. SettingsError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None or float(match[1]) == 0:
        raise SettingsError("The amount of memory cannot be read", given=text, expected="such as 700MB, 8GB or 7.5GiB")
    return round(float(match[1]) * unit)
