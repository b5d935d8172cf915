"""3-D convolution for decoding and encoding on a CPU: oneDNN's kernels, in the layout that they are fastest in.

torch takes a kernel of its own, on one thread, for small inputs and for channels-last ones with a 1 x 1 x 1 kernel;
oneDNN's takes less than half of its time at any size. In the layout with channels last, oneDNN need not reorder what
goes in and out, which is another quarter for large tensors. With gradients everything is as torch has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stop import check_cancelled

CHANNELS_LAST = torch.channels_last_3d
PART_OPERATIONS = 2e10
"""of one convolution: a slow core has done them in half a second, and between two of them a stop is heard"""
PARTS = 8
"""at least, where there are several: what is copied for one of them takes little memory beside the whole"""


class Conv3d(nn.Conv3d):
    """``nn.Conv3d`` without dilation or groups, by way of :func:`conv3d`."""

    def forward(self, input: Tensor) -> Tensor:
        time, height, width = self.padding
        return conv3d(input, self.weight, self.bias, self.stride, (int(time), int(height), int(width)))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
) -> Tensor:
    """(B, C, T, H, W) -> (B, C', T', H', W'), with zeros around it; the layout of ``x`` is kept."""
    if _is_inference(x):
        x = _channels_last(x) if x.is_meta and _is_narrow(x) else x
        shape = _shape_after(x, weight, stride, padding)
        num_parts = 2 * math.prod(weight.shape[1:]) * math.prod(shape) / PART_OPERATIONS
        if num_parts > 1 and shape[3] > 1:
            return _by_rows(x, weight, bias, stride, padding, shape, max(1, int(shape[3] / max(PARTS, num_parts))))
    return _whole(x, weight, bias, stride, padding)


def _shape_after(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, ...]:
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return (x.shape[0], weight.shape[0], *((size + 2 * pad - tap) // step + 1 for size, tap, step, pad in sides))


def _by_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    shape: tuple[int, ...],
    num_rows: int,
) -> Tensor:
    """``num_rows`` rows of the result at a time, asking in between whether to stop."""
    out: Tensor | None = None
    step, taps, pad = stride[1], weight.shape[3], padding[1]
    for start in range(0, shape[3], num_rows):
        check_cancelled()
        end = min(start + num_rows, shape[3])
        first, last = start * step - pad, (end - 1) * step - pad + taps
        rows = x[:, :, :, max(0, first) : min(last, x.shape[3])]
        if first < 0 or last > x.shape[3]:
            rows = F.pad(rows, (0, 0, max(0, -first), max(0, last - x.shape[3])))
        rows = rows.contiguous(memory_format=CHANNELS_LAST) if is_channels_last(x) else rows
        part = _whole(rows, weight, bias, stride, (padding[0], 0, padding[2]))
        if out is None:
            out = empty_like(part, shape)
        out[:, :, :, start:end] = part
    assert out is not None
    return out


def _whole(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    if x.is_meta:
        out = F.conv3d(x, weight, bias, tuple(stride), tuple(padding))
        return _channels_last(out) if is_channels_last(x) else out
    if _is_inference(x) and x.dtype == torch.float32:
        return torch.mkldnn_convolution(x, weight, bias, tuple(padding), tuple(stride), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, tuple(stride), tuple(padding))


def fast_layout(x: Tensor) -> Tensor:
    """``x`` in the layout to begin a chain of layers in; they keep it."""
    return x.contiguous(memory_format=CHANNELS_LAST) if _is_inference(x) and _is_narrow(x) else x


def empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Of another shape, in the dtype, on the device and in the layout of ``x``."""
    layout = CHANNELS_LAST if is_channels_last(x) else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)


def is_channels_last(x: Tensor) -> bool:
    """Whether all channels of a pixel lie side by side; not of tensors that are contiguous in either way."""
    return x.is_contiguous(memory_format=CHANNELS_LAST) and not x.is_contiguous()


def _channels_last(x: Tensor) -> Tensor:
    """For planning: on the meta device layouts get lost, which a CPU keeps; the same memory, read in this layout."""
    batch, channels, *sides = x.shape
    strides = [math.prod(sides[i + 1 :]) * channels for i in range(3)]
    return x.as_strided(x.shape, (math.prod(sides) * channels, 1, *strides))


def _is_inference(x: Tensor) -> bool:
    """On the meta device, too: there it is planned what a CPU will do."""
    return (
        x.device.type in ("cpu", "meta")
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


def _is_narrow(x: Tensor) -> bool:
    """A dtype that oneDNN computes in on this machine; torch's own kernels are slower with channels last."""
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32
