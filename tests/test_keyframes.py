"""Given first frames, masks and noise levels in the core: what is made of them, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.bundle import Bundle, load_bundle
from vidgen.vidgen_core.diffusion import Diffusion, edm, flow_matching, scaled_linear_table, vp, zero_terminal_snr
from vidgen.vidgen_core.errors import Cancelled, SettingsError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keyframes import RULES
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.generate import Sampling, encode_prompts, generate, sample_latents, with_keyframes
from vidgen.vidgen_core.guidance import keep
from vidgen.vidgen_core.keyframes import (
    Keyframe,
    LatentKeyframe,
    bucket_for,
    bucket_sizes,
    encode_keyframes,
    fit_images,
    mask_to_latents,
    picture,
    repeat_over_frames,
)
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.noise import NoiseStream
from vidgen.vidgen_core.sampling import SAMPLERS, sample
from vidgen.vidgen_core.timesteps import from_sigmas, schedule, to_sigmas
from vidgen.vidgen_core.types import Conditioning, Grid, VideoShape

PROMPT = "a red star spins"
SHAPE = VideoShape(num_frames=9, height_px=32, width_px=48)
LATENTS = (1, 16, 3, 4, 6)
HUNYUAN_GRID = Grid(channels=16, spatial=8, temporal=4)
IMAGE = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1

T2V = NetworkConfig()
V1 = NetworkConfig(image_condition="latent_concat", in_channels=33, guidance_embed=False)
V2 = NetworkConfig(image_condition="token_replace")


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return load_bundle(tiny_bundle_dir, device="cpu")


class IdleHost(LocalHost):
    """Any work it hears of is a failure."""

    def progress(self, what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what} has begun")


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "number"), [(960, 91), (720, 67), (480, 43)])
def test_buckets_are_the_published_ones(base: int, number: int) -> None:
    sizes = bucket_sizes(base)
    assert len(sizes) == len(set(sizes)) == number
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert all(h % 32 == w % 32 == 0 and h * w <= base * base * 1.0001 for h, w in sizes)
    assert all(max(h, w) <= 4 * min(h, w) for h, w in sizes)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (720, 1280, {"720p": (704, 1248), "540p": (544, 928), "360p": (352, 608)}),
        (1024, 1024, {"720p": (960, 960), "540p": (704, 704), "360p": (480, 480)}),
    ],
)
def test_the_bucket_of_a_picture(height: int, width: int, expected: dict[str, tuple[int, int]]) -> None:
    assert {name: bucket_for(height, width, name) for name in expected} == expected


@pytest.mark.parametrize(("height", "width"), [(100, 1000), (1000, 100), (900, 1000), (1000, 900), (1, 1)])
def test_any_picture_has_a_bucket(height: int, width: int) -> None:
    h, w = bucket_for(height, width, "540p")
    assert h * w <= 720 * 720
    assert (h <= w) == (height <= width)
    with pytest.raises(SettingsError, match="no such bucket"):
        bucket_for(height, width, "480p")


@pytest.mark.parametrize("size", [(40, 30), (20, 70), (64, 64), (32, 48), (31, 47)])
def test_fitted_pictures_have_the_size_and_keep_their_middle(size: tuple[int, int]) -> None:
    """A spot in the middle stays there however the picture is fitted, and only bars are black."""
    image = torch.full((2, 3, *size), 0.5)
    for fit in ("crop", "stretch"):
        fitted = fit_images(image, 32, 48, fit)
        assert fitted.shape == (2, 3, 32, 48)
        torch.testing.assert_close(fitted, torch.full_like(fitted, 0.5))
    padded = fit_images(image, 32, 48, "pad")
    assert padded.shape == (2, 3, 32, 48)
    assert float(padded[..., 16, 24].min()) == pytest.approx(0.5)
    scale = min(32 / size[0], 48 / size[1])
    covered = int(size[0] * scale + 1e-6) * int(size[1] * scale + 1e-6)
    assert int((padded[0, 0] > 0.4).sum()) == covered


def test_the_crop_is_the_published_one() -> None:
    """Shorter side to the shorter side of the bucket, then the middle: as the image tower's own Resize and CenterCrop
    do with a picture of 1280 x 720 px, but for the rounding of 8-bit pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    height, width = 44, 76
    resized = Image.fromarray(pixels).resize((int(160 * 44 / 90), 44), Image.Resampling.BILINEAR)
    left = round((resized.width - width) / 2)
    expected = torch.from_numpy(np.asarray(resized.crop((left, 0, left + width, height))).copy()).float() / 255
    images = torch.from_numpy(pixels).float().permute(2, 0, 1)[None] / 255
    assert float((fit_images(images, height, width)[0].permute(1, 2, 0) - expected).abs().max()) < 2 / 255


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((18, 65, 71), (17, 64, 64)),
        ((16, 8, 9), (17, 16, 16)),
        ((1, 720, 1280), (1, 720, 1280)),
        ((-3, -5, 0), (1, 16, 16)),
    ],
)
def test_the_nearest_size_can_be_made(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    wanted = VideoShape(num_frames=shape[0], height_px=shape[1], width_px=shape[2])
    near = wanted.nearest(HUNYUAN_GRID, patch=(1, 2, 2))
    near.check(HUNYUAN_GRID, patch=(1, 2, 2))
    assert (near.num_frames, near.height_px, near.width_px) == expected


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_latent_is_new_if_any_of_its_pixels_is() -> None:
    mask = torch.zeros(9, 32, 48)
    mask[0, 9, 17] = 1  # first frame: its own latent, row 1, column 2
    mask[5, 31, 47] = 0.5  # frames 5 to 8 are the third latent
    latent = mask_to_latents(mask, HUNYUAN_GRID, LATENTS)
    assert latent.shape == (1, 1, 3, 4, 6)
    expected = torch.zeros(3, 4, 6)
    expected[0, 1, 2], expected[2, 3, 5] = 1, 0.5
    assert torch.equal(latent[0, 0], expected)


@pytest.mark.parametrize(
    "shape",
    [
        (32, 48),
        (1, 32, 48),
        (9, 32, 48),
        (9, 1, 32, 48),
        (1, 1, 9, 32, 48),
        (4, 6),
        (3, 4, 6),
        (1, 1, 3, 4, 6),
        (1, 1, 32, 48),
    ],
)
def test_masks_of_every_usual_shape(shape: tuple[int, ...]) -> None:
    assert torch.equal(mask_to_latents(torch.ones(shape), HUNYUAN_GRID, LATENTS), torch.ones(1, 1, 3, 4, 6))


@pytest.mark.parametrize(
    "shape", [(64, 64), (2, 32, 48), (9, 3, 32, 48), (32,), (2, 1, 9, 32, 48), (48, 32), (1, 3, 9, 32, 48)]
)
def test_masks_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="resize the mask"):
        mask_to_latents(torch.ones(shape), HUNYUAN_GRID, LATENTS)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_the_known_part_is_the_noised_source_at_every_step(name: str, denoise: float) -> None:
    """At each time that the network is asked, and to the bit at the end."""
    diffusion = flow_matching()
    generator = torch.Generator().manual_seed(0)
    source, noise, other = (torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.zeros(1, 1, 3, 4, 4)
    mask[..., 2:] = 1
    asked = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t))
        return 0.3 * x + other

    ts = schedule("simple", 6, denoise=denoise)
    x = diffusion.add_noise(source, noise, ts[0])
    result = sample(name, keep(network, source, mask), diffusion, x, ts)
    for x_t, t in asked:
        torch.testing.assert_close(x_t[..., :2], diffusion.add_noise(source, noise, t)[..., :2], rtol=0, atol=1e-12)
    assert torch.equal(result[..., :2], source[..., :2])
    assert float((result - source)[..., 2:].abs().min()) > 0
    everywhere = sample(name, network, diffusion, x, ts)
    torch.testing.assert_close(result[..., 2:], everywhere[..., 2:])  # this network looks at each place alone


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_the_mask_keeps_is_kept_to_the_bit(name: str, bundle: Bundle) -> None:
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    start = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, *LATENTS[2:])
    mask[..., 3:] = 1
    settings = Sampling(cfg=1.0, num_steps=3, sampler=name)
    result = sample_latents(bundle.model, cond, None, LATENTS, settings, start=start, mask=mask)
    assert torch.equal(result[..., :3], start[..., :3])
    assert not torch.isclose(result[..., 3:], start[..., 3:]).any()
    all_new = sample_latents(bundle.model, cond, None, LATENTS, settings, start=start, mask=torch.ones_like(mask))
    assert torch.equal(all_new, sample_latents(bundle.model, cond, None, LATENTS, settings))


