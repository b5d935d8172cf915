"""HunyuanVideo beside diffusers (network, VAE, loader) and transformers (text encoders), with the same weights.

Sizes are reduced so that a CPU takes seconds, and every layer keeps its shape relative to the others: 6 heads of 128
and 2 + 4 blocks over 1200 video and 256 text tokens; a VAE of a quarter of the width; LLaMA's 32 layers at an eighth
of its width; a loader's file of 200 MB. Bars are ratios of time, ours / theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig, Template, TextConfig
from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from ..vidgen_core.families.hunyuan.text import TextStack
from ..vidgen_core.model import VideoModel, load_text, open_part
from ..vidgen_core.text.dims import ClipDims, LlamaDims
from ..vidgen_core.text.features import TextFeatures
from ..vidgen_core.text.tokenizer import BOS, EOS, PAD, Tokenizer
from ..vidgen_core.weights.load import read_tensors
from ..vidgen_core.weights.save import save_checkpoint
from .compare_parts import codec_contest, load_ours, load_peer, random_weights, version_of, write_network
from .contest import Contest, Latents, Setting, Side, loading

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

NUM_TEXT = 256
GUIDANCE = 8.0
"""times 1000 it survives the rounding to bfloat16; 6.0 would be heard as 6016, which is no matter of speed"""
TIMESTEP = 800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the contests are held with."""

    network: NetworkConfig
    network_latents: Latents
    codec: CodecConfig
    codec_latents: Mapping[str, Latents]
    """by the way the peer decodes"""
    tile: tuple[int, int]
    """px and stride of the peer's tiles"""
    llama: LlamaDims
    clip: ClipDims
    crop_start: int
    """tokens of the template before the prompt"""
    loader: NetworkConfig


_VOCABULARY = 64
_LLAMA = LlamaDims(
    vocab_size=_VOCABULARY, hidden_size=512, num_heads=8, num_kv_heads=2, intermediate_size=1792, num_layers=32
)
_CLIP = ClipDims(vocab_size=_VOCABULARY, eos_token_id=3)

REDUCED = Sizes(
    network=NetworkConfig(
        hidden_size=768, num_heads=6, num_double_blocks=2, num_single_blocks=4, text_width=1024, pooled_width=768
    ),
    network_latents=(3, 40, 40),
    codec=CodecConfig(block_channels=(32, 64, 128, 128), num_groups=8),
    # diffusers cuts what is longer than 4 latents when it decodes in its default way, and what is larger than 32 x 32
    # when it tiles.
    codec_latents={"untiled": (3, 16, 20), "default": (9, 16, 20), "tiled": (9, 34, 34)},
    tile=(256, 192),
    llama=_LLAMA,
    clip=_CLIP,
    crop_start=95,
    loader=NetworkConfig(
        hidden_size=1536, num_heads=12, num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1, text_width=1024
    ),
)
_TINY_NETWORK = NetworkConfig(
    hidden_size=32,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=1,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=24,
    pooled_width=20,
)
TINY = Sizes(
    network=_TINY_NETWORK,
    network_latents=(2, 4, 4),
    codec=CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4),
    codec_latents={"untiled": (2, 3, 4), "default": (5, 3, 4), "tiled": (5, 6, 6)},
    tile=(32, 24),
    llama=replace(_LLAMA, hidden_size=16, num_heads=2, num_layers=4, intermediate_size=32),
    clip=replace(_CLIP, hidden_size=16, num_heads=2, num_layers=1, intermediate_size=32),
    crop_start=5,
    loader=_TINY_NETWORK,
)
SIZES = {"reduced": REDUCED, "tiny": TINY}

NETWORK_BARS = {64: 0.82, 256: 1.00}
"""by the number of text tokens that are no padding"""
CODEC_BARS = {"untiled": 0.80, "default": 0.60, "tiled": 0.42}


