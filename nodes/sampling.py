"""Latents: where they start and how they are denoised."""

from __future__ import annotations

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
    latent_scale,
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


def _choices(which: str) -> list[str]:
    from ..vidgen_core.sampling import SAMPLERS
    from ..vidgen_core.timesteps import SCHEDULES

    return [AUTO, *(SAMPLERS if which == "sampler" else SCHEDULES)]


def _number(default: float, tooltip: str, *, high: float, step: float = 0.1) -> tuple[str, dict[str, Any]]:
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
                "cfg": _number(
                    0.0,
                    "How strongly to follow the prompt against the negative one: 1 is off and twice as fast; "
                    "0: the checkpoint's.",
                    high=100.0,
                ),
                "guidance": _number(
                    0.0,
                    "The scale that guidance-distilled networks are told; others ignore it. 0: the checkpoint's.",
                    high=100.0,
                ),
                "shift": _number(
                    0.0,
                    "Above 1: more of the steps at high noise, where motion is decided. 0: the checkpoint's.",
                    high=100.0,
                ),
                "sampler": (_choices("sampler"), {"default": AUTO, "tooltip": "The method of stepping."}),
                "schedule": (_choices("schedule"), {"default": AUTO, "tooltip": "How the steps are spread."}),
                "denoise": _number(
                    1.0,
                    "1 starts from noise alone; below 1 the given latents are changed only this far.",
                    high=1.0,
                    step=0.01,
                ),
            },
            "optional": {
                "negative": (COND, {"tooltip": "What the video should not show; needed where cfg is not 1."}),
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
        node_id: str | None = None,
    ) -> tuple[Latent]:
        from ..vidgen_core.generate import Sampling, check_prompts, sample_latents
        from .host import current

        check_prompts(positive.prompt)
        host = current()
        samples, scale = video_samples(latent), latent_scale(latent, model)
        check_latents(model, samples)
        settings = Sampling(
            num_steps=steps or None,
            sampler=None if sampler == AUTO else sampler,
            schedule=None if schedule == AUTO else schedule,
            shift=shift or None,
            guidance=guidance or None,
            cfg=cfg or None,
            seed=seed,
            denoise=denoise,
            resume_path=host.resume_path(str(node_id)),
        )
        result = sample_latents(
            model,
            condition(model, positive, guidance or None),
            None if negative is None else condition(model, negative, guidance or None),
            samples.shape,
            settings,
            host=host,
            start=samples * scale if denoise < 1 else None,
        )
        return (raw_latent(result, scale),)


def condition(model: Any, encoded: EncodedPrompt, guidance: float | None) -> Any:
    """What the network is told for a prompt, on its device; CheckpointError if the encoders are another model's."""
    check_text(model, encoded)
    return model.conditioning(encoded.features, guidance=guidance).to(model.device)
