"""The closed-form start of the tiny VAE: linear, exact, and good before any training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vidgen.training import pca
from vidgen.training.data import shapes
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE

CONFIG = CodecConfig(block_channels=(16, 32, 64, 64), layers_per_block=1, num_groups=4, latent_channels=24)


def clips(num: int, salt: int) -> torch.Tensor:
    rng = np.random.default_rng(salt)
    drawn = [torch.from_numpy(shapes.render(shapes.sample_scene(rng, "all"))) for _ in range(num)]
    return torch.stack(drawn).float() / 127.5 - 1


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    model = CausalVAE(CONFIG)
    pca.set_encoder(model, clips(48, salt=1))
    return model


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10(float(((a - b) / 2).square().mean()))


@torch.no_grad()
def test_latents_carry_the_picture_linearly(vae: CausalVAE) -> None:
    """Least squares from one latent to its 4 x 8 x 8 patch, fitted on some clips, tested on others."""

    def rows(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = vae.encode(video)[0][:, :, 1:].movedim(1, -1).flatten(0, 3)
        patches = video[:, :, 1:].unflatten(2, (-1, 4)).unflatten(4, (-1, 8)).unflatten(6, (-1, 8))
        return torch.cat([z, torch.ones(len(z), 1)], 1), patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(
            0, 3
        )

    z, patches = rows(clips(24, salt=2))
    solution = torch.linalg.lstsq(z, patches).solution
    z, patches = rows(clips(6, salt=3))
    assert psnr_db(z @ solution, patches) > 28.5  # 30.7 dB with components of 256 clips


@torch.no_grad()
def test_the_encoder_is_linear(vae: CausalVAE) -> None:
    """Up to the share of the components in the norm's energy: (1 / CONSTANT)^2 of it, about 1 %."""
    a, b = clips(2, salt=4).split(1)
    middle = vae.encode(0.5 * (a + b))[0]
    mean = 0.5 * (vae.encode(a)[0] + vae.encode(b)[0])
    assert float((middle - mean).norm() / mean.norm()) < 0.02


@torch.no_grad()
def test_leaving_out_idle_branches_changes_nothing(vae: CausalVAE) -> None:
    video = clips(1, salt=5)
    light = pca.without_idle_branches(vae)
    assert len(list(light.encoder.parameters())) < len(list(vae.encoder.parameters()))
    torch.testing.assert_close(light.encode(video)[0], vae.encode(video)[0], rtol=0, atol=0)
    assert light.decoder.conv_in.conv.weight is vae.decoder.conv_in.conv.weight


@torch.no_grad()
def test_the_decoder_starts_from_a_picture(vae: CausalVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tenth of the usual positions (for speed) the fit still draws unseen clips."""
    monkeypatch.setattr(pca, "MAX_POSITIONS", 20_000)
    video = clips(10, salt=6)
    pca.set_decoder(vae, vae.encode(video)[0], video)
    unseen = clips(4, salt=7)
    assert psnr_db(vae.decode(vae.encode(unseen)[0]), unseen) > 25


def test_a_codec_without_room_is_refused() -> None:
    narrow = CausalVAE(CodecConfig(block_channels=(8, 16, 32, 32), layers_per_block=1, num_groups=4))
    with pytest.raises(RecipeError, match="does not fit"):
        pca.set_encoder(narrow, torch.zeros(1, 3, 5, 16, 16))
