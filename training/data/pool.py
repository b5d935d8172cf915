"""A pool of rendered clips on disk: drawn once by several processes, read at random through a memory map.

Clip i of a pool depends on (split, seed, i) only, so a pool is the same whoever draws it and on however many
processes. The file's name holds a digest of everything that shapes its contents, the drawing code included: a
change there makes a new file, and runs never read clips of another world.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...vidgen_core.errors import RecipeError
from ...vidgen_core.weights.config import unknown_name
from . import shapes, styles

log = logging.getLogger("vidgen")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """What is in a pool of clips."""

    num_clips: int = 3072
    num_frames: int = shapes.NUM_FRAMES
    size_px: int = shapes.SIZE_PX
    split: str = "train"
    seed: int = 0
    max_interval: int = 1
    """clip frames between drawn frames are 1, or for every fourth clip a random number up to this"""
    style: Literal["plain", "night"] = "plain"
    """a key of ``styles.STYLES``"""
    folder: str = "cache"

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(3, T, H, W)"""
        return (3, self.num_frames, self.size_px, self.size_px)

    def facts(self) -> dict[str, Any]:
        """Everything that shapes the contents, the drawing code included."""
        facts = asdict(self) | {"source": _digest_of(shapes.__file__)}
        del facts["folder"]
        if self.style == "plain":
            del facts["style"]  # pools that were drawn before there were styles are still good
        else:
            facts["style_source"] = _digest_of(styles.__file__)
        return facts

    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:12]
        return Path(self.folder) / f"clips-{digest}.u8"


def _digest_of(source: str) -> str:
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()


def scene_of(settings: PoolSettings, index: int) -> tuple[shapes.Scene, np.random.Generator]:
    """The scene of clip ``index``, and the generator as the scene left it (for the clip's other choices)."""
    salt = ("train", "seen", "heldout", "all").index(settings.split)
    rng = np.random.default_rng([settings.seed, salt, index])
    return shapes.sample_scene(rng, split=settings.split), rng


def draw_clip(settings: PoolSettings, index: int) -> np.ndarray:
    """Clip ``index``: uint8 (3, T, H, W)."""
    scene, rng = scene_of(settings, index)
    interval = int(rng.integers(1, settings.max_interval + 1)) if index % 4 == 3 else 1
    clip = shapes.render(
        scene, num_frames=settings.num_frames, height_px=settings.size_px, width_px=settings.size_px, interval=interval
    )
    return styles.STYLES[settings.style](clip)


def open_pool(settings: PoolSettings, *, processes: int = 1) -> np.ndarray:
    """The pool as a read-only memory map, uint8 (N, 3, T, H, W); it is drawn first if it is not there."""
    path = settings.path()
    shape = (settings.num_clips, *settings.clip_shape)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw_all(settings, path, shape, processes)
    return np.memmap(path, dtype=np.uint8, mode="r", shape=shape)


def drawing_odds(scenes: Sequence[shapes.Scene], emphasis: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """Cumulated probabilities (N,) of drawing each scene; an attribute's factors multiply with another's.

    Raises:
        RecipeError: an unknown attribute or value, or a factor that is not a number above 0.
    """
    weights = np.ones(len(scenes))
    for name, factors in emphasis.items():
        if name not in shapes.ATTRIBUTES:
            raise unknown_name("attribute", name, list(shapes.ATTRIBUTES), where="mix.emphasis", error=RecipeError)
        for value, factor in factors.items():
            if value not in shapes.ATTRIBUTES[name]:
                known = shapes.ATTRIBUTES[name]
                raise unknown_name(name, value, known, where=f"mix.emphasis.{name}", error=RecipeError)
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise RecipeError(
                    "A value of the recipe cannot be used",
                    given=f"mix.emphasis.{name}.{value} = {factor!r}",
                    expected="a number above 0",
                )
            weights[[getattr(scene, name) == value for scene in scenes]] *= factor
    return np.cumsum(weights) / weights.sum()


def pick(odds: np.ndarray, number: int) -> int:
    """The scene that a random number from 0 to 2**30 - 1 means under these odds."""
    return int(np.searchsorted(odds, (number + 0.5) / (1 << 30)))


def _draw_all(settings: PoolSettings, path: Path, shape: tuple[int, ...], processes: int) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    np.memmap(partial, dtype=np.uint8, mode="w+", shape=shape).flush()
    log.info("Drawing %d clips into %s", settings.num_clips, path)
    started = time.monotonic()
    chunks = list(_chunks(settings.num_clips, 128))
    if processes == 1:
        for chunk in chunks:
            _draw_chunk(settings, partial, shape, chunk)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            jobs = [pool.submit(_draw_chunk, settings, partial, shape, chunk) for chunk in chunks]
            for done, job in enumerate(as_completed(jobs), start=1):
                job.result()
                if done % 8 == 0:
                    log.info("%d of %d clips", min(done * 128, settings.num_clips), settings.num_clips)
    partial.rename(path)
    log.info("Drew %d clips in %.0f s", settings.num_clips, time.monotonic() - started)


def _chunks(total: int, size: int) -> Iterator[range]:
    return (range(start, min(total, start + size)) for start in range(0, total, size))


def _draw_chunk(settings: PoolSettings, path: Path, shape: tuple[int, ...], chunk: range) -> None:
    clips = np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)
    for index in chunk:
        clips[index] = draw_clip(settings, index)
    clips.flush()
