"""Closed-form detectors: what a clip of the shapes' world shows, measured from its pixels alone.

Nothing here is learned. Objects are the saturated pixels; the background is never saturated. The
camera is found by registering the background of distant frames against one another, the motion of
the object by following it after the camera is undone, the shape by correlation with the world's own
outlines at equal area and softness. On rendered ground truth every detector must be right at least 98 times in a
hundred (``tests/test_world.py``) before its verdict on a model counts.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from . import shapes as world

JUDGED = ("colour", "shape", "motion", "camera", "count")
"""the attributes that :func:`detect` reports"""

_MIN_CHROMA_GAP = 0.12  # below this there is no object to speak of


def detect(video: np.ndarray) -> dict[str, str]:
    """Attributes of a clip.

    Args:
        video: (3, T, H, W), uint8 or float in [0, 1].

    Returns:
        a value of ``shapes.ATTRIBUTES`` for each name in :data:`JUDGED`, or "none" where nothing is seen.
    """
    frames = video.astype(np.float32) / 255 if video.dtype == np.uint8 else video.astype(np.float32)
    frames = np.clip(frames, 0, 1)
    masks = object_masks(frames)
    if masks.sum(axis=(1, 2)).max(initial=0) < 12:
        return dict.fromkeys(JUDGED, "none")
    label, drift, zoom = camera_motion(frames, masks)
    turn = _turn(frames, masks)
    motion = object_motion(masks, drift, zoom, turn)
    return {
        "colour": colour_name(frames, masks),
        "shape": shape_name(frames, masks, upright=motion != "spin"),
        "motion": motion,
        "camera": label,
        "count": count_name(masks),
    }


# ---------------------------------------------------------------------------------------------
# where the objects are


def chroma(frames: np.ndarray) -> np.ndarray:
    """Largest minus smallest colour channel (T, H, W): 0 for grey, above 0.4 for the objects."""
    return frames.max(0) - frames.min(0)


def object_masks(frames: np.ndarray) -> np.ndarray:
    """Boolean (T, H, W): pixels that an object covers at least half."""
    saturation = chroma(frames)
    low = float(np.median(saturation))
    high = float(np.quantile(saturation, 0.985))
    if high - low < _MIN_CHROMA_GAP:
        return np.zeros(saturation.shape, dtype=bool)
    return saturation > low + 0.5 * (high - low)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected parts of a boolean image, largest first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        best = np.maximum.reduce(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        best = np.where(mask, best, 0)
        # jump along the labels found so far: each label is the index of a pixel, whose own label may be larger
        flat = best.reshape(-1)
        best = np.where(mask, flat[best - 1], 0)
        if np.array_equal(best, labels):
            break
        labels = best
    names, sizes = np.unique(labels[labels > 0], return_counts=True)
    return [labels == names[i] for i in np.argsort(-sizes)]


def count_name(masks: np.ndarray) -> str:
    """One or two, by the number of parts that are at least a third of the largest, over the frames."""
    votes = []
    for mask in masks[:: max(1, len(masks) // 8)]:
        if mask.any():
            sizes = [part.sum() for part in components(mask)]
            votes.append(sum(size >= max(6, 0.34 * sizes[0]) for size in sizes))
    typical = float(np.median(votes)) if votes else 0
    return {0: "none", 1: "one", 2: "two"}.get(round(typical), "many")


# ---------------------------------------------------------------------------------------------
# colour and shape


@lru_cache(maxsize=1)
def _hues() -> Mapping[str, float]:
    return {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in world.COLOURS.items()}


def colour_name(frames: np.ndarray, masks: np.ndarray) -> str:
    """The palette colour whose hue is nearest that of the objects' mean colour."""
    saturation = chroma(frames)
    core = masks & (saturation >= np.quantile(saturation[masks], 0.4))
    mean = frames[:, core].mean(1)
    hue = colorsys.rgb_to_hsv(*(float(c) for c in mean))[0]
    return min(_hues(), key=lambda name: abs((hue - _hues()[name] + 0.5) % 1 - 0.5))


