"""Context windows: a video longer than the network has learned, denoised in overlapping pieces.

At every step the network is asked for each window of latent frames, one after the other, and the answers are blended
where windows overlap. What the network sees is then never longer than what it was trained on, and memory and
attention stay those of one window. Sources: MultiDiffusion (Bar-Tal et al. 2023) for the blend, AnimateDiff's users
for windows that move from step to step and that close a loop, FreeNoise (Qiu et al. 2023) for the shuffled noise.

The first latent frame of a causal codec stands for one frame of the video, every other for several, and given first
frames are there as well. So windows may share it: each is then shown latent frame 0 first, and its answer for it
counts only in the window that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import SettingsError, unknown_name
from .types import Denoise

SCHEDULES = ("static", "uniform", "looped")
BLENDS = ("pyramid", "flat")

Frames = tuple[int, ...]
"""latent frames of a window, in the order the network sees them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How a long video is cut. Sizes are in latent frames."""

    size: int
    """of a window, the shared first frame included"""
    overlap: int = 0
    """frames that neighbours have in common"""
    schedule: str = "static"
    """"static": always the same places; "uniform": places that move from step to step, so that no seam stays;
    "looped": they move too, and the last window goes on at the first frame"""
    blend: str = "pyramid"
    """"pyramid": a frame counts most in the middle of a window; "flat": everywhere the same"""
    shuffle_noise: bool = False
    """FreeNoise: frames beyond the first window begin with the noise of earlier ones, shuffled"""
    share_first: bool | None = None
    """every window sees latent frame 0; None: where the network was given a picture"""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule of windows", self.schedule, SCHEDULES)
        if self.blend not in BLENDS:
            raise unknown_name("blend of windows", self.blend, BLENDS)
        if self.size < 2 or not 0 <= self.overlap < self.size - 1:
            raise SettingsError(
                "The windows cannot be used",
                given=f"{self.size} latent frames with an overlap of {self.overlap}",
                expected="2 latent frames or more, and an overlap below the size less one",
            )
        if self.schedule == "looped" and self.share_first:
            raise SettingsError(
                "A loop has no first frame to share",
                given='schedule "looped" with a shared first frame',
                expected="one of the two",
            )

    @property
    def identity(self) -> list[Any]:
        """What the result depends on, as JSON values."""
        return [self.size, self.overlap, self.schedule, self.blend, self.shuffle_noise, self.share_first]

    def shares_first(self, given_pictures: bool) -> bool:
        """Raises SettingsError for a loop that would have to go through a given picture."""
        if self.schedule == "looped" and given_pictures:
            raise SettingsError(
                "A video that begins with a given picture cannot be a loop of windows",
                given='schedule "looped" and a picture',
                do="use the schedule static or uniform",
            )
        return given_pictures if self.share_first is None else self.share_first

    def places(self, num_frames: int, step: int, *, share_first: bool = False) -> list[Frames]:
        """The windows of a step; together they have every frame. One window where the video is no longer than it."""
        if num_frames <= self.size:
            return [tuple(range(num_frames))]
        if share_first:
            rest = _places(num_frames - 1, self.size - 1, self.overlap, self.schedule, step)
            return [(0, *(frame + 1 for frame in frames)) for frames in rest]
        return _places(num_frames, self.size, self.overlap, self.schedule, step)

    def weights(self, frames: Frames, *, share_first: bool = False) -> Tensor:
        """(len(frames),) float32: how much the window counts for each of its frames."""
        if not share_first or len(frames) < 2:
            return _weights(len(frames), self.blend)
        own = float(frames[1] == 1)
        return torch.cat([torch.tensor([own]), _weights(len(frames) - 1, self.blend)])


def _places(num_frames: int, size: int, overlap: int, schedule: str, step: int) -> list[Frames]:
    stride = size - overlap
    offset = 0 if schedule == "static" else int(_spread(step) * stride)
    if schedule == "looped":
        starts = range(offset, offset + num_frames, stride)
        return [tuple((start + i) % num_frames for i in range(size)) for start in starts]
    last = num_frames - size
    begins = [min(max(start, 0), last) for start in range(offset - stride if offset else 0, last + stride, stride)]
    return [tuple(range(start, start + size)) for start in dict.fromkeys(begins)]


def _spread(step: int) -> float:
    """van der Corput's sequence 0, 1/2, 1/4, 3/4, 1/8, ...: as even over [0, 1) as the first steps allow."""
    value, weight = 0.0, 0.5
    while step:
        value += weight * (step & 1)
        step, weight = step >> 1, weight / 2
    return value


def _weights(size: int, blend: str) -> Tensor:
    if blend == "flat":
        return torch.ones(size)
    ramp = torch.arange(1, size + 1, dtype=torch.float32)
    return torch.minimum(ramp, ramp.flip(0))


def windowed(
    denoise_of: Callable[[Frames], Denoise],
    windows: Windows,
    num_frames: int,
    *,
    step_of: Callable[[float], int],
    share_first: bool = False,
) -> Denoise:
    """A denoiser of the whole video out of denoisers of windows.

    Args:
        denoise_of: latent frames -> the denoiser that knows their conditioning; kept while its window stays.
        step_of: t -> the step of the run, for windows that move.
    """
    parts: dict[Frames, Denoise] = {}

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        places = windows.places(num_frames, step_of(float(t.max())), share_first=share_first)
        kept = {frames: parts.get(frames) or denoise_of(frames) for frames in places}
        parts.clear()
        parts.update(kept)
        total, count = torch.zeros_like(x), x.new_zeros(num_frames)
        for frames in places:
            index = torch.tensor(frames, device=x.device)
            own_t = t.index_select(2, index.to(t.device)) if t.ndim == x.ndim and t.shape[2] > 1 else t
            weights = windows.weights(frames, share_first=share_first).to(x)
            answer = parts[frames](x.index_select(2, index), own_t)
            total.index_add_(2, index, answer * weights.reshape(1, 1, -1, 1, 1))
            count.index_add_(0, index, weights)
        return total / count.reshape(1, 1, -1, 1, 1)

    return denoise


def shuffled_noise(noise: Tensor, windows: Windows, seeds: Sequence[int]) -> Tensor:
    """FreeNoise: beyond the first window the frames' noise is that of earlier frames in another order, so that distant
    windows, which never meet, still begin alike. Every window that begins at a multiple of size - overlap holds the
    noise of the first window, each frame once.

    Args:
        noise: (B, C, T, H, W).
        seeds: (B,) of the samples; they decide on the order.
    """
    size, stride = windows.size, windows.size - windows.overlap
    num_frames = noise.shape[2]
    if num_frames <= size:
        return noise
    rows = []
    for sample, seed in zip(noise, seeds, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        order = list(range(size))
        while len(order) < num_frames:
            leaving = order[len(order) - size : len(order) - size + stride]
            order += [leaving[i] for i in torch.randperm(len(leaving), generator=generator).tolist()]
        rows.append(sample[:, torch.tensor(order[:num_frames], device=noise.device)])
    return torch.stack(rows)
