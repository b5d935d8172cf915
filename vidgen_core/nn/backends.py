"""The kernels that attention may run on, and who picks one.

A backend is asked three things: is it here, can it take these tensors, and does it give the right numbers. The last one
is tried once per class of shapes on a small piece of the real tensors, against plain float32 arithmetic; a kernel that
fails is left out with a line in the log. All backends compute the same function; only those marked as approximate
(SageAttention) round more than their dtype does, and are therefore never picked by "auto".
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import MissingLibraryError, SettingsError, unknown_name

if TYPE_CHECKING:
    from .sliding_tiles import SlidingTiles

log = logging.getLogger("vidgen")

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""``(q, k, v, mask) -> out`` with the shapes of :func:`~.attention.attention`"""

AUTO = "auto"
MAX_SCORE_BYTES = 512 * 2**20
"""room for the scores of a kernel that writes them down"""
_SCORE_BYTES = 8
"""per score of such a kernel: the score and its softmax in float32"""

KERNEL_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError, ImportError)
"""what foreign kernels raise for tensors that they cannot take"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    """How a run computes attention."""

    backend: str = AUTO
    """one of :data:`CHOICES`; tensors that it cannot take go where "auto" sends them"""
    tiles: SlidingTiles | None = None
    """let video tokens look at their neighbourhood only; None: at everything"""
    max_score_bytes: int = MAX_SCORE_BYTES
    """kernels that write their scores down work on as many queries at a time as fit"""

    def __post_init__(self) -> None:
        if self.backend not in CHOICES:
            raise unknown_name("attention backend", self.backend, CHOICES)
        if self.max_score_bytes <= 0:
            raise SettingsError("The room for scores cannot be used", given=self.max_score_bytes, expected="above 0")

    def check(self) -> None:
        """Raise MissingLibraryError or SettingsError if the chosen backend cannot run on this machine at all."""
        backend = BACKENDS.get(self.backend)
        if backend is None:
            return
        if backend.library is not None and not backend.is_installed:
            raise MissingLibraryError(
                f"{backend.title} is not installed",
                given=f"attention backend {backend.name}",
                do=f"pip install {backend.library.package}, or choose {AUTO}",
            )
        if backend.needs_gpu and not torch.cuda.is_available():
            raise SettingsError(
                f"{backend.title} runs on NVIDIA and AMD GPUs only",
                given=f"attention backend {backend.name} on a machine without one",
                do=f"choose {AUTO}",
            )


# --- plain attention --------------------------------------------------------------------------------------------------


def needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's own choice, which also serves training."""
    if _is_short_cpu_training(q, k):
        return _three_products(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _is_short_cpu_training(q: Tensor, k: Tensor) -> bool:
    """Where the fused kernel's backward in bfloat16 is 3 to 4 times slower than plain matrix products."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and needs_gradients(q) and k.shape[-2] <= 1024


def _three_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with its scores in memory; they are rounded to the dtype of ``q``."""
    batch, heads, length, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        bias = q.new_zeros(()).masked_fill(~mask, float("-inf")).expand(batch, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, length, width)


def with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, max_score_bytes: int = MAX_SCORE_BYTES
) -> tuple[Tensor, Tensor]:
    """Attention in float32 and the logarithm of each query's sum of exponentials (B, heads, L, 1).

    With them, attention to some keys and to others becomes attention to all: see ``parallel.merge``.
    """
    fused = _lse_kernel(q, k, v) if mask is None else None
    if fused is not None:
        out, lse = fused(q, k, v)[:2]
        return out.float(), lse.float().unsqueeze(-1)
    pieces = []
    for rows in q.split(_rows_at_once(q, k, max_score_bytes), dim=2):
        start = sum(piece[0].shape[2] for piece in pieces)
        scores = (rows.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~_rows_of(mask, start, rows.shape[2]), float("-inf"))
        lse = scores.logsumexp(dim=-1, keepdim=True)
        pieces.append(((scores - lse).exp_() @ v.float(), lse))
    return torch.cat([out for out, _ in pieces], dim=2), torch.cat([lse for _, lse in pieces], dim=2)


