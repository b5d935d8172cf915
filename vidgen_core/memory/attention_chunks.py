"""Attention a few queries at a time, for kernels that would hold all scores at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .compiled import uncompiled

SCORE_BYTES = 1 << 28
"""of the scores that are in memory at once"""


class ChunkedAttention(TorchFunctionMode):
    """Inside a ``with`` block torch's attention runs over chunks of queries. The result is the same up to rounding:
    every query still sees every key at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v, mask = _operands(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in ("query", "key", "value", "attn_mask")}
        at_once = max(1, SCORE_BYTES // (q[..., :1, 0].numel() * k.shape[-2] * 4))
        parts = []
        for start in range(0, q.shape[-2], at_once):
            seen = mask
            if mask is not None and mask.shape[-2] > 1:
                seen = mask[..., start : start + at_once, :]
            parts.append(func(q[..., start : start + at_once, :], k, v, attn_mask=seen, **rest))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _operands(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return query, key, value, attn_mask


@contextlib.contextmanager
def chunked_attention() -> Iterator[None]:
    """:class:`ChunkedAttention`, also in blocks that are compiled: they run as they are."""
    with uncompiled(), ChunkedAttention():
        yield


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """torch's plainest attention, three products and a softmax, in chunks: the slowest, and the one that is right."""
    with sdpa_kernel(SDPBackend.MATH), chunked_attention():
        yield
