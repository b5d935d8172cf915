"""Whole sampler runs equal those of diffusers' HunyuanVideo pipelines: same weights, noise and text features.

The pipelines themselves run, built from tiny parts of random weights; so the order of their loops is not copied here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.diffusion import flow_matching
from vidgen.vidgen_core.families.hunyuan.codec import HunyuanCodec
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.families.hunyuan.text import TextFeatures
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.generate import Sampling, decode_latents, sample_latents, with_keyframes
from vidgen.vidgen_core.keyframes import Keyframe, encode_keyframes, repeat_over_frames
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.noise import NoiseStream
from vidgen.vidgen_core.sampling import sample
from vidgen.vidgen_core.tiling import Tiling, tiled
from vidgen.vidgen_core.timesteps import schedule, to_sigmas
from vidgen.vidgen_core.types import VideoShape

diffusers = pytest.importorskip("diffusers")

PARITY = 2e-6
"""float32 rounding of the same sums in two orders, over a whole run; a wrong formula is off by 1e-3 or more"""
SHAPE = VideoShape(num_frames=9, height_px=32, width_px=48)
LATENTS = (1, 4, 3, 4, 6)
NETWORK = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=32,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=24,
    pooled_width=20,
)
CODEC = CodecConfig(latent_channels=4, block_channels=(4, 4, 8, 8), layers_per_block=1, num_groups=2)
STEPS = 5

Twin = Callable[[Any], Any]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def build(config: NetworkConfig) -> VideoModel:
    network = HunyuanVideoTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return VideoModel.of("hunyuan", config, network)


@pytest.fixture(scope="module")
def codec() -> HunyuanCodec:
    torch.manual_seed(0)
    return HunyuanCodec(CausalVAE(CODEC).eval().requires_grad_(False))


def features(seed: int, num_tokens: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(seed)
    return TextFeatures(
        context=torch.randn(1, 7, NETWORK.text_width, generator=generator),
        context_mask=torch.arange(7)[None] < num_tokens,
        pooled=torch.randn(1, NETWORK.pooled_width, generator=generator),
    )


PROMPT, NEGATIVE = features(1, 5), features(2, 2)


def pipeline(
    kind: str, model: VideoModel, codec: HunyuanCodec, network_twin: Twin, vae_twin: Twin, shift: float
) -> Any:
    """diffusers' pipeline around the twins of our parts; text features are given, so it needs no text encoders."""
    image = {"image_processor": None} if "Image" in kind else {}
    pipe = getattr(diffusers, kind)(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=network_twin(model.network),
        vae=vae_twin(codec.vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        **image,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, *, cfg: float, seed: int, batch: int = 1, **given: Any) -> Tensor:
    noise = NoiseStream.of_batch(seed, batch).draw(LATENTS[1:])
    negative = {
        "negative_prompt_embeds": NEGATIVE.context,
        "negative_pooled_prompt_embeds": NEGATIVE.pooled,
        "negative_prompt_attention_mask": NEGATIVE.context_mask,
    }
    return pipe(
        prompt_embeds=PROMPT.context,
        pooled_prompt_embeds=PROMPT.pooled,
        prompt_attention_mask=PROMPT.context_mask,
        height=SHAPE.height_px,
        width=SHAPE.width_px,
        num_frames=SHAPE.num_frames,
        num_inference_steps=STEPS,
        guidance_scale=6.0,
        true_cfg_scale=cfg,
        latents=noise,
        output_type="latent",
        return_dict=False,
        **(negative if cfg > 1 else {}),
        **given,
    )[0]


# --- scheduler --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 7.0, 17.0])
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_times_and_steps_of_the_scheduler(num_steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, num_steps + 1)[:-1].tolist())
    ts = schedule("simple", num_steps, shift=shift)
    torch.testing.assert_close(to_sigmas(ts, flow_matching()), scheduler.sigmas, rtol=PARITY, atol=0)
    outputs = torch.randn(num_steps, 1, 4, 3, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    x = noise
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(output, t, x, return_dict=False)[0]
    remaining = iter(outputs)
    diffusion = flow_matching()
    ours = sample("euler", lambda x_t, t: diffusion.to_x0(x_t, next(remaining), t), diffusion, noise, ts)
    assert relative(ours, x) <= PARITY


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_embed", [False, True])
def test_text_to_video(guidance_embed: bool, codec: HunyuanCodec, network_twin: Twin, vae_twin: Twin) -> None:
    model = build(replace(NETWORK, guidance_embed=guidance_embed))
    pipe = pipeline("HunyuanVideoPipeline", model, codec, network_twin, vae_twin, 7.0)
    expected = theirs(pipe, cfg=1.0, seed=3)
    cond = model.conditioning(PROMPT, guidance=6.0)
    ours = sample_latents(model, cond, None, LATENTS, Sampling(num_steps=STEPS, shift=7.0, seed=3))
    assert relative(ours, expected) <= PARITY


@pytest.mark.parametrize("batched", [False, True])
def test_true_guidance(batched: bool, codec: HunyuanCodec, network_twin: Twin, vae_twin: Twin) -> None:
    model = build(replace(NETWORK, guidance_embed=False))
    pipe = pipeline("HunyuanVideoPipeline", model, codec, network_twin, vae_twin, 7.0)
    expected = theirs(pipe, cfg=4.0, seed=3)
    positive, negative = model.conditioning(PROMPT), model.conditioning(NEGATIVE)
    settings = Sampling(num_steps=STEPS, shift=7.0, seed=3, cfg=4.0, cfg_batched=batched)
    ours = sample_latents(model, positive, negative, LATENTS, settings)
    assert relative(ours, expected) <= PARITY
    assert relative(sample_latents(model, positive, None, LATENTS, replace(settings, cfg=1.0)), expected) > 1e-2


IMAGE = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize(
    "config",
    [
        replace(NETWORK, image_condition="token_replace", guidance_embed=True),
        replace(NETWORK, image_condition="latent_concat", guidance_embed=False, in_channels=9),
    ],
    ids=["token_replace", "latent_concat"],
)
def test_image_to_video(
    config: NetworkConfig, cfg: float, codec: HunyuanCodec, network_twin: Twin, vae_twin: Twin
) -> None:
    model = build(config)
    pipe = pipeline("HunyuanVideoImageToVideoPipeline", model, codec, network_twin, vae_twin, 7.0)
    negative = None
    if cfg > 1:
        # Its way to a negative prompt goes through a black picture and the encoders that are left out here.
        told = (
            (PROMPT.context, PROMPT.pooled, PROMPT.context_mask),
            (NEGATIVE.context, NEGATIVE.pooled, NEGATIVE.context_mask),
        )
        answers = iter(told)
        pipe.encode_prompt = lambda **_: next(answers)
        negative = model.conditioning(NEGATIVE, guidance=6.0)
    expected = theirs(pipe, cfg=cfg, seed=3, image=IMAGE)

    pictures = encode_keyframes(codec, [Keyframe(image=IMAGE * 2 - 1)], SHAPE)
    positive = with_keyframes(model, model.conditioning(PROMPT, guidance=6.0), pictures, LATENTS)
    # diffusers always mixes a thousandth of the picture into the noise: the published "stability".
    settings = Sampling(num_steps=STEPS, shift=7.0, seed=3, cfg=cfg, start_share=0.001)
    start = repeat_over_frames(pictures[0].latents, LATENTS)
    ours = sample_latents(model, positive, negative, LATENTS, settings, start=start)
    if config.image_condition == "latent_concat":
        ours = ours[:, :, 1:]  # which it leaves out of its latents; of a video it leaves out the first four frames
        assert model.family.keyframes.hidden_frames(config) == 4
    else:
        assert torch.equal(ours[:, :, :1], pictures[0].latents)
    assert relative(ours, expected) <= PARITY


def test_a_network_of_both_kinds_replaces_like_one_of_its_own(codec: HunyuanCodec) -> None:
    """The same weights, told by ``accepts_first_frame`` or by the published kind: the same run."""
    own = build(replace(NETWORK, image_condition="token_replace"))
    both = build(replace(NETWORK, accepts_first_frame=True))
    told = build(NETWORK)
    pictures = encode_keyframes(codec, [Keyframe(image=IMAGE * 2 - 1)], SHAPE)
    settings = Sampling(num_steps=2, shift=7.0)
    runs = []
    for model, method in ((own, "auto"), (both, "auto"), (told, "token_replace")):
        cond = with_keyframes(model, model.conditioning(PROMPT), pictures, LATENTS, method=method)
        runs.append(sample_latents(model, cond, None, LATENTS, settings))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# --- tiles ------------------------------------------------------------------------------------------------------------

SMALL = Tiling(tile_px=32, stride_px=24, tile_frames=16, stride_frames=12)
"""The published tiles of 256 px every 192 and 64 frames every 48, divided by 8 and 4. diffusers' own default
is 16 frames every 12 whatever the size; the published code, which we follow, has 64 and 48."""

AMPLIFIED = 1e-5
"""Random weights as torch draws them amplify rounding: with latents of a random encoder, which hardly vary, diffusers'
decoder is 3e-6 to 12e-6 from its own float64 result, ours 5e-6 to 9e-6. In float64 they are equal to 1e-9:
tests/test_tiling.py."""


def tiled_twin(codec: HunyuanCodec, vae_twin: Twin) -> Any:
    twin = vae_twin(codec.vae)
    twin.use_framewise_encoding = twin.use_framewise_decoding = True
    twin.enable_tiling(32, 32, 16, 24, 24, 12)
    return twin


@pytest.mark.parametrize(("frames", "height", "width"), [(21, 32, 48), (37, 40, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_tiles_in_float32(seed: int, frames: int, height: int, width: int, vae_twin: Twin) -> None:
    """Residual branches at a tenth, so that rounding is not amplified; trained ones: tests/test_bundled_model.py."""
    torch.manual_seed(seed)
    codec = HunyuanCodec(CausalVAE(CODEC).eval().requires_grad_(False))
    for name, parameter in codec.vae.named_parameters():
        if "conv2." in name or "to_out." in name:
            parameter.mul_(0.1)
    twin, ours = tiled_twin(codec, vae_twin), tiled(codec, SMALL)
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1
    latents = torch.randn(1, 4, (frames - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    with torch.no_grad():
        mean = twin.encode(video).latent_dist.mean
        decoded = twin.decode(latents / CODEC.scaling_factor).sample
    assert relative(ours.encode(video), mean * CODEC.scaling_factor) <= PARITY
    assert relative(ours.decode(latents), decoded) <= PARITY
    assert relative(decode_latents(codec, latents, tiling=SMALL), decoded.clamp(-1, 1)) <= PARITY


@pytest.mark.parametrize(("frames", "height", "width"), [(21, 32, 48), (37, 40, 32)])
def test_tiles_of_weights_that_amplify(
    frames: int, height: int, width: int, codec: HunyuanCodec, vae_twin: Twin
) -> None:
    twin = tiled_twin(codec, vae_twin)
    video = torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean = twin.encode(video).latent_dist.mean
        decoded = twin.decode(mean).sample
    assert relative(tiled(codec, SMALL).decode(mean * CODEC.scaling_factor), decoded) <= AMPLIFIED


def test_the_default_tiles_are_the_published_ones() -> None:
    assert (Tiling().tile_px, Tiling().stride_px) == (256, 192)
    assert (Tiling().tile_frames, Tiling().stride_frames) == (64, 48)
