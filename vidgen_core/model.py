"""A diffusion network with everything needed to ask it something: inference and training share :class:`VideoModel`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Stream, around_blocks, block_paths, forward_of
from .caching import CacheRun, CurveRecorder
from .codec import Codec
from .diffusion import Diffusion, fit, wide
from .errors import CheckpointError, SettingsError, unknown_name
from .families import FAMILIES, TITLES, Config, Family, Found, identify, identify_parts
from .lora import BlockStrengths, LoraUse, Mode, apply_loras, bind_to, can_merge, describe, module_names
from .memory.compiled import MODES, compiled, will_compile
from .memory.host import memory_in_use
from .memory.oom import Measure, relieved
from .memory.place import AS_FILE, AUTO, STORAGES, Storage, check_choice, held_as
from .memory.plan import planned, room_on, small_as_float32, too_large_to_stay
from .nn.backends import AttentionChoice
from .nn.joint_blocks import computing_attention
from .nn.parallel import current_team, split_over
from .nn.rope import TimeStretch, intrinsic_component, stretched_time
from .preview import METADATA_KEY as PREVIEW_KEY
from .preview import LatentRGB
from .text.tokenizer_files import TokenizerPlaces
from .tricks import Tricks
from .types import Conditioning, Defaults, Denoise, Grid, Held, VideoShape
from .weights.config import config_from_json
from .weights.header import Header, read_header
from .weights.load import load_module
from .weights.lora import Lora, read_lora
from .weights.lora_names import Report, looks_like, match

log = logging.getLogger("vidgen")


@dataclass(slots=True, kw_only=True)
class VideoModel:
    """The diffusion network of a family, its noise process, and what a user gets who says nothing."""

    family: Family
    config: Config
    network: nn.Module
    diffusion: Diffusion
    defaults: Defaults
    fingerprint: str = ""
    """of the checkpoint; a saved run is only taken up again with the same one"""
    preview: LatentRGB | None = None
    """how to show unfinished latents, if the checkpoint says so"""
    loras: tuple[LoraUse, ...] = ()
    """that are on the network inside :meth:`patched` and nowhere else, so that models may share it"""
    compile_mode: str | None = None
    """how the blocks are compiled inside :meth:`patched`, a name of ``memory.compiled.MODES``; None: they are not"""
    attention: AttentionChoice | None = None
    """how attention is computed inside :meth:`patched`; None leaves it as it is outside"""
    tricks: Tricks = Tricks()
    """step cache, weak passes, windows, ...: likewise around the network inside :meth:`patched` only"""

    @classmethod
    def of(cls, family: str, config: Config, network: nn.Module, **kwargs: Any) -> VideoModel:
        """Around a network that was built here, e.g. for training. More fields may be given by name."""
        record = FAMILIES[family]
        fields = {"diffusion": record.diffusion(config), "defaults": record.defaults(config), **kwargs}
        return cls(family=record, config=config, network=network, **fields)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def grid(self) -> Grid:
        """How pixels map to latents, by the family's published codec."""
        return self.family.grid(self.family.parts["codec"].config())

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's raw output for noisy latents, in the dtype of ``x_t``. Gradients flow.

        Args:
            x_t: (B, C, T, H, W).
            t: 0-dim, (B,), or (B, 1, T, 1, 1) with a time per latent frame.
            cond: of batch B.
        """
        t = wide(t)
        scaled = x_t * fit(self.diffusion.input_scale(t), x_t)
        clock = self.diffusion.clock(t).to(device=x_t.device, dtype=torch.float32)
        inputs = self.family.network_inputs(self.config, scaled, clock, cond)
        return self.network(**inputs).to(x_t.dtype)

    def with_lora(
        self, lora: Lora, strength: float = 1.0, *, blocks: BlockStrengths | None = None, mode: Mode = "auto"
    ) -> VideoModel:
        """This model with one more LoRA, around the same network, which is left alone.

        Raises:
            CheckpointError: the LoRA does not belong to this network.
            SettingsError: a strength, a pattern of blocks or a mode that cannot be used.
        """
        bound = bind_to(lora, self.network, self.family.parts["network"].layouts)
        use = LoraUse(lora=bound, strength=strength, blocks=blocks or BlockStrengths(), mode=mode)
        log.info("%s", describe(bound))
        unmatched = bound.report.unmatched
        if unmatched:
            some = ", ".join(unmatched[:4])
            log.warning(
                "%s: %d of %d keys belong to no module of %s and do nothing: %s",
                *(bound.report.name, len(unmatched), bound.report.num_keys, self.family.title, some),
            )
        if note := self.alpha_note(lora):
            log.warning("%s", note)
        made_for = bound.report.made_for
        if made_for is not None and self.family.name not in made_for.lower():
            # Some models share names and sizes (Flux and HunyuanVideo do), so that only the file's word tells.
            log.warning("%s says that it was made for %s, not %s", bound.report.name, made_for, self.family.title)
        config = self.config
        if use.widened:
            channels = max(config.in_channels, *use.widened.values())
            config = replace(config, in_channels=channels)
        return replace(self, config=config, loras=(*self.loras, use))

    def alpha_note(self, lora: Lora) -> str:
        """What the user must know of a LoRA that does not say its alpha; empty if there is nothing."""
        note = self.family.lora_alpha_note
        return f"{lora.path.name} does not say its alpha: {note}" if note and not lora.tells_alpha else ""

    def with_compile(self, mode: str = "default") -> VideoModel:
        """This model with blocks that are compiled when they first run, around the same network.

        Raises:
            SettingsError: there is no such mode.
        """
        if mode not in MODES:
            raise unknown_name("mode of torch.compile", mode, MODES)
        return replace(self, compile_mode=mode)

    @property
    def will_compile(self) -> bool:
        """Whether the next step compiles, and so takes longer."""
        return self.compile_mode is not None and will_compile(self.network, self.family.blocks, self.compile_mode)

    def with_attention(self, choice: AttentionChoice) -> VideoModel:
        """This model with another way to compute attention, around the same network, which is left alone.

        Raises:
            MissingLibraryError, SettingsError: it cannot run here.
        """
        choice.check()
        return replace(self, attention=choice)

    def with_tricks(self, tricks: Tricks) -> VideoModel:
        """This model with these tricks in place of its own, around the same network.

        Raises:
            SettingsError: this network cannot do one of them.
        """
        tricks.check(self.family, self.config, self.network, self.diffusion, self.fingerprint)
        return replace(self, tricks=tricks)

    @contextlib.contextmanager
    def patched(self, ts: Tensor | None = None, *, recorder: CurveRecorder | None = None) -> Iterator[None]:
        """The network with this model's LoRAs, attention and tricks, its blocks compiled if they are to be, split over
        the current team; not to be nested.

        Args:
            ts: the times of the run; without them no step cache acts.
            recorder: measures how the blocks' residual changes; no step cache acts then either.

        Raises:
            SettingsError: the network can be neither split nor looked at in tiles, and it should be.
        """
        with contextlib.ExitStack() as stack:
            if self.loras:
                before = self.network.config
                with torch.inference_mode(False):  # merged weights like any others, or compiled blocks compile again
                    applied = apply_loras(self.network, self._uses())
                stack.enter_context(applied)
                self.network.config = self.config  # a LoRA may have enlarged the input
                stack.callback(setattr, self.network, "config", before)
            stack.enter_context(stretched_time(self._stretch()))
            if self.compile_mode is not None:
                stack.enter_context(compiled(self.network, self.family.blocks, mode=self.compile_mode))
            cache = None if recorder is not None else self._cache_run(ts)
            rules, enhance = self.family.block_rules, self.tricks.enhance
            if recorder is not None or self.tricks.around_blocks:
                assert rules is not None, "checked when the tricks were put on"
                _check_alone(self.tricks)
                around = around_blocks(
                    self.network,
                    self.block_paths,
                    rules,
                    cache=cache,
                    recorder=recorder,
                    enhance=0.0 if enhance is None else enhance.weight,
                )
                stack.enter_context(around)
            stack.enter_context(split_over(self.network, current_team()))
            stack.enter_context(computing_attention(self.network, self.attention))
            yield
            if cache is not None:
                log.info("the step cache skipped %d of %d forwards", cache.tally.skipped, cache.tally.forwards)

    def _uses(self) -> tuple[LoraUse, ...]:
        """LoRAs whose mode is left to us are merged where the blocks are compiled, if the weights can be changed."""
        if self.compile_mode is None:
            return self.loras
        return tuple(
            replace(use, mode="merge") if use.mode == "auto" and can_merge(self.network, use) else use
            for use in self.loras
        )

    @property
    def block_paths(self) -> list[str]:
        """Of the blocks, in the order they run."""
        return block_paths(self.network, self.family.blocks)

    def _cache_run(self, ts: Tensor | None) -> CacheRun | None:
        if self.tricks.cache is None or ts is None:
            return None
        assert self.family.block_rules is not None
        polynomial = self.family.block_rules.polynomial(self.config)
        return CacheRun(self.tricks.cache, ts, polynomial=polynomial)

    def _stretch(self) -> TimeStretch | None:
        riflex = self.tricks.riflex
        if riflex is None:
            return None
        assert self.family.block_rules is not None
        rope = self.family.block_rules.time_rope(self.config)
        assert rope is not None
        trained = riflex.trained_length or self.grid.num_latent_frames(self.defaults.num_frames)
        length = trained // self.family.patch(self.config)[0]
        component = intrinsic_component(*rope, length) if riflex.component is None else riflex.component
        return TimeStretch(component=component, trained_length=length)

    def conditioning(self, features: Any, *, guidance: float | None = None) -> Conditioning:
        """What the network is told for these text features; ``guidance`` None takes the checkpoint's default."""
        guidance = self.defaults.guidance if guidance is None else guidance
        return self.family.condition(self.config, features, guidance)


