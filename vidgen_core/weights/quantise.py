"""Linear layers whose weights stay as small as the file has them, and are widened when they are used.

Three meanings of float8 share one layer: a scale per weight (Tencent, ComfyUI) or none (a plain cast). GGUF's blocks
have another. Between file and module a weight travels under the names of ``records.Header.stored_names``:
``a.weight`` in float8 with ``a.scale_weight``, or packed bytes as ``a.packed.Q4_K``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..memory.place import QuantisedLinear, Storage
from .packing import PACKINGS, unpack
from .records import FLOAT8, scale_name

_PACKED = re.compile(r"(?:(.+)\.)?packed\.(\w+)")


class Float8Linear(QuantisedLinear):
    """Weights in float8, times a scale for each output row if there is one."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, stored: torch.dtype, *, scaled: bool) -> None:
        super().__init__(linear, dtype)
        self.register_buffer("stored", torch.empty(linear.weight.shape, dtype=stored, device=linear.weight.device))
        scale = torch.empty(self.out_features, device=linear.weight.device) if scaled else None
        self.register_buffer("scale", scale)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return widen(self.stored, self.scale, dtype)  # type: ignore[arg-type]


class PackedLinear(QuantisedLinear):
    """Weights in GGUF's blocks."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, packing: str) -> None:
        super().__init__(linear, dtype)
        self.packing = packing
        shape = (self.out_features, PACKINGS[packing].num_bytes(self.in_features))
        self.register_buffer("stored", torch.empty(shape, dtype=torch.uint8, device=linear.weight.device))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return unpack(self.stored, self.packing, dtype)  # type: ignore[arg-type]


def widen(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A float8 weight as numbers, times the scale of each row.

    The product is taken in ``dtype``, as in Tencent's ``fp8_optimization.py``.
    """
    wide = stored.to(dtype)
    return wide if scale is None else wide.mul_(scale.to(dtype).view(-1, *[1] * (wide.ndim - 1)))


def module_of(name: str) -> str:
    """The path of the module that a stored name belongs to."""
    match = _PACKED.fullmatch(name)
    return (match[1] or "") if match else name.rpartition(".")[0]


def quantise_linears(module: nn.Module, stored: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Put a quantised layer in the place of each ``nn.Linear`` whose stored weight is float8 or packed.

    Args:
        stored: native stored names with tensors of any device, also meta.
    """
    for name, tensor in stored.items():
        path = module_of(name)
        match = _PACKED.fullmatch(name)
        is_float8 = name.endswith("weight") and tensor.dtype in FLOAT8
        if not (match or is_float8):
            continue
        linear = _submodule(module, path)
        # Subclasses and layers that are used by their weight alone (convolutions, embeddings) get it widened.
        if type(linear) is not nn.Linear:
            continue
        if match:
            module.set_submodule(path, PackedLinear(linear, dtype, match[2]))
        else:
            scaled = scale_name(name) in stored
            module.set_submodule(path, Float8Linear(linear, dtype, tensor.dtype, scaled=scaled))


def _stored_anew(
    stored: Mapping[str, Tensor], wanted: Collection[str], dtype: torch.dtype | None, storage: Storage
) -> dict[str, Tensor]:
    """:func:`fit` where layers want ``storage``: what the file has is widened for them, one weight at a time."""
    rest, state = dict(stored), {}
    for name in stored:
        path = module_of(name)
        if f"{path}.stored" not in wanted or not (_PACKED.fullmatch(name) or name == f"{path}.weight"):
            continue
        own = {part: rest.pop(part) for part in (name, scale_name(f"{path}.weight")) if part in rest}
        is_dense = own[name].is_floating_point() and own[name].dtype not in FLOAT8
        weight = own[name] if is_dense else fit(own, (), torch.float32)[f"{path}.weight"]
        state |= {f"{path}.{part}": tensor for part, tensor in storage.encode(weight).items()}
    return state | fit(rest, wanted, dtype)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        if part not in dict(module.named_children()):
            return None
        module = getattr(module, part)
    return module


def fit(
    stored: Mapping[str, Tensor],
    wanted: Collection[str],
    dtype: torch.dtype | None,
    storage: Storage | None = None,
) -> dict[str, Tensor]:
    """Stored tensors as entries of a state dict: quantised ones for the layers that take them, dense ones else.

    Args:
        stored: native stored names; a weight comes together with its scale.
        wanted: names of the state dict.
        dtype: dense floating weights are cast to it; None keeps what the file has, and widens to bfloat16.
        storage: of the layers that want their weights stored, whatever the file has.
    """
    if storage is not None:
        return _stored_anew(stored, wanted, dtype, storage)
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        match, path = _PACKED.fullmatch(name), module_of(name)
        prefix = f"{path}." if path else ""
        if match:
            if f"{prefix}stored" in wanted:
                state[f"{prefix}stored"] = tensor
            else:
                state[f"{prefix}weight"] = unpack(tensor, match[2], dtype or torch.bfloat16)
        elif tensor.dtype in FLOAT8:
            scale = stored.get(scale_name(name))
            if name.endswith("weight") and f"{prefix}stored" in wanted:
                state[f"{prefix}stored"] = tensor
                if scale is not None:
                    state[f"{prefix}scale"] = scale
            else:
                state[name] = widen(tensor, scale, dtype or torch.bfloat16)
        elif name == scale_name(f"{prefix}weight") and f"{prefix}weight" in stored:
            continue  # taken together with its weight
        else:
            state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return state
