"""Whole sampler runs equal those of diffusers' CogVideoX pipelines: same weights, noise, text states and picture.

The pipelines themselves run, built from tiny parts of random weights; so the order of their loops is not copied here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.caching import StepCache
from vidgen.vidgen_core.errors import Cancelled, SettingsError
from vidgen.vidgen_core.families import FAMILIES
from vidgen.vidgen_core.families.cogvideox.config import (
    I2V_1_5_5B,
    INVERTED_LATENTS,
    RAW_LATENTS,
    SCALING_FACTOR,
    T2V_2B,
    T2V_5B,
    NetworkConfig,
)
from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer
from vidgen.vidgen_core.generate import Sampling, sample_latents, with_keyframes
from vidgen.vidgen_core.guidance import cfg_schedule
from vidgen.vidgen_core.keyframes import LatentKeyframe
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.nn.backends import AttentionChoice
from vidgen.vidgen_core.nn.sliding_tiles import SlidingTiles
from vidgen.vidgen_core.noise import NoiseStream
from vidgen.vidgen_core.preview import LatentRGB
from vidgen.vidgen_core.sampling import sample
from vidgen.vidgen_core.text.features import TextFeatures
from vidgen.vidgen_core.timesteps import schedule
from vidgen.vidgen_core.tricks import Enhance, Riflex, Tricks, WeakPass
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.windows import Windows

diffusers = pytest.importorskip("diffusers")

PARITY = 2e-6
"""float32 rounding of the same sums in two orders, over a whole run; a wrong formula is off by 1e-3 or more"""
STEPS = 5
"""a divisor of 1000: for others the published schedulers step to entries that they do not visit"""
HEIGHT_PX, WIDTH_PX, FRAMES = 48, 64, 9
LATENTS = (1, 4, 3, 6, 8)

TINY = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=48,
    num_heads=3,
    num_layers=2,
    text_width=24,
    text_length=7,
    time_width=20,
    trained_grid=(3, 3, 4),
    rope_axes=(4, 6, 6),
)
LATER = replace(TINY, patch=(2, 2, 2), trained_grid=(2, 5, 6), rope_fit="slice")
NETWORKS = {
    "2b": replace(TINY, positions="sincos", snr_shift=3.0),
    "5b": TINY,
    "1.5_5b": LATER,
    "5b_i2v": replace(TINY, in_channels=8, positions="learned"),
    "1.5_5b_i2v": replace(LATER, in_channels=8, offset_embed=True, image_scale=INVERTED_LATENTS),
}

Twin = Callable[[Any], Any]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(config: NetworkConfig) -> VideoModel:
    network = CogVideoXTransformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return VideoModel.of("cogvideox", config, network)


def features(seed: int) -> TextFeatures:
    mask = torch.arange(7)[None] < 3  # T5's states of padded tokens count like the others
    return TextFeatures(context=normal(seed, 1, 7, 24), context_mask=mask, pooled=torch.zeros(1, 0))


PROMPT, NEGATIVE = features(1), features(2)
PICTURE = normal(5, 1, 4, 1, 6, 8)
"""a first frame as the VAE gives it, not scaled"""


def scheduler(kind: str, config: NetworkConfig) -> Any:
    return getattr(diffusers, f"CogVideoX{kind}Scheduler")(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=config.snr_shift,
    )


def pipeline(kind: str, model: VideoModel, twin: Twin, method: str) -> Any:
    """diffusers' pipeline around the twin; text states are given, and the VAE gives :data:`PICTURE`."""
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=SCALING_FACTOR,
        invert_scale_latents=model.config.patch[0] > 1,
    )
    vae.encode = lambda image: SimpleNamespace(latents=PICTURE)
    pipe = getattr(diffusers, kind)(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=twin(model.network),
        scheduler=scheduler(method, model.config),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def theirs(pipe: Any, seed: int, *, dynamic: bool, cfg: float = 6.0, steps: int = STEPS, **given: Any) -> Tensor:
    """(B, C, T, H, W), the leading frame of 1.5 included."""
    frames = LATENTS[2] + LATENTS[2] % (pipe.transformer.config.patch_size_t or 1)
    noise = NoiseStream([seed]).draw((4, frames, 6, 8))
    if "video" not in given:
        given = {"num_frames": FRAMES, **given}
    return pipe(
        prompt_embeds=PROMPT.context,
        negative_prompt_embeds=NEGATIVE.context,
        height=HEIGHT_PX,
        width=WIDTH_PX,
        num_inference_steps=steps,
        guidance_scale=cfg,
        use_dynamic_cfg=dynamic,
        output_type="latent",
        return_dict=False,
        **{"latents": noise.transpose(1, 2), **given},
    )[0].transpose(1, 2)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """The published sampler draws from our stream, after the first noise: as many numbers, in the same order."""
    from diffusers.schedulers import scheduling_dpm_cogvideox as module

    def begin(seed: int, frames: int) -> None:
        stream = NoiseStream([seed])
        stream.draw((4, frames, 6, 8))

        def draw(shape: Any, **_: Any) -> Tensor:
            assert tuple(shape) == (1, frames, 4, 6, 8)
            return stream.draw((4, frames, 6, 8)).transpose(1, 2)

        monkeypatch.setattr(module, "randn_tensor", draw)

    return begin


# --- the noise process ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [T2V_2B, T2V_5B], ids=["snr_shift 3", "snr_shift 1"])
@pytest.mark.parametrize("num_steps", [1, 4, 50, 1000])
def test_times_and_table_of_the_schedulers(config: NetworkConfig, num_steps: int) -> None:
    diffusion = FAMILIES["cogvideox"].diffusion(config)
    peer = scheduler("DDIM", config)
    peer.set_timesteps(num_steps)
    ts = schedule("trailing", num_steps, diffusion=diffusion)
    assert diffusion.clock(ts[:-1]).tolist() == peer.timesteps.tolist()
    expected = peer.alphas_cumprod[peer.timesteps].double().sqrt()
    torch.testing.assert_close(diffusion.alpha(ts[:-1]), expected, rtol=1e-9, atol=1e-12)
    assert float(diffusion.alpha(ts[0])) == 0.0 == float(expected[0])
    assert (float(ts[-1]), float(diffusion.alpha(ts[-1]))) == (0.0, 1.0)


@pytest.mark.parametrize("config", [T2V_2B, T2V_5B], ids=["snr_shift 3", "snr_shift 1"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 50])
@pytest.mark.parametrize("kind", ["DDIM", "DPM"])
def test_steps_of_the_schedulers(
    kind: str, num_steps: int, config: NetworkConfig, same_draws: Callable[[int, int], None]
) -> None:
    diffusion = FAMILIES["cogvideox"].diffusion(config)
    peer = scheduler(kind, config)
    peer.set_timesteps(num_steps)
    noise = NoiseStream([7]).draw(LATENTS[1:])
    outputs = normal(0, num_steps, *LATENTS)
    same_draws(7, 3)
    x, old = noise.transpose(1, 2), None
    for index, (t, output) in enumerate(zip(peer.timesteps, outputs, strict=True)):
        output = output.transpose(1, 2)
        if kind == "DDIM":
            x = peer.step(output, t, x, return_dict=False)[0]
        else:
            before = peer.timesteps[index - 1] if index else None
            x, old = peer.step(output, old, t, before, x, return_dict=False)
    remaining, stream = iter(outputs), NoiseStream([7])
    stream.draw(LATENTS[1:])
    ours = sample(
        {"DDIM": "ddim", "DPM": "cogvideox_dpm"}[kind],
        lambda x_t, t: diffusion.to_x0(x_t, next(remaining), t),
        diffusion,
        noise,
        schedule("trailing", num_steps, diffusion=diffusion),
        noise=stream,
    )
    assert relative(ours, x.transpose(1, 2)) <= PARITY


def test_the_order_of_draws_is_what_tells_the_samplers_apart() -> None:
    diffusion = FAMILIES["cogvideox"].diffusion(T2V_5B)
    ts = schedule("trailing", 4, diffusion=diffusion)
    runs = [
        sample(name, lambda x, t: 0.5 * x, diffusion, normal(0, *LATENTS), ts, noise=NoiseStream([1]))
        for name in ("cogvideox_dpm", "dpmpp_2m_sde")
    ]
    assert relative(*runs) > 0.1
    still = [
        sample(name, lambda x, t: 0.5 * x, diffusion, normal(0, *LATENTS), ts, noise=NoiseStream([1]), eta=0.0)
        for name in ("cogvideox_dpm", "dpmpp_2m")
    ]
    assert torch.equal(*still)


def test_a_stopped_run_of_the_published_sampler_goes_on_to_the_same_bits() -> None:
    from vidgen.vidgen_core.sampling import SamplerState

    diffusion = FAMILIES["cogvideox"].diffusion(T2V_5B)
    ts = schedule("trailing", 6, diffusion=diffusion)

    def run(state: SamplerState, stop: int | None) -> Tensor:
        return sample(
            *("cogvideox_dpm", lambda x, t: 0.5 * x, diffusion, normal(0, *LATENTS), ts),
            noise=NoiseStream([1]),
            state=state,
            stop_after=stop,
        )

    state = SamplerState()
    run(state, 3)
    assert torch.equal(run(state, None), run(SamplerState(), None))


@pytest.mark.parametrize("num_steps", [5, 50])
def test_dynamic_guidance_is_the_published_formula_of_the_raw_timestep(num_steps: int) -> None:
    diffusion = FAMILIES["cogvideox"].diffusion(T2V_5B)
    at = cfg_schedule("dynamic", 6.0, num_steps=num_steps)
    for t in schedule("trailing", num_steps, diffusion=diffusion)[:-1].tolist():
        entry = round(1000 * t) - 1
        expected = 1 + 6.0 * ((1 - math.cos(math.pi * ((num_steps - entry) / num_steps) ** 5.0)) / 2)
        assert at(t) == expected
    assert cfg_schedule("dynamic", 6.0, start=0.5, end=0.1)(0.7) == 1.0


# --- runs -------------------------------------------------------------------------------------------------------------


def settings_for(method: str, dynamic: bool, **more: Any) -> Sampling:
    return Sampling(
        num_steps=STEPS,
        sampler={"DDIM": "ddim", "DPM": "cogvideox_dpm"}[method],
        cfg=6.0,
        cfg_schedule="dynamic" if dynamic else "constant",
        seed=3,
        **more,
    )


@pytest.mark.parametrize(("method", "dynamic"), [("DDIM", False), ("DPM", True), ("DPM", False)])
@pytest.mark.parametrize("name", ["2b", "5b", "1.5_5b"])
def test_text_to_video(
    name: str, method: str, dynamic: bool, cogvideox_twin: Twin, same_draws: Callable[[int, int], None]
) -> None:
    model = build(NETWORKS[name])
    lead = model.family.lead_frames(model.config, 3)
    same_draws(3, 3 + lead)
    pipe = pipeline("CogVideoXPipeline", model, cogvideox_twin, method)
    expected = theirs(pipe, 3, dynamic=dynamic)[:, :, lead:]
    positive, negative = model.conditioning(PROMPT), model.conditioning(NEGATIVE)
    ours = sample_latents(model, positive, negative, LATENTS, settings_for(method, dynamic))
    assert ours.shape == LATENTS
    assert relative(ours, expected) <= PARITY


@pytest.mark.parametrize(("method", "dynamic"), [("DDIM", False), ("DPM", True)])
@pytest.mark.parametrize("name", ["5b_i2v", "1.5_5b_i2v"])
def test_image_to_video(
    name: str, method: str, dynamic: bool, cogvideox_twin: Twin, same_draws: Callable[[int, int], None]
) -> None:
    model = build(NETWORKS[name])
    lead = model.family.lead_frames(model.config, 3)
    same_draws(3, 3 + lead)
    pipe = pipeline("CogVideoXImageToVideoPipeline", model, cogvideox_twin, method)
    expected = theirs(pipe, 3, dynamic=dynamic, image=torch.zeros(1, 3, HEIGHT_PX, WIDTH_PX))[:, :, lead:]
    pictures = [LatentKeyframe(latents=PICTURE * SCALING_FACTOR, index=0)]
    positive = with_keyframes(model, model.conditioning(PROMPT), pictures, LATENTS)
    ours = sample_latents(model, positive, model.conditioning(NEGATIVE), LATENTS, settings_for(method, dynamic))
    assert relative(ours, expected) <= PARITY
    other = replace(pictures[0], latents=pictures[0].latents + 1)
    positive = with_keyframes(model, model.conditioning(PROMPT), [other], LATENTS)
    changed = sample_latents(model, positive, model.conditioning(NEGATIVE), LATENTS, settings_for(method, dynamic))
    assert relative(changed, expected) > 1e-3


def test_video_to_video(cogvideox_twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video as module

    model, start = build(TINY), normal(8, *LATENTS)
    pipe = pipeline("CogVideoXVideoToVideoPipeline", model, cogvideox_twin, "DDIM")
    noise = NoiseStream([3]).draw(LATENTS[1:])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise.transpose(1, 2))
    pipe.vae.encode = lambda video: SimpleNamespace(latents=start / SCALING_FACTOR)
    expected = theirs(
        *(pipe, 3),
        dynamic=True,
        steps=10,
        strength=0.6,
        video=torch.zeros(1, FRAMES, 3, HEIGHT_PX, WIDTH_PX),
        latents=None,
    )
    settings = replace(settings_for("DDIM", True), num_steps=6, denoise=0.6)
    positive, negative = model.conditioning(PROMPT), model.conditioning(NEGATIVE)
    ours = sample_latents(model, positive, negative, LATENTS, settings, start=start)
    assert relative(ours, expected) <= PARITY


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("times", ["trailing", "karras", "simple"])
def test_every_other_sampler_runs(sampler: str, times: str) -> None:
    model = build(LATER)
    settings = Sampling(num_steps=3, sampler=sampler, schedule=times, cfg=1.0, cfg_schedule="constant")
    assert bool(sample_latents(model, model.conditioning(PROMPT), None, LATENTS, settings).isfinite().all())


# --- the leading latent frame of 1.5 ----------------------------------------------------------------------------------


def test_81_frames_run_with_22_latent_frames() -> None:
    lead = FAMILIES["cogvideox"].lead_frames
    assert [lead(I2V_1_5_5B, frames) for frames in (1, 21, 41, 22)] == [1, 1, 1, 0]
    assert [lead(T2V_5B, frames) for frames in (1, 13)] == [0, 0]


def test_the_leading_frame_is_seen_by_nobody() -> None:
    model = build(LATER)
    shown: list[int] = []
    host = LocalHost(on_preview=lambda frames: shown.append(len(frames)))
    to_rgb = LatentRGB(weight=((0.1, 0.2, 0.3),) * 4, bias=(0.0, 0.0, 0.0))
    settings = Sampling(num_steps=2, cfg=1.0)
    latents = sample_latents(model, model.conditioning(PROMPT), None, LATENTS, settings, host=host, preview=to_rgb)
    assert latents.shape == LATENTS
    assert set(shown) == {3}


def test_a_start_and_a_mask_lead_with_their_first_frame() -> None:
    """What is kept comes out to the bit, and the leading frame starts as a copy of the first."""
    model, start = build(LATER), normal(8, *LATENTS)
    mask = torch.zeros(1, 1, 3, 6, 8)
    mask[:, :, 1:] = 1
    settings = Sampling(num_steps=3, cfg=1.0, sampler="ddim", seed=1)
    ours = sample_latents(model, model.conditioning(PROMPT), None, LATENTS, settings, start=start, mask=mask)
    assert torch.equal(ours[:, :, 0], start[:, :, 0])
    assert relative(ours[:, :, 1:], start[:, :, 1:]) > 0.1


def test_a_saved_run_of_1_5_goes_on_to_the_same_bits(tmp_path: Any) -> None:
    model = build(LATER)
    settings = settings_for("DPM", True, resume_path=tmp_path / "run.safetensors")
    cond = model.conditioning(PROMPT), model.conditioning(NEGATIVE)
    whole = sample_latents(model, *cond, LATENTS, replace(settings, resume_path=None))

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("sample", 3):
            raise Cancelled

    with pytest.raises(Cancelled):
        sample_latents(model, *cond, LATENTS, settings, host=LocalHost(on_progress=stop))
    assert torch.equal(sample_latents(model, *cond, LATENTS, settings), whole)


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method", "scale"),
    [("5b_i2v", "auto", 1.0), ("1.5_5b_i2v", "auto", INVERTED_LATENTS), ("1.5_5b_i2v", "raw_latents", RAW_LATENTS)],
)
def test_the_scale_of_the_picture(name: str, method: str, scale: float) -> None:
    model = build(NETWORKS[name])
    unit = PICTURE * SCALING_FACTOR
    cond = with_keyframes(
        model, model.conditioning(PROMPT), [LatentKeyframe(latents=unit, index=0)], LATENTS, method=method
    )
    assert cond.concat is not None
    assert cond.concat.shape[2] == 3 + (name != "5b_i2v")
    torch.testing.assert_close(cond.concat[:, :, :1], unit * scale)
    assert not bool(cond.concat[:, :, 1:].any())
    if method == "raw_latents":
        torch.testing.assert_close(cond.concat[:, :, :1], PICTURE)


