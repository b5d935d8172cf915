"""What the contests of all families have in common: weights for both sides, networks to and from files, and codecs.

What a family says of its own lies in the module of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..vidgen_core.codec import Codec
from ..vidgen_core.families import FAMILIES, Config
from ..vidgen_core.model import VideoModel, open_part
from ..vidgen_core.weights.load import load_module, read_tensors
from ..vidgen_core.weights.save import save_checkpoint, save_tensors
from .contest import Contest, Latents, Setting, Side


def version_of(package: str) -> str:
    """Name and version of a package."""
    from importlib.metadata import version

    return f"{package} {version(package)}"


def random_weights(module: nn.Module, dtype: str, *, seed: int = 0) -> dict[str, Tensor]:
    """A state dict for a module that may be on the meta device: deviation 1 / sqrt(inputs), norms near 1.

    Every number can be told in ``dtype`` ("fp32", "bf16", "fp8"), so that both sides have the very same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16
    state = {}
    for name, tensor in module.state_dict().items():
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            values *= tensor[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values *= 0.02
        if dtype == "fp8":
            values = values.to(torch.float8_e4m3fn)
        state[name] = values.to(stored)
    return state


def as_float8(state: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, Tensor]:
    """The linear weights of ``blocks`` (paths of lists of modules) as float8, the rest as it is."""
    inside = tuple(f"{path}." for path in blocks)
    return {
        name: tensor.to(torch.float8_e4m3fn) if name.startswith(inside) and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def write_network(folder: Path, family: str, config: Config, twin_of: Callable[[Any], Any], dtype: str) -> None:
    """``network.safetensors`` with native names, and the folder ``diffusers`` as that library saves it.

    Args:
        twin_of: makes diffusers' network of a configuration.
    """
    part = FAMILIES[family].parts["network"]
    with torch.device("meta"):
        module, twin = part.build(config, {}), twin_of(config)
    state = random_weights(module, dtype)
    native = as_float8(state, FAMILIES[family].blocks) if dtype == "fp8" else state
    save_checkpoint(folder / "network.safetensors", native, family=family, part="network", config=config)
    twin.save_config(folder / "diffusers")
    foreign = part.layouts["diffusers"].to_foreign(state)
    save_tensors(folder / "diffusers" / "diffusion_pytorch_model.safetensors", foreign, {"format": "pt"})


def load_ours(folder: Path, setting: Setting) -> VideoModel:
    """As ``load_network`` does, except that float8 weights stay small however small the whole network is."""
    header, found = open_part(folder / "network.safetensors", "network")
    network = load_module(
        header,
        lambda: found.family.parts["network"].build(found.config, {}),
        dtype=setting.torch_dtype,
        device=setting.device,
        keep_quantised=setting.dtype == "fp8",
    )
    return VideoModel.of(found.family.name, found.config, network)


def load_peer(folder: Path, setting: Setting, network: str) -> Any:
    """diffusers' network of :func:`write_network`, of the class of this name."""
    import diffusers

    model = getattr(diffusers, network).from_pretrained(folder / "diffusers", torch_dtype=setting.torch_dtype)
    if setting.dtype == "fp8":
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return model.to(setting.device).eval()


def random_latents(config: Config, latents: Latents, device: str, dtype: torch.dtype) -> Tensor:
    """(1, C, *latents), the same on every device."""
    z = torch.randn(1, config.latent_channels, *latents, generator=torch.Generator().manual_seed(1))
    return z.to(device, dtype)


def our_decoding(codec: Codec, vae: nn.Module, z: Tensor) -> Side:
    def run() -> Tensor:
        with torch.inference_mode():
            return codec.decode(z)

    return Side(run=run, answer=lambda video: video, modules=(vae,))


def peer_decoding(vae: Any, config: Config, z: Tensor) -> Side:
    """diffusers', which is given latents as its encoder has them."""

    def run() -> Tensor:
        with torch.no_grad():
            return vae.decode(z / config.scaling_factor, return_dict=False)[0]

    return Side(run=run, answer=lambda video: video, modules=(vae,))


def codec_contest(
    setting: Setting, family: str, config: Config, latents: Latents, peer: Callable[[], Any], peer_name: str, bar: float
) -> Contest:
    """Decoding of random latents.

    Args:
        peer: makes diffusers' VAE of the same dimensions, which decodes as it shall.
    """
    part = FAMILIES[family].parts["codec"]
    z = random_latents(config, latents, setting.device, setting.torch_dtype)

    def prepare(folder: Path) -> None:
        torch.manual_seed(0)
        state = {name: tensor.to(setting.torch_dtype) for name, tensor in part.build(config, {}).state_dict().items()}
        save_checkpoint(folder / "vae.safetensors", state, family=family, part="codec", config=config)

    def ours(folder: Path) -> Side:
        header, _ = open_part(folder / "vae.safetensors", "codec")
        vae = load_module(header, lambda: part.build(config, {}), dtype=setting.torch_dtype, device=setting.device)
        return our_decoding(FAMILIES[family].codec(vae, config), vae, z)

    def theirs(folder: Path) -> Side:
        vae: nn.Module = peer()
        header, _ = open_part(folder / "vae.safetensors", "codec")
        vae.load_state_dict(read_tensors(header), assign=True)
        return peer_decoding(vae.to(setting.device).eval().requires_grad_(False), config, z)

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
