"""The stages of training at tiny size: caches, the VAE's and the transformer's objectives, files that load again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen.training import matched, vae
from vidgen.training.data import latents, pool
from vidgen.training.discriminator import PatchDiscriminator, adversarial_losses
from vidgen.training.dit import DitEvaluationSettings, DitObjective, DitRecipe
from vidgen.training.export import export_codec
from vidgen.training.loop import Draw, Loop
from vidgen.training.perceptual import PerceptualDistance
from vidgen.training.pictures import contact_sheet
from vidgen.training.recipe import OptimizerSettings, RunSettings, ScheduleSettings
from vidgen.training.team import ALONE, Team
from vidgen.training.vae import (
    VaeAdversarialSettings,
    VaeLossSettings,
    VaeMatchSettings,
    VaeMixSettings,
    VaeObjective,
    VaeRecipe,
    detail_loss,
    psnr_db,
)
from vidgen.vidgen_core.codec import Codec
from vidgen.vidgen_core.errors import CheckpointError, FileError, MissingLibraryError, RecipeError
from vidgen.vidgen_core.families.cogvideox.codec import CogVideoXCodec
from vidgen.vidgen_core.families.cogvideox.config import CodecConfig as CogVideoXCodecConfig
from vidgen.vidgen_core.families.cogvideox.vae import CogVideoXVAE
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.model import load_codec, load_network, open_part
from vidgen.vidgen_core.types import Defaults
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.save import save_checkpoint

CODEC = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=2, latent_channels=4)
NETWORK = NetworkConfig(
    hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1,
    rope_axes=(4, 6, 6), text_width=32, pooled_width=32, guidance_embed=False,
)  # fmt: skip


def small_pool(folder: Path, **changes: object) -> pool.PoolSettings:
    values = {"num_clips": 12, "num_frames": 9, "size_px": 32, "folder": str(folder / "cache")} | changes
    return pool.PoolSettings(**values)  # type: ignore[arg-type]


def vae_recipe(folder: Path, **changes: object) -> VaeRecipe:
    values = {
        "stage": "vae",
        "run": RunSettings(name="vae", folder=str(folder), log_steps=5),
        "schedule": ScheduleSettings(steps=25, warmup_steps=2, shape="constant"),
        "optimizer": OptimizerSettings(name="muon", batch_size=2, lr=5e-3, muon_lr=5e-3, ema_decay=0.5),
        "model": CODEC,
        "pool": small_pool(folder, max_interval=8),
        "mix": VaeMixSettings(crop_frames=5, crop_px=16),
        "evaluation_clips": 2,
    } | changes
    if is_dataclass(values["model"]):
        values["model"] = asdict(values["model"])
    return VaeRecipe(**values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """A chunk of the latent cache is 256 clips, far more than a test needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "CHUNK", 8)
        patch.setattr(latents, "BATCH", 4)
        yield


def run(objective: VaeObjective | DitObjective) -> Loop:
    recipe = objective.recipe
    return Loop(objective, run=recipe.run, optimizer=recipe.optimizer, schedule=recipe.schedule)


# ---- caches --------------------------------------------------------------------------------------------------


def test_a_pool_is_the_same_however_it_is_drawn(tmp_path):
    settings = small_pool(tmp_path)
    clips = pool.open_pool(settings)
    assert clips.shape == (12, 3, 9, 32, 32)
    assert not clips.flags.writeable
    for index in (0, 7):
        assert np.array_equal(clips[index], pool.draw_clip(settings, index))
    again = pool.open_pool(settings)
    assert np.array_equal(again, clips)
    assert small_pool(tmp_path, seed=1).path() != settings.path()
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_latents_are_those_of_the_codec_and_are_kept(tmp_path, tiny_bundle_dir):
    path = tiny_bundle_dir / "vae.safetensors"
    settings = small_pool(tmp_path, num_clips=8)
    cache = latents.open_latents(settings, path)
    codec = latents.load_frozen_codec(path)
    video = torch.from_numpy(pool.draw_clip(settings, 3)).float()[None] / 127.5 - 1
    # float16 on disk: 11 bits of latents of size about 1.
    torch.testing.assert_close(cache.video(3), codec.encode(video)[0], rtol=1e-3, atol=1e-3)
    assert cache.image(3).shape == (16, 1, 4, 4)
    assert cache.scenes[3] == pool.scene_of(settings, 3)[0]
    folder = latents.latent_folder(settings, codec)
    before = (folder / "000000.npy").stat().st_mtime_ns
    longer = latents.open_latents(small_pool(tmp_path, num_clips=12), path)
    assert len(longer) == 12
    assert len(longer.chunks) == 2
    assert (folder / "000000.npy").stat().st_mtime_ns == before


