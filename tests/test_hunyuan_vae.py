"""The causal VAE against diffusers, its contract, causality and errors."""

from __future__ import annotations

import pytest
import torch

from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE

SAME_ARITHMETIC = 1e-12  # float64: the same sums in another order, amplified a little by the norms

TINY = CodecConfig(latent_channels=4, block_channels=(8, 8, 16, 16), layers_per_block=1, num_groups=4)
CONFIGS = {
    "four levels": TINY,
    "two layers, no attention": CodecConfig(
        latent_channels=4, block_channels=(8, 16, 16, 24), layers_per_block=2, num_groups=8, mid_attention=False
    ),
    "three levels": CodecConfig(latent_channels=4, block_channels=(8, 16, 16), layers_per_block=1, num_groups=2),
    "five levels": CodecConfig(latent_channels=4, block_channels=(4, 8, 8, 8, 16), layers_per_block=1, num_groups=4),
}


def reference(config: CodecConfig) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_channels)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
        block_out_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        spatial_compression_ratio=config.spatial_compression,
        temporal_compression_ratio=config.temporal_compression,
        mid_block_add_attention=config.mid_attention,
    )
    vae.use_framewise_encoding = vae.use_framewise_decoding = False  # it would cut 17 frames in two otherwise
    return vae


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[CausalVAE, torch.nn.Module]:
    torch.manual_seed(0)
    theirs = reference(CONFIGS[name]).to(dtype)
    ours = CausalVAE(CONFIGS[name]).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str, num_frames: int) -> None:
    ours, theirs = pair(name)
    video = torch.rand(2, 3, num_frames, 16, 24, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        mean, logvar = ours.encode(video)
        posterior = theirs.encode(video).latent_dist
        assert relative_error(mean, posterior.mean) <= SAME_ARITHMETIC
        assert relative_error(logvar, posterior.logvar) <= SAME_ARITHMETIC
        assert relative_error(ours.decode(mean), theirs.decode(mean).sample) <= SAME_ARITHMETIC


def test_gradients_equal_diffusers() -> None:
    ours, theirs = pair("four levels")
    video = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64) * 2 - 1
    for vae, decode in ((ours, ours.decode), (theirs, lambda z: theirs.decode(z).sample)):
        mean = vae.encode(video)[0] if vae is ours else theirs.encode(video).latent_dist.mean
        (decode(mean) - video).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[key].grad, rtol=1e-8, atol=1e-14), key


def test_rounds_no_worse_than_diffusers() -> None:
    """In fp32 both are a few 1e-6 away from float64 (random weights amplify rounding), neither more than the other."""
    ours, theirs = pair("four levels", torch.float32)
    z = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        fast, plain = ours.decode(z), theirs.decode(z).sample
        exact = ours.double().decode(z.double())
    assert relative_error(fast, exact) <= 2 * relative_error(plain, exact) + 1e-6
