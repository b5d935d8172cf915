"""Text encoders from separate files, with tokenizers from every place: tiny real files in temporary folders.

The files have the published names, layouts and vocabularies' sizes; only widths and depths are small.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.benchmarks.full_size_text import stub_clip_files, stub_llama_tokenizer
from vidgen.training.export import export_text
from vidgen.vidgen_core import model
from vidgen.vidgen_core.errors import CheckpointError, UserError
from vidgen.vidgen_core.families.hunyuan.config import ClipDims, LlamaDims, TextConfig, VisionDims
from vidgen.vidgen_core.families.hunyuan.text import TextStack
from vidgen.vidgen_core.model import load_text
from vidgen.vidgen_core.text.tokenizer import Tokenizer
from vidgen.vidgen_core.text.tokenizer_files import TokenizerPlaces, clip_tokenizer
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.save import save_tensors

PROMPT = "a red circle"
LLAMA = LlamaDims(hidden_size=128, num_layers=3, num_heads=1, num_kv_heads=1, intermediate_size=64)
CLIP = ClipDims(hidden_size=64, num_layers=2, num_heads=1, intermediate_size=32)
VISION = VisionDims(image_size=28, hidden_size=64, num_layers=2, num_heads=1, intermediate_size=32, out_size=128)
CONFIG = TextConfig(llama=LLAMA, clip=CLIP, vision=VISION)

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> TextStack:
    """What the files below hold, in float32 with values of float16."""
    folder = tmp_path_factory.mktemp("clip")
    stub_clip_files(folder)
    clip = clip_tokenizer(folder / "vocab.json", folder / "merges.txt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TextStack(CONFIG, Tokenizer.from_json(stub_llama_tokenizer(PROMPT)), clip)
    for parameter in made.parameters():
        parameter.data = parameter.data.half().float()
    return made.requires_grad_(False)


def part(stack: TextStack, name: str) -> State:
    """The published names of one encoder, without a prefix."""
    state = {key.removeprefix(f"{name}."): t.half() for key, t in stack.state_dict().items() if key.startswith(name)}
    unit = torch.ones(1, dtype=torch.half)
    if name == "llama":  # the two layers, the norm and the head that are not needed; wrong on purpose
        one = {key: tensor for key, tensor in state.items() if key.startswith("layers.0.")}
        state |= {key.replace(".0.", f".{n}."): t + 9 for n in (1, 2) for key, t in one.items()}
        state |= {"norm.weight": unit}
    if name == "vision":
        one = {key: tensor for key, tensor in state.items() if ".layers.0." in key}
        state |= {key.replace(".layers.0.", ".layers.1."): tensor + 9 for key, tensor in one.items()}
        state |= {f"vision_model.post_layernorm.{leaf}": unit for leaf in ("weight", "bias")}
    return state


def named(state: State, path: str) -> State:
    return {f"{path}{name}": tensor for name, tensor in state.items()}


def llava(stack: TextStack) -> State:
    eyes = part(stack, "vision")
    return (
        named(part(stack, "llama"), "language_model.model.")
        | {"language_model.lm_head.weight": torch.ones(1, dtype=torch.half)}
        | {f"vision_tower.{name}" if "vision_model" in name else name: tensor for name, tensor in eyes.items()}
    )


@pytest.fixture(scope="module")
def files(stack: TextStack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    head = {"lm_head.weight": torch.ones(1, dtype=torch.half)}
    contents = {
        "llama": named(part(stack, "llama"), "model.") | head,
        "llama_bare": part(stack, "llama"),
        "llava": llava(stack),
        "clip": part(stack, "clip"),
        "vision": part(stack, "vision"),
    }
    paths = {name: folder / f"{name}.safetensors" for name in contents}
    for name, state in contents.items():
        save_tensors(paths[name], state)
    return paths


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A folder as a user may name it: llama/ and clip/."""
    folder = tmp_path / "tokenizers"
    (folder / "llama").mkdir(parents=True)
    (folder / "clip").mkdir()
    (folder / "llama" / "tokenizer.json").write_text(stub_llama_tokenizer(PROMPT), encoding="utf-8")
    stub_clip_files(folder / "clip")
    return folder


