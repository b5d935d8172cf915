"""Scaled dot-product attention, in one place: every network calls :func:`attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_change import changeable


@changeable
def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with the usual 1/sqrt(d) scale.

    Args:
        q: (B, heads, L, d).
        k: (B, heads, S, d).
        v: (B, heads, S, d).
        mask: bool, broadcastable to (B, heads, L, S), true where a query may look. None lets every query see every
            key and keeps the fastest kernels available, so leave padding out instead of masking it where possible.
            Every query must see at least one key.

    Returns:
        (B, heads, L, d).
    """
    if _is_short_cpu_training(q, k):
        return _three_products(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _is_short_cpu_training(q: Tensor, k: Tensor) -> bool:
    """Where the fused kernel's backward in bfloat16 is 3 to 4 times slower than plain matrix products."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and torch.is_grad_enabled()
        and q.requires_grad
        and k.shape[-2] <= 1024
    )


def _three_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with its scores in memory; they are rounded to the dtype of ``q``."""
    batch, heads, length, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        bias = q.new_zeros(()).masked_fill(~mask, float("-inf")).expand(batch, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, length, width)


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