def _lse_kernel(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Any] | None:
    """torch's fused kernel that also gives the sums, where there is one."""
    if q.device.type == "cpu" and q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash = BACKENDS["sdpa_flash"]
    # Narrower heads would be padded, and with them the sums.
    return torch.ops.aten._scaled_dot_product_flash_attention if flash.takes(q, k, v, None) else None


def chunked(attend: Attend, max_score_bytes: int = MAX_SCORE_BYTES) -> Attend:
    """``attend`` for some queries at a time: their scores take no more than ``max_score_bytes`` (one query's at least).

    The result is the same: queries do not know of each other.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rows = _rows_at_once(q, k, max_score_bytes)
        if rows >= q.shape[2]:
            return attend(q, k, v, mask)
        starts = range(0, q.shape[2], rows)
        masks = [None if mask is None else _rows_of(mask, start, rows) for start in starts]
        return torch.cat([attend(part, k, v, own) for part, own in zip(q.split(rows, dim=2), masks, strict=True)], 2)

    return run


def _rows_at_once(q: Tensor, k: Tensor, max_score_bytes: int) -> int:
    return max(1, max_score_bytes // (_SCORE_BYTES * q.shape[0] * q.shape[1] * k.shape[2]))


def _rows_of(mask: Tensor, start: int, count: int) -> Tensor:
    """The mask of some queries; a mask of keys alone serves all of them."""
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., start : start + count, :]


def _writes_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether torch has no fused kernel for these tensors."""
    if q.device.type in ("cpu", "cuda"):
        return torch._fused_sdp_choice(q, k, v, mask) == int(SDPBackend.MATH.value)  # type: ignore[call-arg]
    return True


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    if _rows_at_once(q, k, max_score_bytes) < q.shape[2] and _writes_scores(q, k, v, mask):
        return chunked(plain, max_score_bytes)(q, k, v, mask)
    return plain(q, k, v, mask)


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return chunked(plain, max_score_bytes)(q, k, v, mask)


# --- the table --------------------------------------------------------------------------------------------------------

Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int], Tensor]
"""an :data:`Attend` that is also told the room for scores"""


@dataclass(frozen=True, slots=True)
class Library:
    """Where a backend comes from."""

    module: str
    package: str
    """its name for pip"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One way to compute attention."""

    name: str
    title: str
    run: Run
    takes: Callable[[Tensor, Tensor, Tensor, Tensor | None], bool]
    """whether it can compute these; may rely on the library being installed"""
    library: Library | None = None
    needs_gpu: bool = True
    approximate: bool = False
    trusted: bool = False
    """plain arithmetic that others are measured against"""

    @property
    def is_installed(self) -> bool:
        return self.library is None or _is_installed(self.library.module)


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _torch_kernel(kernel: str, question: str) -> dict[str, Any]:
    """``run`` and ``takes`` of one of torch's fused kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
        ask = getattr(torch.backends.cuda, question, None)
        if q.device.type != "cuda" or ask is None:
            return False
        return ask(torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, False))

    return {"run": run, "takes": takes}


def _half_on_gpu(q: Tensor, mask: Tensor | None, *, max_width: int, capability: tuple[int, int]) -> bool:
    return (
        mask is None
        and q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= max_width
        and q.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= capability
    )


def _tokens_first(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Call a kernel that wants (B, L, heads, d); some versions give the sums beside the result."""
    given = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
    out: Tensor = given[0] if isinstance(given, tuple) else given
    return out.transpose(1, 2)


def _flash_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    return _tokens_first(importlib.import_module("flash_attn").flash_attn_func, q, k, v)


