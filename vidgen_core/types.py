"""The nouns of the core: tensors' names and shapes, and the one object that crosses from text and
keyframes to the network.

Shape legend used everywhere: B batch, C channels, T frames (pixels or latents), H height, W width,
L text tokens, D width of a token, P width of a pooled vector.

``video``   (B, 3, T, H, W) in [-1, 1]
``latents`` (B, C, T, H, W) at unit scale, as the network sees them
``t``       time of the noise process in [0, 1]; 0 is clean, 1 is noise
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import SettingsError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x_t, t) -> x0``: the clean latents expected from the noisy ones. ``t`` is a 0-dim or (B,) tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How pixels map to latents: ``spatial`` px and ``temporal`` frames per latent.

    ``causal`` codecs give the first frame a latent of its own: T frames <-> (T - 1) / temporal + 1.
    """

    channels: int
    spatial: int
    temporal: int
    causal: bool = True
    group: int = 1
    """latent frames that are coded together, behind the first one of a causal codec: their number must come out even.
    A codec of larger groups goes through a video group by group, in memory that does not depend on its length."""

    @property
    def step(self) -> int:
        """By how many frames the length of a video may differ from that of another."""
        return self.temporal * self.group

    def num_latent_frames(self, num_frames: int) -> int:
        if self.causal:
            return (num_frames - 1) // self.temporal + 1
        return num_frames // self.temporal

    def num_frames(self, num_latent_frames: int) -> int:
        """The inverse of :meth:`num_latent_frames`."""
        if self.causal:
            return (num_latent_frames - 1) * self.temporal + 1
        return num_latent_frames * self.temporal


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoShape:
    """Length and size of a video in frames and pixels."""

    num_frames: int
    height_px: int
    width_px: int

    def latent_shape(self, grid: Grid) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents that decode to this video."""
        return (
            grid.channels,
            grid.num_latent_frames(self.num_frames),
            self.height_px // grid.spatial,
            self.width_px // grid.spatial,
        )

    def nearest(self, grid: Grid, *, patch: tuple[int, int, int] = (1, 1, 1)) -> VideoShape:
        """The nearest size that the codec and network can make."""
        rows, columns = grid.spatial * patch[1], grid.spatial * patch[2]
        offset = 1 if grid.causal else 0
        num_frames = max(0, round((self.num_frames - offset) / grid.step)) * grid.step + offset
        return VideoShape(
            num_frames=max(1, num_frames),
            height_px=max(rows, round(self.height_px / rows) * rows),
            width_px=max(columns, round(self.width_px / columns) * columns),
        )

    def check(self, grid: Grid, *, patch: tuple[int, int, int] = (1, 1, 1)) -> None:
        """Raise :class:`SettingsError` unless this is a size the codec and network can make."""
        step, nearest = (grid.spatial * patch[1], grid.spatial * patch[2]), self.nearest(grid, patch=patch)
        for name, value, multiple, near in (
            ("height", self.height_px, step[0], nearest.height_px),
            ("width", self.width_px, step[1], nearest.width_px),
        ):
            if value <= 0 or value % multiple:
                raise SettingsError(
                    f"The {name} of the video cannot be used",
                    given=f"{value} px",
                    expected=f"a positive multiple of {multiple} px",
                    do=f"use {near} px",
                )
        offset = 1 if grid.causal else 0
        if self.num_frames < 1 or (self.num_frames - offset) % grid.step:
            rule = f"{grid.step} n + {offset} frames" if grid.step > 1 else "at least 1 frame"
            near = nearest.num_frames
            if near == 1 < self.num_frames:  # who wants a video is not told to make a picture
                near = offset + grid.step
            raise SettingsError(
                "The number of frames cannot be used",
                given=f"{self.num_frames} frames",
                expected=f"{rule} (1, 5, 9, 13, 17, ...)" if (grid.step, offset) == (4, 1) else rule,
                do=f"use {near} frame{'s' if near > 1 else ''}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a node or the command line uses when the user says nothing; a checkpoint may carry its own."""

    num_frames: int = 129
    height_px: int = 720
    width_px: int = 1280
    fps: int = 24
    num_steps: int = 50
    shift: float = 7.0
    guidance: float = 6.0
    """embedded guidance; ignored by networks without it"""
    cfg: float = 1.0
    """true classifier-free guidance; 1 is off"""
    sampler: str = "euler"
    schedule: str = "simple"
    cfg_schedule: str = "constant"
    negative_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Latent frames that are given and must come out unchanged (token-replaced keyframes)."""

    latents: Tensor
    """(B, C, T, H, W); only the held frames are read."""
    mask: Tensor
    """(B, 1, T, 1, 1) bool, true where a frame is held."""


def _map_tensor(value: Tensor | None, fn: Callable[[Tensor], Tensor]) -> Tensor | None:
    return None if value is None else fn(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Everything the network is told besides the noisy latents and the time."""

    context: Tensor | None = None
    """(B, L, D) text (or image) tokens."""
    context_mask: Tensor | None = None
    """(B, L) bool, true for real tokens; None means that nothing is padded."""
    pooled: Tensor | None = None
    """(B, P) one vector for the whole prompt."""
    concat: Tensor | None = None
    """(B, C', T, H, W) stacked onto the channels of the noisy latents."""
    held: Held | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    """(B,) numbers by name: guidance, fps, motion_bucket, noise_level."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply ``fn`` to every tensor inside."""
        held = None if self.held is None else Held(latents=fn(self.held.latents), mask=fn(self.held.mask))
        return replace(
            self,
            context=_map_tensor(self.context, fn),
            context_mask=_map_tensor(self.context_mask, fn),
            pooled=_map_tensor(self.pooled, fn),
            concat=_map_tensor(self.concat, fn),
            held=held,
            scalars={name: fn(value) for name, value in self.scalars.items()},
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move; ``dtype`` applies to floating tensors only."""
        return self.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def take(self, rows: slice) -> Conditioning:
        """Some samples of the batch, without the padding that none of them needs; exactly what these alone would be."""
        some = self.map(lambda x: x[rows].contiguous())  # the layout in memory decides on the kernel, hence on bits
        if some.context is None or some.context_mask is None:
            return some
        used = some.context_mask.any(dim=0).nonzero()
        length = int(used[-1]) + 1 if len(used) else 1
        mask = some.context_mask[:, :length]
        whole = bool(mask.all())
        return replace(some, context=some.context[:, :length].contiguous(), context_mask=None if whole else mask)

    def at_frames(self, frames: Sequence[int]) -> Conditioning:
        """What is told of these latent frames, in this order."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(2, torch.tensor(frames, device=tensor.device))

        held = None if self.held is None else Held(latents=pick(self.held.latents), mask=pick(self.held.mask))
        return replace(self, concat=_map_tensor(self.concat, pick), held=held)

    def expand(self, batch: int) -> Conditioning:
        """Repeat a conditioning of batch 1 to ``batch`` samples; one that already fits is returned as it is."""
        return self.map(lambda x: x if x.shape[0] == batch else x.expand(batch, *x.shape[1:]))
