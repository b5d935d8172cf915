"""The nodes for images, masks, sigmas and native conditioning, and what they refuse."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vidgen.nodes import host as hosts
from vidgen.nodes.bridges import FromConditioning
from vidgen.nodes.image import FitImages, ImageToVideo, LoadImage, PadVideo
from vidgen.nodes.loaders import LoadAll
from vidgen.nodes.sampling import EmptyLatent, Sampler, Sigmas
from vidgen.nodes.text import EncodePrompt
from vidgen.nodes.video import Decode, EncodeVideo, LoadVideo
from vidgen.vidgen_core.bundle import load_bundle
from vidgen.vidgen_core.errors import FileError, SettingsError
from vidgen.vidgen_core.generate import Sampling, generate
from vidgen.vidgen_core.keyframes import Keyframe, picture
from vidgen.vidgen_core.media import video_to_images
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.timesteps import schedule
from vidgen.vidgen_core.types import VideoShape

Parts = tuple[Any, Any, Any]

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "steps": 2,
    "cfg": 1.0,
    "guidance": 0.0,
    "shift": 2.0,
    "sampler": "euler",
    "schedule": "auto",
    "denoise": 1.0,
}
FIRST: dict[str, Any] = {
    "width": 48,
    "height": 32,
    "num_frames": 9,
    "size": "exact",
    "fit": "crop",
    "mode": "stability",
    "method": "auto",
    "batch_size": 1,
}


@pytest.fixture(scope="module")
def parts(tiny_bundle_dir: Path) -> Parts:
    return LoadAll().load(str(tiny_bundle_dir), "auto")


@pytest.fixture(scope="module")
def cond(parts: Parts) -> Any:
    return EncodePrompt().encode(parts[2], "a red star", "video")[0]


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def to_video(parts: Parts, cond: Any, image: Tensor, **changes: Any) -> dict[str, Any]:
    return ImageToVideo().prepare(parts[0], parts[1], cond, image, **(FIRST | changes))


def sampled(parts: Parts, cond: Any, latent: Any, **changes: Any) -> Any:
    return Sampler().sample(parts[0], cond, latent, **(SETTINGS | changes))[0]


def other_network(parts: Parts, **config: Any) -> Parts:
    """The same parts with a network that says something else of itself."""
    model = parts[0]
    changed = VideoModel.of("hunyuan", replace(model.config, **config), model.network, defaults=model.defaults)
    return changed, parts[1], parts[2]


# --- image to video ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["stability", "dynamic"])
def test_the_nodes_make_what_the_core_makes(mode: str, parts: Parts, cond: Any, tiny_bundle_dir: Path) -> None:
    image = images(1, 32, 48, 3)
    positive, latent = to_video(parts, cond, image, mode=mode, batch_size=2)["result"]
    assert latent["samples"].shape == (2, 16, 3, 4, 6)
    (found,) = Decode().decode(parts[1], sampled(parts, positive, latent, shift=0.0))
    video = generate(
        load_bundle(tiny_bundle_dir),
        "a red star",
        VideoShape(num_frames=9, height_px=32, width_px=48),
        Sampling(seed=3, num_steps=2, cfg=1.0, num_videos=2),
        keyframes=[Keyframe(image=picture(image))],
        mode=mode,
    )
    # Raw latents are divided by the scale and multiplied again: one rounding of float32 each, grown by the decoder.
    torch.testing.assert_close(found, video_to_images(video), atol=1e-5, rtol=0)


def test_the_first_frame_is_held_with_cfg(parts: Parts, cond: Any) -> None:
    image = images(1, 32, 48, 3)
    positive, latent = to_video(parts, cond, image)["result"]
    result = sampled(parts, positive, latent, cfg=4.0, negative=cond, seed=8)
    still, _ = EncodeVideo().encode(parts[1], image, "strict")
    torch.testing.assert_close(result["samples"][:, :, :1], still["samples"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "image", "shape"),
    [
        ("exact", (90, 50), (9, 32, 48)),
        ("nearest", (90, 50), (9, 32, 48)),
        ("image", (90, 50), (9, 96, 48)),
        ("image", (64, 48), (9, 64, 48)),
        ("360p", (48, 64), (9, 416, 544)),
    ],
)
def test_sizes(size: str, image: tuple[int, int], shape: tuple[int, ...], parts: Parts, cond: Any) -> None:
    prepared = to_video(parts, cond, images(1, *image, 3), size=size)
    frames, height, width = shape
    assert prepared["result"][1]["samples"].shape == (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    assert ("ui" in prepared) == (size != "exact")


def test_what_is_changed_is_said(parts: Parts, cond: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        prepared = to_video(parts, cond, images(1, 8, 8, 3), size="nearest", width=50, height=40, num_frames=10)
    said = "9 frames of 48 x 32 px, the nearest to 10 frames of 50 x 40 px"
    assert prepared["ui"]["text"] == (said,)
    assert said in caplog.text


def test_of_several_images_the_first_is_taken(parts: Parts, cond: Any) -> None:
    many = images(5, 32, 48, 3)
    first, one = (to_video(parts, cond, image)["result"][0] for image in (many, many[:1]))
    assert torch.equal(first.images.keyframes[0].latents, one.images.keyframes[0].latents)


def test_a_published_v2_file_is_told_by_the_user(parts: Parts, cond: Any) -> None:
    """It is alike to a text-to-video file: auto refuses, token_replace makes what a file that says so makes."""
    silent = other_network(parts, accepts_first_frame=False)
    image = images(1, 32, 48, 3)
    with pytest.raises(SettingsError, match="text alone"):
        to_video(silent, cond, image)
    told = to_video(silent, cond, image, method="token_replace")["result"]
    known = to_video(parts, cond, image)["result"]
    assert torch.equal(sampled(silent, *told)["samples"], sampled(parts, *known)["samples"])


def test_a_concat_network_hides_its_first_frames(parts: Parts, cond: Any) -> None:
    config = replace(parts[0].config, image_condition="latent_concat", in_channels=33)
    network = type(parts[0].network)(config).eval()
    network.init_weights(torch.Generator().manual_seed(0))
    model = VideoModel.of("hunyuan", config, network, defaults=parts[0].defaults)
    concat = (model, parts[1], parts[2])
    positive, latent = to_video(concat, cond, images(1, 32, 48, 3))["result"]
    result = sampled(concat, positive, latent, negative=cond, cfg=2.0)
    assert result["samples"].shape[2] == 3
    assert len(Decode().decode(parts[1], result)[0]) == 5
    with pytest.raises(SettingsError, match="was given none"):
        sampled(concat, cond, latent)


@pytest.mark.parametrize(
    ("image", "changes", "says"),
    [
        (images(1, 32, 48, 4), {}, "4 channels.*alpha"),
        (images(32, 48, 3), {}, "image cannot be used.*shape"),
        (images(1, 32, 48, 1), {}, "1 channels"),
        (images(1, 0, 48, 3), {}, "image cannot be used"),
        (images(1, 32, 48, 3) * float("nan"), {}, "not finite"),
        (images(1, 32, 48, 3), {"num_frames": 10}, "10 frames.*use 9 frames"),
        (images(1, 32, 48, 3), {"num_frames": 1}, "too short"),
        (images(1, 32, 48, 3), {"width": 40}, "40 px.*multiple of 16"),
        (images(1, 32, 48, 3), {"fit": "squeeze"}, "way to fit"),
        (images(1, 32, 48, 3), {"mode": "wild"}, "image mode"),
        (images(1, 32, 48, 3), {"method": "magic"}, "method"),
        (images(1, 32, 48, 3), {"size": "4k"}, "bucket"),
    ],
)
def test_images_that_cannot_be_a_first_frame(
    image: Tensor, changes: dict[str, Any], says: str, parts: Parts, cond: Any
) -> None:
    with pytest.raises(SettingsError, match=says):
        to_video(parts, cond, image, **changes)


def test_the_latent_of_another_size(parts: Parts, cond: Any) -> None:
    positive, _ = to_video(parts, cond, images(1, 32, 48, 3))["result"]
    (latent,) = EmptyLatent().make(parts[1], 32, 32, 9, 1)
    with pytest.raises(SettingsError, match="Image to Video"):
        sampled(parts, positive, latent)


# --- video to video, masks --------------------------------------------------------------------------------------------


def test_a_mask_keeps_the_rest_of_the_video(parts: Parts, cond: Any) -> None:
    frames = images(9, 32, 48, 3)
    mask = torch.zeros(1, 32, 48)
    mask[:, :, 24:] = 1
    latent, _ = EncodeVideo().encode(parts[1], frames, "strict", mask)
    assert latent["noise_mask"].shape == (1, 1, 9, 32, 48)
    result = sampled(parts, cond, latent)["samples"]
    torch.testing.assert_close(result[..., :3], latent["samples"][..., :3], atol=1e-6, rtol=1e-6)
    assert not torch.isclose(result[..., 3:], latent["samples"][..., 3:]).any()


@pytest.mark.parametrize("shape", [(32, 48), (9, 1, 32, 48), (1, 1, 32, 48), (1, 1, 9, 32, 48)])
def test_masks_as_native_nodes_leave_them(shape: tuple[int, ...], parts: Parts, cond: Any) -> None:
    """Set Latent Noise Mask keeps (N, 1, H, W) at the size of the pixels."""
    latent, _ = EncodeVideo().encode(parts[1], images(9, 32, 48, 3), "strict")
    result = sampled(parts, cond, latent | {"noise_mask": torch.zeros(shape)})
    torch.testing.assert_close(result["samples"], latent["samples"], atol=1e-6, rtol=1e-6)


def test_images_and_mask_are_cropped_alike(parts: Parts) -> None:
    mask = torch.zeros(35, 50)
    mask[1:33, 1:49] = 1  # what is left of 35 x 50 px
    latent, _ = EncodeVideo().encode(parts[1], images(7, 35, 50, 3), "crop", mask)
    assert torch.equal(latent["noise_mask"], torch.ones(1, 1, 5, 32, 48))


def test_a_padded_video_is_new_at_its_border_only(parts: Parts, cond: Any) -> None:
    frames = images(5, 32, 32, 3)
    padded, mask = PadVideo().pad(frames, 8, 0, 16, 8, 8)
    assert padded.shape == (5, 40, 56, 3)
    assert torch.equal(padded[:, :32, 8:40], frames)
    assert torch.equal(padded[:, 3, 0], frames[:, 3, 0])
    kept = torch.zeros(1, 40, 56)
    kept[:, :24, 16:32] = 1
    assert torch.equal(mask, 1 - kept)


@pytest.mark.parametrize(
    ("borders", "says"), [((0, 0, 0, 0, 8), "no border"), ((8, 8, 8, 8, 16), "cover the whole picture")]
)
def test_borders_that_cannot_be(borders: tuple[int, ...], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        PadVideo().pad(images(5, 32, 32, 3), *borders)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(1, 64, 64), "another size than the images"),
        (torch.ones(2, 32, 48), "1 or 9 masks"),
        (torch.ones(1, 1, 32, 48), "another size than the images"),
        (torch.full((1, 32, 48), float("nan")), "not finite"),
    ],
)
def test_masks_that_do_not_fit_the_video(mask: Tensor, says: str, parts: Parts) -> None:
    with pytest.raises(SettingsError, match=says):
        EncodeVideo().encode(parts[1], images(9, 32, 48, 3), "crop", mask)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"denoise": 0.5}, "are empty.*Encode Video"),
        ({"denoise": 1.5}, "denoising strength"),
        ({"denoise": 0.0}, "denoising strength"),
        ({"sigmas": torch.tensor([1.0])}, "two numbers or more"),
        ({"sigmas": torch.tensor([0.2, 0.8, 0.0])}, "each below the one before"),
        ({"sigmas": torch.tensor([14.6, 1.0, 0.0])}, "another kind of model"),
        ({"sigmas": torch.tensor([0.7, 0.2, 0.0])}, "are empty"),
        ({"cfg_start": 0.2, "cfg_end": 0.5, "cfg_schedule": "interval"}, "guidance schedule"),
        ({"cfg_rescale": 2.0}, "cfg_rescale"),
    ],
)
def test_settings_that_do_not_go_with_empty_latents(
    changes: dict[str, Any], says: str, parts: Parts, cond: Any
) -> None:
    (latent,) = EmptyLatent().make(parts[1], 48, 32, 9, 1)
    with pytest.raises(SettingsError, match=says):
        sampled(parts, cond, latent, **changes)


def test_a_mask_of_another_size_on_a_latent(parts: Parts, cond: Any) -> None:
    latent, _ = EncodeVideo().encode(parts[1], images(9, 32, 48, 3), "strict")
    with pytest.raises(SettingsError, match="48 x 32 px, and 1 or 9 frames"):
        sampled(parts, cond, latent | {"noise_mask": torch.ones(1, 64, 64)})


# --- sigmas, guidance -------------------------------------------------------------------------------------------------


def test_sigmas_in_and_out(parts: Parts, cond: Any) -> None:
    (sigmas,) = Sigmas().make(parts[0], "simple", 4, 2.0, 1.0)
    assert sigmas.shape == (5,)
    torch.testing.assert_close(sigmas.double(), schedule("simple", 4, shift=2.0), atol=1e-7, rtol=0)
    (latent,) = EmptyLatent().make(parts[1], 48, 32, 9, 1)
    told = sampled(parts, cond, latent, sigmas=sigmas, steps=7)["samples"]
    named = sampled(parts, cond, latent, steps=4)["samples"]
    assert float((told - named).norm() / named.norm()) < 1e-5


def test_auto_sigmas_are_the_checkpoints(parts: Parts) -> None:
    assert len(Sigmas().make(parts[0], "auto", 0, 0.0, 1.0)[0]) == 3 + 1


def test_part_of_the_sigmas_changes_a_video(parts: Parts, cond: Any) -> None:
    latent, _ = EncodeVideo().encode(parts[1], images(9, 32, 48, 3), "strict")
    (sigmas,) = Sigmas().make(parts[0], "simple", 2, 2.0, 0.5)
    told = sampled(parts, cond, latent, sigmas=sigmas)["samples"]
    named = sampled(parts, cond, latent, denoise=0.5)["samples"]
    assert float((told - named).norm() / named.norm()) < 1e-5
    assert float(sigmas[0]) < 0.9


@pytest.mark.parametrize(
    "changes", [{"cfg_schedule": "linear"}, {"cfg_end": 0.9, "cfg_schedule": "interval"}, {"cfg_rescale": 0.7}]
)
def test_guidance_that_changes_along_the_run(changes: dict[str, Any], parts: Parts, cond: Any) -> None:
    negative = EncodePrompt().encode(parts[2], "a blue circle", "video")[0]
    (latent,) = EmptyLatent().make(parts[1], 48, 32, 9, 1)
    plain = sampled(parts, cond, latent, cfg=5.0, negative=negative)["samples"]
    changed = sampled(parts, cond, latent, cfg=5.0, negative=negative, **changes)["samples"]
    assert not torch.isclose(plain, changed, atol=1e-3).all()


def test_one_after_the_other_is_the_same_up_to_rounding(parts: Parts, cond: Any) -> None:
    (latent,) = EmptyLatent().make(parts[1], 48, 32, 9, 1)
    both, apart = (
        sampled(parts, cond, latent, cfg=5.0, negative=cond, cfg_batched=on)["samples"] for on in (True, False)
    )
    torch.testing.assert_close(both, apart, atol=1e-4, rtol=0)


# --- bridges ----------------------------------------------------------------------------------------------------------


def native(parts: Parts, prompt: str) -> list[Any]:
    """What CLIP Text Encode gives for our encoders' features: tokens without padding, and extras."""
    features = parts[2].encode([prompt])
    length = int(features.context_mask.sum())
    return [[features.context[:, :length], {"pooled_output": features.pooled}]]


