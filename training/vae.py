"""Training of a causal VAE of any family: L1, a perceptual surrogate and a small KL term, on crops, clips, images.

Two more terms are there for who wants them: a perceptual network from a file of the user's, and a discriminator.

The mix follows HunyuanVideo's report (arXiv 2412.03603, section 4.1): videos and images 4 : 1, a random interval
between frames, no start from an image VAE. Most batches are crops, because eight of them cost what one clip
costs; the share of whole clips grows over the run, because the norms see the whole extent when the VAE is used.

A VAE can also be made to have the latents of another one (``[match]``), so that a diffusion network of its family
can learn on the other's, and from the other's network.
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

from ..vidgen_core.codec import ScaledCodec
from ..vidgen_core.errors import RecipeError
from ..vidgen_core.families import FAMILIES
from ..vidgen_core.families.cogvideox.vae import CogVideoXVAE
from ..vidgen_core.families.hunyuan.vae import CausalVAE
from ..vidgen_core.weights.save import save_checkpoint
from .data.latents import load_frozen_codec
from .data.pool import PoolSettings, draw_clip, drawing_odds, open_pool, pick, scene_of
from .discriminator import PatchDiscriminator, adversarial_losses
from .loop import Draw, Objective
from .matched import set_matched_decoder, set_matched_encoder
from .pca import set_decoder, set_encoder, without_idle_branches
from .perceptual import PerceptualDistance
from .pictures import contact_sheet
from .recipe import OptimizerSettings, RunSettings, ScheduleSettings, model_config, require_positive
from .start import start_from
from .team import ALONE, Team

log = logging.getLogger("vidgen")

PCA_CLIPS = 256
"""clips whose principal components a closed-form encoder takes"""

MATCH_CLIPS = 128
"""clips on which an encoder is fitted to the latents of another one"""
MATCH_DECODER_CLIPS = 48
"""and its decoder"""

Kind = Literal["crop", "clip", "image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeLossSettings:
    gradient: float = 0.5
    """weight of the perceptual surrogate, see :func:`detail_loss`"""
    square: float = 0.0
    """weight of the mean squared error"""
    kl: float = 1e-4
    """weight of the KL divergence from the unit Gaussian, mean over latent elements"""
    perceptual: float = 0.0
    """weight of the distance in a network's features, see ``perceptual.py``; 0 needs no network"""
    perceptual_network: str | None = None
    """safetensors file with VGG16's features under torchvision's names"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeAdversarialSettings:
    """The discriminator, see ``discriminator.py``."""

    weight: float = 0.0
    """of its term in the VAE's loss; 0 builds none"""
    start: float = 0.3
    """share of the run before it begins: there is nothing to tell while reconstructions are poor"""
    channels: int = 16
    num_levels: int = 3
    lr: float = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeMixSettings:
    """Which batches the VAE sees."""

    image_share: float = 0.2
    clip_share: float = 0.1
    """of the video batches, how many are whole clips at the start of the run"""
    clip_share_end: float = 0.6
    """and at its end"""
    crop_frames: int = 9
    crop_px: int = 32
    emphasis: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """attribute -> value -> how many times as often its clips are drawn, for what blurs most"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeMatchSettings:
    """Latents like those of another VAE of the same grid, whatever its family."""

    codec: str
    """its file"""
    weight: float = 1.0
    """of the mean squared distance from its latents, at unit scale"""
    given_share: float = 0.5
    """of the samples, how many are decoded from its latents in place of the own ones"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeRecipe:
    """``stage = "vae"``."""

    stage: Literal["vae"]
    run: RunSettings
    family: str = "hunyuan"
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    model: Mapping[str, Any] = field(default_factory=dict)
    """fields of the family's ``CodecConfig``"""
    pool: PoolSettings = field(default_factory=PoolSettings)
    loss: VaeLossSettings = field(default_factory=VaeLossSettings)
    adversarial: VaeAdversarialSettings = field(default_factory=VaeAdversarialSettings)
    mix: VaeMixSettings = field(default_factory=VaeMixSettings)
    match: VaeMatchSettings | None = None
    evaluation_clips: int = 24
    init: str | None = None
    """a codec file to start from"""
    encoder: Literal["trained", "pca"] = "trained"
    """pca: closed form (``pca.py``) and frozen, so that latents stay what they are while the decoder learns, which
    starts in closed form too; HunyuanVideo only"""


