"""The transformer's and the VAE's weights in the layouts that people have on disk.

Native names are those of Tencent's published ``.pt``. The transformer's other layouts are diffusers' folder and
ComfyUI's internal names; the VAE's is the one of latent diffusion's autoencoder. Some sit under a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...weights.keymap import KeyMap, Row

_PREFIXES = ("model.model.", "model.diffusion_model.", "diffusion_model.", "model.")


def _qkv(path: str, names: tuple[str, str, str] = ("to_q", "to_k", "to_v")) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


def _numbered_mlp(native: str, foreign: str, first: str, second: str) -> list[Row]:
    return [Row(f"{native}.mlp.0", f"{foreign}.{first}"), Row(f"{native}.mlp.2", f"{foreign}.{second}")]


def _diffusers_refiner() -> list[Row]:
    native, foreign = "txt_in.individual_token_refiner.blocks.*", "context_embedder.token_refiner.refiner_blocks.*"
    told = "context_embedder.time_text_embed"
    return [
        *_numbered_mlp("txt_in.t_embedder", f"{told}.timestep_embedder", "linear_1", "linear_2"),
        Row("txt_in.c_embedder", f"{told}.text_embedder"),
        Row("txt_in.input_embedder", "context_embedder.proj_in"),
        Row(f"{native}.norm1", f"{foreign}.norm1"),
        Row(f"{native}.norm2", f"{foreign}.norm2"),
        Row(f"{native}.self_attn_qkv", _qkv(f"{foreign}.attn")),
        Row(f"{native}.self_attn_proj", f"{foreign}.attn.to_out.0"),
        Row(f"{native}.mlp.fc1", f"{foreign}.ff.net.0.proj"),
        Row(f"{native}.mlp.fc2", f"{foreign}.ff.net.2"),
        Row(f"{native}.adaLN_modulation.1", f"{foreign}.norm_out.linear"),
    ]


def _diffusers_double() -> list[Row]:
    native, foreign = "double_blocks.*", "transformer_blocks.*"
    return [
        Row(f"{native}.img_mod", f"{foreign}.norm1"),
        Row(f"{native}.txt_mod", f"{foreign}.norm1_context"),
        Row(f"{native}.img_attn_qkv", _qkv(f"{foreign}.attn")),
        Row(f"{native}.txt_attn_qkv", _qkv(f"{foreign}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"))),
        Row(f"{native}.img_attn_q_norm", f"{foreign}.attn.norm_q"),
        Row(f"{native}.img_attn_k_norm", f"{foreign}.attn.norm_k"),
        Row(f"{native}.txt_attn_q_norm", f"{foreign}.attn.norm_added_q"),
        Row(f"{native}.txt_attn_k_norm", f"{foreign}.attn.norm_added_k"),
        Row(f"{native}.img_attn_proj", f"{foreign}.attn.to_out.0"),
        Row(f"{native}.txt_attn_proj", f"{foreign}.attn.to_add_out"),
        Row(f"{native}.img_mlp.fc1", f"{foreign}.ff.net.0.proj"),
        Row(f"{native}.img_mlp.fc2", f"{foreign}.ff.net.2"),
        Row(f"{native}.txt_mlp.fc1", f"{foreign}.ff_context.net.0.proj"),
        Row(f"{native}.txt_mlp.fc2", f"{foreign}.ff_context.net.2"),
    ]


def _diffusers_single(mlp_ratio: float) -> list[Row]:
    native, foreign = "single_blocks.*", "single_transformer_blocks.*"
    return [
        Row(
            f"{native}.linear1",
            (*_qkv(f"{foreign}.attn"), f"{foreign}.proj_mlp"),
            parts=(1, 1, 1, mlp_ratio),
        ),
        Row(f"{native}.linear2", f"{foreign}.proj_out"),
        Row(f"{native}.q_norm", f"{foreign}.attn.norm_q"),
        Row(f"{native}.k_norm", f"{foreign}.attn.norm_k"),
        Row(f"{native}.modulation", f"{foreign}.norm"),
    ]


def diffusers_layout(mlp_ratio: float = 4.0) -> KeyMap:
    """diffusers' ``HunyuanVideoTransformer3DModel``; ``mlp_ratio`` only matters for cutting ``linear1``."""
    told = "time_text_embed"
    return KeyMap(
        [
            Row("img_in", "x_embedder"),
            *_numbered_mlp("time_in", f"{told}.timestep_embedder", "linear_1", "linear_2"),
            *_numbered_mlp("guidance_in", f"{told}.guidance_embedder", "linear_1", "linear_2"),
            Row("vector_in.in_layer", f"{told}.text_embedder.linear_1"),
            Row("vector_in.out_layer", f"{told}.text_embedder.linear_2"),
            *_diffusers_refiner(),
            *_diffusers_double(),
            *_diffusers_single(mlp_ratio),
            Row("final_layer.linear", "proj_out"),
            # diffusers' continuous adaLN stores the scale first.
            Row("final_layer.adaLN_modulation.1", "norm_out.linear", chunk_order=(1, 0)),
        ],
        foreign="diffusers",
    )


