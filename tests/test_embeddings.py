"""Encoded prompts in a file: the same bits come back, and what cannot be one is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.nodes import host as hosts
from vidgen.nodes.embeddings import LoadEmbeddings, SaveEmbeddings
from vidgen.nodes.loaders import LoadAll
from vidgen.nodes.sampling import EmptyLatent, Sampler
from vidgen.nodes.text import EncodePrompt
from vidgen.vidgen_core.embeddings import Embeddings, load_embeddings, save_embeddings
from vidgen.vidgen_core.errors import CheckpointError, FileError, SettingsError, UserError
from vidgen.vidgen_core.families.hunyuan.config import ClipDims, LlamaDims, TextConfig
from vidgen.vidgen_core.text.features import TextFeatures
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.save import save_tensors

PROMPT = "a red star"
SETTINGS = {
    "seed": 3, "steps": 2, "cfg": 1.0, "guidance": 0.0, "shift": 2.0, "sampler": "euler", "schedule": "auto",
    "denoise": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tiny_bundle_dir: Path) -> tuple[Any, Any, Any]:
    return LoadAll().load(str(tiny_bundle_dir), "auto")


@pytest.fixture
def here(tmp_path: Path) -> Any:
    host = hosts.LocalNodeHost(folders=[tmp_path / "models"], output_folder=tmp_path / "output")
    with hosts.using(host):
        yield host


def encoded(parts: tuple[Any, Any, Any], prompt: str = PROMPT) -> Any:
    return EncodePrompt().encode(parts[2], prompt, "video")[0]


def small(dtype: torch.dtype = torch.float32) -> Embeddings:
    config = TextConfig(llama=LlamaDims(hidden_size=8), clip=ClipDims(hidden_size=6))
    features = TextFeatures(
        context=torch.randn(1, 5, 8).to(dtype),
        context_mask=torch.tensor([[True, True, True, False, False]]),
        pooled=torch.randn(1, 6).to(dtype),
    )
    return Embeddings(
        features=features, text_config=config, prompt='a "red" \u2605', template="video", fingerprint="0a+1b"
    )


EXAMPLES = hosts.example_names({".safetensors"})


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bits_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    given = small(dtype)
    save_embeddings(tmp_path / "a.safetensors", given)
    found = load_embeddings(tmp_path / "a.safetensors")
    for name in ("context", "context_mask", "pooled"):
        one, other = getattr(given.features, name), getattr(found.features, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert replace(found, features=given.features) == given
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_metadata_say_what_it_is(tmp_path: Path) -> None:
    save_embeddings(tmp_path / "a.safetensors", small())
    metadata = read_header(tmp_path / "a.safetensors").metadata
    assert {key: metadata[f"vidgen.{key}"] for key in ("family", "part", "template", "fingerprint")} == {
        "family": "hunyuan", "part": "embeddings", "template": "video", "fingerprint": "0a+1b"
    }  # fmt: skip
    assert json.loads(metadata["vidgen.config"])["llama"]["hidden_size"] == 8


def test_the_nodes_give_the_sampler_the_same_video(
    parts: tuple[Any, Any, Any], here: Any, tiny_bundle_dir: Path
) -> None:
    given = encoded(parts)
    shown = SaveEmbeddings().save(given, "embeddings/star")["ui"]["text"]
    assert shown == ("embeddings/star_00001.safetensors",)
    name = "embeddings/star_00001.safetensors [output]"
    assert LoadEmbeddings.INPUT_TYPES()["required"]["embeddings_name"][0] == [name, *EXAMPLES]
    assert LoadEmbeddings.VALIDATE_INPUTS(name) is True
    found, prompt = LoadEmbeddings().load(name)
    assert prompt == PROMPT
    assert found.fingerprint == parts[2].fingerprint == read_header(tiny_bundle_dir / "text.safetensors").digest
    latent = EmptyLatent().make(parts[1], 32, 32, 5, 1)[0]
    (one,), (other,) = (Sampler().sample(parts[0], cond, latent, **SETTINGS) for cond in (given, found))
    assert torch.equal(one["samples"], other["samples"])
    assert SaveEmbeddings().save(given, "embeddings/star")["ui"]["text"] == ("embeddings/star_00002.safetensors",)


def test_files_are_listed_by_what_they_are(here: Any, tmp_path: Path) -> None:
    kept = tmp_path / "models" / "embeddings" / "vidgen" / "mine"
    kept.mkdir(parents=True)
    (tmp_path / "output").mkdir()
    save_embeddings(kept / "b.safetensors", small())
    save_embeddings(tmp_path / "output" / "a.safetensors", small())
    save_tensors(tmp_path / "output" / "latent.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "output" / "broken.safetensors").write_bytes(b"\0" * 40)
    assert list(here.embeddings()) == ["mine/b.safetensors", "a.safetensors [output]", *EXAMPLES]
    assert LoadEmbeddings().load("mine/b.safetensors")[1] == small().prompt


def test_an_example_gives_way_to_a_file_of_the_user(here: Any, tmp_path: Path) -> None:
    name = EXAMPLES[0]
    assert here.find_embeddings(name) == hosts.EXAMPLES / name
    assert load_embeddings(here.find_embeddings(name)).features.context.shape[-1] == 128
    kept = tmp_path / "models" / "embeddings" / "vidgen"
    kept.mkdir(parents=True)
    save_embeddings(kept / name, small())
    assert here.find_embeddings(name) == kept / name
    assert list(here.embeddings()) == [name, *EXAMPLES[1:]]


def test_a_replaced_file_is_read_again(here: Any, tmp_path: Path) -> None:
    path = tmp_path / "output" / "a.safetensors"
    path.parent.mkdir()
    save_embeddings(path, small())
    before = LoadEmbeddings.IS_CHANGED("a.safetensors [output]")
    os.utime(path, (before + 10, before + 10))
    assert LoadEmbeddings.IS_CHANGED("a.safetensors [output]") != before


# --- what is refused --------------------------------------------------------------------------------------------------


def change(path: Path, **tensors: torch.Tensor) -> Path:
    """The small file with other tensors and its own metadata."""
    save_embeddings(path, small())
    metadata = read_header(path).metadata
    features = small().features
    whole = {"context": features.context, "context_mask": features.context_mask, "pooled": features.pooled}
    save_tensors(path, whole | tensors, metadata)
    return path


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"context": torch.zeros(1, 5, 9)}, "9 and 6 wide"),
        ({"pooled": torch.zeros(1, 7)}, "8 and 7 wide"),
        ({"context": torch.zeros(5, 8)}, "3 dimensions"),
        ({"context": torch.zeros(1, 4, 8)}, "same prompts"),
        ({"pooled": torch.zeros(2, 6)}, "same prompts"),
        ({"context": torch.zeros(1, 0, 8), "context_mask": torch.zeros(1, 0, dtype=torch.bool)}, "none of them empty"),
        ({"context_mask": torch.ones(1, 5)}, "bool mask"),
        ({"context": torch.zeros(1, 5, 8, dtype=torch.int64)}, "floating states"),
        ({"context": torch.full((1, 5, 8), float("nan"))}, "not finite"),
        ({"more": torch.zeros(1)}, "no encoded prompts"),
    ],
)
def test_files_that_are_damaged(tensors: dict[str, torch.Tensor], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as problem:
        load_embeddings(change(tmp_path / "a.safetensors", **tensors))
    assert problem.value.given
    assert problem.value.expected
    assert problem.value.do


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_embeddings(path, small())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="cut short") as problem:
        load_embeddings(path)
    assert problem.value.do


def test_other_files_in_their_place(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no encoded prompts"):
        load_embeddings(tiny_bundle_dir / "text.safetensors")
    with pytest.raises(FileError):
        load_embeddings(tmp_path / "missing.safetensors")


def test_a_network_of_another_width(parts: tuple[Any, Any, Any], here: Any) -> None:
    given = small()
    path, _ = here.embeddings_path("a")
    save_embeddings(path, given)
    found, _ = LoadEmbeddings().load(str(path))
    latent = EmptyLatent().make(parts[1], 32, 32, 5, 1)[0]
    with pytest.raises(CheckpointError, match="8 and 6 wide, where the network reads 32 and 32"):
        Sampler().sample(parts[0], found, latent, **SETTINGS)


def test_what_our_encoders_did_not_make_is_not_saved(parts: tuple[Any, Any, Any], here: Any) -> None:
    with pytest.raises(SettingsError, match="cannot be saved"):
        SaveEmbeddings().save(replace(encoded(parts), text_config=None), "a")


@pytest.mark.parametrize("prefix", ["../a", "b/../../a", "/tmp/a", "..\\a"])
def test_nothing_is_written_outside_of_the_output_folder(
    prefix: str, parts: tuple[Any, Any, Any], here: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="outside of the output folder"):
        SaveEmbeddings().save(encoded(parts), prefix)
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize("name", ["", "..", "../a.safetensors", "m/../../a.safetensors", "/a.safetensors", "none"])
def test_nothing_is_read_outside_of_the_folders(name: str, here: Any, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    save_embeddings(tmp_path / "a.safetensors", small())
    assert "no such encoded prompts" in LoadEmbeddings.VALIDATE_INPUTS(name)
    with pytest.raises(FileError):
        LoadEmbeddings().load(name)


@pytest.mark.parametrize("name", ["..", "../tokens", "llama/../..", "/", "missing"])
def test_tokenizers_are_not_taken_from_outside(name: str, tmp_path: Path) -> None:
    """As ComfyUI's host looks for them: below the folders of text encoders only."""
    (tmp_path / "tokens").mkdir()
    roots = [tmp_path / "text_encoders"]
    (roots[0] / "llama").mkdir(parents=True)
    assert hosts.known_subfolder(roots, "llama") == roots[0] / "llama"
    with pytest.raises(FileError, match="no such folder of tokenizers"):
        hosts.known_subfolder(roots, name)
