"""CogVideoX beside diffusers (network, VAE, loader) and transformers (T5), with the same weights.

Reduced as HunyuanVideo is: 12 heads of 64 and 6 blocks over 1200 video and 226 text tokens; a VAE of a quarter of the
width; T5's 24 layers at an eighth of its width; a loader's file of 200 MB. diffusers' network is given its rotations
once for all steps, as its pipelines do. Its VAE goes through a video group by group, as ours does, so its default and
its untiled way are one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..vidgen_core.families.cogvideox.config import T2V_5B, T5_XXL, VAE_5B, CodecConfig, NetworkConfig, TextConfig
from ..vidgen_core.families.cogvideox.network import CogVideoXTransformer
from ..vidgen_core.families.cogvideox.text import T5Text
from ..vidgen_core.model import VideoModel, load_text, open_part
from ..vidgen_core.text.dims import T5Dims
from ..vidgen_core.text.features import TextFeatures
from ..vidgen_core.text.tokenizer import EOS, PAD, Tokenizer
from ..vidgen_core.weights.load import read_tensors
from ..vidgen_core.weights.save import save_checkpoint
from .compare_parts import codec_contest, load_ours, load_peer, random_weights, version_of, write_network
from .contest import Contest, Latents, Setting, Side, loading

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the contests are held with."""

    network: NetworkConfig
    """at its trained grid"""
    codec: CodecConfig
    codec_latents: Latents
    tile: tuple[int, int]
    """px of the peer's tiles, rows and columns: multiples of 48 and 40, as it lets a sixth and a fifth overlap"""
    t5: T5Dims
    loader: NetworkConfig


REDUCED = Sizes(
    network=NetworkConfig(hidden_size=768, num_heads=12, num_layers=6, text_width=1024, trained_grid=(3, 20, 20)),
    codec=CodecConfig(block_channels=(32, 64, 64, 128), num_groups=8),
    codec_latents=(5, 16, 20),
    tile=(96, 120),
    t5=T5Dims(vocab_size=64, hidden_size=512, num_heads=8, intermediate_size=1280),
    loader=NetworkConfig(hidden_size=1536, num_heads=24, num_layers=2, text_width=1024, trained_grid=(1, 2, 2)),
)
TINY = Sizes(
    network=NetworkConfig(
        hidden_size=48, num_heads=3, num_layers=2, text_width=24, text_length=7, time_width=20, trained_grid=(2, 2, 3),
        rope_axes=(4, 6, 6),
    ),
    codec=CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4),
    codec_latents=(3, 7, 6),
    tile=(48, 40),
    t5=T5Dims(vocab_size=64, hidden_size=32, num_heads=2, head_size=8, num_layers=2, intermediate_size=48),
    loader=NetworkConfig(
        hidden_size=48, num_heads=3, num_layers=1, text_width=24, text_length=7, time_width=20, trained_grid=(1, 2, 2),
        rope_axes=(4, 6, 6),
    ),
)  # fmt: skip
PUBLISHED_5B = Sizes(
    network=T2V_5B,
    codec=VAE_5B,
    codec_latents=(13, 60, 90),
    tile=(240, 360),
    t5=T5_XXL.t5,
    loader=T2V_5B,
)
SIZES = {"reduced": REDUCED, "tiny": TINY}
BAR = 1.00
ENTRY = 799
"""of the noise table"""


def contest(setting: Setting) -> Contest:
    """The two sides of one part."""
    sizes = SIZES[setting.size]
    make = {"network": _network, "codec": _codec, "text": _text, "loader": _loader}[setting.part]
    made = make(setting, sizes)
    return made if setting.dtype == "fp32" else replace(made, exact=make(replace(setting, dtype="fp32"), sizes).ours)


# ---------------------------------------------------------------------------------------------
# network


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


def _load_theirs(folder: Path, setting: Setting) -> CogVideoXTransformer3DModel:
    return with_official_eps(load_peer(folder, setting, "CogVideoXTransformer3DModel"))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a network is given, and what each side makes of it once for all steps."""

    config: NetworkConfig
    setting: Setting

    def inputs(self) -> tuple[Tensor, TextFeatures]:
        """Noise, and the features of a prompt."""
        config, generator = self.config, torch.Generator().manual_seed(1)
        frames, rows, columns = config.trained_grid
        noise = torch.randn(1, config.in_channels, frames, 2 * rows, 2 * columns, generator=generator)
        context = torch.randn(1, config.text_length, config.text_width, generator=generator)
        mask = torch.ones(1, config.text_length, dtype=torch.bool)
        features = TextFeatures(context=context, context_mask=mask, pooled=torch.zeros(1, 0))
        return noise.to(self.setting.device, self.setting.torch_dtype), features

    def ours(self, model: VideoModel) -> Side:
        noise, features = self.inputs()
        cond = model.conditioning(features).to(self.setting.device)

        def run() -> Tensor:
            with torch.inference_mode():
                return model.predict(noise, torch.tensor((ENTRY + 1) / 1000, dtype=torch.float64), cond)

        return Side(run=run, answer=lambda v: v, modules=(model.network,))

    def peer(self, model: CogVideoXTransformer3DModel) -> Side:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        noise, features = self.inputs()
        latents, context = noise.transpose(1, 2), features.context.to(noise)
        frames, *size = self.config.trained_grid
        head = self.config.hidden_size // self.config.num_heads
        rope = get_3d_rotary_pos_embed(head, ((0, 0), size), size, frames, device=noise.device)
        timestep = torch.full((1,), ENTRY, device=noise.device)

        def run() -> Tensor:
            with torch.no_grad():
                return model(latents, context, timestep, image_rotary_emb=rope, return_dict=False)[0]

        return Side(run=run, answer=lambda v: v.transpose(1, 2), modules=(model,))


def _network(setting: Setting, sizes: Sizes) -> Contest:
    config = sizes.network
    asked = Asked(config, setting)
    frames, rows, columns = config.trained_grid
    return Contest(
        prepare=lambda folder: write_network(folder, "cogvideox", config, diffusers_network, setting.dtype),
        ours=lambda folder: asked.ours(load_ours(folder, setting)),
        peer=lambda folder: asked.peer(_load_theirs(folder, setting)),
        peer_name=version_of("diffusers"),
        bar=BAR,
        facts={
            "video_tokens": frames * rows * columns,
            "text_tokens": config.text_length,
            "width": config.hidden_size,
            "blocks": config.num_layers,
        },
    )


# ---------------------------------------------------------------------------------------------
# codec


def diffusers_vae(config: CodecConfig) -> AutoencoderKLCogVideoX:
    """diffusers' VAE of the same dimensions, with weights of its own; it does not tile."""
    from diffusers import AutoencoderKLCogVideoX

    levels = len(config.block_channels)
    return AutoencoderKLCogVideoX(
        block_out_channels=config.block_channels,
        down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels,
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        temporal_compression_ratio=config.temporal_compression,
        scaling_factor=config.scaling_factor,
    )