def _comfy_streams() -> list[Row]:
    rows = []
    block = "double_blocks.*"
    for stream in ("img", "txt"):
        attn = f"{block}.{stream}_attn"
        rows += [
            Row(f"{block}.{stream}_mod.linear", f"{block}.{stream}_mod.lin"),
            Row(f"{attn}_qkv", f"{attn}.qkv"),
            Row(f"{attn}_proj", f"{attn}.proj"),
            Row(f"{attn}_q_norm.weight", f"{attn}.norm.query_norm.scale"),
            Row(f"{attn}_k_norm.weight", f"{attn}.norm.key_norm.scale"),
            Row(f"{block}.{stream}_mlp.fc1", f"{block}.{stream}_mlp.0"),
            Row(f"{block}.{stream}_mlp.fc2", f"{block}.{stream}_mlp.2"),
        ]
    return rows


def comfy_layout() -> KeyMap:
    """ComfyUI's internal names, as its own save node writes them."""
    refiner, single = "txt_in.individual_token_refiner.blocks.*", "single_blocks.*"
    embedders = ("time_in", "guidance_in", "txt_in.t_embedder")
    return KeyMap(
        [
            Row("img_in", "img_in"),
            *(row for path in embedders for row in _numbered_mlp(path, path, "in_layer", "out_layer")),
            Row("vector_in", "vector_in"),
            Row("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
            Row("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
            Row("txt_in.input_embedder", "txt_in.input_embedder"),
            Row(f"{refiner}.norm1", f"{refiner}.norm1"),
            Row(f"{refiner}.norm2", f"{refiner}.norm2"),
            Row(f"{refiner}.self_attn_qkv", f"{refiner}.self_attn.qkv"),
            Row(f"{refiner}.self_attn_proj", f"{refiner}.self_attn.proj"),
            Row(f"{refiner}.mlp.fc1", f"{refiner}.mlp.0"),
            Row(f"{refiner}.mlp.fc2", f"{refiner}.mlp.2"),
            Row(f"{refiner}.adaLN_modulation", f"{refiner}.adaLN_modulation"),
            *_comfy_streams(),
            Row(f"{single}.linear1", f"{single}.linear1"),
            Row(f"{single}.linear2", f"{single}.linear2"),
            Row(f"{single}.modulation.linear", f"{single}.modulation.lin"),
            Row(f"{single}.q_norm.weight", f"{single}.norm.query_norm.scale"),
            Row(f"{single}.k_norm.weight", f"{single}.norm.key_norm.scale"),
            Row("final_layer", "final_layer"),
        ],
        foreign="ComfyUI",
        prefixes=_PREFIXES,
    )


_TOP = ("img_in", "txt_in", "time_in", "guidance_in", "vector_in", "double_blocks", "single_blocks", "final_layer")

LAYOUTS: Mapping[str, KeyMap] = {
    "diffusers": diffusers_layout(),
    "comfy": comfy_layout(),
    "prefixed": KeyMap([Row(name, name) for name in _TOP], foreign="prefixed native", prefixes=_PREFIXES),
}
"""every layout besides the native one"""


# --- the VAE ----------------------------------------------------------------------------------------------------------

_VAE_PREFIXES = ("first_stage_model.", "vae.")
_VAE_LEVELS = 4


def _ldm_resnet(native: str, foreign: str) -> list[Row]:
    same = ("norm1", "conv1", "norm2", "conv2")
    return [
        *(Row(f"{native}.{name}", f"{foreign}.{name}") for name in same),
        Row(f"{native}.conv_shortcut", f"{foreign}.nin_shortcut"),
    ]


def _ldm_half(half: str) -> list[Row]:
    """What encoder and decoder share: both ends and the middle."""
    native, foreign = f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1"
    projections = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    return [
        Row(f"{half}.conv_in", f"{half}.conv_in"),
        Row(f"{half}.conv_norm_out", f"{half}.norm_out"),
        Row(f"{half}.conv_out", f"{half}.conv_out"),
        *_ldm_resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1"),
        *_ldm_resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2"),
        Row(f"{native}.group_norm", f"{foreign}.norm"),
        *(Row(f"{native}.{ours}", f"{foreign}.{theirs}", pointwise_dims=3) for ours, theirs in projections.items()),
    ]


def ldm_vae_layout() -> KeyMap:
    """The names of latent diffusion's autoencoder, as in Comfy-Org's repackaged file.

    Its attention projects with convolutions of one point, and it counts the decoder's levels from the output.
    """
    levels = [(level, _VAE_LEVELS - 1 - level) for level in range(_VAE_LEVELS)]
    return KeyMap(
        [
            *_ldm_half("encoder"),
            *_ldm_half("decoder"),
            *_ldm_resnet("encoder.down_blocks.*.resnets.*", "encoder.down.*.block.*"),
            Row("encoder.down_blocks.*.downsamplers.0.conv", "encoder.down.*.downsample.conv"),
            *(
                row
                for ours, theirs in levels
                for row in _ldm_resnet(f"decoder.up_blocks.{ours}.resnets.*", f"decoder.up.{theirs}.block.*")
            ),
            *(
                Row(f"decoder.up_blocks.{ours}.upsamplers.0.conv", f"decoder.up.{theirs}.upsample.conv")
                for ours, theirs in levels
            ),
            Row("quant_conv", "quant_conv"),
            Row("post_quant_conv", "post_quant_conv"),
        ],
        foreign="latent diffusion",
        only_prefixes=_VAE_PREFIXES,
    )


_VAE_TOP = ("encoder", "decoder", "quant_conv", "post_quant_conv")

VAE_LAYOUTS: Mapping[str, KeyMap] = {
    "ldm": ldm_vae_layout(),
    "prefixed": KeyMap([Row(name, name) for name in _VAE_TOP], foreign="prefixed native", only_prefixes=_VAE_PREFIXES),
}
"""every layout of the VAE besides the native one, which diffusers shares"""
