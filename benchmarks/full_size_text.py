"""Encode a prompt with text encoders of the published size whose layers stay in the file: seconds and peak memory.

    python -m vidgen.benchmarks.full_size_text --json benchmarks/results/full_size_text.json
    python -m vidgen.benchmarks.full_size_text --family cogvideox

Writes files of random weights (deleted afterwards) in ComfyUI's layouts: for HunyuanVideo a LLaMA-3-8B in float8
(9.1 GB) and a CLIP-L, for CogVideoX the encoder of T5-XXL in float8 (5.2 GB). Beside them lie stub tokenizers: they
know the words of the template and of the prompt, at ids of the published range. The real vocabularies are not ours to
ship, and what a word's id is does not change the work. The path is the product's own: ``load_text``, then ``encode``,
in a process of their own, so that the peak is theirs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..vidgen_core.families.hunyuan.config import (
    I2V_VIDEO_TEMPLATE,
    IMAGE_TEMPLATE,
    VIDEO_TEMPLATE,
    ClipDims,
    LlamaDims,
)
from ..vidgen_core.text.dims import T5Dims
from .full_size import GIB, Entry, commit, cost, measure_fresh, tell, write_random
from .render import machine, peak_bytes

BAR_BYTES = {"hunyuan": 4 * GIB, "cogvideox": 2 * GIB}
"""what the whole process may take at its peak"""
PROMPT = "a red fox runs through deep snow at dawn, the camera follows it from the side, soft light, long shadows"

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


# ---------------------------------------------------------------------------------------------
# the encoders


def llama_entries(dims: LlamaDims) -> list[Entry]:
    """A whole LLaMA as ComfyUI stores it in float8: with the layers, norm and head that are not needed."""
    width, inner, head = dims.hidden_size, dims.intermediate_size, dims.hidden_size // dims.num_heads
    linears = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (dims.num_kv_heads * head, width),
        "self_attn.v_proj": (dims.num_kv_heads * head, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    entries: list[Entry] = [("model.embed_tokens.weight", (dims.vocab_size, width), "F16")]
    for number in range(dims.num_layers):
        for name, shape in linears.items():
            entries.append((f"model.layers.{number}.{name}.weight", shape, "F8_E4M3"))
            entries.append((f"model.layers.{number}.{name}.scale_weight", (), "F32"))
        for name in ("input_layernorm", "post_attention_layernorm"):
            entries.append((f"model.layers.{number}.{name}.weight", (width,), "F16"))
    rest: list[Entry] = [("model.norm.weight", (width,), "F16"), ("lm_head.weight", (dims.vocab_size, width), "F16")]
    return [*entries, *rest, ("scaled_fp8", (0,), "F8_E4M3")]


def clip_entries(dims: ClipDims) -> list[Entry]:
    import torch

    from ..vidgen_core.text.clip import ClipText

    with torch.device("meta"):
        weights = ClipText(dims).state_dict()
    return [(name, tuple(tensor.shape), "F16") for name, tensor in weights.items()]


def t5_entries(dims: T5Dims) -> list[Entry]:
    """T5's encoder as ComfyUI stores it in float8, with the embedding twice."""
    import torch

    from ..vidgen_core.text.t5 import build_t5

    with torch.device("meta"):
        weights = build_t5(dims).state_dict()
    table = weights.pop("embed_tokens.weight")
    entries: list[Entry] = [
        (name, tuple(table.shape), "F16") for name in ("shared.weight", "encoder.embed_tokens.weight")
    ]
    for name, tensor in weights.items():
        is_small = tensor.ndim == 2 and "relative" not in name
        entries.append((f"encoder.{name}", tuple(tensor.shape), "F8_E4M3" if is_small else "F16"))
        if is_small:
            entries.append((f"encoder.{name.removesuffix('weight')}scale_weight", (), "F32"))
    return [*entries, ("scaled_fp8", (0,), "F8_E4M3")]


