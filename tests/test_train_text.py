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
from vidgen.training.text_encoders import CogVideoXEncoders, Encoders, HunyuanEncoders, encoders_of
from vidgen.training.text_recipe import RECIPES, T5Recipe, TextRecipe, read_text_recipe
from vidgen.vidgen_core.errors import RecipeError
from vidgen.vidgen_core.families import identify
from vidgen.vidgen_core.families.cogvideox.text import T5Text
from vidgen.vidgen_core.families.hunyuan.text import TextStack
from vidgen.vidgen_core.model import load_text
from vidgen.vidgen_core.text.features import TextFeatures
from vidgen.vidgen_core.weights.header import read_header

WIDTH = 32
CONFIGS = {
    "hunyuan": training.tiny_text_config(width=WIDTH),
    "cogvideox": training.tiny_t5_config(width=WIDTH, intermediate_size=64),
}
KINDS = {"hunyuan": TextStack, "cogvideox": T5Text}
SUMMARIES = {"hunyuan": "pooled", "cogvideox": "last"}


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _train(
    out: Path, family: str, steps: int, seed: int = 0, *, num_test: int = 20, **options: Any
) -> dict[str, float]:
    config = CONFIGS[family]
    return training.train_text(config, steps=steps, seed=seed, out=out, batch=16, num_test=num_test, **options)


def _untrained(family: str) -> Encoders:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoders = encoders_of(CONFIGS[family], training.caption_tokenizer())
        encoders.spread_embeddings()
    return encoders


@pytest.mark.parametrize("noise", [0.0, training.NOISE])
def test_captions_are_within_the_vocabulary_and_the_length(noise: float) -> None:
    """Nothing but the word that stands for strangers is unknown, and no caption is cut."""
    tokenizer = training.caption_tokenizer()
    unknown = tokenizer.id_of("<unk>")
    captions = training.sample_captions(np.random.default_rng(0), 1000, "all", noise=noise)
    for text, row in zip(captions.texts, tokenizer.encode(captions.texts), strict=True):
        assert row.count(unknown) == text.split().count(training.STRANGER), text
        assert len(row) <= min(config.max_length for config in CONFIGS.values())


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


def test_the_attributes_are_learned(family: str, tmp_path: Path) -> None:
    """A chance classifier reads the colour right in 1 of 8 captions; 100 small steps teach most of it."""
    lines: list[tuple[int, dict[str, float]]] = []

    def remember(step: int, parts: Mapping[str, float]) -> None:
        lines.append((step, dict(parts)))

    scores = _train(tmp_path / "text.safetensors", family, 100, num_test=300, learning_rate=4e-3, on_log=remember)
    assert [step for step, _ in lines] == [50, 100]
    summary = SUMMARIES[family]
    assert lines[-1][1][summary] < lines[0][1][summary]
    assert scores[f"{summary}/count"] > 0.9
    assert scores[f"{summary}/colour"] > 0.5
    assert {name: value for name, value in scores.items() if name.endswith("/rms")} == pytest.approx(
        {"context/rms": 1.0, "pooled/rms": 1.0} if family == "hunyuan" else {"context/rms": 1.0}, abs=0.1
    )
    if family == "cogvideox":
        assert lines[-1][1]["padding"] < lines[0][1]["padding"]
        assert scores["padding/apart"] < 1  # of states whose size is 1


