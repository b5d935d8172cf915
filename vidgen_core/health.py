"""Numbers that are not finite: seen at once, traced to where they began, and tried again in a safe way.

The check of every step is in ``finite``. Only when it fails is the work done once more under :func:`find_suspect`,
which looks at the result of every operation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .codec import Codec
from .errors import NumericsError
from .finite import is_finite
from .memory.attention_chunks import plain_attention
from .memory.compiled import uncompiled
from .memory.oom import is_out_of_memory
from .memory.recast import can_recast, compute_dtypes, recast
from .types import Grid

log = logging.getLogger("vidgen")


# --- the search -------------------------------------------------------------------------------------------------------

Cause = Literal["inputs", "weight", "lora", "overflow", "attention", "compile", "guidance", "operation", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """Where numbers stopped being finite, and why most likely."""

    cause: Cause
    where: str = ""
    """path of a module or of a weight, or the name of an input"""
    detail: str = ""

    def __str__(self) -> str:
        words = {
            "inputs": "what it was given is not finite",
            "weight": "a weight is not finite",
            "lora": "a LoRA acts there",
            "overflow": "float16 ends at 65504, and larger numbers came up",
            "attention": "the attention kernel",
            "compile": "the compiled blocks; the same blocks without torch.compile are finite",
            "guidance": "the network is finite; the guidance or the sampler made the numbers too large",
            "operation": "an operation with finite numbers gave others",
            "unknown": "not found: a second look gave finite numbers",
        }[self.cause]
        place = f"{self.where}: " if self.where else ""
        return place + words + (f" ({self.detail})" if self.detail else "")

    @property
    def advice(self) -> str:
        """What a user can do."""
        return {
            "inputs": "encode the prompt, the image or the video again, with text encoders and VAE in float32",
            "weight": "download the checkpoint again, or use another copy",
            "lora": "lower the strength of the LoRA, or leave it out",
            "overflow": "use bfloat16 or float32 in place of float16",
            "attention": "choose another attention, or bfloat16 in place of float16",
            "compile": "leave out torch.compile",
            "guidance": "use a smaller guidance scale, or another sampler",
            "operation": "use bfloat16 or float32 in place of float16, or a smaller guidance scale",
            "unknown": "run it again; if it stays, use bfloat16 or float32 in place of float16, or another machine",
        }[self.cause]


class _Found(Exception):
    def __init__(self, suspect: Suspect) -> None:
        self.suspect = suspect


_FILLERS = ("masked_fill", "masked_fill_", "full", "full_like", "new_full", "fill_", "where", "log", "tensor")
"""operations that make infinities on purpose (masks) or at a limit"""


class _Search(TorchFunctionMode):
    """Looks at what every operation of torch takes and gives; raises :class:`_Found` at the first bad one."""

    def __init__(self, path: list[str], names: Mapping[int, str], loras: Mapping[str, str]) -> None:
        super().__init__()
        self._path, self._names, self._loras = path, names, loras

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in _FILLERS or name.startswith(("__get__", "__set__", "is")):
            return result
        with torch._C.DisableTorchFunction():
            if not all(is_finite(tensor) for tensor in tensors_in(result)):
                self._blame(func, name, [*tensors_in(args), *tensors_in(kwargs)], result)
        return result

    def _blame(self, func: Any, name: str, given: list[Tensor], result: Any) -> None:
        where = self._path[-1]
        changed = next((lora for module, lora in self._loras.items() if module == where), None)
        bad = [tensor for tensor in given if not is_finite(tensor)]
        weight = next((self._names[id(tensor)] for tensor in bad if id(tensor) in self._names), None)
        dtype = next(tensor.dtype for tensor in tensors_in(result))
        if changed is not None and (bad or dtype != torch.float16):
            raise _Found(Suspect(cause="lora", where=where, detail=changed))
        if weight is not None:
            raise _Found(Suspect(cause="weight", where=weight))
        if bad:
            # Nothing of torch's has made these numbers: a kernel of another library has, and those are attention.
            raise _Found(Suspect(cause="attention", where=where, detail="a kernel that is not torch's own"))
        if func is F.scaled_dot_product_attention:
            raise _Found(Suspect(cause="attention", where=where, detail=f"torch's own, in {short(dtype)}"))
        if dtype == torch.float16:
            detail = name if changed is None else f"{name}, with the LoRA {changed}"
            raise _Found(Suspect(cause="overflow", where=where, detail=detail))
        # Outside of every module are the guidance and what the sampler asks it for.
        cause: Cause = "operation" if where else "guidance"
        raise _Found(Suspect(cause=cause, where=where, detail=f"{name} in {short(dtype)}"))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of floating numbers in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point and value.dtype.itemsize > 1 and not value.is_meta and value.numel():
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_suspect(
    module: nn.Module,
    ask: Callable[[], Tensor],
    *,
    inputs: Mapping[str, Tensor | None],
    loras: Mapping[str, str] | None = None,
    compiled: bool = False,
) -> Suspect:
    """Do the work once more, and find the first operation whose numbers are not finite.

    Args:
        ask: the work; it calls ``module``.
        inputs: name -> tensor of what the work was given.
        loras: path of a module in ``module`` -> the LoRA that changes it now.
        compiled: the numbers came from compiled blocks. The search itself runs without.
    """
    for name, tensor in inputs.items():
        if tensor is not None and not is_finite(tensor):
            return Suspect(cause="inputs", where=name)
    path = [""]
    with contextlib.ExitStack() as stack:
        for name, part in module.named_modules():
            stack.enter_context(_on_path(part, name or type(module).__name__, path))
        names = _LiveNames(module)
        stack.enter_context(uncompiled())
        try:
            with _Search(path, names, loras or {}):
                result = ask()
        except _Found as found:
            return found.suspect
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Suspect(cause="unknown", detail="there was no memory for a second look")
    if not is_finite(result):
        return Suspect(cause="operation", where=type(module).__name__)
    return Suspect(cause="compile" if compiled else "unknown")


class _LiveNames(Mapping[int, str]):
    """id of a weight -> its name; looked up when asked, as streamed weights are there while their block runs."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def _all(self) -> dict[int, str]:
        return {id(tensor): name for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers())}

    def __getitem__(self, key: int) -> str:
        return self._all()[key]

    def __iter__(self) -> Iterator[int]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


