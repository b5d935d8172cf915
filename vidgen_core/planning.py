"""What a video will take before anything is loaded: headers, a size and a budget in, a plan out.

The network and the VAE are built on the meta device and run there, so that the figures follow the code. Which ways
there are is said here; :mod:`~vidgen_core.memory.plan` compares them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .bounded import Bound, Direction, LayeredCodec, smallest_budget
from .bounded import plan as plan_exact
from .bounded.planner import SLACK_BYTES
from .codec import Codec
from .families import Config, Family, Found
from .guidance import cfg
from .memory.cancel import check_cancelled
from .memory.host import memory_in_use
from .memory.live import Cost, LiveBytes, Work, cost_of, watched_memory
from .memory.place import AUTO, held_as, prepare_storage, resident_blocks
from .memory.plan import (
    Plan,
    Rates,
    StageWays,
    Way,
    choose,
    known_rates,
    least,
    nearest_sizes,
    room_on,
    too_large,
)
from .model import TextFiles, VideoModel, choose_dtype, denoiser, denoiser_pair, text_config_of
from .tiling import Tiling, tiled
from .types import Conditioning, Grid, VideoShape
from .weights.header import Header

Coding = Tiling | Bound | None
"""in tiles, exactly within a bound, or in one pass"""
LIBRARY_BYTES = 160_000_000
"""code and tables that loading text encoders and the first use of every kernel bring into memory"""
CODEC_BYTES = 3_000_000
"""code that a decoder's convolutions bring into memory when they first run"""
FRAME_SHARE = 0.75
"""stride of tiles over their size, as HunyuanVideo has it"""
TILES = ((256, 64), (256, 32), (128, 32), (128, 16), (64, 16), (64, 8))
"""px and frames of the tiles that are tried where one pass does not fit, the fastest first"""

