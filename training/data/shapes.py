"""The world in a box: an endless procedural text-video data set, rendered from a seed.

One or two shaded shapes move over a softly lit background while a camera pans or zooms. Every
attribute that a caption names is an exact fact of the scene, so that a closed-form detector
(``detect.py``) can measure from pixels alone whether a model followed its prompt.

The plane of the world is measured in half frames: the untouched view is [-1, 1] along the shorter
side, x to the right, y down. Time runs from 0 to 1 over the 17 frames (two seconds at 8 fps) of a clip.
The camera transform is exact and applies to shapes and background alike, so the motion of the
object and the motion of the camera are separate facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

NUM_FRAMES = 17
FPS = 8
SIZE_PX = 64

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.90, 0.13, 0.13),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.96, 0.86, 0.12),
    "green": (0.16, 0.72, 0.22),
    "cyan": (0.12, 0.82, 0.86),
    "blue": (0.16, 0.32, 0.94),
    "purple": (0.56, 0.20, 0.86),
    "pink": (0.98, 0.28, 0.66),
}
SIZES: Mapping[str, float] = {"small": 0.30, "medium": 0.39, "large": 0.50}
"""radius in half frames, in the middle of the clip"""
DIRECTIONS: Mapping[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up-left": (-1, -1),
    "up-right": (1, -1),
    "down-left": (-1, 1),
    "down-right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "bounce", "spin", "grow", "shrink", "still")
CAMERAS = ("static", "pan left", "pan right", "zoom in", "zoom out")
COUNTS = ("one", "two")
BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "blue": (0.45, 0.53, 0.64),
    "green": (0.49, 0.60, 0.50),
    "purple": (0.56, 0.50, 0.64),
    "brown": (0.60, 0.53, 0.45),
    "grey": (0.55, 0.55, 0.55),
    "white": (0.84, 0.84, 0.83),
    "black": (0.20, 0.20, 0.22),
}
PATTERNS = ("gradient", "dotted", "checkered")

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "camera": CAMERAS,
    "count": COUNTS,
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
}

TRAVEL = 0.52  # half frames that a moving object covers in a clip
PAN = 0.40  # half frames that a panning camera covers in a clip
ZOOM = 1.36  # how much a zooming camera scales the view in a clip
GROWTH = 1.75  # how much the radius of a growing object scales in a clip
TURN = math.radians(240.0)  # how far a spinning object turns in a clip, clockwise
HOP = 0.44  # height in half frames from which a bouncing object falls, and to which it returns
EDGE_PX = 1.4  # width over which an outline fades, so that slow movement is smooth
MARGIN = 0.03  # half frames kept between objects and the border of the frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One clip: the attributes that captions name, and the nuisances that they do not."""

    shape: str
    colour: str
    size: str
    motion: str
    camera: str
    count: str
    background: str
    pattern: str
    radius: float  # half frames at mid clip
    centre: tuple[float, float]  # of the group of objects at mid clip, in half frames
    spacing: tuple[float, float]  # from one object of a pair to the other; (0, 0) for one
    pace: float  # multiplies every rate of change
    tint: tuple[float, float, float]  # added to the background's colour
    waves: tuple[tuple[float, float, float, float], ...]  # (kx, ky, phase, weight) of the background light
    pattern_phase: tuple[float, float]
    pattern_period: float

    def attributes(self) -> dict[str, str]:
        """What the caption may speak of."""
        return {name: getattr(self, name) for name in ATTRIBUTES}


# ---------------------------------------------------------------------------------------------
# sampling


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether a (shape, colour, motion) triple is kept out of training: one in ten, evenly spread.

    Every pair of values still occurs in training, so a model that composes can make the triple.
    """
    i, j, k = SHAPES.index(shape), tuple(COLOURS).index(colour), MOTIONS.index(motion)
    return (3 * i + j + 7 * k) % 10 == 4


def sample_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Draw a scene. ``split``: "train" and "seen" leave out the held-out triples, "heldout" has only them."""
    if split not in ("train", "seen", "heldout", "all"):
        raise ValueError(f"split must be train, seen, heldout or all, not {split!r}")
    while True:
        shape, colour, motion = (str(rng.choice(ATTRIBUTES[name])) for name in ("shape", "colour", "motion"))
        if split == "all" or is_held_out(shape, colour, motion) == (split == "heldout"):
            break
    return compose_scene(rng, shape=shape, colour=colour, motion=motion)


