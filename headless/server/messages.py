"""What a server says over the WebSocket: events as JSON, previews as bytes.

The protocol is ComfyUI's: a text frame ``{"type", "data"}``; a binary frame that begins with its kind, big-endian.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PREVIEW_WITH_METADATA = 4
FEATURES = {
    "supports_preview_metadata": True,
    "supports_progress_text_metadata": True,
    "max_upload_size": 100 * 2**20,
    "node_replacements": False,
}


def text(event: str, data: Mapping[str, Any]) -> str:
    """A text frame. JavaScript's parser knows no NaN: such numbers become null."""
    return json.dumps({"type": event, "data": finite(data)}, default=repr)


def finite(value: Any) -> Any:
    """``value`` for JSON, with null for numbers that JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def preview(sheet: Image, *, prompt_id: str, node_id: str) -> bytes:
    """A binary frame with ``sheet`` as a JPEG."""
    names = {"node_id": node_id, "display_node_id": node_id, "real_node_id": node_id, "parent_node_id": None}
    about = json.dumps({"prompt_id": prompt_id, **names, "image_type": "image/jpeg"}).encode()
    picture = io.BytesIO()
    sheet.save(picture, "JPEG", quality=85)
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(about)) + about + picture.getvalue()