def test_a_grey_mask_mixes(bundle: Bundle) -> None:
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    start = torch.randn(LATENTS, generator=torch.Generator().manual_seed(0))
    settings = Sampling(cfg=1.0, num_steps=2)
    distances = []
    for grey in (0.0, 0.3, 0.7, 1.0):
        mask = torch.full((1, 1, 1, 1, 1), grey)
        result = sample_latents(bundle.model, cond, None, LATENTS, settings, start=start, mask=mask)
        distances.append(float((result - start).norm()))
    assert distances == sorted(distances)
    assert distances[0] == 0


# --- noise levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "diffusion",
    [flow_matching(), edm(), vp(scaled_linear_table()), vp(zero_terminal_snr(scaled_linear_table()))],
    ids=["flow", "edm", "vp", "zero_snr"],
)
@pytest.mark.parametrize("name", ["simple", "karras", "linear_quadratic"])
def test_sigmas_there_and_back(name: str, diffusion: Diffusion) -> None:
    ts = schedule(name, 7, diffusion=diffusion)
    again = from_sigmas(to_sigmas(ts, diffusion), diffusion)
    noise = diffusion.level(ts) >= diffusion.levels[1] * (1 - 1e-6)  # where karras begins at zero SNR it is told so
    torch.testing.assert_close(again, ts.masked_fill(noise, 1.0), rtol=0, atol=1e-6)  # levels are float32
    assert float(again[-1]) == 0


