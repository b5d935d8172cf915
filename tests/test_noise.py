"""A seed means one video: independent of batch size and dtype, and continued exactly."""

from __future__ import annotations

import pytest
import torch

from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.noise import NoiseStream


def test_a_batch_of_four_is_four_single_runs() -> None:
    batch = NoiseStream.of_batch(7, 4)
    singles = [NoiseStream([7 + index]) for index in range(4)]
    for shape in ((3, 5), (16, 2, 4, 4), (1,)):
        assert torch.equal(batch.draw(shape), torch.cat([single.draw(shape) for single in singles]))


def test_numbers_do_not_depend_on_the_dtype_asked_for() -> None:
    single, double = NoiseStream([1]).draw((100,)), NoiseStream([1]).draw((100,), dtype=torch.float64)
    assert double.dtype == torch.float64
    assert torch.equal(single, double.float())


@pytest.mark.parametrize("shape", [(3,), (17,), (4, 8, 8)])
def test_a_stream_continues_from_its_state(shape: tuple[int, ...]) -> None:
    """Small shapes too: there torch draws pairs and keeps the second number for later."""
    stream = NoiseStream([3, 4])
    stream.draw(shape)
    state = stream.state()
    expected = stream.draw(shape)
    other = NoiseStream([3, 4])
    other.load_state(state)
    assert torch.equal(other.draw(shape), expected)


def test_noise_is_standard_normal() -> None:
    noise = NoiseStream([0]).draw((100_000,))
    # Standard errors are 0.003 and 0.002; five of them.
    assert abs(noise.mean().item()) < 0.016
    assert abs(noise.std().item() - 1) < 0.012


def test_seeds_wrap_around_at_64_bits() -> None:
    top = 2**64 - 1
    assert NoiseStream.of_batch(top, 2).seeds == (top, 0)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "7"])
def test_unusable_seeds_are_refused(seed: object) -> None:
    with pytest.raises(SettingsError, match="seed"):
        NoiseStream([seed])  # type: ignore[list-item]


def test_the_state_of_another_batch_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="batch size"):
        NoiseStream([1]).load_state(NoiseStream([1, 2]).state())
    with pytest.raises(SettingsError, match="16 bytes"):
        NoiseStream([1]).load_state(torch.zeros(1, 16, dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gets_the_same_numbers() -> None:
    assert torch.equal(NoiseStream([5]).draw((64,), device="cuda").cpu(), NoiseStream([5]).draw((64,)))
