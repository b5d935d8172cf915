"""One part of a family beside its peer's: what a family must say so that the two can be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Model = TypeVar("Model")

Latents = tuple[int, int, int]
"""frames, rows, columns"""
PARTS = ("network", "codec", "text", "loader")
DTYPES = ("fp32", "bf16", "fp8")
"""fp8: linear weights are stored as float8 e4m3 and computed with as bfloat16"""
PEERS = ("default", "tiled", "untiled")
"""how the peer's codec decodes"""
SIZES = ("reduced", "tiny")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What was asked on the command line."""

    part: str
    dtype: str = "fp32"
    device: str = "cpu"
    valid_text: int = 64
    """text tokens of 256 that are no padding"""
    peer: str = "untiled"
    size: str = "reduced"

    @property
    def torch_dtype(self) -> torch.dtype:
        """That of activations; float8 is for storage."""
        import torch

        return torch.float32 if self.dtype == "fp32" else torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two, ready to run."""

    run: Callable[[], Any]
    """what is timed"""
    answer: Callable[[Any], Tensor]
    """what ``run`` gave -> the numbers in which both sides must agree; not timed"""
    modules: tuple[nn.Module, ...] = ()
    """whose weights are brought into memory before a peak is measured"""


def loading(load: Callable[[], Model], network: Callable[[Model], nn.Module], ask: Callable[[Model], Tensor]) -> Side:
    """A side that reads a file until every weight lies in memory; it answers with what the loaded model computes."""

    def run() -> Model:
        model = load()
        touch(network(model))
        return model

    return Side(run=run, answer=ask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """Both sides. They are built from files in one folder, so that each can be measured without the other."""

    prepare: Callable[[Path], None]
    """write the same random weights for both"""
    ours: Callable[[Path], Side]
    peer: Callable[[Path], Side]
    peer_name: str
    exact: Callable[[Path], Side] | None = None
    """ours in float32, where both round: how far each is from it"""
    bar: float | None = None
    """the most that ours / peer may be"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """sizes, for the report"""


PAGE_BYTES = 4096


def touch(*modules: nn.Module) -> int:
    """Read a byte of every page of the weights that lie in main memory, so that they are there; the bytes' sum."""
    import torch

    total = 0
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == "cpu":
                total += int(tensor.detach().contiguous().view(-1).view(torch.uint8)[::PAGE_BYTES].sum())
    return total