def test_native_conditioning_says_the_same(parts: Parts) -> None:
    """Padded, masked or neither: the network hears the same prompt."""
    (latent,) = EmptyLatent().make(parts[1], 48, 32, 9, 1)
    own = EncodePrompt().encode(parts[2], "a red star", "video")[0]
    features = parts[2].encode(["a red star"])
    masked = [[features.context, {"pooled_output": features.pooled, "attention_mask": features.context_mask.long()}]]
    expected = sampled(parts, own, latent)["samples"]
    for given in (native(parts, "a red star"), masked):
        (bridged,) = FromConditioning().convert(parts[0], given)
        assert torch.equal(sampled(parts, bridged, latent)["samples"], expected)


def test_what_a_bridge_does_not_carry_is_said(parts: Parts, caplog: pytest.LogCaptureFixture) -> None:
    given = native(parts, "x")
    given[0][1] |= {"guidance": 6.0, "area": (1, 2), "control": None}
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        FromConditioning().convert(parts[0], given)
    assert "area, guidance" in caplog.text
    assert "control" not in caplog.text


@pytest.mark.parametrize(
    ("conditioning", "says"),
    [
        ([], "0 of them"),
        ([[torch.zeros(1, 5, 32), {}]] * 2, "2 of them"),
        ([[torch.zeros(1, 5, 768), {"pooled_output": torch.zeros(1, 768)}]], "DualCLIPLoader"),
        ([[torch.zeros(1, 5, 32), {}]], "no pooled vector"),
        ([[torch.zeros(5, 32), {"pooled_output": torch.zeros(1, 32)}]], "does not belong"),
        (
            [[torch.zeros(1, 5, 32), {"pooled_output": torch.zeros(1, 32), "attention_mask": torch.ones(1, 9)}]],
            "do not fit together",
        ),
    ],
)
def test_conditionings_of_another_kind(conditioning: list[Any], says: str, parts: Parts) -> None:
    with pytest.raises(SettingsError, match=says):
        FromConditioning().convert(parts[0], conditioning)


