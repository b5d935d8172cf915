"""Context windows: every frame is seen, what is no longer than a window is not touched, loops have no beginning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.types import Conditioning, Held
from vidgen.vidgen_core.windows import BLENDS, SCHEDULES, Frames, Windows, shuffled_noise, windowed

X = torch.randn(2, 3, 12, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor(0.5, dtype=torch.float64)


def step_of(t: float) -> int:
    return round(10 * (1 - t))


def blended(network: Callable[[Tensor, Tensor], Tensor], windows: Windows, x: Tensor = X, **fields: Any) -> Tensor:
    return windowed(lambda frames: network, windows, x.shape[2], step_of=step_of, **fields)(x, T)


# --- where windows lie ------------------------------------------------------------------------------------------------


def test_static_places_by_hand() -> None:
    windows = Windows(size=5, overlap=2)
    assert windows.places(12, 3) == [(0, 1, 2, 3, 4), (3, 4, 5, 6, 7), (6, 7, 8, 9, 10), (7, 8, 9, 10, 11)]
    assert Windows(size=4, overlap=0).places(8, 0) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_uniform_places_move_and_looped_ones_close_the_circle() -> None:
    uniform = Windows(size=4, overlap=2, schedule="uniform")
    assert uniform.places(8, 0) == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 6, 7)]
    assert uniform.places(8, 1) == [(0, 1, 2, 3), (1, 2, 3, 4), (3, 4, 5, 6), (4, 5, 6, 7)]
    looped = Windows(size=4, overlap=2, schedule="looped")
    assert looped.places(6, 0) == [(0, 1, 2, 3), (2, 3, 4, 5), (4, 5, 0, 1)]
    assert looped.places(6, 1) == [(1, 2, 3, 4), (3, 4, 5, 0), (5, 0, 1, 2)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("share_first", [False, True])
def test_every_frame_is_in_some_window_of_the_right_size(schedule: str, size: int, share_first: bool) -> None:
    if schedule == "looped" and share_first:
        return
    for overlap in range(size - 1):
        windows = Windows(size=size, overlap=overlap, schedule=schedule)
        for num_frames in range(size + 1, 20):
            for step in range(5):
                places = windows.places(num_frames, step, share_first=share_first)
                assert {len(frames) for frames in places} == {size}
                assert {frame for frames in places for frame in frames} == set(range(num_frames))
                assert all(len(set(frames)) == size for frames in places)
                assert len(set(places)) == len(places)
                assert not share_first or all(frames[0] == 0 for frames in places)
                counted = torch.zeros(num_frames)
                for frames in places:
                    counted.index_add_(0, torch.tensor(frames), windows.weights(frames, share_first=share_first))
                assert bool((counted > 0).all())


def test_weights_by_hand() -> None:
    frames = (4, 5, 6, 7, 8)
    assert Windows(size=5).weights(frames).tolist() == [1, 2, 3, 2, 1]
    assert Windows(size=5, blend="flat").weights(frames).tolist() == [1, 1, 1, 1, 1]
    assert Windows(size=5).weights((0, 1, 2, 3, 4), share_first=True).tolist() == [1, 1, 2, 2, 1]
    assert Windows(size=5).weights((0, 4, 5, 6, 7), share_first=True).tolist() == [0, 1, 2, 2, 1]


# --- blending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("blend", BLENDS)
def test_what_looks_at_no_other_frame_is_not_changed_by_windows(schedule: str, blend: str) -> None:
    """Weights add up to 1, so equal answers stay what they are; float64 rounding of a mean."""
    windows = Windows(size=5, overlap=2, schedule=schedule, blend=blend)
    torch.testing.assert_close(blended(lambda x, t: x.sin(), windows), X.sin(), rtol=0, atol=1e-14)
    if schedule != "looped":
        shared = blended(lambda x, t: x.sin(), windows, share_first=True)
        torch.testing.assert_close(shared, X.sin(), rtol=0, atol=1e-14)


def mean_over_frames(x: Tensor, t: Tensor) -> Tensor:
    return x - x.mean(dim=2, keepdim=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_window_as_long_as_the_video_is_the_network_itself(schedule: str) -> None:
    windows = Windows(size=12, overlap=4, schedule=schedule)
    assert windows.places(12, 3) == [tuple(range(12))]
    torch.testing.assert_close(blended(mean_over_frames, windows), mean_over_frames(X, T), rtol=0, atol=1e-14)


def test_windows_without_overlap_are_separate_videos() -> None:
    out = blended(mean_over_frames, Windows(size=4, overlap=0))
    expected = torch.cat([mean_over_frames(part, T) for part in X.split(4, dim=2)], dim=2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


def test_overlaps_are_weighted_means_by_hand() -> None:
    """Two windows of 3 over 4 frames; answers are the window's own number."""
    x = torch.zeros(1, 1, 4, 1, 1)
    answers = {(0, 1, 2): 1.0, (1, 2, 3): 4.0}

    def of(frames: Frames) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: torch.full_like(x, answers[frames])

    out = windowed(of, Windows(size=3, overlap=2 - 1, blend="flat"), 4, step_of=step_of)(x, T)
    assert out.flatten().tolist() == [1.0, 2.5, 2.5, 4.0]
    out = windowed(of, Windows(size=3, overlap=1), 4, step_of=step_of)(x, T)
    assert out.flatten().tolist() == pytest.approx([1.0, (2 + 4) / 3, (1 + 8) / 3, 4.0])


