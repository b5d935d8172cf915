"""The causal VAE against diffusers, its contract, causality and errors."""

from __future__ import annotations

import gzip
import json
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidgen.vidgen_core.codec import Codec
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.hunyuan.codec import HunyuanCodec
from vidgen.vidgen_core.families.hunyuan.config import VAE_884_16C, CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE, level_steps

SAME_ARITHMETIC = 1e-12  # float64: the same sums in another order, amplified a little by the norms

CONTRACTS = Path(__file__).parent / "contracts"
TINY = CodecConfig(latent_channels=4, block_channels=(8, 8, 16, 16), layers_per_block=1, num_groups=4)
CONFIGS = {
    "four levels": TINY,
    "two layers, no attention": CodecConfig(
        latent_channels=4, block_channels=(8, 16, 16, 24), layers_per_block=2, num_groups=8, mid_attention=False
    ),
    "three levels": CodecConfig(latent_channels=4, block_channels=(8, 16, 16), layers_per_block=1, num_groups=2),
    "five levels": CodecConfig(latent_channels=4, block_channels=(4, 8, 8, 8, 16), layers_per_block=1, num_groups=4),
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


Pair = Callable[..., tuple[CausalVAE, nn.Module]]


@pytest.fixture
def pair(vae_twin: Callable[[CausalVAE], nn.Module]) -> Pair:
    """Ours and diffusers' with the same random weights."""

    def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[CausalVAE, nn.Module]:
        torch.manual_seed(0)
        ours = CausalVAE(CONFIGS[name]).to(dtype)
        return ours, vae_twin(ours)

    return build


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(pair: Pair, name: str, num_frames: int) -> None:
    ours, theirs = pair(name)
    video = torch.rand(2, 3, num_frames, 16, 24, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        mean, logvar = ours.encode(video)
        posterior = theirs.encode(video).latent_dist
        assert relative_error(mean, posterior.mean) <= SAME_ARITHMETIC
        assert relative_error(logvar, posterior.logvar) <= SAME_ARITHMETIC
        assert relative_error(ours.decode(mean), theirs.decode(mean).sample) <= SAME_ARITHMETIC


def test_gradients_equal_diffusers(pair: Pair) -> None:
    ours, theirs = pair("four levels")
    video = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64) * 2 - 1
    for vae, decode in ((ours, ours.decode), (theirs, lambda z: theirs.decode(z).sample)):
        mean = vae.encode(video)[0] if vae is ours else theirs.encode(video).latent_dist.mean
        (decode(mean) - video).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[key].grad, rtol=1e-8, atol=1e-14), key


def test_rounds_no_worse_than_diffusers(pair: Pair) -> None:
    """In fp32 both are a few 1e-6 away from float64 (random weights amplify rounding), neither more than the other."""
    ours, theirs = pair("four levels", torch.float32)
    z = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        fast, plain = ours.decode(z), theirs.decode(z).sample
        exact = ours.double().decode(z.double())
    assert relative_error(fast, exact) <= 2 * relative_error(plain, exact) + 1e-6


@pytest.mark.parametrize("contract", ["hunyuan_vae__official_pt", "hunyuan_vae__diffusers"])
def test_published_names_and_shapes(contract: str) -> None:
    with gzip.open(CONTRACTS / f"{contract}.json.gz", "rt") as file:
        published = {key: tuple(entry["shape"]) for key, entry in json.load(file)["tensors"].items()}
    with torch.device("meta"):
        vae = CausalVAE(VAE_884_16C)
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == published
    assert sum(p.numel() for p in vae.parameters()) == 246_478_803


def test_published_size_runs_on_the_meta_device() -> None:
    with torch.device("meta"), torch.no_grad():
        vae = CausalVAE(VAE_884_16C).bfloat16()
        mean, logvar = vae.encode(torch.empty(1, 3, 65, 256, 256, dtype=torch.bfloat16))
        assert mean.shape == logvar.shape == (1, 16, 17, 32, 32)
        assert vae.decode(mean).shape == (1, 3, 65, 256, 256)


def without_norms(vae: CausalVAE) -> CausalVAE:
    """The published group norms average over all frames and so look ahead, by design; nothing else may."""
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae.double()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_layer_sees_a_later_frame(name: str) -> None:
    torch.manual_seed(0)
    vae = without_norms(CausalVAE(CONFIGS[name]))
    video = torch.rand(1, 3, 17, 16, 16, dtype=torch.float64)
    z = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        mean, decoded = vae.encode(video)[0], vae.decode(z)
        for frame in range(17):
            changed = video.clone()
            changed[:, :, frame] += 1
            first = (frame + 3) // 4  # the latent that frame belongs to
            same = (vae.encode(changed)[0] == mean).all(dim=(0, 1, 3, 4))
            assert same.tolist() == [True] * first + [False] * (5 - first)
        for latent in range(5):
            changed = z.clone()
            changed[:, :, latent] += 1
            first = max(0, 4 * latent - 3)
            same = (vae.decode(changed) == decoded).all(dim=(0, 1, 3, 4))
            assert same.tolist() == [True] * first + [False] * (17 - first)