def test_latents_go_both_ways(parts: Parts) -> None:
    """A native VAE holding our weights, as diffusers' twin stands for it: raw latents of either decode in the other."""
    vae = parts[1].vae
    frames = images(9, 32, 48, 3)
    ours, _ = EncodeVideo().encode(parts[1], frames, "strict")
    raw, _ = vae.encode(frames.permute(3, 0, 1, 2)[None] * 2 - 1)
    torch.testing.assert_close(ours["samples"], raw, atol=1e-6, rtol=1e-5)
    native_frames = vae.decode(ours["samples"]).clamp(-1, 1)
    (found,) = Decode().decode(parts[1], {"samples": raw})
    # Random weights: either decoder is 1e-5 from its own float64 result.
    torch.testing.assert_close(found, video_to_images(native_frames), atol=3e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{"tile_size": 0}, {"tile_size": 16, "overlap": 8, "temporal_size": 4, "temporal_overlap": 0}]
)
def test_decoding_in_tiles_or_in_one_piece(changes: dict[str, int], parts: Parts) -> None:
    latent = {"samples": images(1, 16, 5, 4, 6)}
    (whole,) = Decode().decode(parts[1], latent)
    (found,) = Decode().decode(parts[1], latent, **changes)
    assert found.shape == whole.shape == (17, 32, 48, 3)
    assert torch.equal(found, whole) == (changes["tile_size"] == 0)
    with pytest.raises(SettingsError, match="tiles cannot be used"):
        Decode().decode(parts[1], latent, tile_size=32, overlap=32)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_picture_with_transparency(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    pixels[..., 0], pixels[:2, :, 3] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, mask = LoadImage().load(str(tmp_path / "a.png"))
    assert image.shape == (1, 4, 6, 3)
    assert image[0, 0, 0].tolist() == [1, 0, 0]
    assert mask.shape == (1, 4, 6)
    assert mask[0, :, 0].tolist() == [0, 0, 1, 1]


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.new("L", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert LoadImage().load(str(tmp_path / "a.jpg"))[0].shape == (1, 6, 4, 3)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 200, b"not a picture"])
def test_files_that_are_no_pictures(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(FileError, match="cannot be read"):
        LoadImage().load(str(tmp_path / "a.png"))


def test_a_missing_picture_is_found_before_the_run() -> None:
    assert "missing.png" in str(LoadImage.VALIDATE_INPUTS("missing.png"))
    assert LoadImage.VALIDATE_INPUTS("vidgen-mask.png") is True


def test_the_examples_are_in_the_lists_and_load() -> None:
    host = hosts.LocalNodeHost()
    assert {"vidgen-first-frame.png", "vidgen-mask.png"} <= set(host.inputs(hosts.IMAGE_ENDINGS))
    assert host.inputs(hosts.VIDEO_ENDINGS) == ["vidgen-circle.mp4", "vidgen-sound.mp4"]
    assert LoadImage().load("vidgen-first-frame.png")[0].shape == (1, 64, 64, 3)
    assert LoadImage().load("vidgen-mask.png")[1].mean() == 0.75
    frames, fps, number, _ = LoadVideo().load("vidgen-circle.mp4", 0, 0)
    assert (frames.shape, fps, number) == ((17, 64, 64, 3), 8.0, 17)


@pytest.mark.parametrize("name", ["../api/hunyuan_t2v.json", "a/vidgen-mask.png", ""])
def test_an_example_does_not_reach_outside(name: str) -> None:
    assert hosts.find_example(name) is None


def test_fitted_images(parts: Parts) -> None:
    (fitted,) = FitImages().resize(images(3, 20, 90, 3), 48, 32, "pad")
    assert fitted.shape == (3, 32, 48, 3)
    assert fitted[:, 0].max() == 0
