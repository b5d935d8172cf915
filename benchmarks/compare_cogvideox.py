"""CogVideoX's network beside diffusers', with the same weights.

Reduced as HunyuanVideo's is: 12 heads of 64 and 6 blocks over 1200 video and 226 text tokens. diffusers is given its
rotations once for all steps, as its pipelines do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..vidgen_core.errors import SettingsError
from ..vidgen_core.families.cogvideox.config import NetworkConfig
from ..vidgen_core.families.cogvideox.keys import LAYOUTS
from ..vidgen_core.families.cogvideox.network import CogVideoXTransformer
from ..vidgen_core.model import load_network
from ..vidgen_core.text.features import TextFeatures
from ..vidgen_core.weights.save import save_checkpoint, save_tensors
from .compare_hunyuan import random_weights
from .contest import Contest, Setting, Side

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel

REDUCED = NetworkConfig(hidden_size=768, num_heads=12, num_layers=6, text_width=1024, trained_grid=(3, 20, 20))
TINY = NetworkConfig(
    hidden_size=48, num_heads=3, num_layers=2, text_width=24, text_length=7, time_width=20, trained_grid=(2, 2, 3),
    rope_axes=(4, 6, 6),
)  # fmt: skip
SIZES = {"reduced": REDUCED, "tiny": TINY}
NETWORK_BAR = 1.00
ENTRY = 799
"""of the noise table"""


def contest(setting: Setting) -> Contest:
    """The two sides of the network; SettingsError for another part, or for float8."""
    if setting.part != "network" or setting.dtype == "fp8":
        raise SettingsError(
            "CogVideoX is compared by its network alone, in float32 or bfloat16",
            given=f"--part {setting.part} --dtype {setting.dtype}",
            do="use --part network --dtype fp32",
        )
    made = _network(setting)
    if setting.dtype == "fp32":
        return made
    return Contest(
        prepare=made.prepare,
        ours=made.ours,
        peer=made.peer,
        peer_name=made.peer_name,
        exact=_network(Setting(part="network", size=setting.size, device=setting.device)).ours,
        bar=made.bar,
        facts=made.facts,
    )


def diffusers_network(config: NetworkConfig) -> CogVideoXTransformer3DModel:
    """diffusers' network of the same dimensions, with the official eps in the output layer."""
    from diffusers import CogVideoXTransformer3DModel

    twin = CogVideoXTransformer3DModel(**diffusers_config(config))
    return with_official_eps(twin)


def diffusers_config(config: NetworkConfig) -> dict[str, Any]:
    """What its constructor is told."""
    frames, rows, columns = config.trained_grid
    pt, ph, pw = config.patch
    return {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "time_embed_dim": config.time_width,
        "ofs_embed_dim": config.time_width if config.offset_embed else None,
        "text_embed_dim": config.text_width,
        "num_layers": config.num_layers,
        "sample_frames": 4 * (pt * frames - 1) + 1,
        "sample_height": ph * rows,
        "sample_width": pw * columns,
        "patch_size": ph,
        "patch_size_t": None if pt == 1 else pt,
        "max_text_seq_length": config.text_length,
        "spatial_interpolation_scale": config.sincos_scale,
        "use_rotary_positional_embeddings": config.positions != "sincos",
        "use_learned_positional_embeddings": config.positions == "learned",
        "patch_bias": pt == 1,
    }


def with_official_eps(network: CogVideoXTransformer3DModel) -> CogVideoXTransformer3DModel:
    network.norm_out.norm.eps = 1e-6
    return network


def _write_network(folder: Path, config: NetworkConfig, dtype: str) -> None:
    """``network.safetensors`` with native names, and the folder ``diffusers`` as that library saves it."""
    with torch.device("meta"):
        module, twin = CogVideoXTransformer(config), diffusers_network(config)
    state = random_weights(module, dtype)
    save_checkpoint(folder / "network.safetensors", state, family="cogvideox", part="network", config=config)
    twin.save_config(folder / "diffusers")
    foreign = LAYOUTS["diffusers"].to_foreign(state)
    save_tensors(folder / "diffusers" / "diffusion_pytorch_model.safetensors", foreign, {"format": "pt"})


def _network(setting: Setting) -> Contest:
    from importlib.metadata import version

    config = SIZES[setting.size]
    frames, rows, columns = config.trained_grid

    def given() -> tuple[Tensor, TextFeatures]:
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(1, config.in_channels, frames, 2 * rows, 2 * columns, generator=generator)
        context = torch.randn(1, config.text_length, config.text_width, generator=generator)
        mask = torch.ones(1, config.text_length, dtype=torch.bool)
        features = TextFeatures(context=context, context_mask=mask, pooled=torch.zeros(1, 0))
        return noise.to(setting.device, setting.torch_dtype), features

    def ours(folder: Path) -> Side:
        model = load_network(folder / "network.safetensors", dtype=setting.torch_dtype, device=setting.device)
        noise, features = given()
        cond = model.conditioning(features).to(setting.device)

        def run() -> Tensor:
            with torch.inference_mode():
                return model.predict(noise, torch.tensor((ENTRY + 1) / 1000, dtype=torch.float64), cond)

        return Side(run=run, answer=lambda v: v, modules=(model.network,))

    def peer(folder: Path) -> Side:
        from diffusers import CogVideoXTransformer3DModel
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        model = CogVideoXTransformer3DModel.from_pretrained(folder / "diffusers", torch_dtype=setting.torch_dtype)
        model = with_official_eps(model.to(setting.device).eval())
        noise, features = given()
        latents, context = noise.transpose(1, 2), features.context.to(noise)
        head = config.hidden_size // config.num_heads
        rope = get_3d_rotary_pos_embed(head, ((0, 0), (rows, columns)), (rows, columns), frames, device=noise.device)
        timestep = torch.full((1,), ENTRY, device=noise.device)

        def run() -> Tensor:
            with torch.no_grad():
                return model(latents, context, timestep, image_rotary_emb=rope, return_dict=False)[0]

        return Side(run=run, answer=lambda v: v.transpose(1, 2), modules=(model,))

    return Contest(
        prepare=lambda folder: _write_network(folder, config, setting.dtype),
        ours=ours,
        peer=peer,
        peer_name=f"diffusers {version('diffusers')}",
        bar=NETWORK_BAR,
        facts={
            "video_tokens": frames * rows * columns,
            "text_tokens": config.text_length,
            "width": config.hidden_size,
            "blocks": config.num_layers,
        },
    )