@contextlib.contextmanager
def _on_path(module: nn.Module, name: str, path: list[str]) -> Iterator[None]:
    """``path`` ends with ``name`` while ``module`` runs."""
    before = module.register_forward_pre_hook(lambda *_: path.append(name), prepend=True)
    after = module.register_forward_hook(lambda *_: path.pop() and None)
    try:
        yield
    finally:
        before.remove()
        after.remove()


# --- the safe way -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A slower way to compute the same without the suspect."""

    name: str
    apply: Callable[[], contextlib.AbstractContextManager[None]]


def remedy_for(
    suspect: Suspect, module: nn.Module, *, dtype: torch.dtype, fragile: Collection[torch.dtype]
) -> Remedy | None:
    """What to try instead; None where nothing but another input helps.

    Args:
        dtype: the number format to go to where the module computes in a ``fragile`` one.
    """
    if suspect.cause == "compile":
        return Remedy(name="without torch.compile", apply=uncompiled)
    if suspect.cause in ("inputs", "weight", "lora", "guidance"):
        return None
    if compute_dtypes(module) & set(fragile) and can_recast(module):
        return Remedy(name=f"in {short(dtype)}", apply=lambda: recast(module, dtype))
    if suspect.cause in ("attention", "unknown"):
        return Remedy(name="with plain attention", apply=plain_attention)
    return None


class CheckedCodec:
    """A :class:`Codec` whose decoder's output is checked, tile by tile if it is tiled: no black video at the end.

    Args:
        retry: decode again in the safe way, and all that follows too.
    """

    def __init__(self, codec: Codec, *, retry: bool = True) -> None:
        self._codec, self._retry = codec, retry
        self._remedies = contextlib.ExitStack()
        self._tried: list[str] = []

    @property
    def grid(self) -> Grid:
        return self._codec.grid

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return self._codec.moments(video)

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self._codec.encode(video, generator=generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Raises NumericsError, naming the suspect, when the safe way does not help either."""
        while True:
            video = self._codec.decode(latents)
            if is_finite(video):
                return video
            del video
            self._remedies.enter_context(self._remedy(latents))

    def _remedy(self, latents: Tensor) -> contextlib.AbstractContextManager[None]:
        # What is no module cannot be looked into; all that is known then is what it was given.
        suspect, remedy = Suspect(cause="unknown" if is_finite(latents) else "inputs", where="latents"), None
        if isinstance(self._codec, nn.Module):
            module = self._codec
            suspect = find_suspect(module, lambda: self._codec.decode(latents), inputs={"latents": latents})
            remedy = remedy_for(suspect, module, dtype=torch.float32, fragile=(torch.float16, torch.bfloat16))
        if remedy is None or not self._retry or remedy.name in self._tried:
            raise NumericsError("The decoded video is not finite", given=str(suspect), do=suspect.advice)
        log.warning("the decoded video is not finite (%s): decoding again %s", suspect, remedy.name)
        self._tried.append(remedy.name)
        return remedy.apply()

    def __enter__(self) -> CheckedCodec:
        return self

    def __exit__(self, *_: object) -> None:
        self._remedies.close()
