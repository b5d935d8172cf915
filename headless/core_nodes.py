"""ComfyUI's own nodes that graphs of strangers and dropped files need: pictures, videos and sound in and out.

Ids, inputs and outputs are those of ComfyUI's nodes, so that its workflows run here, in the server and in
``vidgen render``; what they do is written anew on the core's readers and writers. They read files of the input folder
by name and never a path. Notes, reroutes and primitive nodes are the editor's alone; ``ui`` resolves them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vidgen_core.errors import FileError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ..nodes.host import LocalNodeHost

MAX_SIDE_PX = 16384
CRF = 17
"""of a video whose node has no widget for it: looks lossless"""
AUDIO_ENDINGS = frozenset({".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".au", ".mp4", ".webm", ".mov", ".mkv"})


@dataclass(frozen=True, slots=True)
class Video:
    """What a VIDEO wire carries."""

    images: Tensor
    """(T, H, W, 3) in [0, 1]"""
    fps: float
    audio: dict[str, Any] | None = None


def own_host() -> LocalNodeHost:
    """The host that runs these nodes: ComfyUI has its own."""
    from ..nodes.host import LocalNodeHost, current

    host = current()
    assert isinstance(host, LocalNodeHost)
    return host


def found_upload(name: str) -> Path:
    return own_host().find_upload(name)


def is_there(name: str) -> bool | str:
    """For VALIDATE_INPUTS: True, or why there is no such file."""
    try:
        found_upload(name)
    except UserError as error:
        return str(error)
    return True


def changed_at(name: str) -> float:
    """For IS_CHANGED: another file may have its name."""
    return os.path.getmtime(found_upload(name))


def listed_pictures() -> list[str]:
    from ..nodes.host import IMAGE_ENDINGS

    return _listed(IMAGE_ENDINGS)


def _listed(endings: Collection[str]) -> list[str]:
    return own_host().inputs(endings)


# --- pictures ---------------------------------------------------------------------------------------------------------


class LoadImage:
    CATEGORY = "image"
    DESCRIPTION = "Reads a picture of the input folder. Where it is transparent the mask is white."
    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (listed_pictures(), {"image_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return is_there(image)

    @classmethod
    def IS_CHANGED(cls, image: str) -> float:
        return changed_at(image)

    def load_image(self, image: str) -> tuple[Tensor, Tensor]:
        from ..vidgen_core.media import read_image

        return read_image(found_upload(image))


CHANNELS = ["alpha", "red", "green", "blue"]


class LoadImageMask:
    CATEGORY = "mask"
    DESCRIPTION = "Reads one channel of a picture as a mask. Where a picture is transparent the mask is white."
    RETURN_TYPES, FUNCTION = ("MASK",), "load_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (listed_pictures(), {"image_upload": True}), "channel": (CHANNELS,)}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return is_there(image)

    @classmethod
    def IS_CHANGED(cls, image: str, channel: str) -> float:
        return changed_at(image)

    def load_image(self, image: str, channel: str) -> tuple[Tensor]:
        from ..vidgen_core.media import read_image

        colours, transparent = read_image(found_upload(image))
        return (transparent if channel == "alpha" else colours[..., CHANNELS.index(channel) - 1],)


class EmptyImage:
    CATEGORY = "image"
    DESCRIPTION = "Pictures of one colour."
    RETURN_TYPES, FUNCTION = ("IMAGE",), "generate"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = ("INT", {"default": 512, "min": 1, "max": MAX_SIDE_PX, "step": 1})
        colour = ("INT", {"default": 0, "min": 0, "max": 0xFFFFFF, "step": 1, "display": "color"})
        number = ("INT", {"default": 1, "min": 1, "max": 4096})
        return {"required": {"width": size, "height": size, "batch_size": number, "color": colour}}

    def generate(self, width: int, height: int, batch_size: int = 1, color: int = 0) -> tuple[Tensor]:
        import torch

        channels = [color >> 16, color >> 8 & 0xFF, color & 0xFF]
        one = torch.tensor(channels, dtype=torch.float32) / 255
        return (one.expand(batch_size, height, width, 3),)  # without memory for each pixel


METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]


class ImageScale:
    CATEGORY = "image/upscaling"
    DESCRIPTION = "Brings pictures to a size. A side of 0 follows from the other one."
    RETURN_TYPES, FUNCTION = ("IMAGE",), "upscale"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = ("INT", {"default": 512, "min": 0, "max": MAX_SIDE_PX, "step": 1})
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (METHODS,),
                "width": size,
                "height": size,
                "crop": (["disabled", "center"],),
            }
        }

    def upscale(self, image: Tensor, upscale_method: str, width: int, height: int, crop: str) -> tuple[Tensor]:
        if width == height == 0:
            return (image,)
        own_height, own_width = image.shape[1:3]
        width = width or max(1, round(own_width * height / own_height))
        height = height or max(1, round(own_height * width / own_width))
        if crop == "center":
            image = middle(image, width / height)
        return (scaled(image, upscale_method, width, height),)


def middle(images: Tensor, ratio: float) -> Tensor:
    """The largest part (N, H, W, C) with this width / height."""
    height, width = images.shape[1:3]
    kept_height, kept_width = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return images[:, top : top + kept_height, left : left + kept_width]


def scaled(images: Tensor, method: str, width: int, height: int) -> Tensor:
    """IMAGE (N, H, W, C) at another size, by torch's method of this name or Pillow's Lanczos."""
    import torch

    if method == "lanczos":
        import numpy as np
        from PIL import Image

        from ..vidgen_core.media import frames_to_images, images_to_frames

        size = width, height
        frames = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in images_to_frames(images))
        return frames_to_images(np.stack([np.asarray(frame) for frame in frames]))
    moved = torch.nn.functional.interpolate(images.movedim(-1, 1), size=(height, width), mode=method)
    return moved.movedim(1, -1).clamp(0, 1)


def save_pictures(images: Tensor, place: str, prefix: str, prompt: Any, extra: dict[str, Any] | None) -> dict[str, Any]:
    """PNG files with the workflow inside; what the node shows. A preview that nobody would see is not made."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ..vidgen_core.media import images_to_frames
    from ..vidgen_core.weights.save import atomic_path

    host, shown = own_host(), []
    path_of = host.output_path if place == "output" else host.preview_path
    tags = ({} if prompt is None else {"prompt": prompt}) | (extra or {})
    for frame in images_to_frames(images):
        found = path_of(prefix, ".png")
        if found is None:
            break
        path, subfolder = found
        about = PngInfo()
        for name, value in tags.items():
            about.add_text(name, json.dumps(value))
        with atomic_path(path) as fresh:
            Image.fromarray(frame).save(fresh, "png", pnginfo=about, compress_level=4)
        shown.append({"filename": path.name, "subfolder": subfolder, "type": place})
    return {"ui": {"images": shown}}


