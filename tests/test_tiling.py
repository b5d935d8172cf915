"""Tiles of a codec: geometry and blends equal to diffusers' HunyuanVideo VAE, and exact where blends cannot matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.codec import Codec
from vidgen.vidgen_core.errors import Cancelled, SettingsError
from vidgen.vidgen_core.families.hunyuan.codec import HunyuanCodec
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.tiling import Tiling, tiled
from vidgen.vidgen_core.types import Grid

CONFIG = CodecConfig(latent_channels=4, block_channels=(4, 4, 8, 8), layers_per_block=1, num_groups=2)
SMALL = Tiling(tile_px=32, stride_px=24, tile_frames=16, stride_frames=12)


class Blocks:
    """A codec without context: a latent is the mean of its block of pixels and frames, a block is its latent."""

    def __init__(self, *, causal: bool = True) -> None:
        self.grid = Grid(channels=3, spatial=8, temporal=4, causal=causal)

    def _frames(self, video: Tensor) -> Tensor:
        return torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], dim=2) if self.grid.causal else video

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.nn.functional.avg_pool3d(self._frames(video), (4, 8, 8))
        return mean, torch.full_like(mean, -4.0)

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.moments(video)[0]

    def decode(self, latents: Tensor) -> Tensor:
        video = latents.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        return video[:, :, 3:] if self.grid.causal else video


def hunyuan() -> tuple[HunyuanCodec, torch.nn.Module]:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=CONFIG.block_channels,
        layers_per_block=1,
        norm_num_groups=2,
    ).double()
    theirs.enable_tiling(32, 32, 16, 24, 24, 12)
    vae = CausalVAE(CONFIG).double()
    vae.load_state_dict(theirs.state_dict())
    return HunyuanCodec(vae), theirs


# Time in one tile and height cut only because width is / a last tile shorter than the overlap / a last tile that only
# repeats the end of the one before / time only.
@pytest.mark.parametrize(("frames", "height", "width"), [(5, 32, 40), (17, 48, 56), (25, 24, 80), (29, 32, 32)])
def test_equals_diffusers(frames: int, height: int, width: int) -> None:
    codec, theirs = hunyuan()
    ours = tiled(codec, SMALL)
    video = torch.rand(1, 3, frames, height, width, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(video).latent_dist
        mean, logvar = ours.moments(video)
        scale = CONFIG.scaling_factor
        # float64: the same sums in another order, amplified a little by the norms of random weights
        torch.testing.assert_close(mean, posterior.mean * scale, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(logvar.exp(), posterior.var * scale**2, rtol=1e-9, atol=1e-11)
        video = theirs.decode(mean / scale).sample
        torch.testing.assert_close(ours.decode(mean), video, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("frames", [4, 16, 20, 28, 36, 40])
def test_a_codec_without_context_does_not_notice(frames: int, causal: bool) -> None:
    codec = Blocks(causal=causal)
    assert isinstance(codec, Codec)
    ours = tiled(codec, SMALL)
    for height, width in ((8, 120), (56, 64), (24, 32)):
        video = torch.rand(2, 3, frames + int(causal), height, width, dtype=torch.float64)
        latents = codec.encode(video)
        torch.testing.assert_close(ours.encode(video), latents, rtol=0, atol=1e-15)
        torch.testing.assert_close(ours.decode(latents), codec.decode(latents), rtol=0, atol=1e-15)


def test_one_tile_is_one_pass() -> None:
    codec, _ = hunyuan()
    video = torch.rand(1, 3, 9, 32, 24, dtype=torch.float64)
    with torch.no_grad():
        latents = codec.encode(video)
        assert torch.equal(tiled(codec, SMALL).encode(video), latents)
        assert torch.equal(tiled(codec).decode(latents), codec.decode(latents))


def test_noise_is_drawn_once_for_the_whole_video() -> None:
    codec = Blocks()
    video = torch.zeros(1, 3, 33, 96, 96)
    latents = tiled(codec, SMALL).encode(video, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(latents, noise * torch.exp(torch.tensor(-2.0)))


def test_progress_counts_every_tile_and_may_stop() -> None:
    seen: list[tuple[int, int]] = []
    latents = torch.zeros(1, 3, 9, 7, 4)
    tiled(Blocks(), SMALL, on_tile=lambda done, total: seen.append((done, total))).decode(latents)
    assert seen == [(i + 1, 18) for i in range(18)]

    def stop(done: int, total: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        tiled(Blocks(), SMALL, on_tile=stop).decode(latents)


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling(tile_px=100, stride_px=72),
        Tiling(tile_px=128, stride_px=192),
        Tiling(stride_px=0),
        Tiling(tile_frames=17, stride_frames=12),
    ],
)
def test_tiles_must_be_whole_latents(tiling: Tiling) -> None:
    with pytest.raises(SettingsError, match="multiples of"):
        tiled(Blocks(), tiling)


def test_bad_sizes_are_named_before_any_work() -> None:
    with pytest.raises(SettingsError, match="18 frames"):
        tiled(Blocks(), SMALL).encode(torch.zeros(1, 3, 18, 64, 64))
    with pytest.raises(SettingsError, match="60 px"):
        tiled(Blocks(), SMALL).encode(torch.zeros(1, 3, 17, 60, 64))