def test_sigmas_of_flow_matching_are_times(bundle: Bundle) -> None:
    """ComfyUI's convention; and a run told by them is the run of the same steps and shift, but for float32."""
    ts = schedule("simple", 3, shift=2.0)
    sigmas = to_sigmas(ts, flow_matching())
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(sigmas.double(), ts, rtol=0, atol=1e-7)
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    told, named = (
        sample_latents(bundle.model, cond, None, LATENTS, Sampling(cfg=1.0, **settings))  # type: ignore[arg-type]
        for settings in ({"sigmas": tuple(sigmas.tolist()), "num_steps": 9}, {"num_steps": 3, "shift": 2.0})
    )
    assert float((told - named).norm() / named.norm()) < 1e-5


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ([1.0], "two numbers or more"),
        ([], "two numbers or more"),
        ([0.0], "two numbers or more"),
        ([0.5, 0.7, 0.0], "each below the one before"),
        ([1.0, 0.5, 0.5, 0.0], "each below the one before"),
        ([1.0, 0.5], "the last one 0"),
        ([1.0, float("nan"), 0.0], "sigmas cannot be used"),
        ([float("inf"), 1.0, 0.0], "sigmas cannot be used"),
        ([14.6, 3.0, 0.0], "above this network's noise"),
    ],
)
def test_sigmas_that_cannot_be(sigmas: list[float], says: str, bundle: Bundle) -> None:
    with pytest.raises(SettingsError, match=says):
        generate(bundle, PROMPT, settings=Sampling(sigmas=tuple(sigmas)), host=IdleHost())


# --- first frames -----------------------------------------------------------------------------------------------------


def run(bundle: Bundle, **settings: object) -> Tensor:
    chosen = Sampling(num_steps=2, **settings)  # type: ignore[arg-type]
    return generate(bundle, PROMPT, SHAPE, chosen, keyframes=[Keyframe(image=IMAGE)])


