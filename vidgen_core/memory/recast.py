"""A module in another number format for a while, and then as it was to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DENSE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""formats to compute in; float8 and packed weights are storage, and stay as they are"""


def compute_dtypes(module: nn.Module) -> set[torch.dtype]:
    """The formats that the module's weights are computed in."""
    return {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in DENSE}


def can_recast(module: nn.Module) -> bool:
    """Not where weights come from the file block by block: those are not there to be changed."""
    return not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


@contextlib.contextmanager
def recast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Dense weights and buffers of ``module`` in ``dtype`` inside the block.

    What was there before is kept in main memory meanwhile: on a GPU the new weights take its place.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for owner in module.modules():
            tables: list[Any] = [owner._parameters, owner._buffers]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.dtype in DENSE and tensor.dtype != dtype:
                        kept.append((table, name, tensor.detach().cpu() if not tensor.is_cpu else tensor))
                        table[name] = _like(tensor, tensor.detach().to(dtype))
        yield
    finally:
        for table, name, tensor in kept:
            now = table[name]
            table[name] = tensor if now.is_cpu else _like(now, tensor.to(now.device))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
