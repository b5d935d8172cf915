"""A small 3-D PatchGAN: is this patch of video real or decoded?

Isola et al. 2017, arXiv 1611.07004 (judging patches); hinge losses after Lim and Ye 2017, arXiv 1705.02894. Norms look
at one sample only and there are no running averages, so a run resumes exactly and splits over processes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


class PatchDiscriminator(nn.Module):
    """(B, 3, T, H, W) video -> (B, 1, t, h, w) scores, above 0 for what looks real.

    Args:
        channels: of the first level; each further one has twice as many.
        num_levels: halvings of height and width; all but the first halve the frames too. A single frame stays one.
    """

    def __init__(self, *, channels: int = 16, num_levels: int = 3) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        width = 3
        for level in range(num_levels):
            out = channels << level
            stride = (2 if level else 1, 2, 2)
            conv = nn.Conv3d(width, out, (3, 4, 4), stride, padding=1)
            # Without a norm the first level sees brightness as it is.
            norm = nn.GroupNorm(min(4, out), out) if level else nn.Identity()
            self.levels.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
            width = out
        self.score = nn.Conv3d(width, 1, 3, padding=1)

    def forward(self, video: Tensor) -> Tensor:
        for level in self.levels:
            video = level(video)
        return self.score(video)


def adversarial_losses(discriminator: nn.Module, decoded: Tensor, real: Tensor) -> dict[str, Tensor]:
    """``generator``, whose gradient reaches only ``decoded``, and ``discriminator``, whose gradient reaches only the
    discriminator's weights: both may be parts of one sum.

    Both sides learn from the same step's weights, so nothing depends on who goes first.
    """
    still = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    fooled = functional_call(discriminator, still, (decoded,))
    scores_real, scores_decoded = discriminator(real), discriminator(decoded.detach())
    return {
        "generator": -fooled.float().mean(),
        "discriminator": 0.5 * (F.relu(1 - scores_real.float()).mean() + F.relu(1 + scores_decoded.float()).mean()),
    }
