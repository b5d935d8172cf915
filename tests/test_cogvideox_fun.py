"""CogVideoX-Fun-InP: a video with gaps on the channels, and a mask of what is given.

diffusers has its network and its VAE, not its process; the loop that these tests compare with is written out here, from
what the published pipeline does.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.nodes.image import ImageToVideo, KeyframesToVideo, PlaceKeyframe
from vidgen.nodes.sampling import Sampler
from vidgen.nodes.video import Decode, EncodeVideo
from vidgen.nodes.wires import EncodedPrompt
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families import FAMILIES, identify
from vidgen.vidgen_core.families.cogvideox.codec import CogVideoXCodec
from vidgen.vidgen_core.families.cogvideox.config import (
    FUN_1_5_5B,
    FUN_2B,
    FUN_5B,
    FUN_NOISE,
    CodecConfig,
    NetworkConfig,
    TextConfig,
)
from vidgen.vidgen_core.families.cogvideox.keyframes import mask_in_latents
from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer, sincos_table
from vidgen.vidgen_core.families.cogvideox.vae import CogVideoXVAE
from vidgen.vidgen_core.generate import Sampling, sample_latents, with_keyframes
from vidgen.vidgen_core.keyframes import Keyframe, LatentKeyframe, picture, video_keyframes
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.noise import NoiseStream
from vidgen.vidgen_core.text.dims import T5Dims
from vidgen.vidgen_core.text.features import TextFeatures
from vidgen.vidgen_core.types import VideoShape
from vidgen.vidgen_core.weights.header import Header, TensorInfo
from vidgen.vidgen_core.weights.shards import CONFIG_KEY

diffusers = pytest.importorskip("diffusers")

CONTRACTS = Path(__file__).parent / "contracts"
PUBLISHED = {
    "cogvideox_2b": (FUN_2B, (1920, 33, 2, 2), 1_693_914_432),
    "cogvideox_5b": (FUN_5B, (3072, 33, 2, 2), 5_570_491_968),
    "cogvideox_1_5_5b": (FUN_1_5_5B, (3072, 264), 5_571_094_144),
}
"""Fun is these networks with a wider patch embedding: 16 noisy channels, the mask, and 16 of the video with gaps."""

PARITY = 2e-6
"""float32 rounding of the same sums in two orders, over a whole run; a wrong mask or scale is off by 1e-3 or more"""
SCALE = 0.5
STEPS = 5
SHAPE = VideoShape(num_frames=9, height_px=48, width_px=64)
LATENTS = (1, 4, 3, 6, 8)

TINY = NetworkConfig(
    in_channels=9,
    out_channels=4,
    hidden_size=48,
    num_heads=3,
    num_layers=2,
    text_width=24,
    text_length=7,
    time_width=20,
    trained_grid=(3, 3, 4),
    rope_axes=(4, 6, 6),
    mask_scale=SCALE,
)
NETWORKS = {
    "2b": replace(TINY, positions="sincos", sincos_fit="stretch", trained_grid=(3, 5, 6)),
    "5b": replace(TINY, trained_grid=(3, 5, 6)),
    "1.5": replace(TINY, patch=(2, 2, 2), trained_grid=(2, 5, 6), rope_fit="slice"),
}
CODEC = CodecConfig(
    latent_channels=4, block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4, scaling_factor=SCALE
)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def codec() -> CogVideoXCodec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CogVideoXCodec(CogVideoXVAE(CODEC).eval().requires_grad_(False), CODEC)


def build(config: NetworkConfig) -> VideoModel:
    network = CogVideoXTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return VideoModel.of("cogvideox", config, network)


@pytest.fixture(scope="module")
def models() -> dict[str, VideoModel]:
    return {name: build(config) for name, config in NETWORKS.items()}


def features(seed: int) -> TextFeatures:
    return TextFeatures(
        context=normal(seed, 1, 7, 24), context_mask=torch.ones(1, 7, dtype=torch.bool), pooled=torch.zeros(1, 0)
    )


PROMPT, NEGATIVE = features(1), features(2)
START, END = (pixels(seed, 1, 3, 48, 64) for seed in (3, 4))
VIDEO = pixels(5, 1, 3, 9, 48, 64)
MASK = torch.zeros(1, 48, 64)
MASK[:, 10:30, 20:50] = 1
GIVEN = {
    "nothing": [],
    "start": [Keyframe(image=START)],
    "start and end": [Keyframe(image=START), Keyframe(image=END, frame=-1)],
    "a middle frame": [Keyframe(image=START, frame=4)],
    "a video with a hole": video_keyframes(VIDEO, MASK),
}


# --- the files --------------------------------------------------------------------------------------------------------


@lru_cache
def header_of(name: str, projection: tuple[int, ...]) -> Header:
    """The header of a published network with another patch embedding."""
    with gzip.open(CONTRACTS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        table = json.load(file)["tensors"]
    tensors = {key: TensorInfo(tuple(t["shape"]), getattr(torch, t["dtype"])) for key, t in table.items()}
    tensors["patch_embed.proj.weight"] = TensorInfo(projection, torch.bfloat16)
    return Header(path=Path(name), tensors=tensors, metadata={}, num_bytes=1, digest="")


@pytest.mark.parametrize("kind", ["diffusers", "kijai_single_file"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_release_is_known_and_complete(name: str, kind: str) -> None:
    config, projection, num_parameters = PUBLISHED[name]
    header = header_of(f"{name}__{kind}", projection)
    found = identify(header)
    assert (found.family.name, found.layout, found.is_told, found.config) == ("cogvideox", "diffusers", True, config)
    assert found.config.fills_in
    with torch.device("meta"):
        network = CogVideoXTransformer(found.config)
    native = found.family.parts["network"].layouts["diffusers"].to_native(header.meta_tensors())
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in native.items()} == wanted
    assert sum(parameter.numel() for parameter in network.parameters()) == num_parameters


@pytest.mark.parametrize(
    ("name", "told", "expected"),
    [
        ("cogvideox_5b", {"add_noise_in_inpaint_model": True}, replace(FUN_5B, image_noise=FUN_NOISE)),
        ("cogvideox_5b", {"add_noise_in_inpaint_model": False}, FUN_5B),
        ("cogvideox_2b", {"use_rotary_positional_embeddings": False}, FUN_2B),
        (
            "cogvideox_1_5_5b",
            {"sample_frames": 85, "sample_height": 300, "sample_width": 300},
            FUN_1_5_5B,
        ),
    ],
)
def test_a_config_json_says_more(name: str, told: dict[str, Any], expected: NetworkConfig) -> None:
    header = header_of(f"{name}__diffusers", PUBLISHED[name][1])
    found = identify(replace(header, metadata={CONFIG_KEY: json.dumps({"in_channels": 33, **told})}))
    assert found.config == expected


def test_defaults() -> None:
    defaults = FAMILIES["cogvideox"].defaults
    first, later = defaults(FUN_5B), defaults(FUN_1_5_5B)
    assert defaults(FUN_2B) == first
    assert (first.num_frames, first.height_px, first.width_px, first.fps, first.num_steps) == (49, 384, 672, 8, 50)
    assert (first.sampler, first.schedule, first.cfg, first.cfg_schedule) == ("ddim", "trailing", 6.0, "constant")
    assert later == replace(first, num_frames=81)


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 5, 6), (2, 3, 4), (3, 7, 9)])
def test_the_fixed_table_is_stretched_from_the_trained_one(grid: tuple[int, int, int]) -> None:
    trained, cpu = (3, 5, 6), torch.device("cpu")
    table = sincos_table((grid[0], *trained[1:]), 48, 1.875, device=cpu).reshape(grid[0], 5, 6, 48)
    expected = F.interpolate(table.permute(3, 0, 1, 2)[None], size=grid, mode="trilinear", align_corners=False)
    ours = sincos_table(grid, 48, 1.875, device=cpu, trained=trained).reshape(*grid, 48)
    torch.testing.assert_close(ours, expected[0].permute(1, 2, 3, 0), rtol=1e-6, atol=1e-6)
    counted = sincos_table(grid, 48, 1.875, device=cpu).reshape(*grid, 48)
    assert torch.equal(ours, counted) == (grid == trained)


def test_a_stretched_table_has_its_number_of_frames(models: dict[str, VideoModel]) -> None:
    with pytest.raises(SettingsError, match="trained for"):
        models["2b"].network(torch.zeros(1, 9, 4, 6, 8), torch.zeros(1), PROMPT.context)


# --- the process ------------------------------------------------------------------------------------------------------


def twin_vae(vae: CogVideoXVAE) -> Any:
    config = vae.config
    twin = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=config.block_channels,
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        scaling_factor=config.scaling_factor,
    )
    twin.load_state_dict(vae.state_dict())
    return twin.eval().requires_grad_(False)


def theirs(twin: Any, vae: Any, config: NetworkConfig, given: list[Keyframe], spare: int) -> Tensor:
    """The published pipeline, written out: (1, C, T, H, W), the frame that runs along behind included."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    noise = NoiseStream([3]).draw((4, 3 + spare, 6, 8)).transpose(1, 2)
    latents, frames = noise, 9 + 8 * spare
    inpaint = torch.zeros(1, 3 + spare, 5, 6, 8)
    if given:
        video, mask = torch.full((1, 3, frames, 48, 64), -1.0), torch.ones(1, 1, frames, 48, 64)
        for keyframe in given:
            at = keyframe.frame % 9
            gap = torch.zeros(1, 1, 48, 64) if keyframe.mask is None else keyframe.mask
            video[:, :, at] = keyframe.image * (1 - gap) - gap
            mask[:, :, at] = gap
        video[:, :, 9:], mask[:, :, 9:] = video[:, :, 8:9], mask[:, :, 8:9]
        masked = vae.encode(video).latent_dist.mode()[:, :, : 3 + spare] * SCALE
        known = 1 - mask[:, :, : 9 + 4 * spare]
        sizes = ((1, 6, 8), (2 + spare, 6, 8))
        parts = [
            F.interpolate(part, size=size, mode="trilinear", align_corners=False)
            for part, size in zip((known[:, :, :1], known[:, :, 1:]), sizes, strict=True)
        ]
        inpaint = torch.cat([torch.cat(parts, dim=2) * SCALE, masked], dim=1).transpose(1, 2)
    _, rows, columns = config.trained_grid
    rope = None
    if config.positions == "sincos":
        table = twin.patch_embed._get_positional_embeddings(2 * rows, 2 * columns, 9)[:, 7:]
        table = table.reshape(3, rows, columns, -1).permute(3, 0, 1, 2)[None]
        table = F.interpolate(table, size=(3, 3, 4), mode="trilinear", align_corners=False)[0].flatten(1).T[None]
        table = torch.cat([torch.zeros(1, 7, 48), table], dim=1)
        twin.patch_embed._get_positional_embeddings = lambda *_, **__: table
    elif config.patch[0] == 1:
        rope = get_3d_rotary_pos_embed(16, get_resize_crop_region_for_grid((3, 4), columns, rows), (3, 4), 3)
    else:
        rope = get_3d_rotary_pos_embed(16, None, (3, 4), 2, grid_type="slice", max_size=(rows, columns))
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    context = torch.cat([NEGATIVE.context, PROMPT.context])
    for t in scheduler.timesteps:
        x = torch.cat([torch.cat([latents] * 2), torch.cat([inpaint] * 2)], dim=2)
        with torch.no_grad():
            made = twin(x, context, t.expand(2), image_rotary_emb=rope, return_dict=False)[0]
        without, within = made.chunk(2)
        v = without + 6.0 * (within - without)
        latents = scheduler.step(v, t, latents, return_dict=False)[0].float()
    return latents.transpose(1, 2)


