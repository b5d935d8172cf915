"""A trained network as the teacher of another one with the same latents.

A clip says what one answer to a caption is; a network that has learned says what to expect of all of them, which is
what the pupil is after (Hinton et al. 2015, arXiv 1503.02531). Noise processes need not be the same: the teacher is
asked at the same ratio of noise to data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vidgen_core.diffusion import Diffusion, wide
from ..vidgen_core.errors import RecipeError
from ..vidgen_core.memory.compiled import blocks_at
from ..vidgen_core.model import load_network, load_text


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSettings:
    """``[teacher]``."""

    network: str
    """its file"""
    text: str
    """the file of its text encoders"""
    weight: float = 1.0
    """share of the teacher's word in what the pupil is asked for, 0 to 1; the rest is the clip"""
    start: float = 0.0
    """share of the run before the teacher is asked. It takes as long as half a step: while the pupil knows little, more
    steps teach it more; near the end, answers without noise do"""
    graft: bool = False
    """the pupil begins with the teacher's weights, where the two are of one size, see ``graft.py``"""


class Teacher:
    """Frozen, in float32; bfloat16 inside its forward where the run has it."""

    def __init__(self, settings: TeacherSettings, *, channels: int, precision: str, compile: bool = False) -> None:
        if not 0 <= settings.weight <= 1:
            raise RecipeError(
                "A value of the recipe cannot be used",
                given=f"teacher.weight = {settings.weight}",
                expected="a share, 0 to 1",
            )
        if not 0 <= settings.start < 1:
            raise RecipeError(
                "The teacher has no time to begin",
                given=f"teacher.start = {settings.start}",
                expected="a share of the run: 0 or more and below 1",
            )
        self.weight = settings.weight
        self.start = settings.start
        self.model = load_network(settings.network, dtype=torch.float32)
        self.model.network.requires_grad_(False).eval()
        self.text = load_text(settings.text, dtype=torch.float32)
        self._precision = precision
        own = self.model.family.latent_channels(self.model.config)
        if own != channels:
            raise RecipeError(
                "Teacher and pupil do not speak of the same latents",
                given=f"a teacher of {own} channels",
                expected=f"{channels} channels, encoded by the same codec",
            )
        if compile:
            for block in blocks_at(self.model.network, self.model.family.blocks):
                block.compile(dynamic=True)

    @torch.no_grad()
    def expected(
        self, x0: Tensor, noise: Tensor, share: Tensor, captions: Sequence[str], *, image: bool, held: bool
    ) -> Tensor:
        """What the clean latents are on average, mixed with what they are.

        Args:
            x0, noise: (B, C, T, H, W).
            share: (B,) noise / (data + noise), see :func:`noise_share`.
            captions: B of them.
            held: the first latent frame is known.
        """
        model = self.model
        t = time_of_share(model.diffusion, share)
        if held:
            t = first_frame_given(t, x0.shape[2])
        x_t = model.diffusion.add_noise(x0, noise, t)
        cond = model.conditioning(self.text.encode(captions, image_mode=image)).to(model.device)
        device = model.device.type
        autocast = torch.autocast(device, torch.bfloat16) if self._precision == "bf16" else contextlib.nullcontext()
        with autocast:
            output = model.predict(x_t, t, cond)
        x0_hat = model.diffusion.to_x0(x_t, output.float(), t)
        if held:
            x0_hat[:, :, 0] = x0[:, :, 0]
        return torch.lerp(x0, x0_hat, self.weight)


def noise_share(diffusion: Diffusion, t: Tensor) -> Tensor:
    """noise / (data + noise) at these times: the time itself in flow matching, and a number that all processes have."""
    t = wide(t)
    alpha, sigma = diffusion.alpha(t), diffusion.sigma(t)
    return sigma / (alpha + sigma)


def time_of_share(diffusion: Diffusion, share: Tensor) -> Tensor:
    """The inverse of :func:`noise_share`, in float32."""
    share = wide(share)
    return diffusion.time_at(share if diffusion.straight else share / (1 - share)).float()


def first_frame_given(t: Tensor, num_frames: int) -> Tensor:
    """(B,) -> (B, 1, T, 1, 1): a time for each latent frame, 0 for the first one."""
    t = t.view(-1, 1, 1, 1, 1).repeat(1, 1, num_frames, 1, 1)
    t[:, :, 0] = 0
    return t
