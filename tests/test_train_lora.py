"""A LoRA is trained beside a frozen network; its files do what the adapters did; styles are what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vidgen.training.data import detect, latents, pool, shapes, styles
from vidgen.training.data.pool import PoolSettings
from vidgen.training.dit import DitEvaluationSettings, DitObjective, DitRecipe
from vidgen.training.loop import Loop
from vidgen.training.lora import Adapters, LoraSettings, targeted
from vidgen.training.recipe import OptimizerSettings, RunSettings, ScheduleSettings, read_recipe
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.model import VideoModel, load_network
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.lora import read_lora

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "training" / "recipes" / "tiny_hunyuan_night_lora.toml"


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    """A chunk of the latent cache is 256 clips, far more than a test needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "CHUNK", 8)
        patch.setattr(latents, "BATCH", 4)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path) -> DitRecipe:
    folder = tmp_path_factory.mktemp("lora")
    return DitRecipe(
        stage="dit",
        codec=str(tiny_bundle_dir / "vae.safetensors"),
        text=str(tiny_bundle_dir / "text.safetensors"),
        init=str(tiny_bundle_dir / "network.safetensors"),
        lora=LoraSettings(rank=3, alpha=1.5),
        run=RunSettings(name="run", folder=str(folder), log_steps=5),
        schedule=ScheduleSettings(steps=6, warmup_steps=2, shape="constant"),
        optimizer=OptimizerSettings(batch_size=4, lr=2e-2, ema_decay=0.0),
        pool=PoolSettings(num_clips=8, num_frames=9, size_px=32, style="night", folder=str(folder / "cache")),
        evaluation=DitEvaluationSettings(num_losses=4, num_videos=1, num_steps=1),
    )


def run(recipe: DitRecipe, name: str) -> Loop:
    settings = replace(recipe.run, name=name)
    objective = DitObjective(replace(recipe, run=settings))
    return Loop(objective, run=settings, optimizer=recipe.optimizer, schedule=recipe.schedule)


@pytest.fixture(scope="module")
def trained(recipe: DitRecipe) -> tuple[DitObjective, Path]:
    """The objective after its run, and the run's folder."""
    loop = run(recipe, "whole")
    loop.train()
    assert isinstance(loop.objective, DitObjective)
    return loop.objective, loop.folder


def question(model: VideoModel) -> tuple[Tensor, Tensor, Conditioning]:
    """(x_t, t, conditioning) for the tiny network."""
    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        cond = Conditioning(
            context=torch.randn(1, 5, config.text_width),
            context_mask=torch.ones(1, 5, dtype=torch.bool),
            pooled=torch.randn(1, config.pooled_width),
        )
        return torch.randn(1, config.in_channels, 3, 4, 4), torch.tensor([0.6]), cond


# ---- what is trained -------------------------------------------------------------------------------------------


def test_only_the_adapters_learn(trained, tiny_bundle_dir):
    objective, _ = trained
    learning = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert learning
    assert all(name.startswith("adapters.layers.") for name in learning)
    assert all(bool(p.any()) for name, p in objective.named_parameters() if name.endswith(".up"))
    base = load_network(tiny_bundle_dir / "network.safetensors", dtype=torch.float32)
    own = objective.network.state_dict()
    assert own.keys() == base.network.state_dict().keys()
    assert all(torch.equal(own[name], value) for name, value in base.network.state_dict().items())
    assert objective.model.config == base.config
    assert objective.recipe.defaults == base.defaults


def test_the_usual_layers_are_the_family_s(trained):
    objective, _ = trained
    assert objective.adapters is not None
    endings = {name.rpartition(".")[2] for name in objective.adapters.names}
    assert endings == set(objective.model.family.lora_targets)


@pytest.mark.parametrize("dialect", ["musubi", "diffusers"])
@torch.no_grad()
def test_a_file_does_what_the_adapters_did(dialect, trained, tiny_bundle_dir):
    """float16 rounds each factor by up to 2^-11, half a thousandth, so two of them by a thousandth of the change."""
    objective, folder = trained
    base = load_network(tiny_bundle_dir / "network.safetensors", dtype=torch.float32)
    lora = read_lora(folder / f"lora_{dialect}.safetensors")
    asked = question(base)
    plain, learned = base.predict(*asked), objective.model.predict(*asked)
    change = (learned - plain).norm()
    assert change > 1e-2 * plain.norm(), "nothing was learned that a file could lose"
    model = base.with_lora(lora, 1.0)
    assert not model.loras[0].lora.report.unmatched
    with model.patched():
        assert (model.predict(*asked) - learned).norm() < 2e-3 * change
    off = base.with_lora(lora, 0.0)
    with off.patched():
        assert torch.equal(off.predict(*asked), plain)


