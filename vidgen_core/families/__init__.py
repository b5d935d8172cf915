"""The families of models: one frozen record of functions each, found by what is inside a checkpoint.

A family is a folder here that builds one :class:`Family` called ``FAMILY``; :data:`FAMILIES` names the folders
and loads them when first needed. docs/FAMILIES.md says how to add one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError
from ..keyframes import encode_keyframes
from ..types import Defaults
from ..weights.config import config_from_json, unknown_name
from ..weights.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..codec import Codec
    from ..diffusion import Diffusion
    from ..keyframes import Keyframe, LatentKeyframe
    from ..text.tokenizer_files import TokenizerPlaces
    from ..types import Conditioning, Grid, VideoShape
    from ..weights.header import Header

Config = Any
"""one of a family's frozen dataclasses"""
Shapes = Mapping[str, tuple[int, ...]]

TITLES = {
    "network": "diffusion network",
    "codec": "VAE",
    "text": "text encoders",
    "llama": "LLaMA text encoder",
    "clip": "CLIP text encoder",
    "t5": "T5 text encoder",
    "vision": "image encoder",
}
"""what each part is called in messages"""


class TextEncoder(Protocol):
    """Prompts to a family's features (any dataclass of tensors that its ``condition`` understands)."""

    fingerprint: str
    """of the files the weights came from"""

    @property
    def sees_images(self) -> bool:
        """Whether a prompt can be encoded together with a picture."""
        ...

    def encode(
        self, prompts: Sequence[str], *, image_mode: bool = False, custom_template: str | None = None
    ) -> Any: ...

    def encode_with_image(
        self,
        prompts: Sequence[str],
        image: Tensor,
        *,
        interleave: int,
        image_mode: bool = False,
        custom_template: str | None = None,
    ) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How one part (network, codec or text) comes from its config and header."""

    config: type
    """its frozen dataclass, as written into the metadata"""
    build: Callable[[Config, Mapping[str, str]], nn.Module]
    """(config, metadata of the file) -> module; called on the meta device"""
    recognise: Callable[[Shapes], Config | None]
    """config from native names and shapes, for files without our metadata; None when it is something else"""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """foreign namings that can be translated to the native one"""
    told: Callable[[Config, Mapping[str, str]], tuple[Config, bool]] | None = None
    """(config from shapes, metadata of a published file) -> (config, whether the file named its image condition)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAssembly:
    """How text encoders from one file or several become one module. ``parts`` are keys of ``Family.parts``."""

    parts: tuple[str, ...]
    """the parts that text encoders may come in"""
    config: Callable[[Mapping[str, Config]], Config]
    """config by part -> the text config; CheckpointError where an encoder is missing or they do not fit"""
    tokenizers: Callable[[Config, Mapping[str, Header], TokenizerPlaces], Any]
    """(text config, file by part, where to look) -> what ``join`` takes; FileError or CheckpointError without them"""
    join: Callable[[Config, Mapping[str, nn.Module], Any, Mapping[str, Callable[[], nn.Module]]], nn.Module]
    """(text config, module by part, tokenizers, what loads a part of ``later``) -> the text encoder"""
    blocks: Mapping[str, tuple[str, ...]]
    """by part: paths of the module lists whose blocks may stay in the file"""
    later: tuple[str, ...]
    """parts whose weights stay in the file until they are needed"""
    widths: Callable[[Config], tuple[int, int]]
    """text config -> width of the states per token and of the pooled vector"""
    sees_images: Callable[[Config], bool]
    """text config -> whether a prompt can be encoded together with a picture"""
    stranger: Callable[[Shapes], str | None]
    """what a file is that holds no encoder of this family, if that can be told"""
    activation: Callable[[Config, int], tuple[int, float]]
    """(text config, tokens of the prompt) -> (bytes besides weights, operations) of encoding it"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMode:
    """How closely the motion keeps to a given first frame, as a name in a list that the user may choose from."""

    start_share: float = 0.0
    """of the noise that a run starts from, how much is the picture"""
    shift: float | None = None
    """of the schedule, where the user says nothing; None: the checkpoint's"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyframeRules:
    """How a family takes given pictures."""

    check: Callable[[Config, Sequence[Keyframe | LatentKeyframe], int], None]
    """(network config, keyframes, frames of the video): SettingsError for what this network cannot take"""
    condition: Callable[[Config, Conditioning, Sequence[LatentKeyframe], Sequence[int]], Conditioning]
    """(network config, conditioning, keyframes, (B, C, T, H, W)) -> the conditioning with these pictures"""
    check_conditioning: Callable[[Config, Conditioning, Sequence[int]], None]
    """(network config, conditioning, (B, C, T, H, W)): SettingsError where a picture that the network needs is missing,
    or was prepared for a video of another size"""
    methods: Mapping[str, Callable[[Config], Config]]
    """"auto" and ways that the user may name where a file does not say them: config -> config that says so"""
    modes: Mapping[str, ImageMode]
    """the first one is the default"""
    hidden_frames: Callable[[Config], int]
    """frames at the start of a decoded video that are not meant to be seen"""
    interleave: Callable[[Config], int | None]
    """every how many-th token of a given picture stands in the encoded prompt; None: the prompt says nothing of it"""
    encode: Callable[[Config, Codec, Sequence[Keyframe], VideoShape], list[LatentKeyframe]] = (
        lambda config, codec, keyframes, shape: encode_keyframes(codec, keyframes, shape)
    )
    """(network config, codec, keyframes, video) -> what ``condition`` takes; by default each picture on its own"""
    fills_in: Callable[[Config], bool] = lambda config: False
    """whether the network is told a video with gaps: any frames, and masks of what is missing of them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRules:
    """How the blocks of a network look from outside, for what stands around them: step caches and guidance by weak
    passes (``blocks``). A value is what a block gives."""

    through: Callable[[Sequence[Any]], Any]
    """arguments of a block -> what it would give if it did nothing"""
    video: Callable[[Any, int], Tensor]
    """(value, number of video tokens) -> the video's tokens (B, L, D)"""
    with_video: Callable[[Any, Tensor], Any]
    """(value, (B, L, D)) -> the value with these tokens of the video"""
    reads: Callable[[nn.Module], nn.Module]
    """a block -> its layer that reads the normalised and modulated tokens, the video's first"""
    attended_video: Callable[[int], slice] = lambda num_video: slice(0, num_video)
    """number of video tokens -> where they are among those that attend"""
    time_rope: Callable[[Config], tuple[int, float] | None] = lambda config: None
    """head channels of the frame axis and their base, of networks that take ``nn.rope.time_stretch``"""
    polynomial: Callable[[Config], tuple[float, ...] | None] = lambda config: None
    """TeaCache's published coefficients for this network, highest power first; None where there are none"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Everything the rest of the core needs to know about a family."""

    name: str
    title: str
    parts: Mapping[str, Part]
    """"network", "codec", "text", and the encoders that come in files of their own"""
    text: TextAssembly
    diffusion: Callable[[Config], Diffusion]
    """network config -> its noise process"""
    codec: Callable[[nn.Module, Config], Codec]
    """(VAE, its config) -> video <-> latents"""
    network_inputs: Callable[[Config, Tensor, Tensor, Conditioning], dict[str, Any]]
    """(network config, scaled noisy latents, clock, conditioning) -> arguments of the network's forward"""
    condition: Callable[[Config, Any, float | None], Conditioning]
    """(network config, text features, embedded guidance) -> conditioning"""
    native_features: Callable[[Config, Tensor, Tensor | None, Tensor | None], Any]
    """(network config, (B, L, D) tokens, (B, L) mask, (B, P) pooled) of ComfyUI's CONDITIONING -> text features;
    SettingsError where they do not fit the network"""
    keyframes: KeyframeRules
    patch: Callable[[Config], tuple[int, int, int]]
    """latent frames, rows, columns per token"""
    grid: Callable[[Config], Grid]
    """codec config -> how pixels map to latents"""
    lead_frames: Callable[[Config, int], int] = lambda config, num_frames: 0
    """(network config, latent frames of the video) -> latent frames that are denoised in front of them and dropped"""
    trail_frames: Callable[[Config, int], int] = lambda config, num_frames: 0
    """likewise behind them"""
    latent_channels: Callable[[Config], int]
    """channels of the latents the network denoises (its input may have more)"""
    fits_text: Callable[[Config, Config], str | None]
    """(network config, text config) -> why they do not belong together, or None"""
    image_conditions: Callable[[Config], tuple[str, ...]] = lambda config: ()
    """values of the network config's ``image_condition`` that the weights allow; empty without such a field"""
    blocks: tuple[str, ...]
    """module lists in the order they run, for streaming"""
    block_rules: BlockRules | None = None
    """None: nothing may stand around the blocks"""
    keep_fp32: tuple[str, ...]
    """module paths that stay in float32 whatever the storage dtype is"""
    lora_targets: tuple[str, ...]
    lora_alpha_note: str = ""
    """what to know of a LoRA that does not say its alpha; empty where its trainers mean the rank"""
    activation_bytes: Callable[[Config, VideoShape], int]
    """peak bytes of one forward of one sample in a 2-byte dtype"""
    defaults: Callable[[Config], Defaults]
    """network config -> what its authors recommend"""

    def denoised_frames(self, config: Config, num_frames: int) -> int:
        """How many latent frames the network denoises for a video of ``num_frames`` of them."""
        return num_frames + self.lead_frames(config, num_frames) + self.trail_frames(config, num_frames)


