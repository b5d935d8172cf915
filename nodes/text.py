"""Prompts to what the sampler takes."""

from __future__ import annotations

from typing import Any

from .wires import CATEGORY, COND, TEXT, EncodedPrompt


class EncodePrompt:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "Encodes a prompt. Use it twice for a positive and a negative one; an empty prompt is fine."
    SEARCH_ALIASES = ["clip text encode", "prompt", "text encode", "llava", "image prompt"]
    RETURN_TYPES = (COND,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for the sampler.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..vidgen_core.families.hunyuan.config import NEGATIVE_PROMPT, NEGATIVE_PROMPT_I2V

        prompt = (
            "What the video shows. Words that the encoders do not know do no harm. Negative prompts that HunyuanVideo "
            f"was published with, for text to video: {NEGATIVE_PROMPT}. For image to video: {NEGATIVE_PROMPT_I2V}."
        )
        custom = (
            "In place of the published words around the prompt; must contain {} where the prompt goes, and with an "
            "image <image> before it. Empty: the published ones."
        )
        image = (
            "For image to video: the picture, which LLaVA reads together with the prompt. Use a black one for the "
            "negative prompt."
        )
        interleave = (
            "Every how many-th token of the image is kept: 4 for HunyuanVideo-I2V v2 (token replace), 2 for v1 "
            "(latent concat). Read only with an image."
        )
        return {
            "required": {
                "text_encoders": (TEXT, {"tooltip": "From Load Text Encoders or Load All."}),
                "prompt": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "dynamicPrompts": True,
                        "placeholder": "what to see, how it moves, what the camera does",
                        "tooltip": prompt,
                    },
                ),
                "template": (
                    ["video", "image"],
                    {"default": "video", "tooltip": "The frame around the prompt: image for videos of a single frame."},
                ),
            },
            "optional": {
                "custom_template": ("STRING", {"default": "", "multiline": True, "tooltip": custom}),
                "image_interleave": ("INT", {"default": 4, "min": 1, "max": 64, "tooltip": interleave}),
                "image": ("IMAGE", {"tooltip": image}),
            },
        }

    def encode(
        self,
        text_encoders: Any,
        prompt: str,
        template: str,
        custom_template: str = "",
        image_interleave: int = 4,
        image: Any = None,
    ) -> tuple[EncodedPrompt]:
        from .host import current

        current().need(text_encoders)
        single, custom = template == "image", custom_template if custom_template.strip() else None
        if image is None:
            features = text_encoders.encode([prompt], image_mode=single, custom_template=custom)
        else:
            features = text_encoders.encode_with_image(
                [prompt], image[:1], interleave=image_interleave, image_mode=single, custom_template=custom
            )
        kind = "custom" if custom else template
        encoded = EncodedPrompt(
            prompt=prompt,
            features=features,
            text_config=text_encoders.config,
            template=kind if image is None else f"i2v {kind}",
            fingerprint=text_encoders.fingerprint,
        )
        return (encoded,)