def first(**changes: Any) -> LatentKeyframe:
    return LatentKeyframe(**{"latents": PICTURE, "index": 0, **changes})


@pytest.mark.parametrize(
    ("name", "pictures", "shape", "method", "says"),
    [
        ("5b", [first()], LATENTS, "auto", "from text alone"),
        ("5b_i2v", [], LATENTS, "auto", "was given none"),
        ("5b_i2v", [first(index=8)], LATENTS, "auto", "images for frames 8"),
        ("5b_i2v", [first(), first(index=8)], LATENTS, "auto", "images for frames 0, 8"),
        ("5b_i2v", [first(strength=0.5)], LATENTS, "auto", "strength 0.5"),
        ("5b_i2v", [first(until=0.5)], LATENTS, "auto", "until 0.5"),
        ("5b_i2v", [first(noise=0.1)], LATENTS, "auto", "noise 0.1"),
        ("5b_i2v", [first(latents=PICTURE[..., :6])], LATENTS, "auto", "another size"),
        ("5b_i2v", [first()], (1, 4, 2, 6, 8), "auto", "use 1 or 9 frames"),
        ("5b_i2v", [first()], (1, 4, 5, 6, 8), "auto", "at most 9 frames"),
        ("1.5_5b_i2v", [first()], (1, 4, 4, 6, 8), "auto", "use 9 or 17 frames"),
        ("5b_i2v", [first()], LATENTS, "raw_latents", "only CogVideoX1.5"),
        ("5b_i2v", [first()], LATENTS, "token_replace", "no such method"),
    ],
)
def test_pictures_that_cannot_be_taken_are_named(
    name: str, pictures: list[LatentKeyframe], shape: tuple[int, ...], method: str, says: str
) -> None:
    model = build(NETWORKS[name])
    with pytest.raises(SettingsError, match=says):
        with_keyframes(model, model.conditioning(PROMPT), pictures, shape, method=method)


