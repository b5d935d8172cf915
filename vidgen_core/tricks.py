"""What may be done around a network without touching it: one frozen record, applied in one fixed order.

From the outside in, for each question of the sampler:

1. ``windows`` cut a long video; everything below sees one window (and ``windows`` shuffle the noise, if asked);
2. ``cfg_zero`` answers the first steps itself, and scales the unconditional answer of guidance;
3. ``skip_layers``, then ``stg``, push the guided answer away from that of a weakened network;
4. ``riflex`` changes the frame axis' rotation;
5. ``cache`` decides whether the blocks run; ``enhance`` acts in the attention of those that do.

Each is off by default, and one that cannot act (weight 0, no blocks, a window as long as the video, threshold 0)
changes no bit. Held frames and masks stay outside of all: what is given comes out as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from .blocks import block_numbers, block_paths
from .caching import StepCache
from .diffusion import Diffusion
from .errors import SettingsError
from .families import Config, Family
from .windows import Windows

NUMBERS = "a number such as 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeakPass:
    """Guidance away from what the network says without some of its blocks."""

    blocks: str = "auto"
    """see ``blocks.block_numbers``; empty is off"""
    scale: float = 1.0
    """of the difference; 0 is off"""
    start: float = 1.0
    """acts from this time (1 is noise) ..."""
    end: float = 0.0
    """... to this one (0 is clean)"""
    rescale: float = 0.0
    """0 to 1: how far the result is given the spread of the unweakened answer"""
    attention_only: bool = False
    """the blocks run, but their tokens attend to themselves alone"""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise SettingsError("The scale of the weak pass cannot be used", given=self.scale, expected=NUMBERS)
        if not 1 >= self.start >= self.end >= 0 or not 0 <= self.rescale <= 1:
            raise SettingsError(
                "The weak pass cannot be used",
                given=f"start {self.start}, end {self.end}, rescale {self.rescale}",
                expected="1 >= start >= end >= 0 (1 is noise, 0 is clean), rescale from 0 to 1",
            )

    def scale_at(self, t: float) -> float:
        return self.scale if self.end <= t <= self.start else 0.0

    @property
    def identity(self) -> list[Any]:
        return [self.blocks, self.scale, self.start, self.end, self.rescale, self.attention_only]


@dataclass(frozen=True, slots=True, kw_only=True)
class CfgZero:
    """CFG-Zero* (Fan et al. 2025)."""

    zero_steps: int = 1
    """steps at the beginning that stand still; for flow matching alone"""
    projected: bool = True
    """the unconditional answer is scaled to lie nearest to the conditional one"""

    def __post_init__(self) -> None:
        if self.zero_steps < 0:
            raise SettingsError("The number of zero steps cannot be used", given=self.zero_steps, expected="0 or more")

    @property
    def identity(self) -> list[Any]:
        return [self.zero_steps, self.projected]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enhance:
    """Enhance-A-Video (Luo et al. 2025): stronger attention between frames."""

    weight: float = 1.0
    """0 is off"""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise SettingsError("The weight of Enhance-A-Video cannot be used", given=self.weight, expected=NUMBERS)

    @property
    def identity(self) -> list[Any]:
        return [self.weight]


@dataclass(frozen=True, slots=True, kw_only=True)
class Riflex:
    """RIFLEx (Zhao et al. 2025): longer videos without repetition."""

    component: int | None = None
    """which frequency is slowed down, 0 is the fastest; None: the one that repeats at the trained length"""
    trained_length: int | None = None
    """latent frames that the network has learned; None: the checkpoint's own default"""

    def __post_init__(self) -> None:
        if (self.trained_length is not None and self.trained_length < 1) or (self.component or 0) < 0:
            raise SettingsError(
                "RIFLEx cannot be used",
                given=f"frequency {self.component}, trained length {self.trained_length}",
                expected="a frequency from 0 and a length from 1",
            )

    @property
    def identity(self) -> list[Any]:
        return [self.component, self.trained_length]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tricks:
    """See the module's text for the order in which they act."""

    windows: Windows | None = None
    cfg_zero: CfgZero | None = None
    skip_layers: WeakPass | None = None
    stg: WeakPass | None = None
    riflex: Riflex | None = None
    cache: StepCache | None = None
    enhance: Enhance | None = None

    @property
    def identity(self) -> dict[str, list[Any]] | None:
        """What the result depends on, as JSON values; None when all are off."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: trick.identity for name, trick in given.items() if trick is not None} or None

    @property
    def weak_passes(self) -> tuple[WeakPass, ...]:
        """In the order they are applied; those that do nothing are left out."""
        return tuple(p for p in (self.skip_layers, self.stg) if p is not None and p.scale and p.blocks.strip())

    @property
    def around_blocks(self) -> bool:
        """Whether something stands around the blocks."""
        return bool(self.cache or self.weak_passes or (self.enhance and self.enhance.weight))

    def check(self, family: Family, config: Config, network: nn.Module, diffusion: Diffusion, checkpoint: str) -> None:
        """Raise SettingsError for what this network cannot do."""
        if (self.around_blocks or self.riflex) and family.block_rules is None:
            named = ("skip_layers", "stg", "riflex", "cache", "enhance")
            raise SettingsError(
                f"{family.title} has no blocks that something can be done around",
                given=", ".join(name for name in named if getattr(self, name)),
                do="leave these nodes out",
            )
        if self.weak_passes:
            paths = block_paths(network, family.blocks)
            for weak in self.weak_passes:
                block_numbers(weak.blocks, paths)
        if self.cfg_zero is not None and self.cfg_zero.zero_steps and not diffusion.straight:
            raise SettingsError(
                "Zero steps are for flow matching: elsewhere an output of zero does not mean to stand still",
                given=f"{self.cfg_zero.zero_steps} zero steps for {family.title}",
                expected="0 zero steps",
            )
        step = family.patch(config)[0]
        if self.windows is not None and self.windows.size % step:
            raise SettingsError(
                "The windows cannot be cut into the network's patches",
                given=f"{self.windows.size} latent frames",
                expected=f"a multiple of {step}, as {family.title} reads {step} latent frames as one",
            )
        if self.riflex is not None:
            self._check_riflex(family, config, self.riflex)
        curve = None if self.cache is None else self.cache.curve
        if curve is not None and curve.checkpoint and checkpoint and curve.checkpoint != checkpoint:
            raise SettingsError(
                "The magnitude curve was measured on another model",
                given=curve.checkpoint,
                expected=checkpoint,
                do="measure it again with Calibrate Cache",
            )

    @staticmethod
    def _check_riflex(family: Family, config: Config, riflex: Riflex) -> None:
        assert family.block_rules is not None
        rope = family.block_rules.time_rope(config)
        if rope is None:
            raise SettingsError(f"{family.title} does not rotate its frame axis", do="leave RIFLEx out")
        if riflex.component is not None and riflex.component >= rope[0] // 2:
            raise SettingsError(
                "The frame axis has no such frequency",
                given=riflex.component,
                expected=f"from 0 to {rope[0] // 2 - 1}",
                do="leave it at auto",
            )
