"""The procedural world and its detectors: what a caption says is what the pixels show."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vidgen.training.data import detect, shapes

NUM_CLIPS = 100


@pytest.fixture(scope="module")
def judged() -> tuple[Counter, list[str]]:
    """How often each detector is right on rendered truth, over both splits, and what went wrong."""
    right: Counter = Counter()
    wrong = []
    for index in range(NUM_CLIPS):
        rng = np.random.default_rng([41, index])
        scene = shapes.sample_scene(rng, "heldout" if index % 3 == 0 else "seen")
        seen = detect.detect(shapes.render(scene))
        for name in detect.JUDGED:
            right[name] += seen[name] == getattr(scene, name)
            if seen[name] != getattr(scene, name):
                wrong.append(f"{name}: {seen[name]} for {scene}")
    return right, wrong


@pytest.mark.parametrize("name", detect.JUDGED)
def test_detectors_are_right_on_ground_truth(judged: tuple[Counter, list[str]], name: str) -> None:
    right, wrong = judged
    assert right[name] >= 0.98 * NUM_CLIPS, [line for line in wrong if line.startswith(name)]


def test_detectors_see_nothing_where_there_is_nothing() -> None:
    empty = np.full((3, 17, 64, 64), 127, dtype=np.uint8)
    assert set(detect.detect(empty).values()) == {"none"}
    noise = np.random.default_rng(0).integers(0, 255, (3, 17, 64, 64)).astype(np.uint8)
    assert detect.detect(noise)["count"] != "one"


def test_detectors_do_not_depend_on_size_in_pixels() -> None:
    scene = shapes.compose_scene(
        np.random.default_rng(3), shape="heart", colour="blue", motion="left", camera="zoom in"
    )
    seen = detect.detect(shapes.render(scene, height_px=96, width_px=128))
    assert (seen["shape"], seen["colour"], seen["motion"], seen["camera"]) == ("heart", "blue", "left", "zoom in")


def test_held_out_triples_are_a_tenth_and_never_in_training() -> None:
    triples = [(s, c, m) for s in shapes.SHAPES for c in shapes.COLOURS for m in shapes.MOTIONS]
    held_out = {triple for triple in triples if shapes.is_held_out(*triple)}
    assert 0.08 < len(held_out) / len(triples) < 0.12
    for i, j in ((0, 1), (0, 2), (1, 2)):  # every pair of values still occurs in training
        trained = {(t[i], t[j]) for t in triples if t not in held_out}
        assert trained == {(t[i], t[j]) for t in triples}
    rng = np.random.default_rng(0)
    for split, expected in (("train", False), ("seen", False), ("heldout", True)):
        for _ in range(200):
            scene = shapes.sample_scene(rng, split)
            assert ((scene.shape, scene.colour, scene.motion) in held_out) == expected


def test_a_seed_is_a_clip() -> None:
    first, second = (shapes.render(shapes.sample_scene(np.random.default_rng(7))) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape == (3, 17, 64, 64)
    np.testing.assert_array_equal(first, second)
    image = shapes.render(shapes.sample_scene(np.random.default_rng(7)), num_frames=1, start=4)
    np.testing.assert_array_equal(image[:, 0], first[:, 4])


def test_edges_are_anti_aliased() -> None:
    """A slow pan by a fraction of a pixel changes an edge by a fraction of its contrast, not at once."""
    scene = shapes.compose_scene(np.random.default_rng(1), shape="circle", motion="left", camera="static", count="one")
    a = shapes.render(scene, num_frames=1, start=4.0).astype(int)
    b = shapes.render(scene, num_frames=1, start=4.05).astype(int)
    assert 0 < np.abs(a - b).max() < 40


def test_objects_stay_in_the_frame() -> None:
    for seed in range(60):
        scene = shapes.compose_scene(np.random.default_rng(seed), count="one", size="small")
        masks = detect.object_masks(shapes.render(scene).astype(np.float32) / 255)
        border = masks[:, 0].any() or masks[:, -1].any() or masks[:, :, 0].any() or masks[:, :, -1].any()
        assert not border, scene


def test_captions_speak_only_known_words_and_state_what_they_claim() -> None:
    lengths = set()
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = shapes.sample_scene(rng)
        text, stated = shapes.caption_with_fields(scene, rng, image=seed % 5 == 0)
        words = text.replace(",", " ,").split()
        assert set(words) <= set(shapes.VOCABULARY), text
        assert {"shape", "colour", "count"} <= stated
        assert ("motion" in stated) == (seed % 5 != 0)
        lengths.add(len(words))
    assert min(lengths) <= 6  # short phrasings
    assert max(lengths) >= 18  # and long ones


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be"):
        shapes.sample_scene(np.random.default_rng(0), "test")
