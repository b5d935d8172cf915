"""From a prompt to a video: the main path, one function a step.

``load_bundle`` -> ``encode_prompts`` -> ``sample_latents`` -> ``decode_latents``; ``generate`` runs them all, a
node runs one.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .blocks import Stream, Weakening, block_numbers
from .bounded import Bound
from .bundle import Bundle
from .bundle import load_bundle as load_bundle  # the way in, offered here with the rest of the path
from .caching import CurveRecorder, MagnitudeCurve, StepFinder
from .codec import Codec, StreamingCodec
from .diffusion import Diffusion
from .errors import NumericsError, SettingsError
from .families import ImageMode, KeyframeRules, TextEncoder
from .guidance import ScaleAt, away_from, cfg, cfg_schedule, cfg_zero_star, hold, keep, once, zero_init
from .health import CheckedCodec, Suspect, find_suspect, remedy_for
from .keyframes import Keyframe, LatentKeyframe, repeat_over_frames
from .memory.attention_chunks import chunked_attention
from .memory.cancel import watched
from .memory.host import Host, LocalHost, available_cores
from .memory.oom import Measure, relieved
from .memory.place import QuantisedLinear
from .memory.plan import begin_stage, planned
from .model import VideoModel, denoiser, denoiser_pair, join
from .nn.parallel import current_team
from .noise import NoiseStream
from .preview import LatentRGB
from .resume import RunFile
from .sampling import SAMPLERS, SamplerState, StepInfo, sample
from .tiling import OnTile, Tiling, tiled
from .timesteps import SCHEDULES, from_sigmas, schedule, unknown_name
from .tricks import WeakPass
from .types import Conditioning, Defaults, Denoise, Grid, VideoShape
from .windows import Frames, shuffled_noise, windowed

log = logging.getLogger("vidgen")

MAX_BATCH = 64
TEXT_ADVICE = "use quantised text encoders, or encode on another machine and load the embeddings"
TILES = Tiling()
Coding = Tiling | Bound | None
"""How a codec saves memory: blended tiles, exactly within a bound, or not at all (one pass)."""
SMALL_FLOPS = 4e10
"""a forward below this takes one core about a second"""


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. None takes the checkpoint's default."""

    num_steps: int | None = None
    sampler: str | None = None
    """a key of ``sampling.SAMPLERS``"""
    schedule: str | None = None
    """a key of ``timesteps.SCHEDULES``"""
    shift: float | None = None
    """above 1: more steps at high noise"""
    guidance: float | None = None
    """the scale that a guidance-distilled network is told; others ignore it"""
    cfg: float | None = None
    """true classifier-free guidance; 1 is off and halves the work"""
    cfg_schedule: str | None = None
    """how the scale changes along the run, a key of ``guidance.CFG_SCHEDULES``"""
    cfg_start: float = 1.0
    """guidance begins at this time (1 is noise) ..."""
    cfg_end: float = 0.0
    """... and ends at this one (0 is clean)"""
    cfg_rescale: float = 0.0
    """0 to 1: how far the guided prediction is given the spread of the unguided one"""
    cfg_batched: bool = True
    """with and without the prompt in one forward: faster, more memory"""
    negative_prompt: str | None = None
    """what true guidance steers away from; read only where cfg is not 1"""
    seed: int = 0
    """sample i of a batch draws from seed + i"""
    num_videos: int = 1
    """videos per prompt"""
    denoise: float = 1.0
    """below 1: start from given latents, noised to this strength"""
    sigmas: tuple[float, ...] | None = None
    """noise levels to visit, ComfyUI's SIGMAS; they take the place of num_steps, schedule, shift and denoise"""
    start_share: float = 0.0
    """how much of given latents is mixed into the noise of a run that starts from pure noise (image to video)"""
    samples_at_once: int | None = None
    """samples per forward; None: one on a CPU, where more gain nothing and change the rounding, all on a GPU"""
    threads: int | Literal["auto"] | None = "auto"
    """CPU threads while computing; "auto": one for small work, else every core; None leaves torch's setting alone"""
    resume_path: Path | None = None
    """where an interrupted run is kept and taken up again: a file, or a folder where its name tells what run it is"""
    retry: bool = True
    """numbers that are not finite: try the step again in a safe way, once for each way; else stop"""

    def resolved(self, defaults: Defaults) -> Sampling:
        """With the checkpoint's defaults filled in."""
        names = ("num_steps", "sampler", "schedule", "shift", "guidance", "cfg", "cfg_schedule", "negative_prompt")
        return replace(self, **{name: getattr(defaults, name) for name in names if getattr(self, name) is None})

    def check(self, diffusion: Diffusion) -> Tensor:
        """The times to visit. Raises SettingsError for anything that cannot be used; call on resolved settings."""
        assert self.num_steps is not None, "settings are resolved first"
        assert self.shift is not None
        assert self.cfg is not None
        if self.sampler not in SAMPLERS:
            raise unknown_name("sampler", self.sampler, SAMPLERS)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        _check_number("shift", self.shift, low=1e-6, high=1e6)
        _check_number("guidance", self.guidance, low=0.0, high=1e6)
        _check_number("cfg", self.cfg, low=0.0, high=1e6)
        _check_number("cfg_rescale", self.cfg_rescale, low=0.0, high=1.0)
        _check_number("start_share", self.start_share, low=0.0, high=1.0)
        _cfg_scale(self)
        _check_whole("seed", self.seed, low=0, high=2**64 - 1)
        _check_whole("number of videos", self.num_videos, low=1, high=MAX_BATCH)
        if self.samples_at_once is not None:
            _check_whole("number of samples at once", self.samples_at_once, low=1, high=MAX_BATCH)
        if self.threads not in (None, "auto"):
            _check_whole("number of threads", self.threads, low=1, high=1024)
        if not isinstance(self.negative_prompt, str):
            raise SettingsError("The negative prompt is not a text", given=repr(self.negative_prompt))
        if self.sigmas is not None:
            return from_sigmas(self.sigmas, diffusion)
        return schedule(self.schedule, self.num_steps, shift=self.shift, diffusion=diffusion, denoise=self.denoise)

    def starts_within(self, ts: Tensor) -> bool:
        """Whether a run over ``ts`` starts from given latents, not from pure noise."""
        if self.sigmas is None:
            return self.denoise < 1.0
        return float(ts[0]) < 1 - 1e-4