def ours(model: VideoModel, codec: CogVideoXCodec, given: list[Keyframe]) -> Tensor:
    rules = model.family.keyframes
    rules.check(model.config, given, 9)
    told = rules.encode(model.config, codec, given, SHAPE)
    positive = with_keyframes(model, model.conditioning(PROMPT), told, LATENTS)
    settings = Sampling(num_steps=STEPS, seed=3)  # the rest as the family recommends
    return sample_latents(model, positive, model.conditioning(NEGATIVE), LATENTS, settings)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_is_the_published_one(
    name: str, given: str, models: dict[str, VideoModel], codec: CogVideoXCodec, cogvideox_twin: Callable[[Any], Any]
) -> None:
    model = models[name]
    spare = model.family.trail_frames(model.config, 3)
    assert (spare, model.family.lead_frames(model.config, 3)) == (int(name == "1.5"), 0)
    twin, vae = cogvideox_twin(model.network), twin_vae(codec.vae)
    expected = theirs(twin, vae, model.config, GIVEN[given], spare)[:, :, :3]
    assert relative(ours(model, codec, GIVEN[given]), expected) <= PARITY


def test_everything_that_is_given_changes_the_video(models: dict[str, VideoModel], codec: CogVideoXCodec) -> None:
    made = [ours(models["5b"], codec, given) for given in GIVEN.values()]
    for number, one in enumerate(made):
        assert all(relative(one, other) > 1e-3 for other in made[:number])