_TEMPLATE_PX = 40
_AREA_SIDE = 20.0  # templates are drawn with the area of a square of this side
_SOFTNESS = (0.0, 0.05, 0.09, 0.13, 0.17)  # Gaussian blur that a video may have, in sides of that square


@lru_cache(maxsize=2)
def _templates(upright: bool) -> Mapping[str, np.ndarray]:
    """shape -> (softness, angle, pixel): its masks of unit norm, centred on the centroid, at the standard area.

    Blur leaves area and centroid of a soft mask alone, so a soft object is compared with equally soft templates: a
    star with rounded tips is still none of the other shapes.
    """
    angles = (0,) if upright else tuple(range(0, 360, 15))
    templates = {}
    for shape in world.SHAPES:
        masks = np.stack([[_soft(_template(shape, angle), blur) for angle in angles] for blur in _SOFTNESS])
        flat = masks.reshape(*masks.shape[:2], -1).astype(np.float32)
        templates[shape] = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    return templates


def _template(shape: str, degrees: int) -> np.ndarray:
    """Mask of a shape, turned clockwise."""
    axis = np.linspace(-1.45, 1.45, 145)
    x, y = np.meshgrid(axis, axis)
    inside = world.signed_distance(shape, x, y) < 0
    area = inside.sum() * (axis[1] - axis[0]) ** 2
    cx, cy = x[inside].mean(), y[inside].mean()
    px = math.sqrt(area) / _AREA_SIDE  # radii per template pixel
    grid = (np.arange(_TEMPLATE_PX) - (_TEMPLATE_PX - 1) / 2) * px
    gx, gy = np.meshgrid(grid, grid)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    u, v = c * gx + s * gy + cx, c * gy - s * gx + cy
    return np.clip(0.5 - world.signed_distance(shape, u, v) / px, 0, 1)


def _soft(mask: np.ndarray, blur: float) -> np.ndarray:
    """A square mask convolved with a Gaussian."""
    if blur == 0:
        return mask
    away = np.arange(len(mask))[:, None] - np.arange(len(mask))[None, :]
    kernel = np.exp(-0.5 * (away / (blur * _AREA_SIDE)) ** 2)
    kernel /= kernel[len(mask) // 2].sum()  # what leaves the frame is lost
    return kernel @ mask @ kernel.T


def _normalised(cover: np.ndarray) -> np.ndarray:
    """A soft mask resampled so that its centroid is central and its area the standard one."""
    height, width = cover.shape
    area = cover.sum()
    cx = float((cover.sum(0) * np.arange(width)).sum() / area)
    cy = float((cover.sum(1) * np.arange(height)).sum() / area)
    grid = (np.arange(_TEMPLATE_PX) - (_TEMPLATE_PX - 1) / 2) * math.sqrt(area) / _AREA_SIDE
    return _bilinear(cover, cx + grid[None, :], cy + grid[:, None], outside=0.0)


def _bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray, *, outside: float | None = None) -> np.ndarray:
    """Sample (H, W) at pixel coordinates; beyond the border the edge repeats, or ``outside`` is seen."""
    x, y = np.broadcast_arrays(x, y)
    height, width = image.shape
    cx, cy = np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001)
    j, i = cx.astype(int), cy.astype(int)
    fx, fy = cx - j, cy - i
    top = image[i, j] * (1 - fx) + image[i, j + 1] * fx
    bottom = image[i + 1, j] * (1 - fx) + image[i + 1, j + 1] * fx
    value = top * (1 - fy) + bottom * fy
    if outside is None:
        return value
    return np.where((np.abs(x - cx) < 1) & (np.abs(y - cy) < 1), value, outside)


