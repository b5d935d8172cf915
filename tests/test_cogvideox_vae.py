"""CogVideoX's VAE: the groups and their caches against diffusers, tiles, memory, files and errors.

``quiet`` weights do not amplify rounding: what a residual block adds is at a tenth of its usual size, so that 2e-6 in
float32 is a statement about the code. The weights as they are made are compared in float64.
"""

from __future__ import annotations

import gc
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core import generate
from vidgen.vidgen_core.bounded import Bound
from vidgen.vidgen_core.codec import Codec, StreamingCodec
from vidgen.vidgen_core.errors import CheckpointError, SettingsError
from vidgen.vidgen_core.families import FAMILIES, identify
from vidgen.vidgen_core.families.cogvideox import vae as vae_module
from vidgen.vidgen_core.families.cogvideox.codec import CogVideoXCodec
from vidgen.vidgen_core.families.cogvideox.codec_keys import VAE_LAYOUTS
from vidgen.vidgen_core.families.cogvideox.config import VAE_2B, VAE_5B, CodecConfig
from vidgen.vidgen_core.families.cogvideox.vae import CogVideoXVAE, groups
from vidgen.vidgen_core.memory.live import cost_of
from vidgen.vidgen_core.model import load_codec
from vidgen.vidgen_core.tiling import Tiling, tiled
from vidgen.vidgen_core.types import VideoShape
from vidgen.vidgen_core.weights.header import Header, TensorInfo
from vidgen.vidgen_core.weights.load import check_names

CONTRACTS = Path(__file__).parent / "contracts"
SAME_ARITHMETIC = 1e-12  # float64: the same sums in another order
PARITY = 2e-6  # float32, quiet weights

TINY = CodecConfig(latent_channels=4, block_channels=(8, 8, 16, 16), layers_per_block=1, num_groups=4)
CONFIGS = {
    "four levels": TINY,
    "wide": CodecConfig(latent_channels=6, block_channels=(8, 16, 16, 24), layers_per_block=2, num_groups=8),
    "three levels": CodecConfig(latent_channels=4, block_channels=(8, 16, 16), layers_per_block=1, num_groups=2),
    "time by eight": CodecConfig(
        latent_channels=4, block_channels=(4, 8, 8, 8), layers_per_block=1, num_groups=4, temporal_compression=8
    ),
}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family's parts as the loaders find them."""
    if "cogvideox" not in FAMILIES:
        monkeypatch.setattr(FAMILIES, "_names", (*FAMILIES, "cogvideox"))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm().detach() / theirs.norm().detach())


def quiet(vae: CogVideoXVAE) -> CogVideoXVAE:
    for module in vae.modules():
        if isinstance(module, vae_module.ResnetBlock):
            module.conv2.conv.weight.data *= 0.1
    return vae


def twin_of(vae: CogVideoXVAE, **options: Any) -> Any:
    """diffusers' VAE with the weights of one of ours."""
    from diffusers import AutoencoderKLCogVideoX

    config = vae.config
    levels = len(config.block_channels)
    twin = AutoencoderKLCogVideoX(
        block_out_channels=config.block_channels,
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        temporal_compression_ratio=config.temporal_compression,
        **options,
    )
    twin.num_sample_frames_batch_size = 2 * config.temporal_compression
    twin.to(next(vae.parameters()).dtype).load_state_dict(vae.state_dict())
    return twin.eval()


def made(name: str, dtype: torch.dtype = torch.float64) -> CogVideoXVAE:
    torch.manual_seed(0)
    return CogVideoXVAE(CONFIGS[name]).to(dtype)


