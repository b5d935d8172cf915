"""Training of a diffusion transformer of any family: cached latents, videos and images, text on the fly.

Noise, target and conditioning come from the core (``VideoModel.predict``, ``Diffusion``), never from here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vidgen_core.codec import Codec
from ..vidgen_core.errors import MissingLibraryError, RecipeError
from ..vidgen_core.families import FAMILIES, TextEncoder
from ..vidgen_core.generate import Sampling, decode_latents, encode_prompts, sample_latents, with_keyframes
from ..vidgen_core.keyframes import LatentKeyframe
from ..vidgen_core.memory.compiled import blocks_at, missing_compiler
from ..vidgen_core.model import VideoModel, load_network, load_text
from ..vidgen_core.preview import fit_preview
from ..vidgen_core.timesteps import shift_time
from ..vidgen_core.types import Conditioning, Defaults, VideoShape
from .data import detect, shapes
from .data.latents import load_frozen_codec, open_latents
from .data.pool import PoolSettings, drawing_odds, pick
from .data.styles import STYLES
from .export import export_network
from .graft import fit_output, graft, graft_pairs
from .loop import Draw, Objective, mix
from .lora import Adapters, LoraSettings, write_loras
from .pictures import contact_sheet, to_pixels
from .recipe import OptimizerSettings, RunSettings, ScheduleSettings, model_config
from .start import start_from
from .teacher import Teacher, TeacherSettings, first_frame_given, time_of_share
from .team import ALONE, Team

log = logging.getLogger("vidgen")

GRAFT_CLIPS = 128
"""to which the output layer of a grafted network is fitted"""
HIDDEN_LAYERS = {
    "hunyuan": ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "linear1", "linear2"),
    "cogvideox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
}
"""family -> ends of the names of its blocks' attention and MLP matrices"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSettings:
    """How often which noise level is trained: t = shift(sigmoid(normal(mean, std)))."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    """above 1 moves weight to the noisy end"""
    uniform_share: float = 0.1
    """share of the samples with uniform t: the ends would hardly be trained otherwise"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DitMixSettings:
    image_share: float = 0.15
    """of the batches, how many are single frames"""
    image_batch: int = 4
    """images of such a batch for each video of the others"""
    held_share: float = 0.0
    """of the video batches, how many are given their first frame: its clean latent in place of the noisy one (token
    replacement), or on the channels of networks that have them for a picture"""
    picture_noise: tuple[float, float] | None = None
    """mean and deviation of the logarithm of the noise on a picture before it is encoded for the channels; CogVideoX's
    trainers have (-3.0, 0.5). None: pictures are clean, as they are when the network is used"""
    lead: Literal["first", "nothing"] = "first"
    """what the latent frames are that run along in front (CogVideoX 1.5): copies of the first one, or zeros"""
    text_dropout: float = 0.1
    """share of the samples with the empty prompt, for guidance"""
    emphasis: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """attribute -> value -> how many times as often its clips are drawn; what is rare or hard is learned last"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DitEvaluationSettings:
    num_losses: int = 64
    """unseen clips for the validation loss"""
    num_videos: int = 12
    """prompts that are rendered and judged; half of them are combinations never trained on"""
    num_steps: int | None = None
    """None: the default of the model"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DitRecipe:
    """``stage = "dit"``."""

    stage: Literal["dit"]
    codec: str
    """the codec's file"""
    text: str
    """the text encoders' file"""
    run: RunSettings
    family: str = "hunyuan"
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    model: Mapping[str, Any] = field(default_factory=dict)
    """fields of the family's ``NetworkConfig``"""
    defaults: Defaults = field(default_factory=Defaults)
    """written into the checkpoint; evaluation samples with them"""
    pool: PoolSettings = field(default_factory=PoolSettings)
    time: TimeSettings = field(default_factory=TimeSettings)
    mix: DitMixSettings = field(default_factory=DitMixSettings)
    evaluation: DitEvaluationSettings = field(default_factory=DitEvaluationSettings)
    init: str | None = None
    """a network file to start from"""
    graft: str | None = None
    """a network file of half the width that takes one latent frame to a token: this one takes two and begins with its
    weights twice, see ``graft.py``"""
    teacher: TeacherSettings | None = None
    """another network of the same latents that knows the captions already"""
    lora: LoraSettings | None = None
    """train a LoRA of ``init``, whose file then says what ``model`` and ``defaults`` are"""
    compile: bool = False
    """torch.compile the blocks of the network; needs a C++ compiler"""


