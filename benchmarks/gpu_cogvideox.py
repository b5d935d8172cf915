"""CogVideoX on the GPU list: a step and a decode at the published size, beside diffusers with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .gpu_tools import drawn, figure, forget, peak_gib, seconds_of

if TYPE_CHECKING:
    from .contest import Side
    from .gpu import Scale


def beside_peer(scale: Scale) -> dict[str, Any]:
    """Each side of each part runs once for its kernels and is then timed."""
    return {"step": _pair(scale, *_networks(scale)), "decode": _pair(scale, *_codecs(scale))}


def _pair(scale: Scale, ours: Side, peer: Side) -> dict[str, Any]:
    from .compare import difference

    answers, found = [], []
    for side in (ours, peer):
        answers.append(side.answer(side.run()).float().cpu())
        forget(scale.device)
        seconds = seconds_of(side.run, scale.device, times=2)
        found.append({"seconds": seconds, "peak_gib": peak_gib(scale.device)})
    mine, theirs = found
    return {
        "seconds": {"ours": figure(mine["seconds"]), "diffusers": figure(theirs["seconds"])},
        "ratio": round(mine["seconds"] / theirs["seconds"], 4),
        "peak_gib": {"ours": mine["peak_gib"], "diffusers": theirs["peak_gib"]},
        "difference": difference(answers[0], answers[1])["relative"],
    }


def _networks(scale: Scale) -> tuple[Side, Side]:
    import torch

    from ..vidgen_core.families.cogvideox.keys import LAYOUTS
    from ..vidgen_core.families.cogvideox.network import CogVideoXTransformer
    from ..vidgen_core.model import VideoModel
    from .compare_cogvideox import Asked, diffusers_network
    from .contest import Setting

    config = scale.cogvideox.network
    with torch.device("meta"):
        network, twin = CogVideoXTransformer(config), diffusers_network(config)
    drawn(network, scale.device, scale.torch_dtype)
    # One set of weights for both sides.
    twin.load_state_dict(LAYOUTS["diffusers"].to_foreign(network.state_dict()), assign=True)
    twin.eval().requires_grad_(False)
    asked = Asked(config, Setting(part="network", dtype="bf16", device=scale.device))
    return asked.ours(VideoModel.of("cogvideox", config, network)), asked.peer(twin)


def _codecs(scale: Scale) -> tuple[Side, Side]:
    import torch

    from ..vidgen_core.families.cogvideox.codec import CogVideoXCodec
    from ..vidgen_core.families.cogvideox.vae import CogVideoXVAE
    from .compare_cogvideox import diffusers_vae
    from .compare_parts import our_decoding, peer_decoding, random_latents

    config = scale.cogvideox.codec
    torch.manual_seed(0)
    vae = CogVideoXVAE(config).to(scale.device, scale.torch_dtype).eval().requires_grad_(False)
    twin = diffusers_vae(config)
    twin.load_state_dict(vae.state_dict())
    twin.to(scale.device, scale.torch_dtype).eval().requires_grad_(False)
    z = random_latents(config, scale.cogvideox.codec_latents, scale.device, scale.torch_dtype)
    return our_decoding(CogVideoXCodec(vae, config), vae, z), peer_decoding(twin, config, z)
