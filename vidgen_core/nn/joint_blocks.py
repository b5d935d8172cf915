"""Transformations around the blocks that video and text tokens pass together, put on from outside and taken off again.

A network takes part by having a method ``through_blocks(video, text, context) -> video`` between tokens in and tokens
out, whose context is a :class:`JointContext`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol, cast

from torch import Tensor, nn

from ..errors import SettingsError
from .attention import attending_with, current
from .backends import AttentionChoice, Dispatcher
from .sliding_tiles import Grid, SlidingTiles, sliding


class JointContext(Protocol):
    """What the blocks are told, as far as transformations need to know it."""

    @property
    def grid(self) -> Grid:
        """Video tokens along (frames, rows, columns)."""
        ...

    def of_part(self, take: Callable[[Tensor], Tensor]) -> Any:
        """The context of some video tokens, which ``take`` picks from a tensor (L, ...) of all of them.

        Vectors per frame stay as they are: each serves as many of the tokens as before, compared to the others.
        """
        ...


ThroughBlocks = Callable[[Tensor, Tensor, Any], Tensor]
"""``(video (B, L, D), text (B, M, D), context) -> video``"""
Wrap = Callable[[ThroughBlocks, Tensor, Tensor, Any], Tensor]
"""the same, told what stood there before"""


@contextlib.contextmanager
def around_blocks(network: nn.Module, wrap: Wrap) -> Iterator[None]:
    """``wrap`` around the blocks of ``network``, for the time of the block. Those put on later stand further out.

    Raises:
        SettingsError: the network has no such blocks.
    """
    inner = getattr(network, "through_blocks", None)
    if inner is None:
        raise SettingsError(
            "This network does not let its tokens be split or looked at in tiles",
            given=type(network).__name__,
            do="turn sliding tiles and context parallelism off",
        )
    own = vars(network).get("through_blocks")
    cast(Any, network).through_blocks = partial(wrap, inner)
    try:
        yield
    finally:
        if own is None:
            del network.through_blocks  # the class has its own
        else:
            cast(Any, network).through_blocks = own


@contextlib.contextmanager
def sliding_over(network: nn.Module, pattern: SlidingTiles | None) -> Iterator[None]:
    """Let the video tokens of ``network`` look at their neighbourhood only; None changes nothing."""
    if pattern is None:
        yield
        return

    def wrap(inner: ThroughBlocks, video: Tensor, text: Tensor, context: JointContext) -> Tensor:
        with attending_with(sliding(pattern, context.grid, current())):
            return inner(video, text, context)

    with around_blocks(network, wrap):
        yield


@contextlib.contextmanager
def computing_attention(network: nn.Module, choice: AttentionChoice | None) -> Iterator[None]:
    """Compute attention in the chosen way: everything in this block, and the pattern in ``network`` alone."""
    if choice is None:
        yield
        return
    with attending_with(Dispatcher(choice)), sliding_over(network, choice.tiles):
        yield
