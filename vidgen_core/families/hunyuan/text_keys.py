"""The text encoders' weights in the layouts that people have on disk.

Native names are those of :class:`.text.TextStack`: ``llama.``, ``clip.`` and ``vision.`` before the names that
``transformers`` publishes. A published file holds more than the states need; what is left out is listed here by name,
so that anything else that is strange is still an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ...text.dims import LlamaDims, VisionDims
from ...weights.keymap import KeyMap, Row

_LLAMA = (
    "embed_tokens",
    *(f"layers.*.self_attn.{name}_proj" for name in "qkvo"),
    *(f"layers.*.mlp.{name}_proj" for name in ("gate", "up", "down")),
    *(f"layers.*.{name}_layernorm" for name in ("input", "post_attention")),
)
_CLIP_BLOCKS = (
    *(f"encoder.layers.*.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"encoder.layers.*.{name}" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
)
_CLIP_TEXT = (
    *(f"embeddings.{name}_embedding" for name in ("token", "position")),
    *_CLIP_BLOCKS,
    "final_layer_norm",
)
_CLIP_VISION = (
    *(f"embeddings.{name}_embedding" for name in ("class", "patch", "position")),
    "pre_layrnorm",
    *_CLIP_BLOCKS,
)
_PROJECTOR = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")


class EncoderLayout:
    """A published file as one encoder of the stack: what is not needed goes, the rest is renamed.

    Args:
        title: what the layout is called in messages.
        modules: native module path -> foreign one.
        blocks: foreign path of the numbered layers.
        whole: a name that is there in a whole file, and not among the tensors of some layers alone.
        skip_layers: so many of the last layers of a whole file are not needed.
        unneeded: names that are known and left out; one that ends in a dot stands for all below it.
    """

    def __init__(
        self,
        title: str,
        modules: Mapping[str, str],
        *,
        blocks: str,
        whole: str,
        skip_layers: int = 0,
        unneeded: Sequence[str] = (),
    ) -> None:
        self._keys = KeyMap([Row(native, foreign) for native, foreign in modules.items()], foreign=title)
        self._block = re.compile(re.escape(blocks) + r"\.(\d+)\.")
        self._whole = whole
        self._skip_layers = skip_layers
        self._unneeded = frozenset(name for name in unneeded if not name.endswith("."))
        self._unneeded_below = tuple(name for name in unneeded if name.endswith("."))

    def needed(self, names: Iterable[str]) -> list[str]:
        """The names that the encoder is made of. The last layers are known in a whole file only."""
        names = list(names)
        numbers = {name: int(block[1]) for name in names if (block := self._block.match(name))}
        skip = self._skip_layers if self._whole in names else 0
        end = max(numbers.values(), default=-1) + 1 - skip
        known = [name for name in names if name not in self._unneeded and not name.startswith(self._unneeded_below)]
        return [name for name in known if name not in numbers or numbers[name] < end]

    def native_names(self, foreign: Iterable[str]) -> dict[str, str]:
        """foreign name -> native name of what is needed. Raises CheckpointError for a name that nobody knows."""
        return {name: self._keys.native_name(name) for name in self.needed(foreign)}

    def to_native(self, foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``KeyMap.to_native``, of what is needed. Raises CheckpointError for a name that nobody knows."""
        return self._keys.to_native({name: foreign[name] for name in self.needed(foreign)})


def _below(native: str, foreign: str, modules: Sequence[str]) -> dict[str, str]:
    return {f"{native}{module}": f"{foreign}{module}" for module in modules}


_EXTRAS = ("tokenizer", "scaled_fp8")
"""a tokenizer.json as bytes, and ComfyUI's mark of a file with scaled float8 weights"""


def _llama(title: str, path: str, *unneeded: str) -> EncoderLayout:
    return EncoderLayout(
        title,
        _below("llama.", path, _LLAMA),
        blocks=f"{path}layers",
        whole=f"{path}embed_tokens.weight",
        skip_layers=LlamaDims().skip_layers,
        unneeded=(f"{path}norm.weight", *_EXTRAS, *unneeded),
    )


def _clip(title: str, path: str, *unneeded: str) -> EncoderLayout:
    return EncoderLayout(
        title,
        _below("clip.text_model.", path, _CLIP_TEXT),
        blocks=f"{path}encoder.layers",
        whole=f"{path}embeddings.token_embedding.weight",
        unneeded=(f"{path}embeddings.position_ids", *unneeded),
    )


def _vision(title: str, tower: str, projector: str, *unneeded: str) -> EncoderLayout:
    return EncoderLayout(
        title,
        _below("vision.vision_model.", tower, _CLIP_VISION) | _below("vision.", projector, _PROJECTOR),
        blocks=f"{tower}encoder.layers",
        whole=f"{tower}embeddings.class_embedding",
        skip_layers=VisionDims().skip_layers,
        unneeded=(f"{tower}embeddings.position_ids", f"{tower}post_layernorm.", *unneeded),
    )


LLAMA_LAYOUTS = {
    "causal_lm": _llama("LlamaForCausalLM", "model.", "lm_head.weight", "lm_head.scale_weight"),
    "diffusers": _llama("LlamaModel", ""),
    "llava": _llama(
        "LLaVA",
        "language_model.model.",
        *("language_model.lm_head.weight", "vision_tower.", "multi_modal_projector."),
    ),
    "llava_v5": _llama(
        "LLaVA of transformers 5",
        "model.language_model.",
        *("lm_head.weight", "model.vision_tower.", "model.multi_modal_projector."),
    ),
}
CLIP_LAYOUTS = {
    "clip": _clip(
        "CLIP",
        "text_model.",
        *("text_projection.weight", "visual_projection.weight", "logit_scale", "vision_model."),
    ),
    "clip_v5": _clip("CLIPTextModel of transformers 5", ""),
}
VISION_LAYOUTS = {
    "comfyui": _vision("LLaVA's image encoder", "vision_model.", "", "visual_projection.weight"),
    "llava": _vision("LLaVA", "vision_tower.vision_model.", "", "language_model."),
    "llava_v5": _vision(
        "LLaVA of transformers 5", "model.vision_tower.", "model.", "model.language_model.", "lm_head.weight"
    ),
}
