"""The closed-form start of a CogVideoX VAE with the latents of another codec: near to them before any training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vidgen.training import matched, pca
from vidgen.training.data import shapes
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families.cogvideox.config import CodecConfig
from vidgen.vidgen_core.families.cogvideox.vae import CogVideoXVAE
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig as HunyuanCodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE

SIZES = {"block_channels": (16, 32, 32, 32), "layers_per_block": 1, "num_groups": 4, "latent_channels": 10}
SIDE = 32


def clips(num: int, salt: int) -> torch.Tensor:
    """(num, 3, 9, 32, 32) in [-1, 1]"""
    rng = np.random.default_rng(salt)
    scenes = [shapes.sample_scene(rng, "all") for _ in range(num)]
    drawn = [shapes.render(scene, num_frames=9, height_px=SIDE, width_px=SIDE) for scene in scenes]
    return torch.stack([torch.from_numpy(each) for each in drawn]).float() / 127.5 - 1


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10(float(((a - b) / 2).square().mean()))


@pytest.fixture(scope="module")
def other() -> CausalVAE:
    """Principal components, as those of the bundled codec."""
    torch.manual_seed(0)
    model = CausalVAE(HunyuanCodecConfig(**SIZES)).requires_grad_(False)
    pca.set_encoder(model, clips(48, salt=1))
    return pca.without_idle_branches(model)


@pytest.fixture(scope="module")
def vae(other: CausalVAE) -> CogVideoXVAE:
    torch.manual_seed(0)
    model = CogVideoXVAE(CodecConfig(**SIZES)).requires_grad_(False)
    video = clips(96, salt=2)
    matched.set_matched_encoder(model, video, other.encode(video)[0])
    return model


def test_latents_are_nearly_those_of_the_other_codec(vae: CogVideoXVAE, other: CausalVAE) -> None:
    """Exactly linear in neither; a codec without its latents would have an error of 1."""
    video = clips(8, salt=3)
    wanted, own = other.encode(video)[0], vae.encode(video)[0]
    errors = (own - wanted).square().mean(dim=(0, 1, 3, 4)).sqrt() / wanted.square().mean(dim=(0, 1, 3, 4)).sqrt()
    assert float(errors[0]) < 0.15
    assert float(errors[1:].max()) < 0.3


def test_differences_are_told_apart(vae: CogVideoXVAE, other: CausalVAE) -> None:
    """A video and itself backwards have the same means of four frames; their latents differ as the other codec's do."""
    video = clips(8, salt=4)
    backwards = video.clone()
    backwards[:, :, 5:] = video[:, :, 5:].flip(2)
    wanted, own = ((codec.encode(video)[0] - codec.encode(backwards)[0])[:, :, 2] for codec in (other, vae))
    assert float(F.cosine_similarity(own.flatten(), wanted.flatten(), dim=0)) > 0.6


def test_still_frames_all_have_the_latents_of_the_first(vae: CogVideoXVAE) -> None:
    still = clips(4, salt=5)[:, :, :1].expand(-1, -1, 9, -1, -1)
    latents = vae.encode(still)[0]
    changes = (latents - latents[:, :, :1]).square().mean().sqrt()
    assert float(changes / latents.square().mean().sqrt()) < 0.05


def test_the_decoder_starts_from_a_picture(vae: CogVideoXVAE, other: CausalVAE, monkeypatch) -> None:
    """From the latents of both codecs; and not with the same picture for all frames of a latent."""
    monkeypatch.setattr(matched, "POSITIONS", 40_000)
    video = clips(24, salt=6)
    matched.set_matched_decoder(vae, other.encode(video)[0], video)
    unseen = clips(6, salt=7)
    for codec in (other, vae):
        out = vae.decode(codec.encode(unseen)[0])
        assert psnr_db(out, unseen) > 22
    moving = unseen[:, :, 1:].unflatten(2, (-1, 4))
    drawn = vae.decode(other.encode(unseen)[0])[:, :, 1:].unflatten(2, (-1, 4))
    deviations = [(part - part.mean(3, keepdim=True)).flatten() for part in (drawn, moving)]
    assert float(F.cosine_similarity(*deviations, dim=0)) > 0.1


@pytest.mark.parametrize("halved", [False, True])
def test_a_fit_finds_the_convolution_that_there_was(halved: bool) -> None:
    """Two frames before, zeros around, and the mean of two frames where time is halved."""
    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 3, 3, 3)
    fit = matched._Fit(4)
    for _ in range(4):
        x = torch.randn(3, 5, 8, 8)
        before = torch.cat([x[:, :1], x[:, :1], x], dim=1)
        wanted = F.conv3d(before[None], kernel, torch.tensor([1.0, -2.0]), padding=(0, 1, 1))
        wanted = matched._halved(wanted) if halved else wanted
        fit.add_convolved(x, wanted[0], kernel=(3, 3, 3), halved=halved)
    weight, bias = fit.solve(ridge=1e-9)
    # Single precision in the sums of squares of some thousand rows.
    torch.testing.assert_close(weight, kernel.flatten(1), rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, torch.tensor([1.0, -2.0]), rtol=0, atol=1e-4)


def test_a_codec_without_room_is_refused() -> None:
    narrow = CogVideoXVAE(CodecConfig(block_channels=(8, 16, 32, 32), layers_per_block=1, num_groups=4))
    with pytest.raises(RecipeError, match="does not fit"):
        matched.set_matched_encoder(narrow, torch.zeros(1, 3, 9, 16, 16), torch.zeros(1, 16, 3, 2, 2))