def test_a_picture_for_each_video_of_a_batch(models: dict[str, VideoModel], codec: CogVideoXCodec) -> None:
    model, rules = models["5b"], FAMILIES["cogvideox"].keyframes
    both = [Keyframe(image=torch.cat([START, END])), Keyframe(image=END, frame=-1)]
    told = rules.encode(model.config, codec, both, SHAPE)
    concat = with_keyframes(model, model.conditioning(PROMPT), told, (2, *LATENTS[1:])).concat
    assert concat is not None
    for number, first in enumerate((START, END)):
        alone = rules.encode(model.config, codec, [Keyframe(image=first), both[1]], SHAPE)
        expected = with_keyframes(model, model.conditioning(PROMPT), alone, LATENTS).concat
        assert expected is not None
        torch.testing.assert_close(concat[number : number + 1], expected)


def test_a_video_of_which_everything_is_masked_is_told_nothing(
    models: dict[str, VideoModel], codec: CogVideoXCodec
) -> None:
    hidden = video_keyframes(VIDEO, torch.ones(1, 48, 64))
    assert torch.equal(ours(models["5b"], codec, hidden), ours(models["5b"], codec, []))


def test_the_mask_of_pixels_at_the_latents_places() -> None:
    """The first frame has its own latent; another one shows the mean of the middle two of its four frames."""
    mask = torch.zeros(1, 1, 9, 16, 16)
    mask[:, :, 0], mask[:, :, 3], mask[:, :, 8] = 1, 1, 1
    assert mask_in_latents(mask, (1, 4, 3, 2, 2)).mean(dim=(0, 1, 3, 4)).tolist() == [1.0, 0.5, 0.0]
    assert mask_in_latents(mask[:, :, :1], (1, 4, 1, 2, 2)).shape == (1, 1, 1, 2, 2)


