"""A block seen from outside: it is given ``(joint, context)`` and gives ``joint``, video first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import BlockRules
from .config import NetworkConfig


def _through(args: Sequence[Any]) -> Any:
    return args[0]


def _video(value: Any, num_video: int) -> Tensor:
    return value[:, :num_video]


def _with_video(value: Any, video: Tensor) -> Any:
    return torch.cat([video, value[:, video.shape[1] :]], dim=1)


def _reads(block: nn.Module) -> nn.Module:
    return block.get_submodule("query_key_value")


def _time_rope(config: NetworkConfig) -> tuple[int, float] | None:
    return None if config.positions == "sincos" else (config.rope_axes[0], config.rope_theta)


BLOCK_RULES = BlockRules(
    through=_through, video=_video, with_video=_with_video, reads=_reads, time_rope=_time_rope
)  # TeaCache's published coefficients are of the time's vector, not of what a block reads: none fit here