def test_latents_of_the_other_family_are_cached_too(tmp_path):
    """Their folder depends on the encoder alone: the decoder may still be in training."""
    config = CogVideoXCodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=2, latent_channels=4)
    path, other = tmp_path / "cog.safetensors", tmp_path / "later.safetensors"
    torch.manual_seed(4)
    model = CogVideoXVAE(config)
    save_checkpoint(path, model.state_dict(), family="cogvideox", part="codec", config=config)
    settings = small_pool(tmp_path, num_clips=8)
    cache, codec = latents.open_latents(settings, path), load_codec(path, dtype=torch.float32)
    video = torch.from_numpy(pool.draw_clip(settings, 3)).float()[None] / 127.5 - 1
    # float16 on disk: 11 bits of latents of size about 1.
    torch.testing.assert_close(cache.video(3), codec.encode(video)[0].detach(), rtol=1e-3, atol=1e-3)
    folder = latents.latent_folder(settings, latents.load_frozen_codec(path))
    with torch.no_grad():
        model.decoder.conv_out.conv.bias += 1
    save_checkpoint(other, model.state_dict(), family="cogvideox", part="codec", config=config)
    assert latents.latent_folder(settings, latents.load_frozen_codec(other)) == folder
    with torch.no_grad():
        model.encoder.conv_out.conv.bias += 1
    save_checkpoint(other, model.state_dict(), family="cogvideox", part="codec", config=config)
    assert latents.latent_folder(settings, latents.load_frozen_codec(other)) != folder


# ---- VAE -----------------------------------------------------------------------------------------------------


def test_vae_learns_and_its_file_loads_at_unit_scale(tmp_path):
    objective = VaeObjective(vae_recipe(tmp_path))
    first = objective.evaluate(tmp_path, 0)["psnr_db"]
    loop = run(objective)
    loop.train()
    assert objective.evaluate(tmp_path, 25)["psnr_db"] > first + 1.5
    codec = load_codec(tmp_path / "vae" / "vae.safetensors", dtype=torch.float32)
    assert isinstance(codec, Codec)
    clips = torch.stack([torch.from_numpy(np.array(objective.pool[i])) for i in range(12)]).float() / 127.5 - 1
    with torch.no_grad():
        spread = codec.encode(clips).std()
    # The scaling factor is measured on the same clips, the file holds float16.
    assert float(spread) == pytest.approx(1, abs=0.02)
    assert (tmp_path / "vae" / "samples" / "step-00000025.png").is_file()


def test_vae_batches_follow_the_mix(tmp_path):
    mix = VaeMixSettings(crop_frames=5, crop_px=16, image_share=0.2, clip_share=0.0, clip_share_end=1.0)
    objective = VaeObjective(vae_recipe(tmp_path, mix=mix))
    kinds = [objective._kind(Draw(seed=0, step=s, batch_size=2, position=p)) for p in (0.0, 1.0) for s in range(400)]
    start, end = kinds[:400], kinds[400:]
    assert "clip" not in start
    assert "crop" not in end
    # Binomial, n = 400, p = 0.2: standard deviation 0.02.
    assert start.count("image") / 400 == pytest.approx(0.2, abs=0.08)
    draws = [Draw(seed=0, step=s, batch_size=2, position=0.5) for s in range(20)]
    assert {tuple(objective.batch(draw).video.shape[2:]) for draw in draws} == {(5, 16, 16), (9, 32, 32), (1, 32, 32)}
    batch, again = (objective.batch(Draw(seed=0, step=0, batch_size=2)) for _ in range(2))
    assert torch.equal(batch.video, again.video)
    assert float(batch.video.min()) >= -1
    assert batch.noise.shape[1] == CODEC.latent_channels


