"""Normalisations that compute in float32 whatever the dtype of the network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension.

    The quotient is taken in float32 and rounded to the dtype of ``x`` before the weight multiplies it, as in
    HunyuanVideo's ``hyvideo/modules/norm_layers.py``.
    """

    def __init__(self, size: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        quotient = F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        weight = self.weight.to(x.dtype)
        return quotient.mul_(weight) if overwrites() else quotient * weight


def overwrites() -> bool:
    """Whether a result may take the place of an intermediate: no gradient needs it, and no compiler decides."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def layer_norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Zero mean and unit variance over the last dimension, without weights; the result is float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)
