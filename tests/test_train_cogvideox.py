"""Training of CogVideoX's transformer: the latent in front, pictures on the channels, a teacher of another family."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from vidgen.training.data import latents, shapes
from vidgen.training.data.pool import PoolSettings
from vidgen.training.dit import DitEvaluationSettings, DitMixSettings, DitObjective, DitRecipe
from vidgen.training.loop import Draw, Loop
from vidgen.training.recipe import OptimizerSettings, RunSettings, ScheduleSettings
from vidgen.training.teacher import Teacher, TeacherSettings, noise_share, time_of_share
from vidgen.training.text import caption_tokenizer
from vidgen.vidgen_core.diffusion import flow_matching, scaled_linear_table, snr_shift, vp, zero_terminal_snr
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families import FAMILIES
from vidgen.vidgen_core.families.cogvideox.config import NetworkConfig, TextConfig
from vidgen.vidgen_core.families.cogvideox.text import T5Text
from vidgen.vidgen_core.model import load_network
from vidgen.vidgen_core.text.dims import T5Dims
from vidgen.vidgen_core.text.tokenizer import EOS, PAD
from vidgen.vidgen_core.types import Defaults
from vidgen.vidgen_core.weights.save import save_checkpoint

NETWORK = NetworkConfig(
    in_channels=32, out_channels=16, hidden_size=32, num_heads=2, num_layers=2, patch=(2, 2, 2), text_width=16,
    text_length=24, time_width=16, rope_axes=(4, 6, 6), rope_fit="slice", trained_grid=(6, 8, 8), offset_embed=True,
    image_scale=1.5,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "CHUNK", 8)
        patch.setattr(latents, "BATCH", 4)
        yield


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = caption_tokenizer()
    dims = T5Dims(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2, head_size=8, intermediate_size=32
    )
    pad, eos = tokenizer.id_of(PAD), tokenizer.id_of(EOS)
    assert pad is not None
    assert eos is not None
    config = TextConfig(t5=dims, max_length=24, pad_token_id=pad, eos_token_id=eos)
    torch.manual_seed(0)
    text = T5Text(config, tokenizer)
    path = tmp_path_factory.mktemp("t5") / "text.safetensors"
    save_checkpoint(path, text.state_dict(), family="cogvideox", part="text", config=config, metadata=text.metadata())
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path, t5: Path) -> DitRecipe:
    folder = tmp_path_factory.mktemp("cog")
    return DitRecipe(
        stage="dit",
        family="cogvideox",
        codec=str(tiny_bundle_dir / "vae.safetensors"),
        text=str(t5),
        run=RunSettings(name="dit", folder=str(folder), log_steps=5),
        schedule=ScheduleSettings(steps=30, warmup_steps=2, shape="constant"),
        optimizer=OptimizerSettings(name="muon", batch_size=4, lr=5e-3, muon_lr=5e-3, ema_decay=0.5),
        model=asdict(NETWORK),
        defaults=Defaults(num_frames=9, height_px=32, width_px=32, fps=8, num_steps=2, shift=1.0, cfg=2.0),
        pool=PoolSettings(num_clips=8, num_frames=9, size_px=32, folder=str(folder / "cache")),
        mix=DitMixSettings(held_share=0.5),
        evaluation=DitEvaluationSettings(num_losses=8, num_videos=1),
    )


@pytest.fixture(scope="module")
def objective(recipe: DitRecipe) -> DitObjective:
    return DitObjective(recipe)


def mixed(objective: DitObjective, **changes: object) -> None:
    objective.recipe = replace(objective.recipe, mix=replace(objective.recipe.mix, **changes))


def draw(step: int = 0) -> Draw:
    return Draw(seed=0, step=step, batch_size=4)


def test_the_first_latent_runs_along_in_front(objective, monkeypatch):
    monkeypatch.setattr(objective, "recipe", objective.recipe)
    mixed(objective, image_share=0.0, held_share=0.0)
    batch = objective.batch(draw())
    assert batch.x0.shape == batch.noise.shape == (4, 16, 4, 4, 4)  # 9 frames are 3 latents
    assert torch.equal(batch.x0[:, :, 0], batch.x0[:, :, 1])
    assert not torch.equal(batch.noise[:, :, 0], batch.noise[:, :, 1])
    assert torch.equal(batch.wanted, batch.x0)
    assert not batch.cond.concat.any()
    assert batch.cond.concat.shape == batch.x0.shape
    mixed(objective, lead="nothing")
    other = objective.batch(draw())
    assert not other.x0[:, :, 0].any()
    assert torch.equal(other.x0[:, :, 1:], batch.x0[:, :, 1:])
    assert torch.equal(other.noise, batch.noise)


def test_an_image_is_one_latent_and_its_copy(objective, monkeypatch):
    monkeypatch.setattr(objective, "recipe", objective.recipe)
    mixed(objective, image_share=1.0)
    batch = objective.batch(draw())
    assert batch.kind == "image"
    assert batch.x0.shape == (16, 16, 2, 4, 4)
    assert torch.equal(batch.x0[:, :, 0], batch.x0[:, :, 1])


def test_a_picture_is_told_on_the_channels(objective, monkeypatch):
    monkeypatch.setattr(objective, "recipe", objective.recipe)
    mixed(objective, image_share=0.0, held_share=1.0)
    shown: list[torch.Tensor] = []
    encode = objective.frozen.codec.encode
    monkeypatch.setattr(objective.frozen.codec, "encode", lambda video: shown.append(video) or encode(video))
    batch = objective.batch(draw())
    assert batch.kind == "held"
    assert batch.t.shape == (4,)  # all frames are noisy, and all count
    with torch.no_grad():
        pictures = torch.cat([encode(frame) for frame in list(shown)])
    torch.testing.assert_close(batch.cond.concat[:, :, :1], 1.5 * pictures)
    assert not batch.cond.concat[:, :, 1:].any()
    drawn = [shapes.render(scene, height_px=32, width_px=32)[:, :1] for scene in objective.cache.scenes]
    frames = torch.stack([torch.from_numpy(frame) for frame in drawn]).float() / 127.5 - 1
    assert all(bool((frames == frame).flatten(1).all(1).any()) for frame in shown)


def test_a_picture_has_noise_before_it_is_encoded(objective, monkeypatch):
    monkeypatch.setattr(objective, "recipe", objective.recipe)
    mixed(objective, picture_noise=(math.log(0.5), 0.0))
    shown: list[torch.Tensor] = []
    encode = objective.frozen.codec.encode
    monkeypatch.setattr(objective.frozen.codec, "encode", lambda video: shown.append(video) or encode(video))
    objective._picture(3, torch.Generator().manual_seed(1))
    scene = objective.cache.scenes[3]
    frame = torch.from_numpy(shapes.render(scene, num_frames=1, height_px=32, width_px=32)).float() / 127.5 - 1
    # 3072 numbers: the deviation of their deviation is 1.3 %.
    assert float((shown[0][0] - frame).std()) == pytest.approx(0.5, rel=0.06)


def test_shares_of_noise_are_the_same_in_both_processes():
    shares = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    table = zero_terminal_snr(snr_shift(scaled_linear_table(), 1.0))
    for diffusion in (flow_matching(), vp(table)):
        t = time_of_share(diffusion, shares)
        reachable = shares > 0.02 if diffusion.num_timesteps else shares > 0
        torch.testing.assert_close(noise_share(diffusion, t)[reachable], shares[reachable], rtol=1e-4, atol=1e-6)
        assert float(time_of_share(diffusion, torch.ones(()))) == 1.0
    assert torch.equal(time_of_share(flow_matching(), shares), shares.float())


def teacher_of(bundle: Path, weight: float = 1.0) -> TeacherSettings:
    return TeacherSettings(
        network=str(bundle / "network.safetensors"), text=str(bundle / "text.safetensors"), weight=weight
    )


@pytest.mark.parametrize("held", [False, True])
def test_a_teacher_says_what_it_expects_at_the_same_noise(tiny_bundle_dir, held):
    teacher = Teacher(teacher_of(tiny_bundle_dir), channels=16, precision="fp32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.model.network.parameters():  # a fresh network predicts 0
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    x0, noise = torch.randn(2, 2, 16, 3, 4, 4, generator=generator)
    captions = ["a red star", "a blue circle spins"]
    share = torch.tensor([0.3, 0.8])
    found = teacher.expected(x0, noise, share, captions, image=False, held=held)
    s = share.view(-1, 1, 1, 1, 1).repeat(1, 1, 3, 1, 1)
    if held:
        s[:, :, 0] = 0
    cond = teacher.model.conditioning(teacher.text.encode(captions))
    with torch.no_grad():
        x_t = (1 - s) * x0 + s * noise
        velocity = teacher.model.predict(x_t, s if held else share, cond)
    wanted = x_t - s * velocity
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    if held:
        assert torch.equal(found[:, :, 0], x0[:, :, 0])
    teacher.weight = 0.25
    mixture = teacher.expected(x0, noise, share, captions, image=False, held=held)
    torch.testing.assert_close(mixture, 0.25 * wanted + 0.75 * x0, rtol=1e-5, atol=1e-5)


def test_a_pupil_is_asked_for_what_the_teacher_expects(recipe, objective, tiny_bundle_dir):
    taught = DitObjective(replace(recipe, teacher=teacher_of(tiny_bundle_dir)))
    batch, plain = taught.batch(draw()), objective.batch(draw())
    assert torch.equal(batch.x0, plain.x0)
    assert not torch.equal(batch.wanted, plain.wanted)
    assert torch.equal(batch.wanted[:, :, 0], batch.wanted[:, :, 1])
    # Unseen clips are judged without a teacher, so that figures with and without one can be compared.
    with torch.no_grad():
        assert taught._validation_loss() == objective._validation_loss()
    assert not any("teacher" in name for name, _ in taught.named_parameters())


def test_a_teacher_may_come_late(recipe, tiny_bundle_dir):
    late = DitObjective(replace(recipe, teacher=replace(teacher_of(tiny_bundle_dir), start=0.5)))
    early, after = (late.batch(replace(draw(), position=position)) for position in (0.49, 0.5))
    assert torch.equal(early.wanted, early.x0)
    assert torch.equal(early.x0, after.x0)
    assert not torch.equal(after.wanted, after.x0)


@pytest.mark.parametrize(
    ("changes", "channels", "message"),
    [
        ({"weight": 2.0}, 16, r"teacher\.weight = 2"),
        ({"start": 1.0}, 16, r"teacher\.start = 1"),
        ({}, 24, "a teacher of 16 channels"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(tiny_bundle_dir, changes, channels, message):
    with pytest.raises(RecipeError, match=message):
        Teacher(replace(teacher_of(tiny_bundle_dir), **changes), channels=channels, precision="fp32")


def test_it_learns_and_its_file_loads(recipe):
    objective = DitObjective(recipe)
    with torch.no_grad():
        first = objective._validation_loss()["validation"]
    Loop(objective, run=recipe.run, optimizer=recipe.optimizer, schedule=recipe.schedule).train()
    with torch.no_grad():
        assert objective._validation_loss()["validation"] < 0.97 * first
    path = Path(recipe.run.folder) / "dit" / "network.safetensors"
    model = load_network(path, dtype=torch.float32)
    assert (model.family.name, model.config, model.defaults) == ("cogvideox", NETWORK, recipe.defaults)
    assert (path.parent / "samples" / "step-00000030.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "pixeldanse"}, "did you mean|Unknown family"),
        ({"model": {"hiden_size": 3}}, "hidden_size"),
        ({"model": {**asdict(NETWORK), "out_channels": 8}}, r"model\.out_channels = 8"),
        ({"model": {**asdict(NETWORK), "text_width": 8}}, "text encoders"),
    ],
)
def test_recipes_that_cannot_work_are_refused(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        DitObjective(replace(recipe, **changes))


def test_a_network_of_pairs_begins_with_a_narrow_one(recipe: DitRecipe, tmp_path: Path):
    """And begins better than from nothing: its weights and an output layer fitted to clips."""
    narrow = replace(NETWORK, in_channels=16, hidden_size=16, num_heads=1, patch=(1, 1, 1), offset_embed=False)
    torch.manual_seed(0)
    network = FAMILIES["cogvideox"].parts["network"].build(narrow, {})
    network.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path / "narrow.safetensors"
    save_checkpoint(
        path, network.state_dict(), family="cogvideox", part="network", config=narrow,
        metadata={"vidgen.defaults": json.dumps(asdict(recipe.defaults))},
    )  # fmt: skip
    pairs = replace(recipe, model=asdict(replace(NETWORK, patch=(2, 1, 1))))
    grafted, fresh = DitObjective(replace(pairs, graft=str(path))), DitObjective(pairs)
    block = grafted.network.layers[1].dense.weight
    torch.testing.assert_close(block, torch.block_diag(*2 * [network.layers[1].dense.weight]))
    assert float(grafted.network.final_layer.linear.weight.detach().abs().max()) > 0
    with torch.no_grad():
        assert grafted._validation_loss()["validation"] < fresh._validation_loss()["validation"]


def test_a_network_begins_with_one_other(recipe: DitRecipe):
    with pytest.raises(RecipeError, match=r"graft = 'a', init = 'b'"):
        DitObjective(replace(recipe, graft="a", init="b"))
