"""What may be done around a network: each node gives the model on with one thing more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .sampling import AUTO, Sampler, condition, number
from .wires import CATEGORY, COND, MODEL, EncodedPrompt, Latent, check_latents, video_samples

CUSTOM = "custom"
SHARED = {AUTO: None, "shared": True, "own": False}
"""the choice of first_frame -> whether windows share it"""

MODEL_IN = (MODEL, {"tooltip": "The diffusion network."})
BLOCKS = (
    "STRING",
    {
        "default": AUTO,
        "multiline": False,
        "tooltip": "Blocks to weaken: numbers in the order they run ('7-9'), names ('double_blocks.3'), or auto, the "
        "one a third of the way in. Empty: off.",
    },
)
START = number(1.0, "The time at which it sets in: 1 is noise.", high=1.0, step=0.01)
END = number(0.0, "The time at which it ends: 0 is the finished video.", high=1.0, step=0.01)


class _Trick:
    """What all of these nodes share: a model comes in, and goes out with one thing more."""

    CATEGORY = f"{CATEGORY}/tricks"
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The network with it. The one that came in stays as it was.",)
    FUNCTION = "apply"


class StepCache(_Trick):
    DESCRIPTION = "Skips steps that would hardly change the video: up to twice as fast, at a small error."
    SEARCH_ALIASES = ["teacache", "magcache", "first block cache", "fbcache", "wavespeed", "faster"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..vidgen_core.caching import METHODS, QUALITIES

        method_tooltip = (
            "first_block looks at what the first block changes, teacache at what it is given, magcache at a curve that "
            "was measured once for the model."
        )
        curve_tooltip = "For magcache: the text that Calibrate Cache gives."
        return {
            "required": {
                "model": MODEL_IN,
                "method": (list(METHODS), {"default": "first_block", "tooltip": method_tooltip}),
                "quality": (
                    [*QUALITIES, CUSTOM],
                    {"default": "careful", "tooltip": "How boldly to skip. custom reads the numbers below."},
                ),
                "threshold": number(0.08, "custom: the error up to which a step is skipped.", high=10, step=0.01),
                "max_skips": (
                    "INT",
                    {"default": 2, "min": 1, "max": 100, "tooltip": "custom: most steps skipped in a row."},
                ),
                "start": number(
                    0.0, "custom: share of the steps at the beginning that all compute.", high=1.0, step=0.01
                ),
                "end": number(1.0, "custom: share of the steps after which all compute.", high=1.0, step=0.01),
            },
            "optional": {"curve": ("STRING", {"default": "", "multiline": True, "tooltip": curve_tooltip})},
        }

    def apply(
        self,
        model: Any,
        method: str,
        quality: str,
        threshold: float,
        max_skips: int,
        start: float,
        end: float,
        curve: str = "",
    ) -> tuple[Any]:
        from ..vidgen_core.caching import MagnitudeCurve
        from ..vidgen_core.caching import StepCache as Cache

        measured = MagnitudeCurve.from_json(curve) if curve.strip() and method == "magcache" else None
        if quality != CUSTOM:
            cache = Cache.preset(method, quality, curve=measured)
        else:
            cache = Cache(method=method, threshold=threshold, max_skips=max_skips, start=start, end=end, curve=measured)
        return (model.with_tricks(replace(model.tricks, cache=cache)),)


class CalibrateCache:
    CATEGORY = f"{CATEGORY}/tricks"
    DESCRIPTION = (
        "Samples once with every step and measures what magcache needs to know of a model. One prompt is enough for "
        "all; keep the text it gives."
    )
    SEARCH_ALIASES = ["magcache calibration", "magnitude ratios", "step cache curve"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("curve",)
    OUTPUT_TOOLTIPS = ("For Step Cache, or to keep as text.",)
    FUNCTION = "measure"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltips = {
            "steps": "Steps of the measured run; 0: the checkpoint's. The curve serves other numbers, too.",
            "cfg": "As the videos will be made: with guidance both branches are measured. 0: the checkpoint's.",
            "shift": "As the videos will be made. 0: the checkpoint's.",
            "schedule": "How the steps are spread.",
        }
        sampler = Sampler.INPUT_TYPES()["required"]
        widgets = {name: (sampler[name][0], sampler[name][1] | {"tooltip": tip}) for name, tip in tooltips.items()}
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The network; a step cache on it is not used here."}),
                "positive": (COND, {"tooltip": "Any prompt of the kind that will be used."}),
                "latent": ("LATENT", {"tooltip": "Size and length of the measured run; a small one will do."}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "tooltip": "Of the measured run."}),
                **widgets,
            },
            "optional": {"negative": (COND, {"tooltip": "Needed where cfg is not 1."})},
        }

    def measure(
        self,
        model: Any,
        positive: EncodedPrompt,
        latent: Latent,
        seed: int,
        steps: int,
        cfg: float,
        shift: float,
        schedule: str,
        negative: EncodedPrompt | None = None,
    ) -> tuple[str]:
        from ..vidgen_core.generate import Sampling, measure_curve
        from .host import current

        samples = video_samples(latent)
        check_latents(model, samples)
        settings = Sampling(
            num_steps=steps or None,
            cfg=cfg or None,
            shift=shift or None,
            schedule=None if schedule == AUTO else schedule,
            seed=seed,
        )
        curve = measure_curve(
            model,
            condition(model, positive, None, samples.shape),
            None if negative is None else condition(model, negative, None),
            samples.shape,
            settings,
            host=current(),
        )
        return (curve.to_json(),)


class SkipLayerGuidance(_Trick):
    DESCRIPTION = "Guides away from what the network says without some of its blocks: firmer shapes, one more pass."
    SEARCH_ALIASES = ["slg", "skip layer", "layer skipping"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        scale = number(1.0, "How strongly; 0 is off.", high=20.0)
        return {"required": {"model": MODEL_IN, "blocks": BLOCKS, "scale": scale, "start": START, "end": END}}

    def apply(self, model: Any, blocks: str, scale: float, start: float, end: float) -> tuple[Any]:
        from ..vidgen_core.tricks import WeakPass

        weak = WeakPass(blocks=blocks, scale=scale, start=start, end=end)
        return (model.with_tricks(replace(model.tricks, skip_layers=weak)),)


class SpatioTemporalGuidance(_Trick):
    DESCRIPTION = (
        "Guides away from what the network says when tokens of some blocks see only themselves: more detail and "
        "steadier motion, one more pass."
    )
    SEARCH_ALIASES = ["stg", "spatiotemporal skip guidance", "perturbed attention", "pag"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        mode_tooltip = "attention: the tokens of the blocks see only themselves (STG-A). block: leave them out (STG-R)."
        rescale = "Above 0: against burnt colours; the authors use 0.7."
        return {
            "required": {
                "model": MODEL_IN,
                "mode": (["attention", "block"], {"default": "attention", "tooltip": mode_tooltip}),
                "blocks": BLOCKS,
                "scale": number(1.0, "How strongly; 0 is off.", high=20.0),
                "rescale": number(0.7, rescale, high=1.0, step=0.05),
                "start": START,
                "end": END,
            }
        }

    def apply(
        self, model: Any, mode: str, blocks: str, scale: float, rescale: float, start: float, end: float
    ) -> tuple[Any]:
        from ..vidgen_core.tricks import WeakPass

        weak = WeakPass(
            blocks=blocks, scale=scale, start=start, end=end, rescale=rescale, attention_only=mode == "attention"
        )
        return (model.with_tricks(replace(model.tricks, stg=weak)),)


class CfgZeroStar(_Trick):
    DESCRIPTION = "Guidance with an optimised scale and a still beginning, for flow matching. It costs nothing."
    SEARCH_ALIASES = ["cfg zero star", "cfg-zero*", "zero init"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        zero_steps = {
            "default": 1,
            "min": 0,
            "max": 100,
            "tooltip": "Steps at the beginning that stand still; the authors use 4 % of all. 0: none.",
        }
        projected = "Scale the answer without the prompt so that it lies nearest to the one with it."
        return {
            "required": {
                "model": MODEL_IN,
                "zero_steps": ("INT", zero_steps),
                "optimised_scale": ("BOOLEAN", {"default": True, "tooltip": projected}),
            }
        }

    def apply(self, model: Any, zero_steps: int, optimised_scale: bool) -> tuple[Any]:
        from ..vidgen_core.tricks import CfgZero

        zero = CfgZero(zero_steps=zero_steps, projected=optimised_scale)
        return (model.with_tricks(replace(model.tricks, cfg_zero=zero)),)


class EnhanceAVideo(_Trick):
    DESCRIPTION = "Strengthens the attention between frames: steadier and richer videos, a little slower."
    SEARCH_ALIASES = ["feta", "enhance a video", "cross-frame attention"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        weight = number(1.0, "How strongly; 0 is off, 1 to 4 are usual.", high=100.0)
        return {"required": {"model": MODEL_IN, "weight": weight}}

    def apply(self, model: Any, weight: float) -> tuple[Any]:
        from ..vidgen_core.tricks import Enhance

        return (model.with_tricks(replace(model.tricks, enhance=Enhance(weight=weight))),)


class Riflex(_Trick):
    DESCRIPTION = "Makes videos up to twice as long as the network has learned without repetition, in one piece."
    SEARCH_ALIASES = ["riflex", "rope", "longer video", "length extrapolation"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        frequency = {
            "default": 0,
            "min": 0,
            "max": 64,
            "tooltip": "Which frequency is slowed down, 1 is the fastest (the paper's k). 0: the one that repeats.",
        }
        trained = {
            "default": 0,
            "min": 0,
            "max": 1025,
            "step": 1,
            "tooltip": "Frames that the network has learned; videos no longer than this are not changed. "
            "0: the checkpoint's.",
        }
        return {
            "required": {"model": MODEL_IN, "frequency": ("INT", frequency), "trained_frames": ("INT", trained)},
        }

    def apply(self, model: Any, frequency: int, trained_frames: int) -> tuple[Any]:
        from ..vidgen_core.tricks import Riflex as Trick

        trained = model.grid.num_latent_frames(trained_frames) if trained_frames else None
        trick = Trick(component=frequency - 1 if frequency else None, trained_length=trained)
        return (model.with_tricks(replace(model.tricks, riflex=trick)),)


class ContextWindows(_Trick):
    DESCRIPTION = "Makes long videos out of overlapping windows, in the memory of one of them."
    SEARCH_ALIASES = ["context options", "freenoise", "sliding window", "long video", "looped"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..vidgen_core.windows import BLENDS, SCHEDULES

        schedule = (
            "static: always the same places. uniform: they move from step to step, so that no seam stays. looped: the "
            "last goes on at the first frame."
        )
        first = (
            "shared: every window sees the first frame, as a given picture must be seen. auto: shared where there is a "
            "picture."
        )
        frames = {"min": 5, "max": 1025, "step": 1}
        return {
            "required": {
                "model": MODEL_IN,
                "window_frames": (
                    "INT",
                    frames | {"default": 65, "tooltip": "Frames of a window, at most what the network has learned."},
                ),
                "overlap_frames": (
                    "INT",
                    frames | {"default": 16, "min": 0, "tooltip": "Frames that neighbouring windows have in common."},
                ),
                "schedule": (list(SCHEDULES), {"default": "static", "tooltip": schedule}),
                "blend": (
                    list(BLENDS),
                    {"default": "pyramid", "tooltip": "pyramid: the middle of a window counts most. flat: all alike."},
                ),
                "free_noise": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Later windows begin with the noise of the first one, shuffled."},
                ),
                "first_frame": (list(SHARED), {"default": AUTO, "tooltip": first}),
            }
        }

    def apply(
        self,
        model: Any,
        window_frames: int,
        overlap_frames: int,
        schedule: str,
        blend: str,
        free_noise: bool,
        first_frame: str,
    ) -> tuple[Any]:
        from ..vidgen_core.windows import Windows

        windows = Windows(
            size=model.grid.num_latent_frames(window_frames),
            overlap=overlap_frames // model.grid.temporal,
            schedule=schedule,
            blend=blend,
            shuffle_noise=free_noise,
            share_first=SHARED[first_frame],
        )
        return (model.with_tricks(replace(model.tricks, windows=windows)),)
