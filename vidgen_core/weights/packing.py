"""GGUF's packed weights to numbers, in torch: on any device, and checked against the ``gguf`` library.

A row is cut into blocks of 32 or 256 weights. A block is a few bytes: a scale in half precision, often an offset,
and the weights as small whole numbers. Source: ggml's ``ggml-common.h`` and ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """One of GGUF's block types."""

    block: int
    """weights per block"""
    num_block_bytes: int
    unpack: Callable[[Tensor], Tensor]
    """(N, num_block_bytes) uint8 -> (N, block) float32"""

    def num_bytes(self, num_elements: int) -> int:
        return num_elements // self.block * self.num_block_bytes


def unpack(packed: Tensor, packing: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, row bytes) uint8 -> (rows, columns) of ``dtype``; works on meta tensors."""
    kind = PACKINGS[packing]
    blocks = packed.reshape(-1, kind.num_block_bytes)
    return kind.unpack(blocks).to(dtype).reshape(packed.shape[0], -1)


def _half(block: Tensor, start: int) -> Tensor:
    """The number in half precision at byte ``start``: (N, 1) float32."""
    return block[:, start : start + 2].clone().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(..., n) bytes -> (..., 2 n): all low halves, then all high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth_bits(packed: Tensor) -> Tensor:
    """(N, 4) bytes -> (N, 32) with bit i of the little-endian number, worth 16."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bits) & 1).flatten(1) << 4


def _q4_0(block: Tensor) -> Tensor:
    return _half(block, 0) * (_nibbles(block[:, 2:]).float() - 8)


def _q4_1(block: Tensor) -> Tensor:
    return _half(block, 0) * _nibbles(block[:, 4:]).float() + _half(block, 2)


def _q5_0(block: Tensor) -> Tensor:
    return _half(block, 0) * ((_nibbles(block[:, 6:]) | _fifth_bits(block[:, 2:6])).float() - 16)


def _q5_1(block: Tensor) -> Tensor:
    return _half(block, 0) * (_nibbles(block[:, 8:]) | _fifth_bits(block[:, 4:8])).float() + _half(block, 2)


def _q8_0(block: Tensor) -> Tensor:
    return _half(block, 0) * block[:, 2:].contiguous().view(torch.int8).float()


def _k_scales(block: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of the 8 groups of 32 in a block, 6 bits each in 12 bytes: two (N, 8, 1) float32."""
    low, middle, high = block[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1)
    offset = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=1)
    return (_half(block, 0) * scale.float()).unsqueeze(-1), (_half(block, 2) * offset.float()).unsqueeze(-1)


def _k_nibbles(packed: Tensor) -> Tensor:
    """(N, 128) bytes -> (N, 8, 32): each 32 bytes hold two groups, the first one in their low halves."""
    groups = packed.unflatten(1, (4, 32))
    return torch.stack([groups & 15, groups >> 4], dim=2).flatten(1, 2)


def _q4_k(block: Tensor) -> Tensor:
    scale, offset = _k_scales(block)
    return (scale * _k_nibbles(block[:, 16:]).float() - offset).flatten(1)


def _q5_k(block: Tensor) -> Tensor:
    scale, offset = _k_scales(block)
    group = torch.arange(8, dtype=torch.uint8, device=block.device).unsqueeze(-1)
    fifth = ((block[:, None, 16:48] >> group) & 1) << 4
    return (scale * (_k_nibbles(block[:, 48:]) | fifth).float() - offset).flatten(1)


def _q6_k(block: Tensor) -> Tensor:
    low = block[:, :128].unflatten(1, (2, 2, 32))
    low = torch.stack([low & 15, low >> 4], dim=2)  # (N, half, nibble, 2, 32)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=block.device).unsqueeze(-1)
    high = (block[:, 128:192].unflatten(1, (2, 1, 32)) >> shift) & 3  # (N, half, 4, 32)
    whole = (low.flatten(2, 3) | (high << 4)).float() - 32
    scale = _half(block, 208) * block[:, 192:208].contiguous().view(torch.int8).float()
    return (scale.unsqueeze(-1) * whole.reshape(-1, 16, 16)).flatten(1)


PACKINGS = {
    "Q4_0": Packing(32, 18, _q4_0),
    "Q4_1": Packing(32, 20, _q4_1),
    "Q5_0": Packing(32, 22, _q5_0),
    "Q5_1": Packing(32, 24, _q5_1),
    "Q8_0": Packing(32, 34, _q8_0),
    "Q4_K": Packing(256, 144, _q4_k),
    "Q5_K": Packing(256, 176, _q5_k),
    "Q6_K": Packing(256, 210, _q6_k),
}
"""name in GGUF -> how it is packed"""
