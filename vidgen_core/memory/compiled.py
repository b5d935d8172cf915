"""torch.compile for the blocks that a network repeats: from outside, for a while, and never a reason to fail.

A block is compiled once for all of its kind, with sizes left open: neither another step nor another prompt compiles
again. Where it cannot work (:func:`why_not`), and where the compiler fails, the same blocks run as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import nn

log = logging.getLogger("vidgen")

MODES = ("default", "max-autotune-no-cudagraphs")
"""torch.compile's own names; the second one tries several kernels for each product, which takes minutes"""
BACKEND = "inductor"
"""torch.compile's compiler; the tests of what is compiled, and how often, take a quicker one"""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NUM_VARIANTS = 32
"""graphs of one kind of block: with and without mask, own times of frames, quantised layers, batches of 1 and more"""

_uncompiled: ContextVar[bool] = ContextVar("vidgen_uncompiled", default=False)
_failed: set[tuple[type[nn.Module], str]] = set()
"""kinds of blocks that the compiler could not do"""
_ready: set[tuple[type[nn.Module], str]] = set()
"""kinds of blocks that ran compiled already"""


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block, compiled blocks run as they are."""
    token = _uncompiled.set(True)
    try:
        yield
    finally:
        _uncompiled.reset(token)


def blocks_at(network: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    """The blocks of the module lists at ``paths``, in order."""
    return [block for path in paths for block in network.get_submodule(path).children()]


def missing_compiler(device: torch.device) -> str | None:
    """Which program torch.compile lacks for this device, or None."""
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "torch.compile needs Triton on a GPU, which is not installed (pip install triton)"
    if device.type != "cpu":
        return None
    names = [*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++", "cl"]
    if any(shutil.which(name) for name in names):
        return None
    return f"torch.compile needs a C++ compiler on a CPU, and none of {', '.join(names)} is on the PATH"


def why_not(blocks: Sequence[nn.Module], device: torch.device) -> str | None:
    """Why these blocks cannot be compiled here, or None. Nothing is compiled to find out."""
    missing = missing_compiler(device)
    if missing is not None:
        return missing
    tensors = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
    if any("forward" in vars(block) for block in blocks) or any(tensor.is_meta for tensor in tensors):
        return "the blocks are read from the file as they run"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 7:
            return f"Triton needs a GPU of compute capability 7.0, this one has {major}.{minor}"
        if (major, minor) < (8, 9) and any(tensor.dtype in FLOAT8 for tensor in tensors):
            return f"Triton knows float8 weights from compute capability 8.9 on, and this GPU has {major}.{minor}"
    return None


@contextlib.contextmanager
def compiled(network: nn.Module, paths: Sequence[str], *, mode: str = "default") -> Iterator[bool]:
    """The blocks of ``network`` at ``paths`` run compiled inside the block; whether any does is the value.

    Put on last: a block that something else stands around (a LoRA beside its layers, streaming) is left as it is, and
    the log says so.
    """
    blocks = blocks_at(network, paths)
    reason = why_not(blocks, _device(network))
    if reason is not None:
        log.warning("the blocks are not compiled: %s", reason)
        yield False
        return
    plain = [block for block in blocks if not _is_hooked(block)]
    if len(plain) < len(blocks):
        log.warning(
            "%d of %d blocks are not compiled: a LoRA runs beside their layers (its mode merge would avoid that)",
            *(len(blocks) - len(plain), len(blocks)),
        )
    try:
        with _many_variants():
            for block in plain:
                block.forward = CompiledForward(block, mode)
            yield bool(plain)
    finally:
        for block in plain:
            vars(block).pop("forward", None)


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters() if not p.is_meta), torch.device("cpu"))


def _is_hooked(block: nn.Module) -> bool:
    # The compiler does not look for hooks that came after it: it would go on without them, and without a word.
    return any(
        part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        for part in block.modules()
        if part is not block
    )


def will_compile(network: nn.Module, paths: Sequence[str], mode: str) -> bool:
    """Whether the first step is going to take longer, because some kind of block was not compiled yet."""
    blocks = blocks_at(network, paths)
    kinds = {(type(block), mode) for block in blocks}
    return bool(kinds - _ready - _failed) and why_not(blocks, _device(network)) is None


class CompiledForward:
    """A block's ``forward`` by way of the compiler; by itself where that fails."""

    compiled_forward = True

    def __init__(self, block: nn.Module, mode: str) -> None:
        self._block, self._kind = block, (type(block), mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind, mode = self._kind
        if _uncompiled.get() or self._kind in _failed:
            return kind.forward(self._block, *args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        if self._kind not in _ready:
            log.info("compiling %s: the first step takes longer", kind.__name__)
        try:
            result = compiled_function(kind, mode, BACKEND)(self._block, *args, **kwargs)
        except TorchDynamoException as error:
            _failed.add(self._kind)
            first = str(error).strip().splitlines()[:1]
            log.warning(
                "%s cannot be compiled and runs as it is (%s)",
                kind.__name__,
                (first or [type(error).__name__])[0][:200],
            )
            return kind.forward(self._block, *args, **kwargs)
        _ready.add(self._kind)
        return result


@cache
def compiled_function(kind: type[nn.Module], mode: str, backend: str) -> Callable[..., Any]:
    """``kind.forward`` compiled: for every block of this kind, as the block is an argument like any other."""
    given = None if mode == "default" else mode
    return torch.compile(kind.forward, dynamic=True, fullgraph=True, backend=backend, mode=given)


@contextlib.contextmanager
def _many_variants() -> Iterator[None]:
    import torch._dynamo

    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({name: NUM_VARIANTS}):
        yield
