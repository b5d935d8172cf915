"""What double and single blocks have in common, seen from outside.

A double block is given ``(video, text, context)`` and gives ``(video, text)``; a single block is given
``(joint, context)`` and gives ``joint``, video first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import BlockRules
from .config import NetworkConfig

PUBLISHED = NetworkConfig()

TEACACHE_POLYNOMIAL = (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)
"""fitted to the published 13 B by TeaCache's authors (ali-vilab/TeaCache, TeaCache4HunyuanVideo)"""


def _through(args: Sequence[Any]) -> Any:
    return (args[0], args[1]) if isinstance(args[1], Tensor) else args[0]


def _video(value: Any, num_video: int) -> Tensor:
    return value[0] if isinstance(value, tuple) else value[:, :num_video]


def _with_video(value: Any, video: Tensor) -> Any:
    if isinstance(value, tuple):
        return video, value[1]
    return torch.cat([video, value[:, video.shape[1] :]], dim=1)


def _reads(block: nn.Module) -> nn.Module:
    return block.get_submodule("img_attn_qkv" if hasattr(block, "img_attn_qkv") else "linear1")


def _polynomial(config: NetworkConfig) -> tuple[float, ...] | None:
    """Only for the network that it was fitted to, however that is told an image."""
    same = replace(
        config,
        in_channels=PUBLISHED.in_channels,
        image_condition=PUBLISHED.image_condition,
        accepts_first_frame=PUBLISHED.accepts_first_frame,
        guidance_embed=PUBLISHED.guidance_embed,
    )
    return TEACACHE_POLYNOMIAL if same == PUBLISHED else None


BLOCK_RULES = BlockRules(
    through=_through,
    video=_video,
    with_video=_with_video,
    reads=_reads,
    time_rope=lambda config: (config.rope_axes[0], config.rope_theta),
    polynomial=_polynomial,
)
