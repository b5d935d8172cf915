"""Choose how attention is computed."""

from __future__ import annotations

from typing import Any

from .wires import CATEGORY, MODEL

FULL, TILES = "full", "sliding tiles"


def _size(default: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": default, "min": 1, "max": 255, "tooltip": tooltip}


def _window(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": 3, "min": 1, "max": 255, "step": 2, "tooltip": tooltip}


def _backends() -> list[str]:
    from ..vidgen_core.nn.backends import CHOICES

    return list(CHOICES)


class Attention:
    CATEGORY = f"{CATEGORY}/sampling"
    DESCRIPTION = (
        "Chooses the kernel that computes attention, and, for long videos, whether every part of the video looks at "
        "all of it or at its neighbourhood only."
    )
    SEARCH_ALIASES = ["sage attention", "sageattn", "flash attention", "xformers", "sdpa", "sliding tile", "sparse"]
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The network with the choice. The one that came in stays as it was.",)
    FUNCTION = "choose"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        backend_tooltip = (
            "auto takes the fastest exact one that is here and right. sageattn is faster and less exact: never taken "
            "by auto."
        )
        return {
            "required": {
                "model": (MODEL, {"tooltip": "The diffusion network."}),
                "backend": (_backends(), {"default": "auto", "tooltip": backend_tooltip}),
                "pattern": (
                    [FULL, TILES],
                    {"default": FULL, "tooltip": "sliding tiles is faster for long videos, and changes the video."},
                ),
                "tile_frames": _size(6, "Latent frames of a tile."),
                "tile_rows": _size(8, "Rows of a tile, 16 px each."),
                "tile_columns": _size(8, "Columns of a tile, 16 px each."),
                "window_frames": _window("Tiles seen along time, an odd number. As many as there are: all of them."),
                "window_rows": _window("Tiles seen from top to bottom, an odd number."),
                "window_columns": _window("Tiles seen from left to right, an odd number."),
                "max_score_mb": (
                    "INT",
                    {
                        "default": 512,
                        "min": 1,
                        "max": 1048576,
                        "tooltip": "Room in MB for kernels that write their scores down (CPU, MPS, old GPUs).",
                    },
                ),
            }
        }

    def choose(
        self,
        model: Any,
        backend: str,
        pattern: str,
        tile_frames: int,
        tile_rows: int,
        tile_columns: int,
        window_frames: int,
        window_rows: int,
        window_columns: int,
        max_score_mb: int,
    ) -> tuple[Any]:
        from ..vidgen_core.nn.backends import AttentionChoice
        from ..vidgen_core.nn.sliding_tiles import SlidingTiles

        tiles = SlidingTiles(
            tile=(tile_frames, tile_rows, tile_columns), window=(window_frames, window_rows, window_columns)
        )
        choice = AttentionChoice(
            backend=backend, tiles=tiles if pattern == TILES else None, max_score_bytes=max_score_mb * 2**20
        )
        return (model.with_attention(choice),)
