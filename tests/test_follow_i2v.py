"""The image-to-video benchmark: what it gives the model, and how it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vidgen.benchmarks import follow_i2v
from vidgen.benchmarks.follow import scene_and_caption
from vidgen.training.data import detect


def row(*, motion: bool, psnr_db: float) -> dict[str, Any]:
    wanted = dict.fromkeys(detect.JUDGED, "a")
    return {
        "wanted": wanted,
        "seen": wanted | {"motion": "a" if motion else "b"},
        "first_frame_psnr_db": psnr_db,
        "ceiling_psnr_db": 35.0,
        "steps": [6.0, 2.0, 4.0],
        "true_steps": [2.0, 2.0, 2.0],
        "seconds": 1.0,
    }


@pytest.mark.parametrize(
    ("num_moved", "psnr_db", "passes"),
    [
        (10, 31.0, {"first_frame": True, "motion": True}),
        (9, 30.0, {"first_frame": True, "motion": True}),
        (8, 29.9, {"first_frame": False, "motion": False}),
    ],
)
def test_the_bars(num_moved: int, psnr_db: float, passes: dict[str, bool]) -> None:
    result = follow_i2v.summary([row(motion=index < num_moved, psnr_db=psnr_db) for index in range(10)])
    assert result["passes"] == passes
    assert result["motion"] == num_moved / 10
    assert result["first_frame_psnr_db"] == pytest.approx(psnr_db)
    assert (result["first_step_ratio"], result["step_ratio"]) == (3.0, 1.5)
    text = follow_i2v.report(result | {"n": 10, "split": "seen", "seed": 1, "wall_s": 1.0})
    assert ("not reached" in text) == (not all(passes.values()))


def test_steps_are_changes_between_frames() -> None:
    clip = np.zeros((3, 3, 4, 4), dtype=np.uint8)
    clip[:, 1], clip[:, 2, :2] = 10, 10
    assert follow_i2v.steps_of(clip) == pytest.approx([10.0, 10.0 / 2**0.5])


def test_a_scene_begins_with_its_true_first_frame() -> None:
    """The bundled model of one step: whatever it makes of the rest, the given frame comes back through the codec."""
    task = follow_i2v.ImageTask(
        model=None,
        split="seen",
        seed=5,
        indices=(3,),
        sampling=(("num_steps", 1), ("cfg", 1.0)),
        method="token_replace",
    )
    (found,) = follow_i2v.run_task(task)
    assert found["caption"] == scene_and_caption("seen", 5, 3)[1]
    assert found["wanted"].keys() == set(detect.JUDGED)
    assert found["ceiling_psnr_db"] > 25
    assert found["first_frame_psnr_db"] > 15  # the decoder's norms look at all frames, and the others are noise here