def test_a_seed_fixes_the_file_and_nothing_else(family: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _train(tmp_path / f"{name}.safetensors", family, 3, seed)
    a, b, c = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    matrices = [name for name, tensor in a.items() if tensor.ndim == 2]
    assert matrices
    assert not any(torch.equal(a[name], c[name]) for name in matrices)
    assert torch.equal(torch.rand(1), expected), "the global generator was left alone"
    assert torch.get_num_threads() == threads


def test_the_file_alone_is_enough(family: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "text.safetensors"
    _train(out, family, 2)
    found = identify(read_header(out))
    assert (found.family.name, found.part, found.config) == (family, "text", CONFIGS[family])
    stack: Any = load_text(out)
    assert type(stack) is KINDS[family]
    assert stack.tokenizer.to_json() == training.caption_tokenizer().to_json()
    features = stack.encode(["a red circle moves left", "", "an unheard-of zebra"])
    assert features.context.shape == (3, 32, WIDTH)
    assert features.pooled.shape == (3, WIDTH if family == "hunyuan" else 0)
    assert torch.isfinite(features.context).all()
    assert torch.isfinite(features.pooled).all()


def test_words_that_nobody_taught_are_all_alike(family: str) -> None:
    """A prompt of the user's own vocabulary is read as if its strangers were one word, whatever its case."""
    encode = _untrained(family).module.encode
    ours, theirs = encode(["a zebra moves left"]), encode(["A QUAGGA moves left"])
    assert torch.equal(ours.context, theirs.context)
    assert not torch.equal(ours.context, encode(["a star moves left"]).context)


@pytest.mark.parametrize("texts", [("a red star",), ("", "two blue circles move left , zoom in")])
def test_readings_tell_words_from_padding(family: str, texts: tuple[str, ...]) -> None:
    """Masked are exactly the words and special tokens; of T5 all padding is there, since the words see it."""
    encoders = _untrained(family)
    reading = encoders.read(texts)
    rows = training.caption_tokenizer().encode(texts)
    if family == "cogvideox":
        rows = [row[1:] for row in rows]  # T5 has no token for the beginning
    assert [ids[mask].tolist() for ids, mask in zip(reading.ids, reading.features.context_mask, strict=True)] == rows
    assert reading.ids.shape[1] == (max(map(len, rows)) if family == "hunyuan" else 32)
    states = training.readouts(reading.features)
    assert states.keys() == dict(encoders.widths).keys()
    for row, words in enumerate(rows):
        own = reading.features.context[row, : len(words)]
        torch.testing.assert_close(states["mean"][row], own.mean(0))
        assert torch.equal(states["last"][row], own[-1])


def test_padding_is_measured_from_the_last_state() -> None:
    context = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [3.0, 6.0]]])
    mask = torch.tensor([[True, True, False]])
    features = TextFeatures(context=context, context_mask=mask, pooled=torch.zeros(1, 0))
    last = training.readouts(features)["last"]
    assert training._distance_of_padding(features, last).item() == 2.0  # (0 + 4) / 2
    full = TextFeatures(context=context, context_mask=torch.ones_like(mask), pooled=torch.zeros(1, 0))
    assert training._distance_of_padding(full, last).item() == 0.0


def test_a_state_is_asked_for_the_next_word_or_its_own() -> None:
    """The word's part of the loss is a cross entropy with the words that the states can know."""
    for family, ahead in (("hunyuan", 1), ("cogvideox", 0)):
        encoders = _untrained(family)
        heads = training.Heads(encoders)
        captions = training.sample_captions(np.random.default_rng(0), 4, "train")
        reading = encoders.read(captions.texts)
        parts = training._loss(encoders, heads, reading, captions.labels)
        counts = reading.features.context_mask.sum(1).tolist()
        states = [row[: count - ahead] for row, count in zip(reading.features.context, counts, strict=True)]
        words = [row[ahead:count] for row, count in zip(reading.ids, counts, strict=True)]
        expected = torch.nn.functional.cross_entropy(heads.words(torch.cat(states)), torch.cat(words))
        torch.testing.assert_close(parts["word"], 0.1 * expected)
        assert ("padding" in parts) == (family == "cogvideox")


def test_normalising_is_exact(family: str) -> None:
    """States are scaled as a whole: their directions stay. 1e-3: the epsilon in LLaMA's norms feels the scale."""
    encoders = _untrained(family)
    texts = training.sample_captions(np.random.default_rng(0), 64, "train").texts
    with torch.no_grad():
        for name, parameter in encoders.module.named_parameters():
            if name == "t5.final_layer_norm.weight":
                parameter.mul_(3)
    before = encoders.module.encode(texts)
    encoders.normalise(texts)
    after = encoders.module.encode(texts)
    mask = before.context_mask
    torch.testing.assert_close(
        torch.nn.functional.normalize(after.context[mask], dim=-1),
        torch.nn.functional.normalize(before.context[mask], dim=-1),
        atol=1e-3,
        rtol=0,
    )
    assert after.context[mask].square().mean().item() == pytest.approx(1.0, abs=1e-3)
    if family == "hunyuan":
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
    assert len(TextStack(training.tiny_text_config(width=WIDTH)).llama.layers) == 2


