"""What a computation would hold in memory, found out without computing: it runs on the meta device and is watched.

Every tensor that an operation makes counts from there until its last reference is gone, so the peak follows the code
itself: a module that is changed is measured anew, not described anew. What kernels take besides their results is in
:data:`WORKSPACES`. Multiplications and traffic are counted on the way; they make the estimate of time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done, for :class:`~vidgen_core.memory.rates.Rates`."""

    flops: Mapping[str, float] = field(default_factory=dict)
    """by kind: "linear", "attention", "convolution" (2 per multiplication)"""
    moved: float = 0.0
    """bytes read and written by everything else"""
    num_ops: int = 0

    def __add__(self, other: Work) -> Work:
        kinds = {*self.flops, *other.flops}
        return Work(
            {kind: self.flops.get(kind, 0.0) + other.flops.get(kind, 0.0) for kind in kinds},
            self.moved + other.moved,
            self.num_ops + other.num_ops,
        )

    def __mul__(self, times: float) -> Work:
        flops = {kind: number * times for kind, number in self.flops.items()}
        return Work(flops, self.moved * times, round(self.num_ops * times))


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one computation."""

    peak: int
    """bytes at the worst moment, its inputs counted and weights not"""
    work: Work = Work()
    weights: int = 0
    """bytes of the weights that it reads"""
    kept: int = 0
    """bytes that stay afterwards: code that kernels made for its shapes"""
    with_weights: int = 0
    """bytes at the worst moment where weights are mapped to a file: each joins when it is first read, and stays"""


class LiveBytes(TorchDispatchMode):
    """Inside of it, ``live`` is the size of all tensors that are alive and ``peak`` the most that it was.

    Empty tensors count as far as they were written: a system gives memory when it is first touched.

    Args:
        known: tensors that do not count: weights.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.with_weights = 0
        self.flops: dict[str, float] = {}
        self.moved = 0.0
        self.num_ops = 0
        self._weights = tuple(known)  # a storage that is gone would give its key to another one
        self._sizes: dict[int, int] = {_key(tensor): 0 for tensor in self._weights}
        self._unread = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in self._weights}
        self.weights = self.kept = 0
        self._untouched: dict[int, int] = {}
        self._kernels: set[Any] = set()
        self.is_counting = True

    @contextmanager
    def not_counting(self) -> Iterator[None]:
        """For what another meter counts inside of this one: it would count here as well."""
        self.is_counting = False
        try:
            yield
        finally:
            self.is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.is_counting:
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self.hold(tensor)  # made outside, and kept there
            if _key(tensor) in self._unread:
                self.weights += self._unread.pop(_key(tensor))
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [tensor for tensor in made if _key(tensor) not in self._sizes]
        packet = func.overloadpacket
        if packet not in _EMPTY:
            self._touch(func, given, views=bool(made) and not fresh)
        self._keep_kernel(packet, given)
        before = self.live
        for tensor in fresh:
            self.hold(tensor, untouched=packet in _EMPTY)
        workspace = WORKSPACES.get(packet)
        if workspace is not None:
            self._note(before + workspace(args, kwargs, out))
        self._count(packet, args, kwargs, out, given, fresh)
        return out

    def hold(self, tensor: Tensor, *, untouched: bool = False) -> None:
        """Count a tensor until it is gone."""
        key = _key(tensor)
        if key in self._sizes or tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        self._sizes[key] = 0 if untouched else storage.nbytes()
        if untouched:
            self._untouched[key] = storage.nbytes()
        weakref.finalize(storage, self._let_go, key).atexit = False
        self.add(self._sizes[key])

    def _touch(self, func: Any, given: Sequence[Tensor], *, views: bool) -> None:
        """An operation reads or writes empty tensors: what it writes of them counts from now on, all if it reads."""
        if not self._untouched:
            return
        writes = func._schema.is_mutable
        if views and not writes:
            return
        for tensor in given[:1] if writes else given:
            key = _key(tensor)
            left = self._untouched.get(key, 0)
            if left:
                more = min(left, _bytes(tensor)) if writes else left
                self._untouched[key] = left - more
                self._sizes[key] += more
                self.add(more)

    def _keep_kernel(self, packet: Any, given: Sequence[Tensor]) -> None:
        """oneDNN makes code for every shape of a product of 2-byte numbers, and keeps it."""
        if packet in _PRODUCTS and packet is not aten.convolution and given[-1].element_size() == 2:
            shapes = tuple(tensor.shape for tensor in given)
            if shapes not in self._kernels:
                self._kernels.add(shapes)
                self.kept += KERNEL_BYTES
                self.add(KERNEL_BYTES)

    def add(self, num_bytes: int) -> None:
        self.live += num_bytes
        self._note(self.live)

    def _note(self, num_bytes: int) -> None:
        """So many are there at some moment."""
        self.peak = max(self.peak, num_bytes)
        self.with_weights = max(self.with_weights, num_bytes + self.weights)

    def _let_go(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self._untouched.pop(key, None)

    def skip(self, cost: Cost) -> None:
        """Take the cost of something that was measured before, beside all that is alive now."""
        self.peak = max(self.peak, self.live + cost.peak)
        again = cost.peak + self.weights  # the second time, weights are there from the start
        self.with_weights = max(self.with_weights, self.live + max(cost.with_weights, again))
        self.weights = max(self.weights, cost.weights)
        for kind, number in cost.work.flops.items():
            self.flops[kind] = self.flops.get(kind, 0.0) + number
        self.moved += cost.work.moved
        self.num_ops += cost.work.num_ops

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any, given: Sequence[Tensor], fresh: Any) -> None:
        if packet in _PRODUCTS:
            kind = "convolution" if packet is aten.convolution else "linear"
            number = flop_registry[packet](*args, **kwargs, out_val=out)
            self.flops[kind] = self.flops.get(kind, 0.0) + number
        elif fresh or packet is aten.copy_ or str(packet).endswith("_"):
            self.moved += sum(map(_bytes, given)) + sum(map(_bytes, fresh))
        else:
            return  # a view
        self.num_ops += 1

    @property
    def work(self) -> Work:
        return Work(dict(self.flops), self.moved, self.num_ops)