def _flash_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    return _tokens_first(importlib.import_module("flash_attn_interface").flash_attn_func, q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    return _tokens_first(importlib.import_module("xformers.ops").memory_efficient_attention, q, k, v)


def _sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    sageattn = importlib.import_module("sageattention").sageattn
    return sageattn(q.contiguous(), k.contiguous(), v.contiguous(), tensor_layout="HND", is_causal=False)


@cache
def compiled_flex() -> Callable[..., Any]:
    """FlexAttention is fast and small in memory only when it is compiled."""
    return torch.compile(importlib.import_module("torch.nn.attention.flex_attention").flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    return compiled_flex()(q, k, v)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="sdpa",
            title="torch's own choice",
            run=_sdpa,
            takes=lambda q, k, v, mask: True,
            needs_gpu=False,
            trusted=True,
        ),
        Backend(
            name="sdpa_cudnn",
            title="cuDNN's kernel in torch",
            **_torch_kernel("CUDNN_ATTENTION", "can_use_cudnn_attention"),
        ),
        Backend(
            name="sdpa_flash",
            title="FlashAttention 2 in torch",
            **_torch_kernel("FLASH_ATTENTION", "can_use_flash_attention"),
        ),
        Backend(
            name="sdpa_efficient",
            title="The memory-efficient kernel in torch",
            **_torch_kernel("EFFICIENT_ATTENTION", "can_use_efficient_attention"),
        ),
        Backend(
            name="sdpa_math",
            title="Plain matrix products",
            run=_math,
            takes=lambda q, k, v, mask: True,
            needs_gpu=False,
            trusted=True,
        ),
        Backend(
            name="flex",
            title="FlexAttention",
            run=_flex,
            takes=lambda q, k, v, mask: _half_on_gpu(q, mask, max_width=256, capability=(8, 0)),
            library=Library("triton", "triton"),
        ),
        Backend(
            name="flash_attn_2",
            title="flash-attn 2",
            run=_flash_2,
            takes=lambda q, k, v, mask: _half_on_gpu(q, mask, max_width=256, capability=(8, 0)),
            library=Library("flash_attn", "flash-attn"),
        ),
        Backend(
            name="flash_attn_3",
            title="flash-attn 3",
            run=_flash_3,
            takes=lambda q, k, v, mask: _half_on_gpu(q, mask, max_width=256, capability=(9, 0)),
            library=Library("flash_attn_interface", "flash-attn-3"),
        ),
        Backend(
            name="sageattn",
            title="SageAttention",
            run=_sage,
            takes=lambda q, k, v, mask: _half_on_gpu(q, mask, max_width=128, capability=(8, 0)),
            library=Library("sageattention", "sageattention"),
            approximate=True,
        ),
        Backend(
            name="xformers",
            title="xFormers",
            run=_xformers,
            takes=lambda q, k, v, mask: _half_on_gpu(q, mask, max_width=256, capability=(7, 0)),
            library=Library("xformers", "xformers"),
        ),
    )
}
"""name -> backend; the names are in saved workflows and stay"""
CHOICES = (AUTO, *BACKENDS)


def _order(device: torch.device) -> tuple[str, ...]:
    """What "auto" tries, best first; the last one takes everything.

    Dense bfloat16 on an H100 at 16k tokens and d = 128: flash-attn 3 reaches 650 TFLOP/s, cuDNN 600, flash-attn 2 370
    (figures of the FlashAttention-3 paper, arXiv:2407.08608). Before Hopper cuDNN has no such lead.
    """
    if device.type != "cuda":
        return ("sdpa",)
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    first = ("flash_attn_3", "sdpa_cudnn") if hopper else ()
    return (*first, "sdpa_flash", "flash_attn_2", "sdpa_efficient", "xformers", "sdpa")


# --- padding ----------------------------------------------------------------------------------------------------------

WORTH_A_COPY = 0.1
"""share of the keys that must be padding before the others are copied together on a CPU"""


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """Consecutive samples of a batch that look at the same keys."""

    rows: slice
    keys: slice | Tensor
    """their places: a slice where the padding is at the end"""
    num_keys: int


