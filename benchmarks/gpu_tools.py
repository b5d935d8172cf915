"""What the items of the GPU list are measured with."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from .full_size import GIB
from .render import peak_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    Network = TypeVar("Network", bound=nn.Module)


def seconds_of(run: Callable[[], Any], device: str, times: int = 1) -> float:
    """Median of several runs; by the GPU's own clock where there is one."""
    import torch

    taken = []
    for _ in range(times):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1000)
        else:
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return median(taken)


def peak_gib(device: str) -> float:
    """The most that was in use on the GPU since :func:`forget`; on a CPU, of the whole process."""
    import torch

    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes()
    return round(peak / GIB, 3)


def forget(device: str) -> None:
    """Give back what is not in use and begin the peak anew."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def drawn(network: Network, device: str, dtype: torch.dtype) -> Network:
    """A network of the meta device with weights of deviation 1 / sqrt(inputs), drawn on ``device``."""
    import torch

    network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network


def figure(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