def stub_t5_tokenizer(*prompts: str) -> str:
    """tokenizer.json of a tokenizer with T5's cuts and special ids, in which every word of ``prompts`` is a piece."""
    from ..vidgen_core.text.sentencepiece import END, NORMAL, SPACE, UNKNOWN, unigram_tokenizer

    words = dict.fromkeys(f"{SPACE}{word}" for prompt in prompts for word in prompt.split())
    special = [("<pad>", 0.0, 0), (END, 0.0, 0), ("<unk>", 0.0, UNKNOWN)]
    return unigram_tokenizer([*special, *((word, -1.0, NORMAL) for word in words)], b"").to_json()


def write_encoders(folder: Path, llama: LlamaDims, clip: ClipDims) -> int:
    """llama.safetensors, clip.safetensors and the stub tokenizers; bytes of LLaMA's file. FileError on a full disk."""
    num_bytes = write_random(folder / "llama.safetensors", llama_entries(llama))
    write_random(folder / "clip.safetensors", clip_entries(clip))
    (folder / "llama.tokenizer.json").write_text(stub_llama_tokenizer(PROMPT), encoding="utf-8")
    stub_clip_files(folder)
    return num_bytes


def write_t5(folder: Path, dims: T5Dims) -> int:
    """t5.safetensors and the stub tokenizer; bytes of the file. FileError on a full disk."""
    num_bytes = write_random(folder / "t5.safetensors", t5_entries(dims))
    (folder / "t5.tokenizer.json").write_text(stub_t5_tokenizer(PROMPT), encoding="utf-8")
    return num_bytes


# ---------------------------------------------------------------------------------------------
# loading and encoding


def measure(folder: Path) -> dict[str, Any]:
    """Load the encoders that lie in a folder with the layers of the large one left in the file; encode one prompt."""
    started = time.perf_counter()
    import torch

    from ..vidgen_core.families.cogvideox.text import T5Text
    from ..vidgen_core.families.hunyuan.text import TextStack
    from ..vidgen_core.model import load_text

    seconds = {"import": time.perf_counter() - started}
    started = time.perf_counter()
    stack = load_text(*sorted(folder.glob("*.safetensors")), stream=True)
    seconds["load"] = time.perf_counter() - started
    peak_after_load = peak_bytes()
    assert isinstance(stack, TextStack | T5Text)
    if isinstance(stack, TextStack):
        layers = stack.config.llama.num_layers - stack.config.llama.skip_layers
        family, num_tokens = "hunyuan", int(stack.tokenize([PROMPT]).mask.sum())
    else:
        family, layers, num_tokens = "cogvideox", stack.config.t5.num_layers, stack.config.max_length
    started = time.perf_counter()
    features = stack.encode([PROMPT])
    seconds["encode"] = time.perf_counter() - started
    real = features.context[features.context_mask]
    return {
        "family": family,
        **cost(seconds, peak_after_load, BAR_BYTES[family]),
        "layers": layers,
        "tokens": num_tokens,
        "tokenizers": "stubs: one id per word of the template and the prompt, not the real vocabularies",
        "output": {
            "context": list(features.context.shape),
            "pooled": list(features.pooled.shape),
            "finite": bool(features.context.isfinite().all() and features.pooled.isfinite().all()),
            "deviation": round(float(real.std()), 6),
        },
        "dtype": str(features.context.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run(family: str, folder: Path | None) -> dict[str, Any]:
    """Write, load, encode, delete; the whole report."""
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(prefix="vidgen-full-size-text-", dir=folder) as name:
        started, place = time.perf_counter(), Path(name)
        num_bytes = (
            write_t5(place, T5Dims()) if family == "cogvideox" else write_encoders(place, LlamaDims(), ClipDims())
        )
        report["checkpoint"] = {"bytes": num_bytes, "write_s": round(time.perf_counter() - started, 2)}
        return report | measure_fresh(__spec__.name, f"--once={place}")


def main(argv: list[str] | None = None) -> None:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m vidgen.benchmarks.full_size_text", description=description)
    parser.add_argument("--family", choices=tuple(BAR_BYTES), default="hunyuan")
    parser.add_argument("--folder", type=Path, help="where the files are written; the system's temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.once is not None:
        print(json.dumps(measure(arguments.once)))
        return
    tell(lambda: run(arguments.family, arguments.folder), arguments.json)


if __name__ == "__main__":
    main()
