"""Layers of a convolutional codec, run on a strip of rows and a few frames at a time, with the result of the whole.

A strip knows which rows of its input it needs (its halo), replicates edges only where the video itself ends, and
carries the last frames of the slab before. So all strips and slabs together compute every output sample once, from
the same numbers as one pass does, except for the rows that neighbouring strips both need between two layers. What a
strip cannot see are the statistics of group norms: they are collected beforehand, over whole layers, by
:class:`Statistics`.

Inside a strip a tensor is (T, rows, W, C): a few rows of a frame are then one piece of memory, and convolutions get
their input with the channels last, which the libraries compute fastest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import CausalConv3d, UpsampledCausalConv3d, phase_pairs
from .scratch import Scratch

T = TypeVar("T")
Rows = tuple[int, int]
"""The first row, and the one after the last."""
STATISTICS_PART = 1 << 18
"""Numbers at a time, so that the differences from the reference stay in a processor's cache."""


class Size(NamedTuple):
    """(C, T, H, W) of one video between two layers."""

    channels: int
    frames: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        return math.prod(self)

    @property
    def row_count(self) -> int:
        """Numbers in one row of all frames."""
        return self.channels * self.frames * self.columns


class Affine(NamedTuple):
    """What is left of a group norm once its statistics are known: ``x * scale + shift``, each (C,)."""

    scale: Tensor
    shift: Tensor


class Push(Protocol):
    """One layer, or several, on one strip: takes frames in order and gives those that are finished."""

    rows: Rows
    """of the input"""

    def push(self, frames: Tensor) -> Tensor | None:
        """(n, rows, W, C) -> (m, rows', W', C'), or None while more frames are needed.

        What is given back may lie in scratch memory, until the next push.
        """
        ...


class Layer(Protocol):
    """A local layer: an output sample depends on a few rows, columns and earlier frames of the input."""

    @property
    def norm(self) -> nn.GroupNorm | None:
        """Applied to the input, with statistics of all of it."""
        ...

    def size(self, given: Size) -> Size:
        """Of the output."""
        ...

    def halo(self, rows: Rows, height: int) -> Rows:
        """The rows of an input of ``height`` that these rows of the output depend on."""
        ...

    def strip(self, given: Size, rows: Rows, affines: Affines, scratch: Scratch) -> Push:
        """Start on these rows of the output, at the first frame; ``given`` is the size of the whole input."""
        ...

    def work(self, given: Size, rows: Rows, frames: int, itemsize: int) -> tuple[int, int]:
        """(bytes of scratch memory, bytes needed besides while it runs, its output included, its input not) for a strip
        of these rows of the output and this many frames of the input at a time."""
        ...

    def macs(self, given: Size) -> int:
        """Multiplications of one row of the output, over all frames and columns."""
        ...

    @property
    def weight_bytes(self) -> int: ...


