"""Tokenizers from ``tokenizer.json``: the text of that file is all there is to one.

It is read from a folder of a published encoder, or it travels in the metadata of a safetensors file.
Nothing is ever looked up on a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError

if TYPE_CHECKING:
    import tokenizers

METADATA_KEY = "vidgen.tokenizer"
METADATA_KEY_CLIP = "vidgen.tokenizer_clip"

UNKNOWN, PAD, BOS, EOS = "<unk>", "<pad>", "<bos>", "<eos>"
SPECIAL_WORDS = (UNKNOWN, PAD, BOS, EOS)
"""the first ids of every word-level tokenizer, in this order"""


class Tokenizer:
    """Text to lists of ids; truncation and padding are left to the caller."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From the text of a ``tokenizer.json``. Raises :class:`CheckpointError` when it is not one."""
        from tokenizers import Tokenizer as Backend

        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict) or "model" not in content:
            raise _unreadable(text)
        try:
            return cls(Backend.from_str(text))
        except Exception as error:  # the library has no exception class of its own
            raise _unreadable(text) from error

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From ``tokenizer.json`` in ``folder`` (or from that file itself)."""
        path = folder / "tokenizer.json" if folder.is_dir() else folder
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(
                "The tokenizer cannot be read",
                given=path,
                expected="a readable tokenizer.json",
                do="put the tokenizer.json of the text encoder into this folder",
            ) from error
        return cls.from_json(text)

    @classmethod
    def from_words(cls, words: Iterable[str]) -> Tokenizer:
        """A word-level tokenizer: lower case, split at spaces and punctuation, anything else is ``<unk>``.

        Ids: :data:`SPECIAL_WORDS` first, then the distinct words in sorted order. A text becomes
        ``<bos> words... <eos>``.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers import models, normalizers, pre_tokenizers, processors

        ordered = (*SPECIAL_WORDS, *sorted({word.lower() for word in words} - set(SPECIAL_WORDS)))
        vocabulary = {word: index for index, word in enumerate(ordered)}
        backend = Backend(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.normalizer = normalizers.Lowercase()
        splitters = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
        backend.pre_tokenizer = pre_tokenizers.Sequence(splitters)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(word, vocabulary[word]) for word in (BOS, EOS)]
        )
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def num_ids(self) -> int:
        """One more than the highest id: the rows that an embedding must have."""
        return max(self._backend.get_vocab().values(), default=-1) + 1

    def id_of(self, word: str) -> int | None:
        """The id of one entry of the vocabulary; None when there is no such entry."""
        return self._backend.token_to_id(word)

    def to_json(self) -> str:
        return self._backend.to_str()

    def encode(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Ids of every text, with the tokenizer's own special tokens around them if wanted."""
        rows = self._backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        return [encoding.ids for encoding in rows]


def _unreadable(text: str) -> CheckpointError:
    return CheckpointError(
        "The tokenizer cannot be read",
        given=f"a text that begins {text[:60]!r}",
        expected="the text of a tokenizer.json file",
        do="use the tokenizer.json that belongs to the text encoder",
    )


def tokenizers_from_metadata(metadata: Mapping[str, str]) -> tuple[Tokenizer, Tokenizer] | None:
    """LLaMA's and CLIP's tokenizer from a file's metadata (one may serve both); None when it carries none."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    tokenizer = Tokenizer.from_json(text)
    text_clip = metadata.get(METADATA_KEY_CLIP, text)
    return tokenizer, tokenizer if text_clip == text else Tokenizer.from_json(text_clip)


def pad_right(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut or pad every row to ``length``: ids (B, length) int64 and mask (B, length) bool."""
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        kept = torch.tensor(row[:length], dtype=torch.long)
        ids[index, : len(kept)] = kept
        mask[index, : len(kept)] = True
    return ids, mask
