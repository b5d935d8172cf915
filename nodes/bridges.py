"""From ComfyUI's own wires to ours."""

from __future__ import annotations

import logging
from typing import Any

from .wires import CATEGORY, COND, MODEL, EncodedPrompt

log = logging.getLogger("vidgen")

PROMPT = "(encoded by native nodes)"
_READ = frozenset({"pooled_output", "attention_mask"})


class FromConditioning:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "Takes the conditioning of native text encoders: DualCLIPLoader (hunyuan_video) and CLIP Text Encode."
    SEARCH_ALIASES = ["bridge", "clip text encode", "native conditioning", "convert conditioning"]
    RETURN_TYPES = (COND,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The same prompt, for our sampler.",)
    FUNCTION = "convert"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The network that will be told."}),
                "conditioning": ("CONDITIONING", {"tooltip": "From CLIP Text Encode and its kin."}),
            }
        }

    def convert(self, model: Any, conditioning: Any) -> tuple[EncodedPrompt]:
        from ..vidgen_core.errors import SettingsError

        if len(conditioning) != 1:
            raise SettingsError(
                "Several prompts in one conditioning cannot be used",
                given=f"{len(conditioning)} of them",
                expected="one",
                do="leave out Conditioning (Combine), and write one prompt",
            )
        tokens, extras = conditioning[0]
        unread = sorted(name for name, value in extras.items() if name not in _READ and value is not None)
        if unread:
            log.warning("of the conditioning, these are not used: %s", ", ".join(unread))
        features = model.family.native_features(
            model.config, tokens, extras.get("attention_mask"), extras.get("pooled_output")
        )
        return (EncodedPrompt(prompt=PROMPT, features=features, text_config=None),)
