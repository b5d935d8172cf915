"""Where a published encoder's tokenizer is looked for: fixed places in a fixed order, and only files on this machine.

1. the folder that the user names; then nowhere else
2. beside the weights: ``<name of the weights>.tokenizer.json``, then ``tokenizer.json``
3. folders beside the weights or one up: ``tokenizer`` for LLaMA and T5, ``tokenizer_2`` for CLIP, as diffusers lays
   them out, and ``llama``, ``clip`` or ``t5``
4. ``llama``, ``clip`` or ``t5`` in the host's folders of text encoders: ``models/text_encoders/llama/tokenizer.json``

CLIP's may also be ``vocab.json`` with ``merges.txt``, T5's ``spiece.model``. A tokenizer of another vocabulary is
passed over, so that the tokenizers of two encoders may lie in one folder; the error says what was found and why it did
not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, FileError
from .sentencepiece import tokenizer_from_spiece
from .tokenizer import Tokenizer

Kind = Literal["llama", "clip", "t5"]

TITLES: dict[Kind, str] = {"llama": "LLaMA", "clip": "CLIP", "t5": "T5"}
FOLDERS: dict[Kind, tuple[str, ...]] = {
    "llama": ("tokenizer", "llama"),
    "clip": ("tokenizer_2", "clip"),
    "t5": ("tokenizer", "t5"),
}
"""names of a folder with the tokenizer of each encoder"""
_SPIECE = "spiece.model"
_FILES: dict[Kind, str] = {
    "llama": "tokenizer.json",
    "clip": "tokenizer.json, or vocab.json and merges.txt",
    "t5": f"{_SPIECE}, or tokenizer.json",
}
_SOURCES: dict[Kind, str] = {
    "llama": "xtuner/llava-llama-3-8b-v1_1-transformers",
    "clip": "openai/clip-vit-large-patch14",
    "t5": "google/t5-v1_1-xxl, and in the tokenizer folder of CogVideoX",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerPlaces:
    """Where to look besides the weights' own folder."""

    named: Path | None = None
    """a folder the user names; nothing else is looked at then"""
    shared: Sequence[Path] = ()
    """the host's folders of text encoders"""


def find_tokenizer(
    kind: Kind, weights: Path, places: TokenizerPlaces, misfit: Callable[[Tokenizer], str | None]
) -> Tokenizer:
    """The first tokenizer that belongs to an encoder.

    Args:
        weights: the encoder's file, or its folder.
        misfit: why a tokenizer does not belong to the encoder, or None.

    Raises:
        FileError, CheckpointError: there is none; the message says where one can be put and what was found.
    """
    if places.named is not None and not places.named.is_dir():
        raise FileError(
            "The folder of the tokenizers does not exist",
            given=places.named,
            expected="a folder with the tokenizers' files",
            do="correct tokenizer_folder, or leave it empty",
        )
    passed_over: list[str] = []
    for path in _candidates(kind, weights, places):
        try:
            tokenizer = _read(path)
        except (CheckpointError, FileError):
            passed_over.append(f"{path} (cannot be read)")
            continue
        why = misfit(tokenizer)
        if why is None:
            return tokenizer
        passed_over.append(f"{path} ({why})")
    raise _not_found(kind, weights, places, passed_over)


def _folders(kind: Kind, weights: Path, places: TokenizerPlaces) -> list[Path]:
    """Every folder that may hold the tokenizer, the nearest first."""
    if places.named is not None:
        return [*(places.named / name for name in FOLDERS[kind]), places.named]
    home = weights if weights.is_dir() else weights.parent
    beside = [home, *(root / name for root in (home, home.parent) for name in FOLDERS[kind])]
    return [*beside, *(root / kind for root in places.shared)]


def _candidates(kind: Kind, weights: Path, places: TokenizerPlaces) -> Iterator[Path]:
    own = weights.with_name(f"{weights.stem}.tokenizer.json")
    if places.named is None and own.is_file():
        yield own
    for folder in _folders(kind, weights, places):
        if (folder / "tokenizer.json").is_file():
            yield folder / "tokenizer.json"
        if kind == "clip" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            yield folder / "vocab.json"
        if kind == "t5" and (folder / _SPIECE).is_file():
            yield folder / _SPIECE


def _read(path: Path) -> Tokenizer:
    if path.name == _SPIECE:
        return tokenizer_from_spiece(_bytes(path))
    if path.name == "vocab.json":
        return clip_tokenizer(path, path.with_name("merges.txt"))
    return Tokenizer.from_folder(path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError("The tokenizer cannot be read", given=path, do="check the file and its permissions") from error


def _not_found(kind: Kind, weights: Path, places: TokenizerPlaces, passed_over: list[str]) -> CheckpointError:
    folders = _folders(kind, weights, places)
    home = places.named or (weights if weights.is_dir() else weights.parent)
    file = _SPIECE if kind == "t5" else "tokenizer.json"
    names = [f"{file} in {home / FOLDERS[kind][-1]}"]
    if places.named is None:
        names.insert(0, f"{weights.stem}.tokenizer.json beside the weights")
        names += [f"{file} in {root / kind}" for root in places.shared]
    given = f"{weights} without one"
    if passed_over:
        given += "; passed over: " + ", ".join(passed_over)
    if kind == "llama" and any((folder / "tokenizer.model").is_file() for folder in folders):
        given += "; there is a tokenizer.model, which is not enough: LLaMA-3 uses a byte-level BPE, not sentencepiece"
    return CheckpointError(
        f"The tokenizer of {TITLES[kind]} was not found",
        given=given,
        expected=f"{_FILES[kind]}, as published with {_SOURCES[kind]}",
        do="put it where it is looked for: " + ", or ".join(names),
    )


def clip_tokenizer(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's byte-level BPE from ``vocab.json`` and ``merges.txt``.

    Text is lower-cased after NFC, runs of white space are one space, and words, single digits and runs of other signs
    are split from each other. Source: OpenAI's CLIP repository, ``simple_tokenizer.py``.

    Raises:
        CheckpointError: the files cannot be read, or are not CLIP's.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    start, end = "<|startoftext|>", "<|endoftext|>"
    try:
        words = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise _not_clip(vocabulary, "files that cannot be read") from error
    if not isinstance(words, dict) or start not in words or end not in words:
        raise _not_clip(vocabulary, f"a vocabulary without {start} and {end}")
    pairs: list[tuple[str, str]] = []
    for line in lines:
        if not line.strip() or line.startswith("#version"):
            continue
        first, _, second = line.strip().partition(" ")
        if first + second not in words:
            raise _not_clip(merges, f"the merge {line.strip()!r}, which the vocabulary does not have")
        pairs.append((first, second))
    backend = Backend(models.BPE(words, pairs, unk_token=end, end_of_word_suffix="</w>", fuse_unk=False))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.post_processor = processors.RobertaProcessing(
        (end, words[end]), (start, words[start]), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens([start, end])
    return Tokenizer(backend)


def _not_clip(path: Path, given: str) -> CheckpointError:
    return CheckpointError(
        "CLIP's tokenizer cannot be read",
        given=f"{given}: {path}",
        expected="vocab.json and merges.txt of openai/clip-vit-large-patch14",
        do="fetch both again, or use tokenizer.json",
    )
