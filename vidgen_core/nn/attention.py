"""Scaled dot-product attention, in one place: every network calls :func:`attention`.

How it is computed is no argument of any network. A run says it from outside, with :func:`attending_with` and a
function of the same four arguments: kernels (``backends``), a pattern (``sliding_tiles``), processes (``parallel``).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .attention_change import changeable
from .backends import Attend, AttentionChoice, Dispatcher, needs_gradients, plain

_DEFAULT = Dispatcher(AttentionChoice())
_attend: ContextVar[Attend] = ContextVar("vidgen_attend", default=_DEFAULT)


@changeable
def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with the usual 1/sqrt(d) scale.

    Args:
        q: (B, heads, L, d).
        k: (B, heads, S, d).
        v: (B, heads, S, d).
        mask: bool, broadcastable to (B, heads, L, S), true where a query may look. None lets every query see every
            key and keeps the fastest kernels available, so leave padding out instead of masking it where possible.
            Every query must see at least one key. One tensor for all layers is looked at once; do not write to it.

    Returns:
        (B, heads, L, d).
    """
    if not torch.compiler.is_compiling():
        return _attend.get()(q, k, v, mask)
    if needs_gradients(q, k, v):
        return plain(q, k, v, mask)
    return _opaque(q, k, v, mask).transpose(1, 2)


@contextlib.contextmanager
def attending_with(attend: Attend) -> Iterator[None]:
    """Let :func:`attention` in this block (and this thread) be computed by ``attend``."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def current() -> Attend:
    """What :func:`attention` does now."""
    return _attend.get()


# A compiled network calls attention through one opaque operation. So the choice is looked up when it runs, not when it
# was compiled: another choice needs no new graph, and libraries that a compiler cannot look into work as well.
# The name of the module is part of its name: ComfyUI and an installed package may load this file side by side.
@torch.library.custom_op(
    f"vidgen::attention_{zlib.crc32(__name__.encode()):x}",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor",
)
def _opaque(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, heads, d): most kernels write in this order, and it must not depend on the kernel."""
    return _attend.get()(q, k, v, mask).transpose(1, 2).contiguous()


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[-1])


def trim_padding(context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cut the padding that no sample of the batch needs; the network's output for the video stays the same.

    Reads the mask's values (a synchronisation on a GPU), so call it once per prompt or batch, outside the network.

    Args:
        context: (B, L, D), real tokens first.
        mask: (B, L) bool, true for real tokens.

    Returns:
        context (B, L', D) with L' the longest text of the batch (at least one token), and its mask, or None
        when nothing is padded any more.
    """
    if mask is None:
        return context, None
    mask = mask.bool()
    used = mask.any(dim=0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    mask = mask[:, :length]
    return context[:, :length], None if bool(mask.all()) else mask
