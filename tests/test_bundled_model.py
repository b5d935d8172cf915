"""The checkpoint in the box: it fits the oracle, repeats itself, and does what it is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgen.benchmarks.follow import Task, run_task, scene_and_caption
from vidgen.training.data import detect, shapes
from vidgen.vidgen_core.bundle import Bundle, load_bundle
from vidgen.vidgen_core.generate import Sampling, generate
from vidgen.vidgen_core.memory.host import bundled_models
from vidgen.vidgen_core.tiling import Tiling, tiled

PARITY = 2e-6
"""float32 rounding of two orders of the same sums"""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("vidgen-tiny-hunyuan", dtype=torch.float32)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def true_video(index: int) -> Tensor:
    """(1, 3, 17, 64, 64) in [-1, 1], a scene that training has not seen."""
    clip = shapes.render(scene_and_caption("seen", 77, index)[0])
    return torch.from_numpy(clip).float()[None] / 127.5 - 1


def test_the_box_is_small() -> None:
    files = list(bundled_models()["vidgen-tiny-hunyuan"].glob("*.safetensors"))
    assert {file.stem for file in files} == {"network", "vae", "text"}
    assert sum(file.stat().st_size for file in files) < 40e6
    assert (Path(files[0]).parent / "MODEL_CARD.md").is_file()


def test_vae_equals_diffusers(bundle: Bundle, vae_twin) -> None:
    twin = vae_twin(bundle.codec.vae)
    video = true_video(0)
    with torch.no_grad():
        mean, _ = bundle.codec.vae.encode(video)
        assert relative(mean, twin.encode(video).latent_dist.mean) <= PARITY
        assert relative(bundle.codec.vae.decode(mean), twin.decode(mean).sample) <= PARITY


def test_tiled_vae_equals_diffusers(bundle: Bundle, vae_twin) -> None:
    """The published tiling, at a third of its size and length, in float32 and with weights that were trained."""
    tiling = Tiling(tile_px=64, stride_px=48, tile_frames=16, stride_frames=12)
    twin = vae_twin(bundle.codec.vae)
    twin.use_framewise_encoding = twin.use_framewise_decoding = True
    twin.enable_tiling(64, 64, 16, 48, 48, 12)
    scene = scene_and_caption("seen", 77, 1)[0]
    clip = shapes.render(scene, num_frames=25, height_px=64, width_px=96, interval=0.6)
    video = torch.from_numpy(clip).float()[None] / 127.5 - 1
    codec = tiled(bundle.codec, tiling)
    scale = bundle.codec.config.scaling_factor
    with torch.no_grad():
        mean = twin.encode(video).latent_dist.mean
        assert relative(codec.encode(video), mean * scale) <= PARITY
        assert relative(codec.decode(mean * scale), twin.decode(mean).sample) <= PARITY


def test_network_equals_diffusers(bundle: Bundle, network_twin) -> None:
    network = bundle.model.network
    twin = network_twin(network)
    features = bundle.text.encode(["a red star spins on a blue background", "two small green hearts"])
    x = torch.randn(2, network.config.in_channels, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([900.0, 250.0])
    mask = features.context_mask
    with torch.no_grad():
        ours = network(x, t, features.context, mask, features.pooled, None)
        theirs = twin(x, t, features.context, mask, features.pooled, None, return_dict=False)[0]
    assert relative(ours, theirs) <= PARITY


def test_vae_reconstructs_unseen_clips(bundle: Bundle) -> None:
    """The mean; single clips spread from 28 to 40 dB."""
    scores = []
    with torch.inference_mode():
        for index in range(8):
            video = true_video(index)
            out = bundle.codec.decode(bundle.codec.encode(video)).clamp(-1, 1)
            scores.append(float(10 * torch.log10(4 / (out - video).square().mean())))
    assert np.mean(scores) >= 32


def test_the_same_seed_gives_the_same_frames_and_a_batch_its_singles(bundle: Bundle) -> None:
    settings = Sampling(seed=5, num_steps=6)
    prompts = ["a red star spins", "a blue circle moves left", "two green hearts", "a large yellow cross shrinks"]
    batch = generate(bundle, prompts, settings=settings)
    again = generate(bundle, prompts, settings=settings)
    assert torch.equal(batch, again)
    for index, prompt in enumerate(prompts):
        single = generate(bundle, prompt, settings=Sampling(seed=5 + index, num_steps=6))
        assert float((single[0] - batch[index]).abs().max()) <= 1e-5


def test_prompts_are_followed(bundle: Bundle) -> None:
    """A smoke test of 24 unseen scenes; ``benchmarks/follow.py`` has the figures with their intervals."""
    rows = run_task(Task(model=None, split="seen", seed=424242, indices=tuple(range(24))))
    share = {name: sum(row["seen"][name] == row["wanted"][name] for row in rows) / len(rows) for name in detect.JUDGED}
    # well above chance (1/8, 1/6, 1/13, 1/5), below what was measured, so that another processor's rounding passes
    assert share["colour"] >= 0.9, share
    assert share["shape"] >= 0.8, share
    assert share["motion"] >= 0.85, share
    assert share["camera"] >= 0.85, share
    assert share["count"] >= 0.8, share