def coverage(frames: np.ndarray) -> np.ndarray:
    """Soft masks (T, H, W) in [0, 1]: how much of each pixel an object covers, by its saturation."""
    saturation = chroma(frames)
    low, high = float(np.median(saturation)), float(np.quantile(saturation, 0.985))
    share = (saturation - low) / max(high - low, _MIN_CHROMA_GAP)
    return np.where(share < 0.11, 0, np.clip(share / 0.9, 0, 1))  # an object in the shade is a tenth less saturated


def shape_name(frames: np.ndarray, masks: np.ndarray, *, upright: bool = True) -> str:
    """The shape whose outline correlates best with the largest object at equal area and softness, over the frames.

    ``upright`` objects are compared as drawn; turning ones with every angle.
    """
    scores = {shape: np.zeros(len(_SOFTNESS)) for shape in world.SHAPES}
    cover = coverage(frames)
    height, width = masks.shape[1:]
    for index in range(0, len(masks), max(1, len(masks) // 6)):
        if masks[index].sum() < 12:
            continue
        part, *others = components(masks[index])
        rows, columns = np.nonzero(part)
        cut = rows.min() == 0 or columns.min() == 0 or rows.max() == height - 1 or columns.max() == width - 1
        alone = dilated(part[None], 3)[0]
        for other in others:
            alone &= ~dilated(other[None], 1)[0]
        seen = _normalised(cover[index] * alone).reshape(-1)
        seen /= np.linalg.norm(seen)
        for shape, templates in _templates(upright).items():
            scores[shape] += (templates @ seen).max(axis=1) * (0.2 if cut else 1.0)
    return max(scores, key=lambda shape: float(scores[shape].max()))


# ---------------------------------------------------------------------------------------------
# camera

_PAN_STEPS = np.arange(-11.0, 11.01, 0.5) / 64  # fraction of the width moved in half a clip
_ZOOM_STEPS = np.arange(-0.30, 0.301, 0.0125)  # log magnification in half a clip


def camera_motion(frames: np.ndarray, masks: np.ndarray) -> tuple[str, float, float]:
    """(label, drift, zoom): pixels that the background moves to the right, and its log magnification,
    over the whole clip. Exactly one of the two is non-zero unless the camera is static."""
    image = frames.mean(0)
    hidden = dilated(masks, max(2, masks.shape[-1] // 10))  # shadows move with the objects: leave them out
    last = len(image) - 1
    if last < 2:
        return "static", 0.0, 0.0
    half = last // 2
    pairs = ((0, half), (half, 2 * half), (half // 2, half // 2 + half))
    pans = sum(_errors(image, hidden, pair, _PAN_STEPS * image.shape[-1], zooming=False) for pair in pairs)
    zooms = sum(_errors(image, hidden, pair, _ZOOM_STEPS, zooming=True) for pair in pairs)
    pan, zoom = _PAN_STEPS[int(np.argmin(pans))], _ZOOM_STEPS[int(np.argmin(zooms))]
    whole = last / half
    if np.min(pans) <= np.min(zooms):
        if abs(pan) < 0.5 * world.PAN / 4:
            return "static", 0.0, 0.0
        # content moves left when the camera pans right
        return ("pan left" if pan > 0 else "pan right"), float(pan * image.shape[-1] * whole), 0.0
    if abs(zoom) < 0.25 * math.log(world.ZOOM):
        return "static", 0.0, 0.0
    return ("zoom in" if zoom > 0 else "zoom out"), 0.0, float(zoom * whole)


def _errors(
    image: np.ndarray, hidden: np.ndarray, pair: tuple[int, int], steps: np.ndarray, *, zooming: bool
) -> np.ndarray:
    """Mean squared difference of the background of two frames after each candidate movement."""
    first, second = pair
    height, width = image.shape[1:]
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    cx, cy = (width - 1) / 2, (height - 1) / 2
    errors = []
    for step in steps:
        if zooming:
            u, v = (x - cx) / math.exp(step) + cx, (y - cy) / math.exp(step) + cy
        else:
            u, v = x - step, y
        u, v = np.broadcast_arrays(u, v)
        inside = (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
        near_u, near_v = np.clip(np.rint(u), 0, width - 1).astype(int), np.clip(np.rint(v), 0, height - 1).astype(int)
        clear = inside & ~hidden[second] & ~hidden[first][near_v, near_u]
        if clear.sum() < 0.05 * height * width:
            errors.append(1.0)
            continue
        gap = (image[second] - _bilinear(image[first], u, v))[clear]
        errors.append(float(np.square(gap - gap.mean()).mean()))
    return np.asarray(errors)


def dilated(masks: np.ndarray, steps: int) -> np.ndarray:
    """Masks (T, H, W) grown by a pixel to each side, ``steps`` times."""
    for _ in range(steps):
        padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
        masks = (
            padded[:, 1:-1, 1:-1]
            | padded[:, :-2, 1:-1]
            | padded[:, 2:, 1:-1]
            | padded[:, 1:-1, :-2]
            | padded[:, 1:-1, 2:]
        )
    return masks


# ---------------------------------------------------------------------------------------------
# object motion


def _turn(frames: np.ndarray, masks: np.ndarray) -> float:
    """Radians that the light on the largest object turns over the clip (clockwise positive)."""
    angles = []
    for index in range(masks.shape[0]):
        if masks[index].sum() < 20:
            continue
        part = components(masks[index])[0]
        rows, columns = np.nonzero(part)
        if len(rows) < 12:
            continue
        value = frames[:, index][:, part].max(0)
        x, y = columns - columns.mean(), rows - rows.mean()
        design = np.stack([x, y, np.ones_like(x)], 1)
        slope, *_ = np.linalg.lstsq(design, value, rcond=None)
        angles.append(math.atan2(slope[1], slope[0]))
    if len(angles) < 4:
        return 0.0
    track = np.unwrap(np.asarray(angles))
    # a robust slope: the median over pairs a few frames apart, times the length of the clip
    gap = max(1, len(track) // 4)
    return float(np.median(track[gap:] - track[:-gap]) / gap * (len(track) - 1))


def object_motion(masks: np.ndarray, drift: float, zoom: float, turn: float) -> str:
    """Name of the movement of the objects in the world, the camera's own (pixels, log zoom) undone."""
    height, width = masks.shape[1:]
    seen = np.flatnonzero(masks.sum(axis=(1, 2)) >= 8)
    if len(seen) < max(2, masks.shape[0] // 2):
        return "none"
    progress = seen / max(1, masks.shape[0] - 1) - 0.5
    track, areas = [], []
    for index in seen:
        rows, columns = np.nonzero(masks[index])
        track.append((columns.mean() - (width - 1) / 2, rows.mean() - (height - 1) / 2))
        areas.append(len(rows))
    scale = np.exp(zoom * progress)
    path = np.asarray(track)
    path[:, 0] -= drift * progress
    path /= scale[:, None]
    radius = np.sqrt(np.asarray(areas)) / scale
    short = min(height, width)
    ends = max(1, len(seen) // 6)
    growth = math.log(np.mean(radius[-ends:]) / np.mean(radius[:ends]))
    if abs(growth) > 0.5 * math.log(world.GROWTH) * (1 - ends / len(seen)):
        return "grow" if growth > 0 else "shrink"
    step = path[-ends:].mean(0) - path[:ends].mean(0)
    # half frames travelled, compared with half of what a moving object covers
    if np.hypot(*step) * 2 / short > 0.45 * world.TRAVEL:
        angle = math.atan2(step[1], step[0])
        return min(world.DIRECTIONS, key=lambda name: _angle_between(angle, world.DIRECTIONS[name]))
    if np.ptp(path[:, 1]) * 2 / short > 0.5 * world.HOP:
        return "bounce"
    return "spin" if abs(turn) > 0.4 * world.TURN else "still"


def _angle_between(angle: float, direction: tuple[int, int]) -> float:
    other = math.atan2(direction[1], direction[0])
    return abs((angle - other + math.pi) % (2 * math.pi) - math.pi)
