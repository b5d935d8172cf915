"""A family's VAE beside its peer's, with the same weights; what each family says of its own lies in ``compare_*``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..vidgen_core.families import FAMILIES, Config
from ..vidgen_core.model import open_part
from ..vidgen_core.weights.load import load_module, read_tensors
from ..vidgen_core.weights.save import save_checkpoint
from .contest import Contest, Latents, Setting, Side


def codec_contest(
    setting: Setting, family: str, config: Config, latents: Latents, peer: Callable[[], Any], peer_name: str, bar: float
) -> Contest:
    """Decoding of random latents.

    Args:
        peer: makes diffusers' VAE of the same dimensions, which decodes as it shall.
    """
    part, codec_of = FAMILIES[family].parts["codec"], FAMILIES[family].codec
    shape = (1, config.latent_channels, *latents)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(setting.device, setting.torch_dtype)

    def prepare(folder: Path) -> None:
        torch.manual_seed(0)
        state = {name: tensor.to(setting.torch_dtype) for name, tensor in part.build(config, {}).state_dict().items()}
        save_checkpoint(folder / "vae.safetensors", state, family=family, part="codec", config=config)

    def ours(folder: Path) -> Side:
        header, _ = open_part(folder / "vae.safetensors", "codec")
        vae = load_module(header, lambda: part.build(config, {}), dtype=setting.torch_dtype, device=setting.device)
        codec = codec_of(vae, config)

        def run() -> Tensor:
            with torch.inference_mode():
                return codec.decode(z)

        return Side(run=run, answer=lambda video: video, modules=(vae,))

    def theirs(folder: Path) -> Side:
        vae: nn.Module = peer()
        header, _ = open_part(folder / "vae.safetensors", "codec")
        vae.load_state_dict(read_tensors(header), assign=True)
        vae.to(setting.device).eval().requires_grad_(False)

        def run() -> Tensor:
            with torch.no_grad():
                return vae.decode(z / config.scaling_factor, return_dict=False)[0]

        return Side(run=run, answer=lambda video: video, modules=(vae,))

    return Contest(
        prepare=prepare,
        ours=ours,
        peer=theirs,
        peer_name=peer_name,
        bar=bar,
        facts={
            "latents": list(latents),
            "video": [4 * (latents[0] - 1) + 1, 8 * latents[1], 8 * latents[2]],
            "channels": list(config.block_channels),
        },
    )