KERNEL_BYTES = 400_000
_EMPTY = frozenset({aten.empty, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.empty_like})
_PRODUCTS = frozenset({aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution})


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- attention, which has kernels of its own for every device --------------------------------------------------------


class _Attention(TorchFunctionMode):
    """Fused attention, which keeps no scores: on the meta device torch would take the way that does."""

    def __init__(self, meter: LiveBytes) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        mask = (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype)
        # Heads stay beside their channels, so that joining them again needs no copy.
        out = q.new_zeros(*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1]).transpose(-3, -2)
        sums = q.new_zeros(q.shape[:-1], dtype=torch.float32)
        del sums, mask
        number = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        flops = self._meter.flops
        flops["attention"] = flops.get("attention", 0.0) + number
        return out


# --- what kernels take besides their results --------------------------------------------------------------------------


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


_NATIVE_BELOW = 20480
"""batch x channels x frames x rows: torch gives smaller float32 convolutions to its own kernel, not to oneDNN"""
_PICTURE = 4
"""channels up to which a convolution is a first layer"""
_BLOCK = 16
"""channels of oneDNN's blocked layouts with AVX-512"""


def _convolution(args: Any, kwargs: Any, out: Tensor) -> int:
    """Bytes at the worst moment of a convolution on the CPU, the result among them.

    Where channels are last, oneDNN copies the weights only. Otherwise torch's own kernel unfolds the whole input into
    columns (``slow_conv3d``), and oneDNN copies the input into a blocked layout with the channels rounded up, computes
    into such a layout, and copies the result back; the blocked input is gone by then.
    """
    x, weight = args[0], args[1]
    taps = math.prod(weight.shape[2:])
    groups = args[8]
    item = x.element_size()
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return _bytes(out) + taps * _round_up(weight.shape[0], _BLOCK) * _round_up(weight.shape[1], _BLOCK) * item
    if taps == 1 and x.dtype == torch.float32 and x.shape[0] < _BLOCK and torch.get_num_threads() == 1:
        return _bytes(out)
    large = x.shape[0] > 1 or groups > 1 or math.prod(x.shape[:-1]) > _NATIVE_BELOW
    if x.dtype == torch.float32 and not large:
        columns = weight.shape[1] * groups * taps * out.shape[0] * math.prod(out.shape[2:]) * item
        return _bytes(out) + (columns if taps > 1 else 0)
    # Pictures are read as they lie: a first layer has a kernel of its own.
    blocked_in = 0 if x.shape[1] <= _PICTURE else _bytes(x) // x.shape[1] * _round_up(x.shape[1], _BLOCK)
    blocked_out = _bytes(out) // out.shape[1] * _round_up(out.shape[1], _BLOCK)
    blocked_weight = taps * _round_up(weight.shape[0], _BLOCK) * _round_up(weight.shape[1], _BLOCK) * item
    return blocked_weight + max(blocked_in + blocked_out, blocked_out + _bytes(out))


def _layer_norm(args: Any, kwargs: Any, out: Any) -> int:
    """Rows that do not lie one after another are copied first."""
    return sum(map(_bytes, out)) + (0 if args[0].is_contiguous() else _bytes(args[0]))


def _product(args: Any, kwargs: Any, out: Tensor) -> int:
    """oneDNN's products of 2-byte numbers copy the operands into its layouts."""
    if out.dtype == torch.float32:
        return _bytes(out)
    return _bytes(out) + sum(_bytes(arg) for arg in args if isinstance(arg, Tensor) and arg.ndim > 1)


def _linear(args: Any, kwargs: Any, out: Tensor) -> int:
    """Where there are few rows, oneDNN copies the weights of 2-byte products into its layout."""
    return _bytes(out) + (_bytes(args[2]) if out.element_size() == 2 else 0)


WORKSPACES: dict[Any, Callable[[Any, Any, Any], int]] = {
    aten.convolution: _convolution,
    aten.native_layer_norm: _layer_norm,
    aten.bmm: _product,
    aten.addmm: _linear,
}
"""operation -> (arguments, keyword arguments, result) -> bytes at its worst moment, the result counted"""


# --- asking -----------------------------------------------------------------------------------------------------------


@contextmanager
def watched_memory(*modules: nn.Module) -> Iterator[LiveBytes]:
    """Watch what runs inside, on the meta device and without gradients; weights of ``modules`` do not count."""
    known = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    meter = LiveBytes(known)
    with torch.no_grad(), meter, _Attention(meter):
        yield meter


def cost_of(run: Callable[..., Any], *inputs: Any, modules: Sequence[nn.Module] = ()) -> Cost:
    """The cost of ``run(*inputs)``; tensors are on the meta device, and so are the weights of ``modules``."""
    with watched_memory(*modules) as meter:
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                meter.hold(leaf)
        run(*inputs)
    return Cost(meter.peak, meter.work, meter.weights, meter.kept, meter.with_weights)