class _Lazy(Mapping[str, Family]):
    """name -> Family, imported at the first look: starting the pack must not build every family."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)

    def __getitem__(self, name: str) -> Family:
        if name not in self._names:
            raise KeyError(name)
        return importlib.import_module(f".{name}", __name__).FAMILY

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


FAMILIES: Mapping[str, Family] = _Lazy(("hunyuan", "cogvideox"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a checkpoint file is."""

    family: Family
    part: str
    config: Config
    layout: str
    """``"native"`` or a key of ``Part.layouts``"""
    is_told: bool = True
    """the file itself says how an image conditions the network; else that is an assumption"""

    @property
    def title(self) -> str:
        return f"{self.family.title} {TITLES.get(self.part, self.part)}"


def identify(header: Header) -> Found:
    """Say what a checkpoint is from its metadata, else from its names and shapes; never from its file name.

    Raises:
        CheckpointError: the metadata names an unknown family or option, or nothing here knows these tensors.
    """
    found = identify_parts(header)
    if found:
        return found[0]
    raise _unknown(header)


def identify_parts(header: Header) -> list[Found]:
    """All parts in a file: one in most, none where nothing is known, LLaMA and its image encoder in a whole LLaVA.

    Raises:
        CheckpointError: the metadata names an unknown family or option.
    """
    if "vidgen.family" in header.metadata:
        return [_from_metadata(header)]
    for family in FAMILIES.values():
        named = [(name, part, _recognise(part, header)) for name, part in family.parts.items()]
        found = [_found(family, name, part, known, header) for name, part, known in named if known is not None]
        if found:
            return found
    return []


