"""Training of the tiny text encoders, at a size where it takes seconds."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vidgen.training import cli
from vidgen.training import text as training
from vidgen.training.data.shapes import ATTRIBUTES
from vidgen.training.recipe import read_recipe
from vidgen.training.text_recipe import TextRecipe
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families import identify
from vidgen.vidgen_core.families.hunyuan.config import TextConfig
from vidgen.vidgen_core.families.hunyuan.text import TextStack
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.load import load_module

WIDTH = 32


def _config() -> TextConfig:
    return training.tiny_text_config(width=WIDTH)


def _train(out: Path, steps: int, seed: int = 0, *, num_test: int = 20, **options: Any) -> dict[str, float]:
    return training.train_text(_config(), steps=steps, seed=seed, out=out, batch=16, num_test=num_test, **options)


@pytest.mark.parametrize("noise", [0.0, training.NOISE])
def test_captions_are_within_the_vocabulary_and_the_length(noise: float) -> None:
    """Nothing but the word that stands for strangers is unknown, and no caption is cut."""
    tokenizer = training.caption_tokenizer()
    unknown = tokenizer.id_of("<unk>")
    captions = training.sample_captions(np.random.default_rng(0), 1000, "all", noise=noise)
    for text, row in zip(captions.texts, tokenizer.encode(captions.texts), strict=True):
        assert row.count(unknown) == text.split().count(training.STRANGER), text
        assert len(row) <= _config().max_length


def test_labels_say_what_captions_say() -> None:
    captions = training.sample_captions(np.random.default_rng(1), 600, "all", noise=0.05)
    names = list(ATTRIBUTES)
    colour, motion = names.index("colour"), names.index("motion")
    unspecified = [len(values) for values in ATTRIBUTES.values()]
    for text, labels in zip(captions.texts, captions.labels.tolist(), strict=True):
        if not text:
            assert labels == unspecified
        if " red " in f" {text} ":  # only objects are red
            assert labels[colour] == ATTRIBUTES["colour"].index("red")
        if "spins" in text or "is spinning" in text:
            assert labels[motion] == ATTRIBUTES["motion"].index("spin")
    seen = captions.labels == torch.tensor(unspecified)
    assert seen.any(0).all(), "every attribute is left out somewhere"


def test_the_attributes_are_learned(tmp_path: Path) -> None:
    """A chance classifier reads the colour right in 1 of 8 captions; 100 small steps teach most of it."""
    lines: list[tuple[int, dict[str, float]]] = []

    def remember(step: int, parts: Mapping[str, float]) -> None:
        lines.append((step, dict(parts)))

    scores = _train(tmp_path / "text.safetensors", 100, num_test=300, learning_rate=4e-3, on_log=remember)
    assert [step for step, _ in lines] == [50, 100]
    assert lines[-1][1]["pooled"] < lines[0][1]["pooled"]
    assert scores["pooled/count"] > 0.9
    assert scores["pooled/colour"] > 0.5
    assert scores["context/rms"] == pytest.approx(1.0, abs=0.1)
    assert scores["pooled/rms"] == pytest.approx(1.0, abs=0.1)


def test_a_seed_fixes_the_file_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _train(tmp_path / f"{name}.safetensors", 3, seed)
    a, b, c = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if "proj.weight" in name)
    assert torch.equal(torch.rand(1), expected), "the global generator was left alone"
    assert torch.get_num_threads() == threads


def test_the_file_alone_is_enough(tmp_path: Path) -> None:
    out = tmp_path / "new" / "text.safetensors"
    _train(out, 2)
    header = read_header(out)
    found = identify(header)
    assert (found.family.name, found.part, found.config) == ("hunyuan", "text", _config())
    part = found.family.parts["text"]
    stack = load_module(header, lambda: part.build(found.config, header.metadata))
    assert isinstance(stack, TextStack)
    features = stack.encode(["a red circle moves left", "", "an unheard-of zebra"])
    assert features.context.shape == (3, 32, WIDTH)
    assert torch.isfinite(features.pooled).all()


def test_normalising_is_exact() -> None:
    """States are scaled as a whole: their directions stay. 1e-3: the epsilon in LLaMA's norms feels the scale."""
    torch.manual_seed(0)
    stack = TextStack(_config(), training.caption_tokenizer())
    training._spread_embeddings(stack)
    texts = training.sample_captions(np.random.default_rng(0), 64, "train").texts
    before = stack.encode(texts)
    training._normalise(stack, texts)
    after = stack.encode(texts)
    mask = before.context_mask
    torch.testing.assert_close(
        torch.nn.functional.normalize(after.context[mask], dim=-1),
        torch.nn.functional.normalize(before.context[mask], dim=-1),
        atol=1e-3,
        rtol=0,
    )
    assert after.context[mask].square().mean().item() == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(after.pooled.mean(0), torch.zeros(WIDTH), atol=1e-5, rtol=0)
    assert after.pooled.square().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_probe_and_explained_variance_on_known_data() -> None:
    """Features that are a sum of attribute vectors are read without mistake and explained to the last digit."""
    generator = torch.Generator().manual_seed(0)
    sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
    vectors = [torch.randn(size, 80, generator=generator, dtype=torch.float64) for size in sizes]
    labels = torch.stack([torch.randint(size, (900,), generator=generator) for size in sizes], dim=1)
    x = torch.stack([rows[labels[:, i]] for i, rows in enumerate(vectors)]).sum(0)
    assert torch.equal(training._linear_probe(x[:700], labels[:700], x[700:]), labels[700:])
    assert training._explained(x[:700], labels[:700], x[700:], labels[700:]) == pytest.approx(1.0, abs=1e-6)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert abs(training._explained(noise[:700], labels[:700], noise[700:], labels[700:])) < 0.15