def contest(setting: Setting) -> Contest:
    """The two sides of one part."""
    sizes = SIZES[setting.size]
    make = {"network": _network, "codec": _codec, "text": _text, "loader": _loader}[setting.part]
    made = make(setting, sizes)
    if setting.dtype == "fp32" or made.exact is not None:
        return made
    return replace(made, exact=make(replace(setting, dtype="fp32"), sizes).ours)


# ---------------------------------------------------------------------------------------------
# the peer's


def diffusers_network(config: NetworkConfig) -> HunyuanVideoTransformer3DModel:
    """diffusers' transformer of the same configuration, with weights of its own (none on the meta device)."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        num_layers=config.num_double_blocks,
        num_single_layers=config.num_single_blocks,
        num_refiner_layers=config.num_refiner_blocks,
        patch_size_t=config.patch[0],
        patch_size=config.patch[1],
        guidance_embeds=config.guidance_embed,
        text_embed_dim=config.text_width,
        pooled_projection_dim=config.pooled_width,
        rope_axes_dim=config.rope_axes,
        image_condition_type=None if config.image_condition == "none" else config.image_condition,
    )


def diffusers_vae(config: CodecConfig) -> AutoencoderKLHunyuanVideo:
    """diffusers' VAE of the same configuration, with weights of its own, in its default state: it cuts in time."""
    from diffusers import AutoencoderKLHunyuanVideo

    levels = len(config.block_channels)
    return AutoencoderKLHunyuanVideo(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        down_block_types=("HunyuanVideoDownBlock3D",) * levels,
        up_block_types=("HunyuanVideoUpBlock3D",) * levels,
        block_out_channels=config.block_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.num_groups,
        spatial_compression_ratio=config.spatial_compression,
        temporal_compression_ratio=config.temporal_compression,
        mid_block_add_attention=config.mid_attention,
    )


# ---------------------------------------------------------------------------------------------
# network


def network_inputs(
    config: NetworkConfig, latents: Latents, valid_text: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, TextFeatures]:
    """Noise, and the features of a prompt padded to 256 tokens."""
    generator = torch.Generator().manual_seed(1)
    num_text = max(NUM_TEXT, valid_text)
    features = TextFeatures(
        context=torch.randn(1, num_text, config.text_width, generator=generator).to(device),
        context_mask=(torch.arange(num_text)[None] < valid_text).to(device),
        pooled=torch.randn(1, config.pooled_width, generator=generator).to(device),
    )
    noise = torch.randn(1, config.in_channels, *latents, generator=generator)
    return noise.to(device, dtype), features


def forward_ours(model: VideoModel, noise: Tensor, features: TextFeatures) -> Tensor:
    """As a render does it; the padding is dropped once per prompt, before."""
    return model.predict(noise, torch.tensor(TIMESTEP / 1000), model.conditioning(features, guidance=GUIDANCE))


def forward_theirs(
    model: HunyuanVideoTransformer3DModel, noise: Tensor, features: TextFeatures, dtype: torch.dtype
) -> Tensor:
    """As its pipeline does it."""
    return model(
        noise,
        torch.full((1,), TIMESTEP, device=noise.device),
        features.context.to(dtype),
        features.context_mask,
        features.pooled.to(dtype),
        torch.full((1,), GUIDANCE * 1000, device=noise.device, dtype=dtype),
        return_dict=False,
    )[0]


def _network(setting: Setting, sizes: Sizes) -> Contest:
    config, latents = sizes.network, sizes.network_latents

    def ours(folder: Path) -> Side:
        model = load_ours(folder, setting)
        noise, features = network_inputs(config, latents, setting.valid_text, setting.device, setting.torch_dtype)
        cond = model.conditioning(features, guidance=GUIDANCE)

        def run() -> Tensor:
            with torch.inference_mode():
                return model.predict(noise, torch.tensor(TIMESTEP / 1000), cond)

        return Side(run=run, answer=lambda flow: flow, modules=(model.network,))

    def peer(folder: Path) -> Side:
        model = load_peer(folder, setting, "HunyuanVideoTransformer3DModel")
        noise, features = network_inputs(config, latents, setting.valid_text, setting.device, setting.torch_dtype)

        def run() -> Tensor:
            with torch.no_grad():
                return forward_theirs(model, noise, features, setting.torch_dtype)

        return Side(run=run, answer=lambda flow: flow, modules=(model,))

    video = latents[0] * latents[1] * latents[2] // 4
    return Contest(
        prepare=lambda folder: write_network(folder, "hunyuan", config, diffusers_network, setting.dtype),
        ours=ours,
        peer=peer,
        peer_name=version_of("diffusers"),
        bar=NETWORK_BARS.get(setting.valid_text),
        facts={
            "video_tokens": video,
            "text_tokens": {"valid": setting.valid_text, "padded": max(NUM_TEXT, setting.valid_text)},
            "width": config.hidden_size,
            "blocks": [config.num_double_blocks, config.num_single_blocks],
        },
    )