def test_vae_loss_is_its_definition(tmp_path):
    weights = VaeLossSettings(gradient=0.25, square=0.5, kl=0.125)
    objective = VaeObjective(vae_recipe(tmp_path, loss=weights))
    batch = objective.batch(Draw(seed=0, step=1, batch_size=2))
    with torch.no_grad():
        parts = objective(batch)
        mean, logvar = objective.vae.encode(batch.video)
        out = objective.vae.decode(mean + logvar.mul(0.5).exp() * batch.noise)
    posterior = torch.distributions.Normal(mean, logvar.mul(0.5).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    error = out - batch.video
    expected = error.abs().mean() + 0.25 * detail_loss(out, batch.video) + 0.5 * error.square().mean() + 0.125 * kl
    torch.testing.assert_close(parts["loss"], expected)
    assert objective.metrics == VaeObjective.metrics
    assert not objective.helpers()


def test_detail_loss_sees_edges_and_flicker_but_no_brightness():
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    assert float(detail_loss(video + 0.3, video)) < 1e-6
    ramp = torch.zeros_like(video)
    ramp[..., ::2] = 0.1
    # Columns jump by 0.1 at full size and are level at half and at quarter size.
    assert float(detail_loss(video + ramp, video)) == pytest.approx(0.1 / 3, rel=1e-4)
    flicker = torch.zeros_like(video)
    flicker[:, :, ::2] = 0.1
    assert float(detail_loss(video + flicker, video)) == pytest.approx(0.1 / 3, rel=1e-4)
    assert psnr_db(video + 0.02, video) == pytest.approx(40, abs=1e-3)


def vgg_layout(widths: tuple[int, ...] = (2, 3, 4, 4, 5), seed: int = 0) -> torch.nn.Sequential:
    """VGG16's ``features`` as published, but for the widths: 13 convolutions in 5 stages, all layers in place."""
    layers: list[torch.nn.Module] = []
    torch.manual_seed(seed)
    inputs = 3
    for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True):
        for _ in range(depth):
            layers += [torch.nn.Conv2d(inputs, width, 3, padding=1), torch.nn.ReLU()]
            inputs = width
        layers.append(torch.nn.MaxPool2d(2))
    return torch.nn.Sequential(*layers)


