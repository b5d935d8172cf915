"""Random numbers: one CPU generator per sample, so that a seed means one video.

Sample i of a batch draws from ``seed + i`` alone: a batch of four equals four single runs, and every device
and dtype gets the same numbers (drawn in float32 on the CPU, then moved). The idea of one generator per
sample is EDM's ``StackedRandomGenerator``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import SettingsError

SEED_LIMIT = 2**64
"""seeds are 64-bit and wrap around"""


class NoiseStream:
    """Standard normal noise for a batch, in an order that can be saved and taken up again."""

    def __init__(self, seeds: Sequence[int]) -> None:
        """One generator for each of ``seeds``; :class:`SettingsError` for a negative or fractional one."""
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
                raise SettingsError(
                    "The seed cannot be used",
                    given=repr(seed),
                    expected="a whole number from 0 to 18446744073709551615",
                    do="use another seed, for example 0",
                )
        self.seeds = tuple(seeds)
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    @classmethod
    def of_batch(cls, seed: int, batch: int) -> NoiseStream:
        """The stream for ``batch`` samples: seed, seed + 1, ..."""
        return cls([(seed + index) % SEED_LIMIT for index in range(batch)])

    def draw(
        self,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(B, *shape) of fresh noise; ``shape`` is one sample's."""
        samples = [torch.randn(tuple(shape), generator=generator) for generator in self._generators]
        return torch.stack(samples).to(device=device, dtype=dtype)

    def state(self) -> Tensor:
        """(B, bytes) uint8: where each generator stands."""
        return torch.stack([generator.get_state() for generator in self._generators])

    def load_state(self, state: Tensor) -> None:
        """Continue from :meth:`state`; :class:`SettingsError` if it was made for another batch size."""
        if state.shape != self.state().shape:
            raise SettingsError(
                "The saved noise belongs to another batch size or version of torch",
                given=f"{len(state)} samples of {state[0].numel() if len(state) else 0} bytes",
                expected=f"{len(self._generators)} samples of {self.state().shape[1]} bytes",
                do="resume with the batch size the run was started with",
            )
        for generator, own in zip(self._generators, state.cpu(), strict=True):
            # A copy: set_state crashes the process on a view that does not begin its storage.
            generator.set_state(own.clone())
