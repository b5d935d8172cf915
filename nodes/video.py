"""Frames: out of latents, into latents, to a file and from one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import SettingsError, UserError
from .wires import (
    CATEGORY,
    COND,
    MODEL,
    VAE,
    EncodedPrompt,
    GivenImages,
    Latent,
    codec_latent,
    codec_scale,
    hidden_frames,
    video_samples,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..vidgen_core.bounded import Bound

FORMATS = ["mp4", "webm", "gif", "webp", "mov", "mkv", "png"]
PICTURES = "png"
CODECS = ["auto", "h264", "h265", "vp9", "av1", "prores", "ffv1"]
BITS = ["auto", "8", "10", "16"]
METHODS = ["tiles", "exact", "exact_disk"]
METHOD = {
    "default": "tiles",
    "tooltip": "tiles fade into each other; exact gives what one piece gives, in as much memory as you allow; with "
    "disk, what does not fit goes to a temporary file.",
}
MEMORY = {
    "default": 0.0,
    "min": 0.0,
    "max": 1024.0,
    "step": 0.1,
    "tooltip": "GB that exact may take; less takes longer. 0: half of what is free.",
}


def coding_bound(method: str, memory_gb: float) -> Bound:
    """What the widgets of an exact method say."""
    from ..vidgen_core.bounded import Bound
    from .host import current

    spill = current().scratch_folder() if method == "exact_disk" else None
    return Bound(budget_bytes=int(memory_gb * 1e9) or None, spill=spill)


class Decode:
    CATEGORY = f"{CATEGORY}/latent"
    DESCRIPTION = "Turns latents into frames. Takes latents of native nodes, too."
    SEARCH_ALIASES = ["vae decode", "video decode"]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The frames; the videos of a batch follow each other.",)
    FUNCTION = "decode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": (VAE, {"tooltip": "The VAE of the model that made the latents."}),
                "latent": ("LATENT", {"tooltip": "Finished latents."}),
            },
            "optional": {
                "tile_size": (
                    "INT",
                    {
                        "default": 256,
                        "min": 0,
                        "max": 4096,
                        "step": 32,
                        "tooltip": "Side in px of a large video's tiles; smaller takes less memory. 0: in one piece.",
                    },
                ),
                "overlap": (
                    "INT",
                    {
                        "default": 64,
                        "min": 0,
                        "max": 2048,
                        "step": 16,
                        "tooltip": "How far tiles fade into each other, in px.",
                    },
                ),
                "temporal_size": (
                    "INT",
                    {
                        "default": 64,
                        "min": 4,
                        "max": 1024,
                        "step": 4,
                        "tooltip": "Frames of a tile; fewer take less memory.",
                    },
                ),
                "temporal_overlap": (
                    "INT",
                    {"default": 16, "min": 0, "max": 512, "step": 4, "tooltip": "Frames that fade into each other."},
                ),
                "method": (METHODS, METHOD),
                "memory_gb": ("FLOAT", MEMORY),
            },
        }

    def decode(
        self,
        vae: Any,
        latent: Latent,
        tile_size: int = 256,
        overlap: int = 64,
        temporal_size: int = 64,
        temporal_overlap: int = 16,
        method: str = "tiles",
        memory_gb: float = 0.0,
    ) -> tuple[Tensor]:
        from ..vidgen_core.generate import decode_latents
        from ..vidgen_core.media import video_to_images
        from ..vidgen_core.tiling import Tiling
        from .host import current

        host = current()
        host.need(vae)
        samples = video_samples(latent) * codec_scale(vae)
        tiles = Tiling(
            tile_px=tile_size,
            stride_px=tile_size - overlap,
            tile_frames=temporal_size,
            stride_frames=temporal_size - temporal_overlap,
        )
        tiling = (tiles if tile_size else None) if method == "tiles" else coding_bound(method, memory_gb)
        video = decode_latents(vae, samples, tiling=tiling, host=host)
        return (video_to_images(video[:, :, hidden_frames(latent) :]),)


class EncodeVideo:
    CATEGORY = f"{CATEGORY}/latent"
    DESCRIPTION = "Turns frames into latents, e.g. to change a video with a denoise below 1."
    SEARCH_ALIASES = ["vae encode", "video to video", "img2vid"]
    RETURN_TYPES = ("LATENT", COND)
    RETURN_NAMES = ("latent", "positive")
    OUTPUT_TOOLTIPS = (
        "The latents of the video.",
        "The prompt, with what the mask leaves of the video if the network fills in.",
    )
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fit = (
            "crop takes the middle of frames that are not a multiple of 16 px, and leaves out last frames so that "
            "1, 5, 9, ... remain; strict refuses them."
        )
        return {
            "required": {
                "vae": (VAE, {"tooltip": "The VAE of the model that will use the latents."}),
                "images": ("IMAGE", {"tooltip": "The frames of one video."}),
                "fit": (["crop", "strict"], {"default": "crop", "tooltip": fit}),
            },
            "optional": {
                "mask": (
                    "MASK",
                    {"tooltip": "White is made new by the sampler, black stays; one for all frames, or one for each."},
                ),
                "method": (METHODS, METHOD),
                "memory_gb": ("FLOAT", MEMORY),
                "model": (
                    MODEL,
                    {"tooltip": "A network that fills in (CogVideoX-Fun): with a mask it is told what stays."},
                ),
                "positive": (COND, {"tooltip": "The prompt; goes through, with what a network that fills in is told."}),
            },
        }

    def encode(
        self,
        vae: Any,
        images: Tensor,
        fit: str,
        mask: Tensor | None = None,
        method: str = "tiles",
        memory_gb: float = 0.0,
        model: Any = None,
        positive: EncodedPrompt | None = None,
    ) -> tuple[Latent, EncodedPrompt | None]:
        from ..vidgen_core.generate import TILES, encode_video
        from ..vidgen_core.media import crop_to_grid, images_to_video
        from ..vidgen_core.memory.plan import planned
        from .host import current

        current().need(vae)
        if mask is not None:
            images = with_mask(images, mask)
        if fit == "crop":
            images = crop_to_grid(images, vae.grid, multiple_px=16)
        tiling = TILES if method == "tiles" else coding_bound(method, memory_gb)
        tiling = planned("encode video", "tiling", tiling)
        latent = codec_latent(vae, encode_video(vae, images_to_video(images), tiling=tiling, host=current()))
        if mask is None:
            return latent, positive
        latent["noise_mask"] = images[None, None, ..., 3]
        if model is not None and positive is not None:
            positive = with_the_rest(model, vae, positive, images)
        return latent, positive


def with_the_rest(model: Any, vae: Any, positive: EncodedPrompt, images: Tensor) -> EncodedPrompt:
    """The prompt with what the mask in the fourth channel of ``images`` (T, H, W, 4) leaves of a video, for networks
    that fill in; else as it is."""
    from dataclasses import replace

    from ..vidgen_core.generate import encode_pictures
    from ..vidgen_core.keyframes import video_keyframes
    from ..vidgen_core.media import images_to_video
    from ..vidgen_core.memory.cancel import watched
    from ..vidgen_core.types import VideoShape
    from .host import current

    rules, config = model.family.keyframes, model.config
    if not rules.fills_in(config):
        return positive
    shape = VideoShape(num_frames=images.shape[0], height_px=images.shape[1], width_px=images.shape[2])
    given = video_keyframes(images_to_video(images[..., :3]), images[..., 3])
    rules.check(config, given, shape.num_frames)
    with watched(current(), vae):
        told = encode_pictures(rules, config, vae, given, shape)
    if not told:  # everything is made new
        return positive
    return replace(positive, images=GivenImages(keyframes=tuple(told), method="auto", mode="stability"))


def with_mask(images: Tensor, mask: Tensor) -> Tensor:
    """IMAGE (T, H, W, 3) and MASK (1 or T, H, W) -> (T, H, W, 4), so that both are cropped alike."""
    import torch

    shape = tuple(mask.shape)
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or len(mask) not in (1, len(images)) or mask.shape[1:] != images.shape[1:3]:
        raise SettingsError(
            "The mask is of another size than the images",
            given=f"mask {shape}, images {tuple(images.shape)}",
            expected=f"{images.shape[2]} x {images.shape[1]} px, and 1 or {len(images)} masks",
            do="resize the mask, or draw it on a frame of this video",
        )
    if not bool(torch.isfinite(mask).all()):
        raise SettingsError("The mask has numbers in it that are not finite", expected="numbers from 0 to 1")
    mask = mask.to(images).clamp(0, 1).expand(len(images), -1, -1)
    return torch.cat([images[..., :3], mask.unsqueeze(-1)], dim=-1)


class SaveVideo:
    CATEGORY = f"{CATEGORY}/video"
    DESCRIPTION = "Saves frames as a video that carries its workflow: drop the mp4 onto the canvas to get it back."
    SEARCH_ALIASES = ["video combine", "export", "mp4", "save webm", "prores", "png sequence", "audio"]
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE", {"tooltip": "The frames."}), **file_widgets()},
            "optional": more_file_widgets(),
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        format: str = "mp4",  # noqa: A002  the widget's name
        codec: str = "auto",
        bit_depth: str = "auto",
    ) -> bool | str:
        return can_be_written(format, codec, bit_depth)

    def save(
        self,
        images: Tensor,
        fps: float,
        filename_prefix: str,
        format: str,  # noqa: A002  the widget's name
        crf: int,
        codec: str = "auto",
        bit_depth: str = "auto",
        audio: Any = None,
        prompt: Any = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        from .host import current

        file = FileSettings(fps, filename_prefix, format, crf, codec, bit_depth)
        return saved(told(images, len(images), current()), file, audio, prompt, extra_pnginfo)


class DecodeSave:
    CATEGORY = f"{CATEGORY}/video"
    DESCRIPTION = "Decodes exactly and saves each frame as it is finished: a long video need not fit into memory."
    SEARCH_ALIASES = ["vae decode", "save video", "long video", "low memory", "prores", "png sequence"]
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": (VAE, {"tooltip": "The VAE of the model that made the latents."}),
                "latent": ("LATENT", {"tooltip": "Finished latents."}),
                **file_widgets(),
                "method": (METHODS[1:], METHOD | {"default": "exact_disk"}),
                "memory_gb": ("FLOAT", MEMORY),
            },
            "optional": more_file_widgets(),
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        format: str = "mp4",  # noqa: A002  the widget's name
        codec: str = "auto",
        bit_depth: str = "auto",
    ) -> bool | str:
        return can_be_written(format, codec, bit_depth)

    def save(
        self,
        vae: Any,
        latent: Latent,
        fps: float,
        filename_prefix: str,
        format: str,  # noqa: A002  the widget's name
        crf: int,
        method: str,
        memory_gb: float,
        codec: str = "auto",
        bit_depth: str = "auto",
        audio: Any = None,
        prompt: Any = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        from ..vidgen_core.generate import decode_frames
        from ..vidgen_core.media import video_to_images
        from .host import current

        current().need(vae)
        samples, bound = video_samples(latent) * codec_scale(vae), coding_bound(method, memory_gb)
        made = decode_frames(vae, samples, bound=bound, host=current(), hidden_frames=hidden_frames(latent))
        # One frame is a video of length 1.
        images = (video_to_images(one[None, :, None])[0] for one in made)
        file = FileSettings(fps, filename_prefix, format, crf, codec, bit_depth)
        return saved(images, file, audio, prompt, extra_pnginfo)


def file_widgets() -> dict[str, Any]:
    """How a video is written."""
    fps = {"default": 8.0, "min": 0.1, "max": 240.0, "step": 0.1, "round": 0.001, "tooltip": "Frames per second."}
    prefix = "Begin of the file name; a slash makes a folder. A number is added."
    formats = (
        "mp4 plays everywhere; mov and mkv are for editing; png is a folder of numbered pictures. "
        "All but gif carry the workflow, the page restores it from all but mkv. gif and webp are silent."
    )
    crf = "Quality of h264, h265, vp9 and av1: 0 is lossless, 17 looks it, 51 is worst."
    return {
        "fps": ("FLOAT", fps),
        "filename_prefix": ("STRING", {"default": "video/VidGen", "tooltip": prefix}),
        "format": (FORMATS, {"default": "mp4", "tooltip": formats}),
        "crf": ("INT", {"default": 17, "min": 0, "max": 51, "tooltip": crf}),
    }


def more_file_widgets() -> dict[str, Any]:
    """What came later: behind all widgets of older workflows."""
    codec = (
        "auto: h264 in mp4 and mov, vp9 in webm, ffv1 in mkv. prores (mov) is for editing, ffv1 (mkv) loses nothing, "
        "av1 and h265 are smaller and slower."
    )
    bits = (
        "Bits of a colour: 10 avoids bands in smooth skies, 16 (ffv1 and png) keeps all. auto: 10 for prores, else 8."
    )
    sound = "Begins with the first frame; cut where the video ends, or filled up with silence."
    return {
        "codec": (CODECS, {"default": "auto", "tooltip": codec}),
        "bit_depth": (BITS, {"default": "auto", "tooltip": bits}),
        "audio": ("AUDIO", {"tooltip": sound}),
    }


@dataclass(frozen=True, slots=True)
class FileSettings:
    """What the widgets say about the file."""

    fps: float
    filename_prefix: str
    format: str
    crf: int
    codec: str = "auto"
    bit_depth: str = "auto"

    @property
    def bits(self) -> int:
        """0 where it is left to the codec."""
        return 0 if self.bit_depth == "auto" else int(self.bit_depth)


def can_be_written(ending: str, codec: str, bit_depth: str) -> bool | str:
    """True if the ffmpeg at hand writes this, else what it writes: for VALIDATE_INPUTS, before anything is computed."""
    from ..vidgen_core.errors import unknown_name
    from ..vidgen_core.media import way_of
    from .host import current

    try:
        for name, value, known in (
            ("format", ending, FORMATS),
            ("codec", codec, CODECS),
            ("bit_depth", bit_depth, BITS),
        ):
            if value is not None and value not in known:  # None comes through a link
                raise unknown_name(name, value, known)
        if None in (ending, codec, bit_depth):
            return True
        file = FileSettings(1.0, "", current().ending(ending), 0, codec, bit_depth)
        if file.format == PICTURES:
            check_pictures(file)
        else:
            way_of(f"a.{file.format}", codec, file.bits).check()
    except UserError as error:
        return str(error)
    return True


def check_pictures(file: FileSettings) -> None:
    """Raise SettingsError for what PNG pictures cannot be."""
    if file.codec != "auto" or file.bits not in (0, 8, 16):
        raise SettingsError(
            "PNG pictures are not written so",
            given=f"codec {file.codec}, bit_depth {file.bit_depth}",
            expected="codec auto, and bit_depth auto, 8 or 16",
        )


def saved(
    images: Iterable[Tensor],
    file: FileSettings,
    audio: Any,
    prompt: Any,
    extra_pnginfo: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write the pictures (H, W, 3) to a new file of the output folder as they come; what ComfyUI shows of it."""
    from ..vidgen_core.media import images_to_frames, sound_of, way_of, write_series, write_video
    from ..vidgen_core.memory.cancel import listening
    from .host import current

    host = current()
    sound = sound_of(audio)
    ending = host.ending(file.format)
    tags = ({} if prompt is None else {"prompt": prompt}) | (extra_pnginfo or {})
    metadata = {key: json.dumps(value) for key, value in tags.items()} if host.keeps_metadata() else {}
    if ending == PICTURES:
        check_pictures(file)
        folder, subfolder = host.output_path(file.filename_prefix, "")
        with listening(host):
            frames = images_to_frames(images, file.bits or 8)
            pictures = write_series(folder, frames, fps=file.fps, metadata=metadata, sound=sound)
        host.result_saved()
        place = f"{subfolder}/{folder.name}".strip("/")
        return {"ui": {"images": [{"filename": one.name, "subfolder": place, "type": "output"} for one in pictures]}}
    path, subfolder = host.output_path(file.filename_prefix, f".{ending}")
    way = way_of(path, file.codec, file.bits)
    with listening(host):
        frames = images_to_frames(images, way.frame_bits)
        write_video(
            path,
            frames,
            fps=file.fps,
            metadata=metadata,
            crf=file.crf,
            codec=file.codec,
            bits=file.bits,
            sound=sound,
        )
    host.result_saved()
    shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
    # The page has a player for some files and would show a broken picture for the others; its lists have them all.
    return {"ui": {"images": [shown], "animated": (True,)} if way.browsers_play else {"video": [shown]}}