def save_vgg(path: Path, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors = {f"features.{name}": t.detach() for name, t in net.state_dict().items()}
    save_file({**tensors, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return tensors


def test_perceptual_distance_is_its_definition(tmp_path):
    net = vgg_layout()
    save_vgg(tmp_path / "vgg.safetensors", net)
    distance = PerceptualDistance(tmp_path / "vgg.safetensors")
    generator = torch.Generator().manual_seed(0)
    out, video = (torch.rand(2, 3, 2, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = torch.zeros(())
    for clip, target in zip(out, video, strict=True):
        for t in range(2):
            x, y = ((frame[:, t].permute(1, 2, 0) / 2 + 0.5 - mean) / std for frame in (clip, target))
            x, y = x.permute(2, 0, 1)[None], y.permute(2, 0, 1)[None]
            for index, layer in enumerate(net):
                x, y = layer(x), layer(y)
                if index in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                    lengths = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
                    expected = expected + sum(next(lengths) * (1, -1)[i] for i in range(2)).square().sum(1).mean() / 4
    # The epsilon under the root matters where hardly anything fires.
    torch.testing.assert_close(distance(out, video), expected, rtol=1e-4, atol=1e-6)
    assert float(distance(video, video)) == 0
    assert distance(out[..., :4, :4], video[..., :4, :4]).isfinite(), "small crops use the first stages only"
    out.requires_grad_(True)
    video.requires_grad_(True)
    distance(out, video).backward()
    assert video.grad is None
    assert float(out.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in distance.parameters())


def test_a_perceptual_network_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "vgg.safetensors"
    with pytest.raises(FileError, match="does not exist"):
        PerceptualDistance(path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match="lacks 26 of 26"):
        PerceptualDistance(tmp_path / "vgg.pth")
    tensors = save_vgg(path, vgg_layout())
    save_file({name: t for name, t in tensors.items() if "28" not in name}, path)
    with pytest.raises(CheckpointError, match=r"lacks 2 of 26 .*features\.28\.weight"):
        PerceptualDistance(path)
    for wrong in (torch.zeros(4, 2, 3, 3), torch.zeros(4, 3, 5, 5), torch.zeros(())):
        save_file({**tensors, "features.10.weight": wrong}, path)
        with pytest.raises(CheckpointError, match=r"features\.10"):
            PerceptualDistance(path)
    with pytest.raises(RecipeError, match="perceptual_network"):
        VaeObjective(vae_recipe(tmp_path, loss=VaeLossSettings(perceptual=0.5)))


def test_discriminator_judges_patches_of_videos_and_images():
    judge = PatchDiscriminator(channels=4, num_levels=2)
    assert judge(torch.zeros(2, 3, 9, 32, 16)).shape == (2, 1, 5, 8, 4)
    assert judge(torch.zeros(1, 3, 1, 16, 16)).shape == (1, 1, 1, 4, 4)
    one, two = torch.randn(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)).split(1)
    # No sample sees its neighbours, so batches may be split over processes. Sums run in another order.
    torch.testing.assert_close(judge(torch.cat([one, two])), torch.cat([judge(one), judge(two)]), rtol=1e-4, atol=1e-6)


def test_adversarial_losses_are_the_hinge_and_keep_apart():
    """With the mean of the video as its score everything is known by hand."""
    judge = torch.nn.Linear(1, 1)
    with torch.no_grad():
        judge.weight.fill_(2.0)
        judge.bias.fill_(0.0)
    decoded, real = torch.tensor([[0.25], [-3.0]], requires_grad=True), torch.tensor([[0.1], [4.0]])
    parts = adversarial_losses(judge, decoded, real)
    # Scores: real 0.2 and 8, decoded 0.5 and -6. What is beyond the margin of 1 costs nothing.
    assert float(parts["discriminator"].detach()) == pytest.approx(0.5 * (0.8 / 2 + 1.5 / 2))
    assert float(parts["generator"].detach()) == pytest.approx(-(0.5 - 6) / 2)
    (parts["generator"] + parts["discriminator"]).backward()
    torch.testing.assert_close(decoded.grad, torch.full((2, 1), -1.0))  # -weight / 2, of the generator's term alone
    # -0.1 / 2 of the real one within the margin, +0.25 / 2 of the decoded one, halved.
    assert float(judge.weight.grad) == pytest.approx(0.5 * (-0.05 + 0.125))


def test_discriminator_joins_in_after_its_start_and_resumes_to_the_bit(tmp_path):
    """Before, the run is the one without it; after, both learn; the file has no trace of it."""
    save_vgg(tmp_path / "vgg.safetensors", vgg_layout())
    shared = {
        "schedule": ScheduleSettings(steps=4, warmup_steps=0, shape="constant"),
        "mix": VaeMixSettings(crop_frames=5, crop_px=16, image_share=0.0, clip_share=0.0, clip_share_end=0.0),
        "loss": VaeLossSettings(perceptual=0.1, perceptual_network=str(tmp_path / "vgg.safetensors")),
        "evaluation_clips": 0,
    }
    judged = {**shared, "adversarial": VaeAdversarialSettings(weight=0.5, start=0.5, channels=4, num_levels=2)}

    def trained(name: str, changes: dict[str, object], *stops: int | None) -> Loop:
        for stop in stops:
            recipe = vae_recipe(tmp_path, run=RunSettings(name=name, folder=str(tmp_path), log_steps=1), **changes)
            loop = run(VaeObjective(recipe))
            loop.train(stop_after=stop)
        return loop

    plain, early = trained("plain", shared, 2), trained("judged", judged, 2)
    fresh = VaeObjective(early.objective.recipe).discriminator.state_dict()
    assert all(torch.equal(early.parameters[name], p) for name, p in plain.parameters.items())
    assert all(torch.equal(fresh[name], p) for name, p in early.objective.discriminator.named_parameters())
    parts, whole = trained("judged", judged, 1, None), trained("whole", judged, None)
    assert all(torch.equal(whole.parameters[name], p) for name, p in parts.parameters.items())
    assert all(torch.equal(whole.average.values[name], value) for name, value in parts.average.values.items())
    later = trained("plain", shared, None)
    assert any(not torch.equal(later.parameters[name], whole.parameters[name]) for name in later.parameters)
    assert not torch.equal(fresh["score.weight"], whole.parameters["discriminator.score.weight"])
    names = read_header(tmp_path / "whole" / "vae.safetensors").tensors
    assert names.keys() == read_header(tmp_path / "plain" / "vae.safetensors").tensors.keys()
    header, *rows = (tmp_path / "whole" / "loss.csv").read_text().splitlines()
    assert header.endswith("psnr,perceptual,generator,discriminator")
    assert [row.endswith(",,") for row in rows] == [True, True, False, False]


def test_vae_starts_from_a_file(tmp_path, tiny_bundle_dir):
    path = tiny_bundle_dir / "vae.safetensors"
    config = open_part(path, "codec")[1].config
    objective = VaeObjective(vae_recipe(tmp_path, init=str(path), model=replace(config, scaling_factor=1.0)))
    for name, value in load_file(path).items():
        assert torch.equal(objective.vae.state_dict()[name], value.float()), name
    assert objective.scaling_factor is None
    frozen = vae_recipe(tmp_path, init=str(path), encoder="pca", model=replace(config, scaling_factor=1.0))
    assert VaeObjective(frozen).scaling_factor == config.scaling_factor  # its latents are those of the file
    with pytest.raises(RecipeError, match=r"model\.latent_channels = 4"):
        VaeObjective(vae_recipe(tmp_path, init=str(path)))
    with pytest.raises(CheckpointError, match="not a"):
        VaeObjective(vae_recipe(tmp_path, init=str(tiny_bundle_dir / "network.safetensors")))
    with pytest.raises(FileError, match="does not exist"):
        VaeObjective(vae_recipe(tmp_path, init=str(tmp_path / "no.safetensors")))


@pytest.fixture
def matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VaeRecipe:
    """A CogVideoX VAE that is to have the latents of a HunyuanVideo VAE of random weights."""
    for name, value in (("MATCH_CLIPS", 12), ("MATCH_DECODER_CLIPS", 6)):
        monkeypatch.setattr(vae, name, value)
    monkeypatch.setattr(matched, "POSITIONS", 8_000)
    torch.manual_seed(3)
    path = tmp_path / "other.safetensors"
    export_codec(path, CausalVAE(CODEC), replace(CODEC, scaling_factor=2.5))
    sizes = {"block_channels": (16, 32, 32, 32), "layers_per_block": 1, "num_groups": 4, "latent_channels": 4}
    mix = VaeMixSettings(crop_frames=9, crop_px=16, image_share=0.3)
    match = VaeMatchSettings(codec=str(path), weight=3.0)
    return vae_recipe(tmp_path, family="cogvideox", model=sizes, mix=mix, match=match)


def test_vae_matches_the_latents_of_another_family(tmp_path, matching):
    objective = VaeObjective(matching)
    other = latents.load_frozen_codec(matching.match.codec)
    first = objective.evaluate(tmp_path, 0)
    assert first.keys() == {"psnr_db", "psnr_worst_db", "given_psnr_db", "first_frame_db", "latent_error"}
    written = load_codec(tmp_path / "vae.safetensors", dtype=torch.float32)
    assert isinstance(written, CogVideoXCodec)
    assert written.config.scaling_factor == other.config.scaling_factor == 2.5
    clip = torch.from_numpy(pool.draw_clip(matching.pool, 1)).float()[None] / 127.5 - 1
    with torch.no_grad():
        error = (written.encode(clip) - other.encode(clip)).square().mean().sqrt()
        nothing = (other.encode(clip) - other.encode(clip).mean()).square().mean().sqrt()
    assert float(error) < 0.5 * float(nothing)  # in closed form already
    run(objective).train()
    # Of the averaged weights, 25 steps later: neither half has lost what it had.
    codec = load_codec(tmp_path / "vae" / "vae.safetensors", dtype=torch.float32)
    assert isinstance(codec, CogVideoXCodec)
    last = objective.evaluate(tmp_path, 25)
    assert last["psnr_db"] > first["psnr_db"]
    assert last["latent_error"] < 1.2 * first["latent_error"]


def test_vae_loss_with_a_codec_to_match_is_its_definition(tmp_path, matching):
    objective = VaeObjective(replace(matching, loss=VaeLossSettings(gradient=0.0, kl=0.0)))
    other = latents.load_frozen_codec(matching.match.codec)
    batches = [objective.batch(Draw(seed=0, step=step, batch_size=2)) for step in range(8)]
    batch = next(batch for batch in batches if batch.given.tolist() == [False, True])
    assert {video.shape[2] for video in (each.video for each in batches)} == {1, 9}
    with torch.no_grad():
        parts = objective(batch)
        mean, logvar = objective.vae.encode(batch.video)
        wanted = other.encode(batch.video)
        read = torch.cat([mean[:1], wanted[1:] / 2.5])
        out = objective.vae.decode(read + logvar.mul(0.5).exp() * batch.noise)
    match = (2.5 * mean - wanted).square().mean()
    torch.testing.assert_close(parts["match"], match)
    torch.testing.assert_close(parts["loss"], (out - batch.video).abs().mean() + 3.0 * match)


def test_a_codec_that_cannot_be_matched_is_refused(tmp_path, matching):
    with pytest.raises(RecipeError, match="another size"):
        VaeObjective(replace(matching, model=matching.model | {"latent_channels": 5}))
    with pytest.raises(RecipeError, match="principal components"):
        VaeObjective(replace(matching, encoder="pca"))
    with pytest.raises(RecipeError, match="hunyuan"):
        VaeObjective(replace(matching, family="hunjuan"))


# ---- diffusion transformer -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path) -> DitObjective:
    folder = tmp_path_factory.mktemp("dit")
    return DitObjective(dit_recipe(folder, tiny_bundle_dir))


def dit_recipe(folder: Path, bundle: Path, **changes: object) -> DitRecipe:
    values = {
        "stage": "dit",
        "codec": str(bundle / "vae.safetensors"),
        "text": str(bundle / "text.safetensors"),
        "run": RunSettings(name="dit", folder=str(folder), log_steps=5),
        "schedule": ScheduleSettings(steps=30, warmup_steps=2, shape="constant"),
        "optimizer": OptimizerSettings(name="muon", batch_size=8, lr=5e-3, muon_lr=5e-3, ema_decay=0.5),
        "model": NETWORK,
        "defaults": Defaults(num_frames=9, height_px=32, width_px=32, fps=8, num_steps=2, shift=1.0, cfg=2.0),
        "pool": small_pool(folder, num_clips=8),
        "evaluation": DitEvaluationSettings(num_losses=8, num_videos=2),
    } | changes
    if is_dataclass(values["model"]):
        values["model"] = asdict(values["model"])
    return DitRecipe(**values)  # type: ignore[arg-type]


def test_loss_of_a_known_denoiser_is_its_closed_form(dit):
    """A fresh network answers 0, so its loss is the mean square of the flow, noise minus data."""
    batch = dit.batch(Draw(seed=0, step=0, batch_size=8))
    expected = (batch.noise - batch.x0).square().flatten(1).mean(1)
    with torch.no_grad():
        # The target is recovered from x_t by a division by t: at the smallest t float32 keeps 3 to 4 digits.
        torch.testing.assert_close(dit.errors(batch), expected, rtol=2e-3, atol=1e-4)


def test_batches_repeat_and_follow_the_mix(dit):
    one, two = (dit.batch(Draw(seed=0, step=3, batch_size=8)) for _ in range(2))
    assert torch.equal(one.x0, two.x0)
    assert torch.equal(one.noise, two.noise)
    assert torch.equal(one.cond.context, two.cond.context)
    halves = [dit.batch(Draw(seed=0, step=3, batch_size=8, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([half.t for half in halves]), one.t)
    assert torch.equal(torch.cat([half.x0 for half in halves]), one.x0)
    lengths = {dit.batch(Draw(seed=0, step=s, batch_size=2)).x0.shape[2] for s in range(30)}
    assert lengths == {1, 3}


def test_held_batches_give_the_first_frame_and_do_not_ask_for_it(dit, monkeypatch):
    held = replace(dit.recipe, mix=replace(dit.recipe.mix, image_share=0.0, held_share=1.0))
    monkeypatch.setattr(dit, "recipe", held)
    batch = dit.batch(Draw(seed=0, step=0, batch_size=8))
    assert batch.t.shape == (8, 1, batch.x0.shape[2], 1, 1)
    assert not batch.t[:, :, 0].any()
    assert (batch.t[:, :, 1:] > 0).all()
    with torch.no_grad():  # a fresh network answers 0 everywhere; what it says of the given frame does not count
        expected = (batch.noise - batch.x0)[:, :, 1:].square().flatten(1).mean(1)
        torch.testing.assert_close(dit.errors(batch), expected, rtol=2e-3, atol=1e-4)
        assert "held" in dit(batch)


def test_emphasis_draws_in_proportion(dit):
    scenes = dit.cache.scenes
    kinds = sorted({scene.shape for scene in scenes})
    assert len(kinds) > 1
    odds = np.diff(pool.drawing_odds(scenes, {"shape": {kinds[0]: 3.0}}), prepend=0.0)
    first = np.array([scene.shape == kinds[0] for scene in scenes])
    assert np.allclose(odds[first], 3 / (3 * first.sum() + (~first).sum()))
    assert np.allclose(odds[~first], 1 / (3 * first.sum() + (~first).sum()))
    for wrong in ({"colr": {"red": 2.0}}, {"colour": {"rde": 2.0}}, {"colour": {"red": 0}}, {"colour": {"red": "2"}}):
        with pytest.raises(RecipeError):
            pool.drawing_odds(scenes, wrong)


def test_times_follow_their_distribution(dit):
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([dit.shares(64, generator) for _ in range(64)]).double()
    # 10 % uniform, 90 % sigmoid of a unit normal: symmetric around one half.
    normal = torch.sigmoid(torch.randn(100_000, generator=generator, dtype=torch.float64))
    uniform = torch.rand(100_000, generator=generator, dtype=torch.float64)
    for quantile in (0.02, 0.25, 0.5, 0.75, 0.98):
        level = float(normal.quantile(quantile))
        expected = 0.9 * quantile + 0.1 * float((uniform < level).double().mean())
        assert float((t <= level).double().mean()) == pytest.approx(expected, abs=0.01)
    assert float(t.min()) > 0
    assert float(t.max()) <= 1
    # Within one batch the quantiles are evenly spread: the mean hardly varies.
    assert float(torch.stack([dit.shares(64, generator).mean() for _ in range(20)]).std()) < 0.01


def test_transformer_learns_and_its_file_loads(tmp_path, tiny_bundle_dir):
    recipe = dit_recipe(tmp_path, tiny_bundle_dir)
    objective = DitObjective(recipe)
    before = {name: p.clone() for name, p in objective.network.named_parameters()}
    figures = objective.evaluate(tmp_path, 0)
    assert {"validation", "colour", "all_correct"} <= figures.keys()
    run(objective).train()
    assert objective._validation_loss()["validation"] < figures["validation"]
    moved = [name for name, p in objective.network.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)
    model = load_network(tmp_path / "dit" / "network.safetensors", dtype=torch.float32)
    assert model.config == NETWORK
    assert model.defaults == recipe.defaults
    assert not any(name.startswith(("frozen", "text", "codec")) for name, _ in objective.named_parameters())
    assert len((tmp_path / "dit" / "samples" / "prompts.txt").read_text().splitlines()) == 2


def test_parts_that_do_not_fit_are_refused(tmp_path, tiny_bundle_dir):
    wide = replace(NETWORK, text_width=64)
    with pytest.raises(RecipeError, match="text encoders"):
        DitObjective(dit_recipe(tmp_path, tiny_bundle_dir, model=wide))


def test_transformer_starts_from_a_file(tmp_path, tiny_bundle_dir):
    path = tiny_bundle_dir / "network.safetensors"
    objective = DitObjective(dit_recipe(tmp_path, tiny_bundle_dir, init=str(path)))
    for name, value in load_file(path).items():
        assert torch.equal(objective.network.state_dict()[name], value.float()), name
    other = replace(NETWORK, num_single_blocks=2, rope_axes=(8, 4, 4))
    with pytest.raises(RecipeError, match="num_single_blocks = 2, model.rope_axes"):
        DitObjective(dit_recipe(tmp_path, tiny_bundle_dir, init=str(path), model=other))


class Wire:
    """A team whose processes run one after the other: what each would send is noted, and the answer is known."""

    def __init__(self, team: Team, answers: list[list[Any]] | None = None) -> None:
        self.share, self.leads = team.share, team.leads
        self.sent: list[list[Any]] = []
        self.answers = answers

    def gather(self, results: list[Any]) -> list[Any]:
        self.sent.append(results)
        return results if self.answers is None else self.answers[len(self.sent) - 1]


def test_evaluation_is_the_same_however_it_is_divided(dit, tmp_path, monkeypatch):
    """Everybody's parts, in turns, are what one process finds alone. The losses come in pieces of 16 clips."""
    evaluation = DitEvaluationSettings(num_losses=18, num_videos=2)
    monkeypatch.setattr(dit, "recipe", replace(dit.recipe, evaluation=evaluation))
    whole = Wire(ALONE)
    figures = dit.evaluate(tmp_path, 0, whole)
    parts = [Wire(Team(rank, 2), whole.sent) for rank in range(2)]
    assert [dit.evaluate(tmp_path / str(part.leads), 0, part) for part in parts] == [figures, figures]
    assert [path.name for path in tmp_path.glob("*/samples")] == ["samples"], "one process draws the pictures"
    losses, judged = ([*chain(*zip_longest(*sent))] for sent in zip(*(part.sent for part in parts), strict=True))
    assert len(whole.sent[0]) == len(whole.sent[1]) == len(judged) == 2
    for one, other in zip(whole.sent[0], losses, strict=True):
        assert torch.equal(one, other)
    for (video, row), (other_video, other_row) in zip(whole.sent[1], judged, strict=True):
        assert torch.equal(video, other_video)
        assert row == other_row


@pytest.mark.usefixtures("plain_loops")
def test_compiled_network_learns_the_same(tmp_path, tiny_bundle_dir):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("needs a C++ compiler")
    one_block = replace(NETWORK, num_double_blocks=0, num_single_blocks=1)
    batches, grads = [], []
    for compiled in (False, True):
        objective = DitObjective(dit_recipe(tmp_path, tiny_bundle_dir, model=one_block, compile=compiled))
        with torch.no_grad():
            for parameter in objective.network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        loss = objective(objective.batch(Draw(seed=0, step=0, batch_size=2)))["loss"]
        loss.backward()
        batches.append(loss.detach())
        grads.append({name: p.grad for name, p in objective.named_parameters()})
    torch.testing.assert_close(*batches)
    # Fused kernels round in other places.
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5)


def test_a_compiler_that_is_not_there_is_asked_for(tmp_path, tiny_bundle_dir, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingLibraryError, match="compile = false"):
        DitObjective(dit_recipe(tmp_path, tiny_bundle_dir, compile=True))


def test_hidden_matrices_are_those_of_the_blocks(dit):
    hidden = {name for name, p in dit.named_parameters() if p.ndim > 1 and dit.is_hidden(name)}
    assert "network.double_blocks.0.img_attn_qkv.weight" in hidden
    assert "network.single_blocks.0.linear2.weight" in hidden
    assert "network.txt_in.individual_token_refiner.blocks.0.mlp.fc1.weight" in hidden
    assert not any("mod" in name or "final" in name or "img_in" in name for name in hidden)
    assert len(hidden) == 4 * 2 + 2 + 4


def test_contact_sheet_shows_a_row_for_each_video(tmp_path):
    from PIL import Image

    videos = [torch.full((3, 9, 8, 8), value) for value in (-1.0, 1.0)]
    contact_sheet(tmp_path / "a" / "sheet.png", videos, num_frames=3, scale=1)
    image = np.asarray(Image.open(tmp_path / "a" / "sheet.png"))
    assert image.shape == (2 * 10, 3 * 10, 3)
    assert image[5, 5].tolist() == [0, 0, 0]
    assert image[15, 25].tolist() == [255, 255, 255]