def denoiser(model: VideoModel, cond: Conditioning, *, stream: Stream | None = None) -> Denoise:
    """``(x_t, t) -> x0`` of the network under one conditioning; a conditioning of batch 1 serves every sample.

    Args:
        stream: what a step cache compares with, and what the network does without; None is a stream of its own.
    """
    own = Stream() if stream is None else stream
    patch = model.family.patch(model.config)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        frames, rows, columns = (size // step for size, step in zip(x_t.shape[2:], patch, strict=True))
        with forward_of(own, t, (frames, rows, columns)):
            output = model.predict(x_t, t, cond.expand(x_t.shape[0]))
        return model.diffusion.to_x0(x_t, output, t)

    return denoise


def denoiser_pair(
    model: VideoModel,
    cond: Conditioning,
    uncond: Conditioning,
    *,
    both_at: Callable[[float], bool] = lambda t: True,
) -> tuple[Denoise, Denoise]:
    """Two denoisers that share one forward of twice the batch, as guidance asks both for the same (x_t, t).

    The second one answers from the first one's forward; asked alone it computes alone.

    Args:
        both_at: false at times where only the first one will be asked, e.g. where the guidance scale is 1.
    """
    joint: list[Conditioning] = []
    held: list[Tensor] = []  # x_t, t and the unconditional x0 of the last forward
    first_alone = denoiser(model, cond)
    second_alone = denoiser(model, uncond, stream=Stream(branches=("uncond",)))
    both = Stream(branches=("cond", "uncond"))

    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        if not both_at(float(t.max())):
            return first_alone(x_t, t)
        batch = x_t.shape[0]
        if not joint:
            joint.append(join(cond.expand(batch), uncond.expand(batch)))
        twice = torch.cat([t, t]) if t.ndim and t.shape[0] == batch else t
        first, second = denoiser(model, joint[0], stream=both)(torch.cat([x_t, x_t]), twice).chunk(2)
        held[:] = [x_t, t, second]
        return first

    def unconditional(x_t: Tensor, t: Tensor) -> Tensor:
        if held and held[0] is x_t and held[1] is t:
            return held[2]
        return second_alone(x_t, t)

    return conditional, unconditional


def join(*conditionings: Conditioning) -> Conditioning:
    """Stack conditionings of one model along the batch; shorter texts are padded and masked."""
    first = conditionings[0]
    if len(conditionings) == 1:
        return first
    context, mask = _join_contexts(conditionings)
    held = [cond.held for cond in conditionings if cond.held is not None]
    assert len(held) in (0, len(conditionings)), "conditionings of one model have the same fields"
    return replace(
        first,
        context=context,
        context_mask=mask,
        pooled=_join_tensors([cond.pooled for cond in conditionings]),
        concat=_join_tensors([cond.concat for cond in conditionings]),
        held=Held(latents=torch.cat([h.latents for h in held]), mask=torch.cat([h.mask for h in held]))
        if held
        else None,
        scalars={name: torch.cat([cond.scalars[name] for cond in conditionings]) for name in first.scalars},
    )


def _join_tensors(tensors: Sequence[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors)), "conditionings of one model have the same fields"
    return torch.cat(given) if given else None


def _join_contexts(conditionings: Sequence[Conditioning]) -> tuple[Tensor | None, Tensor | None]:
    contexts = [cond.context for cond in conditionings if cond.context is not None]
    if len(contexts) < len(conditionings):
        return _join_tensors([cond.context for cond in conditionings]), None
    masks = [cond.context_mask for cond in conditionings]
    length = max(context.shape[1] for context in contexts)
    if all(mask is None and c.shape[1] == length for c, mask in zip(contexts, masks, strict=True)):
        return torch.cat(contexts), None
    padded = []
    for context, mask in zip(contexts, masks, strict=True):
        real = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device) if mask is None else mask
        padding = length - context.shape[1]
        padded.append((nn.functional.pad(context, (0, 0, 0, padding)), nn.functional.pad(real, (0, padding))))
    return torch.cat([context for context, _ in padded]), torch.cat([mask for _, mask in padded])