@dataclass(frozen=True, eq=False, slots=True)
class ConvLayer:
    """[Group norm, then SiLU,] then a convolution with replicated edges that looks at earlier frames only."""

    conv: nn.Conv3d
    norm: nn.GroupNorm | None = None

    @classmethod
    def of(cls, conv: CausalConv3d, norm: nn.GroupNorm | None = None) -> ConvLayer:
        return cls(conv.conv, norm)

    @property
    def kernel(self) -> tuple[int, int, int]:
        time, height, width = self.conv.kernel_size
        return time, height, width

    def size(self, given: Size) -> Size:
        time, height, width = self.conv.stride
        frames, rows, columns = (given.frames - 1) // time, (given.rows - 1) // height, (given.columns - 1) // width
        return Size(self.conv.out_channels, frames + 1, rows + 1, columns + 1)

    def _reach(self, rows: Rows) -> Rows:
        step, taps = self.conv.stride[1], self.kernel[1]
        return step * rows[0] - taps // 2, step * (rows[1] - 1) - taps // 2 + taps

    def halo(self, rows: Rows, height: int) -> Rows:
        return clip(self._reach(rows), height)

    def strip(self, given: Size, rows: Rows, affines: Affines, scratch: Scratch) -> Push:
        reach, side, front = self._reach(rows), self.kernel[2] // 2, self.kernel[0] - 1
        place = _Place(scratch, self)
        return _ConvStrip(self.conv, _Window(reach, given.rows, side, front, affines.get(self), place), place)

    def work(self, given: Size, rows: Rows, frames: int, itemsize: int) -> tuple[int, int]:
        window = _window_bytes(given, self._reach(rows), self.kernel, frames, itemsize)
        out = self.size(given)
        made = -(-frames // self.conv.stride[0]) * (rows[1] - rows[0]) * out.columns * out.channels * itemsize
        frame = slab_bytes(given, self.halo(rows, given.rows), 1, itemsize)
        return window + self.weight_bytes, made + _norm_bytes(self.norm, frame, itemsize) + self.weight_bytes

    def macs(self, given: Size) -> int:
        out = self.size(given)
        return out.frames * out.columns * out.channels * given.channels * math.prod(self.kernel)

    @property
    def weight_bytes(self) -> int:
        return _bytes(self.conv.weight)


@dataclass(frozen=True, eq=False, slots=True)
class UpsampleLayer:
    """Nearest neighbour and a causal convolution as one: see :class:`UpsampledCausalConv3d`."""

    module: UpsampledCausalConv3d
    norm: None = None

    def size(self, given: Size) -> Size:
        time, height, width = self.module.conv.steps
        frames = time * (given.frames - 1) + 1
        return Size(self.module.conv.out_channels, frames, height * given.rows, width * given.columns)

    def _reach(self, rows: Rows) -> Rows:
        step = self.module.conv.steps[1]
        return rows[0] // step - 1, -(-rows[1] // step) + 1

    def halo(self, rows: Rows, height: int) -> Rows:
        return clip(self._reach(rows), height)

    def strip(self, given: Size, rows: Rows, affines: Affines, scratch: Scratch) -> Push:
        place = _Place(scratch, self)
        window = _Window(self._reach(rows), given.rows, 1, self.module.front, None, place)
        return _UpsampleStrip(self.module, window, rows, place)

    def work(self, given: Size, rows: Rows, frames: int, itemsize: int) -> tuple[int, int]:
        kernel = (self.module.front + 1, 3, 3)
        reach = self._reach(rows)
        window = _window_bytes(given, reach, kernel, frames, itemsize)
        made = math.prod(self.module.conv.steps) * frames * (reach[1] - reach[0] - 1) * (given.columns + 1)
        phases = made * self.module.conv.out_channels * itemsize
        return window + phases + self.weight_bytes, phases + 2 * self.weight_bytes

    def macs(self, given: Size) -> int:
        out = self.size(given)
        taps = math.prod(2 if step == 2 else 3 for step in self.module.conv.steps)
        return out.frames * out.columns * out.channels * given.channels * taps

    @property
    def weight_bytes(self) -> int:
        """Of the folded weights: 2 of 3 taps for each of 2 phases along a doubled axis."""
        return (
            _bytes(self.module.conv.weight)
            * (4 ** sum(step == 2 for step in self.module.conv.steps))
            // (3 ** sum(step == 2 for step in self.module.conv.steps))
        )


@dataclass(frozen=True, eq=False, slots=True)
class Residual:
    """``second(first(x)) + shortcut(x)``; both keep the frames and the rows as they are."""

    first: ConvLayer
    second: ConvLayer
    shortcut: ConvLayer | None = None

    @property
    def norm(self) -> nn.GroupNorm | None:
        return self.first.norm

    def size(self, given: Size) -> Size:
        return self.second.size(self.first.size(given))

    def halo(self, rows: Rows, height: int) -> Rows:
        return self.first.halo(self.second.halo(rows, height), height)

    def strip(self, given: Size, rows: Rows, affines: Affines, scratch: Scratch) -> Push:
        between = self.first.size(given)
        first = self.first.strip(given, self.second.halo(rows, between.rows), affines, scratch)
        second = self.second.strip(between, rows, affines, scratch)
        return _ResidualStrip(first, second, self.shortcut, rows)

    def work(self, given: Size, rows: Rows, frames: int, itemsize: int) -> tuple[int, int]:
        between = self.first.size(given)
        inner = self.second.halo(rows, between.rows)
        held_first, first = self.first.work(given, inner, frames, itemsize)
        held_second, second = self.second.work(between, rows, frames, itemsize)
        return held_first + held_second, max(first, slab_bytes(between, inner, frames, itemsize) + second)

    def macs(self, given: Size) -> int:
        shortcut = 0 if self.shortcut is None else self.shortcut.macs(given)
        return self.first.macs(given) + self.second.macs(self.first.size(given)) + shortcut

    @property
    def weight_bytes(self) -> int:
        return self.first.weight_bytes + self.second.weight_bytes


def chain_strip(layers: Sequence[Layer], given: Size, rows: Rows, affines: Affines, scratch: Scratch) -> Push:
    """Several layers, one after the other, on these rows of the last one's output."""
    sizes = [given]
    for layer in layers:
        sizes.append(layer.size(sizes[-1]))
    pushes: list[Push] = []
    for layer, size in zip(reversed(layers), reversed(sizes[:-1]), strict=True):
        pushes.insert(0, layer.strip(size, rows, affines, scratch))
        rows = pushes[0].rows
    return _Chain(pushes, rows)


def clip(rows: Rows, height: int) -> Rows:
    return max(0, rows[0]), min(height, rows[1])


def slab_bytes(size: Size, rows: Rows, frames: int, itemsize: int) -> int:
    """Of ``frames`` frames of these rows."""
    return min(frames, size.frames) * (rows[1] - rows[0]) * size.columns * size.channels * itemsize


# --- on one strip -----------------------------------------------------------------------------------------------------


class _Chain:
    def __init__(self, pushes: list[Push], rows: Rows) -> None:
        self.pushes = pushes
        self.rows = rows

    def push(self, frames: Tensor) -> Tensor | None:
        result: Tensor | None = frames
        del frames
        for push in self.pushes:
            if result is None:
                return None
            result = push.push(result)
        return result


@dataclass(frozen=True, slots=True)
class _Place:
    """Scratch memory of one layer."""

    scratch: Scratch
    layer: object

    def take(self, purpose: str, *shape: int) -> Tensor:
        return self.scratch.take((self.layer, purpose), shape)

    def once(self, purpose: str, make: Callable[[], T]) -> T:
        return self.scratch.once((self.layer, purpose), make)


class _Window:
    """What a convolution reads: normalised frames with their edges, after those of the slab before."""

    def __init__(self, reach: Rows, height: int, side: int, front: int, affine: Affine | None, place: _Place) -> None:
        self.rows = clip(reach, height)
        self.top, self.bottom = self.rows[0] - reach[0], reach[1] - self.rows[1]
        self.side, self.front = side, front
        self.affine, self.place = affine, place
        self.past: int | None = None
        """frames that the window begins with already; None: there are no frames before these"""

    def push(self, frames: Tensor) -> Tensor:
        """(n, rows, W, C) -> the window (front + n, rows + top + bottom, W + 2 side, C)."""
        length, rows, columns, channels = frames.shape
        if not (self.side or self.front or self.affine):
            return frames
        past = self.front if self.past is None else self.past
        height, width = self.top + rows + self.bottom, columns + 2 * self.side
        window = self.place.take("window", past + length, height, width, channels)
        for new, frame in zip(window[past:], frames, strict=True):  # one at a time: it stays in a processor's cache
            middle = new[self.top : self.top + rows]
            self._fill(middle[:, self.side : self.side + columns], frame)
            if self.side:
                middle[:, : self.side] = middle[:, self.side : self.side + 1]
                middle[:, -self.side :] = middle[:, -self.side - 1 : -self.side]
            if self.top:
                new[: self.top] = new[self.top : self.top + 1]
            if self.bottom:
                new[-self.bottom :] = new[-self.bottom - 1 : -self.bottom]
        if self.past is None:
            window[:past] = window[past : past + 1]
        return window

    def _fill(self, target: Tensor, frame: Tensor) -> None:
        if self.affine is None:
            target.copy_(frame)
            return
        scale, shift = self.affine
        if frame.dtype == scale.dtype:
            torch.addcmul(shift, frame, scale, out=target)
        else:  # rounded where one pass rounds: after the norm, before SiLU
            target.copy_(torch.addcmul(shift, frame.to(scale.dtype), scale))
        F.silu(target, inplace=True)

    def keep(self, window: Tensor, done: int) -> None:
        """The next window begins after the first ``done`` frames of this one, which has been read."""
        if not self.front:
            return
        self.past = len(window) - done
        for old, new in zip(window[done:], window, strict=False):  # both may overlap, a frame does not
            new.copy_(old)


class _ConvStrip:
    def __init__(self, conv: nn.Conv3d, window: _Window, place: _Place) -> None:
        self.conv, self.window = conv, window
        self.rows = window.rows
        self.weight = place.once("weight", lambda: _fast_weight(conv.weight))

    def push(self, frames: Tensor) -> Tensor | None:
        window = self.window.push(frames)
        del frames
        taps, step = self.conv.kernel_size[0], self.conv.stride[0]
        count = max(0, (len(window) - taps) // step + 1)
        made = _convolve(window, self.weight, self.conv.bias, self.conv.stride) if count else None
        self.window.keep(window, count * step)
        return made


class _UpsampleStrip:
    def __init__(self, module: UpsampledCausalConv3d, window: _Window, rows: Rows, place: _Place) -> None:
        self.module, self.window, self.place = module, window, place
        self.rows = window.rows
        self.skip = rows[0] % module.conv.steps[1]
        self.height = rows[1] - rows[0]
        self.kernel = place.once("kernel", lambda: _fast_kernel(*module.conv.folded()))

    def push(self, frames: Tensor) -> Tensor | None:
        conv = self.module.conv
        time, height, width = conv.steps
        is_first = self.window.past is None
        columns = frames.shape[2]
        window = self.window.push(frames)
        del frames
        phases = _convolve(window, *self.kernel, (1, 1, 1))
        self.window.keep(window, len(window) - self.window.front)
        rows, length = phases.shape[1] - (height - 1), time * len(phases) - (time - 1) * is_first
        out = self.place.take("out", length, height * rows, width * columns, conv.out_channels)
        for small, large in phase_pairs(_channels_first(phases), _channels_first(out), conv.steps):
            large.copy_(small)
        return out[:, self.skip : self.skip + self.height]


class _ResidualStrip:
    def __init__(self, first: Push, second: Push, shortcut: ConvLayer | None, rows: Rows) -> None:
        self.first, self.second, self.shortcut = first, second, shortcut
        self.rows = first.rows
        self.inside = slice(rows[0] - self.rows[0], rows[1] - self.rows[0])

    def push(self, frames: Tensor) -> Tensor | None:
        between = self.first.push(frames)
        assert between is not None
        result = self.second.push(between)
        del between
        assert result is not None
        return add_skip(result, frames[:, self.inside], self.shortcut)


def add_skip(result: Tensor, skip: Tensor, shortcut: ConvLayer | None) -> Tensor:
    """``result`` plus what goes past the two convolutions, in place."""
    if shortcut is None:
        return result.add_(skip)
    assert shortcut.kernel == (1, 1, 1)
    conv = shortcut.conv
    matrix = conv.weight.flatten(1).t()
    for made, frame in zip(result, skip, strict=True):
        made.flatten(0, 1).addmm_(frame.flatten(0, 1), matrix)
    return result if conv.bias is None else result.add_(conv.bias)


def _channels_first(x: Tensor) -> Tensor:
    """(T, H, W, C) as (1, C, T, H, W), without a copy.

    The stride of the one video has to be the video's length: with any other torch does not see that the channels are
    last, copies the input into its usual layout, and gives the result in that layout, too.
    """
    frames, rows, columns, channels = x.shape
    return x.as_strided((1, channels, frames, rows, columns), (x.numel(), x.stride(3), *x.stride()[:3]))


def _fast_weight(weight: Tensor) -> Tensor:
    """In the layout into which a CPU would bring it again for every strip."""
    return weight.contiguous(memory_format=torch.channels_last_3d) if weight.device.type == "cpu" else weight


def _fast_kernel(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _fast_weight(weight), bias


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    """(T, H, W, C) -> (T', H', W', C'), without padding."""
    x = _channels_first(window)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # torch itself takes a loop that is ten times slower where batch, channels, frames and rows are few.
        out = torch.mkldnn_convolution(x, weight, bias, (0, 0, 0), stride, (1, 1, 1), 1)
    else:
        out = F.conv3d(x, weight, bias, tuple(stride))
    return out[0].permute(1, 2, 3, 0).contiguous()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _window_bytes(given: Size, reach: Rows, kernel: tuple[int, int, int], frames: int, itemsize: int) -> int:
    frame = (reach[1] - reach[0]) * (given.columns + kernel[2] - 1) * given.channels * itemsize
    return (kernel[0] - 1 + min(frames, given.frames)) * frame


def _norm_bytes(norm: nn.GroupNorm | None, frame: int, itemsize: int) -> int:
    """Below float32, a frame once as it is and once normalised."""
    return 0 if norm is None or itemsize >= 4 else 2 * frame * 4 // itemsize


# --- statistics -------------------------------------------------------------------------------------------------------


class Statistics:
    """Mean and variance of a group norm's input, from its parts.

    Each part adds its sums of differences from a reference near the mean, in the part's precision and at least
    float32; parts are added up in float64. So nothing cancels, and the order of the parts hardly matters.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.count = 0
        self.reference: Tensor | None = None
        self.apart: Tensor | None = None
        self.first = self.second = torch.zeros(())

    def add(self, part: Tensor) -> None:
        """``part``: (n, ..., C)."""
        dtype = torch.promote_types(part.dtype, torch.float32)
        for frame in part:
            rows = frame.flatten(0, -2)
            self.count += len(rows)
            for some in rows.split(max(1, STATISTICS_PART // rows.shape[1])):
                if self.reference is None:
                    self.reference = some.to(dtype).mean(0)
                if self.apart is None or len(self.apart) < len(some):
                    self.apart = torch.empty_like(some, dtype=dtype)
                apart = torch.sub(some, self.reference, out=self.apart[: len(some)])
                self.first = self.first + _wide(apart.sum(0))
                self.second = self.second + _wide(apart.square_().sum(0))

    def affine(self) -> Affine:
        """The norm with these statistics, as one multiplication and one addition for each channel."""
        assert self.reference is not None, "nothing was added"
        norm = self.norm
        offset = (self.first / self.count).unflatten(0, (norm.num_groups, -1))
        spread = (self.second / self.count).unflatten(0, (norm.num_groups, -1)) - offset.square()
        means = offset + _wide(self.reference).unflatten(0, (norm.num_groups, -1))
        mean = means.mean(1, keepdim=True)
        variance = (spread + (means - mean).square()).mean(1, keepdim=True)
        weight, bias = (_wide(value).unflatten(0, (norm.num_groups, -1)) for value in (norm.weight, norm.bias))
        scale = weight * torch.rsqrt(variance.clamp(min=0) + norm.eps)
        shift = bias - mean * scale
        place = {"device": self.reference.device, "dtype": self.reference.dtype}
        return Affine(scale.flatten().to(**place), shift.flatten().to(**place))


def _wide(x: Tensor) -> Tensor:
    """In float64; on the CPU where a device knows none."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


# --- attention over everything before ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class CausalAttention:
    """A single head over all positions; a position sees the frames up to and including its own."""

    norm: nn.GroupNorm
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.Linear

    def size(self, given: Size) -> Size:
        return given

    @property
    def weight_bytes(self) -> int:
        return 4 * _bytes(self.to_q.weight)


Block = Layer | CausalAttention
Affines = Mapping[Layer | CausalAttention, Affine]
"""Norms whose statistics are known, by the block that applies them."""


@dataclass(frozen=True, eq=False, slots=True)
class Chain:
    """A network as blocks, each of which reads the result of the one before."""

    blocks: tuple[Block, ...]
    weight: Tensor
    """any one, to tell device and dtype"""
    before: Callable[[Tensor], Tensor]
    """(C, T, rows, W) of the network's input -> the same on the device and in the dtype of the weights, scaled"""


class SoftmaxOverParts:
    """Attention of some queries to keys and values that come in parts; the sum is that of all parts at once.

    The largest score so far is carried along, and what was summed before is rescaled when a larger one comes
    (Milakov and Gimelshein 2018). Scores and sums are in float32 at least.
    """

    def __init__(self, queries: Tensor) -> None:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        self.queries = queries.to(dtype) * queries.shape[-1] ** -0.5
        self.largest = self.queries.new_full((len(queries), 1), -math.inf)
        self.total = self.queries.new_zeros(len(queries), 1)
        self.sum = torch.zeros_like(self.queries)

    def add(self, keys: Tensor, values: Tensor) -> None:
        scores = self.queries @ keys.to(self.queries.dtype).t()
        largest = torch.maximum(self.largest, scores.amax(1, keepdim=True))
        before = torch.exp(self.largest - largest)
        scores.sub_(largest).exp_()
        self.total.mul_(before).add_(scores.sum(1, keepdim=True))
        self.sum.mul_(before).addmm_(scores, values.to(self.queries.dtype))
        self.largest = largest

    def result(self) -> Tensor:
        return self.sum / self.total
