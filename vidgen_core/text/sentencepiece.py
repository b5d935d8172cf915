"""T5's tokenizer from ``spiece.model``, without the sentencepiece library.

The file is a protocol buffer: numbered pieces with scores, and the table that texts are normalised with. Source:
``sentencepiece_model.proto`` of google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN = 1, 2
"""kinds of pieces, here and in GGUF; the others are no words"""
UNIGRAM = 1
"""kind of the model"""
END = "</s>"
NUM_SENTINELS = 100
"""T5's ids of holes in a text stand behind the pieces, from ``<extra_id_99>`` to ``<extra_id_0>``"""
SPACE = "▁"


def tokenizer_from_spiece(data: bytes) -> Tokenizer:
    """The tokenizer of a ``spiece.model``, with T5's 100 ids behind its pieces.

    Raises:
        CheckpointError: these bytes are something else, damaged, or another kind of sentencepiece model.
    """
    pieces: list[tuple[str, float, int]] = []
    charsmap, kind = b"", UNIGRAM
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(value))
            elif number == 2:
                kind = next((inner for field, inner in _fields(value) if field == 3), UNIGRAM)
            elif number == 3:
                charsmap = next((inner for field, inner in _fields(value) if field == 2), b"")
    except (IndexError, KeyError, struct.error, TypeError, UnicodeDecodeError) as error:
        raise _unreadable("bytes that are damaged or something else") from error
    if kind != UNIGRAM:
        raise _unreadable("a sentencepiece model of another kind than unigram")
    if len(pieces) < 3 or END not in (piece for piece, _, _ in pieces):
        raise _unreadable(f"{len(pieces)} pieces" + ("" if len(pieces) < 3 else f" without {END}"))
    return unigram_tokenizer(pieces, charsmap)


def unigram_tokenizer(
    pieces: Sequence[tuple[str, float, int]], charsmap: bytes, *, sentinels: int = NUM_SENTINELS
) -> Tokenizer:
    """A tokenizer that cuts a text as sentencepiece does, where a text ends with ``</s>``.

    Args:
        pieces: text, log probability and kind, in the order of their ids.
        charsmap: sentencepiece's table of normalisation; empty leaves texts as they are.
        sentinels: ids to add behind the pieces.

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
    words += [(f"<extra_id_{number}>", least) for number in reversed(range(sentinels))]
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


def _piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(data))
    return fields[1].decode("utf-8"), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0, fields.get(3, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message: an int, or the bytes of anything else."""
    if not isinstance(data, bytes):
        raise TypeError("no message")
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise TypeError(f"wire type {wire}")
        if place + length > len(data):
            raise IndexError("cut short")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise TypeError("no number")


def _unreadable(given: str) -> CheckpointError:
    return CheckpointError(
        "The sentencepiece tokenizer cannot be read",
        given=given,
        expected="the spiece.model of T5",
        do="use the spiece.model that was published with the text encoder",
    )