_groups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""mask -> groups: reading a mask stops a GPU, and all layers of a network are given the same one"""


def key_groups(mask: Tensor) -> list[KeyGroup]:
    """The samples of a mask over keys (B, 1, 1, S), put together where they are alike."""
    known = _groups.get(mask)
    if known is not None:
        return known
    rows = mask[:, 0, 0].cpu()
    groups = []
    start = 0
    for row in range(1, len(rows) + 1):
        if row < len(rows) and torch.equal(rows[row], rows[start]):
            continue
        places = rows[start].nonzero().flatten()
        count = len(places)
        at_the_front = count > 0 and int(places[-1]) == count - 1
        keys = slice(0, count) if at_the_front else places.to(mask.device)
        groups.append(KeyGroup(slice(start, row if len(rows) > 1 else None), keys, count))
        start = row
    _groups[mask] = groups
    return groups


def without_padding(mask: Tensor | None) -> list[KeyGroup] | None:
    """The groups to compute one by one instead of masking; None where that is not possible or does not pay."""
    if mask is None or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or mask.dtype != torch.bool:
        return None
    groups = key_groups(mask)
    if any(group.num_keys == 0 for group in groups):
        return None
    if mask.device.type == "cuda":
        return groups  # the fast kernels take no mask
    seen = sum(group.num_keys for group in groups) / (len(groups) * mask.shape[-1])
    copies = any(isinstance(group.keys, Tensor) for group in groups)
    return None if copies and seen > 1 - WORTH_A_COPY else groups


def by_groups(attend: Attend, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[KeyGroup]) -> Tensor:
    """Attention of each group to its own keys, without a mask."""
    parts = [attend(q[g.rows], k[g.rows, :, g.keys], v[g.rows, :, g.keys], None) for g in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_PACKABLE = ("sdpa_flash", "flash_attn_2")
"""backends that are the kernel which also takes packed samples"""


def _has_varlen(q: Tensor) -> bool:
    """torch has its kernel for sequences of different lengths laid end to end from 2.10 on."""
    return (
        _half_on_gpu(q, None, max_width=256, capability=(8, 0))
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None
    )


def varlen_kernel() -> Callable[..., Any]:
    return importlib.import_module("torch.nn.attention.varlen").varlen_attn


def _packed(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[KeyGroup], kernel: Callable[..., Any]) -> Tensor:
    """All samples in one call, each with its own keys; one group per sample."""
    batch, heads, length, width = q.shape
    counts = [group.num_keys for group in groups]
    ends = torch.tensor([[0, *(length for _ in groups)], [0, *counts]]).cumsum(1).to(device=q.device, dtype=torch.int32)
    keys, values = (torch.cat([x[g.rows, :, g.keys].transpose(1, 2).flatten(0, 1) for g in groups]) for x in (k, v))
    queries = q.transpose(1, 2).reshape(batch * length, heads, width)
    out: Tensor = kernel(queries, keys, values, ends[0], ends[1], length, max(counts))
    return out.view(batch, length, heads, width).transpose(1, 2)


# --- choosing ---------------------------------------------------------------------------------------------------------

_Class = tuple[Any, ...]
_verdicts: dict[_Class, Backend] = {}
"""class of shapes -> what computes it"""
_packed_verdicts: dict[_Class, bool] = {}
_said: set[tuple[str, ...]] = set()


class Dispatcher:
    """Attention under a choice: an :data:`Attend`.

    Gradients go through torch's own choice; training is another matter than speed at the end of it.
    """

    def __init__(self, choice: AttentionChoice) -> None:
        self.choice = choice

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.is_meta or needs_gradients(q, k, v):  # without numbers there is nothing to choose by
            return plain(q, k, v, mask)
        if mask is not None and mask.ndim < 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        groups = without_padding(mask)
        if groups is None:
            return self._dense(q, k, v, mask)
        if len(groups) == q.shape[0] > 1 and self._packs(q, k, v, groups):
            return _packed(q, k, v, groups, varlen_kernel())
        return by_groups(self._dense, q, k, v, groups)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.backend_for(q, k, v, mask).run(q, k, v, mask, self.choice.max_score_bytes)

    def _packs(self, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[KeyGroup]) -> bool:
        """Whether the samples go in one call: where each alone would go to the same kernel, and if that is right."""
        if not _has_varlen(q) or self.backend_for(q[:1], k[:1], v[:1], None).name not in _PACKABLE:
            return False
        key = (q.device, q.dtype, q.shape[-1], q.shape[2].bit_length(), k.shape[2].bit_length())
        if key not in _packed_verdicts:
            problem = compare(
                lambda q, k, v: _packed(q, k, v, groups, varlen_kernel()),
                lambda q, k, v: by_groups(plain, q, k, v, groups),
                [x[:, :1] for x in (q[:, :, : _SAMPLE[1]], k, v)],
                TOLERANCE[q.dtype],
            )
            if problem is not None:
                say_once(logging.WARNING, "attention on %s: packed samples are left out, %s", str(q.device), problem)
            _packed_verdicts[key] = problem is None
        return _packed_verdicts[key]

    def backend_for(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Backend:
        """The backend of these tensors: decided once for their class of shapes."""
        lengths = q.shape[2].bit_length(), k.shape[2].bit_length()
        key = (
            self.choice.backend,
            q.device,
            q.dtype,
            q.shape[-1],
            None if mask is None else mask.shape[-2] > 1,
            *lengths,
        )
        known = _verdicts.get(key)
        if known is None:
            known = _verdicts[key] = self._decide(q, k, v, mask)
        return known

    def _decide(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Backend:
        wanted = () if self.choice.backend == AUTO else (self.choice.backend,)
        for name in (*wanted, *_order(q.device)):
            backend = BACKENDS[name]
            if not (backend.is_installed and (q.device.type == "cuda" or not backend.needs_gpu)):
                continue
            if not backend.takes(q, k, v, mask):
                continue
            problem = None if backend.trusted else find_problem(backend, q, k, v, mask)
            if problem is None:
                say_once(logging.INFO, "attention on %s runs on %s (%s)", str(q.device), backend.title, backend.name)
                return backend
            say_once(logging.WARNING, "attention on %s: %s is left out, %s", str(q.device), backend.title, problem)
        return BACKENDS["sdpa"]


def say_once(level: int, *words: str) -> None:
    if words not in _said:
        _said.add(words)
        log.log(level, *words)


def forget_verdicts() -> None:
    """Look again at what is installed and right."""
    _verdicts.clear()
    _packed_verdicts.clear()
    _said.clear()
    _is_installed.cache_clear()


# --- trusting ---------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""relative root mean square to float32 arithmetic: a few roundings of the dtype; a wrong kernel is off by 1"""
ROUGH = 0.1
"""the same for approximate backends: 8-bit scores give 0.02 to 0.05"""
_SAMPLE = 2, 256, 1024
"""heads, queries and keys that are looked at"""


