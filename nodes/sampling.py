"""Latents: where they start and how they are denoised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .wires import (
    CATEGORY,
    COND,
    MODEL,
    VAE,
    EncodedPrompt,
    Latent,
    check_latents,
    check_text,
    codec_latent,
    latent_mask,
    latent_scale,
    latent_until,
    raw_latent,
    video_samples,
)

AUTO = "auto"


class EmptyLatent:
    CATEGORY = f"{CATEGORY}/latent"
    DESCRIPTION = "The size and length of the video to make. The VAE says how pixels and frames become latents."
    SEARCH_ALIASES = ["empty video latent", "resolution", "length"]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Latents of zeros, for the sampler.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 64, "min": 16, "max": 8192, "step": 16}
        return {
            "required": {
                "vae": (VAE, {"tooltip": "The VAE that will decode the result."}),
                "width": ("INT", size | {"tooltip": "Width in px, a multiple of 16."}),
                "height": ("INT", size | {"tooltip": "Height in px, a multiple of 16."}),
                "num_frames": (
                    "INT",
                    {
                        "default": 17,
                        "min": 1,
                        "max": 1025,
                        "step": 4,
                        "tooltip": "Frames of the video: 1, 5, 9, 13, 17, ...; seconds = frames / fps.",
                    },
                ),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Videos at once; video i has the seed + i."},
                ),
            }
        }

    def make(self, vae: Any, width: int, height: int, num_frames: int, batch_size: int) -> tuple[Latent]:
        import torch

        from ..vidgen_core.types import VideoShape

        shape = VideoShape(num_frames=num_frames, height_px=height, width_px=width)
        shape.check(vae.grid)
        return (codec_latent(vae, torch.zeros(batch_size, *shape.latent_shape(vae.grid))),)


def choices(which: str) -> list[str]:
    """The names that a widget offers."""
    from ..vidgen_core.guidance import CFG_SCHEDULES
    from ..vidgen_core.sampling import SAMPLERS
    from ..vidgen_core.timesteps import SCHEDULES

    if which == "cfg_schedule":
        return [AUTO, *CFG_SCHEDULES]
    return [AUTO, *(SAMPLERS if which == "sampler" else SCHEDULES)]


def number(default: float, tooltip: str, *, high: float, step: float = 0.1) -> tuple[str, dict[str, Any]]:
    """A widget for a number from 0."""
    options = {"default": default, "min": 0.0, "max": high, "step": step, "round": 0.001, "tooltip": tooltip}
    return "FLOAT", options


class Sampler:
    CATEGORY = f"{CATEGORY}/sampling"
    DESCRIPTION = (
        "Denoises latents under a prompt. 0 and auto take what the checkpoint recommends, so a new model works at once."
    )
    SEARCH_ALIASES = ["ksampler", "denoise", "hunyuan sampler"]
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("The finished latents, for Decode.",)
    FUNCTION = "sample"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seed = {
            "default": 0,
            "min": 0,
            "max": 2**64 - 1,
            "control_after_generate": True,
            "tooltip": "The same seed and settings give the same video, on every device.",
        }
        steps = {"default": 0, "min": 0, "max": 1000, "tooltip": "Steps from noise to video; 0: the checkpoint's."}
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The diffusion network."}),
                "positive": (COND, {"tooltip": "What the video should show."}),
                "latent": ("LATENT", {"tooltip": "Size and length; read as a start where denoise is below 1."}),
                "seed": ("INT", seed),
                "steps": ("INT", steps),
                "cfg": number(
                    0.0,
                    "How strongly to follow the prompt against the negative one: 1 is off and twice as fast; "
                    "0: the checkpoint's.",
                    high=100.0,
                ),
                "guidance": number(
                    0.0,
                    "The scale that guidance-distilled networks are told; others ignore it. 0: the checkpoint's.",
                    high=100.0,
                ),
                "shift": number(
                    0.0,
                    "Above 1: more of the steps at high noise, where motion is decided. 0: the checkpoint's.",
                    high=100.0,
                ),
                "sampler": (choices("sampler"), {"default": AUTO, "tooltip": "The method of stepping."}),
                "schedule": (choices("schedule"), {"default": AUTO, "tooltip": "How the steps are spread."}),
                "denoise": number(
                    1.0,
                    "1 starts from noise alone; below 1 the given latents are changed only this far.",
                    high=1.0,
                    step=0.01,
                ),
            },
            "optional": {
                "negative": (COND, {"tooltip": "What the video should not show; needed where cfg is not 1."}),
                "cfg_schedule": (
                    choices("cfg_schedule"),
                    {"default": AUTO, "tooltip": "How cfg changes along the run; interval is off outside of it."},
                ),
                "cfg_start": number(1.0, "The time at which cfg sets in: 1 is noise.", high=1.0, step=0.01),
                "cfg_end": number(0.0, "The time at which cfg ends: 0 is the finished video.", high=1.0, step=0.01),
                "cfg_rescale": number(
                    0.0, "Above 0: against the burnt colours of a high cfg; 0.7 is usual.", high=1.0, step=0.05
                ),
                "cfg_batched": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "With and without the prompt in one pass: faster. Off: one after the other, "
                        "with half of the memory.",
                    },
                ),
                "sigmas": (
                    "SIGMAS",
                    {"tooltip": "Noise levels to visit; they take the place of steps, schedule, shift and denoise."},
                ),
            },
            "hidden": {"node_id": "UNIQUE_ID"},
        }

    def sample(
        self,
        model: Any,
        positive: EncodedPrompt,
        latent: Latent,
        seed: int,
        steps: int,
        cfg: float,
        guidance: float,
        shift: float,
        sampler: str,
        schedule: str,
        denoise: float,
        negative: EncodedPrompt | None = None,
        cfg_schedule: str = AUTO,
        cfg_start: float = 1.0,
        cfg_end: float = 0.0,
        cfg_rescale: float = 0.0,
        cfg_batched: bool = True,
        sigmas: Any = None,
        node_id: str | None = None,
    ) -> tuple[Latent]:
        from ..vidgen_core.generate import Sampling, check_prompts, sample_latents
        from .host import current

        check_prompts(positive.prompt)
        host = current()
        host.need(model.network)
        samples, scale = video_samples(latent), latent_scale(latent, model)
        check_latents(model, samples)
        mask = latent_mask(latent | {"samples": samples}, model)
        mode, still = first_frame(model, positive, samples.shape)
        settings = Sampling(
            num_steps=steps or None,
            sampler=None if sampler == AUTO else sampler,
            schedule=None if schedule == AUTO else schedule,
            shift=shift or mode.shift,
            guidance=guidance or None,
            cfg=cfg or None,
            cfg_schedule=None if cfg_schedule == AUTO else cfg_schedule,
            cfg_start=cfg_start,
            cfg_end=cfg_end,
            cfg_rescale=cfg_rescale,
            cfg_batched=cfg_batched,
            seed=seed,
            denoise=denoise,
            sigmas=None if sigmas is None else tuple(sigmas.flatten().tolist()),
            resume_path=host.resume_path(str(node_id)),
        )
        times = settings.resolved(model.defaults).check(model.diffusion)
        from_video = mask is not None or settings.starts_within(times)
        settings = replace(settings, start_share=0.0 if from_video else mode.start_share)
        result = sample_latents(
            model,
            condition(model, positive, guidance or None, samples.shape),
            None if negative is None else condition(model, negative, guidance or None),
            samples.shape,
            settings,
            host=host,
            start=samples * scale if from_video else still,
            mask=mask,
            until=None if mask is None else latent_until(latent),
        )
        return (raw_latent(result, scale, hidden_frames=model.family.keyframes.hidden_frames(model.config)),)


def condition(model: Any, encoded: EncodedPrompt, guidance: float | None, shape: Any = None) -> Any:
    """What the network is told for a prompt, on its device; CheckpointError if the encoders are another model's.
    With the ``shape`` of the latents it is told of the prompt's images, too."""
    from ..vidgen_core.generate import with_keyframes

    check_text(model, encoded)
    cond = model.conditioning(encoded.features, guidance=guidance).to(model.device)
    if encoded.images is None or shape is None:
        return cond
    return with_keyframes(model, cond, encoded.images.keyframes, shape, method=encoded.images.method)


