"""Attention changed for a while from outside, so that no network has an argument for it.

One decorator stands around :func:`.attention.attention`; what a change does is decided by whoever stands around a
block (``vidgen_core/blocks.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

AttentionChange = Callable[[Callable[[], Tensor], Tensor, Tensor, Tensor], Tensor]
"""(what attention would give, q, k, v) -> what it gives instead; all (B, heads, tokens, d)"""

Rest = ParamSpec("Rest")

# A plain name and no context variable: the compiler guards on it, and a network runs in one thread at a time.
_change: AttentionChange | None = None


def changeable(
    attention: Callable[Concatenate[Tensor, Tensor, Tensor, Rest], Tensor],
) -> Callable[Concatenate[Tensor, Tensor, Tensor, Rest], Tensor]:
    """Attention that obeys :func:`changed_attention`."""

    @wraps(attention)
    def obeying(q: Tensor, k: Tensor, v: Tensor, *args: Rest.args, **kwargs: Rest.kwargs) -> Tensor:
        if _change is None:
            return attention(q, k, v, *args, **kwargs)
        return _change(lambda: attention(q, k, v, *args, **kwargs), q, k, v)

    return obeying


@contextmanager
def changed_attention(change: AttentionChange | None) -> Iterator[None]:
    """Inside the block, every attention is ``change`` of itself; None changes nothing."""
    global _change
    before, _change = _change, change
    try:
        yield
    finally:
        _change = before


def own_value_only(plain: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token looks at itself alone: the attention map is the identity (spatio-temporal guidance, mode A)."""
    return v


def cross_frame_intensity(q: Tensor, k: Tensor, num_frames: int) -> Tensor:
    """How much frames look at each other: the mean of the temporal attention maps beside their diagonals.

    A token's temporal map is its attention to the tokens at the same place of every frame. Even attention gives
    1 / num_frames. One head at a time, so that the memory is small against the attention's own.

    Args:
        q, k: (B, heads, num_frames * S, d), frames outermost.

    Returns:
        0-dim float32.
    """
    total = torch.zeros((), device=q.device, dtype=torch.float32)
    for head in range(q.shape[1]):
        own_q, own_k = (x[:, head].unflatten(1, (num_frames, -1)).transpose(1, 2) for x in (q, k))
        scores = (own_q @ own_k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        maps = scores.softmax(dim=-1)  # (B, S, frames, frames); a row adds up to 1
        total += 1 - maps.diagonal(dim1=-2, dim2=-1).mean()
    return total / (q.shape[1] * (num_frames - 1))


def enhanced(weight: float, num_frames: int, tokens: slice) -> AttentionChange:
    """Enhance-A-Video (Luo et al. 2025): what attention gives the video's tokens is multiplied by
    ``max(1, (num_frames + weight) * cross_frame_intensity)``; ``tokens`` says where they are."""

    def change(plain: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plain()
        factor = (num_frames + weight) * cross_frame_intensity(q[:, :, tokens], k[:, :, tokens], num_frames)
        scaled = out.clone()
        scaled[:, :, tokens] *= factor.clamp(min=1).to(out.dtype)
        return scaled

    return change
