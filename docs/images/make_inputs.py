"""Draw what the shipped workflows read, ``workflows/inputs``: ``python docs/images/make_inputs.py``.

First and last frame of a scene, a short video, the same with sound, and a mask, from the world of shapes that the
bundled model knows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vidgen.training.data import shapes
from vidgen.vidgen_core.media import Sound, write_video

INPUTS = Path(__file__).resolve().parents[2] / "workflows" / "inputs"
COMMON = {"size": "medium", "camera": "static", "count": "one", "pattern": shapes.ATTRIBUTES["pattern"][0]}
STAR = {"shape": "star", "colour": "red", "motion": "right", "background": "blue"}
CIRCLE = {"shape": "circle", "colour": "green", "motion": "left", "background": "grey"}


def frames(seed: int, wanted: dict[str, str]) -> np.ndarray:
    """(17, 64, 64, 3) uint8."""
    scene = shapes.compose_scene(np.random.default_rng(seed), **COMMON, **wanted)
    return np.ascontiguousarray(shapes.render(scene).transpose(1, 2, 3, 0))


def tone(length_s: float, rate_hz: int = 22050) -> Sound:
    """One that rises by an octave, softly begun and ended."""
    time = torch.linspace(0, 1, round(length_s * rate_hz))
    phase = (330 * (2**time)).cumsum(0) * (2 * torch.pi / rate_hz)
    return Sound((0.3 * phase.sin() * (torch.pi * time).sin())[None], rate_hz)


def main() -> None:
    INPUTS.mkdir(exist_ok=True)
    first, *_, last = frames(1, STAR)
    Image.fromarray(first).save(INPUTS / "vidgen-first-frame.png", optimize=True)
    Image.fromarray(last).save(INPUTS / "vidgen-last-frame.png", optimize=True)
    write_video(INPUTS / "vidgen-circle.mp4", frames(2, CIRCLE), fps=shapes.FPS)
    sounding = tone(shapes.NUM_FRAMES / shapes.FPS)
    write_video(INPUTS / "vidgen-sound.mp4", frames(2, CIRCLE), fps=shapes.FPS, sound=sounding)
    alpha = np.full((shapes.SIZE_PX, shapes.SIZE_PX, 4), 128, dtype=np.uint8)
    alpha[..., 3] = 255
    alpha[: shapes.SIZE_PX * 3 // 4, :, 3] = 0  # transparent is what is made new: the upper three quarters
    Image.fromarray(alpha).save(INPUTS / "vidgen-mask.png", optimize=True)


if __name__ == "__main__":
    main()
