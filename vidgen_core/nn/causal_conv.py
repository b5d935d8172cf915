"""3-D convolution that never looks at a later frame."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CausalConv3d(nn.Module):
    """``Conv3d`` with edge-replicating padding: all of the padding in time comes before the first frame.

    (B, C, T, H, W) -> (B, C', ceil(T / st), ceil(H / sh), ceil(W / sw)) for stride (st, sh, sw); an output frame
    depends on its own and earlier input frames only. The weights live in ``.conv``, as in the official
    checkpoints (source: HunyuanVideo ``hyvideo/vae/unet_causal_3d_blocks.py``).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, *, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.padding = (side, side, side, side, kernel - 1, 0)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        return self.conv(x)