@pytest.mark.parametrize("step", [0, 1, 2, 5])
@pytest.mark.parametrize("blend", BLENDS)
def test_a_loop_has_no_beginning(step: int, blend: str) -> None:
    """Turning the video by a stride turns the answer by it, where the strides fill the circle."""
    windows = Windows(size=5, overlap=2, schedule="looped", blend=blend)
    t = torch.tensor(1 - step / 10, dtype=torch.float64)

    def network(x: Tensor, t: Tensor) -> Tensor:
        position = torch.arange(x.shape[2], dtype=x.dtype).reshape(1, 1, -1, 1, 1)
        return (x * (1 + position)).cumsum(dim=2)

    denoise = windowed(lambda frames: network, windows, 12, step_of=step_of)
    for stride in (3, 6, -3):
        turned = denoise(X.roll(stride, dims=2), t)
        torch.testing.assert_close(turned, denoise(X, t).roll(stride, dims=2), rtol=0, atol=1e-12)
    straight = windowed(lambda frames: network, Windows(size=5, overlap=2, blend=blend), 12, step_of=step_of)
    assert not torch.allclose(straight(X.roll(3, dims=2), t), straight(X, t).roll(3, dims=2))


def test_each_window_is_told_its_frames_and_their_times() -> None:
    seen: dict[Frames, tuple[Tensor, Tensor]] = {}

    def of(frames: Frames) -> Callable[[Tensor, Tensor], Tensor]:
        def network(x: Tensor, t: Tensor) -> Tensor:
            seen[frames] = x, t
            return x

        return network

    times = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(1, 1, 12, 1, 1)
    windowed(of, Windows(size=5, overlap=2), 12, step_of=step_of, share_first=True)(X, times)
    assert all(frames[0] == 0 for frames in seen)
    for frames, (x, t) in seen.items():
        assert torch.equal(x, X[:, :, list(frames)])
        assert torch.equal(t, times[:, :, list(frames)])


def test_denoisers_of_windows_that_stay_are_kept() -> None:
    """A step cache remembers inside of them."""
    made: list[Frames] = []

    def of(frames: Frames) -> Callable[[Tensor, Tensor], Tensor]:
        made.append(frames)
        return lambda x, t: x

    for schedule, count in (("static", 4), ("uniform", 4 + 4)):
        made.clear()
        denoise = windowed(of, Windows(size=5, overlap=2, schedule=schedule), 12, step_of=step_of)
        for step in (0, 1, 1):
            denoise(X, torch.tensor(1 - step / 10))
        assert len(made) == count - (2 if schedule == "uniform" else 0)


def test_a_conditioning_is_cut_like_the_video() -> None:
    concat, mask = torch.randn(1, 2, 12, 1, 1), torch.zeros(1, 1, 12, 1, 1, dtype=torch.bool)
    context = torch.randn(1, 3, 4)
    cut = Conditioning(context=context, concat=concat, held=Held(latents=concat, mask=mask)).at_frames((0, 5, 6))
    assert torch.equal(cut.concat, concat[:, :, [0, 5, 6]])
    assert torch.equal(cut.held.latents, concat[:, :, [0, 5, 6]])
    assert cut.held.mask.shape == (1, 1, 3, 1, 1)
    assert cut.context is context


# --- FreeNoise --------------------------------------------------------------------------------------------------------


def noise_of(num_frames: int, batch: int = 2) -> Tensor:
    """Every frame is its own number, so that it is known again."""
    return torch.arange(num_frames * batch, dtype=torch.float32).reshape(batch, 1, num_frames, 1, 1)


def test_every_window_of_shuffled_noise_holds_the_first_one() -> None:
    windows = Windows(size=6, overlap=4)
    noise = noise_of(15)
    shuffled = shuffled_noise(noise, windows, [3, 4])
    assert torch.equal(shuffled[:, :, :6], noise[:, :, :6])
    for start in range(0, 15 - 6 + 1, 2):
        window = shuffled[:, 0, start : start + 6, 0, 0]
        assert torch.equal(window.sort(dim=1).values, noise[:, 0, :6, 0, 0])
    assert not torch.equal(shuffled[0, 0, 6:12], shuffled[0, 0, :6])


def test_shuffled_noise_of_a_batch_is_that_of_each_seed() -> None:
    windows, noise = Windows(size=5, overlap=1), noise_of(14)
    both = shuffled_noise(noise, windows, [3, 4])
    assert torch.equal(both[1:], shuffled_noise(noise[1:], windows, [4]))
    assert not torch.equal(both[0] - noise[0, :, :1], both[1] - noise[1, :, :1])


def test_noise_that_fits_a_window_is_not_touched() -> None:
    noise = noise_of(6)
    assert shuffled_noise(noise, Windows(size=6, overlap=2), [0, 1]) is noise


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"size": 1}, "2 latent frames or more"),
        ({"size": 5, "overlap": 4}, "overlap below"),
        ({"size": 5, "overlap": -1}, "overlap below"),
        ({"size": 5, "schedule": "loop"}, 'did you mean "looped"'),
        ({"size": 5, "blend": "pyramids"}, 'did you mean "pyramid"'),
        ({"size": 5, "schedule": "looped", "share_first": True}, "no first frame"),
    ],
)
def test_unusable_windows_say_what_to_do(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Windows(**fields)


def test_a_loop_does_not_go_through_a_given_picture() -> None:
    with pytest.raises(SettingsError, match="loop"):
        Windows(size=5, schedule="looped").shares_first(True)
    assert Windows(size=5).shares_first(True)
    assert not Windows(size=5).shares_first(False)
    assert not Windows(size=5, share_first=False).shares_first(True)
