"""Load the parts of a model: network, VAE, text encoders, or all of them from one folder.

torch and the core are imported when a node runs, so that loading the pack costs nothing.
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import UserError
from .wires import CATEGORY, MODEL, TEXT, VAE

if TYPE_CHECKING:
    from pathlib import Path

    import torch

DTYPES = ["auto", "float32", "bfloat16", "float16"]
DTYPE_INPUT = (
    DTYPES,
    {
        "default": "auto",
        "tooltip": "Number format of the weights. auto: float32 on a CPU, on a GPU what the file has.",
    },
)


NONE = "none"


def names(kind: str) -> list[str]:
    """The list of a loader's combo."""
    from .host import current

    return current().names(kind)


def found(kind: str, name: str) -> bool | str:
    """True if the host has this file, else why not: for VALIDATE_INPUTS, whose words ComfyUI does show."""
    from .host import current

    try:
        current().find(kind, name)
    except UserError as error:
        return str(error)
    return True


def torch_dtype(name: str) -> torch.dtype | None:
    """None for auto."""
    import torch

    return None if name == "auto" else getattr(torch, name)


STREAMING = {"auto": None, "off": False, "stream blocks": True}
"""choice of ``offload`` -> whether the blocks stay in the file; None decides by the free memory"""


def memory_inputs() -> dict[str, Any]:
    """The widgets of a loader for how and how many of a network's weights are held."""
    from ..vidgen_core.memory.place import AUTO, CHOICES

    storage = (
        "How the large weights lie in memory. They are converted on the way in and widened when they are used: float8 "
        "and int8 take half of bfloat16, nf4 a quarter; float8 matmul also multiplies in float8. auto: as it suits."
    )
    budget = (
        "GB of memory that may be taken on the device: as many blocks as fit stay there, the others are brought as "
        "they run. 0: no limit."
    )
    number = {"default": 0.0, "min": 0.0, "max": 1024.0, "step": 0.1, "round": 0.001, "tooltip": budget}
    return {"storage": (list(CHOICES), {"default": AUTO, "tooltip": storage}), "budget_gb": ("FLOAT", number)}


def budget_bytes(gigabytes: float) -> int | None:
    """None for 0, which is no limit."""
    return round(gigabytes * 1e9) if gigabytes else None


