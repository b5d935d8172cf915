"""LoRAs on a network: beside its modules at run time, or merged into their weights, and taken off again to the bit.

At run time a hook adds ``x @ down.T @ up.T`` to what a linear layer gives: the stored weight is not touched, so it may
be quantised, shared, or away between two uses. Merging puts a new parameter in the old one's place and keeps the old
one. Both compute the same function; several LoRAs add up, whatever their order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block_names import fits
from .errors import SettingsError, unknown_name
from .weights.adapters import Change, LowRank, pad_inputs
from .weights.keymap import KeyMap
from .weights.lora import Lora
from .weights.lora_names import BoundLora, ModuleNames, Patch, bind

Mode = Literal["auto", "runtime", "merge"]
MODES: tuple[Mode, ...] = get_args(Mode)


# --- strengths --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockStrengths:
    """A factor for each module: that of the last pattern that fits it, else 1."""

    patterns: tuple[tuple[str, float], ...] = ()
    """(path of a block with ``*`` and ranges like ``0-9``, factor)"""

    @classmethod
    def parse(cls, text: str) -> BlockStrengths:
        """From ``"double_blocks.*: 1, single_blocks.0-9: 0.5"`` or ``"double_blocks only"``; lines count as commas.

        ``double`` may stand for ``double_blocks``.

        Raises:
            SettingsError: a part cannot be read.
        """
        patterns: list[tuple[str, float]] = []
        for item in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
            if only := re.fullmatch(r"(\S+)\s+only", item):
                patterns += [("*", 0.0), (only[1], 1.0)]
                continue
            pattern, colon, number = item.rpartition(":")
            if not colon or not re.fullmatch(r"[\w.*?-]+", pattern.strip()):
                raise _unreadable(item)
            try:
                patterns.append((pattern.strip(), float(number)))
            except ValueError:
                raise _unreadable(item) from None
        for pattern, factor in patterns:
            check_strength(factor, f"strength of {pattern}")
        return cls(tuple(patterns))

    def of(self, module: str) -> float:
        factors = [factor for pattern, factor in self.patterns if fits(pattern, module)]
        return factors[-1] if factors else 1.0

    def check(self, modules: Sequence[str]) -> None:
        """Raise SettingsError for a pattern that fits none of these modules: it is most likely misspelt."""
        for pattern, _ in self.patterns:
            if not any(fits(pattern, module) for module in modules):
                blocks = sorted({module.partition(".")[0] for module in modules})
                raise SettingsError(
                    "No block that this LoRA changes fits the pattern",
                    given=pattern,
                    expected="blocks in " + ", ".join(blocks),
                )

    def __str__(self) -> str:
        return ", ".join(f"{pattern}: {factor:g}" for pattern, factor in self.patterns)


def _unreadable(item: str) -> SettingsError:
    return SettingsError(
        "The strengths of the blocks cannot be read",
        given=item,
        expected='PATTERN: NUMBER, such as "double_blocks.*: 1, single_blocks.0-9: 0.5", or "double_blocks only"',
    )


def check_strength(value: object, what: str = "strength of the LoRA") -> None:
    """Raise SettingsError unless it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingsError(f"The {what} cannot be used", given=repr(value), expected="a number such as 1 or -0.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraUse:
    """A LoRA matched to a network, and how strongly it acts."""

    lora: BoundLora
    strength: float = 1.0
    blocks: BlockStrengths = BlockStrengths()
    mode: Mode = "auto"
    """"runtime", "merge", or "auto": factors run beside the weights, whole differences are merged where they can be"""

    def __post_init__(self) -> None:
        check_strength(self.strength)
        if self.mode not in MODES:
            raise unknown_name("mode of a LoRA", self.mode, MODES)
        self.blocks.check(self.lora.report.modules)

    @property
    def widened(self) -> Mapping[str, int]:
        """Input layers that are enlarged -> their number of input channels."""
        return {
            module: channels
            for module, channels in self.lora.widened.items()
            if self.strength * self.blocks.of(module) != 0
        }

    @property
    def identity(self) -> list[Any]:
        """What the result depends on, as JSON values; the mode changes no more than the rounding."""
        return [self.lora.report.digest, self.strength, str(self.blocks)]


# --- the network's side -----------------------------------------------------------------------------------------------


def module_names(network: nn.Module, layouts: Mapping[str, Any]) -> ModuleNames:
    """The names that a LoRA may call the modules of ``network``; it may be on the meta device."""
    shapes = {name: shape for name, module in network.named_modules() if (shape := weight_shape(module)) is not None}
    return ModuleNames(shapes, {name: layout for name, layout in layouts.items() if isinstance(layout, KeyMap)})


def bind_to(lora: Lora, network: nn.Module, layouts: Mapping[str, Any]) -> BoundLora:
    """:func:`weights.lora_names.bind` to a built network."""
    return bind(lora, module_names(network, layouts))


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Of the dense weight, also where a quantised one is packed; None for a module without a weight of its own."""
    if hasattr(module, "dense_weight"):
        return int(cast(Any, module).out_features), int(cast(Any, module).in_features)
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def apply_loras(network: nn.Module, uses: Sequence[LoraUse]) -> Applied:
    """Put LoRAs on a network until :meth:`Applied.remove`, or the end of a ``with`` block.

    The network's stored tensors are never written to. Put on all at once, not one inside the other: a DoRA looks at
    the weights as they are stored.

    Raises:
        SettingsError: a LoRA is to be merged into weights that are quantised or not there.
    """
    parts: dict[str, list[_Part]] = {}
    wants: dict[str, set[Mode]] = {}
    for use in uses:
        for patch in use.lora.patches:
            strength = use.strength * use.blocks.of(patch.module)
            if strength:
                parts.setdefault(patch.module, []).append(_Part(patch, strength))
                wants.setdefault(patch.module, set()).add(use.mode)
    applied = Applied()
    try:
        for name, own in parts.items():
            _apply(network.get_submodule(name), name, own, wants[name], applied)
    except BaseException:
        applied.remove()
        raise
    return applied


class Applied:
    """LoRAs that are on a network now."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self._kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self.merged: list[str] = []
        """modules with other weights than before; the rest is changed at run time"""

    def hook(self, handle: Any) -> None:
        self._hooks.append(handle)

    def wrap(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Another ``forward`` until the LoRAs go. Not hooks: torch does not call them for a KeyboardInterrupt."""
        self._wrapped.append((module, vars(module).get("forward")))
        module.forward = forward

    def exchange(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Put ``value`` in the place of a parameter until the LoRAs go."""
        self._kept.append((module, name, getattr(module, name)))
        setattr(module, name, nn.Parameter(value, requires_grad=False))

    def remove(self) -> None:
        """The network is as it was, the very same parameters included. A second call does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._wrapped:
            module, forward = self._wrapped.pop()
            if forward is None:
                del module.forward  # the class has its own
            else:
                module.forward = forward
        while self._kept:
            module, name, parameter = self._kept.pop()
            setattr(module, name, parameter)

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@dataclass(frozen=True, slots=True)
class _Part:
    patch: Patch
    strength: float


def _apply(module: nn.Module, name: str, parts: list[_Part], wants: set[Mode], applied: Applied) -> None:
    stored = _has_plain_weight(module)
    if "merge" in wants and not stored:
        raise SettingsError(
            "A LoRA cannot be merged into weights that are quantised or not in memory",
            given=name,
            do="use the mode auto or runtime",
        )
    whole = any(part.patch.change is not None and not isinstance(part.patch.change, LowRank) for part in parts)
    if stored and ("merge" in wants or (whole and "runtime" not in wants)):
        weight, bias = _merged(module, parts)
        applied.exchange(module, "weight", weight)
        if bias is not None:
            applied.exchange(module, "bias", bias)
        applied.merged.append(name)
    elif isinstance(module, nn.Linear) or hasattr(module, "dense_weight"):
        # First of its kind: others may take the weight away.
        applied.hook(module.register_forward_hook(_SideBranch(parts), prepend=True))
    else:  # convolutions and norms are small: they get their new weight for the time of each call
        applied.wrap(module, partial(_with_new_weight, module, parts, module.forward))


def can_merge(network: nn.Module, use: LoraUse) -> bool:
    """Whether every weight that a LoRA changes is in memory as plain numbers."""
    return all(_has_plain_weight(network.get_submodule(patch.module)) for patch in use.lora.patches)


def _has_plain_weight(module: nn.Module) -> bool:
    if hasattr(module, "dense_weight"):  # its weight, if it has one, is made at every look
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.is_meta:
        return False
    return weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _merged(module: nn.Module, parts: Sequence[_Part]) -> tuple[Tensor, Tensor | None]:
    """The weight with the changes, and the bias if it changes: float32 arithmetic, then the dtype of the old ones."""
    with torch.no_grad():
        stored = cast(Tensor, module.weight)
        base = stored.float()
        for part in parts:
            if part.patch.change is not None and _is_like(part.patch.change, base):
                base = pad_inputs(base, part.patch.change.shape[1])
        total = base.clone()
        for part in parts:
            change = part.patch.change
            if change is not None:
                rows = slice(part.patch.start, part.patch.start + part.patch.length)
                total[rows] += part.strength * _delta(change, base[rows])
        weight = total.to(stored.dtype)
        biased = [part for part in parts if part.patch.bias is not None]
        if not biased:
            return weight, None
        old = module.bias
        bias = torch.zeros(stored.shape[0], device=stored.device) if old is None else cast(Tensor, old).float().clone()
        for part in biased:
            _add_bias(bias, part)
        return weight, bias.to(stored.dtype if old is None else cast(Tensor, old).dtype)


def _is_like(change: Change, base: Tensor) -> bool:
    """Both are kernels of a convolution, whose inputs may differ in number."""
    return base.ndim > 2 and len(change.shape) == base.ndim


def _delta(change: Change, base: Tensor) -> Tensor:
    """The difference on the base's device and in its shape; a change of fewer inputs leaves the others alone."""
    moved = change.map(lambda tensor: tensor.to(base.device))
    narrow = _is_like(change, base) and change.shape[1] < base.shape[1]
    delta = moved.delta((base[:, : change.shape[1]] if narrow else base).reshape(change.shape))
    return pad_inputs(delta, base.shape[1]) if narrow else delta.reshape(base.shape)


def _add_bias(total: Tensor, part: _Part) -> None:
    assert part.patch.bias is not None
    rows = slice(part.patch.start, part.patch.start + part.patch.length)
    total[rows] += part.strength * part.patch.bias.to(total)


class _SideBranch:
    """What LoRAs add to the output of one linear layer."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        self._at: tuple[torch.device, torch.dtype] | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,) = inputs
        if self._at != (x.device, x.dtype):
            self._factors, self._at = self._low_rank_factors(x), (x.device, x.dtype)
        base = self._base(module)
        for index, part in enumerate(self._parts):
            rows = output.narrow(-1, part.patch.start, part.patch.length)
            if index in self._factors:
                down, up = self._factors[index]
                rows += F.linear(F.linear(x, down), up)
            elif part.patch.change is not None:
                own = None if base is None else base.narrow(0, part.patch.start, part.patch.length).float()
                delta = part.strength * self._dense(part.patch.change, own, x.device)
                rows += F.linear(x, delta.flatten(1).to(x.dtype))
            if part.patch.bias is not None:
                rows += (part.strength * part.patch.bias.float()).to(output)
        return output

    def _low_rank_factors(self, x: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """On the device and in the dtype of the input; scale and strength go into ``up`` before it is rounded."""
        factors = {}
        for index, part in enumerate(self._parts):
            change = part.patch.change
            if isinstance(change, LowRank) and change.mid is None:
                up = change.up.to(x.device).float().flatten(1) * (change.scale * part.strength)
                factors[index] = change.down.to(x).flatten(1), up.to(x.dtype)
        return factors

    def _base(self, module: nn.Module) -> Tensor | None:
        """The dense weight where a change asks for it."""
        if not any(part.patch.change is not None and part.patch.change.needs_base for part in self._parts):
            return None
        return module.dense_weight() if hasattr(module, "dense_weight") else module.weight  # type: ignore[operator, return-value]

    def _dense(self, change: Change, base: Tensor | None, device: torch.device) -> Tensor:
        moved = change.map(lambda tensor: tensor.to(device))
        return moved.delta(None if base is None else base.to(device).reshape(change.shape))


def _with_new_weight(
    module: nn.Module, parts: Sequence[_Part], forward: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """``forward`` while the module has its new weight; it has its stored one at any other time."""
    weight, bias = _merged(module, parts)
    with Applied() as during:
        during.exchange(module, "weight", weight)
        if bias is not None:
            during.exchange(module, "bias", bias)
        return forward(*args, **kwargs)


def describe(lora: BoundLora) -> str:
    """One line on what a matched LoRA is."""
    report = lora.report
    ranks = ", ".join(map(str, report.ranks)) or "none"
    alphas = ", ".join(f"{alpha:g}" for alpha in report.alphas) or "none"
    text = f"{report.name}: {report.dialect}, {len(report.modules)} modules, rank {ranks}, alpha {alphas}"
    for module, channels in lora.widened.items():
        text += f", enlarges {module} to {channels} input channels"
    return text