@dataclass(frozen=True, slots=True)
class DitBatch:
    """What one step sees. x0 and noise (B, C, T, H, W), t (B,), or (B, 1, T, 1, 1) with 0 for given frames."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    cond: Conditioning
    wanted: Tensor
    """(B, C, T, H, W) the clean latents to be predicted: ``x0``, or what a teacher expects of them"""
    kind: Literal["video", "image", "held"] = "video"


@dataclass(frozen=True, slots=True)
class Frozen:
    """The parts that are used and not trained; outside of the module tree, so never saved or averaged."""

    codec: Codec
    text: TextEncoder


class DitObjective(Objective):
    """The network, its latents and captions, and the loss of its noise process."""

    metrics = ("video", "image", "held")

    def __init__(self, recipe: DitRecipe) -> None:
        super().__init__()
        _check_beginning(recipe)
        base = None if recipe.lora is None else _base(recipe)
        if base is not None:
            recipe = replace(recipe, family=base.family.name, defaults=base.defaults)
        self.recipe = recipe
        text = load_text(recipe.text, dtype=torch.float32)
        assert isinstance(text, nn.Module)
        self.frozen = Frozen(load_frozen_codec(recipe.codec), text.requires_grad_(False).eval())
        self.model = self._new_model() if base is None else base
        self.network = self.model.network
        self._check()
        self.adapters = None
        if recipe.lora is not None:
            generator = torch.Generator().manual_seed(recipe.run.seed)
            self.adapters = Adapters(self.network, recipe.lora, self.model.family.lora_targets, generator)
        if recipe.compile:
            _check_compiler()  # before hours of drawing and encoding, not at the first step
        self.teacher = None
        if recipe.teacher is not None:
            channels = self.frozen.codec.grid.channels
            self.teacher = Teacher(
                recipe.teacher, channels=channels, precision=recipe.run.precision, compile=recipe.compile
            )
        if recipe.graft is not None:  # before clips are drawn and encoded: it may not fit
            graft_pairs(self.network, load_network(recipe.graft, dtype=torch.float32).network)
        self.cache = open_latents(recipe.pool, recipe.codec, processes=recipe.run.processes)
        self.odds = drawing_odds(self.cache.scenes, recipe.mix.emphasis)
        if recipe.graft is not None or (recipe.init is None and recipe.teacher is not None and recipe.teacher.graft):
            self._fit_to_clips()
        if recipe.compile:
            # One block of each kind is compiled and serves all of them: the whole network would take far longer.
            for block in blocks_at(self.network, self.model.family.blocks):
                block.compile(dynamic=True)

    def _new_model(self) -> VideoModel:
        recipe = self.recipe
        config = model_config(recipe.family, "network", recipe.model)
        network = FAMILIES[recipe.family].parts["network"].build(config, {})
        network.init_weights(torch.Generator().manual_seed(recipe.run.seed))
        if recipe.init is not None:
            start_from(recipe.init, "network", network, config, ignore=("accepts_first_frame",))
        return VideoModel.of(recipe.family, config, network, defaults=recipe.defaults)

    def _fit_to_clips(self) -> None:
        """Begin with the teacher's weights, if asked to, and an output layer fitted to a few of the clips."""
        teacher, num = self.teacher, min(GRAFT_CLIPS, len(self.cache))
        rng, generator = np.random.default_rng(self.recipe.run.seed), torch.Generator().manual_seed(0)
        captions = [shapes.caption(self.cache.scenes[index], rng) for index in range(num)]
        if self.recipe.graft is None:
            assert teacher is not None
            graft(self.network, teacher.model.network, self.model.diffusion, teacher.text.encode(captions).pooled)
        x0 = torch.stack([self.cache.video(index) for index in range(num)])
        noise = torch.stack([self._noise(latent.shape, generator) for latent in x0])
        batch = self._assembled(x0, noise, self.shares(num, generator), captions, teacher=teacher)
        x_t = self.model.diffusion.add_noise(batch.x0, batch.noise, batch.t)
        wanted = self.model.diffusion.target(batch.wanted, x_t, batch.t)
        fit_output(self.network, lambda: self.model.predict(x_t, batch.t, batch.cond), wanted)

    def _check(self) -> None:
        family, config = self.model.family, self.model.config
        problem = family.fits_text(config, self.frozen.text.config)
        if problem is not None:
            raise RecipeError("The network and the text encoders do not fit together", given=problem)
        channels = self.frozen.codec.grid.channels
        if family.latent_channels(config) != channels:
            raise RecipeError(
                "The network and the codec do not fit together",
                given=f"model.out_channels = {family.latent_channels(config)}",
                expected=f"{channels}, the channels of the latents",
            )

    @property
    def stacks_pictures(self) -> bool:
        """Whether a given picture goes onto the network's channels; else it takes the place of noisy latents."""
        return self.model.config.in_channels > self.model.family.latent_channels(self.model.config)

    def is_hidden(self, name: str) -> bool:
        """Attention and MLP matrices of the blocks; embedders, modulations and the output stay with AdamW."""
        if self.adapters is not None:
            return False
        layers = HIDDEN_LAYERS[self.model.family.name]
        return any(part in name for part in ("blocks.", "layers.")) and name.removesuffix(".weight").endswith(layers)

    # ---- batches -------------------------------------------------------------------------------------------

    def batch(self, draw: Draw) -> DitBatch:
        mix_settings = self.recipe.mix
        shared = draw.shared()
        is_image = float(torch.rand((), generator=shared)) < mix_settings.image_share
        is_held = not is_image and float(torch.rand((), generator=shared)) < mix_settings.held_share
        num = draw.batch_size * (mix_settings.image_batch if is_image else 1)
        share = self.shares(num, shared)
        own = num // draw.world
        share = share[draw.rank * own : (draw.rank + 1) * own]
        latents, captions, noises, pictures = [], [], [], []
        for generator in draw.samples(num):
            number, seed, drop = torch.randint(0, 1 << 30, (3,), generator=generator).tolist()
            index = pick(self.odds, number)
            latent = self.cache.image(index) if is_image else self.cache.video(index)
            latents.append(latent)
            noises.append(self._noise(latent.shape, generator))
            dropped = drop < mix_settings.text_dropout * (1 << 30)
            rng = np.random.default_rng(seed)
            captions.append("" if dropped else shapes.caption(self.cache.scenes[index], rng, image=is_image))
            if is_held and self.stacks_pictures:
                pictures.append(self._picture(index, generator))
        return self._assembled(
            torch.stack(latents),
            torch.stack(noises),
            share,
            captions,
            kind="held" if is_held else "image" if is_image else "video",
            pictures=torch.stack(pictures) if pictures else None,
            teacher=self.teacher if self.teacher is not None and draw.position >= self.teacher.start else None,
        )

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """For latents of this shape (C, T, H, W) and the frames that run along in front of them."""
        channels, frames, *sides = shape
        return torch.randn(channels, frames + self._num_lead(frames), *sides, generator=generator)

    def _num_lead(self, num_frames: int) -> int:
        return self.model.family.lead_frames(self.model.config, num_frames)

    def _picture(self, index: int, generator: torch.Generator) -> Tensor:
        """(C, 1, H, W): the first frame of a clip, encoded by itself as when the network is used."""
        pool, noise = self.recipe.pool, self.recipe.mix.picture_noise
        frame = shapes.render(self.cache.scenes[index], num_frames=1, height_px=pool.size_px, width_px=pool.size_px)
        picture = torch.from_numpy(STYLES[pool.style](frame)).float() / 127.5 - 1
        if noise is not None:
            mean, deviation = noise
            strength = torch.exp(mean + deviation * torch.randn((), generator=generator))
            picture = picture + strength * torch.randn(picture.shape, generator=generator)
        with torch.no_grad():
            return self.frozen.codec.encode(picture[None])[0]

    def _assembled(
        self,
        x0: Tensor,
        noise: Tensor,
        share: Tensor,
        captions: Sequence[str],
        *,
        kind: Literal["video", "image", "held"] = "video",
        pictures: Tensor | None = None,
        teacher: Teacher | None = None,
    ) -> DitBatch:
        """A batch on the network's device. x0 (B, C, T, H, W) without what runs along in front of it, noise with it."""
        device, lead = self.model.device, self._num_lead(x0.shape[2])
        x0, noise, share = x0.to(device), noise.to(device), share.to(device)
        wanted = x0
        if teacher is not None:
            wanted = teacher.expected(
                x0, noise[:, :, lead:], share, captions, image=kind == "image", held=kind == "held"
            )
        cond = self.conditioning(captions, image=kind == "image").to(device)
        t = time_of_share(self.model.diffusion, share)
        if self.stacks_pictures:
            cond = self._with_pictures(cond, pictures, x0)
        elif kind == "held":
            t = first_frame_given(t, x0.shape[2])
        return DitBatch(self._led(x0, lead), noise, t, cond, wanted=self._led(wanted, lead), kind=kind)

    def _led(self, x0: Tensor, lead: int) -> Tensor:
        if not lead:
            return x0
        first = x0[:, :, :1].expand(-1, -1, lead, -1, -1)
        return torch.cat([first if self.recipe.mix.lead == "first" else torch.zeros_like(first), x0], dim=2)

    def _with_pictures(self, cond: Conditioning, pictures: Tensor | None, x0: Tensor) -> Conditioning:
        """Where there are none, the channels for them are empty."""
        if pictures is not None:
            return with_keyframes(self.model, cond, [LatentKeyframe(latents=pictures, index=0)], x0.shape)
        channels = self.model.config.in_channels - x0.shape[1]
        frames = x0.shape[2] + self._num_lead(x0.shape[2])
        return replace(cond, concat=x0.new_zeros(len(x0), channels, frames, *x0.shape[3:]))

    def shares(self, num: int, generator: torch.Generator) -> Tensor:
        """(num,) float32 shares of noise (the times of flow matching), spread evenly over the quantiles of their
        distribution and in random order."""
        settings = self.recipe.time
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        quantile = (torch.arange(num, dtype=torch.float64) + offset) / num
        order = torch.randperm(num, generator=generator)
        num_uniform = round(settings.uniform_share * num)
        # Every k-th quantile is spent on the uniform part, so that both parts cover the whole range.
        uniform = torch.zeros(num, dtype=torch.bool)
        if num_uniform:
            uniform[torch.linspace(0, num - 1, num_uniform).round().long()] = True
        normal = settings.mean + settings.std * math.sqrt(2) * torch.erfinv(2 * quantile - 1)
        share = torch.where(uniform, quantile, shift_time(torch.sigmoid(normal), settings.shift))
        return share[order].clamp(1e-4, 1.0).float()

    @torch.no_grad()
    def conditioning(self, captions: Sequence[str], *, image: bool = False) -> Conditioning:
        return self.model.conditioning(self.frozen.text.encode(captions, image_mode=image))

    # ---- loss ----------------------------------------------------------------------------------------------

    def forward(self, batch: DitBatch) -> dict[str, Tensor]:
        loss = self.errors(batch).mean()
        return {"loss": loss, batch.kind: loss.detach()}

    def errors(self, batch: DitBatch) -> Tensor:
        """(B,) mean squared error of the prediction per sample, over the frames that are not given."""
        diffusion = self.model.diffusion
        x_t = diffusion.add_noise(batch.x0, batch.noise, batch.t)
        output = self.model.predict(x_t, batch.t, batch.cond)
        target = diffusion.target(batch.wanted, x_t, batch.t)
        squares = F.mse_loss(output.float(), target.float(), reduction="none").mean(dim=(1, 3, 4))
        if batch.t.ndim == 1:
            return squares.mean(dim=1)
        asked = batch.t[:, 0, :, 0, 0] > 0
        return (squares * asked).sum(dim=1) / asked.sum(dim=1)

    # ---- judging -------------------------------------------------------------------------------------------

    def evaluate(self, folder: Path, step: int, team: Team = ALONE) -> dict[str, float]:
        """Validation loss on unseen clips, and how well renders of unseen prompts follow them (0..1)."""
        figures = self._validation_loss(team)
        scenes = [self._unseen_scene(i) for i in range(self.recipe.evaluation.num_videos)]
        numbers = team.share(range(len(scenes)))
        rendered = self._render({number: scenes[number][1] for number in numbers})
        judged = [(video, _correct(video, scenes[number][0])) for number, video in zip(numbers, rendered, strict=True)]
        judged = team.gather(judged)
        if judged:
            figures |= {name: sum(row[name] for _, row in judged) / len(judged) for name in judged[0][1]}
        if judged and team.leads:
            contact_sheet(folder / "samples" / f"step-{step:08d}.png", [video for video, _ in judged])
            text = "\n".join(caption for _, caption in scenes)
            (folder / "samples" / "prompts.txt").write_text(text + "\n", encoding="utf-8")
        return figures

    def _unseen_scene(self, index: int) -> tuple[shapes.Scene, str]:
        rng = np.random.default_rng([0xEA7, self.recipe.run.seed, index])
        scene = shapes.sample_scene(rng, "heldout" if index % 2 else "seen")
        return scene, shapes.caption(scene, rng)

    def _validation_loss(self, team: Team = ALONE) -> dict[str, float]:
        """Mean loss over a fixed grid of times, with fixed noise and fixed unseen clips."""
        num = self.recipe.evaluation.num_losses
        if not num:
            return {}
        errors = team.gather(
            [self._validation_errors(first, min(first + 16, num)) for first in team.share(range(0, num, 16))]
        )
        return {"validation": float(torch.cat(errors).mean())}

    def _validation_errors(self, first: int, end: int) -> Tensor:
        """(end - first,) losses of the clips of these numbers, on the CPU."""
        clips = [self._unseen_scene(1_000_000 + 2 * i) for i in range(first, end)]
        draw = STYLES[self.recipe.pool.style]
        video = torch.stack([torch.from_numpy(draw(shapes.render(scene))) for scene, _ in clips]).float() / 127.5 - 1
        x0 = self.frozen.codec.encode(video)
        frames = x0.shape[2] + self._num_lead(x0.shape[2])
        generator = torch.Generator().manual_seed(mix(first))
        noise = torch.randn(*x0.shape[:2], frames, *x0.shape[3:], generator=generator)
        share = (torch.arange(first, end) % 16 + 0.5) / 16
        return self.errors(self._assembled(x0, noise, share, [caption for _, caption in clips])).cpu()

    def _render(self, captions: Mapping[int, str]) -> list[Tensor]:
        """(3, T, H, W) in [-1, 1] each, at the model's default settings; the seed is the prompt's number."""
        defaults = self.recipe.defaults
        settings = Sampling(num_steps=self.recipe.evaluation.num_steps, seed=1)
        shape = VideoShape(num_frames=defaults.num_frames, height_px=defaults.height_px, width_px=defaults.width_px)
        latent_shape = shape.latent_shape(self.frozen.codec.grid)
        negative = encode_prompts(self.frozen.text, self.model, [defaults.negative_prompt])
        videos = []
        for number, caption in captions.items():
            positive = encode_prompts(self.frozen.text, self.model, [caption])
            if self.stacks_pictures:
                positive = self._with_pictures(positive, None, torch.zeros(1, *latent_shape))
            latents = sample_latents(
                self.model, positive, negative, (1, *latent_shape), replace(settings, seed=settings.seed + number)
            )
            videos.append(decode_latents(self.frozen.codec, latents)[0])
        return videos

    def finish(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Write ``network.safetensors``, or the LoRA in each of its spellings."""
        description = f"trained {summary['steps']} steps in {summary['minutes']} min, seed {summary['seed']}"
        if self.adapters is not None:
            assert self.recipe.lora is not None
            notes = {"title": self.recipe.run.name, "description": description}
            for path in write_loras(folder, self.adapters, self.recipe.lora, self.model, **notes):
                log.info("Wrote %s", path)
            return
        path = folder / "network.safetensors"
        config = self.model.config
        if hasattr(config, "accepts_first_frame"):
            config = replace(config, accepts_first_frame=self.recipe.mix.held_share > 0)
        export_network(
            path,
            self.network,
            config,
            self.recipe.defaults,
            family=self.model.family.name,
            preview=fit_preview(self.frozen.codec),
            dtype=torch.float16,
            title=f"VidGen tiny {self.model.family.title}",
            description=description,
        )
        log.info("Wrote %s", path)


def _base(recipe: DitRecipe) -> VideoModel:
    """The network that a LoRA is trained for, in float32, frozen."""
    assert recipe.lora is not None
    recipe.lora.check()
    if recipe.init is None:
        raise RecipeError(
            "A LoRA is trained for a network that is there already", given="[lora] without init", do='add init = "FILE"'
        )
    if recipe.model:
        raise RecipeError(
            "The network of a LoRA is what its file says", given="[model] beside [lora]", do="leave [model] out"
        )
    return load_network(recipe.init, dtype=torch.float32)


def _check_beginning(recipe: DitRecipe) -> None:
    if recipe.graft is None:
        return
    given = [f"init = {recipe.init!r}"] if recipe.init is not None else []
    given += ["teacher.graft = true"] if recipe.teacher is not None and recipe.teacher.graft else []
    given += ["[lora]"] if recipe.lora is not None else []
    if given:
        raise RecipeError(
            "A network begins with the weights of one other",
            given=", ".join([f"graft = {recipe.graft!r}", *given]),
            expected="one of them",
        )


def _check_compiler() -> None:
    missing = missing_compiler(torch.device("cpu"))
    if missing is not None:
        raise MissingLibraryError(missing, given="compile = true", do="install g++ or clang, or set compile = false")


def _correct(video: Tensor, scene: shapes.Scene) -> dict[str, float]:
    """1 for each attribute that the detector reads as the caption says, else 0."""
    seen = detect.detect(to_pixels(video))
    row = {name: float(seen[name] == getattr(scene, name)) for name in detect.JUDGED}
    return row | {"all_correct": float(all(row.values()))}
