"""Encoded prompts to a file and back: encode once, sample anywhere."""

from __future__ import annotations

import os
from typing import Any

from ..vidgen_core.errors import UserError
from .wires import CATEGORY, COND, EncodedPrompt


class SaveEmbeddings:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = (
        "Writes an encoded prompt into the output folder, so that later runs and smaller machines need not load the "
        "text encoders."
    )
    SEARCH_ALIASES = ["save conditioning", "cache prompt", "export embeds"]
    RETURN_TYPES = ()
    RETURN_NAMES = ()
    OUTPUT_TOOLTIPS = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = "Folder and beginning of the file's name in the output folder; a number is added."
        return {
            "required": {
                "conditioning": (COND, {"tooltip": "From Encode Prompt."}),
                "filename_prefix": ("STRING", {"default": "embeddings/VidGen", "tooltip": prefix}),
            }
        }

    def save(self, conditioning: EncodedPrompt, filename_prefix: str) -> dict[str, Any]:
        from ..vidgen_core.embeddings import Embeddings, save_embeddings
        from .host import current

        path, subfolder = current().embeddings_path(filename_prefix)
        embeddings = Embeddings(
            features=conditioning.features,
            text_config=conditioning.text_config,
            prompt=conditioning.prompt,
            template=conditioning.template,
            fingerprint=conditioning.fingerprint,
        )
        save_embeddings(path, embeddings)
        return {"ui": {"text": (f"{subfolder}/{path.name}".lstrip("/"),)}}


class LoadEmbeddings:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "Reads an encoded prompt that Save Embeddings wrote. No text encoder is loaded."
    SEARCH_ALIASES = ["load conditioning", "cached prompt", "import embeds"]
    RETURN_TYPES = (COND, "STRING")
    RETURN_NAMES = ("conditioning", "prompt")
    OUTPUT_TOOLTIPS = ("The encoded prompt, for the sampler.", "The prompt that was encoded.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from .host import current

        tooltip = "A file from models/embeddings/vidgen, from the output folder, or an example."
        return {"required": {"embeddings_name": (list(current().embeddings()), {"tooltip": tooltip})}}

    @classmethod
    def VALIDATE_INPUTS(cls, embeddings_name: str) -> bool | str:
        from .host import current

        try:
            current().find_embeddings(embeddings_name)
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, embeddings_name: str) -> float:
        """A file with the same name may have been replaced."""
        from .host import current

        return os.path.getmtime(current().find_embeddings(embeddings_name))

    def load(self, embeddings_name: str) -> tuple[EncodedPrompt, str]:
        from ..vidgen_core.embeddings import load_embeddings
        from .host import current

        found = load_embeddings(current().find_embeddings(embeddings_name))
        encoded = EncodedPrompt(
            prompt=found.prompt,
            features=found.features,
            text_config=found.text_config,
            template=found.template,
            fingerprint=found.fingerprint,
        )
        return encoded, found.prompt