def compose_scene(rng: np.random.Generator, **given: str) -> Scene:
    """Draw a scene in which the ``given`` attributes are fixed and everything else is random."""
    facts = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    facts["count"] = "two" if rng.random() < 0.2 else "one"
    facts["pattern"] = "gradient" if rng.random() < 0.5 else str(rng.choice(PATTERNS[1:]))
    facts.update(given)
    if facts["count"] == "two" and facts["size"] == "large" and "size" not in given:
        facts["size"] = "medium"  # two large ones do not fit
    pace = float(rng.uniform(0.92, 1.08))
    radius = SIZES[facts["size"]] * float(rng.uniform(0.94, 1.06))
    spacing = (0.0, 0.0)
    if facts["count"] == "two":
        radius = min(radius, 0.33)
        if facts["motion"] in ("grow", "shrink"):
            radius = min(radius, 0.29)
        gap = radius * (2.35 if facts["motion"] not in ("grow", "shrink") else 2.5 * math.sqrt(GROWTH))
        # side by side unless both camera and object travel sideways, where only stacking leaves room
        sideways = facts["camera"].startswith("pan") and DIRECTIONS.get(facts["motion"], (0, 0))[0] != 0
        spacing = (0.0, gap) if sideways or rng.random() < 0.3 else (gap, 0.0)
    waves = tuple(
        (
            float(length * math.cos(angle)),
            float(length * math.sin(angle)),
            float(rng.uniform(0, 2 * math.pi)),
            float(rng.uniform(0.6, 1.0)),
        )
        for length, angle in zip(rng.uniform(2.2, 3.6, 3), rng.uniform(0, math.pi, 3), strict=True)
    )
    scene = Scene(
        **facts,
        radius=radius,
        centre=(0.0, 0.0),
        spacing=spacing,
        pace=pace,
        tint=tuple(float(x) for x in rng.uniform(-0.025, 0.025, 3)),  # type: ignore[arg-type]
        waves=waves,
        pattern_phase=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
        pattern_period=float(rng.uniform(0.84, 1.0)),
    )
    return _placed(scene, rng)


def _placed(scene: Scene, rng: np.random.Generator) -> Scene:
    """Move the group to a random place from which it never leaves the frame."""
    low, high = _screen_extent(scene)  # with centre (0, 0)
    times = np.linspace(0.0, 1.0, NUM_FRAMES)
    _, scale = camera_track(scene, times)
    reach = float(scale.max())
    centre = []
    for axis in range(2):
        room_low, room_high = -1 + MARGIN - low[axis], 1 - MARGIN - high[axis]
        if room_low >= room_high:  # too big for the frame: centre what is seen
            centre.append(0.5 * (room_low + room_high) / reach)
        else:
            centre.append(float(rng.uniform(room_low, room_high)) / reach)
    return replace(scene, centre=(float(centre[0]), float(centre[1])))


