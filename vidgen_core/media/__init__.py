"""Video files: frames streamed to and from ffmpeg, sound beside them, and the workflow that travels inside the file.

``formats`` says what can be written and how, ``write`` writes it, ``series`` writes numbered pictures, ``read`` reads,
``tags`` finds the workflow again, ``sound`` turns sound into ffmpeg's input and back, ``program`` runs ffmpeg, which
``imageio-ffmpeg`` brings: at the first video, never at import.
"""

from __future__ import annotations

from .formats import CODECS, FORMATS, Way, way_of, writable
from .frames import (
    crop_to_grid,
    frames_to_images,
    images_to_frames,
    images_to_video,
    open_image,
    read_image,
    video_to_images,
)
from .read import read_video
from .series import write_series
from .sound import Sound, read_sound, sound_of, span
from .tags import read_metadata
from .write import check_writable, write_video

__all__ = [
    "CODECS",
    "FORMATS",
    "Sound",
    "Way",
    "check_writable",
    "crop_to_grid",
    "frames_to_images",
    "images_to_frames",
    "images_to_video",
    "open_image",
    "read_image",
    "read_metadata",
    "read_sound",
    "read_video",
    "sound_of",
    "span",
    "video_to_images",
    "way_of",
    "writable",
    "write_series",
    "write_video",
]