_RUN_BYTES = 64 * 2**20
"""what a run takes besides weights and activations: libraries that come late, scratch of the matrix products"""


# --- loading ----------------------------------------------------------------------------------------------------------


def open_part(path: str | Path, part: str) -> tuple[Header, Found]:
    """Read and identify a checkpoint that must be a certain part ("network", "codec", "text").

    Raises:
        FileError, CheckpointError: it cannot be read, is damaged, unknown, or is another part.
    """
    header = read_header(path)
    found = identify(header)
    if found.part != part:
        raise CheckpointError(
            f"This file is a {TITLES[found.part]}, not a {TITLES[part]}",
            given=f"{path}, {found.title}",
            expected=f"a {TITLES[part]}",
            do=f"pick the {TITLES[part]}'s file, or load this one as {TITLES[found.part]}",
        )
    return header, found


def build_part(
    header: Header,
    found: Found,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    stream: Sequence[str] = (),
    storage: str = AUTO,
    room: int | None = None,
) -> nn.Module:
    """The module of an identified checkpoint with its weights.

    Args:
        dtype: None chooses for the device, and lets float8 and packed weights that are large stay as they are.
        stream: paths of module lists whose blocks stay in the file; see ``weights.load.load_module``.
        storage: how the linear weights of the blocks are held, one of ``memory.place.CHOICES``.
        room: bytes that the module may take on the device; None: as many as it needs.

    Raises:
        SettingsError: a storage that does not exist, or too little room.
    """
    check_choice(storage)
    part, device = found.family.parts[found.part], torch.device(device)
    dtype, held = held_as(storage, dtype)
    keeps = storage == AS_FILE or (dtype is None and (bool(stream) or not _is_small(header, device)))
    if dtype is None and storage != AS_FILE:
        dtype = choose_dtype(header, device, streamed=bool(stream) or held is not None)
    return load_module(
        header,
        lambda: part.build(found.config, header.metadata),
        layout=None if found.layout == "native" else part.layouts[found.layout],
        dtype=dtype,
        device=device,
        keep_quantised=keeps,
        stream=stream,
        storage=held,
        stored=_blocks_of(found),
        room=room,
    )