def test_the_picture_changes_what_follows(bundle: Bundle) -> None:
    other = generate(bundle, PROMPT, SHAPE, Sampling(num_steps=2), keyframes=[Keyframe(image=-IMAGE)])
    assert not torch.equal(run(bundle), generate(bundle, PROMPT, SHAPE, Sampling(num_steps=2)))
    assert not torch.isclose(run(bundle)[:, :, 5:], other[:, :, 5:], atol=1e-3).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_holds_the_picture(name: str, bundle: Bundle) -> None:
    pictures = encode_keyframes(bundle.codec, [Keyframe(image=IMAGE)], SHAPE)
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    positive = with_keyframes(bundle.model, cond, pictures, LATENTS)
    negative = encode_prompts(bundle.text, bundle.model, ["x"])
    settings = Sampling(num_steps=3, sampler=name, cfg=3.0)
    result = sample_latents(bundle.model, positive, negative, LATENTS, settings)
    assert torch.equal(result[:, :, :1], pictures[0].latents)
    assert result.isfinite().all()


def test_a_batch_with_a_picture_equals_singles(bundle: Bundle) -> None:
    both = run(bundle, num_videos=2, seed=4)
    for index in range(2):
        assert torch.equal(both[index : index + 1], run(bundle, seed=4 + index))


def test_modes_are_the_published_ones() -> None:
    assert (RULES.modes["stability"].start_share, RULES.modes["stability"].shift) == (0.001, None)
    assert (RULES.modes["dynamic"].start_share, RULES.modes["dynamic"].shift) == (0.0, 17.0)
    assert next(iter(RULES.modes)) == "stability"


def test_dynamic_mode_is_shift_17_unless_the_user_says_another(bundle: Bundle) -> None:
    def video(mode: str, **settings: object) -> Tensor:
        chosen = Sampling(num_steps=3, **settings)  # type: ignore[arg-type]
        return generate(bundle, PROMPT, SHAPE, chosen, keyframes=[Keyframe(image=IMAGE)], mode=mode)

    dynamic = video("dynamic")
    assert torch.equal(dynamic, video("dynamic", shift=17.0))
    assert not torch.equal(dynamic, video("dynamic", shift=3.0))
    stable = video("stability", shift=17.0)
    assert float((stable - dynamic).abs().max()) > 0  # a thousandth of the picture in the noise


def test_an_interrupted_run_with_a_picture_is_taken_up_again(bundle: Bundle, tmp_path: Path) -> None:
    class Stopping(LocalHost):
        def progress(self, what: str, done: int, total: int) -> None:
            if (what, done) == ("sample", 1):
                self.cancel()

    path = tmp_path / "run"
    with pytest.raises(Cancelled):
        generate(
            bundle,
            PROMPT,
            SHAPE,
            Sampling(num_steps=2, resume_path=path),
            keyframes=[Keyframe(image=IMAGE)],
            host=Stopping(),
        )
    with pytest.raises(SettingsError, match="another image"):
        generate(bundle, PROMPT, SHAPE, Sampling(num_steps=2, resume_path=path), keyframes=[Keyframe(image=-IMAGE)])
    assert torch.equal(run(bundle, resume_path=path), run(bundle))