def _codec(setting: Setting, sizes: Sizes) -> Contest:
    def peer() -> AutoencoderKLCogVideoX:
        vae = diffusers_vae(sizes.codec)
        if setting.peer == "tiled":
            vae.enable_tiling(*sizes.tile)
        return vae

    way = "enable_tiling()" if setting.peer == "tiled" else "its default"
    peer_name = f"{version_of('diffusers')}, {way}"
    return codec_contest(setting, "cogvideox", sizes.codec, sizes.codec_latents, peer, peer_name, BAR)


# ---------------------------------------------------------------------------------------------
# text encoder


def _text(setting: Setting, sizes: Sizes) -> Contest:
    tokenizer = Tokenizer.from_words(["word"])
    pad, eos = (tokenizer.id_of(word) for word in (PAD, EOS))
    assert pad is not None
    assert eos is not None
    config = TextConfig(t5=sizes.t5, pad_token_id=pad, eos_token_id=eos)
    prompt = " ".join(["word"] * (setting.valid_text - 1))  # and the token that ends it

    def prepare(folder: Path) -> None:
        with torch.device("meta"):
            text = T5Text(config, tokenizer)
        state, told = random_weights(text, setting.dtype), text.metadata()
        path = folder / "text.safetensors"
        save_checkpoint(path, state, family="cogvideox", part="text", config=config, metadata=told)

    def ours(folder: Path) -> Side:
        text = load_text(folder / "text.safetensors", dtype=setting.torch_dtype, device=setting.device)
        assert isinstance(text, T5Text)

        def run() -> Tensor:
            with torch.inference_mode():
                return text.encode([prompt]).context

        return Side(run=run, answer=lambda states: states, modules=(text,))

    def peer(folder: Path) -> Side:
        encoder = _transformers_t5(sizes.t5, folder / "text.safetensors", setting)
        with torch.device("meta"):
            told = T5Text(config, tokenizer)

        def run() -> Tensor:
            with torch.no_grad():
                return encoder(told.tokenize([prompt]).to(setting.device))[0]

        return Side(run=run, answer=lambda states: states, modules=(encoder,))

    return Contest(
        prepare=prepare,
        ours=ours,
        peer=peer,
        peer_name=f"{version_of('transformers')}, as diffusers' pipeline calls it",
        bar=BAR,
        facts={"text_tokens": config.max_length, "width": sizes.t5.hidden_size, "layers": sizes.t5.num_layers},
    )


def _transformers_t5(dims: T5Dims, path: Path, setting: Setting) -> nn.Module:
    """T5EncoderModel as published encoders are loaded."""
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(
            vocab_size=dims.vocab_size,
            d_model=dims.hidden_size,
            d_kv=dims.head_size,
            d_ff=dims.intermediate_size,
            num_layers=dims.num_layers,
            num_heads=dims.num_heads,
            relative_attention_num_buckets=dims.num_buckets,
            relative_attention_max_distance=dims.max_distance,
            layer_norm_epsilon=dims.norm_eps,
            feed_forward_proj="gated-gelu",
        )
    )
    header, _ = open_part(path, "text")
    model.encoder.load_state_dict({name.removeprefix("t5."): value for name, value in read_tensors(header).items()})
    return model.to(setting.device, setting.torch_dtype).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------
# loader


def _loader(setting: Setting, sizes: Sizes) -> Contest:
    config = sizes.loader
    asked = Asked(config, setting)

    def prepare(folder: Path) -> None:
        write_network(folder, "cogvideox", config, diffusers_network, "fp8" if setting.dtype == "fp8" else "bf16")

    def ours(folder: Path) -> Side:
        return loading(
            lambda: load_ours(folder, setting), lambda model: model.network, lambda model: asked.ours(model).run()
        )

    def peer(folder: Path) -> Side:
        import diffusers

        assert diffusers.CogVideoXTransformer3DModel  # imported before the clock runs

        def answer(model: CogVideoXTransformer3DModel) -> Tensor:
            side = asked.peer(model)
            return side.answer(side.run())

        return loading(lambda: _load_theirs(folder, setting), lambda model: model, answer)

    with torch.device("meta"):
        num_parameters = sum(tensor.numel() for tensor in CogVideoXTransformer(config).parameters())
    return Contest(
        prepare=prepare,
        ours=ours,
        peer=peer,
        peer_name=version_of("diffusers"),
        bar=BAR,
        facts={"num_parameters": num_parameters, "file": "fp8" if setting.dtype == "fp8" else "bf16"},
    )
