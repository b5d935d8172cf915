"""Modules without memory, built without drawing the start values that a checkpoint replaces anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_DRAWN = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.normal_})


def built_empty(build: Callable[[], nn.Module]) -> nn.Module:
    """What ``build`` makes, on the meta device."""
    with torch.device("meta"), _Undrawn():
        return build()


class _Undrawn(TorchFunctionMode):
    """Inside, random start values are left out: each costs as much on the meta device as the layer around it."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWN:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
