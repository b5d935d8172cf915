"""The causal VAE against diffusers, its contract, causality and errors."""

from __future__ import annotations

import pytest
import torch

from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE

RELATIVE_ERROR = 2e-6  # fp32: the same arithmetic in another order

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


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, RELATIVE_ERROR), (torch.float64, 1e-13)])
def test_equals_diffusers(name: str, num_frames: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    theirs = reference(CONFIGS[name]).to(dtype)
    ours = CausalVAE(CONFIGS[name]).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    video = torch.rand(2, 3, num_frames, 16, 24, dtype=dtype) * 2 - 1
    with torch.no_grad():
        mean, logvar = ours.encode(video)
        posterior = theirs.encode(video).latent_dist
        assert relative_error(mean, posterior.mean) <= tolerance
        assert relative_error(logvar, posterior.logvar) <= tolerance
        # Unit noise, not the mean: random weights make a nearly constant one, whose norms amplify rounding.
        z = torch.randn_like(mean)
        assert relative_error(ours.decode(z), theirs.decode(z).sample) <= tolerance
