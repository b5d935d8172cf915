"""The stages of training at tiny size: caches, the VAE's and the transformer's objectives, files that load again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vidgen.training.data import latents, pool
from vidgen.training.dit import DitEvaluationSettings, DitObjective, DitRecipe
from vidgen.training.loop import Draw, Loop
from vidgen.training.pictures import contact_sheet
from vidgen.training.recipe import OptimizerSettings, RunSettings, ScheduleSettings
from vidgen.training.vae import VaeLossSettings, VaeMixSettings, VaeObjective, VaeRecipe, detail_loss, psnr_db
from vidgen.vidgen_core.codec import Codec
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
from vidgen.vidgen_core.model import load_codec, load_network
from vidgen.vidgen_core.types import Defaults

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
    assert {tuple(objective.batch(draw)[0].shape[2:]) for draw in draws} == {(5, 16, 16), (9, 32, 32), (1, 32, 32)}
    video, noise = objective.batch(Draw(seed=0, step=0, batch_size=2))
    again, _ = objective.batch(Draw(seed=0, step=0, batch_size=2))
    assert torch.equal(video, again)
    assert float(video.min()) >= -1
    assert noise.shape[1] == CODEC.latent_channels


def test_vae_loss_is_its_definition(tmp_path):
    weights = VaeLossSettings(gradient=0.25, square=0.5, kl=0.125)
    objective = VaeObjective(vae_recipe(tmp_path, loss=weights))
    batch = objective.batch(Draw(seed=0, step=1, batch_size=2))
    with torch.no_grad():
        parts = objective(batch)
        mean, logvar = objective.vae.encode(batch[0])
        out = objective.vae.decode(mean + logvar.mul(0.5).exp() * batch[1])
    posterior = torch.distributions.Normal(mean, logvar.mul(0.5).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    error = out - batch[0]
    expected = error.abs().mean() + 0.25 * detail_loss(out, batch[0]) + 0.5 * error.square().mean() + 0.125 * kl
    torch.testing.assert_close(parts["loss"], expected)


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


def test_times_follow_their_distribution(dit):
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([dit.times(64, generator) for _ in range(64)]).double()
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
    assert float(torch.stack([dit.times(64, generator).mean() for _ in range(20)]).std()) < 0.01


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