def _screen_extent(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    times = np.linspace(0.0, 1.0, NUM_FRAMES)
    path, radius, _ = object_track(scene, times)
    offset, scale = camera_track(scene, times)
    half = np.abs(np.asarray(scene.spacing)) / 2
    on_screen = (path - offset) * scale[:, None]
    reach = (radius[:, None] * 1.08 + half) * scale[:, None]
    return (on_screen - reach).min(0), (on_screen + reach).max(0)


# ---------------------------------------------------------------------------------------------
# movement


def object_track(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """World position (T, 2), radius (T,) and rotation in radians (T,) of the group of objects."""
    path = np.repeat(np.asarray([scene.centre], dtype=np.float64), len(times), 0)
    radius = np.full(len(times), scene.radius)
    rotation = np.zeros(len(times))
    if scene.motion in DIRECTIONS:
        step = np.asarray(DIRECTIONS[scene.motion], dtype=np.float64)
        step *= TRAVEL * scene.pace / np.linalg.norm(step)
        path += (times - 0.5)[:, None] * step
    elif scene.motion == "bounce":
        path[:, 1] += HOP * (0.5 - np.abs(np.cos(math.pi * times)))
    elif scene.motion == "spin":
        rotation = TURN * scene.pace * times
    elif scene.motion in ("grow", "shrink"):
        sign = 1 if scene.motion == "grow" else -1
        radius = radius * GROWTH ** (sign * scene.pace * (times - 0.5))
    return path, radius, rotation


def camera_track(scene: Scene, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera looks (T, 2) in half frames and its magnification (T,)."""
    offset = np.zeros((len(times), 2))
    scale = np.ones(len(times))
    along = (times - 0.5) * scene.pace
    if scene.camera.startswith("pan"):
        offset[:, 0] = PAN * along * (1 if scene.camera == "pan right" else -1)
    elif scene.camera.startswith("zoom"):
        scale = ZOOM ** (along * (1 if scene.camera == "zoom in" else -1))
    return offset, scale


# ---------------------------------------------------------------------------------------------
# drawing

_TABLE_EXTENT = 1.6  # distance tables cover [-1.6, 1.6] radii
_TABLE_SIZE = 161


def _outline(shape: str) -> np.ndarray:
    """Corners (N, 2) of a shape of radius about 1, upright, y down."""
    if shape == "square":
        h = 0.86
        return np.array([(-h, -h), (h, -h), (h, h), (-h, h)])
    if shape == "triangle":
        return np.array([(0.0, -1.05), (1.0, 0.78), (-1.0, 0.78)])
    if shape == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        reach = np.where(np.arange(10) % 2 == 0, 1.12, 0.47)
        return np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)
    if shape == "cross":
        a, b = 0.34, 1.0
        quarter = [(a, -b), (a, -a), (b, -a)]
        points = []
        for turn in range(4):
            c, s = math.cos(turn * math.pi / 2), math.sin(turn * math.pi / 2)
            points += [(c * x - s * y, s * x + c * y) for x, y in quarter]
        return np.array(points)
    if shape == "heart":
        u = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        x = 16 * np.sin(u) ** 3
        y = -(13 * np.cos(u) - 5 * np.cos(2 * u) - 2 * np.cos(3 * u) - np.cos(4 * u))
        return np.stack([x, y + 2.0], 1) / 15.0
    raise ValueError(f"no outline for {shape!r}")


@lru_cache(maxsize=len(SHAPES))
def distance_table(shape: str) -> np.ndarray:
    """Signed distance to the outline (negative inside), in radii, on a square grid of side 2 * 1.6."""
    axis = np.linspace(-_TABLE_EXTENT, _TABLE_EXTENT, _TABLE_SIZE)
    x, y = np.meshgrid(axis, axis)
    if shape == "circle":
        return (np.hypot(x, y) - 0.95).astype(np.float32)
    corners = _outline(shape)
    ends = np.roll(corners, -1, 0)
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, ends, strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:  # crossing number
            inside ^= ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -nearest, nearest).astype(np.float32)


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance in radii at local coordinates ``u, v`` (any shape), bilinear from the table."""
    table = distance_table(shape)
    step = (_TABLE_SIZE - 1) / (2 * _TABLE_EXTENT)
    x = np.clip((u + _TABLE_EXTENT) * step, 0, _TABLE_SIZE - 1.001)
    y = np.clip((v + _TABLE_EXTENT) * step, 0, _TABLE_SIZE - 1.001)
    i, j = y.astype(np.int32), x.astype(np.int32)
    fy, fx = y - i, x - j
    flat = table.reshape(-1)
    base = i * _TABLE_SIZE + j
    top = flat[base] * (1 - fx) + flat[base + 1] * fx
    bottom = flat[base + _TABLE_SIZE] * (1 - fx) + flat[base + _TABLE_SIZE + 1] * fx
    return top * (1 - fy) + bottom * fy


def _background(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Colour (3, T, H, W) of the background at world points ``x, y`` (T, H, W)."""
    light = np.zeros_like(x)
    for kx, ky, phase, weight in scene.waves:
        light += weight * np.sin(kx * x + ky * y + phase)
    light *= 0.055
    period = scene.pattern_period
    a, b = x / period + scene.pattern_phase[0], y / period + scene.pattern_phase[1]
    if scene.pattern == "dotted":
        rows = np.floor(b)
        a = a + 0.5 * (rows % 2)  # shifted rows look less like a grid
        away = np.hypot(a - np.floor(a) - 0.5, b - rows - 0.5)
        light += 0.11 * np.clip((0.27 - away) / 0.16 + 0.5, 0, 1)
    elif scene.pattern == "checkered":
        product = np.sin(math.pi * (a + b)) * np.sin(math.pi * (a - b))
        light += 0.07 * np.clip(product * 2.2, -1, 1)
    base = np.asarray(BACKGROUNDS[scene.background], dtype=np.float32) + np.asarray(scene.tint, dtype=np.float32)
    return base[:, None, None, None] + light[None]


def render(
    scene: Scene,
    *,
    num_frames: int = NUM_FRAMES,
    height_px: int = SIZE_PX,
    width_px: int = SIZE_PX,
    interval: float = 1.0,
    start: float = 0.0,
) -> np.ndarray:
    """Draw a clip: uint8 (3, num_frames, height_px, width_px).

    Args:
        interval: clip frames from one drawn frame to the next (2 plays at double speed).
        start: clip frame at which the drawing begins.
    """
    times = (start + interval * np.arange(num_frames)) / (NUM_FRAMES - 1)
    path, radius, rotation = object_track(scene, times)
    offset, scale = camera_track(scene, times)
    short = min(height_px, width_px)
    px = 2.0 / short  # half frames per pixel
    xs = ((np.arange(width_px) + 0.5) * px - width_px / short).astype(np.float32)
    ys = ((np.arange(height_px) + 0.5) * px - height_px / short).astype(np.float32)
    zoom = scale.astype(np.float32)[:, None, None]
    x = np.broadcast_to(xs, (num_frames, height_px, width_px)) / zoom + offset[:, 0, None, None].astype(np.float32)
    y = np.broadcast_to(ys[:, None], (num_frames, height_px, width_px)) / zoom + offset[:, 1, None, None].astype(
        np.float32
    )
    image = _background(scene, x, y)
    size = radius.astype(np.float32)[:, None, None]
    sharpness = size * zoom / (px * EDGE_PX)
    spacing = np.asarray(scene.spacing)
    places = [path - spacing / 2, path + spacing / 2] if scene.count == "two" else [path]
    cos, sin = (f(rotation).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    colour = np.asarray(COLOURS[scene.colour], dtype=np.float32)[:, None, None, None]
    for place in places:
        dx = (x - place[:, 0, None, None].astype(np.float32)) / size
        dy = (y - place[:, 1, None, None].astype(np.float32)) / size
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        su, sv = cos * (dx - 0.16) + sin * (dy - 0.22), cos * (dy - 0.22) - sin * (dx - 0.16)
        shadow = np.clip(0.5 - signed_distance(scene.shape, su, sv) / 0.5, 0, 1)
        image *= 1 - 0.30 * shadow**1.5
        cover = np.clip(0.5 - signed_distance(scene.shape, u, v) * sharpness, 0, 1)
        # lit from the upper left of the object itself, so that the light turns with it
        shade = np.clip(0.90 - 0.11 * u - 0.17 * v, 0.6, 1.12)
        image += cover * (colour * shade - image)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# captions

_SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus"),
}
_PLURALS = {
    "circle": "circles", "disc": "discs", "ball": "balls", "square": "squares", "box": "boxes",
    "triangle": "triangles", "star": "stars", "heart": "hearts", "cross": "crosses", "plus": "pluses",
}  # fmt: skip
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": ("medium",), "large": ("large", "big", "huge")}
_GREY = {"grey": ("grey", "gray"), "black": ("black", "dark"), "white": ("white", "bright")}
_COLOUR_WORDS = {"purple": ("purple", "violet"), "pink": ("pink", "magenta"), "cyan": ("cyan", "turquoise")}
_VERBS = {"one": ("moves", "slides", "drifts", "travels"), "two": ("move", "slide", "drift", "travel")}
_DIRECTION_WORDS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up-left": ("up and left", "diagonally up to the left", "up left"),
    "up-right": ("up and right", "diagonally up to the right", "up right"),
    "down-left": ("down and left", "diagonally down to the left", "down left"),
    "down-right": ("down and right", "diagonally down to the right", "down right"),
}
_OTHER_MOTIONS = {
    "bounce": (("bounces", "hops", "jumps up and down"), ("bounce", "hop", "jump up and down")),
    "spin": (("spins", "rotates", "turns around"), ("spin", "rotate", "turn around")),
    "grow": (("grows", "gets bigger", "expands"), ("grow", "get bigger", "expand")),
    "shrink": (("shrinks", "gets smaller", "contracts"), ("shrink", "get smaller", "contract")),
    "still": (("stays still", "rests", "does not move"), ("stay still", "rest", "do not move")),
}
_CAMERA_WORDS = {
    "static": ("static camera", "the camera is fixed", "the camera does not move"),
    "pan left": ("the camera pans left", "pan left", "camera pans to the left"),
    "pan right": ("the camera pans right", "pan right", "camera pans to the right"),
    "zoom in": ("the camera zooms in", "zoom in", "camera zooms in slowly"),
    "zoom out": ("the camera zooms out", "zoom out", "camera zooms out slowly"),
}
_PATTERN_WORDS = {
    "gradient": ("smooth", "gradient", "soft"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered",),
}


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def caption_with_fields(scene: Scene, rng: np.random.Generator, *, image: bool = False) -> tuple[str, frozenset[str]]:
    """A caption in one of several phrasings, and the attributes that it states.

    An unspoken camera is a static one and an unspoken motion is rest, so both always count as stated.
    Size, background and pattern may be left out, and then they are anyone's choice.
    ``image`` describes a single frame: no motion, no camera.
    """
    stated = {"shape", "colour", "count", "motion", "camera"}
    long = rng.random() < 0.5
    article = "two" if scene.count == "two" else _pick(rng, ("a", "a", "one"))
    words = [article]
    if rng.random() < 0.5:
        words.append(_pick(rng, _SIZE_WORDS[scene.size]))
        stated.add("size")
    words.append(_pick(rng, _COLOUR_WORDS.get(scene.colour, (scene.colour,))))
    noun = _pick(rng, _SHAPE_WORDS[scene.shape])
    words.append(_PLURALS[noun] if scene.count == "two" else noun)
    subject = " ".join(words)
    ground = ""
    if rng.random() < 0.8:
        stated.add("background")
        texture = ""
        if rng.random() < 0.6:
            texture = _pick(rng, _PATTERN_WORDS[scene.pattern]) + " "
            stated.add("pattern")
        colour = _pick(rng, _GREY.get(scene.background, (scene.background,)))
        link = _pick(rng, ("on a", "over a", "in front of a")) if long else "on a"
        ground = f" {link} {texture}{colour} background"
    if image:
        lead = _pick(rng, ("an image of ", "a picture of ")) if long else ""
        return lead + subject + ground, frozenset(stated - {"motion", "camera"})
    action = _action(scene, rng)
    camera = ""
    if scene.camera != "static" or rng.random() < 0.4:
        camera = ", " + _pick(rng, _CAMERA_WORDS[scene.camera])
    if not long:
        return subject + action + ground + camera, frozenset(stated)
    lead = _pick(rng, ("a video of ", "a short clip shows ", "we see ", ""))
    if camera and rng.random() < 0.4:
        return camera[2:] + ", " + lead + subject + action + ground, frozenset(stated)
    return lead + subject + ground + (" that" + action if action else "") + camera, frozenset(stated)


def _action(scene: Scene, rng: np.random.Generator) -> str:
    if scene.motion == "still" and rng.random() < 0.25:
        return ""
    if scene.motion in DIRECTIONS:
        return f" {_pick(rng, _VERBS[scene.count])} {_pick(rng, _DIRECTION_WORDS[scene.motion])}"
    return " " + _pick(rng, _OTHER_MOTIONS[scene.motion][0 if scene.count == "one" else 1])


def caption(scene: Scene, rng: np.random.Generator, *, image: bool = False) -> str:
    """A caption of the scene; see :func:`caption_with_fields`."""
    return caption_with_fields(scene, rng, image=image)[0]


def _vocabulary() -> tuple[str, ...]:
    words = {"a", "an", "one", "two", "on", "in", "over", "front", "of", "the", "background", "that", ","}
    words |= {"video", "short", "clip", "shows", "we", "see", "image", "picture"}
    tables = [_SHAPE_WORDS, _SIZE_WORDS, _GREY, _COLOUR_WORDS, _VERBS, _DIRECTION_WORDS, _CAMERA_WORDS, _PATTERN_WORDS]
    phrases = [phrase for table in tables for row in table.values() for phrase in row]
    phrases += [phrase for rows in _OTHER_MOTIONS.values() for row in rows for phrase in row]
    phrases += [*_PLURALS.values(), *COLOURS, *BACKGROUNDS]
    for phrase in phrases:
        words.update(phrase.split())
    return tuple(sorted(words))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word (and the comma) that a caption can hold."""
