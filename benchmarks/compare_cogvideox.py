"""CogVideoX beside diffusers, with the same weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..vidgen_core.families.cogvideox.config import NetworkConfig

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel


def diffusers_network(config: NetworkConfig) -> CogVideoXTransformer3DModel:
    """diffusers' network of the same dimensions, with the official eps in the output layer."""
    from diffusers import CogVideoXTransformer3DModel

    frames, rows, columns = config.trained_grid
    pt, ph, pw = config.patch
    twin = CogVideoXTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        time_embed_dim=config.time_width,
        ofs_embed_dim=config.time_width if config.offset_embed else None,
        text_embed_dim=config.text_width,
        num_layers=config.num_layers,
        sample_frames=4 * (pt * frames - 1) + 1,
        sample_height=ph * rows,
        sample_width=pw * columns,
        patch_size=ph,
        patch_size_t=None if pt == 1 else pt,
        max_text_seq_length=config.text_length,
        spatial_interpolation_scale=config.sincos_scale,
        use_rotary_positional_embeddings=config.positions != "sincos",
        use_learned_positional_embeddings=config.positions == "learned",
        patch_bias=pt == 1,
    )
    twin.norm_out.norm.eps = 1e-6
    return twin