def video_of(vae: CogVideoXVAE, latents: int, height: int = 16, width: int = 24) -> Tensor:
    frames = vae.grid.num_frames(latents)
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1
    return video.to(next(vae.parameters()).dtype)


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_groups_equal_diffusers(name: str, latents: int) -> None:
    """Its conv caches, its first group of three latents, its groups of two."""
    ours = made(name)
    theirs, video = twin_of(ours), video_of(ours, latents)
    with torch.no_grad():
        mean, logvar = ours.encode(video)
        posterior = theirs.encode(video).latent_dist
        assert mean.shape[2] == latents
        assert relative_error(mean, posterior.mean) <= SAME_ARITHMETIC
        assert relative_error(logvar, posterior.logvar) <= SAME_ARITHMETIC
        assert relative_error(ours.decode(mean), theirs.decode(mean).sample) <= SAME_ARITHMETIC


@pytest.mark.parametrize("name", ["four levels", "wide"])
def test_float32_is_within_two_millionths(name: str) -> None:
    ours = quiet(made(name, torch.float32))
    theirs, video = twin_of(ours), video_of(ours, 7, 32, 48)
    with torch.no_grad():
        mean = ours.encode(video)[0]
        assert relative_error(mean, theirs.encode(video).latent_dist.mean) <= PARITY
        assert relative_error(ours.decode(mean), theirs.decode(mean).sample) <= PARITY


def test_a_batch_equals_diffusers() -> None:
    ours = made("four levels")
    z = torch.randn(3, 4, 3, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(ours.decode(z), twin_of(ours).decode(z).sample) <= SAME_ARITHMETIC


def test_gradients_equal_diffusers() -> None:
    ours = made("four levels")
    theirs, video = twin_of(ours), video_of(ours, 5)
    ours_mean, theirs_mean = ours.encode(video)[0], theirs.encode(video).latent_dist.mean
    (ours.decode(ours_mean) - video).square().mean().backward()
    (theirs.decode(theirs_mean).sample - video).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, expected[key].grad, rtol=1e-8, atol=1e-14), key


