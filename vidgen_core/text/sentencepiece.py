"""T5's tokenizer: ``spiece.model`` by the sentencepiece library, and the same vocabulary as GGUF files spell it out."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, MissingLibraryError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN = 1, 2
"""kinds of pieces in GGUF; the others are no words"""
END = "</s>"
NUM_SENTINELS = 100
"""T5's ids of holes in a text stand behind the pieces; no prompt has any"""
SPACE = "▁"
_CARRIED = "spiece.model"
"""key of the model's bytes, in base64, where a tokenizer travels as JSON"""


class SpieceTokenizer(Tokenizer):
    """A ``spiece.model``; a text ends with ``</s>``, and T5's 100 ids stand behind those of its pieces."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        self._end = processor.piece_to_id(END)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size() + NUM_SENTINELS

    @property
    def num_ids(self) -> int:
        return self.vocab_size

    def id_of(self, word: str) -> int | None:
        index = self._processor.piece_to_id(word)
        return index if self._processor.id_to_piece(index) == word else None

    def to_json(self) -> str:
        """What :func:`tokenizer_from_metadata` reads; no ``tokenizer.json``."""
        return json.dumps({_CARRIED: base64.b64encode(self._processor.serialized_model_proto()).decode("ascii")})

    def encode(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        end = [self._end] if special_tokens else []
        return [self._processor.encode(text) + end for text in texts]


def tokenizer_from_spiece(data: bytes) -> Tokenizer:
    """The tokenizer of a ``spiece.model``, with T5's 100 ids behind its pieces.

    Raises:
        CheckpointError: these bytes are something else, damaged, or another kind of sentencepiece model.
        MissingLibraryError: sentencepiece is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "T5's spiece.model is read with the sentencepiece library", do="pip install sentencepiece"
        ) from error
    if not data:  # the library takes that for no model at all
        raise _unreadable("0 pieces")
    try:
        processor = SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise _unreadable("bytes that are damaged or something else") from error
    tokenizer = SpieceTokenizer(processor)
    if tokenizer.id_of(END) is None:
        raise _unreadable(f"{processor.vocab_size()} pieces without {END}")
    try:
        processor.nbest_encode_as_ids("a", 2)  # only a unigram model knows a second best way to cut a text
    except RuntimeError as error:
        raise _unreadable("a sentencepiece model of another kind than unigram") from error
    return tokenizer


def tokenizer_from_metadata(text: str) -> Tokenizer:
    """What a tokenizer's ``to_json`` gave: a ``spiece.model``, or the text of a ``tokenizer.json``.

    Raises:
        CheckpointError: the text is neither.
        MissingLibraryError: sentencepiece is needed and not installed.
    """
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict) or _CARRIED not in content:
        return Tokenizer.from_json(text)
    try:
        data = base64.b64decode(content[_CARRIED], validate=True)
    except (TypeError, ValueError) as error:
        raise _unreadable("a text that is no base64") from error
    return tokenizer_from_spiece(data)


def unigram_tokenizer(pieces: Sequence[tuple[str, float, int]], charsmap: bytes) -> Tokenizer:
    """A tokenizer that cuts a text as sentencepiece does, where a text ends with ``</s>``.

    Args:
        pieces: text, log probability and kind, in the order of their ids.
        charsmap: sentencepiece's table of normalisation; empty leaves texts as they are.

    Raises:
        CheckpointError: there is no unknown piece, or the table is damaged.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    unknown = next((index for index, piece in enumerate(pieces) if piece[2] == UNKNOWN), None)
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    if unknown is None or END not in ids:
        raise _unreadable("a vocabulary without its unknown piece or " + END)
    # What is no word has no probability of its own, and must not change that of a sign that no piece has.
    least = min((score for _, score, kind in pieces if kind == NORMAL), default=0.0)
    words = [(piece, score if kind == NORMAL else least) for piece, score, kind in pieces]
    backend: tokenizers.Tokenizer = Backend(models.Unigram(words, unk_id=unknown, byte_fallback=False))
    steps: list[Any] = []
    if charsmap:
        try:
            steps.append(normalizers.Precompiled(charsmap))
        except Exception as error:  # the library has no exception class of its own
            raise _unreadable("a damaged table of normalisation") from error
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, ids[END])])
    return Tokenizer(backend)


def _unreadable(given: str) -> CheckpointError:
    return CheckpointError(
        "The sentencepiece tokenizer cannot be read",
        given=given,
        expected="the spiece.model of T5",
        do="use the spiece.model that was published with the text encoder",
    )