def test_the_skipped_layer_is_not_built() -> None:
    """Two of three layers are built and stored."""
    assert len(TextStack(_config()).llama.layers) == 2


# ---- by a recipe -----------------------------------------------------------------------------------------------

RECIPE = Path(cli.__file__).parent / "recipes" / "tiny_hunyuan_text.toml"


def test_the_bundled_recipe_spells_out_the_published_run() -> None:
    recipe = read_recipe(RECIPE, TextRecipe)
    assert (recipe.run.seed, recipe.run.threads, recipe.schedule.steps) == (0, 1, 600)
    assert recipe == TextRecipe(stage="text", run=recipe.run), "it states the defaults, so that they may change"


def test_a_recipe_trains_what_the_function_trains(tmp_path: Path) -> None:
    changes = [f"model.width={WIDTH}", "schedule.steps=3", "optimizer.batch_size=16", "num_test=20"]
    places = [f"run.folder={str(tmp_path)!r}", "run.name=small"]
    arguments = [part for change in (*changes, *places) for part in ("--set", change)]
    assert cli.main([str(RECIPE), *arguments]) == 0
    expected = _train(tmp_path / "direct.safetensors", 3)
    by_recipe, direct = (load_file(tmp_path / name) for name in ("small/text.safetensors", "direct.safetensors"))
    assert by_recipe.keys() == direct.keys()
    assert all(torch.equal(by_recipe[name], direct[name]) for name in direct)
    notes = json.loads((tmp_path / "small" / "scores.json").read_text())
    assert notes["scores"] == expected
    assert notes["recipe"]["schedule"]["steps"] == 3
    (row,) = csv.DictReader((tmp_path / "small" / "loss.csv").open())
    assert row["step"] == "3"
    parts = {"pooled", "mean", "last", "additive", "next_word", "scale"}
    assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in parts), rel=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=32", "width"),
        ("run.precision='bf16'", "precision"),
        ("optimizer.batch_size=0", "more than 0"),
        ("model.width=36", "heads"),
        ("model.skip_layers=3", "No layer"),
        ("stage.text=1", "no table"),
    ],
)
def test_a_wrong_recipe_trains_nothing(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cli.train(RECIPE, [f"run.folder={str(tmp_path)!r}", override])
    assert not list(tmp_path.iterdir())


def test_there_is_nothing_to_finish(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no checkpoints"):
        cli.train(RECIPE, [f"run.folder={str(tmp_path)!r}"], finish_now=True)