def test_a_file_says_what_it_is(trained, tiny_bundle_dir):
    _, folder = trained
    tags = read_header(folder / "lora_musubi.safetensors").metadata
    assert tags["vidgen.base"] == read_header(tiny_bundle_dir / "network.safetensors").digest
    assert (tags["ss_network_dim"], tags["ss_network_alpha"]) == ("3", "1.5")
    assert "hunyuan" in tags["modelspec.architecture"]
    assert "seed 0" in tags["modelspec.description"]
    assert read_header(folder / "lora_diffusers.safetensors").metadata == tags
    assert not (folder / "network.safetensors").exists()


def test_a_resumed_run_ends_in_the_same_bits(recipe, trained):
    run(recipe, "halves").train(stop_after=3)
    second = run(recipe, "halves")
    second.train()
    whole = {name: p for name, p in trained[0].named_parameters() if p.requires_grad}
    assert second.progress.step == 6
    assert all(torch.equal(second.parameters[name], value) for name, value in whole.items())


def test_the_shipped_recipe_is_a_recipe():
    read = read_recipe(RECIPE, DitRecipe)
    assert read.lora is not None
    read.lora.check()
    assert read.pool.style == "night"


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "needs a rank"),
        ({"rank": -4}, "needs a rank"),
        ({"alpha": 0.0}, "lora.alpha = 0.0"),
        ({"targets": ("img_attn_qvk",)}, "img_attn_qkv"),
        ({"targets": ("attn2",)}, "layer to put a LoRA on"),
        ({"dialects": ("kohia",)}, "spelling of a LoRA"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message, recipe):
    with pytest.raises(RecipeError, match=message):
        DitObjective(replace(recipe, lora=LoraSettings(**settings)))


def test_a_lora_needs_a_network_and_only_that(recipe):
    with pytest.raises(RecipeError, match="without init"):
        DitObjective(replace(recipe, init=None))
    with pytest.raises(RecipeError, match=r"\[model\] beside \[lora\]"):
        DitObjective(replace(recipe, model={"hidden_size": 32}))


def test_another_rank_does_not_go_on_from_a_checkpoint(recipe, trained):
    from vidgen.vidgen_core.errors import CheckpointError

    with pytest.raises(CheckpointError, match="other settings"):
        run(replace(recipe, lora=LoraSettings(rank=2)), "whole").train()


def test_targets_are_endings_or_patterns():
    names = ("double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mlp.fc2", "single_blocks.0.linear1", "txt_in.fc1")
    assert targeted(names, ["fc1"]) == (names[0], names[3])
    assert targeted(names, ["img_mlp.*"]) == names[:2]
    assert targeted(names, ["single_blocks.*", "double_blocks.*.fc2"]) == names[1:3]


def test_adapters_start_at_nothing():
    layer = nn.Sequential(nn.Linear(4, 6))
    x = torch.randn(3, 4)
    before = layer(x)
    adapters = Adapters(layer, LoraSettings(rank=2), ["0"], torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), before)
    layer(x).sum().backward()
    grads = {name: p.grad for name, p in adapters.named_parameters()}
    assert bool(grads["layers.0.up"].any())
    assert layer[0].weight.grad is None


# ---- styles ------------------------------------------------------------------------------------------------------


def test_night_is_dark_around_things_that_stay_as_they_are():
    for index in range(4):
        scene = shapes.sample_scene(np.random.default_rng([1, index]))
        clip = shapes.render(scene)
        night = styles.night(clip)
        masks = detect.object_masks(clip.astype(np.float32) / 255)
        inner = ~detect.dilated(~masks, 3)
        assert np.array_equal(night[:, inner], clip[:, inner])
        ratio = styles.background_light(night) / styles.background_light(clip)
        assert ratio == pytest.approx(styles.NIGHT_LIGHT, abs=0.02)
        read = detect.detect(night)
        assert (read["colour"], read["motion"]) == (scene.colour, scene.motion)


def test_the_light_of_a_background_is_its_luminance():
    clip = np.full((3, 2, 16, 16), 51, dtype=np.uint8)
    assert styles.background_light(clip) == pytest.approx(0.2)
    clip[:, :, 6:9, 6:9] = np.array([255, 0, 0], dtype=np.uint8)[:, None, None, None]
    assert styles.background_light(clip) == pytest.approx(0.2)


def test_a_style_is_drawn_and_has_a_cache_of_its_own(tmp_path):
    settings = PoolSettings(num_clips=2, size_px=32, num_frames=5, folder=str(tmp_path))
    dark = replace(settings, style="night")
    assert np.array_equal(pool.draw_clip(dark, 1), styles.night(pool.draw_clip(settings, 1)))
    assert dark.path() != settings.path()
    assert "style" not in settings.facts()
    assert set(styles.STYLES) == {"plain", "night"}
