"""Put a LoRA on a network."""

from __future__ import annotations

from typing import Any

from .loaders import found, names
from .wires import CATEGORY, MODEL

MODES = ["auto", "runtime", "merge"]


class ApplyLora:
    CATEGORY = f"{CATEGORY}/loaders"
    DESCRIPTION = (
        "Puts a LoRA on a network. The file's spelling (kohya, musubi, PEFT, diffusers, ...) is recognised; several "
        "of these nodes in a row add up."
    )
    SEARCH_ALIASES = ["lora", "load lora", "lora loader", "style", "lokr", "loha", "dora"]
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The network with the LoRA. The one that came in stays as it was.",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        strength = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.05, "round": 0.001}
        mode_tooltip = (
            "runtime: beside the weights, also where they are quantised. merge: into the weights, a little faster and "
            "more memory. auto: whichever suits the LoRA."
        )
        blocks_tooltip = (
            "Strengths of blocks, such as 'double_blocks.*: 1, single_blocks.0-9: 0.5', or 'double_blocks only'. "
            "Empty: the same everywhere."
        )
        alpha = {"default": 0.0, "min": 0.0, "max": 4096.0, "step": 1.0, "round": 0.001} | {
            "tooltip": "The alpha it was trained with, where the file does not say it. 0: its rank. CogVideoX's "
            "trainers use 64 at rank 128.",
        }
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The diffusion network."}),
                "lora_name": (names("lora"), {"tooltip": "A LoRA (.safetensors) from models/loras, or a bundled one."}),
                "strength": (
                    "FLOAT",
                    strength | {"tooltip": "1 is as trained, 0 is off; below 0 the opposite of what was learned."},
                ),
                "mode": (MODES, {"default": "auto", "tooltip": mode_tooltip}),
                "blocks": ("STRING", {"default": "", "multiline": False, "tooltip": blocks_tooltip}),
            },
            "optional": {"alpha": ("FLOAT", alpha)},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str) -> bool | str:
        return found("lora", lora_name)

    def apply(self, model: Any, lora_name: str, strength: float, mode: str, blocks: str, alpha: float = 0.0) -> Any:
        from ..vidgen_core.lora import BlockStrengths
        from ..vidgen_core.weights.lora import read_lora
        from .host import current

        lora = read_lora(current().find("lora", lora_name), alpha=alpha or None)
        changed = model.with_lora(lora, strength, blocks=BlockStrengths.parse(blocks), mode=mode)
        note = model.alpha_note(lora)  # which is in the log by now
        return {"ui": {"text": (note,)}, "result": (changed,)} if note else (changed,)