def find_problem(backend: Backend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why a backend is not to be trusted with such tensors, tried on a small piece of them; None if it is."""
    heads, queries, keys = _SAMPLE
    q, k, v = q[:1, :heads, :queries], k[:1, :heads, :keys], v[:1, :heads, :keys]
    mask = None if mask is None else mask[:1, :heads, :queries, :keys]
    limit = ROUGH if backend.approximate else TOLERANCE.get(q.dtype, 2e-2)
    return compare(
        lambda q, k, v: backend.run(q, k, v, mask, MAX_SCORE_BYTES),
        lambda q, k, v: _math(q, k, v, mask, MAX_SCORE_BYTES),
        (q, k, v),
        limit,
    )


def compare(
    tried: Callable[..., Tensor], trusted: Callable[..., Tensor], qkv: Sequence[Tensor], limit: float
) -> str | None:
    """What is wrong with ``tried(q, k, v)`` beside ``trusted`` of the same in float32; None if nothing is."""
    try:
        found = tried(*qkv)
    except torch.cuda.OutOfMemoryError:
        raise
    except KERNEL_ERRORS as error:
        return f"it fails: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    exact = torch.float64 if found.dtype == torch.float64 else torch.float32
    expected = trusted(*(x.to(exact) for x in qkv))
    if found.shape != expected.shape:
        return f"it gives shape {tuple(found.shape)}"
    error = float((found.to(exact) - expected).norm() / expected.norm().clamp(min=1e-20))
    if error <= limit or not math.isfinite(float(expected.norm())):  # numbers that are no longer finite prove nothing
        return None
    return f"it is off by {error:.2g}"
