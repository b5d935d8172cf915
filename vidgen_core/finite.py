"""Whether numbers are finite: a check that costs next to nothing and never makes a GPU wait."""

from __future__ import annotations

import torch
from torch import Tensor


class Flag:
    """Whether all numbers of a tensor are finite. On a GPU the answer comes later, and asking does not wait for it."""

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        # The smallest and the largest number: no second tensor, and NaN makes both of them NaN.
        x = x.detach()
        ends = torch.stack((x.amin(), x.amax()) if x.device.type == "mps" else torch.aminmax(x))
        if ends.is_cuda:
            self._ends = torch.empty(2, dtype=ends.dtype, pin_memory=True)
            self._ends.copy_(ends, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._ends = ends

    @property
    def is_known(self) -> bool:
        """Asking would not wait."""
        return self._event is None or self._event.query()

    def __bool__(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._ends.isfinite().all())


def is_finite(x: Tensor) -> bool:
    """Whether all numbers of ``x`` are finite; waits for a GPU."""
    return x.numel() == 0 or bool(Flag(x))