# ---------------------------------------------------------------------------------------------
# codec


def _codec(setting: Setting, sizes: Sizes) -> Contest:
    def peer() -> AutoencoderKLHunyuanVideo:
        vae = diffusers_vae(sizes.codec)
        if setting.peer == "untiled":
            vae.use_framewise_decoding = False
        elif setting.peer == "tiled":
            px, stride = sizes.tile
            vae.enable_tiling(px, px, 16, stride, stride, 12)
        return vae

    ways = {"untiled": "use_framewise_decoding=False", "default": "its default", "tiled": "enable_tiling()"}
    peer_name, bar = f"{version_of('diffusers')}, {ways[setting.peer]}", CODEC_BARS[setting.peer]
    return codec_contest(setting, "hunyuan", sizes.codec, sizes.codec_latents[setting.peer], peer, peer_name, bar)


# ---------------------------------------------------------------------------------------------
# text encoders


def _text_config(sizes: Sizes) -> tuple[TextConfig, Tokenizer]:
    """A template of ``crop_start`` tokens, of words that one small tokenizer knows for both encoders."""
    tokenizer = Tokenizer.from_words(["template", "word"])
    pad, bos, eos = (tokenizer.id_of(word) for word in (PAD, BOS, EOS))
    assert pad is not None
    assert bos is not None
    assert eos == sizes.clip.eos_token_id
    template = Template(text="template " * (sizes.crop_start - 1) + "{}", crop_start=sizes.crop_start)
    config = TextConfig(
        llama=sizes.llama,
        clip=sizes.clip,
        max_length=NUM_TEXT,
        pad_token_id=pad,
        bos_token_id=bos,
        video_template=template,
        image_template=template,
    )
    return config, tokenizer


