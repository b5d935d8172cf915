"""The text encoders' weights in the layouts that people have on disk.

Native names are those of :class:`.text.TextStack`: ``llama.``, ``clip.`` and ``vision.`` before the names that
``transformers`` publishes. A published file holds more than the states need; what is left out is listed here by name,
so that anything else that is strange is still an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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
        skip_layers: so many of the last layers are not needed.
        unneeded: names that are known and left out; one that ends in a dot stands for all below it.
    """

    def __init__(
        self,
        title: str,
        modules: Mapping[str, str],
        *,
        blocks: str,
        skip_layers: int = 0,
        unneeded: Sequence[str] = (),
    ) -> None:
        self._keys = KeyMap([Row(native, foreign) for native, foreign in modules.items()], foreign=title)
        self._block = re.compile(re.escape(blocks) + r"\.(\d+)\.")
        self._skip_layers = skip_layers
        self._unneeded = frozenset(name for name in unneeded if not name.endswith("."))
        self._unneeded_below = tuple(name for name in unneeded if name.endswith("."))

    def is_needed(self, name: str, num_layers: int) -> bool:
        if name in self._unneeded or name.startswith(self._unneeded_below):
            return False
        block = self._block.match(name)
        return block is None or int(block[1]) < num_layers - self._skip_layers

    def needed(self, names: Sequence[str]) -> list[str]:
        """The names of a file that its encoder is made of."""
        blocks = [int(block[1]) for name in names if (block := self._block.match(name))]
        num_layers = max(blocks, default=-1) + 1
        return [name for name in names if self.is_needed(name, num_layers)]

    def to_native(self, foreign: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``KeyMap.to_native``, of what is needed. Raises CheckpointError for a name that nobody knows."""
        return self._keys.to_native({name: foreign[name] for name in self.needed(list(foreign))})


def _below(native: str, foreign: str, modules: Sequence[str]) -> dict[str, str]:
    return {f"{native}{module}": f"{foreign}{module}" for module in modules}


_EXTRAS = ("tokenizer", "scaled_fp8")
"""a tokenizer.json as bytes, and ComfyUI's mark of a file with scaled float8 weights"""


def _llama(title: str, path: str, *unneeded: str) -> EncoderLayout:
    return EncoderLayout(
        title,
        _below("llama.", path, _LLAMA),
        blocks=f"{path}layers",
        skip_layers=LlamaDims().skip_layers,
        unneeded=(f"{path}norm.weight", *_EXTRAS, *unneeded),
    )


def _clip(title: str, path: str, *unneeded: str) -> EncoderLayout:
    return EncoderLayout(
        title,
        _below("clip.text_model.", path, _CLIP_TEXT),
        blocks=f"{path}encoder.layers",
        unneeded=(f"{path}embeddings.position_ids", *unneeded),
    )


def _vision(title: str, tower: str, projector: str, *unneeded: str) -> EncoderLayout:
    return EncoderLayout(
        title,
        _below("vision.vision_model.", tower, _CLIP_VISION) | _below("vision.", projector, _PROJECTOR),
        blocks=f"{tower}encoder.layers",
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