@dataclass(frozen=True, slots=True)
class VaeBatch:
    """What one step sees."""

    video: Tensor
    """(B, 3, T, H, W) in [-1, 1]"""
    noise: Tensor
    """(B, C, T', H', W'), of the posterior samples"""
    adversarial: bool = False
    """whether the discriminator takes part"""
    wanted: Tensor | None = None
    """(B, C, T', H', W') latents of the VAE to be matched, at this one's scale"""
    given: Tensor | None = None
    """(B,) whether the decoder reads these"""


class VaeObjective(Objective):
    """The VAE, its pool of clips and its loss."""

    metrics = ("l1", "gradient", "kl", "psnr")

    def __init__(self, recipe: VaeRecipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.run.seed)
        self.recipe = recipe
        self._check()
        self.config = model_config(recipe.family, "codec", recipe.model)
        self.vae: Any = FAMILIES[recipe.family].parts["codec"].build(self.config, {})
        self.scaling_factor: float | None = None
        if recipe.init is not None:
            start = start_from(recipe.init, "codec", self.vae, self.config, ignore=("scaling_factor",))
            # With a frozen encoder the latents stay those that a transformer was trained on, their scale included.
            self.scaling_factor = start.scaling_factor if recipe.encoder == "pca" else None
        scenes = [scene_of(recipe.pool, index)[0] for index in range(recipe.pool.num_clips)]
        self.odds = drawing_odds(scenes, recipe.mix.emphasis)
        self.pool = open_pool(recipe.pool, processes=recipe.run.processes)
        # In lists: one shares its parameters with ``vae`` and must not count twice, the other is not trained.
        self.light: list[CausalVAE] = []
        self.other: list[ScaledCodec] = []
        if recipe.encoder == "pca":
            self._freeze_encoder()
        if recipe.match is not None:
            self._match(recipe.match)
        self.perceptual: PerceptualDistance | None = None
        if recipe.loss.perceptual:
            assert recipe.loss.perceptual_network is not None
            self.perceptual = PerceptualDistance(recipe.loss.perceptual_network)
            self.metrics += ("perceptual",)
        self.discriminator: PatchDiscriminator | None = None
        if recipe.adversarial.weight:
            settings = recipe.adversarial
            self.discriminator = PatchDiscriminator(channels=settings.channels, num_levels=settings.num_levels)
            self.metrics += ("generator", "discriminator")

    def _check(self) -> None:
        loss, adversarial = self.recipe.loss, self.recipe.adversarial
        if loss.perceptual and loss.perceptual_network is None:
            raise RecipeError(
                "The perceptual loss needs a network",
                given=f"loss.perceptual = {loss.perceptual}",
                do="set loss.perceptual_network to a safetensors file with VGG16's features, or loss.perceptual to 0",
            )
        if self.recipe.encoder == "pca" and (self.recipe.family != "hunyuan" or self.recipe.match is not None):
            raise RecipeError(
                "The encoder of principal components is HunyuanVideo's, with latents of its own",
                given=f"family = {self.recipe.family!r}" + (", [match]" if self.recipe.match else ""),
                do='set encoder to "trained"',
            )
        if not 0 <= adversarial.start < 1:
            raise RecipeError(
                "The discriminator has no time to begin",
                given=f"adversarial.start = {adversarial.start}",
                expected="a share of the run: 0 or more and below 1",
            )
        names = ("channels", "num_levels", "lr")
        require_positive({f"adversarial.{name}": getattr(adversarial, name) for name in names})

    def helpers(self) -> dict[str, OptimizerSettings]:
        """The discriminator forgets fast (Radford et al. 2015, arXiv 1511.06434, ask for a momentum of 0.5)."""
        if self.discriminator is None:
            return {}
        return {"discriminator": OptimizerSettings(lr=self.recipe.adversarial.lr, betas=(0.5, 0.99))}

    def _freeze_encoder(self) -> None:
        if self.recipe.init is None:
            videos = self._first_clips(PCA_CLIPS)
            set_encoder(self.vae, videos)
            videos = videos[: PCA_CLIPS // 5]
            with torch.no_grad():
                latents = without_idle_branches(self.vae).encode(videos)[0]
            set_decoder(self.vae, latents, videos)
        for part in (self.vae.encoder, self.vae.quant_conv):
            part.requires_grad_(False)
        self.light.append(without_idle_branches(self.vae))

    def _first_clips(self, num: int) -> Tensor:
        """(num, 3, T, H, W) in [-1, 1], at the usual speed."""
        still = replace(self.recipe.pool, max_interval=1)
        return torch.stack([torch.from_numpy(draw_clip(still, i)) for i in range(num)]).float() / 127.5 - 1

    def _match(self, settings: VaeMatchSettings) -> None:
        """Take the scale of the other VAE; without a file to start from, start in closed form where there is one."""
        other = load_frozen_codec(settings.codec)
        if other.grid.channels != self.vae.grid.channels or not _same_cells(other, self.vae):
            raise RecipeError(
                "The latents to be matched are of another size",
                given=f"{other.grid} of {settings.codec}",
                expected=str(self.vae.grid),
            )
        self.other.append(other)
        self.scaling_factor = other.config.scaling_factor
        self.metrics += ("match",)
        if self.recipe.init is not None or not isinstance(self.vae, CogVideoXVAE):
            return
        log.info("Fitting encoder and decoder to the latents of %s", settings.codec)
        videos = self._first_clips(MATCH_CLIPS)
        latents = torch.cat([self._wanted(part) for part in videos.split(8)])
        set_matched_encoder(self.vae, videos, latents)
        videos, latents = videos[:MATCH_DECODER_CLIPS], latents[:MATCH_DECODER_CLIPS]
        half = MATCH_DECODER_CLIPS // 2
        with torch.no_grad():
            own = torch.cat([self.vae.encode(part)[0] for part in videos[:half].split(8)])
        set_matched_decoder(self.vae, torch.cat([own, latents[half:]]), videos)

    def _wanted(self, video: Tensor) -> Tensor:
        """The other VAE's latents, at the scale of this one."""
        other = self.other[0]
        with torch.no_grad(), torch.autocast(video.device.type, enabled=False):
            return other.to(video.device).encode(video) / other.config.scaling_factor

    def is_hidden(self, name: str) -> bool:
        outer = ("encoder.conv_in.", "decoder.conv_out.")
        return not any(part in name for part in outer)

    # ---- batches -------------------------------------------------------------------------------------------

    def batch(self, draw: Draw) -> VaeBatch:
        """Crops come ``batch_size`` at a time; whole clips and images in numbers of about the same cost."""
        kind = self._kind(draw)
        mix, pool = self.recipe.mix, self.recipe.pool
        if kind == "clip":
            cost = pool.num_frames * pool.size_px**2 / (mix.crop_frames * mix.crop_px**2)
            num = max(draw.world, round(draw.batch_size / cost / draw.world) * draw.world)
        elif kind == "image":
            cost = pool.size_px**2 / (mix.crop_frames * mix.crop_px**2)
            num = max(draw.world, round(draw.batch_size / cost / draw.world) * draw.world)
        else:
            num = draw.batch_size
        generators = draw.samples(num)
        video = torch.stack([self._sample(kind, g) for g in generators])
        latent_shape = (self.vae.grid.channels, self.vae.grid.num_latent_frames(video.shape[2])) + tuple(
            side // self.vae.grid.spatial for side in video.shape[3:]
        )
        noise = torch.stack([torch.randn(latent_shape, generator=g) for g in generators])
        device = next(self.vae.parameters()).device
        adversarial = self.discriminator is not None and draw.position >= self.recipe.adversarial.start
        batch = VaeBatch(video.to(device).float() / 127.5 - 1, noise.to(device), adversarial)
        if self.recipe.match is None:
            return batch
        chances = torch.cat([torch.rand(1, generator=g) for g in generators])
        given = (chances < self.recipe.match.given_share).to(device)
        return replace(batch, wanted=self._wanted(batch.video), given=given)

    def _kind(self, draw: Draw) -> Kind:
        mix = self.recipe.mix
        image, clip = torch.rand(2, generator=draw.shared()).tolist()
        if image < mix.image_share:
            return "image"
        share = mix.clip_share + (mix.clip_share_end - mix.clip_share) * draw.position
        return "clip" if clip < share else "crop"

    def _sample(self, kind: Kind, generator: torch.Generator) -> Tensor:
        """uint8 (3, T, H, W), mirrored left-right half of the time."""
        mix, pool = self.recipe.mix, self.recipe.pool
        number, t, y, x, mirror = torch.randint(0, 1 << 30, (5,), generator=generator).tolist()
        frames, side = {
            "clip": (pool.num_frames, pool.size_px),
            "crop": (mix.crop_frames, mix.crop_px),
            "image": (1, pool.size_px),
        }[kind]
        t %= pool.num_frames - frames + 1
        y %= pool.size_px - side + 1
        x %= pool.size_px - side + 1
        clip = self.pool[pick(self.odds, number), :, t : t + frames, y : y + side, x : x + side]
        if mirror % 2:
            clip = clip[..., ::-1]
        return torch.from_numpy(clip.copy())

    # ---- loss ----------------------------------------------------------------------------------------------

    def forward(self, batch: VaeBatch) -> dict[str, Tensor]:
        video, settings = batch.video, self.recipe.loss
        mean, logvar = self._encode(video)
        latents = mean
        if batch.wanted is not None and batch.given is not None:
            latents = torch.where(batch.given.view(-1, 1, 1, 1, 1), batch.wanted, mean)
        out = self.vae.decode(latents + (0.5 * logvar).exp() * batch.noise).float()
        square = (out - video).square().mean()
        parts = {
            "l1": (out - video).abs().mean(),
            "gradient": detail_loss(out, video),
            "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }
        loss = (
            parts["l1"] + settings.gradient * parts["gradient"] + settings.square * square + settings.kl * parts["kl"]
        )
        if batch.wanted is not None:
            assert self.recipe.match is not None
            assert self.scaling_factor is not None
            parts["match"] = (self.scaling_factor * (mean - batch.wanted)).square().mean()
            loss = loss + self.recipe.match.weight * parts["match"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(out, video)
            loss = loss + settings.perceptual * parts["perceptual"]
        if batch.adversarial:
            assert self.discriminator is not None
            parts |= adversarial_losses(self.discriminator, out, video)
            # The discriminator's own term: its size does not matter to its optimizer, nor does it touch the VAE.
            loss = loss + self.recipe.adversarial.weight * parts["generator"] + parts["discriminator"]
        # Peak to peak is 2 in [-1, 1].
        psnr = 10 * torch.log10(4 / square.detach().clamp_min(1e-10))
        return {"loss": loss, **parts, "psnr": psnr}

    def _encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents; without a gradient where the encoder is frozen."""
        if self.light:
            with torch.no_grad(), torch.autocast(video.device.type, enabled=False):
                return self.light[0].encode(video)
        mean, logvar = self.vae.encode(video)
        return mean.float(), logvar.float()

    # ---- judging -------------------------------------------------------------------------------------------

    def evaluate(self, folder: Path, step: int, team: Team = ALONE) -> dict[str, float]:
        """PSNR in dB on unseen clips (all combinations of attributes, other seeds), mean and worst clip.

        With a VAE to be matched also the mean PSNR of its latents decoded, of the first frames, and how far the own
        latents are from it (root mean square at unit scale); and the file is written as the weights are now.
        """
        unseen = replace(self.recipe.pool, split="all", seed=self.recipe.pool.seed + 104729, max_interval=1)
        numbers = team.share(range(self.recipe.evaluation_clips))
        pairs, seen = [], []
        for i in numbers:
            video, out, more = self._judge(torch.from_numpy(draw_clip(unseen, i)))
            pairs.append((video, out))
            seen.append({"psnr_db": psnr_db(out, video), **more})
        names = ["psnr_db", *(("given_psnr_db", "first_frame_db", "latent_error") if self.other else ())]
        scores = {name: team.gather([each[name] for each in seen]) for name in names}
        if not scores["psnr_db"]:
            return {}
        if team.leads:
            contact_sheet(folder / "samples" / f"step-{step:08d}.png", [v for pair in pairs[:4] for v in pair])
        figures = {name: sum(values) / len(values) for name, values in scores.items()}
        figures["psnr_worst_db"] = min(scores["psnr_db"])
        if team.leads and self.other:
            self.finish(folder, {"steps": step, "figures": figures})
        return figures

    def _judge(self, clip: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The clip, what is left of it, and its figures beside a VAE to be matched."""
        device = next(self.vae.parameters()).device
        batch = clip.to(device).float()[None] / 127.5 - 1
        latents = self.vae.encode(batch)[0]
        video, out = batch[0].cpu(), self._decoded(latents)
        if not self.other:
            return video, out, {}
        wanted = self._wanted(batch)
        assert self.scaling_factor is not None
        return (
            video,
            out,
            {
                "given_psnr_db": psnr_db(self._decoded(wanted), video),
                "first_frame_db": psnr_db(out[:, :1], video[:, :1]),
                "latent_error": self.scaling_factor * float((latents - wanted).detach().square().mean().sqrt()),
            },
        )

    def _decoded(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)[0].float().clamp(-1, 1).cpu()

    def finish(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Write ``vae.safetensors`` with the scaling factor that makes latents of unit standard deviation, or with
        that of the VAE whose latents these are."""
        factor = self.scaling_factor or round(1 / self.latent_std(range(min(64, len(self.pool)))), 6)
        config = replace(self.config, scaling_factor=factor)
        metadata = {f"vidgen.training.{name}": str(value) for name, value in summary.items()}
        save_checkpoint(
            folder / "vae.safetensors",
            self.vae.state_dict(),
            family=self.recipe.family,
            part="codec",
            config=config,
            metadata=metadata,
            dtype=torch.float16,
        )
        log.info("Wrote %s, scaling factor %.4f", folder / "vae.safetensors", factor)

    @torch.no_grad()
    def latent_std(self, indices: Sequence[int]) -> float:
        """Standard deviation over all elements of the latents of some clips of the pool."""
        count, total, squares = 0, 0.0, 0.0
        for index in indices:
            clip = torch.from_numpy(np.array(self.pool[index]))
            video = clip.to(next(self.vae.parameters()).device).float()[None] / 127.5 - 1
            mean, _ = self.vae.encode(video)
            count += mean.numel()
            total += float(mean.double().sum())
            squares += float(mean.double().square().sum())
        return math.sqrt(squares / count - (total / count) ** 2)


def _same_cells(codec: ScaledCodec, vae: Any) -> bool:
    """Whether a latent stands for as many pixels and frames in both."""
    return (codec.grid.spatial, codec.grid.temporal) == (vae.grid.spatial, vae.grid.temporal)


def detail_loss(out: Tensor, video: Tensor, num_scales: int = 3) -> Tensor:
    """L1 between the differences of neighbouring pixels, rows, columns and frames, at several sizes.

    A stand-in for a perceptual network that needs no weights: blurred or flickering edges cost, a shift in
    brightness does not.

    Args:
        out, video: (B, 3, T, H, W).
    """
    error = out - video
    total = error.new_zeros(())
    if error.shape[2] > 1:
        total = total + error.diff(dim=2).abs().mean()
    frames = error.transpose(1, 2).flatten(0, 1)
    for scale in range(num_scales):
        if scale:
            frames = F.avg_pool2d(frames, 2)
        total = total + frames.diff(dim=2).abs().mean() + frames.diff(dim=3).abs().mean()
    return total / num_scales


def psnr_db(out: Tensor, video: Tensor) -> float:
    """Peak signal to noise ratio of two videos in [-1, 1]."""
    return 10 * math.log10(4 / max(1e-10, float((out - video).detach().double().square().mean())))
