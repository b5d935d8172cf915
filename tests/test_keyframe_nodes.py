"""Pictures at frames of a video: where they go in the latents, how a sampler keeps them and lets them go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.nodes.image import ImageToVideo, KeyframesToVideo, PlaceKeyframe
from vidgen.nodes.loaders import LoadAll
from vidgen.nodes.sampling import EmptyLatent, Sampler
from vidgen.nodes.text import EncodePrompt
from vidgen.nodes.video import EncodeVideo
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keyframes import RULES
from vidgen.vidgen_core.guidance import keep
from vidgen.vidgen_core.keyframes import Keyframe, kept_frames, latent_places, taken_by_network
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.types import Grid, VideoShape

Parts = tuple[Any, Any, Any]
SHAPE = VideoShape(num_frames=17, height_px=32, width_px=48)
SIZE: dict[str, Any] = {"width": 48, "height": 32, "num_frames": 17, "size": "exact", "fit": "crop"}
WAY: dict[str, Any] = {"mode": "stability", "method": "auto", "batch_size": 1}
SETTINGS: dict[str, Any] = {"seed": 3, "steps": 3, "cfg": 1.0, "guidance": 0.0, "shift": 2.0} | {
    "sampler": "euler",
    "schedule": "auto",
    "denoise": 1.0,
}


@pytest.fixture(scope="module")
def parts(tiny_bundle_dir: Path) -> Parts:
    return LoadAll().load(str(tiny_bundle_dir), "auto")


@pytest.fixture(scope="module")
def text_only(parts: Parts) -> Parts:
    """The same network, but it says that it knows no first frames."""
    model = parts[0]
    config = replace(model.config, accepts_first_frame=False)
    return VideoModel.of("hunyuan", config, model.network, defaults=model.defaults), parts[1], parts[2]


@pytest.fixture(scope="module")
def cond(parts: Parts) -> Any:
    return EncodePrompt().encode(parts[2], "a red star", "video")[0]


def image(seed: int) -> Tensor:
    return torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(seed))


def keyframe(frame: int, **settings: float) -> Keyframe:
    return Keyframe(image=image(frame % 7).permute(0, 3, 1, 2) * 2 - 1, frame=frame, **settings)


def row(*frames: int, strength: float = 1.0, until: float = 0.0) -> Any:
    keyframes: Any = ()
    for frame in frames:
        (keyframes,) = PlaceKeyframe().place(image(frame % 7), frame, strength, until, keyframes)
    return keyframes


def prepared(parts: Parts, cond: Any, keyframes: Any, **changes: Any) -> tuple[Any, Any]:
    return KeyframesToVideo().prepare(parts[0], parts[1], cond, keyframes, **(SIZE | WAY | changes))["result"]


def sampled(parts: Parts, positive: Any, latent: Any) -> Tensor:
    return Sampler().sample(parts[0], positive, latent, **SETTINGS)[0]["samples"]


def still(parts: Parts, seed: int) -> Tensor:
    return EncodeVideo().encode(parts[1], image(seed), "strict")[0]["samples"][:, :, 0]


# --- where pictures go ------------------------------------------------------------------------------------------------


def test_places_are_the_latents_that_hold_the_frames() -> None:
    causal, plain = Grid(channels=1, spatial=8, temporal=4), Grid(channels=1, spatial=8, temporal=4, causal=False)
    frames = [keyframe(frame) for frame in (0, 1, 6, -5, -1)]
    assert latent_places(frames, SHAPE, causal) == [0, 1, 2, 3, 4]
    assert latent_places(frames[1:2], SHAPE, plain) == [0]
    for index in range(17):
        (place,) = latent_places([keyframe(index)], SHAPE, causal)
        assert causal.num_frames(place) <= index < causal.num_frames(place + 1)


@pytest.mark.parametrize(
    ("frames", "settings", "words"),
    [
        ((5, 8), {}, "frames 5 and 8"),
        ((-1, 16), {}, "frames 16 and 16"),
        ((17,), {}, "frame 17 of 17"),
        ((-18,), {}, "frame -18 of 17"),
        ((0,), {"strength": 1.1}, "strength"),
        ((0,), {"until": -0.1}, "until"),
        ((0,), {"strength": float("nan")}, "strength"),
    ],
)
def test_what_cannot_be_placed_is_refused(frames: tuple[int, ...], settings: dict[str, float], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        latent_places([keyframe(f, **settings) for f in frames], SHAPE, Grid(channels=1, spatial=8, temporal=4))


def test_kept_frames_are_the_latents_of_the_pictures(parts: Parts) -> None:
    codec = parts[1]
    given = [keyframe(8, strength=0.25), keyframe(-1, until=0.5)]
    kept = kept_frames(codec, given, SHAPE)
    assert kept.latents.shape == (1, 16, 5, 4, 6)
    assert kept.mask.flatten().tolist() == [1, 1, 0.75, 1, 0]
    assert kept.until.flatten().tolist() == [0, 0, 0, 0, 0.5]
    for place, one in zip((2, 4), given, strict=True):
        # A still video has the same latents at every moment, so a picture's own latent stands at any of them.
        video = one.image.unsqueeze(2).expand(-1, -1, 17, -1, -1)
        expected = codec.encode(video)[:, :, place]
        torch.testing.assert_close(kept.latents[:, :, place], expected, atol=1e-5, rtol=1e-5)
    assert not kept.latents[:, :, [0, 1, 3]].any()


@pytest.mark.parametrize(
    ("config", "frames", "taken"),
    [
        (NetworkConfig(), (0, 8), []),
        (NetworkConfig(image_condition="token_replace"), (8, 0, -1), [0]),
        (NetworkConfig(image_condition="token_replace"), (8,), []),
        (NetworkConfig(accepts_first_frame=True), (0,), [0]),
    ],
)
def test_a_network_takes_what_it_was_trained_with(config: Any, frames: tuple[int, ...], taken: list[int]) -> None:
    given = [keyframe(frame) for frame in frames]
    own, others = taken_by_network(lambda some: RULES.check(config, some, 17), given)
    assert [one.frame for one in own] == taken
    assert [one.frame for one in others] == [frame for frame in frames if frame not in taken]


def test_a_first_frame_that_lets_go_is_not_the_networks() -> None:
    config = NetworkConfig(image_condition="token_replace")
    own, others = taken_by_network(lambda some: RULES.check(config, some, 17), [keyframe(0, until=0.3)])
    assert (len(own), len(others)) == (0, 1)


# --- keeping and letting go -------------------------------------------------------------------------------------------


def test_the_source_lets_go_at_its_time() -> None:
    source, until = torch.ones(1, 1, 3, 1, 1), torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 3, 1, 1)
    mask = torch.tensor([0.0, 0.25, 0.0]).reshape(1, 1, 3, 1, 1)
    kept = keep(lambda x, t: torch.zeros_like(x), source, mask, until)
    shares = {t: kept(torch.zeros(1, 1, 3, 1, 1), torch.tensor(t)).flatten().tolist() for t in (1.0, 0.51, 0.5, 0.01)}
    assert shares == {1.0: [1, 0.75, 0], 0.51: [1, 0.75, 0], 0.5: [1, 0, 0], 0.01: [1, 0, 0]}


def test_pictures_stand_at_their_frames(parts: Parts, cond: Any) -> None:
    positive, latent = prepared(parts, cond, row(0, 8, -1))
    assert [one.index for one in positive.images.keyframes] == [0]
    result = sampled(parts, positive, latent)
    for place, frame in ((0, 0), (2, 8), (4, -1)):
        # Divided by the scale and multiplied again, twice: some roundings of float32.
        torch.testing.assert_close(result[:, :, place], still(parts, frame % 7), atol=1e-5, rtol=1e-5)
    other = sampled(parts, positive, prepared(parts, cond, row(0, 12, -1))[1])
    assert float((other[:, :, 2] - result[:, :, 2]).abs().max()) > 0.1


def test_every_network_takes_pictures(text_only: Parts, cond: Any) -> None:
    positive, latent = prepared(text_only, cond, row(0, -1), batch_size=2)
    assert positive.images is None
    result = sampled(text_only, positive, latent)
    for sample in result.split(1):
        torch.testing.assert_close(sample[:, :, 0], still(text_only, 0), atol=1e-5, rtol=1e-5)
    assert float((result[0] - result[1])[:, 1:4].abs().max()) > 0.1  # each has its own seed between the pictures


def test_one_first_frame_is_image_to_video(parts: Parts, cond: Any) -> None:
    expected = ImageToVideo().prepare(parts[0], parts[1], cond, image(0), **SIZE, **WAY)["result"]
    assert torch.equal(sampled(parts, *prepared(parts, cond, row(0))), sampled(parts, *expected))


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"until": 1.0}])
def test_a_picture_without_force_changes_nothing(text_only: Parts, cond: Any, settings: dict[str, float]) -> None:
    (empty,) = EmptyLatent().make(text_only[1], 48, 32, 17, 1)
    plain = sampled(text_only, cond, empty)
    assert torch.equal(sampled(text_only, *prepared(text_only, cond, row(8, **settings))), plain)


def test_strength_and_release_are_between_all_and_nothing(text_only: Parts, cond: Any) -> None:
    wanted = still(text_only, 1)

    def distance(**settings: float) -> float:
        return float((sampled(text_only, *prepared(text_only, cond, row(8, **settings)))[:, :, 2] - wanted).norm())

    assert 0 <= distance() < distance(strength=0.7) < distance(strength=0.3) < distance(strength=0.0)
    assert distance() < distance(until=0.5) < distance(until=1.0)


# --- the nodes --------------------------------------------------------------------------------------------------------


def test_keyframes_in_a_row() -> None:
    first = row(0)
    both = PlaceKeyframe().place(image(1)[:, :20], -1, 0.5, 0.25, first)[0]
    assert both[0] is first[0]
    assert (both[1].frame, both[1].strength, both[1].until, both[1].image.shape) == (-1, 0.5, 0.25, (1, 20, 48, 3))
    assert len(first) == 1


def test_the_first_picture_of_the_row_says_the_size(parts: Parts, cond: Any) -> None:
    keyframes = PlaceKeyframe().place(image(0)[:, :, :20], 4, 1.0, 0.0, row(0))[0]
    made = KeyframesToVideo().prepare(parts[0], parts[1], cond, keyframes, **(SIZE | WAY | {"size": "image"}))
    assert made["result"][1]["samples"].shape == (1, 16, 5, 4, 6)


def test_a_network_that_needs_a_first_frame_says_so(parts: Parts, cond: Any) -> None:
    model = parts[0]
    config = replace(model.config, image_condition="token_replace")
    needy = VideoModel.of("hunyuan", config, model.network, defaults=model.defaults), *parts[1:]
    with pytest.raises(SettingsError, match="goes on from an image"):
        prepared(needy, cond, row(-1))


def test_no_such_frame_is_refused_before_any_work(parts: Parts, cond: Any) -> None:
    with pytest.raises(SettingsError, match="frame 20 of 17"):
        prepared(parts, cond, row(0, 20))


def test_pictures_with_transparency_are_refused_where_they_enter() -> None:
    with pytest.raises(SettingsError, match="colour channels"):
        PlaceKeyframe().place(torch.zeros(1, 8, 8, 4), 0, 1.0, 0.0)
