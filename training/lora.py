"""LoRA training: small factors beside the linear layers of a frozen network, and the files they end in.

Source: Hu et al. 2021, arXiv:2106.09685. The product of the factors counts alpha / rank and starts at zero.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vidgen_core.errors import RecipeError
from ..vidgen_core.lora import module_names
from ..vidgen_core.model import VideoModel
from ..vidgen_core.weights.adapters import LowRank
from ..vidgen_core.weights.config import unknown_name
from ..vidgen_core.weights.lora_names import Patch
from ..vidgen_core.weights.lora_write import DIALECTS, write_lora


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """``[lora]``: train factors beside the network of ``init``, which stays as it is."""

    rank: int = 16
    alpha: float | None = None
    """the product of the factors counts alpha / rank; None: alpha is the rank"""
    targets: tuple[str, ...] = ()
    """linear layers, by the end of their path or a pattern of it ("linear1", "double_blocks.*"); none: the family's"""
    dialects: tuple[str, ...] = ("musubi", "diffusers")
    """spellings that are written, keys of ``weights.lora_write.DIALECTS``; a file for each"""

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def check(self) -> None:
        """Raise :class:`RecipeError` for values that cannot work."""
        if self.rank < 1:
            raise RecipeError("A LoRA needs a rank", given=f"lora.rank = {self.rank}", expected="1 or more, such as 16")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise RecipeError(
                "A value of the recipe cannot be used", given=f"lora.alpha = {self.alpha}", expected="> 0"
            )
        for dialect in self.dialects:
            if dialect not in DIALECTS:
                raise unknown_name(
                    "spelling of a LoRA", dialect, list(DIALECTS), where="lora.dialects", error=RecipeError
                )


class Adapter(nn.Module):
    """What one linear layer learns: ``scale * up @ down``, nothing at first."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(linear.in_features)
        start = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down), self.up)


class Adapters(nn.Module):
    """Adapters beside the linear layers of a network, for as long as the network lives; the rest of it is frozen.

    Args:
        targets: as :attr:`LoraSettings.targets`, where none are named.

    Raises:
        RecipeError: a target fits no linear layer.
    """

    def __init__(
        self, network: nn.Module, settings: LoraSettings, targets: Sequence[str], generator: torch.Generator
    ) -> None:
        super().__init__()
        settings.check()
        network.requires_grad_(False)
        linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
        self.names = targeted(list(linears), settings.targets or targets)
        # A module's name may not have dots in it.
        self.layers = nn.ModuleDict()
        for name in self.names:
            adapter = Adapter(linears[name], settings.rank, settings.scale, generator)
            self.layers[name.replace(".", "_")] = adapter
            linears[name].register_forward_hook(_beside(adapter))

    def patches(self, dtype: torch.dtype) -> list[Patch]:
        """What was learned, by the native names of the layers."""
        return [_patch(name, adapter, dtype) for name, adapter in zip(self.names, self.layers.values(), strict=True)]


def _beside(adapter: nn.Module) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + adapter(inputs[0])

    return add


def _patch(name: str, adapter: nn.Module, dtype: torch.dtype) -> Patch:
    assert isinstance(adapter, Adapter)
    down, up = (factor.detach().to("cpu", dtype) for factor in (adapter.down, adapter.up))
    change = LowRank(down=down, up=up, scale=adapter.scale)
    return Patch(module=name, change=change, bias=None, start=0, length=up.shape[0])


def targeted(names: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """The layers that the targets mean, in the order of ``names``; RecipeError for a target that means none."""
    chosen: set[str] = set()
    for target in targets:
        fitting = {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in (target, f"*.{target}"))}
        if not fitting:
            endings = sorted({name.rpartition(".")[2] for name in names if "blocks." in name})
            raise unknown_name("layer to put a LoRA on", target, endings, where="lora.targets", error=RecipeError)
        chosen |= fitting
    return tuple(name for name in names if name in chosen)


def write_loras(
    folder: Path, adapters: Adapters, settings: LoraSettings, model: VideoModel, **notes: str
) -> list[Path]:
    """Write ``lora_DIALECT.safetensors`` for each of the settings' dialects.

    The metadata names the family, the base by its fingerprint, rank and alpha (under the keys that trainers use).

    Args:
        notes: become ``modelspec.`` metadata: title, description, ...

    Raises:
        FileError: a file cannot be written.
    """
    layouts = model.family.parts["network"].layouts
    names = module_names(model.network, layouts)
    patches = adapters.patches(torch.float16)
    alpha = settings.scale * settings.rank
    metadata: Mapping[str, str] = {
        "vidgen.base": model.fingerprint,
        "ss_network_dim": str(settings.rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_module": "networks.lora",
        "modelspec.architecture": f"{model.family.name}-video/lora",
        **{f"modelspec.{key}": value for key, value in notes.items()},
    }
    paths = [folder / f"lora_{dialect}.safetensors" for dialect in settings.dialects]
    for path, dialect in zip(paths, settings.dialects, strict=True):
        write_lora(path, patches, names, dialect, metadata=metadata)
    return paths
