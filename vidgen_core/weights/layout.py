"""What a foreign naming of a model's weights must be able to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Layout(Protocol):
    """A foreign naming of the same weights; ``weights.keymap.KeyMap`` is one."""

    def to_native(self, foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename, join and cut. Also called with the tensors of one module or block alone."""
        ...

    def native_names(self, foreign: Iterable[str]) -> dict[str, str]:
        """foreign name -> native name, for the names of a whole file; what is left out is not loaded."""
        ...