def test_noise_on_what_is_given(codec: CogVideoXCodec) -> None:
    """As the releases from 1.1 on were trained: the same every time, none in the gaps."""
    seen: list[Tensor] = []

    class Listening:
        grid = codec.grid

        def encode(self, video: Tensor) -> Tensor:
            seen.append(video)
            return codec.encode(video)

    rules = FAMILIES["cogvideox"].keyframes
    noisy = rules.methods["noisy"](NETWORKS["5b"])
    assert noisy == replace(NETWORKS["5b"], image_noise=FUN_NOISE)
    for config in (NETWORKS["5b"], noisy, noisy):
        rules.encode(config, Listening(), [Keyframe(image=START)], SHAPE)  # type: ignore[arg-type]
    clean, once, again = seen
    assert torch.equal(once, again)
    assert abs(float((once - clean)[:, :, 0].std()) - FUN_NOISE) < 0.002
    assert torch.equal(once[:, :, 1:], torch.full_like(once[:, :, 1:], -1.0))
    with pytest.raises(SettingsError, match="noisy"):
        rules.methods["noisy"](NetworkConfig())


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "frames", "says"),
    [
        ("5b", [Keyframe(image=START), Keyframe(image=END)], 9, "the same frame"),
        ("5b", [Keyframe(image=START, strength=0.5)], 9, "strength 0.5"),
        ("5b", [Keyframe(image=START, until=0.5)], 9, "until 0.5"),
        ("5b", [Keyframe(image=START, frame=9)], 9, "no such frame"),
        ("5b", [], 13, "use 9 or 17 frames"),
        ("2b", [], 17, "at most 9 frames"),
    ],
)
def test_pictures_that_cannot_be_taken_are_named(name: str, given: list[Keyframe], frames: int, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        FAMILIES["cogvideox"].keyframes.check(NETWORKS[name], given, frames)


@pytest.mark.parametrize(
    ("keyframe", "says"),
    [
        (Keyframe(image=START[..., :32]), "image is of another size"),
        (Keyframe(image=START, mask=MASK[None, ..., :32]), "mask is of another size"),
        (Keyframe(image=START, mask=MASK), "mask is of another size"),
    ],
)
def test_pictures_of_another_size_are_named(codec: CogVideoXCodec, keyframe: Keyframe, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        FAMILIES["cogvideox"].keyframes.encode(NETWORKS["5b"], codec, [keyframe], SHAPE)


def test_latents_of_single_pictures_are_refused(models: dict[str, VideoModel]) -> None:
    model = models["5b"]
    with pytest.raises(SettingsError, match="one video with gaps"):
        with_keyframes(
            model, model.conditioning(PROMPT), [LatentKeyframe(latents=normal(0, 1, 4, 1, 6, 8), index=0)], LATENTS
        )


def test_other_networks_take_no_masks() -> None:
    masked = [Keyframe(image=START, mask=MASK[None])]
    with pytest.raises(SettingsError, match="first frame whole"):
        FAMILIES["cogvideox"].keyframes.check(replace(TINY, in_channels=8), masked, 9)


# --- through the nodes ------------------------------------------------------------------------------------------------


DIMS = T5Dims(vocab_size=160, hidden_size=24, num_layers=1, num_heads=2, head_size=8, intermediate_size=32)
POSITIVE = EncodedPrompt(prompt="a red circle", features=PROMPT, text_config=TextConfig(t5=DIMS, max_length=7))
NEGATIVE_PROMPT = replace(POSITIVE, features=NEGATIVE)


def image(tensor: Tensor) -> Tensor:
    """(1, 3, H, W) in [-1, 1] as IMAGE."""
    return tensor.movedim(1, -1) / 2 + 0.5


def sampled(model: VideoModel, positive: Any, latent: Any, **changes: Any) -> Any:
    widgets = {
        "seed": 3, "steps": STEPS, "cfg": 0.0, "guidance": 0.0, "shift": 0.0, "sampler": "auto", "schedule": "auto",
        "denoise": 1.0, **changes,
    }  # fmt: skip
    return Sampler().sample(model, positive, latent, **widgets, negative=NEGATIVE_PROMPT)[0]


SIZE = {"width": 64, "height": 48, "num_frames": 9, "size": "exact", "fit": "crop", "mode": "stability",
        "method": "auto", "batch_size": 1}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_two_pictures_through_the_nodes(name: str, models: dict[str, VideoModel], codec: CogVideoXCodec) -> None:
    model = models[name]
    (placed,) = PlaceKeyframe().place(image(START), 0, 1.0, 0.0)
    (placed,) = PlaceKeyframe().place(image(END), -1, 1.0, 0.0, placed)
    positive, latent = KeyframesToVideo().prepare(model, codec, POSITIVE, placed, **SIZE)["result"]
    assert "noise_mask" not in latent, "the network itself takes both"
    made = sampled(model, positive, latent)
    expected = ours(model, codec, [Keyframe(image=picture(image(i)), frame=f) for i, f in ((START, 0), (END, -1))])
    torch.testing.assert_close(made["samples"] * SCALE, expected, rtol=1e-4, atol=1e-5)
    assert Decode().decode(codec, made)[0].shape == (9, 48, 64, 3)


def test_a_first_picture_through_image_to_video(models: dict[str, VideoModel], codec: CogVideoXCodec) -> None:
    model = models["1.5"]
    positive, latent = ImageToVideo().prepare(model, codec, POSITIVE, image(START), **SIZE)["result"]
    expected = ours(model, codec, [Keyframe(image=picture(image(START)))])
    torch.testing.assert_close(sampled(model, positive, latent)["samples"] * SCALE, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["5b", "1.5"])
def test_a_video_with_a_mask_is_told_and_kept(name: str, models: dict[str, VideoModel], codec: CogVideoXCodec) -> None:
    model, frames = models[name], image(VIDEO.movedim(2, 0).squeeze(1))
    latent, positive = EncodeVideo().encode(codec, frames, "strict", MASK, model=model, positive=POSITIVE)
    assert positive is not None
    assert positive.images is not None
    told = FAMILIES["cogvideox"].keyframes.encode(model.config, codec, video_keyframes(VIDEO, MASK), SHAPE)[0]
    torch.testing.assert_close(positive.images.keyframes[0].latents, told.latents, rtol=1e-4, atol=1e-5)
    filled, untold = sampled(model, positive, latent), sampled(model, POSITIVE, latent)
    away = filled["samples"] - latent["samples"]
    assert not bool(away[..., 7:].any()), "what lies outside of the mask stays"
    assert relative(filled["samples"], untold["samples"]) > 1e-3


def test_a_video_is_changed_without_a_mask(models: dict[str, VideoModel], codec: CogVideoXCodec) -> None:
    model, frames = models["2b"], image(VIDEO.movedim(2, 0).squeeze(1))
    latent, positive = EncodeVideo().encode(codec, frames, "strict", model=model, positive=POSITIVE)
    assert positive is POSITIVE, "the network is told nothing"
    a_little, much = (sampled(model, positive, latent, denoise=share)["samples"] for share in (0.2, 0.8))
    near = [relative(one, latent["samples"]) for one in (a_little, much)]
    assert near[0] < near[1]


def test_other_networks_are_told_nothing_of_a_mask(codec: CogVideoXCodec) -> None:
    model = build(replace(TINY, in_channels=4))
    frames = image(VIDEO.movedim(2, 0).squeeze(1))
    _, positive = EncodeVideo().encode(codec, frames, "strict", MASK, model=model, positive=POSITIVE)
    assert positive is POSITIVE
