"""Teach a family's tiny text encoders what captions say.

The published encoders have read the internet; the tiny ones only ever need to read captions of
:mod:`.data.shapes`. After a few minutes on one core their frozen outputs hold each attribute of a
caption along directions of its own, also in combinations that were never seen:

* linear classifiers read every attribute from the mean of the words' states, from the last of them and, where
  there is one, from the pooled vector; what a caption leaves out is a class of its own ("unspecified");
* the pooled vector, or else the last state, is drawn towards a sum of one learned vector per attribute, so that
  the wording and the combination leave little trace in it;
* the states also predict words: LLaMA's the next one, T5's their own;
* where the network attends to padding, its states are drawn towards the last one, so that they say nothing else;
* phrases are replaced by what else a user might write, unknown words turn up anywhere, and words without
  meaning go missing.

Heads and attribute vectors are thrown away. The outputs are brought to a root mean square of 1 at the
end, exactly and inside the weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..vidgen_core.families.cogvideox.config import TextConfig as T5TextConfig
from ..vidgen_core.families.hunyuan.config import ClipDims, LlamaDims, Template, TextConfig
from ..vidgen_core.text.dims import T5Dims
from ..vidgen_core.text.features import TextFeatures
from ..vidgen_core.text.tokenizer import BOS, EOS, PAD, Tokenizer
from ..vidgen_core.weights.save import save_checkpoint
from .data.shapes import ATTRIBUTES, VOCABULARY, caption_with_fields, sample_scene
from .text_encoders import Encoders, Reading, encoders_of

log = logging.getLogger("vidgen")

_SINGULAR = ("circle", "disc", "ball", "square", "box", "triangle", "star", "heart", "cross", "plus")
NOUNS = frozenset(_SINGULAR) | {noun + ("es" if noun.endswith(("s", "x")) else "s") for noun in _SINGULAR}
"""every caption has exactly one of them, and the word before it is the colour"""
FILLERS = frozenset(
    ("a", "an", "the", "of", "that", "video", "short", "clip", "shows", "we", "see", "image", "picture", "slowly")
)
"""words that can go missing or be unknown without a change of meaning"""
_GERUNDS = {
    "move": "moving", "slide": "sliding", "drift": "drifting", "travel": "travelling", "bounce": "bouncing",
    "hop": "hopping", "jump": "jumping", "spin": "spinning", "rotate": "rotating", "turn": "turning",
    "grow": "growing", "get": "getting", "expand": "expanding", "shrink": "shrinking", "contract": "contracting",
    "stay": "staying", "rest": "resting", "pan": "panning", "zoom": "zooming",
}  # fmt: skip
PARAPHRASES: Mapping[str, tuple[str, ...]] = {
    "does not move": ("is not moving", "remains still", "is at rest", "stands still"),
    "do not move": ("are not moving", "remain still", "are at rest", "stand still"),
    "jumps up and down": ("jumps", "is jumping", "jumping up and down"),
    "jump up and down": ("jump", "are jumping", "jumping up and down"),
    "turns around": ("turns", "is turning", "revolves"),
    "turn around": ("turn", "are turning", "revolve"),
    "bigger": ("larger",),
    "upwards": ("upward", "to the top"),
    "downwards": ("downward", "to the bottom"),
    "left": ("leftwards",),
    "right": ("rightwards",),
    "huge": ("giant",),
    "disc": ("disk", "round"),
    "checkered": ("chequered", "checked", "checkerboard"),
    "dotted": ("dots", "polka dot"),
    "smooth": ("plain", "simple"),
    "background": ("backdrop", "ground", "wall"),
    "on": ("against", "with", "before", "and"),
    "a": ("the", "some", "single"),
    "static camera": ("still camera", "fixed camera", "camera static"),
    ",": ("and", "while", "with", ".", ", and", ";", "as"),
    **{base: (gerund, f"are {gerund}") for base, gerund in _GERUNDS.items()},
    **{f"{base}s": (gerund, f"is {gerund}") for base, gerund in _GERUNDS.items()},
    "move": ("moving", "are moving", "go", "going", "fly", "flying"),
    "moves": ("moving", "is moving", "goes", "going", "flies", "flying"),
}
"""what users write where the captions of the data set have fewer ways to say it"""
REWORD = 0.15
"""chance of each phrase that has a paraphrase to be replaced by one"""
STRANGER = "something"
"""stands for every word outside of the vocabulary"""
NOISE = 0.05
"""chance of an unknown word before each word, and of each filler to go missing or to be unknown"""
TERSE = 0.1
"""share of captions without any filler"""
SILENT = 0.05
"""share of captions whose colour is left out, and of captions whose noun is an unknown word"""
EMPTY = 0.03
"""share of empty prompts"""
STILL_IMAGE = 0.1
"""share of captions of a single frame; they speak of no motion and no camera"""
IMPLIED = {"motion": "still", "camera": "static"}
"""what a caption means that does not speak of it: the words alone cannot tell an image from a clip at rest"""


def caption_tokenizer() -> Tokenizer:
    """The word-level tokenizer of the captions and their paraphrases."""
    phrases = (phrase for row in PARAPHRASES.values() for phrase in row)
    return Tokenizer.from_words([*VOCABULARY, *(word for phrase in phrases for word in phrase.split())])


def tiny_text_config(
    *,
    width: int = 128,
    num_heads: int = 4,
    llama_layers: int = 3,
    skip_layers: int = 1,
    clip_layers: int = 2,
    max_length: int = 32,
) -> TextConfig:
    """Encoders of about 1 M parameters for the captions: no template, one vocabulary for both."""
    tokenizer = caption_tokenizer()
    bare = Template(text="{}", crop_start=0)
    return TextConfig(
        llama=LlamaDims(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            num_layers=llama_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            intermediate_size=2 * width,
            rope_theta=10000.0,
            skip_layers=skip_layers,
        ),
        clip=ClipDims(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            num_layers=clip_layers,
            num_heads=num_heads,
            intermediate_size=4 * width,
            max_length=max_length,
            eos_token_id=_required_id(tokenizer, EOS),
        ),
        max_length=max_length,
        pad_token_id=_required_id(tokenizer, PAD),
        bos_token_id=_required_id(tokenizer, BOS),
        video_template=bare,
        image_template=bare,
    )


def tiny_t5_config(
    *, width: int = 128, num_heads: int = 4, num_layers: int = 3, intermediate_size: int = 384, max_length: int = 32
) -> T5TextConfig:
    """A T5 of about 0.7 M parameters for the captions."""
    tokenizer = caption_tokenizer()
    return T5TextConfig(
        t5=T5Dims(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            num_layers=num_layers,
            num_heads=num_heads,
            head_size=width // num_heads,
            intermediate_size=intermediate_size,
        ),
        max_length=max_length,
        pad_token_id=_required_id(tokenizer, PAD),
        eos_token_id=_required_id(tokenizer, EOS),
    )


def _required_id(tokenizer: Tokenizer, word: str) -> int:
    index = tokenizer.id_of(word)
    assert index is not None, word
    return index


# ---------------------------------------------------------------------------------------------
# captions and what they state


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionBatch:
    """Captions with one label per attribute."""

    texts: tuple[str, ...]
    labels: Tensor
    """(B, attributes) int64: the index of the value, or the number of values for "unspecified" """


def sample_captions(rng: np.random.Generator, count: int, split: str, *, noise: float = 0.0) -> CaptionBatch:
    """``count`` captions of fresh scenes. ``noise`` as in :data:`NOISE`; with it, captions are reworded too."""
    pairs = [_labelled_caption(rng, split, noise) for _ in range(count)]
    return CaptionBatch(texts=tuple(text for text, _ in pairs), labels=torch.tensor([labels for _, labels in pairs]))


def _labelled_caption(rng: np.random.Generator, split: str, noise: float) -> tuple[str, list[int]]:
    scene = sample_scene(rng, split)
    text, stated = caption_with_fields(scene, rng, image=bool(rng.random() < STILL_IMAGE))
    facts = {name: value for name, value in scene.attributes().items() if name in stated}
    words, facts = _silenced(text.replace(",", " ,").split(), {**IMPLIED, **facts}, rng)
    if rng.random() < EMPTY:
        words, facts = [], {}
    labels = [values.index(facts[name]) if name in facts else len(values) for name, values in ATTRIBUTES.items()]
    if noise:
        words = _with_noise(_reworded(words, rng), rng, noise)
    return " ".join(words), labels


def _silenced(words: list[str], facts: dict[str, str], rng: np.random.Generator) -> tuple[list[str], dict[str, str]]:
    """Sometimes leave out the colour or the shape, which captions of the data set always state."""
    noun = next(index for index, word in enumerate(words) if word in NOUNS)
    if rng.random() < SILENT:
        words[noun] = STRANGER
        del facts["shape"]
    if rng.random() < SILENT:
        del words[noun - 1]
        del facts["colour"]
    return words, facts


def _reworded(words: list[str], rng: np.random.Generator) -> list[str]:
    text = f" {' '.join(words)} "
    for phrase, others in PARAPHRASES.items():
        if f" {phrase} " in text and rng.random() < REWORD:
            text = text.replace(f" {phrase} ", f" {others[int(rng.integers(len(others)))]} ", 1)
    return text.split()


def _with_noise(words: list[str], rng: np.random.Generator, chance: float) -> list[str]:
    drop = 1.0 if rng.random() < TERSE else chance
    noisy: list[str] = []
    for word in words:
        if rng.random() < chance:
            noisy.append(STRANGER)
        if word not in FILLERS:
            noisy.append(word)
        elif rng.random() >= drop:
            noisy.append(STRANGER if rng.random() < chance else word)
    return noisy


# ---------------------------------------------------------------------------------------------
# what is learned and thrown away


class Heads(nn.Module):
    """Linear readers of the attributes, the sum of attribute vectors, and the head that tells words."""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self.num_classes = [len(values) + 1 for values in ATTRIBUTES.values()]
        widths = encoders.widths
        self.readers = nn.ModuleDict({name: nn.Linear(width, sum(self.num_classes)) for name, width in widths.items()})
        self.attribute_vectors = nn.Linear(sum(self.num_classes), widths[encoders.summary])
        self.words = nn.Linear(widths["mean"], encoders.vocab_size, bias=False)

    def logits(self, vectors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """Per readout, one (B, classes) tensor for each attribute."""
        return {name: reader(vectors[name]).split(self.num_classes, dim=1) for name, reader in self.readers.items()}

    def expected_summary(self, labels: Tensor) -> Tensor:
        """The sum of the vectors of the stated attributes: (B, attributes) -> (B, width of the summary)."""
        hot = [F.one_hot(labels[:, i], n) for i, n in enumerate(self.num_classes)]
        return self.attribute_vectors(torch.cat(hot, dim=1).to(self.attribute_vectors.weight.dtype))


def readouts(features: TextFeatures) -> dict[str, Tensor]:
    """The vectors (B, width) from which attributes are read, "pooled" where there is one; the mask omits padding."""
    weight = features.context_mask.to(features.context.dtype)[..., None]
    count = features.context_mask.sum(1)
    rows = torch.arange(len(count), device=count.device)
    pooled = {"pooled": features.pooled} if features.pooled.shape[1] else {}
    return {
        **pooled,
        "mean": (features.context * weight).sum(1) / weight.sum(1),
        "last": features.context[rows, count - 1],
    }


def _loss(encoders: Encoders, heads: Heads, reading: Reading, labels: Tensor) -> dict[str, Tensor]:
    features, ids = reading.features, reading.ids
    vectors, mask = readouts(features), features.context_mask
    parts = {
        name: sum((F.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits)), start=torch.zeros(()))
        for name, logits in heads.logits(vectors).items()
    }
    parts["additive"] = F.mse_loss(heads.expected_summary(labels), vectors[encoders.summary])
    foretold = mask[:, encoders.ahead :]
    words = heads.words(features.context[:, : foretold.shape[1]])[foretold]
    parts["word"] = 0.1 * F.cross_entropy(words, ids[:, encoders.ahead :][foretold])
    power = features.context[mask].square().mean(-1)
    parts["scale"] = 0.1 * (power - 1).square().mean()
    if encoders.gives_padding:
        parts["padding"] = _distance_of_padding(features, vectors["last"].detach())
    return parts


def _distance_of_padding(features: TextFeatures, last: Tensor) -> Tensor:
    """Mean square distance of padding's states from the caption's last state; 0 where no caption has padding."""
    apart = (features.context - last[:, None])[~features.context_mask]
    return apart.square().sum() / max(apart.numel(), 1)


# ---------------------------------------------------------------------------------------------
# training


def train_text(
    config: TextConfig | T5TextConfig,
    *,
    steps: int,
    seed: int,
    threads: int = 1,
    out: Path,
    on_log: Callable[[int, Mapping[str, float]], None] | None = None,
    batch: int = 64,
    learning_rate: float = 2e-3,
    num_test: int = 2000,
) -> dict[str, float]:
    """Train encoders of ``config`` on captions and write them to ``out`` as safetensors.

    Args:
        config: sizes, of the family whose class it is; the vocabulary must hold :func:`caption_tokenizer`'s.
        steps: optimizer steps of ``batch`` captions each.
        seed: fixes everything, given the number of threads.
        on_log: called every 50 steps with the parts of the loss.
        num_test: captions, of scenes with combinations that training leaves out, for the scores.

    Returns:
        Accuracies "READOUT/ATTRIBUTE" in 0..1 on held-out combinations, their "READOUT/worst", the share of
        captions read without any mistake "READOUT/all", "SUMMARY/additive" (share of the variance of the pooled
        vector, or of the last state without one, that a sum over attributes explains), and the root mean squares
        "context/rms" and, where they exist, "pooled/rms" and "padding/apart" (from the last state).
    """
    with _reproducible(seed, threads):
        encoders = encoders_of(config, caption_tokenizer())
        heads = Heads(encoders)
        encoders.spread_embeddings()
        rng = np.random.default_rng(seed)
        encoders.module.train()
        for step, parts in _optimise(encoders, heads, rng, steps, batch, learning_rate):
            if on_log is not None and (step % 50 == 0 or step == steps):
                on_log(step, {name: float(value.detach()) for name, value in parts.items()})
        encoders.module.eval()
        encoders.normalise(sample_captions(rng, 512, "train").texts)
        _save(out, encoders)
        scores = evaluate(encoders, np.random.default_rng(seed + 1), num_test)
    log.info("text encoders written to %s; worst attribute %.4f", out, scores[f"{encoders.summary}/worst"])
    return scores


@contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _optimise(
    encoders: Encoders, heads: Heads, rng: np.random.Generator, steps: int, batch: int, learning_rate: float
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    # Linear heads start small and have far to go; at the encoders' rate everything else would wait for them.
    rates = {encoders.module: learning_rate, heads: 5 * learning_rate}
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()]
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(1, steps + 1):
        for group, rate in zip(optimiser.param_groups, rates.values(), strict=True):
            group["lr"] = rate * _learning_curve(step / steps)
        captions = sample_captions(rng, batch, "train", noise=NOISE)
        parts = _loss(encoders, heads, encoders.read(captions.texts), captions.labels)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        yield step, parts


def _learning_curve(progress: float) -> float:
    """Warm up over the first 5 %, then a half cosine down to nothing."""
    return min(1.0, progress / 0.05) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------
# scores


@torch.no_grad()
def evaluate(encoders: Encoders, rng: np.random.Generator, num_test: int) -> dict[str, float]:
    """Scores of frozen encoders; linear classifiers are fitted on training captions. See :func:`train_text`."""
    fit, test = sample_captions(rng, 2 * num_test, "train"), sample_captions(rng, num_test, "heldout")
    fitted, tested = (_frozen_features(encoders, batch.texts) for batch in (fit, test))
    scores: dict[str, float] = {}
    for readout in encoders.widths:
        right = _linear_probe(fitted[readout], fit.labels, tested[readout]) == test.labels
        accuracy = right.double().mean(0)
        scores |= {f"{readout}/{name}": float(accuracy[i]) for i, name in enumerate(ATTRIBUTES)}
        scores[f"{readout}/worst"] = float(accuracy.min())
        scores[f"{readout}/all"] = float(right.all(1).double().mean())
    summary = encoders.summary
    scores[f"{summary}/additive"] = _explained(fitted[summary], fit.labels, tested[summary], test.labels)
    features = encoders.module.encode(test.texts)
    scores["context/rms"] = float(features.context[features.context_mask].square().mean().sqrt())
    if features.pooled.shape[1]:
        scores["pooled/rms"] = float(features.pooled.square().mean().sqrt())
    if encoders.gives_padding:
        features = encoders.read(test.texts).features
        scores["padding/apart"] = float(_distance_of_padding(features, readouts(features)["last"]).sqrt())
    return scores


def _frozen_features(encoders: Encoders, texts: Sequence[str]) -> dict[str, Tensor]:
    """Readouts in float64, in pieces of 500 captions."""
    pieces = [readouts(encoders.read(texts[i : i + 500]).features) for i in range(0, len(texts), 500)]
    return {name: torch.cat([piece[name] for piece in pieces]).double() for name in encoders.widths}


def _linear_probe(x: Tensor, labels: Tensor, x_test: Tensor) -> Tensor:
    """Multinomial logistic regression for every attribute at once: labels (N, attributes) of ``x_test``."""
    sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], sum(sizes), dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(sum(sizes), dtype=x.dtype, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            pieces = (x @ weight + bias).split(sizes, dim=1)
            loss = torch.stack([F.cross_entropy(piece, labels[:, i]) for i, piece in enumerate(pieces)]).sum()
            loss = loss + 1e-4 * weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
    pieces = (x_test @ weight + bias).detach().split(sizes, dim=1)
    return torch.stack([piece.argmax(1) for piece in pieces], dim=1)


def _explained(x: Tensor, labels: Tensor, x_test: Tensor, labels_test: Tensor) -> float:
    """Share of the variance of ``x_test`` that the best sum of one vector per attribute value explains."""

    def design(values: Tensor) -> Tensor:
        hot = [F.one_hot(values[:, i], len(row) + 1) for i, row in enumerate(ATTRIBUTES.values())]
        return torch.cat([*hot, torch.ones(len(values), 1)], dim=1).double()

    a = design(labels)
    ridge = 1e-6 * torch.eye(a.shape[1], dtype=a.dtype)
    vectors = torch.linalg.solve(a.T @ a + ridge, a.T @ x)
    rest = x_test - design(labels_test) @ vectors
    return float(1 - rest.square().sum() / (x_test - x_test.mean(0)).square().sum())


def _save(out: Path, encoders: Encoders) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    title = {"modelspec.title": "VidGen tiny text encoders"}
    save_checkpoint(
        out,
        encoders.module.state_dict(),
        family=encoders.family,
        part="text",
        config=encoders.module.config,
        metadata={**title, **encoders.module.metadata()},
    )
