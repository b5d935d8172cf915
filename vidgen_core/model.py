"""A diffusion network with everything needed to ask it something: inference and training share :class:`VideoModel`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .codec import Codec
from .diffusion import Diffusion, fit, wide
from .errors import CheckpointError
from .families import FAMILIES, TITLES, Config, Family, Found, identify
from .preview import METADATA_KEY as PREVIEW_KEY
from .preview import LatentRGB
from .types import Conditioning, Defaults, Denoise, Held
from .weights.config import config_from_json
from .weights.header import Header, read_header
from .weights.load import load_module


@dataclass(slots=True, kw_only=True)
class VideoModel:
    """The diffusion network of a family, its noise process, and what a user gets who says nothing."""

    family: Family
    config: Config
    network: nn.Module
    diffusion: Diffusion
    defaults: Defaults
    fingerprint: str = ""
    """of the checkpoint; a saved run is only taken up again with the same one"""
    preview: LatentRGB | None = None
    """how to show unfinished latents, if the checkpoint says so"""

    @classmethod
    def of(cls, family: str, config: Config, network: nn.Module, **kwargs: Any) -> VideoModel:
        """Around a network that was built here, e.g. for training. More fields may be given by name."""
        record = FAMILIES[family]
        fields = {"diffusion": record.diffusion(config), "defaults": record.defaults, **kwargs}
        return cls(family=record, config=config, network=network, **fields)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's raw output for noisy latents, in the dtype of ``x_t``. Gradients flow.

        Args:
            x_t: (B, C, T, H, W).
            t: 0-dim, (B,), or (B, 1, T, 1, 1) with a time per latent frame.
            cond: of batch B.
        """
        t = wide(t)
        scaled = x_t * fit(self.diffusion.input_scale(t), x_t)
        clock = self.diffusion.clock(t).to(device=x_t.device, dtype=torch.float32)
        inputs = self.family.network_inputs(self.config, scaled, clock, cond)
        return self.network(**inputs).to(x_t.dtype)

    def conditioning(self, features: Any, *, guidance: float | None = None) -> Conditioning:
        """What the network is told for these text features; ``guidance`` None takes the checkpoint's default."""
        guidance = self.defaults.guidance if guidance is None else guidance
        return self.family.condition(self.config, features, guidance)


def denoiser(model: VideoModel, cond: Conditioning) -> Denoise:
    """``(x_t, t) -> x0`` of the network under one conditioning; a conditioning of batch 1 serves every sample."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        output = model.predict(x_t, t, cond.expand(x_t.shape[0]))
        return model.diffusion.to_x0(x_t, output, t)

    return denoise


def denoiser_pair(
    model: VideoModel,
    cond: Conditioning,
    uncond: Conditioning,
    *,
    both_at: Callable[[float], bool] = lambda t: True,
) -> tuple[Denoise, Denoise]:
    """Two denoisers that share one forward of twice the batch, as guidance asks both for the same (x_t, t).

    The second one answers from the first one's forward; asked alone it computes alone.

    Args:
        both_at: false at times where only the first one will be asked, e.g. where the guidance scale is 1.
    """
    joint: list[Conditioning] = []
    held: list[Tensor] = []  # x_t, t and the unconditional x0 of the last forward
    first_alone, second_alone = denoiser(model, cond), denoiser(model, uncond)

    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        if not both_at(float(t.max())):
            return first_alone(x_t, t)
        batch = x_t.shape[0]
        if not joint:
            joint.append(join(cond.expand(batch), uncond.expand(batch)))
        twice = torch.cat([t, t]) if t.ndim and t.shape[0] == batch else t
        first, second = denoiser(model, joint[0])(torch.cat([x_t, x_t]), twice).chunk(2)
        held[:] = [x_t, t, second]
        return first

    def unconditional(x_t: Tensor, t: Tensor) -> Tensor:
        if held and held[0] is x_t and held[1] is t:
            return held[2]
        return second_alone(x_t, t)

    return conditional, unconditional


def join(first: Conditioning, second: Conditioning) -> Conditioning:
    """Stack two conditionings of the same kind along the batch; the shorter text is padded and masked."""
    context, mask = _join_context(first, second)
    held = None
    if first.held is not None and second.held is not None:
        held = Held(
            latents=torch.cat([first.held.latents, second.held.latents]),
            mask=torch.cat([first.held.mask, second.held.mask]),
        )
    return replace(
        first,
        context=context,
        context_mask=mask,
        pooled=_join_tensors(first.pooled, second.pooled),
        concat=_join_tensors(first.concat, second.concat),
        held=held,
        scalars={name: torch.cat([value, second.scalars[name]]) for name, value in first.scalars.items()},
    )


def _join_tensors(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    assert (first is None) == (second is None), "conditionings of one model have the same fields"
    return None if first is None or second is None else torch.cat([first, second])


def _join_context(first: Conditioning, second: Conditioning) -> tuple[Tensor | None, Tensor | None]:
    if first.context is None or second.context is None:
        return _join_tensors(first.context, second.context), None
    pairs = [(first.context, first.context_mask), (second.context, second.context_mask)]
    length = max(context.shape[1] for context, _ in pairs)
    if all(mask is None and context.shape[1] == length for context, mask in pairs):
        return torch.cat([first.context, second.context]), None
    contexts, masks = [], []
    for context, mask in pairs:
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        padding = length - context.shape[1]
        contexts.append(nn.functional.pad(context, (0, 0, 0, padding)))
        masks.append(nn.functional.pad(mask, (0, padding)))
    return torch.cat(contexts), torch.cat(masks)


# --- loading ----------------------------------------------------------------------------------------------------------


def open_part(path: str | Path, part: str) -> tuple[Header, Found]:
    """Read and identify a checkpoint that must be a certain part ("network", "codec", "text").

    Raises:
        FileError, CheckpointError: it cannot be read, is damaged, unknown, or is another part.
    """
    header = read_header(path)
    found = identify(header)
    if found.part != part:
        raise CheckpointError(
            f"This file is a {TITLES[found.part]}, not a {TITLES[part]}",
            given=f"{path}, {found.title}",
            expected=f"a {TITLES[part]}",
            do=f"pick the {TITLES[part]}'s file, or load this one as {TITLES[found.part]}",
        )
    return header, found


def build_part(
    header: Header, found: Found, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The module of an identified checkpoint with its weights; ``dtype`` None chooses for the device."""
    part = found.family.parts[found.part]
    return load_module(
        header,
        lambda: part.build(found.config, header.metadata),
        translate=None if found.layout == "native" else part.layouts[found.layout].to_native,
        dtype=choose_dtype(header, torch.device(device)) if dtype is None else dtype,
        device=device,
    )


