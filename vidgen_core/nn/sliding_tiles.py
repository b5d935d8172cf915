"""Attention to a neighbourhood: video tokens look at the tiles around their own, and at all of the text.

The grid of video tokens is cut into tiles. A query sees a window of tiles around its tile; at the border the window is
moved inwards, so that every query sees equally many. Text sees everything. A window as large as the video is full
attention. The cost falls from L^2 to L times the window; what lies outside of it is no longer seen, so the video
changes: this is for long videos, and never on by itself. Source: Zhang et al. 2025, arXiv:2502.04507.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingsError
from .backends import TOLERANCE, Attend, by_groups, compare, compiled_flex, say_once, without_padding

Grid = tuple[int, int, int]
"""tokens along frames, rows and columns"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingTiles:
    """Sizes of the pattern along (frames, rows, columns)."""

    tile: Grid = (6, 8, 8)
    """tokens of a tile"""
    window: Grid = (3, 3, 3)
    """tiles that a query sees: odd, so that its own is in the middle"""

    def __post_init__(self) -> None:
        for name, sizes in (("tile", self.tile), ("window", self.window)):
            if len(sizes) != 3 or any(size < 1 for size in sizes):
                raise SettingsError(f"The {name} of the attention cannot be used", given=sizes, expected="sizes from 1")
        if any(size % 2 == 0 for size in self.window):
            raise SettingsError(
                "The window of the attention has no middle", given=self.window, expected="odd numbers of tiles"
            )

    def is_full(self, grid: Grid) -> bool:
        """Whether every token sees every other one."""
        return all(-(-size // tile) <= window for size, tile, window in zip(grid, self.tile, self.window, strict=True))


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive places of one axis that see the same places."""

    queries: slice
    keys: slice


def spans(size: int, tile: int, window: int) -> list[_Span]:
    """The spans of one axis. Tiles near a border see the same window, and so count as one."""
    num_tiles = -(-size // tile)
    window = min(window, num_tiles)
    starts = [min(max(index - window // 2, 0), num_tiles - window) for index in range(num_tiles)]
    found = []
    for start, group in itertools.groupby(range(num_tiles), key=lambda index: starts[index]):
        tiles = list(group)
        queries = slice(tiles[0] * tile, min((tiles[-1] + 1) * tile, size))
        found.append(_Span(queries, slice(start * tile, min((start + window) * tile, size))))
    return found


def sliding(pattern: SlidingTiles, grid: Grid, dense: Attend) -> Attend:
    """Attention with a pattern over sequences of prod(grid) video tokens and then any number of text tokens.

    Args:
        dense: computes what is left; with a window as large as the video, everything.

    Returns:
        an ``Attend`` for q, k and v of the same tokens; masks are of keys alone (B, 1, 1, S).
    """
    if pattern.is_full(grid):
        return dense

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        groups = without_padding(mask)
        if groups is not None:
            return by_groups(attend, q, k, v, groups)
        if mask is None and _has_flex(q) and _is_flex_right(pattern, grid, dense, q, k, v):
            return flexed(pattern, grid, dense, q, k, v, compiled_flex(), BLOCK)
        return gathered(pattern, grid, dense, q, k, v, mask)

    return attend


def gathered(
    pattern: SlidingTiles, grid: Grid, dense: Attend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Each box of queries against a copy of the keys it sees; right on every device."""
    assert mask is None or mask.shape[1:3] == (1, 1), "the mask is of keys alone"
    num_video = grid[0] * grid[1] * grid[2]
    (q_video, q_text), (k_video, k_text), (v_video, v_text) = (_split(x, grid, num_video) for x in (q, k, v))
    m_video, m_text = (None, None) if mask is None else _split(mask.movedim(-1, 2), grid, num_video)
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    out_video = out[:, :, :num_video].unflatten(2, grid)
    for queries, keys in _boxes(pattern, grid):
        box_q = q_video[(..., *queries, slice(None))]
        seen = None if m_video is None or m_text is None else _joined(m_video, m_text, keys).movedim(2, -1)
        box = dense(box_q.flatten(2, 4), _joined(k_video, k_text, keys), _joined(v_video, v_text, keys), seen)
        out_video[(..., *queries, slice(None))] = box.unflatten(2, box_q.shape[2:5])
    if q_text.shape[2]:
        out[:, :, num_video:] = dense(q_text, k, v, mask)
    return out


def _split(x: Tensor, grid: Grid, num_video: int) -> tuple[Tensor, Tensor]:
    """(B, heads, L + M, d) -> video on its grid, text."""
    return x[:, :, :num_video].unflatten(2, grid), x[:, :, num_video:]


def _joined(video: Tensor, text: Tensor, box: tuple[slice, ...]) -> Tensor:
    return torch.cat([video[(..., *box, slice(None))].flatten(2, 4), text], dim=2)


def _boxes(pattern: SlidingTiles, grid: Grid) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """(queries, keys) of each box, as slices of the grid."""
    axes = [spans(*sizes) for sizes in zip(grid, pattern.tile, pattern.window, strict=True)]
    for box in itertools.product(*axes):
        yield tuple(span.queries for span in box), tuple(span.keys for span in box)


# --- FlexAttention ----------------------------------------------------------------------------------------------------

BLOCK = 128
"""tokens of a block of FlexAttention's kernels"""


def _has_flex(q: Tensor) -> bool:
    """Where FlexAttention can be compiled; elsewhere it would write all scores down."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and importlib.util.find_spec("triton") is not None
    )


_flex_verdicts: dict[tuple[Any, ...], bool] = {}


def _is_flex_right(pattern: SlidingTiles, grid: Grid, dense: Attend, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tried once per grid on one head, against the boxes computed one by one."""
    key = (pattern, grid, q.device, q.dtype, q.shape[-1])
    if key not in _flex_verdicts:
        problem = compare(
            lambda q, k, v: flexed(pattern, grid, dense, q, k, v, compiled_flex(), BLOCK),
            lambda q, k, v: gathered(pattern, grid, dense, q, k, v, None),
            [x[:1, :1] for x in (q, k, v)],
            TOLERANCE[q.dtype],
        )
        if problem is not None:
            say_once(logging.WARNING, "sliding tiles on %s: FlexAttention is left out, %s", str(q.device), problem)
        _flex_verdicts[key] = problem is None
    return _flex_verdicts[key]


def flexed(
    pattern: SlidingTiles,
    grid: Grid,
    dense: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flex: Callable[..., Any],
    block: int,
) -> Tensor:
    """The pattern through ``flex``, which is FlexAttention; text queries see everything and need no pattern."""
    num_video = grid[0] * grid[1] * grid[2]
    num_text = k.shape[2] - num_video
    queries = tile_order(pattern, grid, 0, q.device, block)
    keys = tile_order(pattern, grid, num_text, q.device, block)
    mask = block_mask(pattern, grid, num_text, q.device, block)
    video = flex(q[:, :, queries.places], k[:, :, keys.places], v[:, :, keys.places], block_mask=mask)
    video = video[:, :, queries.back]
    text = q[:, :, num_video:]
    return video if text.shape[2] == 0 else torch.cat([video, dense(text, k, v, None)], dim=2)


@dataclass(frozen=True, slots=True)
class TileOrder:
    """The tokens put tile by tile, each tile and the text filled up to whole blocks."""

    places: Tensor
    """(S',) long: which token is at each place; at filled-up places the first one"""
    is_real: Tensor
    """(S',) bool"""
    back: Tensor
    """(S,) long: where each token went"""
    tile_of: Tensor
    """(S',) long: number of the tile; the text is one more"""


@lru_cache(maxsize=8)
def tile_order(pattern: SlidingTiles, grid: Grid, num_text: int, device: torch.device, block: int) -> TileOrder:
    num_video = grid[0] * grid[1] * grid[2]
    index = torch.arange(num_video).view(grid)
    tiles = [
        index[tuple(slice(start, start + size) for start, size in zip(corner, pattern.tile, strict=True))].flatten()
        for corner in _corners(pattern, grid)
    ]
    if num_text:
        tiles.append(torch.arange(num_video, num_video + num_text))
    places, is_real, tile_of = [], [], []
    for number, tokens in enumerate(tiles):
        fill = -len(tokens) % block
        places.append(torch.cat([tokens, tokens.new_zeros(fill)]))
        is_real.append(torch.arange(len(tokens) + fill) < len(tokens))
        tile_of.append(torch.full((len(tokens) + fill,), number))
    all_places, all_real = torch.cat(places), torch.cat(is_real)
    back = torch.empty(num_video + num_text, dtype=torch.long)
    back[all_places[all_real]] = all_real.nonzero().flatten()
    return TileOrder(all_places.to(device), all_real.to(device), back.to(device), torch.cat(tile_of).to(device))


def _corners(pattern: SlidingTiles, grid: Grid) -> list[tuple[int, ...]]:
    """The first token of each tile."""
    return list(itertools.product(*(range(0, size, tile) for size, tile in zip(grid, pattern.tile, strict=True))))


def visible(pattern: SlidingTiles, grid: Grid) -> Tensor:
    """(tiles, tiles + 1) bool: which tiles the queries of a tile see; the last one is the text."""
    corners = _corners(pattern, grid)
    sees = torch.zeros(len(corners), len(corners) + 1, dtype=torch.bool)
    sees[:, -1] = True
    for box in _boxes(pattern, grid):
        queries, keys = (
            torch.tensor([all(s.start <= c < s.stop for s, c in zip(part, corner, strict=True)) for corner in corners])
            for part in box
        )
        sees[:, :-1] |= queries[:, None] & keys[None, :]
    return sees


@lru_cache(maxsize=4)
def block_mask(pattern: SlidingTiles, grid: Grid, num_text: int, device: torch.device, block: int) -> Any:
    """FlexAttention's description of the pattern over :func:`tile_order`, made block by block, not token by token."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    queries, keys = (tile_order(pattern, grid, number, device, block) for number in (0, num_text))
    sees = visible(pattern, grid).to(device)
    seen = sees[queries.tile_of[::block]][:, keys.tile_of[::block]]
    is_whole = keys.is_real.view(-1, block).all(dim=1)

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return keys.is_real[key] & sees[queries.tile_of[query], keys.tile_of[key]]

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each row sees, and which, those first."""
        which = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(dim=1, dtype=torch.int32)[None, None], which.int()[None, None]

    return flex.BlockMask.from_kv_blocks(
        *listed(seen & ~is_whole),
        *listed(seen & is_whole),
        BLOCK_SIZE=block,
        mask_mod=allowed,
    )
