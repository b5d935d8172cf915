"""Pictures: from a file, to a size, as the first frame of a video, and a frame around a video to be filled."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from .video import changed_at, found_input
from .wires import (
    CATEGORY,
    COND,
    KEYFRAMES,
    MODEL,
    VAE,
    EncodedPrompt,
    GivenImages,
    PlacedImage,
    codec_latent,
    kept_latent,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("vidgen")

FITS = ["crop", "pad", "stretch"]
FIT = (
    FITS,
    {
        "default": "crop",
        "tooltip": "How it comes to its size: crop cuts the longer side, pad puts black bars beside, stretch distorts.",
    },
)


def size_input(default: int, tooltip: str, *, step: int = 16) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": step, "max": 8192, "step": step, "tooltip": tooltip}


class LoadImage:
    CATEGORY = f"{CATEGORY}/image"
    DESCRIPTION = "Reads a picture. Where it is transparent the mask is white."
    SEARCH_ALIASES = ["import image", "image input", "load mask"]
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "mask")
    OUTPUT_TOOLTIPS = ("The picture without its transparency.", "White where the picture is transparent.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        from .host import IMAGE_ENDINGS, current

        tooltip = "A file in the input folder; in the headless host a path."
        names = current().inputs(IMAGE_ENDINGS)
        return {"required": {"image": (names, {"image_upload": True, "tooltip": tooltip})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return found_input(image)

    @classmethod
    def IS_CHANGED(cls, image: str) -> float:
        return changed_at(image)

    def load(self, image: str) -> tuple[Tensor, Tensor]:
        from ..vidgen_core.media import read_image
        from .host import current

        return read_image(current().find_input(image))


class FitImages:
    CATEGORY = f"{CATEGORY}/image"
    DESCRIPTION = "Brings images or the frames of a video to a size."
    SEARCH_ALIASES = ["resize", "scale", "crop", "image scale"]
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The images at the new size.",)
    FUNCTION = "resize"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "One or many."}),
                "width": size_input(64, "New width in px.", step=8),
                "height": size_input(64, "New height in px.", step=8),
                "fit": FIT,
            }
        }

    def resize(self, images: Tensor, width: int, height: int, fit: Any) -> tuple[Tensor]:
        return (fitted(images, width, height, fit),)


def fitted(images: Tensor, width: int, height: int, fit: Any) -> Tensor:
    """IMAGE (N, H, W, C) at another size."""
    from ..vidgen_core.keyframes import fit_images

    return fit_images(images.movedim(-1, 1), height, width, fit).movedim(1, -1).contiguous()


class ImageToVideo:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "Lets the video begin with an image. Needs a model that was trained for it."
    SEARCH_ALIASES = ["img2vid", "i2v", "first frame", "start image", "hunyuan image to video"]
    RETURN_TYPES = (COND, "LATENT")
    RETURN_NAMES = ("positive", "latent")
    OUTPUT_TOOLTIPS = ("The prompt with the image, for the sampler.", "Empty latents of the size, for the sampler.")
    FUNCTION = "prepare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sizes = (
            "exact: width and height as they are. nearest: the nearest that the model can make, also of num_frames. "
            "image: the size of the image. 720p, 540p, 360p: HunyuanVideo's size of that class for the image's shape."
        )
        modes = (
            "stability keeps motion close to the image; dynamic moves more (shift 17 where the sampler's shift is 0)."
        )
        methods = (
            "How the network is given the image: auto, as its file says. token_replace: for HunyuanVideo-I2V v2, whose "
            "file does not say it. raw_latents: CogVideoX1.5 as its official code is told the image. noisy: "
            "CogVideoX-Fun 1.1 of 5B from a single file, for more motion."
        )
        frames = {"default": 17, "min": 1, "max": 1025, "step": 4, "tooltip": "Frames of the video: 5, 9, 13, 17, ..."}
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The diffusion network."}),
                "vae": (VAE, {"tooltip": "The VAE of the same model."}),
                "positive": (COND, {"tooltip": "What the video should show and how it goes on."}),
                "image": ("IMAGE", {"tooltip": "The first frame. Of several images the first is taken."}),
                "width": size_input(64, "Width in px, a multiple of 16; read where size is exact or nearest."),
                "height": size_input(64, "Height in px, a multiple of 16; read where size is exact or nearest."),
                "num_frames": ("INT", frames),
                "size": (["exact", "nearest", "image", "720p", "540p", "360p"], {"default": "exact", "tooltip": sizes}),
                "fit": FIT,
                "mode": (["stability", "dynamic"], {"default": "stability", "tooltip": modes}),
                "method": (["auto", "token_replace", "raw_latents", "noisy"], {"default": "auto", "tooltip": methods}),
                "batch_size": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Videos at once; video i has the seed + i."},
                ),
            }
        }

    def prepare(
        self,
        model: Any,
        vae: Any,
        positive: EncodedPrompt,
        image: Tensor,
        width: int,
        height: int,
        num_frames: int,
        size: str,
        fit: Any,
        mode: str,
        method: str,
        batch_size: int,
    ) -> dict[str, Any]:
        from dataclasses import replace

        import torch

        from ..vidgen_core.generate import encode_pictures, image_method, image_mode
        from ..vidgen_core.keyframes import Keyframe, picture
        from ..vidgen_core.memory.cancel import watched
        from ..vidgen_core.types import VideoShape
        from .host import current

        picture(image)  # refused before anything is resized
        patch = model.family.patch(model.config)
        wanted = VideoShape(num_frames=num_frames, height_px=height, width_px=width)
        shape, note = chosen_size(wanted, image, size, vae.grid, patch)
        shape.check(vae.grid, patch=patch)
        image_mode(model, mode)
        first = Keyframe(image=picture(fitted(image[:1], shape.width_px, shape.height_px, fit)))
        rules, config = model.family.keyframes, image_method(model, method)(model.config)
        rules.check(config, [first], shape.num_frames)
        current().need(vae)
        with watched(current(), vae):
            keyframes = encode_pictures(rules, config, vae, [first], shape)
        given = GivenImages(keyframes=tuple(keyframes), method=method, mode=mode)
        latent = codec_latent(vae, torch.zeros(batch_size, *shape.latent_shape(vae.grid)))
        return noted((replace(positive, images=given), latent), note)


class PlaceKeyframe:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "A picture at a frame of the video. Several in a row are the keyframes of one video."
    SEARCH_ALIASES = ["keyframe", "last frame", "end frame", "start end image", "flf2v", "frame position"]
    RETURN_TYPES = (KEYFRAMES,)
    RETURN_NAMES = ("keyframes",)
    OUTPUT_TOOLTIPS = ("This picture and those before it, for Keyframes to Video or the next Keyframe.",)
    FUNCTION = "place"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        frame = "Frame of the video, counted from 0; -1 is the last one, -5 four frames before it."
        strength = "1: the video shows this picture; below, it is only drawn towards it."
        until = "The time at which the picture lets go: 0 never, 0.3 for the last part of the run, 1 is noise."
        share = {"min": 0.0, "max": 1.0, "step": 0.05, "round": 0.001}
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "The picture. Of several images the first is taken."}),
                "frame": ("INT", {"default": 0, "min": -1025, "max": 1024, "tooltip": frame}),
                "strength": ("FLOAT", share | {"default": 1.0, "tooltip": strength}),
                "until": ("FLOAT", share | {"default": 0.0, "tooltip": until}),
            },
            "optional": {"keyframes": (KEYFRAMES, {"tooltip": "The keyframes that this one joins."})},
        }

    def place(
        self,
        image: Tensor,
        frame: int,
        strength: float,
        until: float,
        keyframes: tuple[PlacedImage, ...] = (),
    ) -> tuple[tuple[PlacedImage, ...]]:
        from ..vidgen_core.keyframes import picture

        picture(image)  # refused here, where the wire is seen
        return ((*keyframes, PlacedImage(image=image[:1], frame=frame, strength=strength, until=until)),)


class KeyframesToVideo:
    CATEGORY = f"{CATEGORY}/conditioning"
    DESCRIPTION = "Makes a video that shows pictures at the frames of your choice. Works with every model."
    SEARCH_ALIASES = ["keyframes", "timeline", "first last frame", "start end frame", "interpolate images"]
    RETURN_TYPES = (COND, "LATENT")
    RETURN_NAMES = ("positive", "latent")
    OUTPUT_TOOLTIPS = ("The prompt, with the pictures that the network takes.", "Latents with the other pictures.")
    FUNCTION = "prepare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = ImageToVideo.INPUT_TYPES()["required"]
        del inputs["image"]
        keyframes = KEYFRAMES, {"tooltip": "Pictures and their frames, from Keyframe."}
        return {"required": inputs | {"keyframes": keyframes}}

    def prepare(
        self,
        model: Any,
        vae: Any,
        positive: EncodedPrompt,
        keyframes: tuple[PlacedImage, ...],
        width: int,
        height: int,
        num_frames: int,
        size: str,
        fit: Any,
        mode: str,
        method: str,
        batch_size: int,
    ) -> dict[str, Any]:
        from dataclasses import replace

        import torch

        from ..vidgen_core.generate import encode_pictures, image_method, image_mode
        from ..vidgen_core.keyframes import kept_frames, latent_places, taken_by_network
        from ..vidgen_core.memory.cancel import watched
        from ..vidgen_core.types import VideoShape
        from .host import current

        patch = model.family.patch(model.config)
        wanted = VideoShape(num_frames=num_frames, height_px=height, width_px=width)
        shape, note = chosen_size(wanted, keyframes[0].image, size, vae.grid, patch)
        shape.check(vae.grid, patch=patch)
        image_mode(model, mode)
        given = [at_size(placed, shape, fit) for placed in keyframes]
        latent_places(given, shape, vae.grid)
        rules, config = model.family.keyframes, image_method(model, method)(model.config)
        taken, others = taken_by_network(lambda some: rules.check(config, some, shape.num_frames), given)
        rules.check(config, taken, shape.num_frames)  # a network may not do without
        current().need(vae)
        with watched(current(), vae):
            told = encode_pictures(rules, config, vae, taken, shape)
            kept = kept_frames(vae, others, shape)
        images = GivenImages(keyframes=tuple(told), method=method, mode=mode) if told else None
        empty = codec_latent(vae, torch.zeros(batch_size, *shape.latent_shape(vae.grid)))
        latent = kept_latent(vae, kept, batch_size) if others else empty
        return noted((replace(positive, images=images), latent), note)


def at_size(placed: PlacedImage, shape: Any, fit: Any) -> Any:
    """A picture as a Keyframe of a video of ``shape``."""
    from ..vidgen_core.keyframes import Keyframe, picture

    image = picture(fitted(placed.image, shape.width_px, shape.height_px, fit))
    return Keyframe(image=image, frame=placed.frame, strength=placed.strength, until=placed.until)


def chosen_size(wanted: Any, image: Tensor, size: str, grid: Any, patch: Any) -> tuple[Any, str]:
    """(the VideoShape that ``size`` stands for, what was changed in words)."""
    from dataclasses import replace

    from ..vidgen_core.keyframes import bucket_for

    if size == "exact":
        return wanted, ""
    height, width = image.shape[1:3]
    if size == "image":
        wanted = replace(wanted, height_px=height, width_px=width)
    elif size != "nearest":
        height_px, width_px = bucket_for(height, width, size)
        wanted = replace(wanted, height_px=height_px, width_px=width_px)
    shape = wanted.nearest(grid, patch=patch)
    note = f"{shape.num_frames} frames of {shape.width_px} x {shape.height_px} px"
    if shape != wanted:
        note += f", the nearest to {wanted.num_frames} frames of {wanted.width_px} x {wanted.height_px} px"
    return shape, note


def noted(result: tuple[Any, ...], note: str) -> dict[str, Any]:
    """A node's outputs with a line of text that the host shows, and that goes into the log."""
    if not note:
        return {"result": result}
    log.warning("%s", note)
    return {"ui": {"text": (note,)}, "result": result}


