"""Encode a prompt with a LLaMA of the published size whose layers stay in the file: seconds and peak memory.

    python -m vidgen.benchmarks.full_size_text [--folder DIR] [--out RESULT.json]

Writes a LLaMA-3-8B of random float8 weights in ComfyUI's layout (about 8 GB, deleted afterwards), a CLIP of random
weights, and two stub tokenizers: they know the words of the template and a few more, at the published ids, because the
real vocabularies are not ours to ship. The path is the product's own: ``load_text``, then ``encode``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..vidgen_core.families.hunyuan.config import I2V_VIDEO_TEMPLATE, IMAGE_TEMPLATE, VIDEO_TEMPLATE

SPECIAL_IDS = {
    "<|begin_of_text|>": 128000,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eot_id|>": 128009,
    "<image>": 128257,
    "<pad>": 128258,
}
LLAMA_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""how LLaMA-3 cuts a text before its merges"""


def stub_llama_tokenizer(*prompts: str) -> str:
    """tokenizer.json of a tokenizer with LLaMA-3's cuts and special ids, where every word of the templates and of
    ``prompts`` is one token (as in the real one, for the templates) and any other is unknown."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

    split = pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated")
    texts = [template.text for template in (VIDEO_TEMPLATE, IMAGE_TEMPLATE, I2V_VIDEO_TEMPLATE)] + list(prompts)
    pieces = [text for text in texts for text in _without_specials(text)]
    words = dict.fromkeys(word for piece in pieces for word, _ in split.pre_tokenize_str(piece))
    words.pop("\n\n", None)
    ids = {"<unk>": 0} | {word: 1000 + number for number, word in enumerate(words)} | {"\n\n": 271} | SPECIAL_IDS
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in SPECIAL_IDS])
    start = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, SPECIAL_IDS[start])]
    )
    return tokenizer.to_str()


def _without_specials(text: str) -> list[str]:
    for word in (*SPECIAL_IDS, "{}"):
        text = text.replace(word, "\0")
    return [piece for piece in text.split("\0") if piece]


def stub_clip_files(folder: Path) -> None:
    """vocab.json and merges.txt that know single letters and a few pairs, with CLIP's special ids."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pairs = [("r", "e"), ("re", "d</w>"), ("c", "i"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in pairs)]
    ids: dict[str, Any] = {word: number for number, word in enumerate(words)}
    ids |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
