"""Prompts to what the sampler takes."""

from __future__ import annotations

from typing import Any

from .wires import CATEGORY, COND, TEXT, EncodedPrompt


class EncodePrompt:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "Encodes a prompt. Use it twice for a positive and a negative one; an empty prompt is fine."
    SEARCH_ALIASES = ["clip text encode", "prompt", "text encode"]
    RETURN_TYPES = (COND,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The encoded prompt, for the sampler.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
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
                        "tooltip": "What the video shows. Words that the encoders do not know do no harm.",
                    },
                ),
                "template": (
                    ["video", "image"],
                    {"default": "video", "tooltip": "The frame around the prompt: image for videos of a single frame."},
                ),
            }
        }

    def encode(self, text_encoders: Any, prompt: str, template: str) -> tuple[EncodedPrompt]:
        features = text_encoders.encode([prompt], image_mode=template == "image")
        return (EncodedPrompt(prompt=prompt, features=features, text_config=text_encoders.config),)