BOUNDS = (4.0, 2.0, 1.4, 1.0)
"""times the smallest, within which exact coding is tried: the more room, the less is computed twice"""
Which = Literal["all", "best", "least"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be made."""

    shape: VideoShape
    num_videos: int = 1
    num_steps: int = 50
    evaluations: float = 1.0
    """of the denoiser for each step"""
    guided: bool = False
    """with true guidance: the network is asked with and without the prompt"""
    may_batch: bool = True
    """both in one forward, if there is room"""
    num_text_tokens: int = 64
    dtype: torch.dtype | None = None
    """of the weights; None chooses for the device"""
    storage: str = AUTO
    encodes_frames: int = 0
    """frames of a given picture or video that are encoded first"""
    decodes: bool = True


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """How the weights of a file lie in memory."""

    module: nn.Module
    """on the meta device, in the dtype that it will have"""
    num_bytes: int
    is_mapped: bool
    """they take memory when they are first used, not when they are loaded"""
    file_bytes: int
    blocks: tuple[int, ...]
    """bytes of each block that may be streamed"""
    file_blocks: tuple[int, ...]
    staging: tuple[int, ...]
    """as ``weights.load`` reckons it, for each block as the largest one that is streamed"""

    @classmethod
    def of(cls, header: Header, found: Found, device: torch.device, wish: Wish, *, streamed: bool) -> _Weights:
        part = found.family.parts[found.part]
        with torch.device("meta"):
            module = part.build(found.config, header.metadata)
        is_network = found.part == "network"
        dtype, held = held_as(wish.storage, wish.dtype) if is_network else (wish.dtype, None)
        if dtype is None:
            dtype = choose_dtype(header, device, streamed=streamed or held is not None)
        kinds = {info.dtype for info in header.tensors.values() if info.dtype.is_floating_point}
        is_mapped = device.type == "cpu" and found.layout == "native" and kinds <= {dtype or torch.float32}
        if dtype is None:
            dtype = max(kinds, key=lambda kind: kind.itemsize, default=torch.float32)
            is_mapped = device.type == "cpu" and found.layout == "native" and len(kinds) == 1
        module = module.to(dtype).eval().requires_grad_(False)
        lists = found.family.blocks if is_network else found.family.text.blocks.get(found.part, ())
        blocks = [block for path in lists for block in module.get_submodule(path).children()]
        numbers = [_numbers(block) for block in blocks]
        if held is not None:
            prepare_storage(module, held, lists, dtype)
        sizes = [_num_bytes(block) for block in blocks]
        per_number = header.num_bytes / max(1, header.num_parameters)

        def staging(modules: Counter[str], size: int) -> int:
            if device.type != "cpu":
                return 2 * size
            joined = 1 if found.layout == "native" else 2
            read = per_number * (modules.total() + joined * max(modules.values(), default=0))
            return size * (1 if held is None else 2) + round(read)

        return cls(
            module=module,
            num_bytes=_num_bytes(module),
            is_mapped=is_mapped and held is None,
            file_bytes=header.num_bytes,
            blocks=tuple(sizes),
            file_blocks=tuple(round(per_number * modules.total()) for modules in numbers),
            staging=tuple(map(staging, numbers, sizes)),
        )

    @property
    def outside(self) -> int:
        return self.num_bytes - sum(self.blocks)

    def streamed(self, num_kept: int) -> tuple[int, int, int]:
        """(room to ask for, bytes that stay, bytes that pass) with about this many blocks resident."""
        number = len(self.blocks)
        kept = {i for i in range(number) if (i + 1) * num_kept // number > i * num_kept // number}
        room = self.outside + sum(self.blocks[i] for i in kept)
        room += max((self.staging[i] for i in range(number) if i not in kept), default=0)
        kept = set(resident_blocks(self.blocks, self.staging, room - self.outside))
        rest = [i for i in range(number) if i not in kept]
        passing = max((self.blocks[i] + self.file_blocks[i] for i in rest), default=0)
        return room, self.outside + sum(self.blocks[i] for i in kept), passing


def _numbers(block: nn.Module) -> Counter[str]:
    """How many weights each of its modules has, by path."""
    modules: Counter[str] = Counter()
    for name, tensor in block.state_dict().items():
        modules[name.rpartition(".")[0]] += tensor.numel()
    return modules


def _num_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


# --- what runs --------------------------------------------------------------------------------------------------------


class _Remembering:
    """A codec on the meta device that runs every size once, and then only says what it cost."""

    def __init__(self, codec: Codec, module: nn.Module) -> None:
        self._codec, self._module = codec, module
        self.dtype = next(module.parameters()).dtype
        self.costs: dict[Any, Cost] = {}
        self.meter: LiveBytes | None = None

    @property
    def grid(self) -> Grid:
        return self._codec.grid

    def decode(self, latents: Tensor) -> Tensor:
        return self._run("decode", latents)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self._run("moments", video).chunk(2, dim=1)
        return mean, logvar

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.moments(video)[0]

    def _run(self, what: str, x: Tensor) -> Tensor:
        """Every size by itself: a smaller tile may go to another kernel, and take more."""
        key = what, x.dtype, *x.shape
        assert self.meter is not None
        if key not in self.costs:
            with self.meter.not_counting():
                like = torch.empty(x.shape, dtype=x.dtype, device="meta")
                cost = cost_of(getattr(self._codec, what), like, modules=[self._module])
            given = like.nbytes
            self.costs[key] = replace(cost, peak=cost.peak - given, with_weights=cost.with_weights - given)
        self.meter.skip(self.costs[key])
        return torch.zeros(self._result(what, x), dtype=self.dtype, device="meta")

    def bounded(self, what: str, x: Tensor, bound: int, work: Work) -> Tensor:
        """What takes ``bound`` bytes, the result among them."""
        assert self.meter is not None
        self.meter.skip(Cost(bound, work))
        return torch.zeros(self._result(what, x), dtype=self.dtype, device="meta")

    @property
    def layered(self) -> LayeredCodec | None:
        """The codec, if it can be run within a bound."""
        return self._codec if isinstance(self._codec, LayeredCodec) else None

    def _result(self, what: str, x: Tensor) -> tuple[int, ...]:
        grid = self.grid
        if what == "decode":
            return (len(x), 3, grid.num_frames(x.shape[2]), *(size * grid.spatial for size in x.shape[3:]))
        return (
            len(x),
            2 * grid.channels,
            grid.num_latent_frames(x.shape[2]),
            *(n // grid.spatial for n in x.shape[3:]),
        )

    def watch(self, run: Callable[[_Remembering], None]) -> Cost:
        """The cost of what ``run`` does with this codec."""
        with watched_memory(self._module) as self.meter:
            run(self)
        meter, self.meter = self.meter, None
        return Cost(meter.peak, meter.work, meter.weights, with_weights=meter.with_weights)


class _Exact:
    """A codec that decodes and encodes exactly within a bound, as far as its cost goes."""

    def __init__(self, codec: _Remembering, bound: int, work: Work) -> None:
        self._codec, self._bound, self._work = codec, bound, work
        self.grid = codec.grid

    def decode(self, latents: Tensor) -> Tensor:
        return self._codec.bounded("decode", latents, self._bound, self._work)

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self._codec.bounded("moments", video, self._bound, self._work).chunk(2, dim=1)
        return mean, logvar


def decode_cost(
    codec: _Remembering, latent_shape: Sequence[int], tiling: Coding, *, one_pass: Work | None = None
) -> Cost:
    """Of ``generate.decode_latents`` and of making an IMAGE of what it gives; latents (B, C, T, H, W).

    Args:
        one_pass: what one video takes in one pass; for a bound.
    """

    def run(remembering: _Remembering) -> None:
        latents = torch.zeros(*latent_shape, device="meta")
        way = _way(remembering, tiling, one_pass)
        videos = []
        for one in latents.split(1):
            videos.append(way.decode(one).float().clamp_(-1, 1))
        video = videos[0] if len(videos) == 1 else torch.cat(videos)
        videos.clear()
        images = video.permute(0, 2, 3, 4, 1).flatten(0, 1)
        images = images.add(1.0).div_(2.0).clamp_(0.0, 1.0)

    return codec.watch(run)


def encode_cost(codec: _Remembering, shape: VideoShape, tiling: Coding, *, one_pass: Work | None = None) -> Cost:
    """Of encoding a video of this size, in pixels of float32."""

    def run(remembering: _Remembering) -> None:
        video = torch.zeros(1, 3, shape.num_frames, shape.height_px, shape.width_px, device="meta")
        _way(remembering, tiling, one_pass).moments(video)

    return codec.watch(run)


def _way(codec: _Remembering, coding: Coding, one_pass: Work | None) -> Any:
    if coding is None:
        return codec
    if isinstance(coding, Tiling):
        return tiled(codec, coding)
    assert coding.budget_bytes is not None
    assert one_pass is not None
    # What a bound leaves to allocators and libraries is what a plan counts for every stage.
    return _Exact(codec, coding.budget_bytes - SLACK_BYTES, one_pass)


def sample_cost(
    family: Family,
    config: Config,
    network: nn.Module,
    latent_shape: Sequence[int],
    *,
    widths: tuple[int, int],
    num_text_tokens: int,
    guided: bool,
    batched: bool,
    at_once: int,
) -> Cost:
    """Of one evaluation of the denoiser for a batch of latents (B, C, T, H, W), ``at_once`` samples a forward."""
    model = VideoModel.of(family.name, config, network)
    frames = family.denoised_frames(config, latent_shape[2])
    latent_shape = (*latent_shape[:2], frames, *latent_shape[3:])
    batch, channels = latent_shape[:2]
    size = min(at_once, batch)
    told = _conditioning(config, channels, (size, *latent_shape[1:]), widths, num_text_tokens, padded=False)
    t = torch.tensor(0.5, dtype=torch.float64)

    def run(x: Tensor, *others: Tensor) -> None:
        part = x[:size]
        if not guided:
            denoiser(model, told)(part, t)
            return
        if batched:
            longer = _conditioning(config, channels, (size, *latent_shape[1:]), widths, num_text_tokens, padded=True)
            first, second = denoiser_pair(model, longer, longer)
        else:
            # The negative prompt has another length, for which tables and kernels are made and kept besides.
            shorter = _conditioning(
                config, channels, (size, *latent_shape[1:]), widths, max(1, num_text_tokens // 2), padded=False
            )
            first, second = denoiser(model, told), denoiser(model, shorter)
        cfg(first, second, 6.0)(part, t)

    # What a sampler has besides: the noise or the x0 before, and what the samples before this one gave.
    latents = [torch.zeros(*latent_shape, device="meta") for _ in range(3)]
    cost = cost_of(run, *latents, modules=[network])
    return replace(cost, work=cost.work * (batch / size))


def _conditioning(
    config: Config, channels: int, shape: Sequence[int], widths: tuple[int, int], num_tokens: int, *, padded: bool
) -> Conditioning:
    batch = shape[0]
    more = getattr(config, "in_channels", channels) - channels
    num_tokens = getattr(
        config, "text_length", num_tokens
    )  # of networks that are told all of them, whatever the prompt
    with torch.device("meta"):
        return Conditioning(
            context=torch.zeros(batch, num_tokens, widths[0]),
            context_mask=torch.zeros(batch, num_tokens, dtype=torch.bool) if padded else None,
            pooled=torch.zeros(batch, widths[1]),
            concat=torch.zeros(batch, more, *shape[2:]) if more > 0 else None,
            scalars={"guidance": torch.zeros(batch)},
        )


# --- the plan ---------------------------------------------------------------------------------------------------------


class Planner:
    """Plans for one model; what was found out of a size is kept.

    Args:
        headers, found: as ``bundle.find_parts`` gives them. Parts that are missing are left out of the plan.
        baseline_bytes: what the process takes before anything is loaded; None: what it takes now, and what the
            libraries will add.
    """

    def __init__(
        self,
        headers: Mapping[str, Header],
        found: Mapping[str, Found],
        *,
        device: torch.device | str = "cpu",
        rates: Rates | None = None,
        baseline_bytes: int | None = None,
    ) -> None:
        self.headers, self.found = dict(headers), dict(found)
        self.device = torch.device(device)
        self.rates = known_rates(self.device) if rates is None else rates
        now = memory_in_use(self.device) + library_bytes(self.device)
        self.baseline_bytes = now if baseline_bytes is None else baseline_bytes
        self.family = next(iter(self.found.values())).family
        self._known: dict[Any, Any] = {}

    def plan(self, wish: Wish, budget_bytes: int | None = None) -> Plan:
        """The fastest way within the budget; ``fits`` is false where there is none."""
        budget, subject = self._budget(budget_bytes), self._subject(wish)
        told = {"baseline_bytes": self.baseline_bytes, "subject": subject}
        best = choose(self.stages(wish, which="best"), budget, self.rates, **told)
        # The ways that take less are many, and to find them takes seconds: only where they are needed.
        return best if best.fits else choose(self.stages(wish), budget, self.rates, **told)

    def frames_alone(self, wish: Wish, budget_bytes: int | None = None) -> Plan:
        """Of writing the finished frames and nothing else: where that does not fit nothing does, and it is told at
        once."""
        stages = [StageWays(name="write", ways=[self._write_way(wish)])]
        told = {"baseline_bytes": self.baseline_bytes, "subject": self._subject(wish)}
        return choose(stages, self._budget(budget_bytes), self.rates, **told)

    def _budget(self, budget_bytes: int | None) -> int:
        return room_on(self.device) + memory_in_use(self.device) if budget_bytes is None else budget_bytes

    def _subject(self, wish: Wish) -> dict[str, Any]:
        return {
            "family": self.family.name,
            "frames": wish.shape.num_frames,
            "width": wish.shape.width_px,
            "height": wish.shape.height_px,
            "videos": wish.num_videos,
            "steps": wish.num_steps,
            "device": str(self.device),
        }

    def check(self, wish: Wish, budget_bytes: int | None = None) -> Plan:
        """:meth:`plan`; SettingsError with the nearest sizes that fit where there is no way."""
        plan = self.plan(wish, budget_bytes)
        if plan.fits:
            return plan

        raise too_large(wish.shape, plan, self.nearest(wish, plan.budget_bytes))

    def nearest(self, wish: Wish, budget_bytes: int) -> list[VideoShape]:
        """The longest video of this size that fits, and the largest of this length."""

        def fits(shape: VideoShape) -> bool:
            check_cancelled()
            return least(self.stages(replace(wish, shape=shape), which="least"), self.baseline_bytes) <= budget_bytes

        patch = self.family.patch(self.found["network"].config) if "network" in self.found else (1, 1, 1)
        return nearest_sizes(wish.shape, self.grid, patch, fits)

    @cached_property
    def grid(self) -> Grid:
        return self.family.grid(self.found["codec"].config)

    def stages(self, wish: Wish, *, which: Which = "all") -> list[StageWays]:
        """The stages of a render and the ways each can go, the fastest first; or that one only; or a few that end with
        the way that takes least."""
        parts = [part for part in self.found if part in self.family.text.parts]
        stages = []
        if parts:
            stages.append(StageWays(name="encode prompt", ways=self._text_ways(parts, wish)))
        if wish.encodes_frames and "codec" in self.found:
            stages.append(StageWays(name="encode video", ways=self._codec_ways(wish, "encode", which)))
        if "network" in self.found:
            stages.append(StageWays(name="sample", ways=self._sample_ways(wish)))
        if wish.decodes and "codec" in self.found:
            stages.append(StageWays(name="decode", ways=self._codec_ways(wish, "decode", which)))
            stages.append(StageWays(name="write", ways=[self._write_way(wish)]))
        return [replace(stage, ways=stage.ways[:1]) for stage in stages] if which == "best" else stages

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _weights(self, part: str, wish: Wish, *, streamed: bool = False) -> _Weights:
        key = "weights", part, wish.dtype, wish.storage, streamed
        header, found = self.headers[part], self.found[part]
        return self._kept(key, lambda: _Weights.of(header, found, self.device, wish, streamed=streamed))

    # --- text

    def _text_ways(self, parts: Sequence[str], wish: Wish) -> list[Way]:
        files: TextFiles = {part: (self.headers[part], self.found[part]) for part in parts}
        config = text_config_of(files)
        tokens = wish.num_text_tokens
        times = 2 if wish.guided else 1
        passing, flops = self.family.text.activation(config, tokens)
        ways = []
        for streamed in (False, True):
            weights = [self._weights(part, wish, streamed=streamed) for part in parts]
            blocks = [one for one in weights if one.blocks]
            if streamed and not blocks:
                continue
            loaded = touched = staging = 0
            for one in weights:
                stays = one.num_bytes
                if streamed and one.blocks:
                    _, stays, more = one.streamed(0)
                    staging = max(staging, more)
                loaded += 0 if one.is_mapped else stays
                touched += stays if one.is_mapped else 0
            ways.append(
                Way(
                    name="streamed" if streamed else "resident",
                    why="the encoders' layers are read as they run, and nothing of them is left when the network comes"
                    if streamed
                    else "the encoders' weights stay in memory",
                    passing=lambda staging=staging: staging + passing,
                    work=lambda: Work({"linear": times * flops}),
                    loaded=loaded,
                    touched=touched,
                    read=float(sum(one.file_bytes for one in weights) * (times if streamed else 1)),
                    settings={"stream": streamed},
                )
            )
        return ways

    # --- network

    def _sample_ways(self, wish: Wish) -> list[Way]:
        found = self.found["network"]
        shape = wish.shape.latent_shape(self.grid) if "codec" in self.found else None
        assert shape is not None, "the VAE says how large latents are"
        latent_shape = (wish.num_videos, *shape)
        at_once = 1 if self.device.type == "cpu" else wish.num_videos
        widths = self._text_widths(found.config)
        batchings = [True, False] if wish.guided and wish.may_batch else [False]

        def cost(batched: bool) -> Cost:
            key = "sample", latent_shape, wish.num_text_tokens, wish.guided, batched, wish.dtype
            network = self._weights("network", wish).module
            return self._kept(
                key,
                lambda: sample_cost(
                    self.family,
                    found.config,
                    network,
                    latent_shape,
                    widths=widths,
                    num_text_tokens=wish.num_text_tokens,
                    guided=wish.guided,
                    batched=batched,
                    at_once=at_once,
                ),
            )

        steps = wish.num_steps * wish.evaluations
        ways = []
        for num_kept, weights, room, stays, staging in self._network_places(wish):
            number = len(weights.blocks)
            for batched in batchings:
                where = "weights stay in memory" if num_kept == number else f"{num_kept} of {number} blocks stay"
                halves = ", with and without the prompt " + ("in one forward" if batched else "one after the other")
                read = weights.file_bytes + (steps - 1) * sum(weights.file_blocks) * (1 - num_kept / max(1, number))
                ways.append(
                    Way(
                        name=("resident" if num_kept == number else "streamed") + (", batched" if batched else ""),
                        why=where + (halves if wish.guided else "") + "; attention keeps no scores",
                        passing=lambda staging=staging, batched=batched: staging + cost(batched).peak,
                        work=lambda batched=batched: cost(batched).work * steps,
                        kept=lambda batched=batched: cost(batched).kept,
                        loaded=0 if weights.is_mapped else stays,
                        touched=stays if weights.is_mapped else 0,
                        read=read,
                        settings={"cfg_batched": batched, "room": room, "stream": room is not None},
                    )
                )
        return ways

    def _network_places(self, wish: Wish) -> list[tuple[int, _Weights, int | None, int, int]]:
        """(blocks that stay, weights, room to load them with, bytes that stay, bytes that pass), the most first."""
        resident = self._weights("network", wish)
        places: list[tuple[int, _Weights, int | None, int, int]] = [
            (len(resident.blocks), resident, None, resident.num_bytes, 0)
        ]
        weights = self._weights("network", wish, streamed=True)
        number = len(weights.blocks)
        for num_kept in sorted({number * share // 8 for share in range(8)}, reverse=True):
            room, stays, passing = weights.streamed(num_kept)
            if room < weights.num_bytes:
                places.append((num_kept, weights, room, stays, passing))
        return places

    def _text_widths(self, config: Config) -> tuple[int, int]:
        parts = {part: (self.headers[part], found) for part, found in self.found.items()}
        parts = {part: item for part, item in parts.items() if part in self.family.text.parts}
        if parts:
            return self.family.text.widths(text_config_of(parts))
        return config.text_width, config.pooled_width

    # --- codec

    def _codec_ways(self, wish: Wish, what: str, which: Which) -> list[Way]:
        shape = wish.shape
        weights = self._weights("codec", wish)
        if what == "encode":
            shape = replace(shape, num_frames=wish.encodes_frames)
        remembering = self._kept(
            ("codec", wish.dtype),
            lambda: _Remembering(self.family.codec(weights.module, self.found["codec"].config), weights.module),
        )

        codec_dtype = remembering.dtype

        def one_pass() -> Cost:
            return self._kept((what, "one", shape, codec_dtype), lambda: self._one_pass(remembering, what, shape))

        def passing(cost: Cost, coding: Coding) -> int:
            if not weights.is_mapped:
                return cost.peak
            return cost.peak + one_pass().weights if isinstance(coding, Bound) else cost.with_weights

        codings: list[tuple[str, str, Coding, float]] = [("one pass", "exact, and the fastest", None, 1.0)]
        if which != "best":
            bounds = self._exact(remembering, what, shape, BOUNDS if which == "all" else BOUNDS[-1:])
            codings += bounds[:-1]
            for tiling in self._tilings(shape):
                name = f"tiles of {tiling.tile_px} px and {tiling.tile_frames} frames"
                codings.append((name, "the largest tiles that fit; where they meet they are blended", tiling, 1.0))
            codings += bounds[-1:]  # slow, but nothing takes less
        # The first stage that uses the codec brings its weights.
        is_first = what == "encode" or not wish.encodes_frames
        ways = []
        for name, why, coding, times in codings:

            def cost(coding: Coding = coding, times: float = times) -> Cost:
                work = one_pass().work * times if isinstance(coding, Bound) else None
                if what == "encode":
                    return self._kept(
                        (what, shape, coding, codec_dtype),
                        lambda: encode_cost(remembering, shape, coding, one_pass=work),
                    )
                latent_shape = (wish.num_videos, *shape.latent_shape(self.grid))
                return self._kept(
                    (what, latent_shape, coding, codec_dtype),
                    lambda: decode_cost(remembering, latent_shape, coding, one_pass=work),
                )

            more = CODEC_BYTES if what == "decode" else 0
            ways.append(
                Way(
                    name=name,
                    why=why,
                    passing=lambda cost=cost, more=more, coding=coding: more + passing(cost(), coding),
                    work=lambda cost=cost: cost().work,
                    loaded=weights.num_bytes if is_first and not weights.is_mapped else 0,
                    settings={"tiling": coding},
                )
            )
        return ways

    def _one_pass(self, codec: _Remembering, what: str, shape: VideoShape) -> Cost:
        """Of one video; its memory is not asked for where it is bounded."""
        if what == "encode":
            return encode_cost(codec, shape, None)
        return decode_cost(codec, (1, *shape.latent_shape(self.grid)), None)

    def _exact(
        self, codec: _Remembering, what: str, shape: VideoShape, bounds: Sequence[float]
    ) -> list[tuple[str, str, Coding, float]]:
        """Bounds within which this video can be coded exactly, the fastest first."""
        layered = codec.layered
        if layered is None:
            return []
        direction: Direction = "encode" if what == "encode" else "decode"

        def reckon() -> list[tuple[str, str, Coding, float]]:
            smallest = smallest_budget(layered, direction, shape)
            found = []
            for times in bounds:
                check_cancelled()
                made = plan_exact(layered, direction, shape, math.ceil(times * smallest))
                bound, cost = made.peak_bytes, made.relative_cost
                why = f"what one pass gives, at {cost:.1f} times its work"
                found.append((f"exact within {bound / 1e6:.0f} MB", why, Bound(budget_bytes=bound), cost))
            return found

        return self._kept(("exact", what, shape, codec.dtype, *bounds), reckon)

    def _tilings(self, shape: VideoShape) -> list[Tiling]:
        """That cut this video; those of one size are left out."""
        found = []
        for tile_px, tile_frames in TILES:
            if max(shape.height_px, shape.width_px) <= tile_px and shape.num_frames <= tile_frames:
                continue
            found.append(_tiling(tile_px, tile_frames, self.grid))
        return found

    def _write_way(self, wish: Wish) -> Way:
        shape = wish.shape
        video = 4 * 3 * wish.num_videos * shape.num_frames * shape.height_px * shape.width_px
        frame = 4 * 3 * shape.height_px * shape.width_px
        return Way(
            name="frame by frame",
            why="frames go to ffmpeg one at a time, which is a process of its own",
            passing=lambda: video + 6 * frame,
            work=lambda: Work(moved=8.0 * video, num_ops=6 * shape.num_frames),
        )


def library_bytes(device: torch.device) -> int:
    """What libraries will add to a process that has not rendered yet."""
    return LIBRARY_BYTES if device.type == "cpu" else 0


def _tiling(tile_px: int, tile_frames: int, grid: Grid) -> Tiling:
    def stride(size: int, step: int) -> int:
        return max(step, math.floor(FRAME_SHARE * size / step) * step)

    return Tiling(
        tile_px=tile_px,
        stride_px=stride(tile_px, grid.spatial),
        tile_frames=tile_frames,
        stride_frames=stride(tile_frames, grid.temporal),
    )


def plan_video(
    headers: Mapping[str, Header], found: Mapping[str, Found], wish: Mapping[str, Any], budget_bytes: int | None = None
) -> dict[str, Any]:
    """:meth:`Planner.plan` for a program: plain values in, plain values out.

    Args:
        wish: width, height, frames, and any field of :class:`Wish` by name.

    Returns:
        ``Plan.to_dict``, with ``nearest``: the sizes that fit where this one does not.
    """
    fields = {name: value for name, value in wish.items() if name in Wish.__dataclass_fields__ and name != "shape"}
    shape = VideoShape(num_frames=wish["frames"], height_px=wish["height"], width_px=wish["width"])
    planner = Planner(headers, found)
    asked = Wish(shape=shape, **fields)
    plan = planner.plan(asked, budget_bytes)
    nearest = [] if plan.fits else planner.nearest(asked, plan.budget_bytes)
    sizes = [{"frames": one.num_frames, "width": one.width_px, "height": one.height_px} for one in nearest]
    return plan.to_dict() | {"nearest": sizes}