def test_levels_change_space_first_and_time_last() -> None:
    assert level_steps(VAE_884_16C) == [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)]
    assert level_steps(CONFIGS["three levels"]) == [(2, 2, 2), (2, 2, 2), (1, 2, 2)]
    assert level_steps(CONFIGS["five levels"]) == [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("temporal", [1, 2, 8])
def test_other_compressions_round_trip_shapes(temporal: int) -> None:
    vae = CausalVAE(replace(TINY, temporal_compression=temporal, spatial_compression=4))
    with torch.no_grad():
        mean, _ = vae.encode(torch.zeros(1, 3, 17, 8, 12))
        assert mean.shape == (1, 4, vae.grid.num_latent_frames(17), 2, 3)
        assert vae.decode(mean).shape == (1, 3, 17, 8, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_compression": 3}, "power of two"),
        ({"spatial_compression": 32}, "too few levels"),
        ({"temporal_compression": 16}, "too few levels"),
        ({"num_groups": 3}, "num_groups"),
        ({"block_channels": ()}, "block_channels"),
    ],
)
def test_impossible_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CausalVAE(replace(TINY, **change))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 16, 16), "4 frames"),
        ((1, 3, 5, 12, 16), "12 px"),
        ((1, 3, 5, 16, 20), "20 px"),
        ((1, 1, 5, 16, 16), r"\(batch, 3, frames, height, width\)"),
        ((3, 5, 16, 16), r"\(batch, 3, frames, height, width\)"),
        ((1, 3, 0, 16, 16), "none of them 0"),
    ],
)
def test_bad_videos_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CausalVAE(TINY).encode(torch.zeros(shape))


def test_bad_latents_are_named() -> None:
    with pytest.raises(SettingsError, match=r"\(batch, 4, frames, height, width\)"):
        CausalVAE(TINY).decode(torch.zeros(1, 16, 2, 2, 2))


def test_codec_scales_inside() -> None:
    torch.manual_seed(0)
    vae = CausalVAE(TINY).double()
    codec = HunyuanCodec(vae)
    assert isinstance(codec, Codec)
    video = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        latents = codec.encode(video)
        assert torch.equal(latents, mean * 0.476986)
        torch.testing.assert_close(codec.decode(latents), vae.decode(mean), rtol=1e-9, atol=1e-10)
        sample = codec.encode(video, generator=torch.Generator().manual_seed(7))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7)).double()
        torch.testing.assert_close(sample, 0.476986 * (mean + torch.exp(0.5 * logvar) * noise))


def test_codec_casts_to_its_weights() -> None:
    codec = HunyuanCodec(CausalVAE(TINY)).bfloat16()
    with torch.no_grad():
        assert codec.decode(torch.zeros(1, 4, 2, 2, 2)).dtype == torch.bfloat16
        assert codec.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.float64)).dtype == torch.bfloat16


def test_batch_is_independent() -> None:
    torch.manual_seed(0)
    vae = CausalVAE(TINY).double()
    z = torch.randn(3, 4, 2, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            vae.decode(z), torch.cat([vae.decode(one) for one in z.split(1)]), rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("limit", [("PART_BYTES", 1), ("PART_BYTES", 40_000), ("PART_OPERATIONS", 4e6)])
def test_few_frames_at_a_time_change_nothing(
    name: str, limit: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vae = CausalVAE(CONFIGS[name]).double()
    video = torch.rand(2, 3, 9, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        decoded = vae.decode(mean)
        monkeypatch.setattr(f"vidgen.vidgen_core.families.hunyuan.vae.{limit[0]}", limit[1])
        assert relative_error(vae.encode(video)[0], mean) <= SAME_ARITHMETIC
        assert relative_error(vae.encode(video)[1], logvar) <= SAME_ARITHMETIC
        assert relative_error(vae.decode(mean), decoded) <= 10 * SAME_ARITHMETIC


def test_a_stop_is_heard_within_every_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever listens is asked when a convolution is called: none takes all frames in one call where they are many."""
    torch.manual_seed(0)
    vae, calls = CausalVAE(TINY), Counter[str]()
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size == (3, 3, 3) and "conv_in" not in name:
            module.register_forward_pre_hook(lambda module, inputs, name=name: calls.update([name]))
    monkeypatch.setattr("vidgen.vidgen_core.families.hunyuan.vae.PART_OPERATIONS", 1)
    with torch.no_grad():
        mean, _ = vae.encode(torch.rand(1, 3, 9, 16, 16))
        vae.decode(mean)
    assert {
        "encoder.down_blocks.0.downsamplers.0.conv.conv",
        "decoder.up_blocks.0.upsamplers.0.conv.conv",
    } <= calls.keys()
    assert min(calls.values()) > 1


def test_few_frames_at_a_time_round_as_whole_videos_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16: both are several percent from float64 (random weights), and equally far."""
    torch.manual_seed(0)
    vae = CausalVAE(TINY)
    z = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        exact = vae.double().decode(z.double())
        whole = vae.bfloat16().decode(z.bfloat16())
        monkeypatch.setattr("vidgen.vidgen_core.families.hunyuan.vae.PART_BYTES", 1)
        assert relative_error(vae.decode(z.bfloat16()), exact) <= 1.5 * relative_error(whole, exact)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors that are alive at once; on the meta device nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.users.get(key):
            self.now += size
            self.peak = max(self.peak, self.now)
        self.users[key] = self.users.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size


def test_decoder_keeps_few_large_tensors() -> None:
    """One official tile in bf16: the input of the last level's first block (256 channels), its two convolutions'
    outputs (128 each) and some frames in between; nothing of the levels before."""
    largest = 128 * 65 * 256 * 256 * 2
    with torch.device("meta"), torch.no_grad():
        vae = CausalVAE(VAE_884_16C).bfloat16()
        z = torch.empty(1, 16, 17, 32, 32, dtype=torch.bfloat16)
        with LiveBytes() as decoding:
            vae.decode(z)
        with LiveBytes() as encoding:
            vae.encode(torch.empty(1, 3, 65, 256, 256, dtype=torch.bfloat16))
    assert 4 * largest < decoding.peak < 4.6 * largest
    assert 3 * largest < encoding.peak < 3.6 * largest