def first_frame(model: Any, encoded: EncodedPrompt, shape: Any) -> tuple[Any, Any]:
    """(how closely motion keeps to the prompt's image, the image as a still video of latents)."""
    from ..vidgen_core.families import ImageMode
    from ..vidgen_core.generate import image_mode
    from ..vidgen_core.keyframes import repeat_over_frames

    if encoded.images is None:
        return ImageMode(), None
    still = repeat_over_frames(encoded.images.keyframes[0].latents, shape)
    return image_mode(model, encoded.images.mode), still


class Sigmas:
    CATEGORY = f"{CATEGORY}/sampling"
    DESCRIPTION = "The noise levels that a sampler visits, to look at, to change, or to share between samplers."
    SEARCH_ALIASES = ["sigmas", "scheduler", "basic scheduler"]
    RETURN_TYPES = ("SIGMAS",)
    RETURN_NAMES = ("sigmas",)
    OUTPUT_TOOLTIPS = ("Noise levels from noise to 0, for the Sampler.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = {"default": 0, "min": 0, "max": 1000, "tooltip": "Steps from noise to video; 0: the checkpoint's."}
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The diffusion network, for its noise and its defaults."}),
                "schedule": (choices("schedule"), {"default": AUTO, "tooltip": "How the steps are spread."}),
                "steps": ("INT", steps),
                "shift": number(0.0, "Above 1: more of the steps at high noise. 0: the checkpoint's.", high=100.0),
                "denoise": number(
                    1.0, "Below 1: only the last part of a longer run, to change a video.", high=1.0, step=0.01
                ),
            }
        }

    def make(self, model: Any, schedule: str, steps: int, shift: float, denoise: float) -> tuple[Any]:
        from ..vidgen_core.generate import Sampling
        from ..vidgen_core.timesteps import to_sigmas

        settings = Sampling(
            num_steps=steps or None,
            schedule=None if schedule == AUTO else schedule,
            shift=shift or None,
            denoise=denoise,
        )
        return (to_sigmas(settings.resolved(model.defaults).check(model.diffusion), model.diffusion),)
