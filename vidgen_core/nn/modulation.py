"""Adaptive normalisation: a vector per sample (or per frame) that shifts, scales and gates tokens.

Tokens are (B, L, D). Shifts, scales and gates are (B, F, D) where each of the F vectors serves L / F consecutive
tokens: F = 1 is one vector per sample, F = T one per latent frame. Source: DiT (Peebles & Xie 2022), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Modulation(nn.Module):
    """``count`` vectors of width ``hidden_size`` out of one; the caller applies the SiLU once for all blocks."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(hidden_size, count * hidden_size)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """(B, F, D) after its SiLU -> ``count`` tensors (B, F, D)."""
        return self.linear(vec).chunk(self.count, dim=-1)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    return x.unflatten(1, (num_groups, -1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, in_place: bool = False) -> Tensor:
    """x * (1 + scale) + shift; ``in_place`` for an ``x`` that nobody keeps, if it can hold the result."""
    groups = scale.shape[1]
    in_place = in_place and torch.promote_types(x.dtype, scale.dtype) == x.dtype
    if groups == 1:
        return torch.addcmul(shift, x, 1 + scale, out=x if in_place else None)
    grouped = _grouped(x, groups)
    out = torch.addcmul(shift.unsqueeze(2), grouped, (1 + scale).unsqueeze(2), out=grouped if in_place else None)
    return out.flatten(1, 2)


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update."""
    groups = gate.shape[1]
    if groups == 1:
        return torch.addcmul(x, update, gate)
    return torch.addcmul(_grouped(x, groups), _grouped(update, groups), gate.unsqueeze(2)).flatten(1, 2)
