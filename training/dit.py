"""Training of the diffusion transformer: flow matching on cached latents, videos and images, text on the fly.

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
from torch import Tensor

from ..vidgen_core.errors import MissingLibraryError, RecipeError
from ..vidgen_core.families.hunyuan.codec import HunyuanCodec
from ..vidgen_core.families.hunyuan.config import NetworkConfig
from ..vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from ..vidgen_core.families.hunyuan.text import TextStack
from ..vidgen_core.generate import Sampling, decode_latents, encode_prompts, sample_latents
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
from .loop import Draw, Objective, mix
from .lora import Adapters, LoraSettings, write_loras
from .pictures import contact_sheet, to_pixels
from .recipe import OptimizerSettings, RunSettings, ScheduleSettings
from .start import start_from
from .team import ALONE, Team

log = logging.getLogger("vidgen")


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
    """of the video batches, how many are given their first latent frame clean (image to video by token replacement)"""
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
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    model: NetworkConfig = field(default_factory=NetworkConfig)
    defaults: Defaults = field(default_factory=Defaults)
    """written into the checkpoint; evaluation samples with them"""
    pool: PoolSettings = field(default_factory=PoolSettings)
    time: TimeSettings = field(default_factory=TimeSettings)
    mix: DitMixSettings = field(default_factory=DitMixSettings)
    evaluation: DitEvaluationSettings = field(default_factory=DitEvaluationSettings)
    init: str | None = None
    """a network file to start from"""
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


@dataclass(frozen=True, slots=True)
class Frozen:
    """The parts that are used and not trained; outside of the module tree, so never saved or averaged."""

    codec: HunyuanCodec
    text: TextStack


class DitObjective(Objective):
    """The network, its latents and captions, and the flow-matching loss."""

    metrics = ("video", "image", "held")

    def __init__(self, recipe: DitRecipe) -> None:
        super().__init__()
        base = None if recipe.lora is None else _base(recipe)
        if base is not None:
            recipe = replace(recipe, model=base.config, defaults=base.defaults)
        self.recipe = recipe
        text = load_text(recipe.text, dtype=torch.float32)
        assert isinstance(text, TextStack)
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
        self.cache = open_latents(recipe.pool, recipe.codec, processes=recipe.run.processes)
        self.odds = drawing_odds(self.cache.scenes, recipe.mix.emphasis)
        if recipe.compile:
            # One block of each kind is compiled and serves all of them: the whole network would take far longer.
            for block in blocks_at(self.network, self.model.family.blocks):
                block.compile(dynamic=True)

    def _new_model(self) -> VideoModel:
        recipe = self.recipe
        network = HunyuanVideoTransformer(recipe.model)
        network.init_weights(torch.Generator().manual_seed(recipe.run.seed))
        if recipe.init is not None:
            start_from(recipe.init, "network", network, recipe.model, ignore=("accepts_first_frame",))
        return VideoModel.of("hunyuan", recipe.model, network, defaults=recipe.defaults)

    def _check(self) -> None:
        family, config = self.model.family, self.recipe.model
        problem = family.fits_text(config, self.frozen.text.config)
        if problem is not None:
            raise RecipeError("The network and the text encoders do not fit together", given=problem)
        channels = self.frozen.codec.grid.channels
        if config.out_channels != channels:
            raise RecipeError(
                "The network and the codec do not fit together",
                given=f"model.out_channels = {config.out_channels}",
                expected=f"{channels}, the channels of the latents",
            )

    def is_hidden(self, name: str) -> bool:
        """Attention and MLP matrices of the blocks; embedders, modulations and the output stay with AdamW."""
        if self.adapters is not None:
            return False
        layers = ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "linear1", "linear2")
        return "blocks." in name and name.removesuffix(".weight").endswith(layers)

    # ---- batches -------------------------------------------------------------------------------------------

    def batch(self, draw: Draw) -> DitBatch:
        mix_settings = self.recipe.mix
        shared = draw.shared()
        is_image = float(torch.rand((), generator=shared)) < mix_settings.image_share
        is_held = not is_image and float(torch.rand((), generator=shared)) < mix_settings.held_share
        num = draw.batch_size * (mix_settings.image_batch if is_image else 1)
        t = self.times(num, shared)
        share = num // draw.world
        t = t[draw.rank * share : (draw.rank + 1) * share]
        latents, captions, noises = [], [], []
        for generator in draw.samples(num):
            number, seed, drop = torch.randint(0, 1 << 30, (3,), generator=generator).tolist()
            index = pick(self.odds, number)
            latent = self.cache.image(index) if is_image else self.cache.video(index)
            latents.append(latent)
            noises.append(torch.randn(latent.shape, generator=generator))
            dropped = drop < mix_settings.text_dropout * (1 << 30)
            rng = np.random.default_rng(seed)
            captions.append("" if dropped else shapes.caption(self.cache.scenes[index], rng, image=is_image))
        device = self.model.device
        cond = self.conditioning(captions, image=is_image).to(device)
        x0 = torch.stack(latents).to(device)
        if is_held:
            t = t.view(-1, 1, 1, 1, 1).repeat(1, 1, x0.shape[2], 1, 1)
            t[:, :, 0] = 0
        return DitBatch(x0, torch.stack(noises).to(device), t.to(device), cond)

    def times(self, num: int, generator: torch.Generator) -> Tensor:
        """(num,) float32 times, spread evenly over the quantiles of their distribution and in random order."""
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
        t = torch.where(uniform, quantile, shift_time(torch.sigmoid(normal), settings.shift))
        return t[order].clamp(1e-4, 1.0).float()

    @torch.no_grad()
    def conditioning(self, captions: Sequence[str], *, image: bool = False) -> Conditioning:
        return self.model.conditioning(self.frozen.text.encode(captions, image_mode=image))

    # ---- loss ----------------------------------------------------------------------------------------------

    def forward(self, batch: DitBatch) -> dict[str, Tensor]:
        loss = self.errors(batch).mean()
        kind = "held" if batch.t.ndim > 1 else "image" if batch.x0.shape[2] == 1 else "video"
        return {"loss": loss, kind: loss.detach()}

    def errors(self, batch: DitBatch) -> Tensor:
        """(B,) mean squared error of the prediction per sample, over the frames that are not given."""
        diffusion = self.model.diffusion
        x_t = diffusion.add_noise(batch.x0, batch.noise, batch.t)
        output = self.model.predict(x_t, batch.t, batch.cond)
        target = diffusion.target(batch.x0, x_t, batch.t)
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
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(mix(first)))
        t = (torch.arange(first, end) % 16 + 0.5) / 16
        device = self.model.device
        cond = self.conditioning([caption for _, caption in clips]).to(device)
        return self.errors(DitBatch(x0.to(device), noise.to(device), t.to(device), cond)).cpu()

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
        export_network(
            path,
            self.network,
            replace(self.recipe.model, accepts_first_frame=self.recipe.mix.held_share > 0),
            self.recipe.defaults,
            preview=fit_preview(self.frozen.codec),
            dtype=torch.float16,
            title="VidGen tiny HunyuanVideo",
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
    if recipe.model != NetworkConfig():
        raise RecipeError(
            "The network of a LoRA is what its file says", given="[model] beside [lora]", do="leave [model] out"
        )
    return load_network(recipe.init, dtype=torch.float32)


def _check_compiler() -> None:
    missing = missing_compiler(torch.device("cpu"))
    if missing is not None:
        raise MissingLibraryError(missing, given="compile = true", do="install g++ or clang, or set compile = false")


def _correct(video: Tensor, scene: shapes.Scene) -> dict[str, float]:
    """1 for each attribute that the detector reads as the caption says, else 0."""
    seen = detect.detect(to_pixels(video))
    row = {name: float(seen[name] == getattr(scene, name)) for name in detect.JUDGED}
    return row | {"all_correct": float(all(row.values()))}
