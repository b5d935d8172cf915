"""Compile the blocks of a network when they first run."""

from __future__ import annotations

from typing import Any

from .wires import CATEGORY, MODEL

MODES = ["default", "max-autotune-no-cudagraphs"]


class Compile:
    CATEGORY = f"{CATEGORY}/loaders"
    DESCRIPTION = (
        "Compiles the blocks of a network with torch.compile, for GPUs: the first step takes longer, the others less. "
        "Where that is not possible, the network runs as it is and the log says why."
    )
    SEARCH_ALIASES = ["torch compile", "inductor", "speed", "optimise"]
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The network with compiled blocks. The one that came in stays as it was.",)
    FUNCTION = "compile"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        mode = (
            "default compiles in about a minute. max-autotune-no-cudagraphs tries several kernels for each product, "
            "which takes several minutes and gains a few percent on a GPU."
        )
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The diffusion network, also with LoRAs."}),
                "mode": (MODES, {"default": "default", "tooltip": mode}),
            }
        }

    def compile(self, model: Any, mode: str) -> tuple[Any]:
        return (model.with_compile(mode),)
