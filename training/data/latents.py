"""A cache of encoded clips: drawn and encoded once, by several processes, then read through memory maps.

Files hold ``CHUNK`` clips each and their folder is named by a digest of everything that shapes a latent: the
drawing code, the split, the seed and the encoder's weights. Making a cache longer therefore keeps what is there,
an interrupted one goes on where it was, and runs share it. The decoder is not part of the digest: it may still be
in training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...vidgen_core.codec import ScaledCodec
from ...vidgen_core.families.hunyuan.codec import HunyuanCodec
from ...vidgen_core.model import load_codec
from ..pca import without_idle_branches
from . import shapes
from .pool import PoolSettings, draw_clip, scene_of

log = logging.getLogger("vidgen")

CHUNK = 256
BATCH = 8


@dataclass(frozen=True, slots=True)
class LatentCache:
    """Encoded clips at unit scale with their scenes.

    Every row has one latent frame more than a clip: the last one is a frame of the clip encoded as an image.
    """

    chunks: list[np.ndarray]
    """float16 memory maps (CHUNK, C, T + 1, H, W)"""
    scenes: list[shapes.Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    def video(self, index: int) -> Tensor:
        """float32 (C, T, H, W)"""
        return self._row(index)[:, :-1]

    def image(self, index: int) -> Tensor:
        """float32 (C, 1, H, W)"""
        return self._row(index)[:, -1:]

    def _row(self, index: int) -> Tensor:
        return torch.from_numpy(self.chunks[index // CHUNK][index % CHUNK].astype(np.float32))


def load_frozen_codec(path: str | Path) -> ScaledCodec:
    """The codec of a file in float32, not trained, quick to encode with."""
    codec = load_codec(path, dtype=torch.float32)
    assert isinstance(codec, ScaledCodec)
    if isinstance(codec, HunyuanCodec):
        codec = HunyuanCodec(without_idle_branches(codec.vae), codec.config)
    return codec.requires_grad_(False).eval()


def open_latents(settings: PoolSettings, codec_path: str | Path, *, processes: int = 1) -> LatentCache:
    """The cache of ``settings.num_clips`` clips; what is missing is drawn and encoded first."""
    folder = latent_folder(settings, load_frozen_codec(codec_path))
    num_chunks = -(-settings.num_clips // CHUNK)
    missing = [index for index in range(num_chunks) if not _chunk_path(folder, index).is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _encode_all(settings, str(codec_path), folder, missing, processes)
    return LatentCache(
        chunks=[np.load(_chunk_path(folder, index), mmap_mode="r") for index in range(num_chunks)],
        scenes=[scene_of(settings, index)[0] for index in range(settings.num_clips)],
    )


def latent_folder(settings: PoolSettings, codec: ScaledCodec) -> Path:
    """Where the latents of these clips under this encoder lie."""
    facts = settings.facts()
    del facts["num_clips"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(repr(codec.config.scaling_factor).encode())
    for name, parameter in codec.vae.named_parameters():
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(parameter.detach().contiguous().numpy().tobytes())
    return Path(settings.folder) / f"latents-{digest.hexdigest()[:12]}"


def _chunk_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.npy"


def _encode_all(settings: PoolSettings, codec_path: str, folder: Path, missing: list[int], processes: int) -> None:
    log.info("Drawing and encoding %d clips into %s", len(missing) * CHUNK, folder)
    started = time.monotonic()
    if processes == 1:
        for done, index in enumerate(missing, start=1):
            _encode_chunk(settings, codec_path, folder, index)
            _report(done, len(missing), started)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_encode_chunk, settings, codec_path, folder, index) for index in missing]
        for done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            _report(done, len(missing), started)


def _report(done: int, total: int, started: float) -> None:
    if done % 4 == 0 or done == total:
        elapsed_s = time.monotonic() - started
        left = elapsed_s / done * (total - done) / 60
        log.info("%d of %d clips encoded, %.1f min left", done * CHUNK, total * CHUNK, left)


@torch.no_grad()
def _encode_chunk(settings: PoolSettings, codec_path: str, folder: Path, index: int) -> None:
    torch.set_num_threads(1)
    codec = load_frozen_codec(codec_path)
    rows = []
    for first in range(index * CHUNK, (index + 1) * CHUNK, BATCH):
        numbers = range(first, first + BATCH)
        clips = np.stack([draw_clip(settings, i) for i in numbers])
        video = torch.from_numpy(clips).float() / 127.5 - 1
        frames = [int(np.random.default_rng([settings.seed, i]).integers(settings.num_frames)) for i in numbers]
        image = torch.stack([video[k, :, t : t + 1] for k, t in enumerate(frames)])
        rows.append(torch.cat([codec.encode(video), codec.encode(image)], dim=2).half())
    partial = folder / f".{index:06d}.{os.getpid()}.npy"
    np.save(partial, torch.cat(rows).numpy())
    partial.rename(_chunk_path(folder, index))