def places(folder: Path) -> TokenizerPlaces:
    return TokenizerPlaces(named=folder)


def assert_same(found: Any, stack: TextStack, *, image: bool = False) -> None:
    one, other = found.encode([PROMPT]), stack.encode([PROMPT])
    assert torch.equal(one.context, other.context)
    assert torch.equal(one.pooled, other.pooled)
    assert one.context.shape == (1, 256, 128)
    if image:
        picture = torch.rand(1, 30, 40, 3)
        one, other = (s.encode_with_image([PROMPT], picture, interleave=2) for s in (found, stack))
        assert torch.equal(one.context, other.context)


def test_the_image_encoder_is_read_when_a_picture_comes(
    files: dict[str, Path], tokens: Path, stack: TextStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text to video with a whole LLaVA must not hold 0.6 GB that nobody looks through."""
    read: list[str] = []
    build = model.build_part
    monkeypatch.setattr(
        model, "build_part", lambda header, item, **how: read.append(item.part) or build(header, item, **how)
    )
    found = load_text(files["llava"], files["clip"], tokenizers=places(tokens))
    assert isinstance(found, TextStack)
    assert found.sees_images
    assert_same(found, stack)
    assert read == ["llama", "clip"]
    assert not [name for name in found.state_dict() if name.startswith("vision.")]
    with pytest.raises(UserError, match="alpha"):  # what can be refused is refused before
        found.encode_with_image([PROMPT], torch.rand(1, 30, 40, 4), interleave=2)
    assert read == ["llama", "clip"]
    with torch.inference_mode():
        found.encode_with_image([PROMPT], torch.rand(1, 30, 40, 3), interleave=2)
    assert read == ["llama", "clip", "vision"]
    assert_same(found, stack, image=True)
    assert read == ["llama", "clip", "vision"]
    assert not any(parameter.is_inference() or parameter.requires_grad for parameter in found.parameters())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("llama", "clip"), ("clip", "llama"), ("llama_bare", "clip")])
def test_llama_and_clip_from_two_files(
    names: tuple[str, ...], files: dict[str, Path], tokens: Path, stack: TextStack
) -> None:
    found = load_text(*(files[name] for name in names), tokenizers=places(tokens))
    assert found.config == dataclasses.replace(CONFIG, vision=None)
    assert_same(found, stack)


@pytest.mark.parametrize("names", [("llama", "clip", "vision"), ("llava", "clip"), ("vision", "clip", "llava")])
def test_with_the_image_encoder(names: tuple[str, ...], files: dict[str, Path], tokens: Path, stack: TextStack) -> None:
    found = load_text(*(files[name] for name in names), tokenizers=places(tokens))
    assert found.config == CONFIG
    assert_same(found, stack, image=True)


@pytest.mark.parametrize("stream", [False, True])
def test_all_encoders_in_one_file_of_ours(stream: bool, tmp_path: Path, stack: TextStack) -> None:
    """With their tokenizers and the image encoder; also where LLaMA's layers stay in the file."""
    path = tmp_path / "text.safetensors"
    export_text(path, stack)
    found = load_text(path, stream=stream)
    assert found.config == CONFIG
    assert_same(found, stack, image=True)
    assert all(tensor.is_meta == stream for tensor in found.llama.layers.state_dict().values())


def test_the_fingerprint_is_that_of_the_files(files: dict[str, Path], tokens: Path) -> None:
    found = load_text(files["llama"], files["clip"], tokenizers=places(tokens))
    assert found.fingerprint == "+".join(read_header(files[name]).digest for name in ("llama", "clip"))


# --- tokenizers -------------------------------------------------------------------------------------------------------


def beside(models: Path, tokens: Path) -> TokenizerPlaces:
    """A file named after the weights."""
    shutil.copy(tokens / "llama" / "tokenizer.json", models / "llama.tokenizer.json")
    (models / "clip.tokenizer.json").write_text(
        clip_tokenizer(tokens / "clip" / "vocab.json", tokens / "clip" / "merges.txt").to_json(), encoding="utf-8"
    )
    return TokenizerPlaces()


def same_folder(models: Path, tokens: Path) -> TokenizerPlaces:
    """Both in one folder: each encoder takes the one that is its own."""
    shutil.copy(tokens / "llama" / "tokenizer.json", models / "tokenizer.json")
    stub_clip_files(models)
    return TokenizerPlaces()


def sub_folders(models: Path, tokens: Path) -> TokenizerPlaces:
    shutil.copytree(tokens / "llama", models / "llama")
    shutil.copytree(tokens / "clip", models / "clip")
    return TokenizerPlaces()


def as_diffusers(models: Path, tokens: Path) -> TokenizerPlaces:
    shutil.copytree(tokens / "llama", models.parent / "tokenizer")
    shutil.copytree(tokens / "clip", models.parent / "tokenizer_2")
    return TokenizerPlaces()


def shared(models: Path, tokens: Path) -> TokenizerPlaces:
    return TokenizerPlaces(shared=[models.parent / "nothing", tokens])


@pytest.mark.parametrize("lay_out", [beside, same_folder, sub_folders, as_diffusers, shared])
def test_tokenizers_are_found_where_people_have_them(
    lay_out: Callable[[Path, Path], TokenizerPlaces],
    files: dict[str, Path],
    tokens: Path,
    tmp_path: Path,
    stack: TextStack,
) -> None:
    models = tmp_path / "repository" / "text_encoder"
    models.mkdir(parents=True)
    for name in ("llama", "clip"):
        (models / f"{name}.safetensors").symlink_to(files[name])
    where = lay_out(models, tokens)
    assert_same(load_text(models / "llama.safetensors", models / "clip.safetensors", tokenizers=where), stack)


def test_a_tokenizer_inside_the_file(files: dict[str, Path], tokens: Path, tmp_path: Path, stack: TextStack) -> None:
    """As a tensor of bytes, which ComfyUI's text encoders may have."""
    text = stub_llama_tokenizer(PROMPT).encode()
    blob = {"tokenizer": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    save_tensors(tmp_path / "llama.safetensors", part(stack, "llama") | blob)
    where = TokenizerPlaces(shared=[tmp_path])
    shutil.copytree(tokens / "clip", tmp_path / "clip")
    assert_same(load_text(tmp_path / "llama.safetensors", files["clip"], tokenizers=where), stack)


def test_clips_two_files_are_its_tokenizer(tmp_path: Path) -> None:
    """Against transformers' own class with the same files."""
    from transformers import CLIPTokenizer

    stub_clip_files(tmp_path)
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    pairs = [tuple(line.split()) for line in merges.read_text().splitlines()[1:]]
    theirs = CLIPTokenizer(vocab=json.loads(vocabulary.read_text()), merges=pairs)
    ours = clip_tokenizer(vocabulary, merges)
    texts = ["", "the red circle", "THE Red's 42 <|endoftext|> x", "  a\n\tb  ", "don't!! stop...", "caf\u00e9 \u4e2d"]
    assert ours.encode(texts) == [theirs(text)["input_ids"] for text in texts]


def test_the_published_templates_are_cut_where_they_should_be(tmp_path: Path) -> None:
    """Every word of the templates is one token of LLaMA-3: its cuts alone give the published numbers."""
    config = TextConfig(vision=VisionDims())
    stub_clip_files(tmp_path)
    clip = clip_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    with torch.device("meta"):
        stack = TextStack(config, Tokenizer.from_json(stub_llama_tokenizer(PROMPT)), clip)
    for image_mode, with_image, crop, total in (
        (False, False, 95, 351),
        (True, False, 36, 292),
        (False, True, 103, 359),
    ):
        template = stack.template(image_mode=image_mode, with_image=with_image)
        marked = stack._marked(stack.tokenizer, template.text.split("{}")[0])
        assert len(marked) == template.crop_start == crop
        tokens = stack.tokenize([PROMPT], image_mode=image_mode, with_image=with_image)
        assert tokens.ids.shape == (1, total)
        row = tokens.ids[0].tolist()
        assert row.count(128000) == 1
        assert row[0] == 128000
        assert row.count(128257) == int(with_image)
        if with_image:
            assert row.index(128257) == 5
            assert [index for index, token in enumerate(row) if token == 271][-1] == int(tokens.last[0])
            assert row.count(271) == 4


# --- what is refused --------------------------------------------------------------------------------------------------


def empty_tokenizers(folder: Path) -> TokenizerPlaces:
    folder.mkdir(exist_ok=True)
    return TokenizerPlaces(named=folder)


def refused(words: list[str], *paths: Path, tokenizers: TokenizerPlaces | None = None) -> UserError:
    """What load_text says; every part of the message is there, and no weights were read."""
    with pytest.raises(UserError) as problem:
        load_text(*paths, tokenizers=tokenizers)
    for word in words:
        assert word in str(problem.value), problem.value
    assert problem.value.given
    assert problem.value.expected
    assert problem.value.do
    return problem.value


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("vidgen.vidgen_core.model.load_module", refuse)


@pytest.mark.usefixtures("no_reading")
def test_without_a_tokenizer(files: dict[str, Path], tmp_path: Path) -> None:
    words = ["tokenizer of LLaMA", "tokenizer.json", "llama.tokenizer.json", str(tmp_path / "models" / "llama")]
    refused(words, files["llama"], files["clip"], tokenizers=TokenizerPlaces(shared=[tmp_path / "models"]))


@pytest.mark.usefixtures("no_reading")
def test_without_clips_tokenizer(files: dict[str, Path], tokens: Path) -> None:
    shutil.rmtree(tokens / "clip")
    refused(["tokenizer of CLIP", "vocab.json", "merges.txt"], files["llama"], files["clip"], tokenizers=places(tokens))


@pytest.mark.usefixtures("no_reading")
def test_with_the_tokenizer_of_an_older_llama(files: dict[str, Path], tmp_path: Path) -> None:
    """A sentencepiece model is LLaMA 1's and 2's."""
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    words = ["tokenizer.model", "not enough", "not sentencepiece"]
    refused(words, files["llama"], files["clip"], tokenizers=places(tmp_path))


@pytest.mark.usefixtures("no_reading")
def test_with_a_tokenizer_of_another_vocabulary(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(Tokenizer.from_words(["a", "b"]).to_json(), encoding="utf-8")
    words = ["tokenizer of LLaMA", "passed over", "another vocabulary", "not 95"]
    refused(words, files["llama"], files["clip"], tokenizers=places(tmp_path))


@pytest.mark.usefixtures("no_reading")
def test_with_a_tokenizer_too_large_for_clip(files: dict[str, Path], tokens: Path) -> None:
    shutil.rmtree(tokens / "clip")
    shutil.copytree(tokens / "llama", tokens / "clip")
    words = ["tokenizer of CLIP", "passed over", "entries for 49408 rows"]
    refused(words, files["llama"], files["clip"], tokenizers=places(tokens))


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "Magic"}}', '{"model": 3}', "\udcff"])
def test_with_a_damaged_tokenizer(text: str, files: dict[str, Path], tokens: Path) -> None:
    (tokens / "llama" / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(["cannot be read"], files["llama"], files["clip"], tokenizers=places(tokens))


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("vocab.json", '{"a": 1}'),
        ("merges.txt", "#version\na b c\n"),
        ("merges.txt", "q zz\n"),
    ],
)
def test_with_damaged_files_of_clip(name: str, content: str, files: dict[str, Path], tokens: Path) -> None:
    (tokens / "clip" / name).write_text(content)
    refused(["tokenizer of CLIP", "cannot be read"], files["llama"], files["clip"], tokenizers=places(tokens))