@pytest.mark.parametrize(
    ("name", "cond", "shape", "says"),
    [
        ("5b_i2v", Conditioning(), LATENTS, "was given none"),
        ("5b_i2v", Conditioning(concat=torch.zeros(1, 4, 5, 6, 8)), LATENTS, "another length"),
        ("1.5_5b_i2v", Conditioning(concat=torch.zeros(1, 4, 3, 6, 8)), LATENTS, "4 latent frames"),
        ("5b_i2v", Conditioning(concat=torch.zeros(1, 4, 3, 6, 6)), LATENTS, "another size"),
        ("5b", Conditioning(), (1, 4, 4, 6, 8), "8 n \\+ 1 frames"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(
    name: str, cond: Conditioning, shape: tuple[int, ...], says: str
) -> None:
    model = build(NETWORKS[name])
    cond = replace(cond, context=PROMPT.context)
    with pytest.raises(SettingsError, match=says):
        sample_latents(model, cond, None, shape, Sampling(num_steps=2, cfg=1.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_steps": 1001}, "at most 1000 steps"),
        ({"sampler": "cogvideo_dpm"}, "cogvideox_dpm"),
        ({"cfg_schedule": "dynamc"}, "dynamic"),
        ({"cfg_start": 0.2, "cfg_end": 0.4}, "start > end"),
    ],
)
def test_settings_that_cannot_be_used_are_named(change: dict[str, Any], says: str) -> None:
    model = build(TINY)
    with pytest.raises(SettingsError, match=says):
        sample_latents(model, model.conditioning(PROMPT), None, LATENTS, Sampling(cfg=1.0, **change))


def test_native_conditioning_must_be_t5s() -> None:
    native = FAMILIES["cogvideox"].native_features
    assert native(TINY, torch.zeros(1, 5, 24), None, None).context.shape == (1, 5, 24)
    with pytest.raises(SettingsError, match="T5-XXL"):
        native(TINY, torch.zeros(1, 5, 25), None, None)


# --- what stands around the blocks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run() -> tuple[VideoModel, Tensor]:
    model = build(NETWORKS["1.5_5b"])
    return model, run_of(model)


def run_of(model: VideoModel) -> Tensor:
    settings = Sampling(num_steps=4, sampler="ddim", cfg=1.0, seed=1)
    return sample_latents(model, model.conditioning(PROMPT), None, LATENTS, settings)


@pytest.mark.parametrize(
    "tricks",
    [
        Tricks(cache=StepCache(method="first_block", threshold=1e9)),
        Tricks(cache=StepCache(method="teacache", threshold=1e9)),
        Tricks(skip_layers=WeakPass(blocks="layers.1")),
        Tricks(stg=WeakPass(blocks="1", attention_only=True)),
        Tricks(enhance=Enhance(weight=4.0)),
    ],
    ids=lambda tricks: next(iter(tricks.identity)),
)
def test_tricks_know_its_blocks(tricks: Tricks, plain_run: tuple[VideoModel, Tensor]) -> None:
    model, plain = plain_run
    changed = run_of(model.with_tricks(tricks))
    assert bool(changed.isfinite().all())
    assert relative(changed, plain) > 1e-5
    assert torch.equal(run_of(model), plain)


@pytest.mark.parametrize(("window", "differs"), [((1, 3, 3), False), ((1, 1, 1), True)])
def test_sliding_tiles_know_which_tokens_are_the_videos(
    window: tuple[int, int, int], differs: bool, plain_run: tuple[VideoModel, Tensor]
) -> None:
    model, plain = plain_run
    tiles = SlidingTiles(tile=(2, 2, 2), window=window)
    far = relative(run_of(model.with_attention(AttentionChoice(tiles=tiles))), plain)
    assert far > 1e-4 if differs else far <= PARITY


def test_compiled_blocks_compute_the_same(plain_run: tuple[VideoModel, Tensor]) -> None:
    model, plain = plain_run
    assert relative(run_of(model.with_compile()), plain) <= PARITY


def test_windows_of_1_5_hold_whole_tokens(plain_run: tuple[VideoModel, Tensor]) -> None:
    model, _ = plain_run
    long = (1, 4, 7, 6, 8)
    windowed = model.with_tricks(Tricks(windows=Windows(size=4, overlap=2)))
    settings = Sampling(num_steps=2, sampler="ddim", cfg=1.0)
    assert sample_latents(windowed, model.conditioning(PROMPT), None, long, settings).shape == long
    with pytest.raises(SettingsError, match="reads 2 latent frames as one"):
        model.with_tricks(Tricks(windows=Windows(size=5)))


def test_riflex_slows_a_frequency_of_a_long_video(plain_run: tuple[VideoModel, Tensor]) -> None:
    model, _ = plain_run
    long, settings = (1, 4, 13, 6, 8), Sampling(num_steps=1, sampler="ddim", cfg=1.0)
    plain, slow = (
        sample_latents(one, one.conditioning(PROMPT), None, long, settings)
        for one in (model, model.with_tricks(Tricks(riflex=Riflex(trained_length=4))))
    )
    assert relative(slow, plain) > 1e-5


def test_a_fixed_table_has_no_time_to_stretch() -> None:
    with pytest.raises(SettingsError, match="does not rotate its frame axis"):
        build(NETWORKS["2b"]).with_tricks(Tricks(riflex=Riflex()))