def _check_number(name: str, value: object, *, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type]
        raise SettingsError(f"The {name} cannot be used", given=repr(value), expected=f"a number from {low} to {high}")


def _check_whole(name: str, value: object, *, low: int, high: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not low <= value <= high:  # type: ignore[operator]
        expected = f"a whole number from {low} to {high}"
        raise SettingsError(f"The {name} cannot be used", given=repr(value), expected=expected)


def check_prompts(prompt: object) -> list[str]:
    """One text or several as a list of texts; SettingsError for anything else and for an empty one."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes) or not prompts:
        raise SettingsError("The prompt cannot be used", given=repr(prompt), expected="a text or a list of texts")
    for item in prompts:
        if not isinstance(item, str):
            raise SettingsError("A prompt is not a text", given=repr(item), expected="a text such as 'a red star'")
        if "\0" in item:
            raise SettingsError("The prompt has a null character in it", given=repr(item), do="remove it")
        if not item.strip():
            raise SettingsError(
                "The prompt is empty", given=repr(item), expected="what the video should show", do="write a prompt"
            )
    return list(prompts)


# --- the steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture in the encoded prompt."""

    image: Tensor
    """(H, W, 3) in [0, 1]"""
    interleave: int
    """every how many-th of its tokens is kept"""

    def black(self) -> Seen:
        """What stands beside a negative prompt in the published sampler."""
        return replace(self, image=torch.zeros_like(self.image))


def seen_picture(text: TextEncoder, rules: KeyframeRules, config: Any, image: Tensor | None) -> Seen | None:
    """``image`` as the prompt's, if the network was trained so and the text encoders have eyes."""
    interleave = rules.interleave(config)
    return None if image is None or interleave is None or not text.sees_images else Seen(image, interleave)


def encode_prompts(
    text: TextEncoder,
    model: VideoModel,
    prompts: Sequence[str],
    *,
    guidance: float | None = None,
    image: bool = False,
    seen: Seen | None = None,
) -> Conditioning:
    """What the network is told for these prompts, on its device; ``image`` takes the template for single frames.

    Args:
        seen: the picture that the prompts speak of, where the text encoders see it.

    Each distinct prompt is encoded once and on its own, so that its features do not depend on its neighbours.
    """

    def encode(_: None) -> Conditioning:
        known: dict[str, Conditioning] = {}
        for prompt in prompts:
            if prompt not in known:
                if seen is None:
                    features = text.encode([prompt], image_mode=image)
                else:
                    features = text.encode_with_image([prompt], seen.image, interleave=seen.interleave)
                known[prompt] = model.conditioning(features, guidance=guidance).to(model.device)
        return join(*(known[prompt] for prompt in prompts))

    with torch.inference_mode():
        return relieved(encode, None, (), what="Reading the prompt", advice=lambda: TEXT_ADVICE)


def encode_pictures(
    rules: KeyframeRules, config: Any, codec: Codec, keyframes: Sequence[Keyframe], shape: VideoShape
) -> list[LatentKeyframe]:
    """Given pictures as the network is told them: what :func:`with_keyframes` takes.

    Args:
        config: of the network, as ``family.keyframes.methods`` leave it.

    Raises:
        SettingsError: a picture or a mask of another size than the video, or for a frame that it does not have.
    """
    if rules.fills_in(config):  # they become a whole video, which may not fit in one piece
        codec = saving(codec, planned("encode video", "tiling", None))
    return rules.encode(config, codec, keyframes, shape)


def with_keyframes(
    model: VideoModel,
    cond: Conditioning,
    keyframes: Sequence[LatentKeyframe],
    shape: Sequence[int],
    *,
    method: str = "auto",
) -> Conditioning:
    """``cond`` with given pictures, as the model's family takes them, for latents of ``shape`` (B, C, T, H, W).

    Args:
        method: a key of ``family.keyframes.methods``: how, where the checkpoint does not say it.

    Raises:
        SettingsError: pictures that this network cannot take, or of another size.
    """
    config = image_method(model, method)(model.config)
    keyframes = [replace(keyframe, latents=keyframe.latents.to(model.device)) for keyframe in keyframes]
    return model.family.keyframes.condition(config, cond, keyframes, shape)


def image_method(model: VideoModel, name: str) -> Callable[[Any], Any]:
    """A way of taking pictures by name; SettingsError if the family has none of it."""
    methods = model.family.keyframes.methods
    if name not in methods:
        raise unknown_name("method", name, methods)
    return methods[name]


def image_mode(model: VideoModel, name: str | None) -> ImageMode:
    """How closely motion keeps to a first frame, by name; None is the family's default."""
    modes = model.family.keyframes.modes
    name = next(iter(modes), "none") if name is None else name
    if name not in modes:
        raise unknown_name("image mode", name, modes)
    return modes[name]


def sample_latents(
    model: VideoModel,
    positive: Conditioning,
    negative: Conditioning | None,
    shape: Sequence[int],
    settings: Sampling,
    *,
    host: Host | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    until: Tensor | None = None,
    preview: LatentRGB | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Tensor:
    """Noise to clean latents.

    Args:
        positive: of batch 1 or B.
        negative: needed where cfg is not 1; it is given the pictures of ``positive``.
        shape: (B, C, T, H, W) of the latents.
        settings: None fields take the checkpoint's defaults.
        start: clean latents of this shape, read where the run starts within the noise (``denoise`` below 1), where
            there is a mask, and where ``settings.start_share`` is above 0.
        mask: (1 or B, 1, T, H, W) in [0, 1]: where it is 0 the result is ``start`` to the bit, where it is 1 new.
        until: broadcastable against them: the time at which what the mask keeps is let go; None: never.
        preview: how to show unfinished latents; None shows none unless the checkpoint brings it.
        identity: what the conditioning was made from (prompt, text encoders), to tell saved runs apart in the user's
            words; None tells them apart by the conditioning's numbers.

    Returns:
        (B, C, T, H, W) float32 on the model's device. The file at ``settings.resume_path`` stays, so that decoding
        may be stopped too; the caller removes it once the result is safe.

    Raises:
        SettingsError: before anything is computed.
        NumericsError: numbers that are not finite appeared, also in the safe way if ``settings.retry``.
        MemoryLimitError: the steps do not fit the memory, also with less of it.
        Cancelled: the user stopped; the state is in ``settings.resume_path`` if that was given.
    """
    host = host or LocalHost()
    settings = settings.resolved(model.defaults)
    known = {"conditioning": fingerprint(positive, negative)} if identity is None else identity
    for name, given in (("start", start), ("mask", mask), ("until", until)):
        if given is not None:
            known = {**known, name: fingerprint(Conditioning(concat=given))}
    given_latents = _Given(start, mask, until)
    run = _run_file(model, shape, settings, known)
    latents = _sample(
        model, positive, negative, shape, settings, host=host, given=given_latents, preview=preview, run=run
    )
    if run is not None:
        run.save()
    return latents


@dataclass(frozen=True, slots=True)
class _Given:
    """Latents that a run starts from or keeps."""

    start: Tensor | None = None
    mask: Tensor | None = None
    until: Tensor | None = None

    def check(self, shape: Sequence[int], ts: Tensor, settings: Sampling) -> None:
        """Raise SettingsError unless everything that the run needs is there, and of its shape."""
        within = settings.starts_within(ts)
        if not within and self.mask is None and not settings.start_share:
            return
        why = f"a start at noise level {float(ts[0]):.3g}" if settings.sigmas else f"denoise {settings.denoise}"
        if not within:
            why = "a mask" if self.mask is not None else f"start_share {settings.start_share}"
        if self.start is None or tuple(self.start.shape) != tuple(shape):
            raise SettingsError(
                "There is nothing to start from",
                given=why + ("" if self.start is None else f" and latents {tuple(self.start.shape)}"),
                expected=f"latents of shape {tuple(shape)}, or denoise 1",
            )
        if not bool(torch.isfinite(self.start).all()):
            raise SettingsError("The latents have numbers in them that are not finite", do="encode the video again")
        if not bool(self.start.any()):
            raise SettingsError(
                "The latents to start from are empty",
                given=f"{why} and latents that are all 0",
                expected="the latents of a video",
                do="encode one with Encode Video, or set denoise to 1",
            )
        if self.mask is not None and (self.mask.ndim != 5 or not _broadcasts(self.mask.shape, shape)):
            raise SettingsError(
                "The mask does not fit the latents",
                given=f"shape {tuple(self.mask.shape)}",
                expected=f"({shape[0]}, 1, {', '.join(map(str, shape[2:]))}), or 1 in any place",
                do="make it with mask_to_latents",
            )

    def between(self, lead: int, trail: int) -> _Given:
        """With the first latent frame ``lead`` more times in front, and the last one ``trail`` times behind."""

        def longer(latents: Tensor | None) -> Tensor | None:
            if latents is None or latents.shape[2] == 1:
                return latents
            ends = latents[:, :, :1].expand(-1, -1, lead, -1, -1), latents[:, :, -1:].expand(-1, -1, trail, -1, -1)
            return torch.cat([ends[0], latents, ends[1]], dim=2)

        return _Given(*(longer(getattr(self, field.name)) for field in fields(self)))


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    return all(size in (1, other) for size, other in zip(small, large, strict=True))


def _sample(
    model: VideoModel,
    positive: Conditioning,
    negative: Conditioning | None,
    shape: Sequence[int],
    settings: Sampling,
    *,
    host: Host,
    given: _Given,
    preview: LatentRGB | None,
    run: RunFile | None,
    recorder: CurveRecorder | None = None,
) -> Tensor:
    begin_stage()
    ts = settings.check(model.diffusion)
    given.check(shape, ts, settings)
    model.family.keyframes.check_conditioning(model.config, positive, shape)
    lead, trail = (spare(model.config, shape[2]) for spare in (model.family.lead_frames, model.family.trail_frames))
    shown = slice(lead, lead + shape[2])
    shape, given = (*shape[:2], lead + shape[2] + trail, *shape[3:]), given.between(lead, trail)
    state = SamplerState() if run is None else run.load()
    to_rgb = preview or model.preview

    def show(latents_rgb: LatentRGB, x0: Tensor) -> None:
        host.preview(lambda: latents_rgb.frames(x0))

    def on_step(info: StepInfo) -> None:
        if run is not None:
            run.keep(info.state)
        host.progress("sample", info.step, info.num_steps)
        if to_rgb is not None:
            show(to_rgb, info.x0[:, :, shown])
        host.check_cancelled()

    def steps(plan: _Plan) -> Tensor:
        """The steps that are left, from where ``state`` stands."""
        assert settings.sampler is not None
        with contextlib.ExitStack() as stack:
            if plan.chunked:
                stack.enter_context(chunked_attention())
            denoise = _denoise(model, positive, negative, plan.settings, shape, given, ts)
            noise = NoiseStream.of_batch(settings.seed, shape[0])
            drawn, windows = noise.draw(shape[1:], device=model.device), model.tricks.windows
            if windows is not None and windows.shuffle_noise:
                drawn = shuffled_noise(drawn, windows, noise.seeds)
            x = _start(model.diffusion, drawn, ts, given, settings)
            try:
                return sample(
                    settings.sampler, denoise, model.diffusion, x, ts, noise=noise, state=state, on_step=on_step
                )
            except NumericsError as problem:
                raise _Unfit(_suspect(model, positive, negative, denoise, state), str(problem.given)) from problem

    def safe_steps(plan: _Plan) -> Tensor:
        """The same, and again in a safe way where numbers are not finite."""
        with contextlib.ExitStack() as remedies:
            tried: list[str] = []
            while True:
                try:
                    return steps(plan)
                except _Unfit as problem:
                    suspect, where = problem.suspect, problem.where
                remedy = remedy_for(suspect, model.network, dtype=torch.bfloat16, fragile=(torch.float16,))
                if remedy is None or not settings.retry or remedy.name in tried:
                    what = "The network gave numbers that are not finite"
                    raise NumericsError(what, given=f"{where}, {suspect}", do=suspect.advice)
                log.warning("numbers are not finite at %s (%s): again %s", where, suspect, remedy.name)
                tried.append(remedy.name)
                remedies.enter_context(remedy.apply())

    saving = contextlib.nullcontext() if run is None else run.saved_on_failure()
    threads = using_threads(choose_threads(settings, model, shape))
    if model.will_compile:
        host.progress("compile", 0, 1)
    patched = model.patched(ts, recorder=recorder)
    with torch.inference_mode(), threads, patched, watched(host, model.network), saving:
        host.check_cancelled()
        host.progress("sample", state.step, len(ts) - 1)
        latents = relieved(
            safe_steps,
            _Plan(settings, batch=shape[0]),
            SAMPLING_MEASURES,
            what="The sampling",
            make_room=lambda: host.make_room(_activations(model, shape)),
            advice=lambda: _smaller(model, shape),
        )
        return latents[:, :, shown]


class _Unfit(Exception):
    """Numbers that are not finite, and where they began."""

    def __init__(self, suspect: Suspect, where: str) -> None:
        self.suspect, self.where = suspect, where


def _suspect(
    model: VideoModel, positive: Conditioning, negative: Conditioning | None, denoise: Denoise, state: SamplerState
) -> Suspect:
    """Do the step that failed once more to see where it fails; ``state`` is at the last good one."""
    assert state.x is not None
    assert state.ts is not None
    x, t = state.x.to(model.device), state.ts[state.step]
    inputs: dict[str, Tensor | None] = {"latents": x}
    for name, cond in (("prompt", positive), ("negative prompt", negative)):
        if cond is not None:
            held = None if cond.held is None else cond.held.latents
            inputs |= {f"{name}'s text": cond.context, f"{name}'s pooled text": cond.pooled}
            inputs |= {f"{name}'s pictures": cond.concat, f"{name}'s first frame": held}
    loras = {patch.module: use.lora.report.name for use in model.loras for patch in use.lora.patches}
    return find_suspect(
        model.network,
        lambda: denoise(x, t),
        inputs=inputs,
        loras=loras,
        compiled=model.compile_mode is not None,
    )


# --- less memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the sampling uses memory; what it computes is the same up to rounding."""

    settings: Sampling
    batch: int
    chunked: bool = False


def _one_at_a_time(plan: _Plan) -> _Plan | None:
    settings = plan.settings
    joint = settings.cfg_batched and settings.cfg != 1.0
    if not joint and (settings.samples_at_once == 1 or plan.batch == 1):
        return None
    return replace(plan, settings=replace(settings, cfg_batched=False, samples_at_once=1))


def _in_chunks(plan: _Plan) -> _Plan | None:
    return None if plan.chunked else replace(plan, chunked=True)


SAMPLING_MEASURES: tuple[Measure[_Plan], ...] = (
    Measure(name="one sample and one prompt at a time", tighten=_one_at_a_time),
    Measure(name="with attention over chunks of queries", tighten=_in_chunks),
)
"""what is done when the sampling runs out of memory, the mildest first"""

SMALL_TILES = Tiling(tile_px=128, stride_px=96, tile_frames=16, stride_frames=12)


def _tiled(coding: Coding) -> Coding:
    return TILES if coding is None else None


def _smaller_tiles(tiling: Coding) -> Coding:
    is_large = isinstance(tiling, Tiling) and (
        tiling.tile_px > SMALL_TILES.tile_px or tiling.tile_frames > SMALL_TILES.tile_frames
    )
    return SMALL_TILES if is_large else None


DECODING_MEASURES: tuple[Measure[Coding], ...] = (
    Measure(name=f"in tiles of {TILES.tile_px} px and {TILES.tile_frames} frames", tighten=_tiled),
    Measure(name=f"in tiles of {SMALL_TILES.tile_px} px and {SMALL_TILES.tile_frames} frames", tighten=_smaller_tiles),
)
"""what is done when decoding runs out of memory, the mildest first"""


def _video_shape(model: VideoModel, shape: Sequence[int]) -> tuple[VideoShape, Grid]:
    """The video that latents of ``shape`` (B, C, T, H, W) stand for."""
    grid = model.family.grid(model.family.parts["codec"].config())
    height, width = shape[3] * grid.spatial, shape[4] * grid.spatial
    return VideoShape(num_frames=grid.num_frames(shape[2]), height_px=height, width_px=width), grid


def _activations(model: VideoModel, shape: Sequence[int]) -> int:
    """Bytes of one forward of one sample beside the weights."""
    video, _ = _video_shape(model, shape)
    width = max((parameter.dtype.itemsize for parameter in model.network.parameters()), default=2)
    return model.family.activation_bytes(model.config, video) * max(1, width // 2)


def _smaller(model: VideoModel, shape: Sequence[int]) -> str:
    """What to lower, with numbers."""
    video, grid = _video_shape(model, shape)
    needs = f"a step needs about {_activations(model, shape) / 2**30:.2f} GiB beside the weights"
    step = grid.spatial * model.family.patch(model.config)[1]
    fewer = grid.num_frames(max(1, (shape[2] + 1) // 2))
    height, width = (max(step, int(side * 0.75) // step * step) for side in (video.height_px, video.width_px))
    changes = [] if fewer >= video.num_frames else [f"{fewer} frames in place of {video.num_frames}"]
    if height * width < video.height_px * video.width_px:
        changes.append(f"{width} x {height} px in place of {video.width_px} x {video.height_px}")
    changes.append("a smaller or quantised checkpoint, or stream blocks in Load Model")
    return f"{needs}: try {', or '.join(changes)}"


def _start(diffusion: Diffusion, noise: Tensor, ts: Tensor, given: _Given, settings: Sampling) -> Tensor:
    """The latents at the first time: noise, given latents with noise added, or a part of both."""
    start = None if given.start is None else given.start.to(noise)
    if start is None:
        return diffusion.start(noise, ts[0])
    if settings.starts_within(ts):
        return diffusion.add_noise(start, noise, ts[0])
    x = diffusion.start(noise, ts[0])
    if settings.start_share:
        x = (1 - settings.start_share) * x + settings.start_share * start
    if given.mask is not None:
        x = torch.lerp(diffusion.add_noise(start, noise, ts[0]), x, given.mask.to(x))
    return x


def _denoise(
    model: VideoModel,
    positive: Conditioning,
    negative: Conditioning | None,
    settings: Sampling,
    shape: Sequence[int],
    given: _Given,
    ts: Tensor,
) -> Denoise:
    """The guided denoiser for the whole batch, run for some samples at a time; what is given stays as it is."""
    if settings.cfg != 1.0 and negative is None:
        raise SettingsError(
            "Guidance needs a negative prompt",
            given=f"cfg {settings.cfg}",
            do="give a negative prompt (an empty one is fine), or set cfg to 1",
        )
    batch = shape[0]
    size = settings.samples_at_once or (1 if model.device.type == "cpu" else batch)
    groups = [slice(first, min(first + size, batch)) for first in range(0, batch, size)]
    positive = positive.expand(batch)
    held = positive.held
    share_first = _shares_first(model, positive, shape[2])
    positive = replace(positive, held=None)
    if negative is not None:
        negative = replace(negative.expand(batch), held=None, concat=positive.concat)

    def part_of(group: slice) -> Denoise:
        pair = positive.take(group), None if negative is None else negative.take(group)
        return _in_windows(model, *pair, settings, shape[2], ts, share_first=share_first)

    parts = [part_of(group) for group in groups]

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        times = [t[group] if t.ndim and t.shape[0] == batch else t for group in groups]
        return torch.cat([part(x_t[group], at) for part, group, at in zip(parts, groups, times, strict=True)])

    whole = parts[0] if len(parts) == 1 else denoise
    if given.mask is not None:
        assert given.start is not None, "checked before"
        whole = keep(whole, given.start.to(model.device), given.mask.to(model.device), given.until)
    return whole if held is None else hold(whole, held)


def _shares_first(model: VideoModel, cond: Conditioning, num_frames: int) -> bool:
    """Whether every context window sees the first latent frame, as one that was given must be seen."""
    windows = model.tricks.windows
    if windows is None or num_frames <= windows.size:
        return False
    return windows.shares_first(cond.held is not None or cond.concat is not None)


def _in_windows(
    model: VideoModel,
    positive: Conditioning,
    negative: Conditioning | None,
    settings: Sampling,
    num_frames: int,
    ts: Tensor,
    *,
    share_first: bool,
) -> Denoise:
    """The guided denoiser of a video of ``num_frames`` latent frames, in context windows where it is too long."""
    windows = model.tricks.windows
    if windows is None or num_frames <= windows.size:
        return _guided(model, positive, negative, settings, ts)

    def of(frames: Frames) -> Denoise:
        pair = positive.at_frames(frames), None if negative is None else negative.at_frames(frames)
        return _guided(model, *pair, settings, ts)

    return windowed(of, windows, num_frames, step_of=StepFinder(ts).at, share_first=share_first)


def _guided(
    model: VideoModel, positive: Conditioning, negative: Conditioning | None, settings: Sampling, ts: Tensor
) -> Denoise:
    """The network's answers put together, in the order that :mod:`.tricks` lays down."""
    tricks, diffusion = model.tricks, model.diffusion
    cond, uncond = _denoisers(model, positive, negative, settings)
    guided = cond = once(cond) if tricks.weak_passes else cond
    if uncond is not None:
        scale, rescale = _cfg_scale(settings), settings.cfg_rescale
        if tricks.cfg_zero is not None and tricks.cfg_zero.projected:
            guided = cfg_zero_star(cond, uncond, scale, diffusion, rescale=rescale)
        else:
            guided = cfg(cond, uncond, scale, rescale=rescale, diffusion=diffusion)
    for weak in tricks.weak_passes:
        weakened = denoiser(model, positive, stream=_weak_stream(model, weak))
        guided = away_from(guided, cond, weakened, weak.scale_at, rescale=weak.rescale)
    if tricks.cfg_zero is not None and tricks.cfg_zero.zero_steps and not settings.starts_within(ts):
        last = min(tricks.cfg_zero.zero_steps, len(ts) - 1)
        guided = zero_init(guided, diffusion, float(ts[last - 1 : last + 1].mean()))  # between two steps
    return guided


def _denoisers(
    model: VideoModel, positive: Conditioning, negative: Conditioning | None, settings: Sampling
) -> tuple[Denoise, Denoise | None]:
    """The network with the prompt, and without it where there is guidance."""
    if negative is None or settings.cfg == 1.0:
        return denoiser(model, positive), None
    if settings.cfg_batched and planned("sample", "cfg_batched", True):
        scale = _cfg_scale(settings)
        return denoiser_pair(model, positive, negative, both_at=lambda t: bool(scale(t) != 1.0))
    return denoiser(model, positive), denoiser(model, negative, stream=Stream(branches=("uncond",)))


def _cfg_scale(settings: Sampling) -> ScaleAt:
    assert settings.cfg is not None
    assert settings.cfg_schedule is not None
    assert settings.num_steps is not None
    num_steps = settings.num_steps if settings.sigmas is None else len(settings.sigmas) - 1
    interval = {"start": settings.cfg_start, "end": settings.cfg_end}
    return cfg_schedule(settings.cfg_schedule, settings.cfg, **interval, num_steps=num_steps)


def _weak_stream(model: VideoModel, weak: WeakPass) -> Stream:
    numbers = block_numbers(weak.blocks, model.block_paths)
    weakening = Weakening(unattending=numbers) if weak.attention_only else Weakening(skipped=numbers)
    return Stream(weakening=weakening)


def measure_curve(
    model: VideoModel,
    positive: Conditioning,
    negative: Conditioning | None,
    shape: Sequence[int],
    settings: Sampling,
    *,
    host: Host | None = None,
) -> MagnitudeCurve:
    """Sample once, computing every step, and measure how the blocks' residual changes: MagCache's curve.

    Args as :func:`sample_latents`; ``settings.resume_path`` is not read.

    Raises:
        SettingsError: before anything is computed, or a run of fewer than two steps.
    """
    if model.family.block_rules is None:
        raise SettingsError(f"{model.family.title} has no blocks that a step cache can skip")
    recorder, settings, host = CurveRecorder(), settings.resolved(model.defaults), host or LocalHost()
    _sample(
        *(model, positive, negative, shape, settings),
        host=host,
        given=_Given(),
        preview=None,
        run=None,
        recorder=recorder,
    )
    return recorder.curve(model.fingerprint)


def decode_latents(
    codec: Codec,
    latents: Tensor,
    *,
    tiling: Coding = TILES,
    host: Host | None = None,
    threads: int | None = None,
    retry: bool = True,
) -> Tensor:
    """(B, C, T, H, W) latents -> video (B, 3, T, H, W) float32 in [-1, 1] on the CPU, one sample at a time.

    Args:
        tiling: of videos larger than one tile, or a bound within which they are decoded exactly; None decodes in one
            pass. Where that does not fit the memory, smaller tiles are tried. A plan that is followed
            (``memory.plan.following``) knows better.
        retry: a decoder whose numbers are not finite is tried again in a safe way.

    Raises:
        NumericsError: the decoder's output is not finite, which would be a black video.
        MemoryLimitError: small tiles do not fit the memory either.
        SettingsError: the bound is too small for a video of this size.
    """
    host = host or LocalHost()
    tiling = planned("decode", "tiling", tiling)
    begin_stage()

    def decode(coding: Coding) -> Tensor:
        videos = []
        with CheckedCodec(codec, retry=retry) as checked:
            for index, one in enumerate(latents.cpu().split(1)):
                host.check_cancelled()
                host.progress("decode", index, len(latents))
                on_tile = _on_tile(host, "decode", index, len(latents))
                # An exact codec needs the layers themselves, so that it is checked from outside.
                is_exact = isinstance(coding, Bound)
                one_codec = saving(codec if is_exact else checked, coding, on_tile)
                one_codec = CheckedCodec(one_codec, retry=False) if is_exact else one_codec
                videos.append(one_codec.decode(one).cpu().float().clamp_(-1, 1))
        return videos[0] if len(videos) == 1 else torch.cat(videos)

    with torch.inference_mode(), using_threads(threads), watched(host, codec):
        video = relieved(
            decode, tiling, DECODING_MEASURES, what="Decoding", advice=lambda: _fewer_pixels(codec, latents)
        )
        if bool(video.amax() < BLACK):
            log.warning("the decoded video is black throughout: look at the prompt, the guidance and the LoRAs")
        host.progress("decode", len(latents), len(latents))
    return video


BLACK = -0.98
"""a video in which nothing is lighter than this is black to the eye"""


def _fewer_pixels(codec: Codec, latents: Tensor) -> str:
    grid = codec.grid
    frames, height, width = grid.num_frames(latents.shape[2]), *(side * grid.spatial for side in latents.shape[3:])
    size = len(latents) * 3 * frames * height * width * 4 / 2**30
    return (
        f"{len(latents)} x {frames} frames of {width} x {height} px are {size:.2f} GiB as a video alone: "
        "make fewer or smaller ones, close other programs, or load the VAE in bfloat16"
    )


def decode_frames(
    codec: Codec,
    latents: Tensor,
    *,
    bound: Bound,
    host: Host | None = None,
    threads: int | None = None,
    hidden_frames: int = 0,
) -> Iterator[Tensor]:
    """The frames of :func:`decode_latents`, (3, H, W) one by one as they are finished; videos follow each other.

    Only a few finished frames are in memory at a time, so that a video may be longer than would fit.

    Args:
        bound: within which a codec is run layer by layer that does not hand on its frames by itself.
        hidden_frames: at the start of each video, left out.

    Raises:
        NumericsError, SettingsError: as :func:`decode_latents`.
    """
    host = host or LocalHost()
    for index, one in enumerate(latents.cpu().split(1)):
        host.check_cancelled()
        on_part = _on_tile(host, "decode", index, len(latents))
        if isinstance(codec, StreamingCodec):
            parts = codec.frames(one, on_part=on_part)
        else:
            parts = bound.on(codec, on_tile=on_part).frames(one)
        first = 0
        with contextlib.closing(parts):
            while True:
                # The caller has the turn between two parts: what is set for computing is set anew for each.
                with torch.inference_mode(), using_threads(threads), watched(host, codec):
                    part = next(parts, None)
                    shown = None if part is None else _shown(part.cpu().float())
                if shown is None:
                    break
                yield from shown[:, max(0, hidden_frames - first) :].unbind(1)
                first += shown.shape[1]
    host.progress("decode", len(latents), len(latents))


def encode_video(codec: Codec, video: Tensor, *, tiling: Coding = TILES, host: Host | None = None) -> Tensor:
    """(B, 3, T, H, W) in [-1, 1] -> latents at unit scale; ``tiling`` as in :func:`decode_latents`.

    Raises:
        SettingsError: a size that the codec cannot take, or a bound too small for it.
    """
    host = host or LocalHost()
    with torch.inference_mode(), watched(host, codec):
        host.check_cancelled()
        return saving(codec, tiling, _on_tile(host, "encode", 0, 1)).encode(video)


def saving(codec: Codec, coding: Coding, on_tile: OnTile | None = None) -> Codec:
    """``codec`` that saves memory in this way."""
    if coding is None:
        return codec
    return tiled(codec, coding, on_tile=on_tile) if isinstance(coding, Tiling) else coding.on(codec, on_tile=on_tile)


def _shown(video: Tensor) -> Tensor:
    """Clamped in place; NumericsError where it is not finite."""
    if not bool(torch.isfinite(video).all()):
        raise NumericsError(
            "The decoded video is not finite", do="load the VAE in float32 or bfloat16: float16 overflows"
        )
    return video.clamp_(-1, 1)


def _on_tile(host: Host, what: str, index: int, num_videos: int) -> OnTile:
    """Progress in tiles of all videos, and a question whether to stop."""

    def on_tile(done: int, total: int) -> None:
        if total > 1:
            host.progress(what, index * total + done, num_videos * total)
        host.check_cancelled()

    return on_tile


def generate(
    bundle: Bundle,
    prompt: str | Sequence[str],
    shape: VideoShape | None = None,
    settings: Sampling | None = None,
    *,
    keyframes: Sequence[Keyframe] = (),
    method: str = "auto",
    mode: str | None = None,
    prompt_image: Tensor | None = None,
    tiling: Coding = TILES,
    host: Host | None = None,
) -> Tensor:
    """A video for each prompt (and ``num_videos`` of each).

    Sample i has the seed ``settings.seed + i``: a batch gives what the same seeds give one by one.

    Args:
        keyframes: pictures of the video's size that it goes on from.
        method: how the network takes them, where the checkpoint does not say (see :func:`with_keyframes`).
        mode: how closely motion keeps to them, a key of ``family.keyframes.modes``; None: the family's default.
        prompt_image: (H, W, 3) in [0, 1]: the picture as text encoders with eyes see it, whole; None: as the first
            keyframe shows it.
        tiling: how the decoder saves memory, see :func:`decode_latents`.

    Returns:
        (B, 3, T, H, W) float32 in [-1, 1] on the CPU.

    Raises:
        SettingsError: before anything is computed.
        Cancelled, NumericsError, FileError: as :func:`sample_latents`.
    """
    host = host or LocalHost()
    model = bundle.model
    prompts = check_prompts(prompt)
    rules = model.family.keyframes
    settings = settings or Sampling()
    if keyframes:
        chosen = image_mode(model, mode)
        shift = chosen.shift if settings.shift is None else settings.shift
        settings = replace(settings, shift=shift, start_share=chosen.start_share)
    settings = settings.resolved(model.defaults)
    settings.check(model.diffusion)
    shape = shape or bundle.default_shape
    shape.check(bundle.codec.grid, patch=model.family.patch(model.config))
    told = image_method(model, method)(model.config)
    rules.check(told, keyframes, shape.num_frames)
    prompts = [text for text in prompts for _ in range(settings.num_videos)]
    assert settings.negative_prompt is not None
    latent_shape = (len(prompts), *shape.latent_shape(bundle.codec.grid))

    threads = choose_threads(settings, model, latent_shape)
    with using_threads(threads), watched(host, bundle.text, bundle.codec):
        host.progress("encode", 0, 1)
        image = shape.num_frames == 1
        if prompt_image is None and keyframes:
            prompt_image = keyframes[0].image[0].movedim(0, -1) / 2 + 0.5
        seen = seen_picture(bundle.text, rules, told, prompt_image)
        positive = encode_prompts(bundle.text, model, prompts, guidance=settings.guidance, image=image, seen=seen)
        negative = None
        if settings.cfg != 1.0:
            texts = [settings.negative_prompt]
            black = None if seen is None else seen.black()
            negative = encode_prompts(bundle.text, model, texts, guidance=settings.guidance, image=image, seen=black)
        pictures = encode_pictures(rules, told, bundle.codec, keyframes, shape)
        host.progress("encode", 1, 1)

    positive = with_keyframes(model, positive, pictures, latent_shape, method=method)
    start = repeat_over_frames(pictures[0].latents, latent_shape) if pictures else None
    identity = {"prompt": prompts, "text encoders": bundle.text.fingerprint}
    if seen is not None:
        identity["seen"] = fingerprint(Conditioning(concat=seen.image))
    if start is not None:
        identity["image"] = fingerprint(Conditioning(concat=start))
    if pictures and rules.fills_in(told):
        identity["video"] = fingerprint(positive)
    run = _run_file(model, latent_shape, settings, identity)
    latents = _sample(
        model,
        positive,
        negative,
        latent_shape,
        settings,
        host=host,
        given=_Given(start),
        preview=bundle.latent_rgb(),
        run=run,
    )
    with contextlib.nullcontext() if run is None else run.saved_on_failure():
        video = decode_latents(bundle.codec, latents, tiling=tiling, host=host, threads=threads, retry=settings.retry)
    if run is not None:
        run.remove()
    return video[:, :, rules.hidden_frames(model.config) :]


# --- around the steps -------------------------------------------------------------------------------------------------


def _run_file(model: VideoModel, shape: Sequence[int], settings: Sampling, known: Mapping[str, Any]) -> RunFile | None:
    """The file of an interrupted run; None when none is wanted. ``known`` is what the result depends on besides."""
    if settings.resume_path is None:
        return None
    outside = {"resume_path", "retry", "threads", "cfg_batched", "num_videos", "samples_at_once"}  # how, not what
    values = {key: value for key, value in asdict(settings).items() if key not in outside}
    # None rather than no LoRAs at all: runs that were kept before there were LoRAs say nothing of them.
    loras = [use.identity for use in model.loras] or None
    # As for LoRAs; another kernel is only another rounding, but tiles are another video.
    tiles = None if model.attention is None or model.attention.tiles is None else asdict(model.attention.tiles)
    identity = {**values, **known, "shape": list(shape), "checkpoint": model.fingerprint, "LoRAs": loras}
    identity["sliding tiles"] = tiles
    if model.tricks.identity is not None:
        identity["tricks"] = model.tricks.identity
    team = current_team()
    return RunFile.at(Path(settings.resume_path), identity, writes=team is None or team.leads)


def fingerprint(*conditionings: Conditioning | None) -> str:
    """A hash of every tensor inside."""
    hasher = hashlib.sha256()

    def add(tensor: Tensor) -> Tensor:
        hasher.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return tensor

    for cond in conditionings:
        if cond is not None:
            cond.map(add)
    return hasher.hexdigest()


def choose_threads(settings: Sampling, model: VideoModel, shape: Sequence[int]) -> int | None:
    """CPU threads for a run, or None to leave torch's setting alone.

    Small matrices on many threads spend their time waiting for each other, and on a busy machine that wait is
    twenty times the work. The choice depends on nothing but the work, so that a seed keeps giving the same bits.
    """
    if settings.threads != "auto":
        return settings.threads
    if model.device.type != "cpu":
        return None
    tokens = math.prod(shape[2:]) // math.prod(model.family.patch(model.config))
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    small = (layer for layer in model.network.modules() if isinstance(layer, QuantisedLinear))
    parameters += sum(layer.in_features * layer.out_features for layer in small)
    team = current_team()
    cores = available_cores() if team is None else max(1, available_cores() // team.size)
    return 1 if 2 * parameters * tokens < SMALL_FLOPS else cores


@contextlib.contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Compute with this many CPU threads, then as many as before; None changes nothing."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)