def choose_dtype(header: Header, device: torch.device) -> torch.dtype | None:
    """The dtype to hold a checkpoint's weights in; None keeps the file's.

    Half precision is only worth it where it is fast; on a CPU float32 is both the fastest and the most exact.
    """
    dtypes = {info.dtype for info in header.tensors.values()}
    if device.type == "cpu":
        return None if dtypes <= {torch.float32} else torch.float32
    return torch.bfloat16 if dtypes & {torch.float8_e4m3fn, torch.float8_e5m2} else None


def load_network(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> VideoModel:
    """The diffusion network of a checkpoint, with the defaults it carries or its family's."""
    header, found = open_part(path, "network")
    return network_of(header, found, dtype=dtype, device=device)


def network_of(
    header: Header, found: Found, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> VideoModel:
    """:func:`load_network` of a checkpoint that is identified already."""
    preview = header.metadata.get(PREVIEW_KEY)
    return VideoModel(
        family=found.family,
        config=found.config,
        network=build_part(header, found, dtype=dtype, device=device),
        diffusion=found.family.diffusion(found.config),
        defaults=defaults_of(header, found),
        fingerprint=header.digest,
        preview=None if preview is None else LatentRGB.from_json(preview),
    )


def defaults_of(header: Header, found: Found) -> Defaults:
    """The defaults in a network's metadata, else the family's."""
    text = header.metadata.get("vidgen.defaults")
    if text is None:
        return found.family.defaults
    return config_from_json(Defaults, text, where=str(header.path))


def load_codec(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Codec:
    """The VAE of a checkpoint."""
    header, found = open_part(path, "codec")
    return found.family.codec(build_part(header, found, dtype=dtype, device=device), found.config)


def load_text(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The text encoders of a checkpoint; ``encode(prompts)`` gives features."""
    header, found = open_part(path, "text")
    return build_part(header, found, dtype=dtype, device=device)


def inspect_file(path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, from its header alone: for ``vidgen inspect`` and loader nodes.

    Keys: path, family, part, title, layout, num_parameters, num_tensors, num_bytes, dtypes, fingerprint, config
    (a dict), defaults (a dict, networks only) and metadata (without the long tokenizer texts).
    """
    return inspect_header(read_header(path))


def inspect_header(header: Header) -> dict[str, Any]:
    """:func:`inspect_file` of a header that was read already."""
    found = identify(header)
    dtypes: dict[str, int] = {}
    for info in header.tensors.values():
        name = str(info.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + info.num_elements
    info: dict[str, Any] = {
        "path": str(header.path),
        "family": found.family.name,
        "part": found.part,
        "title": found.title,
        "layout": found.layout,
        "num_parameters": header.num_parameters,
        "num_tensors": len(header.tensors),
        "num_bytes": header.num_bytes,
        "dtypes": dtypes,
        "fingerprint": header.digest,
        "config": asdict(found.config),
        "metadata": {key: value for key, value in header.metadata.items() if "tokenizer" not in key},
    }
    if found.part == "network":
        info["defaults"] = asdict(defaults_of(header, found))
    return info