def test_a_concat_network_sees_the_picture_once_and_hides_its_first_frames(bundle: Bundle) -> None:
    """16 channels of the picture's latents, zero after the first frame, and one that says where it is."""
    config = replace(bundle.model.config, image_condition="latent_concat", in_channels=33)
    network = HunyuanVideoTransformer(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    model = VideoModel.of("hunyuan", config, network, defaults=bundle.model.defaults)
    pictures = encode_keyframes(bundle.codec, [Keyframe(image=IMAGE)], SHAPE)
    cond = encode_prompts(bundle.text, model, [PROMPT])
    concat = with_keyframes(model, cond, pictures, LATENTS).concat
    assert concat is not None
    assert concat.shape == (1, 17, 3, 4, 6)
    assert torch.equal(concat[:, :16, :1], pictures[0].latents)
    assert concat[:, :16, 1:].eq(0).all()
    assert torch.equal(concat[0, 16, :, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    i2v = replace_model(bundle, model)
    video = generate(i2v, PROMPT, SHAPE, Sampling(num_steps=1), keyframes=[Keyframe(image=IMAGE)])
    assert video.shape[2] == 5  # 129 -> 125
    with pytest.raises(SettingsError, match="was given none"):
        generate(i2v, PROMPT, SHAPE, Sampling(num_steps=1), host=IdleHost())
    with pytest.raises(SettingsError, match="was given none"):
        sample_latents(model, cond, None, LATENTS, Sampling(num_steps=1, cfg=1.0), host=IdleHost())


def replace_model(bundle: Bundle, model: VideoModel) -> Bundle:
    return Bundle(model=model, codec=bundle.codec, text=bundle.text)


def key(frame: int = 0, **given: float) -> Keyframe:
    return Keyframe(image=IMAGE, frame=frame, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "keyframes", "num_frames", "says"),
    [
        (T2V, [key()], 129, 'from text alone.*set method to "token_replace"'),
        (V1, [], 129, "was given none"),
        (V2, [], 129, "was given none"),
        (V2, [key(-1)], 129, "frames 128.*one image, for frame 0"),
        (V2, [key(), key(64)], 129, "frames 0, 64"),
        (V1, [key(200)], 129, "no such frame.*frame 200 of 129"),
        (V2, [key(-130)], 129, "no such frame"),
        (V2, [key(strength=0.5)], 129, "exactly as it is.*dynamic"),
        (V2, [key(until=0.2)], 129, "exactly as it is"),
        (V1, [key(noise=0.02)], 129, "exactly as it is"),
        (V2, [key()], 1, "too short"),
    ],
)
def test_pictures_that_hunyuan_cannot_take(
    config: NetworkConfig, keyframes: list[Keyframe], num_frames: int, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        RULES.check(config, keyframes, num_frames)


@pytest.mark.parametrize("config", [V1, V2, replace(T2V, accepts_first_frame=True)])
def test_pictures_that_it_can_take(config: NetworkConfig) -> None:
    RULES.check(config, [key()], 129)
    RULES.check(config, [LatentKeyframe(latents=torch.zeros(LATENTS), index=0)], 5)
    assert RULES.methods["auto"](config) == config


def test_a_method_that_is_not_the_networks() -> None:
    with pytest.raises(SettingsError, match='method "auto"'):
        RULES.methods["token_replace"](V1)
    assert RULES.methods["token_replace"](T2V).accepts_first_frame


REFUSED: list[tuple[Callable[[], dict], str]] = [
    (lambda: {"keyframes": [Keyframe(image=IMAGE[..., :40])]}, "another size than the video"),
    (lambda: {"keyframes": [key(-1)]}, "no image but that of the first frame"),
    (lambda: {"keyframes": [key()], "mode": "wild"}, "no such image mode"),
    (lambda: {"keyframes": [key()], "method": "magic"}, "no such method"),
    (lambda: {"keyframes": [key()], "shape": replace(SHAPE, num_frames=10)}, "10 frames.*use 9 frames"),
    (lambda: {"keyframes": [key()], "shape": replace(SHAPE, height_px=36)}, "36 px"),
    (lambda: {"settings": Sampling(denoise=1.5)}, "denoising strength"),
    (lambda: {"settings": Sampling(denoise=0.0)}, "denoising strength"),
    (lambda: {"settings": Sampling(start_share=2.0)}, "start_share"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED)
def test_refused_before_the_network_runs(given: Callable[[], dict], says: str, bundle: Bundle) -> None:
    class NoSampling(LocalHost):
        def progress(self, what: str, done: int, total: int) -> None:
            assert what == "encode"

    arguments = {"shape": SHAPE} | given()
    with pytest.raises(SettingsError, match=says):
        generate(bundle, PROMPT, host=NoSampling(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mask": torch.ones(1, 1, 3, 4, 6)}, "nothing to start from.*a mask"),
        ({"mask": torch.ones(1, 1, 3, 4, 5), "start": torch.ones(LATENTS)}, "mask does not fit"),
        ({"mask": torch.ones(3, 4, 6), "start": torch.ones(LATENTS)}, "mask does not fit"),
        ({"start": torch.zeros(LATENTS), "settings": {"denoise": 0.5}}, "are empty.*Encode Video"),
        ({"start": torch.zeros(LATENTS), "mask": torch.ones(1, 1, 3, 4, 6)}, "are empty"),
        ({"start": torch.full(LATENTS, float("nan")), "settings": {"denoise": 0.5}}, "not finite"),
        ({"settings": {"sigmas": (0.5, 0.2, 0.0)}}, "nothing to start from.*noise level 0.5"),
        ({"start": torch.ones(1, 16, 3, 4, 5), "settings": {"denoise": 0.5}}, "nothing to start from"),
        ({"settings": {"start_share": 0.1}}, "nothing to start from.*start_share"),
    ],
)
def test_latents_and_masks_that_do_not_fit(arguments: dict, says: str, bundle: Bundle) -> None:
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    settings = Sampling(cfg=1.0, num_steps=2, **arguments.pop("settings", {}))
    with pytest.raises(SettingsError, match=says):
        sample_latents(bundle.model, cond, None, LATENTS, settings, host=IdleHost(), **arguments)


def test_a_picture_for_a_video_of_another_size(bundle: Bundle) -> None:
    pictures = encode_keyframes(bundle.codec, [Keyframe(image=IMAGE)], SHAPE)
    cond = with_keyframes(bundle.model, encode_prompts(bundle.text, bundle.model, [PROMPT]), pictures, LATENTS)
    for shape, says in (((1, 16, 3, 6, 6), "another size"), ((1, 16, 5, 4, 6), "another length")):
        with pytest.raises(SettingsError, match=says):
            sample_latents(bundle.model, cond, None, shape, Sampling(cfg=1.0), host=IdleHost())


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(1, 8, 8, 4), "alpha"),
        (torch.zeros(1, 8, 8, 1), "1 channels"),
        (torch.zeros(8, 8, 3), r"shape \(8, 8, 3\)"),
        (torch.zeros(0, 8, 8, 3), "cannot be used"),
        (torch.zeros(1, 8, 0, 3), "cannot be used"),
        (torch.full((1, 8, 8, 3), float("nan")), "not finite"),
    ],
)
def test_an_image_that_is_none(image: Tensor, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        picture(image)


def test_an_image_becomes_a_picture() -> None:
    images = torch.tensor([0.0, 0.5, 2.0]).expand(2, 4, 5, 3)
    assert picture(images).shape == (1, 3, 4, 5)
    assert picture(images)[0, :, 0, 0].tolist() == [-1, 0, 1]


def test_a_still_start_is_mixed_into_the_noise(bundle: Bundle) -> None:
    """With a share of all the run begins at the picture itself."""
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    still = repeat_over_frames(torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(0)), LATENTS)
    seen: list[Tensor] = []
    model = bundle.model
    hook = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["x"]), with_kwargs=True
    )
    try:
        for share in (0.0, 0.25, 1.0):
            sample_latents(
                model, cond, None, LATENTS, Sampling(cfg=1.0, num_steps=1, start_share=share, seed=7), start=still
            )
    finally:
        hook.remove()
    noise = NoiseStream.of_batch(7, 1).draw(LATENTS[1:])
    for share, x in zip((0.0, 0.25, 1.0), seen, strict=True):
        torch.testing.assert_close(x, (1 - share) * noise + share * still)


def test_the_negative_prompt_is_given_the_picture_too(bundle: Bundle) -> None:
    """With cfg the two prompts differ in words alone: equal prompts are guided nowhere."""
    pictures = encode_keyframes(bundle.codec, [Keyframe(image=IMAGE)], SHAPE)
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    positive = with_keyframes(bundle.model, cond, pictures, LATENTS)
    plain = sample_latents(bundle.model, positive, None, LATENTS, Sampling(num_steps=2, cfg=1.0))
    for batched in (False, True):
        guided = sample_latents(
            bundle.model, positive, cond, LATENTS, Sampling(num_steps=2, cfg=7.0, cfg_batched=batched)
        )
        torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


def test_a_conditioning_without_pictures_is_left_alone() -> None:
    cond = Conditioning(pooled=torch.zeros(1, 2))
    assert RULES.condition(T2V, cond, [], LATENTS) is cond
