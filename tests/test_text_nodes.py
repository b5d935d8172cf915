"""The nodes of the text encoders: several files, tokenizers of the host, pictures and own templates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.nodes import host as hosts
from vidgen.nodes.loaders import LoadTextEncoders
from vidgen.nodes.text import EncodePrompt
from vidgen.vidgen_core.bundle import load_bundle
from vidgen.vidgen_core.errors import CheckpointError, FileError, SettingsError

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_encoders: Callable[[Path], None]) -> Path:
    """ComfyUI's ``models`` with published-like files and tokenizers in the shared places."""
    root = tmp_path_factory.mktemp("models")
    write_encoders(root)
    return root


@pytest.fixture
def here(models: Path, tmp_path: Path) -> Any:
    with hosts.using(hosts.LocalNodeHost(folders=[models], output_folder=tmp_path)) as host:
        yield host


@pytest.fixture(scope="module")
def encoders(models: Path) -> Any:
    with hosts.using(hosts.LocalNodeHost(folders=[models])):
        return LoadTextEncoders().load(
            "llava_llama3_fp8_scaled.safetensors", "auto", "clip_l.safetensors", "llava_llama3_vision.safetensors"
        )[0]


def test_files_of_all_folders_are_listed(here: Any) -> None:
    lists = {name: spec[0] for name, spec in LoadTextEncoders.INPUT_TYPES()["optional"].items()}
    assert lists["second_name"][0] == lists["vision_name"][0] == "none"
    assert {"llava_llama3_fp8_scaled.safetensors", "clip_l.safetensors"} <= set(lists["second_name"])
    assert "llava_llama3_vision.safetensors" in lists["vision_name"]


def test_encoders_of_three_files_encode(encoders: Any) -> None:
    (text,) = EncodePrompt().encode(encoders, PROMPT, "video")
    (seen,) = EncodePrompt().encode(encoders, PROMPT, "video", image=torch.rand(2, 30, 40, 3))
    (image,) = EncodePrompt().encode(encoders, PROMPT, "image", image_interleave=2, image=torch.rand(1, 30, 40, 3))
    assert [c.template for c in (text, seen, image)] == ["video", "i2v video", "i2v image"]
    assert text.features.context.shape == (1, 256, 128)
    assert seen.features.context.shape == (1, 4 // 4 + 252, 128)
    assert image.features.context.shape == (1, 4 // 2 + 252, 128)
    assert text.fingerprint == encoders.fingerprint
    assert encoders.fingerprint.count("+") == 2


def test_an_own_template(encoders: Any) -> None:
    (own,) = EncodePrompt().encode(encoders, PROMPT, "video", "red {}")
    (usual,) = EncodePrompt().encode(encoders, PROMPT, "video")
    (blank,) = EncodePrompt().encode(encoders, PROMPT, "video", " \n ")
    assert own.template == "custom"
    assert not torch.equal(own.features.context, usual.features.context)
    assert torch.equal(blank.features.context, usual.features.context)
    with pytest.raises(SettingsError, match="no place in the template"):
        EncodePrompt().encode(encoders, PROMPT, "video", "red")


def test_a_picture_needs_eyes(here: Any) -> None:
    (blind,) = LoadTextEncoders().load("clip_l.safetensors", "auto", "llava_llama3_fp8_scaled.safetensors")
    with pytest.raises(CheckpointError, match="cannot see pictures"):
        EncodePrompt().encode(blind, PROMPT, "video", image=torch.rand(1, 8, 8, 3))


def test_the_eyes_are_not_text_encoders(here: Any) -> None:
    with pytest.raises(CheckpointError, match="lack LLaMA"):
        LoadTextEncoders().load(
            str(here.folders[0] / "clip_vision" / "llava_llama3_vision.safetensors"), "auto", "clip_l.safetensors"
        )


def test_a_folder_of_tokenizers_is_named(here: Any, models: Path, tmp_path: Path) -> None:
    names = ("llava_llama3_fp8_scaled.safetensors", "auto", "clip_l.safetensors", "none")
    assert LoadTextEncoders().load(*names, str(models / "text_encoders"))[0].tokenizer is not None
    (models / "text_encoders" / "mine").mkdir()
    shutil.copytree(models / "text_encoders" / "llama", models / "text_encoders" / "mine" / "llama")
    shutil.copytree(models / "text_encoders" / "clip", models / "text_encoders" / "mine" / "clip")
    assert LoadTextEncoders().load(*names, "mine")[0].tokenizer is not None
    with pytest.raises(FileError, match="no such folder of tokenizers"):
        LoadTextEncoders().load(*names, "nowhere")
    assert "nowhere" in LoadTextEncoders.VALIDATE_INPUTS("clip_l.safetensors", tokenizer_folder="nowhere")
    assert "gone.safetensors" in LoadTextEncoders.VALIDATE_INPUTS("clip_l.safetensors", "gone.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer of LLaMA was not found"):
        LoadTextEncoders().load(*names, str(tmp_path))


def test_an_old_workflow_loads(tiny_bundle_dir: Path) -> None:
    """Two widgets, as before there were more."""
    (text,) = LoadTextEncoders().load(str(tiny_bundle_dir / "text.safetensors"), "auto")
    assert EncodePrompt().encode(text, PROMPT, "video")[0].features.context.shape[-1] == 32


# --- a folder with all parts ------------------------------------------------------------------------------------------


def network_and_vae(folder: Path) -> None:
    """A tiny network that reads these encoders, and its VAE."""
    from vidgen.training.export import export_codec, export_network
    from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
    from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
    from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
    from vidgen.vidgen_core.types import Defaults

    config = NetworkConfig(
        hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1,
        rope_axes=(4, 6, 6), text_width=128, pooled_width=64, guidance_embed=False,
    )  # fmt: skip
    codec = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
    (folder / "transformer").mkdir(parents=True)
    (folder / "vae").mkdir()
    export_network(folder / "transformer" / "model.safetensors", HunyuanVideoTransformer(config), config, Defaults())
    export_codec(folder / "vae" / "model.safetensors", CausalVAE(codec), codec)


def test_a_folder_as_diffusers_lays_it_out(models: Path, tmp_path: Path) -> None:
    """LLaMA and CLIP in text_encoder and text_encoder_2, their tokenizers in tokenizer and tokenizer_2."""
    network_and_vae(tmp_path)
    for source, place in (("text_encoders/llava_llama3_fp8_scaled", "text_encoder"), ("clip/clip_l", "text_encoder_2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").symlink_to(models / f"{source}.safetensors")
    with pytest.raises(CheckpointError, match="tokenizer of LLaMA was not found"):
        load_bundle(tmp_path)
    (tmp_path / "tokenizer").symlink_to(models / "text_encoders" / "llama")
    (tmp_path / "tokenizer_2").symlink_to(models / "text_encoders" / "clip")
    bundle = load_bundle(tmp_path)
    assert set(bundle.headers) == {"network", "codec", "llama", "clip"}
    cond = bundle.model.conditioning(bundle.text.encode([PROMPT]))
    out = bundle.model.predict(torch.randn(1, 16, 1, 4, 4), torch.tensor(0.5), cond)
    assert out.isfinite().all()
    assert bundle.info()["llama"]["title"] == "HunyuanVideo LLaMA text encoder"


def test_a_folder_without_clip(models: Path, tmp_path: Path) -> None:
    network_and_vae(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "model.safetensors").symlink_to(
        models / "text_encoders" / "llava_llama3_fp8_scaled.safetensors"
    )
    with pytest.raises(CheckpointError, match="lack CLIP"):
        load_bundle(tmp_path)