@pytest.mark.usefixtures("no_reading")
def test_in_a_folder_that_does_not_exist(files: dict[str, Path], tmp_path: Path) -> None:
    refused(["does not exist"], files["llama"], files["clip"], tokenizers=places(tmp_path / "nowhere"))


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("vision",), ["lack LLaMA", "CLIP", "image encoder"]),
        (("vision", "clip"), ["lack LLaMA"]),
        (("llama",), ["lack CLIP"]),
        (("llava",), ["lack CLIP"]),
        (("llama", "llama_bare", "clip"), ["two files", "LLaMA", "llama.safetensors", "llama_bare.safetensors"]),
    ],
)
def test_encoders_that_are_missing_or_twice(
    names: tuple[str, ...], words: list[str], files: dict[str, Path], tokens: Path
) -> None:
    refused(words, *(files[name] for name in names), tokenizers=places(tokens))


STRANGERS = {
    "a T5": ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, ["a T5 text encoder"]),
    "an image encoder": (
        {"vision_model.embeddings.patch_embedding.weight": (8, 3, 2, 2)},
        ["without LLaVA's projector"],
    ),
    "a Qwen": (
        {"model.layers.0.self_attn.q_proj.bias": (8,), "model.embed_tokens.weight": (8, 8)},
        ["another language model"],
    ),
    "a picture model": ({"conv_in.weight": (8, 3, 3, 3)}, ["not of a family"]),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_encoders_of_other_models(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    shapes, words = STRANGERS[name]
    path = tmp_path / "encoder.safetensors"
    save_tensors(path, {key: torch.zeros(shape) for key, shape in shapes.items()})
    refused([*words, "encoder.safetensors"], path, files["clip"])


def test_a_network_or_a_second_whole_in_place_of_an_encoder(
    tiny_bundle_dir: Path, files: dict[str, Path], tokens: Path
) -> None:
    refused(["diffusion network"], tiny_bundle_dir / "network.safetensors", files["clip"])
    words = ["given twice", "CLIP"]
    refused(words, tiny_bundle_dir / "text.safetensors", files["clip"], tokenizers=places(tokens))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {n: t[:32000] if "embed_tokens" in n else t for n, t in s.items()}, ["not HunyuanVideo's", "32000"]),
        (lambda s: s | {"layers.0.self_attn.q_proj.magic": torch.ones(1)}, ["magic"]),
        (lambda s: s | {"layers.0.magic.weight": torch.ones(1)}, ["not of a family"]),
    ],
    ids=["another vocabulary", "a number too many", "a module too many"],
)
def test_a_llama_that_is_not_quite(
    change: Callable[[State], State], words: list[str], stack: TextStack, files: dict[str, Path], tokens: Path
) -> None:
    path = tokens / "llama.safetensors"
    save_tensors(path, change(part(stack, "llama")))
    refused(words, path, files["clip"], tokenizers=places(tokens))


def test_a_llama_without_a_weight(stack: TextStack, files: dict[str, Path], tokens: Path) -> None:
    path = tokens / "llama.safetensors"
    save_tensors(path, {name: t for name, t in part(stack, "llama").items() if "mlp.up_proj" not in name})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 10 .* llama\.layers\.0\.mlp\.up_proj\.weight"):
        load_text(path, files["clip"], tokenizers=places(tokens))


def test_eyes_of_another_width(stack: TextStack, files: dict[str, Path], tokens: Path) -> None:
    eyes = {
        n: t[:64, :64] if "linear_2.weight" in n else t[:64] if "linear" in n else t
        for n, t in part(stack, "vision").items()
    }
    path = tokens / "vision.safetensors"
    save_tensors(path, eyes)
    words = ["does not belong to this LLaMA", "64", "128"]
    refused(words, files["llama"], files["clip"], path, tokenizers=places(tokens))
