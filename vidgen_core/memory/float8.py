"""Linear layers whose products are taken in float8: in the chip's float8 units, or elsewhere with the same numbers.

Weights have a scale for each output row, and each input token gets its own. Both are rounded to e4m3 alike on every
device; only the order and the rounding of the sums differ between the chip and the fallback. In bfloat16 the two agree
to 1e-2 in relative L2 norm (two roundings to 8 bits, and the chip's narrower accumulator), in float32 to 1e-3.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["row", "tensor", "none"]
"""the chip scales each row itself; it multiplies and we scale; it cannot"""

_DTYPE = torch.float8_e4m3fn
_TOP = torch.finfo(_DTYPE).max
_PIECE = 1 << 22
"""inputs that are rounded at a time: in float32 they are four times as large as the result"""
_CAPABILITY = (8, 9)
"""of the first chips with float8 units: Ada"""
_MULTIPLE = 16
"""of which both sides of a weight must be, for the chip's kernels"""


def float8_linear(
    x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, *, kernel: Kernel | None = None
) -> Tensor:
    """x (..., I) times a weight ``stored`` (O, I) in e4m3 with ``scale`` (O, 1) -> (..., O) in the dtype of ``x``.

    Args:
        kernel: None takes the best one of the device and the sizes.
    """
    tokens = x.flatten(0, -2)
    small, per_token = round_tokens(tokens)
    if kernel is None:
        fits = stored.shape[0] % _MULTIPLE == 0 and stored.shape[1] % _MULTIPLE == 0 and len(tokens) > 0
        kernel = kernel_of(x.device) if fits else "none"
    # float16 would overflow before it is scaled, so its sums are taken in the wider range.
    wide = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    if kernel == "row" and wide == torch.bfloat16:  # the only one in which the chip's kernel answers
        y = torch._scaled_mm(small, stored.t(), per_token, scale.t(), out_dtype=wide, use_fast_accum=True)
        y = y.to(x.dtype)
    else:
        if kernel == "none":
            y = F.linear(small.to(wide), stored.to(wide))
        else:
            one = torch.ones((), device=x.device)
            y = torch._scaled_mm(small, stored.t(), one, one, out_dtype=wide, use_fast_accum=True)
        y = _scaled(y, per_token, scale, x.dtype)
    if bias is not None:
        y += bias.to(y.dtype)
    return y.unflatten(0, x.shape[:-1])


def round_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(N, I) -> (N, I) in e4m3 and the scale of each token, (N, 1) float32."""
    small = torch.empty(tokens.shape, dtype=_DTYPE, device=tokens.device)
    scale = torch.empty((len(tokens), 1), device=tokens.device)
    step = max(1, _PIECE // max(1, tokens.shape[1]))
    for start in range(0, len(tokens), step):
        some = tokens[start : start + step].float()
        low, high = some.aminmax(dim=1, keepdim=True)
        own = torch.maximum(-low, high) / _TOP
        own = torch.where(own > 0, own, 1.0)
        scale[start : start + step] = own
        small[start : start + step] = (some / own).clamp_(-_TOP, _TOP).to(_DTYPE)
    return small, scale


def _scaled(y: Tensor, per_token: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, O) times both scales; in float32, piece by piece, and rounded once."""
    result = y if y.dtype == dtype else torch.empty(y.shape, dtype=dtype, device=y.device)
    step = max(1, _PIECE // max(1, y.shape[1]))
    for start in range(0, len(y), step):
        piece = slice(start, start + step)
        result[piece] = y[piece].float() * per_token[piece] * scale.t()
    return result


@cache
def kernel_of(device: torch.device) -> Kernel:
    """What this device's chip can do, tried once on a small matrix: some know float8 but no scales of rows."""
    if device.type != "cuda" or torch.version.cuda is None or not hasattr(torch, "_scaled_mm"):
        return "none"
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "none"
    square = torch.ones((2 * _MULTIPLE, 2 * _MULTIPLE), device=device).to(_DTYPE)
    rows, one = torch.ones((2 * _MULTIPLE, 1), device=device), torch.ones((), device=device)
    scales: dict[Kernel, tuple[Tensor, Tensor]] = {"row": (rows, rows.t()), "tensor": (one, one)}
    for kernel, (left, right) in scales.items():
        try:
            torch._scaled_mm(square, square.t(), left, right, out_dtype=torch.bfloat16, use_fast_accum=True)
        except (RuntimeError, ValueError):  # how torch says that a chip, a library or a build lacks the kernel
            continue
        return kernel
    return "none"
