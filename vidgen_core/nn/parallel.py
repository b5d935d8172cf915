"""One video on several processes: each holds a part of the video tokens and all of the text (context parallelism).

Everything but attention works on tokens one by one, so it is done on a part as on the whole. Attention needs all keys:

* Ulysses: before it, the processes exchange parts, so that each has all tokens of some heads; after it, back again.
  Source: Jacobs et al. 2023, arXiv:2309.14509.
* Ring: keys and values travel once round all processes, and each adds up what its queries see, by the logarithms of the
  sums. Works with any number of heads. Source: Liu et al. 2023, arXiv:2310.01889.

Every frame is cut in the same way, along its rows and columns. So all parts are equally large, vectors per frame serve
all of them, and a single frame can be split, too. Where the cut leaves a rest, a frame is filled up with tokens that
nobody looks at. The result is that of one process, up to the rounding of sums in another order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SettingsError, unknown_name
from .attention import attending_with, current
from .backends import MAX_SCORE_BYTES, Attend, Dispatcher, key_groups, needs_gradients, with_lse
from .joint_blocks import JointContext, ThroughBlocks, around_blocks
from .sliding_tiles import Grid

Method = Literal["auto", "ulysses", "ring"]
METHODS: tuple[Method, ...] = get_args(Method)
PATIENCE = timedelta(hours=1)
"""how long a process waits for the others, which may be reading their weights; who watches them ends it earlier"""


@dataclass(frozen=True, slots=True)
class Team:
    """The processes that make one video together, as this one sees them. The default process group must exist."""

    rank: int
    size: int
    method: Method = "auto"

    def __post_init__(self) -> None:
        check_method(self.method)

    @classmethod
    def of_group(cls, method: Method = "auto") -> Team:
        """All processes of the default group."""
        return cls(dist.get_rank(), dist.get_world_size(), method)

    @property
    def leads(self) -> bool:
        """Whether this process decodes and writes the result."""
        return self.rank == 0


_team: ContextVar[Team | None] = ContextVar("vidgen_team", default=None)


def current_team() -> Team | None:
    """The processes that networks are split over now; None for this one alone."""
    return _team.get()


@contextlib.contextmanager
def in_team(team: Team | None) -> Iterator[None]:
    """Split networks over a team within this block; each of its processes must do the same with the same inputs."""
    token = _team.set(team)
    try:
        yield
    finally:
        _team.reset(token)


def check_method(method: str) -> None:
    if method not in METHODS:
        raise unknown_name("way of context parallelism", method, METHODS)


def choose_method(method: Method, num_heads: int, size: int) -> Literal["ulysses", "ring"]:
    """Ulysses moves less and keeps the fastest kernels, but each process needs whole heads.

    Raises:
        SettingsError: Ulysses was asked for and the heads cannot be dealt out.
    """
    check_method(method)
    if method == "ulysses" and num_heads % size:
        raise SettingsError(
            "The network's heads cannot be dealt out evenly",
            given=f"ulysses with {num_heads} heads and {size} processes",
            expected=f"a number of processes that divides {num_heads}",
            do="choose ring or auto, or another number of processes",
        )
    if method == "auto":
        return "ring" if num_heads % size else "ulysses"
    return method


# --- splitting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Split:
    """How the tokens of a grid are dealt out: of every frame, the columns of its list of tokens."""

    grid: Grid
    size: int

    @property
    def frames(self) -> int:
        return self.grid[0]

    @property
    def area(self) -> int:
        """Tokens of a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def share(self) -> int:
        """Tokens of a frame that each process holds, filled up where needed."""
        return -(-self.area // self.size)

    def num_real(self, rank: int) -> int:
        """Those of them that exist."""
        return min(max(self.area - rank * self.share, 0), self.share)

    def take(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The part of a process: L tokens along ``dim`` -> frames * share, zeros where there are none."""
        per_frame = x.unflatten(dim, (self.frames, self.area))
        first = min(rank * self.share, self.area)
        part = per_frame.narrow(dim + 1, first, self.num_real(rank))
        missing = self.share - self.num_real(rank)
        if missing:
            part = F.pad(part, [0, 0] * (x.ndim - dim - 1) + [0, missing])
        return part.flatten(dim, dim + 1)

    def real(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """A part without what it was filled up with."""
        if self.num_real(rank) == self.share:
            return x
        per_frame = x.unflatten(dim, (self.frames, self.share))
        return per_frame.narrow(dim + 1, 0, self.num_real(rank)).flatten(dim, dim + 1)

    def join(self, parts: Tensor, dim: int) -> Tensor:
        """(size, ...) parts of all processes with frames * share tokens along ``dim`` (not counting the first) -> L."""
        per_frame = parts.unflatten(dim + 1, (self.frames, self.share)).movedim(0, dim + 1)
        return per_frame.flatten(dim + 1, dim + 2).narrow(dim + 1, 0, self.area).flatten(dim, dim + 1)


# --- exchanging -------------------------------------------------------------------------------------------------------


def _bytes(x: Tensor) -> Tensor:
    """The same memory as numbers that every backend can send."""
    return x.contiguous().view(-1).view(torch.uint8)


def exchange(x: Tensor) -> Tensor:
    """x[r] goes to process r; the result's [r] came from it. (size, ...) -> the same shape."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(_bytes(out), _bytes(x))
    return out


def gather(x: Tensor, size: int) -> Tensor:
    """Everybody's ``x``: (...) -> (size, ...)."""
    out = x.new_empty(size, *x.shape)
    dist.all_gather(list(_bytes(out).chunk(size)), _bytes(x))
    return out


class _Passing:
    """A tensor on its way to the next process, and the previous one's on its way here."""

    def __init__(self, x: Tensor, team: Team) -> None:
        self._sent = x.contiguous()  # it must live until it has left
        self._coming = torch.empty_like(self._sent)
        to, source = (team.rank + 1) % team.size, (team.rank - 1) % team.size
        moves = [
            dist.P2POp(dist.isend, _bytes(self._sent), to),
            dist.P2POp(dist.irecv, _bytes(self._coming), source),
        ]
        self._works = dist.batch_isend_irecv(moves)

    def arrived(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._coming


# --- attention --------------------------------------------------------------------------------------------------------


def ulysses(team: Team, split: Split, local: Attend) -> Attend:
    """Attention over tokens that are split: q, k, v (B, heads, part + M, d), the part first; the mask is of all keys.

    Args:
        local: computes (B, heads / size, L + M, d), with the tokens in the order of the whole.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert not needs_gradients(q, k, v), "gradients do not flow between processes"
        num_part = split.frames * split.share
        heads = q.shape[1] // team.size
        own = slice(team.rank * heads, (team.rank + 1) * heads)
        # (size, 3, B, heads / size, part, d): group r of the heads goes to process r
        video = torch.stack([x[:, :, :num_part].unflatten(1, (team.size, heads)).movedim(1, 0) for x in (q, k, v)], 1)
        whole = split.join(exchange(video), dim=3)
        q, k, v = (torch.cat([x, t[:, own, num_part:]], dim=2) for x, t in zip(whole, (q, k, v), strict=True))
        out = local(q, k, v, mask)
        num_video = split.frames * split.area
        parts = torch.stack([split.take(out[:, :, :num_video], rank, dim=2) for rank in range(team.size)])
        back = exchange(parts).movedim(0, 1).flatten(1, 2)
        text = gather(out[:, :, num_video:], team.size).movedim(0, 1).flatten(1, 2)
        return torch.cat([back, text], dim=2)

    return attend


def ring(team: Team, split: Split, max_score_bytes: int = MAX_SCORE_BYTES) -> Attend:
    """As :func:`ulysses`, with whole heads everywhere and keys and values that travel.

    Text is looked at where it is first met, at home. Its own queries go along with those of the part.
    """
    at_home: list[tuple[Tensor, Tensor]] = []  # the mask of all keys, and that of the keys here: one for all layers

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert not needs_gradients(q, k, v), "gradients do not flow between processes"
        num_part = split.frames * split.share
        k_text, v_text = k[:, :, num_part:], v[:, :, num_part:]
        if mask is not None and not (at_home and at_home[0][0] is mask):
            at_home[:] = [(mask, _mask_at_home(mask, split, team.rank))]
        passing = torch.stack([k[:, :, :num_part], v[:, :, :num_part]])
        total: tuple[Tensor, Tensor] | None = None
        for step in range(team.size):
            coming = _Passing(passing, team) if step < team.size - 1 else None
            owner = (team.rank - step) % team.size
            keys, values = split.real(passing, owner, dim=3)
            seen = None
            if step == 0:
                keys, values = torch.cat([keys, k_text], dim=2), torch.cat([values, v_text], dim=2)
                seen = None if mask is None else at_home[0][1]
            if keys.shape[2]:
                total = _sum_up(total, q, keys, values, seen, max_score_bytes)
            if coming is not None:
                passing = coming.arrived()
        assert total is not None, "there are tokens somewhere"
        return total[0].to(q.dtype)

    return attend


def _mask_at_home(mask: Tensor, split: Split, rank: int) -> Tensor:
    """Of the part's tokens, all of which may be looked at, and text."""
    assert mask.shape[1:3] == (1, 1), "the mask is of keys alone"
    return F.pad(mask[..., split.frames * split.area :], (split.frames * split.num_real(rank), 0), value=True)


def _sum_up(
    total: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int
) -> tuple[Tensor, Tensor]:
    """``total`` with some more keys; samples are done one group after the other where they see different ones."""
    if mask is None:
        some = with_lse(q, k, v, max_score_bytes=max_score_bytes)
    else:
        found = [
            with_lse(q[g.rows], k[g.rows, :, g.keys], v[g.rows, :, g.keys], max_score_bytes=max_score_bytes)
            if g.num_keys
            else _nothing(q[g.rows])
            for g in key_groups(mask)
        ]
        some = torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])
    return some if total is None else merge(total, some)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.float() * 0, q.new_full((*q.shape[:-1], 1), float("-inf"), dtype=torch.float32)


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention to some keys and attention to others, each with the logarithms of its sums -> to all of them."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    return out_a * (lse_a - lse).exp() + out_b * (lse_b - lse).exp(), lse


def _split_attention(team: Team, split: Split, local: Attend) -> Attend:
    """The method that suits the network's heads. A ring has no place for another ``local`` attention."""
    room = local.choice.max_score_bytes if isinstance(local, Dispatcher) else MAX_SCORE_BYTES
    methods = {"ulysses": ulysses(team, split, local), "ring": ring(team, split, room)}

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        method = choose_method(team.method, q.shape[1], team.size)
        if method == "ring" and not isinstance(local, Dispatcher):
            raise SettingsError(
                "Sliding tiles need all tokens of a head in one process",
                given=f"ring with {q.shape[1]} heads and {team.size} processes",
                do="use a number of processes that divides the heads, or turn the tiles off",
            )
        return methods[method](q, k, v, mask)

    return attend


# --- the transformation -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def split_over(network: nn.Module, team: Team | None) -> Iterator[None]:
    """Let each process of ``team`` work on its part of the video tokens; None or a team of one changes nothing.

    The network's inputs and outputs stay whole, and equal on all processes. A transformation that decides something by
    looking at the tokens must decide the same everywhere: here it sees a part of them.

    Raises:
        SettingsError: the network's blocks do not allow it, or, when it runs, its heads.
    """
    if team is None or team.size == 1:
        yield
        return

    def wrap(inner: ThroughBlocks, video: Tensor, text: Tensor, context: JointContext) -> Tensor:
        split = Split(context.grid, team.size)
        part = context.of_part(lambda x: split.take(x, team.rank, dim=0))
        with attending_with(_split_attention(team, split, current())):
            out = inner(split.take(video, team.rank, dim=1), text, part)
        return split.join(gather(out, team.size), dim=1)

    with around_blocks(network, wrap):
        yield


def start_team(rank: int, size: int, store: str, device: torch.device, method: Method = "auto") -> Team:
    """Join ``size`` processes that know of each other by a file; end with :func:`end_team`.

    Args:
        store: path of a file that does not exist yet, the same for all.
        device: of this process: a GPU of its own (NCCL), or the CPU (gloo).
    """
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=Path(store).resolve().as_uri(),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        **options,
    )
    return Team(rank, size, method)


def end_team() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
