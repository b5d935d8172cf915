"""ComfyUI's own nodes that graphs of strangers and dropped files need: pictures, videos and sound in and out.

Ids, inputs and outputs are those of ComfyUI's nodes, so that its workflows run here; what they do is written anew on
the core's readers and writers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...nodes.host import IMAGE_ENDINGS, VIDEO_ENDINGS, current
from ...nodes.video import changed_at, found_input, saved, told
from ...vidgen_core.errors import FileError
from .host import ServerHost

if TYPE_CHECKING:
    from torch import Tensor

CRF = 17
"""of a video whose node has no widget for it: looks lossless"""
AUDIO_ENDINGS = frozenset({".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a"})


@dataclass(frozen=True, slots=True)
class Video:
    """What a VIDEO wire carries."""

    images: Tensor
    """(T, H, W, 3) in [0, 1]"""
    fps: float
    audio: dict[str, Any] | None = None


class LoadImage:
    CATEGORY = "image"
    DESCRIPTION = "Reads a picture of the input folder. Where it is transparent the mask is white."
    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (current().inputs(IMAGE_ENDINGS), {"image_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return found_input(image)

    @classmethod
    def IS_CHANGED(cls, image: str) -> float:
        return changed_at(image)

    def load_image(self, image: str) -> tuple[Tensor, Tensor]:
        from ...vidgen_core.media import read_image

        return read_image(current().find_input(image))


def save_pictures(images: Tensor, place: str, prefix: str, prompt: Any, extra: dict[str, Any] | None) -> dict[str, Any]:
    """PNG files with the workflow inside; what the node shows."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from ...vidgen_core.media import images_to_frames
    from ...vidgen_core.weights.save import atomic_path

    host = current()
    assert isinstance(host, ServerHost)
    shown = []
    tags = ({} if prompt is None else {"prompt": prompt}) | (extra or {})
    for frame in images_to_frames(images):
        path, subfolder = (host.output_path if place == "output" else host.temp_path)(prefix, ".png")
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


class LoadVideo:
    CATEGORY = "image/video"
    DESCRIPTION = "Reads a video of the input folder."
    RETURN_TYPES, FUNCTION = ("VIDEO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (current().inputs(VIDEO_ENDINGS), {"video_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        return found_input(file)

    @classmethod
    def IS_CHANGED(cls, file: str) -> float:
        return changed_at(file)

    def load(self, file: str) -> tuple[Video]:
        from ...vidgen_core.media import frames_to_images, read_video

        frames, fps = read_video(current().find_input(file))
        return (Video(frames_to_images(frames), fps),)


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
                "format": (["auto", "mp4", "webm"], {"default": "auto"}),
                "codec": (["auto", "h264", "vp9"], {"default": "auto"}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    def save(
        self,
        video: Video,
        filename_prefix: str,
        format: str = "auto",  # noqa: A002  the widget's name
        codec: str = "auto",
        prompt: Any = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        from ...vidgen_core.media import images_to_frames

        is_webm = format == "webm" or (format == "auto" and codec == "vp9")
        frames = told(images_to_frames(video.images), len(video.images), current())
        ending = "webm" if is_webm else "mp4"
        return saved(frames, video.fps, filename_prefix, ending, CRF, prompt, extra_pnginfo)


class LoadAudio:
    CATEGORY = "audio"
    DESCRIPTION = "Reads a sound file of the input folder."
    RETURN_TYPES, FUNCTION = ("AUDIO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"audio": (current().inputs(AUDIO_ENDINGS), {"audio_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, audio: str) -> bool | str:
        return found_input(audio)

    @classmethod
    def IS_CHANGED(cls, audio: str) -> float:
        return changed_at(audio)

    def load(self, audio: str) -> tuple[dict[str, Any]]:
        return (read_audio(current().find_input(audio)),)


SAMPLE_RATE = 44100
MAX_AUDIO_S = 3600
"""1.3 GB as numbers"""


def read_audio(path: Path) -> dict[str, Any]:
    """A sound file as ComfyUI's AUDIO: ``waveform`` (1, 2, samples) in [-1, 1] at 44.1 kHz.

    Raises:
        FileError: it is damaged, holds no sound, or is too long.
    """
    import subprocess

    import imageio_ffmpeg
    import torch

    from ...vidgen_core.media import READ_ONLY_ITSELF

    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *READ_ONLY_ITSELF, "-i", str(path)]
    # A little more than is allowed, to know that there is more: silence of a year packs into a small file.
    wanted = ["-t", str(MAX_AUDIO_S + 1), "-f", "f32le", "-ac", "2", "-ar", str(SAMPLE_RATE), "-"]
    run = subprocess.run([*program, *wanted], capture_output=True)
    if run.returncode or not run.stdout:
        raise FileError("The sound cannot be read", given=path.name, expected="a file with sound that ffmpeg reads")
    if len(run.stdout) > MAX_AUDIO_S * SAMPLE_RATE * 8:
        raise FileError("The sound is too long", given=path.name, expected=f"at most {MAX_AUDIO_S // 60} minutes")
    samples = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32)
    return {"waveform": samples.view(-1, 2).T.contiguous()[None], "sample_rate": SAMPLE_RATE}


NODES: dict[str, type] = {
    "LoadImage": LoadImage,
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
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
    "LoadVideo": "Load Video",
    "GetVideoComponents": "Get Video Components",
    "CreateVideo": "Create Video",
    "SaveVideo": "Save Video",
    "LoadAudio": "Load Audio",
}