def told(images: Tensor, total: int, host: Any) -> Iterator[Tensor]:
    """The pictures, with progress and a look at the cancel button before each."""
    for number, image in enumerate(images):
        host.check_cancelled()
        yield image
        host.progress("save", number + 1, total)


def found_input(name: str) -> bool | str:
    """True if the host has this input file, else why not: for VALIDATE_INPUTS."""
    from .host import current

    try:
        current().find_input(name)
    except UserError as error:
        return str(error)
    return True


def changed_at(name: str) -> float:
    """For IS_CHANGED: a file with the same name may have been replaced."""
    from .host import current

    return os.path.getmtime(current().find_input(name))


class LoadVideo:
    CATEGORY = f"{CATEGORY}/video"
    DESCRIPTION = "Reads the frames and the sound of a video file."
    SEARCH_ALIASES = ["import video", "video input", "load audio", "png sequence"]
    RETURN_TYPES = ("IMAGE", "FLOAT", "INT", "AUDIO")
    RETURN_NAMES = ("images", "fps", "num_frames", "audio")
    OUTPUT_TOOLTIPS = (
        "The frames.",
        "Frames per second of the file.",
        "How many frames were read.",
        "The sound of these frames; nothing where the file is silent.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from .host import VIDEO_ENDINGS, current

        tooltip = "A file in the input folder; in the headless host a path."
        first = "Frames to leave out at the start."
        most = "Frames to read at most; 0 reads to the end."
        return {
            "required": {
                "video": (current().inputs(VIDEO_ENDINGS), {"video_upload": True, "tooltip": tooltip}),
                "start_frame": ("INT", {"default": 0, "min": 0, "max": 10**6, "tooltip": first}),
                "max_frames": ("INT", {"default": 0, "min": 0, "max": 10**6, "tooltip": most}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, video: str) -> bool | str:
        return found_input(video)

    @classmethod
    def IS_CHANGED(cls, video: str, **_: Any) -> float:
        return changed_at(video)

    def load(self, video: str, start_frame: int, max_frames: int) -> tuple[Tensor, float, int, dict[str, Any] | None]:
        from ..vidgen_core.media import frames_to_images, read_sound, read_video, span
        from ..vidgen_core.memory.cancel import listening
        from .host import current

        host = current()
        path: Path = host.find_input(video)
        with listening(host):
            frames, fps = read_video(path, start=start_frame, num_frames=max_frames or None, all_bits=True)
            sound = read_sound(path)
        heard = None if sound is None else span(sound, start_frame / fps, len(frames) / fps)
        return frames_to_images(frames), fps, len(frames), None if heard is None else heard.as_audio()