def _text(setting: Setting, sizes: Sizes) -> Contest:
    config, tokenizer = _text_config(sizes)
    prompt = " ".join(["word"] * (setting.valid_text - 1))  # and the token that ends it

    def prepare(folder: Path) -> None:
        with torch.device("meta"):
            stack = TextStack(config, tokenizer)
        state = random_weights(stack, setting.dtype)
        metadata = stack.metadata()
        save_checkpoint(
            folder / "text.safetensors", state, family="hunyuan", part="text", config=config, metadata=metadata
        )

    def ours(folder: Path) -> Side:
        stack = load_text(folder / "text.safetensors", dtype=setting.torch_dtype, device=setting.device)
        assert isinstance(stack, TextStack)

        def run() -> TextFeatures:
            with torch.inference_mode():
                return stack.encode([prompt])

        return Side(run=run, answer=_real_features, modules=(stack,))

    def peer(folder: Path) -> Side:
        llama, clip = _transformers_encoders(config, folder / "text.safetensors", setting)
        with torch.device("meta"):
            told = TextStack(config, tokenizer)

        def run() -> TextFeatures:
            tokens = told.tokenize([prompt])
            ids, mask = tokens.ids.to(setting.device), tokens.mask.to(setting.device)
            with torch.no_grad():
                states = llama(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
                pooled = clip(tokens.clip_ids.to(setting.device)).pooler_output
            context = states[-(config.llama.skip_layers + 1)]
            return TextFeatures(
                context=context[:, tokens.crop_start :], context_mask=mask[:, tokens.crop_start :], pooled=pooled
            )

        return Side(run=run, answer=_real_features, modules=(llama, clip))

    return Contest(
        prepare=prepare,
        ours=ours,
        peer=peer,
        peer_name=f"{version_of('transformers')}, as diffusers' pipeline calls it",
        bar=1.00,
        facts={
            "text_tokens": {"template": config.video_template.crop_start, "valid": setting.valid_text},
            "width": config.llama.hidden_size,
            "layers": config.llama.num_layers,
        },
    )


def _real_features(features: TextFeatures) -> Tensor:
    """States of real tokens and the pooled vector, as one vector."""
    return torch.cat([features.context[features.context_mask].flatten().float(), features.pooled.flatten().float()])


def _transformers_encoders(config: TextConfig, path: Path, setting: Setting) -> tuple[nn.Module, nn.Module]:
    """LlamaModel with all of its layers and CLIPTextModel, as published encoders are loaded.

    The layers that ours leaves out get weights of their own; the states that are taken do not depend on them.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    dims, clip_dims = config.llama, config.clip
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=dims.vocab_size,
            hidden_size=dims.hidden_size,
            intermediate_size=dims.intermediate_size,
            num_hidden_layers=dims.num_layers,
            num_attention_heads=dims.num_heads,
            num_key_value_heads=dims.num_kv_heads,
            rms_norm_eps=dims.norm_eps,
            rope_theta=dims.rope_theta,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_dims.vocab_size,
            hidden_size=clip_dims.hidden_size,
            intermediate_size=clip_dims.intermediate_size,
            num_hidden_layers=clip_dims.num_layers,
            num_attention_heads=clip_dims.num_heads,
            max_position_embeddings=clip_dims.max_length,
            hidden_act=clip_dims.activation,
            bos_token_id=None,
            eos_token_id=clip_dims.eos_token_id,
            pad_token_id=clip_dims.eos_token_id,
        )
    )
    header, _ = open_part(path, "text")
    stored = read_tensors(header)
    for prefix, module in (("llama.", llama), ("clip.", clip)):
        own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        own = {name: own.get(name, own.get(f"text_model.{name}", t)) for name, t in module.state_dict().items()}
        module.load_state_dict(own)
        module.to(setting.device, setting.torch_dtype).eval().requires_grad_(False)
    return llama, clip


# ---------------------------------------------------------------------------------------------
# loader


def _loader(setting: Setting, sizes: Sizes) -> Contest:
    config = sizes.loader
    small = (1, 4, 4)

    def prepare(folder: Path) -> None:
        write_network(folder, "hunyuan", config, diffusers_network, "fp8" if setting.dtype == "fp8" else "bf16")

    def ours(folder: Path) -> Side:
        def answer(model: VideoModel) -> Tensor:
            noise, features = network_inputs(config, small, setting.valid_text, setting.device, setting.torch_dtype)
            with torch.inference_mode():
                return forward_ours(model, noise, features)

        return loading(lambda: load_ours(folder, setting), lambda model: model.network, answer)

    def peer(folder: Path) -> Side:
        import diffusers

        assert diffusers.HunyuanVideoTransformer3DModel  # imported before the clock runs

        def answer(model: HunyuanVideoTransformer3DModel) -> Tensor:
            noise, features = network_inputs(config, small, setting.valid_text, setting.device, setting.torch_dtype)
            with torch.no_grad():
                return forward_theirs(model, noise, features, setting.torch_dtype)

        return loading(
            lambda: load_peer(folder, setting, "HunyuanVideoTransformer3DModel"), lambda model: model, answer
        )

    with torch.device("meta"):
        num_parameters = sum(tensor.numel() for tensor in HunyuanVideoTransformer(config).parameters())
    return Contest(
        prepare=prepare,
        ours=ours,
        peer=peer,
        peer_name=version_of("diffusers"),
        bar=1.00,
        facts={"num_parameters": num_parameters, "file": "fp8" if setting.dtype == "fp8" else "bf16"},
    )
