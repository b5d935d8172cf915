"""The transformer's weights in the layouts that people have on disk.

Native names are those of the official checkpoint's layers, gathered block by block. ``diffusers`` is the layout of its
folders, of the single files made from them (float8 and GGUF too) and of nearly all LoRAs; ``sat`` is the official one.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...weights.keymap import KeyMap, Row

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_EMBEDDERS = {"time_embed": "time_embedding", "ofs_embed": "ofs_embedding"}


def diffusers_layout() -> KeyMap:
    """diffusers' ``CogVideoXTransformer3DModel``."""
    native, foreign = "layers.*", "transformer_blocks.*"
    attention = f"{foreign}.attn1"
    return KeyMap(
        [
            Row("patch_embed", "patch_embed"),
            *(Row(f"{ours}.0", f"{theirs}.linear_1") for ours, theirs in _EMBEDDERS.items()),
            *(Row(f"{ours}.2", f"{theirs}.linear_2") for ours, theirs in _EMBEDDERS.items()),
            Row(f"{native}.adaLN_modulation", (f"{foreign}.norm1.linear", f"{foreign}.norm2.linear")),
            Row(f"{native}.input_layernorm", f"{foreign}.norm1.norm"),
            Row(f"{native}.query_key_value", tuple(f"{attention}.to_{part}" for part in "qkv")),
            Row(f"{native}.query_layernorm", f"{attention}.norm_q"),
            Row(f"{native}.key_layernorm", f"{attention}.norm_k"),
            Row(f"{native}.dense", f"{attention}.to_out.0"),
            Row(f"{native}.post_attention_layernorm", f"{foreign}.norm2.norm"),
            Row(f"{native}.dense_h_to_4h", f"{foreign}.ff.net.0.proj"),
            Row(f"{native}.dense_4h_to_h", f"{foreign}.ff.net.2"),
            Row("final_layernorm", "norm_final"),
            Row("final_layer.norm_final", "norm_out.norm"),
            Row("final_layer.linear", "proj_out"),
            Row("final_layer.adaLN_modulation", "norm_out.linear"),
        ],
        foreign="diffusers",
        prefixes=_PREFIXES,
    )


def sat_layout(*, learned: bool) -> KeyMap:
    """The official checkpoint, written by SwissArmyTransformer.

    Tables that can be computed lie in it too, and one that cannot under the same name as one that can: ``learned``
    says that the table of positions was trained (5B-I2V).
    """
    native, foreign, mixin = "layers.*", "transformer.layers.*", "mixins.adaln_layer"
    same = ("input_layernorm", "post_attention_layernorm")
    table = "mixins.pos_embed.pos_embedding"
    return KeyMap(
        [
            Row("patch_embed.proj", "mixins.patch_embed.proj"),
            Row("patch_embed.text_proj", "mixins.patch_embed.text_proj"),
            *([Row("patch_embed.pos_embedding", table)] if learned else []),
            *(Row(name, name) for name in _EMBEDDERS),
            # Shifts, scales and gates of the video for attention and MLP, then those of the text.
            Row(
                f"{native}.adaLN_modulation",
                f"{mixin}.adaLN_modulations.*.1",
                chunk_order=(0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11),
            ),
            *(Row(f"{native}.{name}", f"{foreign}.{name}") for name in same),
            Row(f"{native}.query_key_value", f"{foreign}.attention.query_key_value"),
            Row(f"{native}.query_layernorm", f"{mixin}.query_layernorm_list.*"),
            Row(f"{native}.key_layernorm", f"{mixin}.key_layernorm_list.*"),
            Row(f"{native}.dense", f"{foreign}.attention.dense"),
            Row(f"{native}.dense_h_to_4h", f"{foreign}.mlp.dense_h_to_4h"),
            Row(f"{native}.dense_4h_to_h", f"{foreign}.mlp.dense_4h_to_h"),
            Row("final_layernorm", "transformer.final_layernorm"),
            Row("final_layer.norm_final", "mixins.final_layer.norm_final"),
            Row("final_layer.linear", "mixins.final_layer.linear"),
            Row("final_layer.adaLN_modulation", "mixins.final_layer.adaLN_modulation.1"),
        ],
        foreign="SAT",
        only_prefixes=_PREFIXES[:2],
        unneeded=(
            "mixins.pos_embed.freqs_sin",
            "mixins.pos_embed.freqs_cos",
            "transformer.position_embeddings.",
            "transformer.word_embeddings.",
            *(() if learned else (table,)),
        ),
    )


_TOP = ("patch_embed", "time_embed", "ofs_embed", "layers", "final_layernorm", "final_layer")

LAYOUTS: Mapping[str, KeyMap] = {
    "diffusers": diffusers_layout(),
    "sat": sat_layout(learned=True),
    "sat_fixed": sat_layout(learned=False),
    "prefixed": KeyMap([Row(name, name) for name in _TOP], foreign="prefixed native", prefixes=_PREFIXES),
}
"""every layout besides the native one"""
