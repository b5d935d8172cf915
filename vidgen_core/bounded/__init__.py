"""Exact coding within a bound: what one pass gives, up to rounding, in as much memory as the caller allows.

Each layer runs strip by strip (rows) and slab by slab (frames). Group norms get the statistics of the whole video,
attention sees all frames so far, and between layers a video lies in memory or in a nameless file, or is computed
again: :mod:`.planner` decides. Nothing is blended, so there is no seam that could show.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..codec import Codec, draw
from ..errors import SettingsError
from ..memory.host import available_memory
from ..nn.strips import Chain, Size
from ..types import Grid, VideoShape
from .planner import Job, Plan, make, smallest_bytes
from .run import OnTile, Run
from .volumes import Input, Spill, Store

Direction = Literal["decode", "encode"]


@runtime_checkable
class LayeredCodec(Codec, Protocol):
    """A codec that says of which layers it is made."""

    def decoder_chain(self) -> Chain: ...

    def encoder_chain(self) -> Chain: ...

    def moments_of(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C', T', H', W') of the encoder's chain -> mean and log variance at unit scale."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A wish for exact coding, as :func:`exact` takes it."""

    budget_bytes: int | None = None
    """None: half of what is free when coding begins"""
    spill: Spill = None

    def on(self, codec: Codec, *, on_tile: OnTile | None = None) -> ExactCodec:
        """``codec`` within this bound."""
        layered = exact(codec, self.budget_bytes or 0, spill=self.spill, on_tile=on_tile)
        if self.budget_bytes is not None:
            return layered
        return replace(layered, budget_bytes=_free(layered.codec.decoder_chain().weight.device) // 2)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def exact(codec: Codec, budget_bytes: int, *, spill: Spill = None, on_tile: OnTile | None = None) -> ExactCodec:
    """``codec`` with the same results, up to rounding, and the same interface, within a bound.

    Args:
        budget_bytes: what coding may take on the codec's device above the weights and what it is given; the result
            counts where it is on that device, too.
        spill: where layers go that the bound has no room for: a folder for a nameless file, ``"ram"`` for main
            memory where the codec is on a GPU, or None, so that they are computed again.
        on_tile: called after each strip with (done, total), for progress and for cancelling by raising.

    Raises:
        SettingsError: a codec that does not say what it is made of. A bound too small is refused when the size of
            the video is known, before any work, with the smallest that would do.
    """
    if not isinstance(codec, LayeredCodec):
        raise SettingsError(
            "This codec cannot be run layer by layer", given=type(codec).__name__, do="decode in tiles instead"
        )
    return ExactCodec(codec, budget_bytes, spill, on_tile)


def plan(
    codec: LayeredCodec,
    direction: Direction,
    shape: VideoShape,
    budget_bytes: int,
    *,
    spills: bool = False,
    in_time_order: bool = False,
    counts_result: bool = True,
) -> Plan:
    """What :func:`exact` would do with one video of this size; arithmetic, so the weights may be on the meta device.

    Args:
        spills: whether layers may be spilled.
        in_time_order: for :meth:`ExactCodec.frames`.
        counts_result: whether the result is on the codec's device.

    Raises:
        SettingsError: the bound is too small; it names the smallest.
    """
    job = _job(codec, direction, shape, in_time_order=in_time_order, counts_result=counts_result)
    return make(job, budget_bytes, spills=spills)


def smallest_budget(
    codec: LayeredCodec,
    direction: Direction,
    shape: VideoShape,
    *,
    spills: bool = False,
    in_time_order: bool = False,
    counts_result: bool = True,
) -> int:
    """The smallest bound, in bytes, that :func:`plan` and :func:`exact` accept for one video of this size."""
    job = _job(codec, direction, shape, in_time_order=in_time_order, counts_result=counts_result)
    return smallest_bytes(job, spills=spills)


@dataclass(frozen=True, slots=True)
class ExactCodec:
    """A :class:`Codec` that works within a bound; results are collected on the device of what it is given."""

    codec: LayeredCodec
    budget_bytes: int
    spill: Spill = None
    on_tile: OnTile | None = None

    @property
    def grid(self) -> Grid:
        """How many pixels and frames one latent stands for."""
        return self.codec.grid

    @torch.no_grad()
    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) in [-1, 1] -> mean and log variance at unit scale."""
        chain = self.codec.encoder_chain()
        _check_video(video, chain, "video")
        VideoShape(num_frames=video.shape[2], height_px=video.shape[3], width_px=video.shape[4]).check(self.grid)
        return self.codec.moments_of(self._all(video, chain))

    @torch.no_grad()
    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, C, T', H', W') at unit scale: the mode, or a sample with a generator."""
        return draw(*self.moments(video), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, T', H', W') at unit scale -> (B, 3, T, H, W), about [-1, 1]."""
        chain = self.codec.decoder_chain()
        _check_video(latents, chain, "latents")
        return self._all(latents, chain)

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Generator[Tensor, None, None]:
        """The video of one sample's latents as (3, n, H, W), a few frames at a time and in order.

        Only a few finished frames are in memory at a time.
        """
        chain = self.codec.decoder_chain()
        _check_video(latents, chain, "latents")
        if len(latents) != 1:
            raise SettingsError("Frames come from one video", given=f"a batch of {len(latents)}", expected="1")
        weight = chain.weight
        job = Job(
            blocks=chain.blocks,
            given=Size(*latents.shape[1:]),
            itemsize=weight.element_size(),
            counts_result=False,
            in_time_order=True,
        )
        made = make(job, self.budget_bytes, spills=self.spill is not None)
        with closing(Store(weight.dtype, weight.device, self.spill)) as store:
            store.check_room(made.spilled_bytes)
            for frames in Run(job, made, store, self.on_tile).frames(Input(latents[0], chain.before)):
                yield frames.permute(3, 0, 1, 2)

    def _all(self, given: Tensor, chain: Chain) -> Tensor:
        weight = chain.weight
        counts = given.device.type == weight.device.type
        job = Job(
            blocks=chain.blocks, given=Size(*given.shape[1:]), itemsize=weight.element_size(), counts_result=counts
        )
        size = job.sizes()[-1]
        others = (len(given) - 1) * size.count * job.itemsize if counts else 0
        made = make(job, self.budget_bytes - others, spills=self.spill is not None)
        result = torch.empty(len(given), *size, dtype=weight.dtype, device=given.device)
        for number, (one, out) in enumerate(zip(given, result, strict=True)):
            with closing(Store(weight.dtype, weight.device, self.spill)) as store:
                store.check_room(made.spilled_bytes)
                on_tile = _of_many(self.on_tile, number, len(given))
                Run(job, made, store, on_tile).whole(Input(one, chain.before), out)
        return result


def _of_many(on_tile: OnTile | None, number: int, count: int) -> OnTile | None:
    if on_tile is None or count == 1:
        return on_tile
    return lambda done, total: on_tile(number * total + done, count * total)


def _check_video(x: Tensor, chain: Chain, name: str) -> None:
    channels = chain.weight.shape[1]
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise SettingsError(
            f"The {name} cannot be used",
            given=f"a tensor of shape {tuple(x.shape)}",
            expected=f"(batch, {channels}, frames, height, width), none of them 0",
        )


def _job(
    codec: LayeredCodec, direction: Direction, shape: VideoShape, *, in_time_order: bool, counts_result: bool
) -> Job:
    shape.check(codec.grid)
    chain = codec.decoder_chain() if direction == "decode" else codec.encoder_chain()
    weight = chain.weight
    given = Size(weight.shape[1], shape.num_frames, shape.height_px, shape.width_px)
    if direction == "decode":
        given = Size(*shape.latent_shape(codec.grid))
    return Job(
        blocks=chain.blocks,
        given=given,
        itemsize=weight.element_size(),
        counts_result=counts_result,
        in_time_order=in_time_order,
    )
