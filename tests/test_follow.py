"""The Frechet ratio of the follow benchmark, on sets whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from vidgen.benchmarks.follow import NUM_FEATURES, NUM_TRUE_SETS, distances, frechet_distance

NUM = 256


def drawn(seed: int, *, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """Correlated features of widely different sizes."""
    mix = np.random.default_rng(0).normal(size=(NUM_FEATURES, NUM_FEATURES)) * np.linspace(0.1, 10, NUM_FEATURES)
    return (
        mean * mix.std(0) * NUM_FEATURES**0.5
        + spread * np.random.default_rng(seed).normal(size=(NUM, NUM_FEATURES)) @ mix
    )


TRUE = [drawn(seed) for seed in range(1, 1 + NUM_TRUE_SETS)]


def test_gaussians_have_the_distance_of_the_formula() -> None:
    """|m - n|^2 + (s - r)^2 for one pair of numbers that do not depend on each other."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(400_000, 2)), 3 + 2 * rng.normal(size=(400_000, 2))
    assert frechet_distance(a, b) == pytest.approx(2 * (9 + 1), rel=0.01)


def test_another_true_set_has_a_ratio_of_one() -> None:
    found = distances(drawn(99), TRUE)
    assert found["frechet_ratio"] == pytest.approx(1, abs=0.1)
    assert found["frechet_truth_lowest"] < found["frechet_truth"] < found["frechet_truth_highest"]


@pytest.mark.parametrize("other", [{"mean": 0.3}, {"spread": 0.5}])
def test_another_distribution_has_a_larger_one(other: dict[str, float]) -> None:
    assert distances(drawn(99, **other), TRUE)["frechet_ratio"] > 1.5
