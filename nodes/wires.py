"""What travels between the nodes besides ComfyUI's own types, and the conventions of LATENT.

A LATENT is ComfyUI's dict with ``samples`` (B, C, T, H, W): raw latents as the VAE makes them, on the CPU, not at
the unit scale that the network sees. So native nodes and ours take each other's. Our own also carry
``vidgen_scale``, because a checkpoint may have another scale than its family's published one, and, of a model whose
videos begin with frames that are not to be seen, ``vidgen_hidden_frames``. ``noise_mask`` is ComfyUI's: 1 where the
sampler makes the video new, in pixels; ``vidgen_until`` says at which time what it keeps is let go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import CheckpointError, SettingsError

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.codec import Codec
    from ..vidgen_core.keyframes import KeptFrames, LatentKeyframe
    from ..vidgen_core.model import VideoModel

CATEGORY = "VidGen"
MODEL, VAE, TEXT, COND = "VIDGEN_MODEL", "VIDGEN_VAE", "VIDGEN_TEXT", "VIDGEN_COND"
KEYFRAMES = "VIDGEN_KEYFRAMES"

_SCALE = "vidgen_scale"
_HIDDEN = "vidgen_hidden_frames"
_UNTIL = "vidgen_until"

Latent = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedImage:
    """A picture of a VIDGEN_KEYFRAMES, which is a tuple of them; the rest is as in ``keyframes.Keyframe``."""

    image: Tensor
    """IMAGE (1, H, W, 3) of any size"""
    frame: int
    strength: float
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenImages:
    """What Image to Video adds to a prompt."""

    keyframes: tuple[LatentKeyframe, ...]
    method: str
    """how the network takes them, where its file does not say"""
    mode: str
    """how closely motion keeps to them"""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A VIDGEN_COND: the text encoders' features, which the sampler turns into the network's conditioning."""

    prompt: str
    features: Any
    """the family's own dataclass of tensors"""
    text_config: Any
    """of the encoders, to tell whether they belong to the network; None: that was checked before"""
    template: str = ""
    """its kind: "video", "image", "i2v video", "i2v image", "custom" """
    fingerprint: str = ""
    """of the encoders' files"""
    images: GivenImages | None = None


def check_text(model: VideoModel, encoded: EncodedPrompt) -> None:
    """Raise CheckpointError unless the prompt was encoded by encoders that this network was trained with."""
    if encoded.text_config is None:
        return
    problem = model.family.fits_text(model.config, encoded.text_config)
    if problem:
        raise CheckpointError(
            "The text encoders do not belong to this network", given=problem, do="load both from one model"
        )


def codec_latent(codec: Codec, latents: Tensor) -> Latent:
    """Latents at unit scale (B, C, T, H, W) as a LATENT."""
    return raw_latent(latents, codec_scale(codec))


def raw_latent(latents: Tensor, scale: float, *, hidden_frames: int = 0) -> Latent:
    latent = {"samples": (latents.float() / scale).cpu(), _SCALE: scale}
    return latent | ({_HIDDEN: hidden_frames} if hidden_frames else {})


def hidden_frames(latent: Latent) -> int:
    """How many frames at the start of each decoded video are not to be seen."""
    return latent.get(_HIDDEN, 0)


def latent_mask(latent: Latent, model: VideoModel) -> Tensor | None:
    """The ``noise_mask`` of a LATENT as (1 or B, 1, T, H, W) latents; SettingsError if it is of another size."""
    from ..vidgen_core.keyframes import mask_to_latents

    mask = latent.get("noise_mask")
    return None if mask is None else mask_to_latents(mask, model.grid, latent["samples"].shape)


def kept_latent(codec: Codec, kept: KeptFrames, batch_size: int) -> Latent:
    """A LATENT whose sampler keeps these frames."""
    latents = kept.latents.expand(batch_size, -1, -1, -1, -1)
    # ComfyUI's masks are as wide and high as something; the latents' own size needs no stretching.
    mask = kept.mask.expand(-1, -1, -1, *latents.shape[3:]).contiguous()
    return codec_latent(codec, latents) | {"noise_mask": mask, _UNTIL: kept.until}


def latent_until(latent: Latent) -> Tensor | None:
    """The times at which what ``noise_mask`` keeps is let go, if the LATENT says so."""
    return latent.get(_UNTIL)


def codec_scale(codec: Codec) -> float:
    """Latents at unit scale = scale * raw latents."""
    return codec.config.scaling_factor  # type: ignore[attr-defined]


def latent_scale(latent: Latent, model: VideoModel) -> float:
    """The scale of a LATENT: its own, else the one that the model's family has published."""
    return latent.get(_SCALE) or model.family.parts["codec"].config().scaling_factor


def video_samples(latent: Latent) -> Tensor:
    """The (B, C, T, H, W) tensor of a LATENT; an image's (B, C, H, W) becomes one frame."""
    samples = latent["samples"]
    if samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if samples.ndim != 5:
        raise SettingsError(
            "These are not video latents", given=f"shape {tuple(samples.shape)}", expected="5 dimensions"
        )
    return samples


def check_latents(model: VideoModel, samples: Tensor) -> None:
    """Raise SettingsError unless the network can take latents of this shape: the wrong VAE or an odd size."""
    channels = model.family.latent_channels(model.config)
    if samples.shape[1] != channels:
        raise SettingsError(
            "These latents belong to another kind of model",
            given=f"{samples.shape[1]} channels",
            expected=f"{channels} channels, as {model.family.title} has",
            do="make them with Empty Latent and the VAE of the same model",
        )
    frames = model.family.denoised_frames(model.config, samples.shape[2])
    sizes = (frames, *samples.shape[3:])
    for name, size, step in zip(("frames", "height", "width"), sizes, model.family.patch(model.config)):  # noqa: B905
        if size % step:
            raise SettingsError(
                f"The {name} of the latents cannot be cut into the network's patches",
                given=f"{size} latents",
                expected=f"a multiple of {step}",
                do="choose a width and a height that are multiples of 16" if name != "frames" else None,
            )