def test_one_pass_would_be_something_else() -> None:
    """The norms take the statistics of a group: cutting is part of the numbers, not a way to save memory."""
    vae = made("four levels")
    z = torch.randn(1, 4, 5, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        grouped, whole = vae.decode(z), vae.decoder(z, {})
    assert relative_error(whole, grouped) > 1e-2


TILES = Tiling(tile_px=48, stride_px=40, tile_width_px=80, stride_width_px=64)
"""1/5 as large as the official 240 x 360 every 200 x 288, with the same shares: an overlap of 1/6 and of 1/5"""


@pytest.mark.parametrize(("rows", "columns"), [(12, 15), (5, 20)])
def test_tiles_equal_diffusers(rows: int, columns: int) -> None:
    ours = quiet(made("four levels", torch.float32))
    theirs = twin_of(ours, sample_height=96, sample_width=160)
    theirs.enable_tiling()
    codec = tiled(CogVideoXCodec(ours, replace(TINY, scaling_factor=1.0)), TILES)
    z = torch.randn(1, 4, 3, rows, columns)
    video = video_of(ours, 3, 8 * rows, 8 * columns)
    with torch.no_grad():
        assert relative_error(codec.decode(z), theirs.decode(z).sample) <= PARITY
        assert relative_error(codec.encode(video), theirs.encode(video).latent_dist.mean) <= PARITY
        assert codec.decode(z).shape == (1, 3, 9, 8 * rows, 8 * columns)


def test_official_tiles_fit_the_published_size() -> None:
    Tiling(tile_px=240, stride_px=200, tile_width_px=360, stride_width_px=288).check(CogVideoXVAE(TINY).grid)
    with pytest.raises(SettingsError, match="width of the codec's tiles"):
        Tiling(tile_px=240, stride_px=200, tile_width_px=90, stride_width_px=288).check(CogVideoXVAE(TINY).grid)


def test_frames_are_never_cut_into_tiles() -> None:
    """A tile in time would begin with empty caches in the middle of the video."""
    codec = CogVideoXCodec(made("four levels"))
    z = torch.randn(1, 4, 9, 2, 2, dtype=torch.float64)
    small = Tiling(tile_px=16, stride_px=16, tile_frames=8, stride_frames=8)
    with torch.no_grad():
        assert torch.equal(tiled(codec, small).decode(z), codec.decode(z))


# --- groups, caches, frames as they come ------------------------------------------------------------------------------


def test_groups_are_the_official_ones() -> None:
    assert [(g.start, g.stop) for g in groups(13, 2)] == [(0, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 13)]
    assert [(g.start, g.stop) for g in groups(49, 8)][:3] == [(0, 9), (9, 17), (17, 25)]
    assert groups(1, 2) == groups(1, 8) == [slice(0, 1)]
    for length in range(1, 60):
        assert [frame for g in groups(length, 8) for frame in range(length)[g]] == list(range(length))


def test_a_video_leaves_nothing_behind() -> None:
    vae = made("four levels")
    first, second = (torch.randn(1, 4, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        alone = vae.decode(second)
        vae.decode(first)
        assert torch.equal(vae.decode(second), alone)
        half = vae.decode_groups(first)  # given up in the middle
        next(half)
        half.close()
        assert torch.equal(vae.decode(second), alone)


def test_two_videos_at_a_time_do_not_meet() -> None:
    vae = made("four levels")
    z = [torch.randn(1, 4, 5, 2, 2, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        pairs = zip(vae.decode_groups(z[0]), vae.decode_groups(z[1]), strict=True)
        parts = [torch.cat(of, dim=2) for of in zip(*pairs, strict=True)]
        assert all(torch.equal(part, vae.decode(one)) for part, one in zip(parts, z, strict=True))


def test_a_group_does_not_see_a_later_one() -> None:
    vae = made("four levels")
    z = torch.randn(1, 4, 7, 2, 2, dtype=torch.float64)
    changed = z.clone()
    changed[:, :, 5:] += 1
    with torch.no_grad():
        same = (vae.decode(changed) == vae.decode(z)).all(dim=(0, 1, 3, 4)).tolist()
        assert same == [True] * 17 + [False] * 8
        video = video_of(vae, 5)
        assert torch.equal(vae.encode(video)[0][:, :, :3], vae.encode(video[:, :, :9])[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("part_bytes", [1, 10_000])
def test_few_frames_at_a_time_change_nothing(name: str, part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = made(name)
    video = video_of(vae, 3)
    with torch.no_grad():
        mean = vae.encode(video)[0]
        decoded = vae.decode(mean)
        monkeypatch.setattr(vae_module, "PART_BYTES", part_bytes)
        assert relative_error(vae.encode(video)[0], mean) <= SAME_ARITHMETIC
        assert relative_error(vae.decode(mean), decoded) <= SAME_ARITHMETIC


def test_layouts_and_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16: with random weights percents from float64, and as far in parts as in whole groups."""
    vae = quiet(made("four levels"))
    z = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        exact = vae.decode(z.double())
        whole = vae.bfloat16().decode(z.bfloat16())
        monkeypatch.setattr(vae_module, "PART_BYTES", 1)
        parts = vae.decode(z.bfloat16())
    assert whole.dtype == torch.bfloat16
    assert relative_error(whole.double(), exact) < 0.05
    assert relative_error(parts.double(), exact) <= 1.5 * relative_error(whole.double(), exact)


def test_frames_come_as_they_are_finished() -> None:
    codec = CogVideoXCodec(made("four levels"))
    latents = torch.randn(1, 4, 7, 2, 2, dtype=torch.float64)
    told: list[tuple[int, int]] = []
    lengths, parts = [], []
    for part in codec.frames(latents, on_part=lambda done, total: told.append((done, total))):
        assert len(told) == len(parts) + 1  # no group is decoded before it is asked for
        lengths.append(part.shape[1])
        parts.append(part)
    assert lengths == [9, 8, 8]
    assert told == [(1, 3), (2, 3), (3, 3)]
    with torch.no_grad():
        assert torch.equal(torch.cat(parts, dim=1)[None], codec.decode(latents))


def test_the_main_path_streams_frames() -> None:
    """``decode_frames`` asks the codec itself, whatever the bound, and gives what decoding the whole gives."""
    codec = CogVideoXCodec(made("four levels", torch.float32))
    latents = torch.randn(2, 4, 5, 2, 2)
    frames = list(generate.decode_frames(codec, latents, bound=Bound(budget_bytes=1), hidden_frames=2))
    whole = generate.decode_latents(codec, latents, tiling=None)
    assert torch.equal(torch.stack(frames, dim=1), torch.cat([one[:, 2:] for one in whole], dim=1))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_of(run: Callable[[Tensor], Any], like: Tensor, vae: CogVideoXVAE) -> int:
    return cost_of(run, like, modules=[vae]).peak - like.nbytes


@pytest.fixture
def on_meta() -> Iterator[CogVideoXVAE]:
    """A quarter of the published width; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        yield CogVideoXVAE(CodecConfig(block_channels=(32, 64, 64, 128), num_groups=8)).eval()
    gc.collect()


def test_memory_does_not_depend_on_the_length(on_meta: CogVideoXVAE) -> None:
    """49 and 97 frames of 240 x 360 within 10 %, the finished video counted; without it they are the same to 1 %.

    The largest tensor is what the last change of size gives: 64 channels of 9 frames. Beside it stand two outputs of
    half as many channels, parts of the next one, and two frames for each convolution.
    """
    codec = CogVideoXCodec(on_meta)
    peaks, streamed = {}, {}
    for frames in (49, 97):
        z = torch.empty(1, *VideoShape(num_frames=frames, height_px=240, width_px=360).latent_shape(codec.grid))
        peaks[frames] = peak_of(codec.decode, z, on_meta)
        streamed[frames] = peak_of(lambda z: [None for _ in codec.frames(z)], z, on_meta)
    assert peaks[49] < peaks[97] < 1.1 * peaks[49]
    assert streamed[97] < 1.01 * streamed[49]
    assert streamed[49] < peaks[49]
    assert streamed[49] < 4.6 * (64 * 9 * 240 * 360 * 4)


def test_encoding_takes_the_same_whatever_the_length(on_meta: CogVideoXVAE) -> None:
    peaks = [peak_of(on_meta.encode, torch.empty(1, 3, frames, 240, 360), on_meta) for frames in (17, 49)]
    assert peaks[1] < 1.05 * peaks[0]


# --- the codec --------------------------------------------------------------------------------------------------------


def test_codec_scales_inside() -> None:
    vae = made("four levels")
    codec = CogVideoXCodec(vae)
    assert isinstance(codec, Codec)
    assert isinstance(codec, StreamingCodec)
    video = video_of(vae, 3)
    with torch.no_grad():
        mean, logvar = vae.encode(video)
        latents = codec.encode(video)
        assert torch.equal(latents, mean * 0.7)
        torch.testing.assert_close(codec.decode(latents), vae.decode(mean), rtol=1e-9, atol=1e-10)
        sample = codec.encode(video, generator=torch.Generator().manual_seed(7))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7)).double()
        torch.testing.assert_close(sample, 0.7 * (mean + torch.exp(0.5 * logvar) * noise))
        other = CogVideoXCodec(vae, replace(TINY, scaling_factor=VAE_2B.scaling_factor))
        assert torch.equal(other.encode(video), mean * 1.15258426)


def test_codec_casts_to_its_weights() -> None:
    codec = CogVideoXCodec(made("four levels")).bfloat16()
    with torch.no_grad():
        assert codec.decode(torch.zeros(1, 4, 3, 2, 2)).dtype == torch.bfloat16
        assert codec.encode(torch.zeros(1, 3, 9, 16, 16, dtype=torch.float64)).dtype == torch.bfloat16


def test_lengths_that_the_grid_knows() -> None:
    grid = CogVideoXVAE(TINY).grid
    assert (grid.step, grid.num_latent_frames(49), grid.num_frames(13)) == (8, 13, 49)
    nearest = [VideoShape(num_frames=n, height_px=16, width_px=16).nearest(grid).num_frames for n in (1, 4, 12, 14, 50)]
    assert nearest == [1, 1, 9, 17, 49]


# --- files ------------------------------------------------------------------------------------------------------------


def contract(name: str) -> Header:
    with gzip.open(CONTRACTS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        table = json.load(file)["tensors"]
    tensors = {key: TensorInfo(tuple(t["shape"]), getattr(torch, t["dtype"])) for key, t in table.items()}
    return Header(path=Path(name), tensors=tensors, metadata={}, num_bytes=1, digest="")


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("name", ["cogvideox_vae__diffusers", "cogvideox_vae__sat_3d_vae_pt"])
def test_every_published_vae_is_known_and_complete(name: str, prefix: str) -> None:
    """0 missing, 0 unknown, 215,583,907 parameters; losses of the training in the same file are left out."""
    plain = contract(name)
    tensors = {prefix + key: info for key, info in plain.tensors.items()}
    extra = {f"{prefix}loss.discriminator.main.0.weight": TensorInfo((4, 4), torch.float32)}
    header = replace(plain, tensors=tensors | (extra if "sat" in name or prefix else {}))
    found = identify(header)
    assert (found.family.name, found.part, found.config) == ("cogvideox", "codec", VAE_5B)
    assert not found.is_told
    assert found.layout == ("sat" if "sat" in name else "prefixed" if prefix else "native")
    with torch.device("meta"):
        module = found.family.parts["codec"].build(found.config, {})
    native = header.meta_tensors()
    if found.layout != "native":
        native = VAE_LAYOUTS[found.layout].to_native(native)
    check_names(module.state_dict(), native, where=name)
    assert sum(parameter.numel() for parameter in module.parameters()) == 215_583_907 == plain.num_parameters


def test_the_original_names_there_and_back() -> None:
    state = CogVideoXVAE(CONFIGS["wide"]).state_dict()
    foreign = VAE_LAYOUTS["sat"].to_foreign(state)
    assert "decoder.up.3.block.0.norm1.conv_y.conv.weight" in foreign
    assert "encoder.down.1.block.0.nin_shortcut.weight" in foreign
    back = VAE_LAYOUTS["sat"].to_native(foreign)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


# Shapes tell no number of groups: 32 of them, as published.
FILE = CodecConfig(latent_channels=4, block_channels=(32, 32, 32, 64), layers_per_block=1)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return CogVideoXVAE(FILE).state_dict()


@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch_bare", "gguf"])
@pytest.mark.parametrize("layout", ["native", "sat"])
def test_files_load(
    kind: str, layout: str, weights: dict[str, Tensor], published: Callable[..., Path], tmp_path: Path
) -> None:
    named = weights if layout == "native" else VAE_LAYOUTS["sat"].to_foreign(weights)
    codec: Any = load_codec(published(kind, tmp_path, named, packing="F32"))
    assert codec.config == FILE
    state = codec.vae.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


CONFIG_JSON = {
    "_class_name": "AutoencoderKLCogVideoX",
    "block_out_channels": [32, 32, 32, 64],
    "scaling_factor": 1.15258426,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
}


def vae_folder(weights: dict[str, Tensor], published: Callable[..., Path], folder: Path, config: str) -> Path:
    published("folder", folder, weights)
    (folder / "config.json").write_text(config)
    return folder


def test_a_folder_of_diffusers_tells_the_scale(
    weights: dict[str, Tensor], published: Callable[..., Path], tmp_path: Path
) -> None:
    folder = vae_folder(weights, published, tmp_path / "vae", json.dumps(CONFIG_JSON))
    codec: Any = load_codec(folder)
    assert codec.config.scaling_factor == 1.15258426


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps(CONFIG_JSON | {"scaling_factor": "much"}), "damaged"),
        (json.dumps(CONFIG_JSON | {"scaling_factor": 0}), "does not belong"),
        (json.dumps(CONFIG_JSON | {"_class_name": "AutoencoderKL"}), "does not belong"),
        (json.dumps(CONFIG_JSON | {"block_out_channels": [8, 8, 8, 8]}), "does not belong"),
    ],
)
def test_a_config_that_is_not_the_vaes(
    text: str, message: str, weights: dict[str, Tensor], published: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_codec(vae_folder(weights, published, tmp_path / "vae", text))


def test_a_missing_and_an_unknown_weight_are_named(
    weights: dict[str, Tensor], published: Callable[..., Path], tmp_path: Path
) -> None:
    short = {name: tensor for name, tensor in weights.items() if name != "decoder.conv_out.conv.bias"}
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.conv\.bias"):
        load_codec(published("safetensors", tmp_path / "short", short))
    with pytest.raises(CheckpointError, match=r"decoder\.attention\.weight"):
        load_codec(published("safetensors", tmp_path / "long", weights | {"decoder.attention.weight": torch.ones(1)}))


@pytest.mark.parametrize("latents", [2, 4, 14])
def test_even_latents_are_refused(latents: int) -> None:
    codec = CogVideoXCodec(CogVideoXVAE(TINY))
    z = torch.zeros(1, 4, latents, 2, 2)
    for run in (codec.decode, lambda z: next(codec.frames(z)), tiled(codec).decode):
        with pytest.raises(SettingsError, match=f"{latents} latent frames.*odd.*{latents - 1} or {latents + 1}"):
            run(z)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 16, 16), r"5 frames.*8 n \+ 1.*use 9 frames"),
        ((1, 3, 13, 16, 16), r"13 frames.*8 n \+ 1"),
        ((1, 3, 8, 16, 16), r"8 frames.*use 9 frames"),
        ((1, 3, 9, 12, 16), "12 px"),
        ((1, 3, 9, 16, 20), "20 px"),
        ((1, 1, 9, 16, 16), r"\(batch, 3, frames, height, width\)"),
        ((3, 9, 16, 16), r"\(batch, 3, frames, height, width\)"),
        ((1, 3, 0, 16, 16), "none of them 0"),
    ],
)
def test_bad_videos_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CogVideoXVAE(TINY).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 16, 3, 2, 2), (4, 3, 2, 2), (1, 4, 0, 2, 2), (1, 4, 3, 0, 2)])
def test_bad_latents_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match=r"\(batch, 4, frames, height, width\)"):
        CogVideoXVAE(TINY).decode(torch.zeros(shape))


def test_frames_come_from_one_video() -> None:
    with pytest.raises(SettingsError, match="a batch of 2"):
        next(CogVideoXCodec(CogVideoXVAE(TINY)).frames(torch.zeros(2, 4, 3, 2, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal_compression": 3}, "power of two"),
        ({"temporal_compression": 16}, "one more level"),
        ({"temporal_compression": 0}, "power of two"),
        ({"num_groups": 3}, "num_groups"),
        ({"block_channels": ()}, "block_channels"),
        ({"scaling_factor": 0.0}, "1.15258426"),
    ],
)
def test_impossible_configs_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        CogVideoXVAE(replace(TINY, **change))


def test_every_module_is_ours_to_train() -> None:
    """No parameter without a gradient: encoder, decoder and both maps of every norm."""
    vae = made("four levels")
    mean, logvar = vae.encode(video_of(vae, 3))
    (vae.decode(mean).square().mean() + logvar.square().mean()).backward()
    idle = [name for name, p in vae.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    # A bias before a group norm of one group would be idle; none is.
    assert idle == []
    assert all(isinstance(module, nn.Module) for module in vae.modules())
