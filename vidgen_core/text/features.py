"""What text encoders hand on: one record for every family."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFeatures:
    """What the network is told about a batch of prompts."""

    context: Tensor
    """(B, L, D) states per token; tokens of a picture stand before those of the text"""
    context_mask: Tensor
    """(B, L) bool, true for real tokens"""
    pooled: Tensor
    """(B, P) one vector for the whole prompt; P is 0 where a family has none"""