class PadVideo:
    CATEGORY = f"{CATEGORY}/video"
    DESCRIPTION = "Puts a border around a video, and makes the mask under which a sampler fills it."
    SEARCH_ALIASES = ["outpaint", "pad image for outpainting", "expand", "uncrop"]
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("images", "mask")
    OUTPUT_TOOLTIPS = ("The frames with a border that repeats their edges.", "White where the video is made new.")
    FUNCTION = "pad"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def border(side: str, default: int = 0) -> tuple[str, dict[str, Any]]:
            return "INT", {"default": default, "min": 0, "max": 4096, "step": 8, "tooltip": f"New px on the {side}."}

        overlap = "How far the mask reaches into the old picture, in px, so that its edge does not show."
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The frames of one video."}),
                "left": border("left", 16),
                "top": border("top"),
                "right": border("right", 16),
                "bottom": border("bottom"),
                "overlap": ("INT", {"default": 8, "min": 0, "max": 1024, "step": 8, "tooltip": overlap}),
            }
        }

    def pad(self, images: Tensor, left: int, top: int, right: int, bottom: int, overlap: int) -> tuple[Tensor, Tensor]:
        import torch

        from ..vidgen_core.errors import SettingsError

        if not any((left, top, right, bottom)):
            raise SettingsError(
                "There is no border to fill", given="0 px on every side", expected="8 px or more on one"
            )
        frames = images[..., :3].movedim(-1, 1)
        padded = torch.nn.functional.pad(frames, (left, right, top, bottom), mode="replicate").movedim(1, -1)
        height, width = padded.shape[1:3]
        mask = torch.ones(1, height, width)
        # On a side without a border the old picture reaches to the edge, and so does what is kept.
        begin_y, begin_x = top + overlap * bool(top), left + overlap * bool(left)
        end_y, end_x = height - bottom - overlap * bool(bottom), width - right - overlap * bool(right)
        if begin_y >= end_y or begin_x >= end_x:
            raise SettingsError(
                "The mask would cover the whole picture",
                given=f"overlap {overlap} px in a video of {images.shape[2]} x {images.shape[1]} px",
                do="use a smaller overlap",
            )
        mask[:, begin_y:end_y, begin_x:end_x] = 0
        return padded.contiguous(), mask
