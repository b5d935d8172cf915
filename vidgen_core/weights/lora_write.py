"""LoRAs spelt again, in any of the usual namings: what is fused here is cut there, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .adapters import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Product, Replacement, fuse
from .lora import PEFT_RAW_PREFIX, TENCENT_PREFIX
from .lora_names import ModuleNames, Patch, Place
from .save import save_tensors


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
    "peft": Dialect(layout="native", prefix=PEFT_RAW_PREFIX),
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


def _repart(patches: list[Patch], parts: list[tuple[str, Place]]) -> Iterator[tuple[str, Change | None, Tensor | None]]:
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
