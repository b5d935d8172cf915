"""Styles: the same scenes in another look, each a function of the pixels alone, so that its effect has a closed form.

A style keeps every fact that a caption names except the background's colour: it is what a LoRA can learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .detect import dilated, object_masks

NIGHT_LIGHT = 0.3
"""how much of the background's light is left at night"""
LIT = (0.22, 0.36)
"""chroma at which a pixel begins to count as a thing that shines, and at which it is one: backgrounds have less"""


def plain(clip: np.ndarray) -> np.ndarray:
    return clip


def night(clip: np.ndarray) -> np.ndarray:
    """The background goes dark, the things stay as bright as they were. uint8 (3, T, H, W) -> the same."""
    pixels = clip.astype(np.float32)
    chroma = (pixels.max(0) - pixels.min(0)) / 255
    share = np.clip((chroma - LIT[0]) / (LIT[1] - LIT[0]), 0, 1)
    lit = share * share * (3 - 2 * share)
    return (pixels * (NIGHT_LIGHT + (1 - NIGHT_LIGHT) * lit) + 0.5).astype(np.uint8)


STYLES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"plain": plain, "night": night}


def background_light(clip: np.ndarray) -> float:
    """Mean luminance in [0, 1] of what is no object (Rec. 709 weights, no gamma), edges left out."""
    frames = clip.astype(np.float32) / 255
    luminance = np.tensordot(np.float32([0.2126, 0.7152, 0.0722]), frames, 1)
    return float(luminance[~dilated(object_masks(frames), 2)].mean())