def _found(family: Family, name: str, part: Part, known: tuple[Config, str], header: Header) -> Found:
    config, layout = known
    is_told = True
    if part.told is not None:
        config, is_told = part.told(config, header.metadata)
    return Found(family=family, part=name, config=config, layout=layout, is_told=is_told)


_LORA_MARKS = (".lora_", "lora_A", ".lokr_", ".hada_w")
"""parts of names that only files of changes to a model have"""


def _unknown(header: Header) -> CheckpointError:
    families = ", ".join(family.title for family in FAMILIES.values())
    if any(mark in name for name in header.tensors for mark in _LORA_MARKS):
        return CheckpointError(
            "This is a LoRA, which changes a model but is none",
            given=f"{header.path} with {next(iter(header.tensors))}, ...",
            expected=f"a network, VAE or text encoder of {families}",
            do="load the model itself here, and apply the LoRA to it",
        )
    some = ", ".join(list(header.tensors)[:3]) or "no tensors at all"
    architecture = header.metadata.get("gguf.general.architecture")
    of = f" of the architecture {architecture!r}" if architecture else ""
    return CheckpointError(
        "This checkpoint is not of a family that is supported",
        given=f"{header.path}{of} with {len(header.tensors)} tensors ({some}, ...)",
        expected=f"a network, VAE or text encoder of {families}",
        do="pick another file; LoRA and ControlNet files are not checkpoints",
    )


def _from_metadata(header: Header) -> Found:
    name = header.metadata["vidgen.family"]
    if name not in FAMILIES:
        raise unknown_name("model family", name, list(FAMILIES), where=str(header.path))
    family = FAMILIES[name]
    part = header.metadata.get("vidgen.part", "")
    if part not in family.parts:
        raise unknown_name("part of a model", part, list(family.parts), where=str(header.path))
    if "vidgen.config" not in header.metadata:
        raise CheckpointError("The metadata has no vidgen.config", given=header.path, do="export the checkpoint again")
    config = config_from_json(family.parts[part].config, header.metadata["vidgen.config"], where=str(header.path))
    return Found(family=family, part=part, config=config, layout="native")


def _recognise(part: Part, header: Header) -> tuple[Config, str] | None:
    config = part.recognise(header.shapes)
    if config is not None:
        return config, "native"
    for name, layout in part.layouts.items():
        native = _native_shapes(layout, header)
        config = None if native is None else part.recognise(native)
        if config is not None:
            return config, name
    return None


def _native_shapes(layout: Layout, header: Header) -> Shapes | None:
    """The shapes after translation, worked out on meta tensors; None when the layout does not fit."""
    try:
        native = layout.to_native(header.meta_tensors())
    except CheckpointError:
        return None
    return {name: tuple(tensor.shape) for name, tensor in native.items()}