def test_the_encoders_know_their_family() -> None:
    kinds = {family: type(_untrained(family)) for family in CONFIGS}
    assert kinds == {"hunyuan": HunyuanEncoders, "cogvideox": CogVideoXEncoders}
    assert {kind.family for kind in kinds.values()} == set(RECIPES)


# ---- by a recipe -----------------------------------------------------------------------------------------------

FOLDER = Path(cli.__file__).parent / "recipes"
STEPS = {"hunyuan": 600, "cogvideox": 1200}


def _recipe(family: str) -> Path:
    return FOLDER / f"tiny_{family}_text.toml"


def test_the_bundled_recipe_spells_out_the_published_run(family: str) -> None:
    recipe = read_text_recipe(_recipe(family))
    assert (recipe.run.seed, recipe.run.threads, recipe.schedule.steps) == (0, 1, STEPS[family])
    plain = (
        TextRecipe(stage="text", run=recipe.run)
        if family == "hunyuan"
        else T5Recipe(stage="text", family="cogvideox", run=recipe.run, schedule=recipe.schedule)
    )
    assert recipe == plain, "it states the defaults, so that they may change"


def test_the_bundled_t5_has_the_promised_size() -> None:
    recipe = read_text_recipe(_recipe("cogvideox"))
    text = T5Text(recipe.model.config(), training.caption_tokenizer())  # type: ignore[arg-type]
    assert 6e5 < sum(parameter.numel() for parameter in text.parameters()) < 8e5


def test_a_recipe_trains_what_the_function_trains(family: str, tmp_path: Path) -> None:
    changes = [f"model.width={WIDTH}", "schedule.steps=3", "optimizer.batch_size=16", "num_test=20"]
    changes += ["model.intermediate_size=64"] if family == "cogvideox" else []
    places = [f"run.folder={str(tmp_path)!r}", "run.name=small"]
    arguments = [part for change in (*changes, *places) for part in ("--set", change)]
    assert cli.main([str(_recipe(family)), *arguments]) == 0
    expected = _train(tmp_path / "direct.safetensors", family, 3)
    by_recipe, direct = (load_file(tmp_path / name) for name in ("small/text.safetensors", "direct.safetensors"))
    assert by_recipe.keys() == direct.keys()
    assert all(torch.equal(by_recipe[name], direct[name]) for name in direct)
    notes = json.loads((tmp_path / "small" / "scores.json").read_text())
    assert notes["scores"] == expected
    assert notes["recipe"]["schedule"]["steps"] == 3
    assert notes["recipe"]["family"] == family
    (row,) = csv.DictReader((tmp_path / "small" / "loss.csv").open())
    assert row["step"] == "3"
    parts = {"mean", "last", "additive", "word", "scale", "pooled" if family == "hunyuan" else "padding"}
    assert row.keys() == parts | {"step", "loss"}
    assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in parts), rel=1e-4)


@pytest.mark.parametrize(
    ("of", "override", "message"),
    [
        ("hunyuan", "model.widht=32", "width"),
        ("hunyuan", "run.precision='bf16'", "precision"),
        ("hunyuan", "optimizer.batch_size=0", "more than 0"),
        ("hunyuan", "model.width=36", "heads"),
        ("hunyuan", "model.skip_layers=3", "No layer"),
        ("hunyuan", "stage.text=1", "no table"),
        ("hunyuan", "family=hunyuann", "did you mean 'hunyuan'"),
        ("hunyuan", "family=cogvideox", "Unknown option of T5Sizes"),
        ("cogvideox", "family=hunyuan", "Unknown option of TextSizes"),
        ("cogvideox", "family=[1]", "Unknown family"),
        ("cogvideox", "model.llama_layers=3", "'llama_layers'"),
        ("cogvideox", "model.width=34", "multiple of the number of heads"),
        ("cogvideox", "model.num_layers=0", "more than 0"),
        ("cogvideox", "schedule.steps=-1", "more than 0"),
    ],
)
def test_a_wrong_recipe_trains_nothing(tmp_path: Path, of: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        cli.train(_recipe(of), [f"run.folder={str(tmp_path)!r}", override])
    assert not list(tmp_path.iterdir())


def test_there_is_nothing_to_finish(family: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no checkpoints"):
        cli.train(_recipe(family), [f"run.folder={str(tmp_path)!r}"], finish_now=True)