def _blocks_of(found: Found) -> tuple[str, ...]:
    """Paths of the module lists of a part that may be streamed, and whose linear weights may be stored small."""
    return found.family.blocks if found.part == "network" else found.family.text.blocks.get(found.part, ())


def choose_dtype(header: Header, device: torch.device, *, streamed: bool = False) -> torch.dtype | None:
    """The dtype to hold a checkpoint's weights in; None keeps the file's.

    float32 where it costs little: it is the most exact, equal on every device, and on a CPU without matrix units for
    bfloat16 also the fastest. float8 is a way to store weights, not to compute with them: this is the dtype of the
    weights besides, and of the numbers that float8 and packed weights are widened to.
    """
    if {info.dtype for info in header.tensors.values()} <= {torch.float32}:
        return None
    if _is_small(header, device) or (streamed and device.type == "cpu"):
        return torch.float32
    return torch.bfloat16 if header.is_quantised else None


def _is_small(header: Header, device: torch.device) -> bool:
    """All of it as float32 costs little."""
    return small_as_float32(header.num_parameters, device)


def must_stream(header: Header, device: torch.device | str, *, storage: str = AUTO, budget: int | None = None) -> bool:
    """Whether a checkpoint's weights, as the file has them or as they are stored, do not fit the device's free memory.

    Args:
        budget: bytes that this process may take there; None: all that is free.
    """
    return too_large_to_stay(_num_bytes(header, STORAGES.get(storage)), room_on(torch.device(device), budget))