class LoadModel:
    CATEGORY = f"{CATEGORY}/loaders"
    DESCRIPTION = "Loads a video diffusion network. The file itself says what it is; its name does not matter."
    SEARCH_ALIASES = ["hunyuan", "diffusion model", "checkpoint", "unet"]
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The network with the settings that its checkpoint recommends.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A diffusion network from models/diffusion_models, or a bundled one."
        told = "How an image guides the video, where the file does not say so itself. auto: the file's word, else text."
        room = "stream blocks reads each block from the file when it runs. auto does so if the weights do not fit."
        return {
            "required": {"model_name": (names("network"), {"tooltip": tooltip}), "weight_dtype": DTYPE_INPUT},
            "optional": {
                "image_condition": (["auto", "none", "token_replace"], {"default": "auto", "tooltip": told}),
                "offload": (list(STREAMING), {"default": "auto", "tooltip": room}),
                **memory_inputs(),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str) -> bool | str:
        return found("network", model_name)

    def load(
        self,
        model_name: str,
        weight_dtype: str,
        image_condition: str = "auto",
        offload: str = "auto",
        storage: str = "auto",
        budget_gb: float = 0.0,
    ) -> tuple[Any]:
        from ..vidgen_core.memory.cancel import listening
        from ..vidgen_core.model import load_network
        from ..vidgen_core.weights.header import read_header
        from .host import current

        host, stream, budget = current(), STREAMING[offload], budget_bytes(budget_gb)
        path = host.find("network", model_name)
        if not stream:
            num_bytes = read_header(path).num_bytes
            host.make_room(num_bytes if budget is None else min(num_bytes, budget))
        with listening(host):
            model = load_network(
                path,
                dtype=torch_dtype(weight_dtype),
                device=host.device(),
                stream=stream,
                image_condition=image_condition,
                storage=storage,
                budget=budget,
            )
        host.manage(model.network)
        return (model,)


class LoadVAE:
    CATEGORY = f"{CATEGORY}/loaders"
    DESCRIPTION = "Loads a video VAE, which turns latents into frames and frames into latents."
    SEARCH_ALIASES = ["hunyuan vae", "video vae"]
    RETURN_TYPES = (VAE,)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The VAE, for Empty Latent, Encode Video and Decode.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "A video VAE from models/vae, or a bundled one."
        return {"required": {"vae_name": (names("codec"), {"tooltip": tooltip}), "weight_dtype": DTYPE_INPUT}}

    @classmethod
    def VALIDATE_INPUTS(cls, vae_name: str) -> bool | str:
        return found("codec", vae_name)

    def load(self, vae_name: str, weight_dtype: str) -> tuple[Any]:
        from ..vidgen_core.memory.cancel import listening
        from ..vidgen_core.model import load_codec
        from .host import current

        host = current()
        path = host.find("codec", vae_name)
        with listening(host):
            codec = load_codec(path, dtype=torch_dtype(weight_dtype), device=host.device())
        host.manage(codec)
        return (codec,)


class LoadTextEncoders:
    CATEGORY = f"{CATEGORY}/loaders"
    DESCRIPTION = (
        "Loads the text encoders that turn a prompt into what the network reads: from one file, or LLaMA and CLIP from "
        "two. Each file is recognised by what is inside it, so their order does not matter."
    )
    SEARCH_ALIASES = ["llama", "llava", "clip", "text encoder", "dual clip loader"]
    RETURN_TYPES = (TEXT,)
    RETURN_NAMES = ("text_encoders",)
    OUTPUT_TOOLTIPS = ("The text encoders, for Encode Prompt.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = "Text encoders from models/text_encoders or models/clip, or bundled ones: LLaMA, or all in one file."
        second = "The other encoder where they come in two files: llava_llama3 in one, clip_l in the other."
        vision = "LLaVA's image encoder from models/clip_vision, for prompts with an image. A whole LLaVA has its own."
        folder = (
            "Where the tokenizers are, if not beside the files: a folder in models/text_encoders with tokenizer.json "
            "of LLaMA in its folder llama, and that of CLIP in clip. Empty: the usual places."
        )
        return {
            "required": {"text_name": (names("text"), {"tooltip": tooltip}), "weight_dtype": DTYPE_INPUT},
            "optional": {
                "second_name": ([NONE, *names("text")], {"default": NONE, "tooltip": second}),
                "vision_name": ([NONE, *names("vision")], {"default": NONE, "tooltip": vision}),
                "tokenizer_folder": ("STRING", {"default": "", "tooltip": folder}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, text_name: str, second_name: str = NONE, vision_name: str = NONE, tokenizer_folder: str = ""
    ) -> bool | str:
        from .host import current

        try:
            encoder_files(text_name, second_name, vision_name)
            if tokenizer_folder:
                current().find_tokenizers(tokenizer_folder)
        except UserError as error:
            return str(error)
        return True

    def load(
        self,
        text_name: str,
        weight_dtype: str,
        second_name: str = NONE,
        vision_name: str = NONE,
        tokenizer_folder: str = "",
    ) -> tuple[Any]:
        from ..vidgen_core.memory.cancel import listening
        from ..vidgen_core.model import load_text
        from ..vidgen_core.text.tokenizer_files import TokenizerPlaces
        from ..vidgen_core.weights.header import read_header
        from .host import current

        host = current()
        paths = encoder_files(text_name, second_name, vision_name)
        named = host.find_tokenizers(tokenizer_folder) if tokenizer_folder else None
        for path in paths:
            host.make_room(read_header(path).num_bytes)
        with listening(host):
            stack = load_text(
                *paths,
                dtype=torch_dtype(weight_dtype),
                device=host.device(),
                tokenizers=TokenizerPlaces(named=named, shared=host.text_folders()),
                stream=None,
            )
        host.manage(stack)
        return (stack,)


def encoder_files(text_name: str, second_name: str, vision_name: str) -> list[Path]:
    """The chosen files; FileError for one that is not there."""
    from .host import current

    chosen = (("text", text_name), ("text", second_name), ("vision", vision_name))
    return [current().find(kind, name) for kind, name in chosen if name != NONE]


def _choices(name: str, folder: Path) -> list[str]:
    """The folder, and beside it the network for pictures where it holds another one."""
    from ..vidgen_core.weights.shards import checkpoints_in

    files = checkpoints_in(folder)
    if len(files) < 4:  # two networks, a VAE, a text encoder
        return [name]
    with suppress(OSError, UserError):  # a damaged file is told when the folder is loaded
        chosen = _network_for_picture(folder, tuple((file.name, file.stat().st_mtime_ns) for file in files))
        if chosen is not None and chosen.parent == folder:
            return [name, f"{name}/{chosen.name}"]
    return [name]


@lru_cache(maxsize=64)
def _network_for_picture(folder: Path, state: tuple[tuple[str, int], ...]) -> Path | None:
    """Asked anew when a file of the folder has changed: the list is made whenever the page is loaded."""
    from ..vidgen_core.bundle import network_for_picture

    return network_for_picture(folder)


class LoadAll:
    CATEGORY = f"{CATEGORY}/loaders"
    DESCRIPTION = "Loads network, VAE and text encoders from one folder; each file is recognised by what is inside it."
    SEARCH_ALIASES = ["checkpoint loader", "bundle", "hunyuan"]
    RETURN_TYPES = (MODEL, VAE, TEXT)
    RETURN_NAMES = ("model", "vae", "text_encoders")
    OUTPUT_TOOLTIPS = ("The network.", "The VAE.", "The text encoders.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from .host import current

        folders = [one for name, folder in current().model_folders().items() for one in _choices(name, folder)]
        tooltip = (
            "A bundled model, or a folder in models/vidgen that holds the three parts. "
            "FOLDER/FILE is its network that goes on from a picture."
        )
        return {
            "required": {"model_folder": (folders, {"tooltip": tooltip}), "weight_dtype": DTYPE_INPUT},
            "optional": memory_inputs(),
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model_folder: str) -> bool | str:
        from .host import current

        try:
            current().find_model_folder(model_folder)
        except UserError as error:
            return str(error)
        return True

    def load(
        self, model_folder: str, weight_dtype: str, storage: str = "auto", budget_gb: float = 0.0
    ) -> tuple[Any, Any, Any]:
        from ..vidgen_core.generate import load_bundle
        from .host import current

        host = current()
        folder = host.find_model_folder(model_folder)
        bundle = load_bundle(
            folder, dtype=torch_dtype(weight_dtype), host=host, storage=storage, budget=budget_bytes(budget_gb)
        )
        for module in (bundle.model.network, bundle.codec, bundle.text):
            host.manage(module)
        return bundle.model, bundle.codec, bundle.text