class SaveImage:
    CATEGORY = "image"
    DESCRIPTION = "Saves pictures as PNG with the workflow inside."
    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION, OUTPUT_NODE = "save_images", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(
        self, images: Tensor, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ) -> dict[str, Any]:
        return save_pictures(images, "output", filename_prefix, prompt, extra_pnginfo)


class PreviewImage:
    CATEGORY = "image"
    DESCRIPTION = "Shows pictures without keeping them."
    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION, OUTPUT_NODE = "save_images", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": ("IMAGE",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save_images(self, images: Tensor, prompt: Any = None, extra_pnginfo: Any = None) -> dict[str, Any]:
        return save_pictures(images, "temp", "preview", prompt, extra_pnginfo)


# --- videos and sound -------------------------------------------------------------------------------------------------


class LoadVideo:
    CATEGORY = "image/video"
    DESCRIPTION = "Reads a video of the input folder."
    RETURN_TYPES, FUNCTION = ("VIDEO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from ..nodes.host import VIDEO_ENDINGS

        return {"required": {"file": (_listed(VIDEO_ENDINGS), {"video_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        return is_there(file)

    @classmethod
    def IS_CHANGED(cls, file: str) -> float:
        return changed_at(file)

    def load(self, file: str) -> tuple[Video]:
        from ..vidgen_core.media import frames_to_images, read_sound, read_video
        from ..vidgen_core.memory.cancel import listening

        path = found_upload(file)
        with listening(own_host()):
            frames, fps = read_video(path, all_bits=True)
            sound = read_sound(path)
        return (Video(frames_to_images(frames), fps, None if sound is None else sound.as_audio()),)


class GetVideoComponents:
    CATEGORY = "image/video"
    DESCRIPTION = "Takes a video apart."
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "AUDIO", "FLOAT"), ("images", "audio", "fps")
    FUNCTION = "take_apart"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"video": ("VIDEO",)}}

    def take_apart(self, video: Video) -> tuple[Tensor, dict[str, Any] | None, float]:
        return video.images, video.audio, video.fps


class CreateVideo:
    CATEGORY = "image/video"
    DESCRIPTION = "Makes a video of frames."
    RETURN_TYPES, FUNCTION = ("VIDEO",), "create"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fps = ("FLOAT", {"default": 30.0, "min": 1.0, "max": 120.0, "step": 1.0})
        return {"required": {"images": ("IMAGE",), "fps": fps}, "optional": {"audio": ("AUDIO",)}}

    def create(self, images: Tensor, fps: float, audio: dict[str, Any] | None = None) -> tuple[Video]:
        return (Video(images, fps, audio),)


class SaveVideo:
    CATEGORY = "image/video"
    DESCRIPTION = "Saves a video as mp4 with the workflow inside."
    RETURN_TYPES: tuple[str, ...] = ()
    FUNCTION, OUTPUT_NODE = "save", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "video": ("VIDEO",),
                "filename_prefix": ("STRING", {"default": "video/ComfyUI"}),
                "format": (["auto", "mp4", "webm", "mkv"], {"default": "auto"}),
                "codec": (["auto", "h264", "vp9", "av1"], {"default": "auto"}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, format: str = "auto", codec: str = "auto") -> bool | str:  # noqa: A002
        from ..nodes.video import can_be_written

        if None in (format, codec):  # through a link
            return True
        return can_be_written(file_ending(format, codec), codec, "auto")

    def save(
        self,
        video: Video,
        filename_prefix: str,
        format: str = "auto",  # noqa: A002  the widget's name
        codec: str = "auto",
        prompt: Any = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        from ..nodes.video import FileSettings, saved, told

        images = told(video.images, len(video.images), own_host())
        file = FileSettings(video.fps, filename_prefix, file_ending(format, codec), CRF, codec)
        return saved(images, file, video.audio, prompt, extra_pnginfo)


def file_ending(kind: str, codec: str) -> str:
    """Of the widgets; what is left open is webm for the codecs that were made for it, else mp4."""
    if kind != "auto":
        return kind
    return "webm" if codec in ("vp9", "av1") else "mp4"


class LoadAudio:
    CATEGORY = "audio"
    DESCRIPTION = "Reads a sound file of the input folder."
    RETURN_TYPES, FUNCTION = ("AUDIO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": (_listed(AUDIO_ENDINGS), {"audio_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, audio: str) -> bool | str:
        return is_there(audio)

    @classmethod
    def IS_CHANGED(cls, audio: str) -> float:
        return changed_at(audio)

    def load(self, audio: str) -> tuple[dict[str, Any]]:
        from ..vidgen_core.media import read_sound
        from ..vidgen_core.memory.cancel import listening

        path = found_upload(audio)
        with listening(own_host()):
            sound = read_sound(path)
        if sound is None:
            raise FileError("The file has no sound", given=path.name, expected="a file with sound in it")
        return (sound.as_audio(),)


NODES: dict[str, type] = {
    "LoadImage": LoadImage,
    "LoadImageMask": LoadImageMask,
    "EmptyImage": EmptyImage,
    "ImageScale": ImageScale,
    "SaveImage": SaveImage,
    "PreviewImage": PreviewImage,
    "LoadVideo": LoadVideo,
    "GetVideoComponents": GetVideoComponents,
    "CreateVideo": CreateVideo,
    "SaveVideo": SaveVideo,
    "LoadAudio": LoadAudio,
}

TITLES = {
    "LoadImage": "Load Image",
    "LoadImageMask": "Load Image (as Mask)",
    "EmptyImage": "Empty Image",
    "ImageScale": "Upscale Image",
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
    "LoadVideo": "Load Video",
    "GetVideoComponents": "Get Video Components",
    "CreateVideo": "Create Video",
    "SaveVideo": "Save Video",
    "LoadAudio": "Load Audio",
}