def _num_bytes(header: Header, storage: Storage | None) -> int:
    """About what the weights take in memory."""
    if storage is None:
        return header.num_bytes
    matrices = [info for info in header.tensors.values() if len(info.shape) == 2]
    dense = header.num_bytes - sum(info.num_bytes for info in matrices)
    return dense + sum(storage.num_bytes(*info.shape) for info in matrices)


def room_for_weights(header: Header, found: Found, device: torch.device | str, budget: int) -> int:
    """Bytes that a network's weights may take where this process may take ``budget`` on the device.

    The rest is what it takes already, and what one forward of the checkpoint's usual size needs; for that at most half
    of what is left, because a smaller video may be wanted.
    """
    device, defaults = torch.device(device), defaults_of(header, found)
    shape = VideoShape(num_frames=defaults.num_frames, height_px=defaults.height_px, width_px=defaults.width_px)
    wide = 2 if device.type == "cpu" else 1  # float32 there
    left = budget - memory_in_use(device)
    wanted = wide * found.family.activation_bytes(found.config, shape) + _RUN_BYTES
    return left - min(wanted, max(0, left // 2))


def load_network(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    stream: bool | None = False,
    image_condition: str = AUTO,
    storage: str = AUTO,
    budget: int | None = None,
) -> VideoModel:
    """The diffusion network of a checkpoint, with the defaults it carries or its family's.

    Args:
        path: a file, a set of shards or a folder; see ``weights.header.read_header``.
        dtype: of the weights; None chooses for the device.
        stream: leave the blocks in the file and read each one when it runs; None does so where they do not fit.
        image_condition: how the network is told an image, for files that do not say so themselves (text-to-video and
            token-replace networks have the same weights): a value of the config's field, or "auto".
        storage: how the linear weights of the blocks are held, one of ``memory.place.CHOICES``.
        budget: bytes that this process may take on the device; as many blocks as fit stay there. None: no limit.

    Raises:
        SettingsError: a choice that does not exist, or a budget that is too small even with every block streamed.
    """
    header, found = open_part(path, "network")
    found = with_image_condition(header, found, image_condition)
    return network_of(header, found, dtype=dtype, device=device, stream=stream, storage=storage, budget=budget)


def with_image_condition(header: Header, found: Found, choice: str) -> Found:
    """The user's word on how an image conditions the network; "auto" takes the file's, else text to video.

    Raises:
        SettingsError: the weights do not allow it.
    """
    allowed = found.family.image_conditions(found.config)
    if choice == AUTO:
        return found
    if choice not in allowed:
        raise SettingsError(
            "This network cannot be told an image in that way",
            given=f"image_condition {choice!r} for {header.path}",
            expected="one of " + ", ".join([AUTO, *allowed]),
            do="leave image_condition at auto",
        )
    if found.is_told and choice != found.config.image_condition:
        log.warning(
            "%s says that its image condition is %r; used as %r because you said so.",
            *(header.path.name, found.config.image_condition, choice),
        )
    return replace(found, config=replace(found.config, image_condition=choice), is_told=True)


def network_of(
    header: Header,
    found: Found,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    stream: bool | None = False,
    storage: str = AUTO,
    budget: int | None = None,
) -> VideoModel:
    """:func:`load_network` of a checkpoint that is identified already."""
    check_choice(storage)
    preview = header.metadata.get(PREVIEW_KEY)
    if not found.is_told:
        log.info(
            "%s does not say how an image guides it: taken as image_condition %r. Set it if that is wrong.",
            *(header.path.name, found.config.image_condition),
        )
    auto = stream is None
    room = None if budget is None else room_for_weights(header, found, device, budget)
    if stream is None and planned("sample", "stream") is not None:
        stream, room = bool(planned("sample", "stream")), planned("sample", "room")
    elif stream is None:
        stream = budget is not None or must_stream(header, device, storage=storage)
        if stream and budget is None:
            log.info("%s does not fit the free memory: its blocks are read from the file as they run.", header.path)
    elif stream:
        room = None  # every block, whatever the budget
    network = _loaded(
        header,
        found,
        found.family.blocks,
        dtype=dtype,
        device=device,
        stream=bool(stream),
        may_stream=auto,
        storage=storage,
        room=room,
    )
    return VideoModel(
        family=found.family,
        config=found.config,
        network=network,
        diffusion=found.family.diffusion(found.config),
        defaults=defaults_of(header, found),
        fingerprint=header.digest,
        preview=None if preview is None else LatentRGB.from_json(preview),
    )


def _loaded(
    header: Header,
    found: Found,
    blocks: Sequence[str],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    stream: bool,
    may_stream: bool,
    storage: str = AUTO,
    room: int | None = None,
) -> nn.Module:
    """:func:`build_part`, with the blocks left in the file where their weights turn out not to fit.

    Raises:
        MemoryLimitError: they do not fit in that way either.
    """
    size = f"{header.num_bytes / 2**30:.2f} GiB in the file"
    advice = f"its weights are {size}: choose stream blocks where it can be chosen, a smaller dtype or a quantised file"
    from_file = Measure(name="with its blocks left in the file", tighten=lambda on: None if on else True)
    return relieved(
        lambda on: build_part(
            header, found, dtype=dtype, device=device, stream=blocks if on else (), storage=storage, room=room
        ),
        stream,
        (from_file,) if may_stream and blocks else (),
        what=f"{found.title} in {header.path.name}",
        advice=lambda: advice,
    )


def defaults_of(header: Header, found: Found) -> Defaults:
    """The defaults in a network's metadata, else the family's."""
    text = header.metadata.get("vidgen.defaults")
    if text is None:
        return found.family.defaults(found.config)
    return config_from_json(Defaults, text, where=str(header.path))


def load_codec(path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Codec:
    """The VAE of a checkpoint."""
    header, found = open_part(path, "codec")
    module = _loaded(header, found, (), dtype=dtype, device=device, stream=False, may_stream=False)
    return found.family.codec(module, found.config)


def load_text(
    *paths: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizers: TokenizerPlaces | None = None,
    stream: bool | None = False,
) -> nn.Module:
    """The text encoders of one file or several; ``encode(prompts)`` gives features.

    Args:
        paths: one combined file, or LLaMA's, CLIP's and, for prompts with a picture, the image encoder's, in any
            order. A whole LLaVA in one file counts as LLaMA and image encoder.
        tokenizers: where to look for tokenizers that are not in the files.
        stream: leave LLaMA's layers in the file and read each one when it runs; None does so where they do not fit.

    Raises:
        FileError, CheckpointError: a file is no text encoder, an encoder is missing or there twice, or a tokenizer is
            not found. All of this is said before any weights are read.
    """
    files = open_text([read_header(path) for path in paths])
    return text_of(files, dtype=dtype, device=device, tokenizers=tokenizers, stream=stream)


TextFiles = Mapping[str, tuple[Header, Found]]
"""part ("text", "llama", "clip", "vision") -> its file and what it is"""


def open_text(headers: Sequence[Header]) -> TextFiles:
    """Identify the files of text encoders. Raises CheckpointError as :func:`load_text`."""
    parts: dict[str, tuple[Header, Found]] = {}
    listed = [(header, _encoders_in(header)) for header in {header.path: header for header in headers}.values()]
    own_vision = any([item.part for item in found] == ["vision"] for _, found in listed)
    for header, found in listed:
        for item in found:
            if item.part == "vision" and own_vision and len(found) > 1:
                continue  # an image encoder in a file of its own stands in for the one in a whole LLaVA
            if item.part in parts:
                raise CheckpointError(
                    f"There are two files with a {item.title}",
                    given=f"{parts[item.part][0].path} and {header.path}",
                    expected="each encoder once",
                    do="load only one of them",
                )
            parts[item.part] = header, item
    if not parts:
        raise CheckpointError("No text encoder was given", expected="at least one file", do="choose a file")
    return parts


def _encoders_in(header: Header) -> list[Found]:
    found = identify_parts(header)
    if not found:
        known = (family.text.stranger(header.shapes) for family in FAMILIES.values())
        what = next((name for name in known if name), None)
        if what is None:
            identify(header)  # says what the file holds instead
        raise CheckpointError(
            f"This file is {what}",
            given=header.path,
            expected="a text encoder of " + ", ".join(family.title for family in FAMILIES.values()),
            do="choose the text encoders that the network was trained with",
        )
    first = found[0]
    if first.part not in first.family.text.parts:
        raise CheckpointError(
            f"This file is a {TITLES[first.part]}, not a {TITLES['text']}",
            given=f"{header.path}, {first.title}",
            expected=f"a {TITLES['text']}",
            do=f"pick the {TITLES['text']}'s file, or load this one as {TITLES[first.part]}",
        )
    return found


def text_config_of(files: TextFiles) -> Config:
    """The config of the text encoders together. Raises CheckpointError where one is missing or they do not fit."""
    family = next(iter(files.values()))[1].family
    return family.text.config({part: found.config for part, (_, found) in files.items()})


def text_of(
    files: TextFiles,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizers: TokenizerPlaces | None = None,
    stream: bool | None = False,
    budget: int | None = None,
) -> nn.Module:
    """:func:`load_text` of files that are identified already; where ``stream`` is None they must fit ``budget``."""
    config = text_config_of(files)
    family = next(iter(files.values()))[1].family
    headers = {part: header for part, (header, _) in files.items()}
    found = family.text.tokenizers(config, headers, tokenizers or TokenizerPlaces())
    modules, later, may_stream = {}, {}, stream is None
    stream = planned("encode prompt", "stream") if stream is None else stream
    for part, (header, item) in files.items():
        if part in family.text.later:
            later[part] = partial(build_part, header, item, dtype=dtype, device=device)
            continue
        streamed = must_stream(header, device, budget=budget) if stream is None else stream
        blocks = family.text.blocks.get(part, ())
        modules[part] = _loaded(
            header, item, blocks, dtype=dtype, device=device, stream=streamed, may_stream=may_stream
        )
    stack = family.text.join(config, modules, found, later)
    stack.fingerprint = "+".join(dict.fromkeys(header.digest for header in headers.values()))  # type: ignore[assignment]
    return stack


def inspect_file(path: str | Path) -> dict[str, Any]:
    """What a checkpoint is, from its header alone: for ``vidgen inspect`` and loader nodes.

    Keys: path, family, part, title, layout, num_parameters, num_tensors, num_bytes, dtypes, fingerprint, config
    (a dict), defaults (a dict, networks only) and metadata (without the long tokenizer texts).
    """
    return inspect_header(read_header(path))


def inspect_header(header: Header) -> dict[str, Any]:
    """:func:`inspect_file` of a header that was read already."""
    found = identify(header)
    info: dict[str, Any] = {
        "family": found.family.name,
        "part": found.part,
        "title": found.title,
        "container": header.container,
        "layout": found.layout,
        "config": asdict(found.config),
    } | _facts(header)
    if found.part == "network":
        info["defaults"] = asdict(defaults_of(header, found))
    return info


def _facts(header: Header) -> dict[str, Any]:
    """What can be said of any file of tensors."""
    dtypes: dict[str, int] = {}
    for tensor in header.tensors.values():
        name = tensor.packing or str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.num_elements
    return {
        "path": str(header.path),
        "num_parameters": header.num_parameters,
        "num_tensors": len(header.tensors),
        "num_bytes": header.num_bytes,
        "dtypes": dtypes,
        "fingerprint": header.digest,
        "metadata": {key: value for key, value in header.metadata.items() if "tokenizer" not in key},
    }


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def check_lora(path: str | Path, found: Found) -> None:
    """Raise what :meth:`VideoModel.with_lora` would raise for a network that is known by its header alone."""
    bind_to(read_lora(path), _unloaded(found.family, found.config), found.family.parts["network"].layouts)


def inspect_lora(header: Header) -> dict[str, Any]:
    """What a LoRA is: whose modules it names, in which spelling; :func:`inspect_file` for LoRAs.

    Keys: family (None if no family here has such modules), title, dialect, num_modules, unmatched, ranks, alphas,
    made_for (in the file's words, or None), and as there path, num_parameters, num_tensors, num_bytes, dtypes,
    fingerprint and metadata.
    """
    lora = read_lora(header.path)
    best: tuple[Family | None, Report | None] = None, None
    for family in FAMILIES.values():
        part = family.parts["network"]
        # The published size has every module that a smaller one has.
        report = match(lora, module_names(_unloaded(family, part.config()), part.layouts))[1]
        if best[1] is None or len(report.modules) > len(best[1].modules):
            best = family, report
    family, report = best
    assert family is not None
    assert report is not None
    known = bool(report.modules)
    return {
        "family": family.name if known else None,
        "title": f"LoRA for {family.title}" if known else looks_like(lora),
        "dialect": report.dialect,
        "num_modules": len(report.modules),
        "unmatched": list(report.unmatched),
        "ranks": list(report.ranks),
        "alphas": list(report.alphas),
        "made_for": report.made_for,
    } | _facts(header)


def _unloaded(family: Family, config: Config) -> nn.Module:
    """The network without memory, for its names and shapes."""
    with torch.device("meta"):
        return family.parts["network"].build(config, {})


def _check_alone(tricks: Tricks) -> None:
    """What stands around blocks looks at all video tokens; on several processes a block has a part of them."""
    team = current_team()
    if team is None or team.size == 1:
        return
    named = ("cache", "skip_layers", "stg", "enhance")
    raise SettingsError(
        "Step caches, weakened passes and Enhance-A-Video cannot be used by several processes together",
        given=", ".join(name for name in named if getattr(tricks, name)) or "the calibration of a cache",
        expected=f"none of them with {team.size} processes",
        do="leave these nodes out, or render on one device",
    )
