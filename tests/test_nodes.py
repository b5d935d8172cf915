"""The nodes as plain functions, the house rules for all of them, and ComfyUI's side of the host."""

from __future__ import annotations

import inspect
import io
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vidgen
from vidgen.headless.graph import widget_names
from vidgen.nodes import host as hosts
from vidgen.nodes.embeddings import LoadEmbeddings, SaveEmbeddings
from vidgen.nodes.loaders import LoadAll, LoadModel, LoadTextEncoders, LoadVAE
from vidgen.nodes.sampling import EmptyLatent, Sampler
from vidgen.nodes.text import EncodePrompt
from vidgen.nodes.video import Decode, DecodeSave, EncodeVideo, LoadVideo, SaveVideo
from vidgen.vidgen_core.errors import CheckpointError, FileError, SettingsError
from vidgen.vidgen_core.generate import Sampling, generate, load_bundle
from vidgen.vidgen_core.media import read_metadata, read_video, video_to_images
from vidgen.vidgen_core.memory.host import bundled_models
from vidgen.vidgen_core.types import VideoShape

ROOT = Path(vidgen.__file__).resolve().parent
NODES: dict[str, type] = vidgen.NODE_CLASS_MAPPINGS
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "steps": 2,
    "cfg": 3.0,
    "guidance": 0.0,
    "shift": 2.0,
    "sampler": "euler",
    "schedule": "auto",
    "denoise": 1.0,
}

WIDGETS_FOREVER = {
    "VidGenLoadModel": ["model_name", "weight_dtype", "image_condition", "offload", "storage", "budget_gb"],
    "VidGenLoadVAE": ["vae_name", "weight_dtype"],
    "VidGenLoadTextEncoders": ["text_name", "weight_dtype", "second_name", "vision_name", "tokenizer_folder"],
    "VidGenLoadAll": ["model_folder", "weight_dtype", "storage", "budget_gb"],
    "VidGenEncodePrompt": ["prompt", "template", "custom_template", "image_interleave"],
    "VidGenSaveEmbeddings": ["filename_prefix"],
    "VidGenLoadEmbeddings": ["embeddings_name"],
    "VidGenEmptyLatent": ["width", "height", "num_frames", "batch_size"],
    "VidGenSampler": [
        *("seed", "control_after_generate", "steps", "cfg", "guidance", "shift", "sampler", "schedule", "denoise"),
        *("cfg_schedule", "cfg_start", "cfg_end", "cfg_rescale", "cfg_batched"),
    ],
    "VidGenDecode": ["tile_size", "overlap", "temporal_size", "temporal_overlap", "method", "memory_gb"],
    "VidGenEncodeVideo": ["fit", "method", "memory_gb"],
    "VidGenSaveVideo": ["fps", "filename_prefix", "format", "crf", "codec", "bit_depth"],
    "VidGenLoadVideo": ["video", "start_frame", "max_frames"],
    "VidGenApplyLora": ["lora_name", "strength", "mode", "blocks", "alpha"],
    "VidGenAttention": [
        *("backend", "pattern", "tile_frames", "tile_rows", "tile_columns"),
        *("window_frames", "window_rows", "window_columns", "max_score_mb"),
    ],
    "VidGenLoadImage": ["image"],
    "VidGenFitImages": ["width", "height", "fit"],
    "VidGenImageToVideo": [
        *("width", "height", "num_frames", "size", "fit", "mode", "method", "batch_size"),
    ],
    "VidGenPadVideo": ["left", "top", "right", "bottom", "overlap"],
    "VidGenSigmas": ["schedule", "steps", "shift", "denoise"],
    "VidGenFromConditioning": [],
    "VidGenCompile": ["mode"],
    "VidGenDecodeSave": [
        *("fps", "filename_prefix", "format", "crf", "method", "memory_gb", "codec", "bit_depth"),
    ],
    "VidGenStepCache": ["method", "quality", "threshold", "max_skips", "start", "end", "curve"],
    "VidGenCalibrateCache": ["seed", "control_after_generate", "steps", "cfg", "shift", "schedule"],
    "VidGenSkipLayers": ["blocks", "scale", "start", "end"],
    "VidGenSTG": ["mode", "blocks", "scale", "rescale", "start", "end"],
    "VidGenCfgZeroStar": ["zero_steps", "optimised_scale"],
    "VidGenEnhanceAVideo": ["weight"],
    "VidGenRIFLEx": ["frequency", "trained_frames"],
    "VidGenContextWindows": [
        *("window_frames", "overlap_frames", "schedule", "blend", "free_noise", "first_frame"),
    ],
    "VidGenKeyframe": ["frame", "strength", "until"],
    "VidGenKeyframesToVideo": [
        *("width", "height", "num_frames", "size", "fit", "mode", "method", "batch_size"),
    ],
}
"""What saved workflows rely on: names are never changed, and new ones are only put at the end."""


@pytest.fixture(scope="module")
def parts(tiny_bundle_dir: Path) -> tuple[Any, Any, Any]:
    return LoadAll().load(str(tiny_bundle_dir), "auto")


def conditioning(parts: tuple[Any, Any, Any], prompt: str = "a red star") -> Any:
    return EncodePrompt().encode(parts[2], prompt, "video")[0]


def empty(parts: tuple[Any, Any, Any], batch: int = 1) -> dict[str, Any]:
    return EmptyLatent().make(parts[1], 32, 48, 5, batch)[0]


# --- all nodes --------------------------------------------------------------------------------------------------------


def inputs_of(cls: type) -> dict[str, Any]:
    declared = cls.INPUT_TYPES()
    return declared.get("required", {}) | declared.get("optional", {})


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_explains_itself(node_id: str) -> None:
    cls = NODES[node_id]
    assert node_id.startswith("VidGen")
    assert cls.CATEGORY.startswith("VidGen/")
    assert cls.DESCRIPTION
    assert cls.SEARCH_ALIASES
    assert len(getattr(cls, "RETURN_NAMES", ())) == len(cls.RETURN_TYPES) == len(getattr(cls, "OUTPUT_TOOLTIPS", ()))
    assert all(spec[1].get("tooltip") for spec in inputs_of(cls).values())
    assert vidgen.NODE_DISPLAY_NAME_MAPPINGS[node_id].endswith("(VidGen)")


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_is_an_argument(node_id: str) -> None:
    cls = NODES[node_id]
    arguments = set(inspect.signature(getattr(cls, cls.FUNCTION)).parameters) - {"self"}
    assert arguments == set(inputs_of(cls)) | set(cls.INPUT_TYPES().get("hidden", {}))


@pytest.mark.parametrize("node_id", NODES)
def test_defaults_are_allowed_values(node_id: str) -> None:
    for name, (kind, options) in inputs_of(NODES[node_id]).items():
        if isinstance(kind, list) and "default" in options:
            assert options["default"] in kind, name
        if kind in ("INT", "FLOAT"):
            assert options["min"] <= options["default"] <= options["max"], name


@pytest.mark.parametrize("node_id", NODES)
def test_the_help_page_tells_of_every_input(node_id: str) -> None:
    page = (ROOT / vidgen.WEB_DIRECTORY / "docs" / f"{node_id}.md").read_text("utf-8")
    told = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    named = set(inputs_of(NODES[node_id])) | set(getattr(NODES[node_id], "RETURN_NAMES", ()))
    assert [name for name in named if name not in told.replace(",", " ").split()] == []


def test_widgets_are_forever() -> None:
    assert WIDGETS_FOREVER.keys() == NODES.keys()
    for node_id, names in WIDGETS_FOREVER.items():
        assert widget_names(NODES[node_id])[: len(names)] == names, node_id


def test_no_help_page_without_a_node() -> None:
    assert {page.stem for page in (ROOT / "web" / "docs").glob("*.md")} == NODES.keys()


# --- the main path ----------------------------------------------------------------------------------------------------


def test_the_nodes_make_what_the_core_makes(parts: tuple[Any, Any, Any], tiny_bundle_dir: Path) -> None:
    """Bit for bit: the nodes add nothing of their own to the mathematics."""
    negative = conditioning(parts, "a circle")
    (latent,) = Sampler().sample(parts[0], conditioning(parts), empty(parts, 2), negative=negative, **SETTINGS)
    (images,) = Decode().decode(parts[1], latent)
    settings = Sampling(seed=3, num_steps=2, cfg=3.0, shift=2.0, num_videos=2, negative_prompt="a circle")
    shape = VideoShape(num_frames=5, height_px=48, width_px=32)
    video = generate(load_bundle(tiny_bundle_dir), "a red star", shape, settings)
    # Raw latents are divided by the scale and multiplied again: one rounding of float32 each, grown by the decoder.
    torch.testing.assert_close(images, video_to_images(video), atol=1e-5, rtol=0)


def test_parts_loaded_one_by_one(tiny_bundle_dir: Path, parts: tuple[Any, Any, Any]) -> None:
    (model,) = LoadModel().load(str(tiny_bundle_dir / "network.safetensors"), "auto")
    (vae,) = LoadVAE().load(str(tiny_bundle_dir / "vae.safetensors"), "float32")
    (text,) = LoadTextEncoders().load(str(tiny_bundle_dir / "text.safetensors"), "auto")
    one_by_one = (model, vae, text)
    (expected,), (found,) = (
        Sampler().sample(p[0], conditioning(p), empty(p), negative=conditioning(p, "x"), **SETTINGS)
        for p in (parts, one_by_one)
    )
    assert torch.equal(expected["samples"], found["samples"])


def test_a_latent_is_raw_and_on_the_cpu(parts: tuple[Any, Any, Any]) -> None:
    """What the VAE itself makes, not scaled: so native nodes can decode it."""
    images = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    latent, _ = EncodeVideo().encode(parts[1], images, "strict")
    mean, _ = parts[1].vae.encode(images.permute(3, 0, 1, 2)[None] * 2 - 1)
    assert latent["samples"].shape == (1, 16, 2, 4, 6)
    # Multiplied by the scale and divided again: two roundings of float32.
    torch.testing.assert_close(latent["samples"], mean, atol=1e-6, rtol=1e-5)


def test_a_foreign_latent_has_the_published_scale(parts: tuple[Any, Any, Any]) -> None:
    """A native Empty HunyuanLatentVideo gives zeros without our note of the scale."""
    scale = 0.476986
    native = {"samples": torch.zeros(1, 16, 2, 6, 4)}
    arguments = SETTINGS | {"negative": conditioning(parts, "x")}
    (own,) = Sampler().sample(parts[0], conditioning(parts), empty(parts), **arguments)
    (foreign,) = Sampler().sample(parts[0], conditioning(parts), native, **arguments)
    torch.testing.assert_close(foreign["samples"] * scale, own["samples"] * 0.7, atol=1e-5, rtol=1e-5)


def test_an_image_latent_counts_as_one_frame(parts: tuple[Any, Any, Any]) -> None:
    (images,) = Decode().decode(parts[1], {"samples": torch.zeros(1, 16, 4, 6)})
    assert images.shape == (1, 32, 48, 3)


def test_denoise_keeps_some_of_the_video(parts: tuple[Any, Any, Any]) -> None:
    images = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    start, _ = EncodeVideo().encode(parts[1], images, "strict")
    distances = []
    for denoise in (0.1, 0.9):
        arguments = SETTINGS | {"denoise": denoise, "steps": 4, "negative": conditioning(parts, "x")}
        (result,) = Sampler().sample(parts[0], conditioning(parts), start, **arguments)
        distances.append(float((result["samples"] - start["samples"]).norm()))
    assert 0 < distances[0] < distances[1]


def test_auto_is_what_the_checkpoint_recommends(parts: tuple[Any, Any, Any]) -> None:
    auto = SETTINGS | {"steps": 0, "cfg": 0.0, "shift": 0.0, "sampler": "auto"}
    explicit = SETTINGS | {"steps": 3, "cfg": 2.0, "shift": 1.0, "sampler": "euler", "schedule": "simple"}
    (expected,), (found,) = (
        Sampler().sample(parts[0], conditioning(parts), empty(parts), negative=conditioning(parts, "x"), **settings)
        for settings in (explicit, auto)
    )
    assert torch.equal(expected["samples"], found["samples"])


def test_exact_methods_give_what_one_piece_gives(parts: tuple[Any, Any, Any], tmp_path: Path) -> None:
    latent = {"samples": torch.randn(2, *empty(parts)["samples"].shape[1:])}
    (whole,) = Decode().decode(parts[1], latent, tile_size=0)
    host = hosts.LocalNodeHost(output_folder=tmp_path)
    with hosts.using(host):
        for method, memory_gb in (("exact", 0.0), ("exact_disk", 0.1)):
            (images,) = Decode().decode(parts[1], latent, method=method, memory_gb=memory_gb)
            torch.testing.assert_close(images, whole, rtol=0, atol=1e-4)
            again, _ = EncodeVideo().encode(parts[1], whole[:5], "strict", method=method, memory_gb=memory_gb)
            tiles, _ = EncodeVideo().encode(parts[1], whole[:5], "strict")  # one tile is one piece
            torch.testing.assert_close(again["samples"], tiles["samples"], rtol=0, atol=1e-3)
        DecodeSave().save(parts[1], latent, 8.0, "exact", "mp4", 0, "exact", 0.0)
    frames, _ = read_video(host.saved[0])
    assert frames.shape == whole.shape
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


def test_encode_video_crops_or_refuses(parts: tuple[Any, Any, Any]) -> None:
    images = torch.rand(7, 35, 50, 3)
    latent, _ = EncodeVideo().encode(parts[1], images, "crop")
    assert latent["samples"].shape == (1, 16, 2, 4, 6)
    with pytest.raises(SettingsError):
        EncodeVideo().encode(parts[1], images, "strict")


def test_a_saved_video_is_loaded_again(tmp_path: Path) -> None:
    images = torch.full((5, 16, 32, 3), 0.25)
    host = hosts.LocalNodeHost(output_folder=tmp_path)
    with hosts.using(host):
        ui = SaveVideo().save(images, 12.5, "clips/red", "mp4", 0, prompt={"1": {}}, extra_pnginfo={"workflow": [1]})
        again, fps, num_frames, silent = LoadVideo().load(str(host.saved[0]), 1, 3)
    assert ui["ui"] == {
        "images": [{"filename": "red_00001.mp4", "subfolder": "clips", "type": "output"}],
        "animated": (True,),
    }
    assert (fps, num_frames, again.shape, silent) == (12.5, 3, (3, 16, 32, 3), None)
    assert float((again - 0.25).abs().max()) < 2 / 255
    tags = read_metadata(tmp_path / "clips" / "red_00001.mp4")
    assert json.loads(tags["prompt"]) == {"1": {}}
    assert json.loads(tags["workflow"]) == [1]
    with hosts.using(hosts.LocalNodeHost(output_folder=tmp_path)):
        assert SaveVideo().save(images, 8, "clips/red", "gif", 0)["ui"]["images"][0]["filename"] == "red_00002.gif"


AUDIO = {"waveform": 0.5 * torch.sin(torch.arange(8000.0) / 9)[None, None], "sample_rate": 8000}


def test_sound_and_all_bits_come_back(tmp_path: Path) -> None:
    """Through the nodes: a lossless video with its sound, of which a part is loaded."""
    images = torch.linspace(0, 1, 4 * 15 * 17 * 3).view(4, 15, 17, 3)
    host = hosts.LocalNodeHost(output_folder=tmp_path)
    with hosts.using(host):
        shown = SaveVideo().save(images, 8, "a", "mkv", 17, codec="ffv1", bit_depth="16", audio=AUDIO, prompt={"1": {}})
        again, fps, num_frames, audio = LoadVideo().load(str(host.saved[0]), 1, 2)
    assert shown["ui"] == {"video": [{"filename": "a_00001.mkv", "subfolder": "", "type": "output"}]}
    assert (fps, num_frames) == (8, 2)
    torch.testing.assert_close(again, images[1:3], rtol=0, atol=1 / 65535)
    assert audio is not None
    assert audio["sample_rate"] == 8000
    torch.testing.assert_close(audio["waveform"], AUDIO["waveform"][..., 1000:3000], rtol=0, atol=2**-22)
    assert json.loads(read_metadata(host.saved[0])["prompt"]) == {"1": {}}


def test_pictures_go_to_a_folder_of_their_own(parts: tuple[Any, Any, Any], tmp_path: Path) -> None:
    latent = {"samples": torch.randn(1, *empty(parts)["samples"].shape[1:])}
    host = hosts.LocalNodeHost(output_folder=tmp_path)
    with hosts.using(host):
        (whole,) = Decode().decode(parts[1], latent, tile_size=0)
        for number in (1, 2):
            save = DecodeSave().save
            shown = save(parts[1], latent, 8.0, "x/b", "png", 0, "exact", 0.0, bit_depth="16", prompt={"1": {}})
            pictures = shown["ui"]["images"]
            assert [one["filename"] for one in pictures] == [f"0000{frame}.png" for frame in range(1, 6)]
            assert {one["subfolder"] for one in pictures} == {f"x/b_0000{number}"}
        again, fps, _, audio = LoadVideo().load(str(tmp_path / "x" / "b_00002" / "00001.png"), 0, 0)
    assert fps == 8
    assert audio is None
    # Two ways of decoding, then 16 bits.
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-4)
    assert read_metadata(tmp_path / "x" / "b_00002" / "00003.png")["prompt"] == '{"1": {}}'


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused_by_the_sampler_only(parts: tuple[Any, Any, Any]) -> None:
    negative = conditioning(parts, "")
    with pytest.raises(SettingsError, match="prompt is empty"):
        Sampler().sample(parts[0], conditioning(parts, "  "), empty(parts), negative=negative, **SETTINGS)


def test_guidance_without_a_negative_prompt_says_what_to_do(parts: tuple[Any, Any, Any]) -> None:
    with pytest.raises(SettingsError, match="set cfg to 1"):
        Sampler().sample(parts[0], conditioning(parts), empty(parts), **SETTINGS)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 2, 6, 4), "another kind of model"),
        ((1, 16, 2, 5, 4), "height of the latents"),
        ((1, 16, 2, 6, 3), "width of the latents"),
        ((16, 2), "not video latents"),
    ],
)
def test_latents_of_another_shape(parts: tuple[Any, Any, Any], shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Sampler().sample(parts[0], conditioning(parts), {"samples": torch.zeros(shape)}, **SETTINGS)


def test_text_encoders_of_another_model(parts: tuple[Any, Any, Any]) -> None:
    from dataclasses import replace

    encoded = conditioning(parts)
    llama = replace(encoded.text_config.llama, hidden_size=64)
    other = replace(encoded, text_config=replace(encoded.text_config, llama=llama))
    with pytest.raises(CheckpointError, match="do not belong to this network"):
        Sampler().sample(parts[0], other, empty(parts), **SETTINGS)


@pytest.mark.parametrize("cls", [SaveVideo, DecodeSave])
def test_files_that_cannot_be_written_are_refused_before_anything_runs(cls: Any, tmp_path: Path) -> None:
    """By VALIDATE_INPUTS, whose words ComfyUI shows."""
    assert cls.VALIDATE_INPUTS() is True
    assert cls.VALIDATE_INPUTS("mkv", "ffv1", "16") is True
    assert cls.VALIDATE_INPUTS("png", "auto", "16") is True
    assert cls.VALIDATE_INPUTS(None, "prores", "auto") is True, "a format that comes through a link is not known yet"
    for words, *widgets in (
        ("mp4 files do not hold this codec", "mp4", "prores", "auto"),
        ("number of bits", "webm", "auto", "16"),
        ("no such format", "avi", "auto", "auto"),
        ("no such bit_depth", "mp4", "auto", "12"),
        ("PNG pictures", "png", "h264", "auto"),
        ("PNG pictures", "png", "auto", "10"),
    ):
        assert words in str(cls.VALIDATE_INPUTS(*widgets))
    with hosts.using(hosts.LocalNodeHost(output_file=tmp_path / "a.mov")):
        assert cls.VALIDATE_INPUTS("mp4", "prores", "auto") is True, "the file's own ending counts"


def test_a_part_in_the_wrong_loader(tiny_bundle_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="VAE"):
        LoadModel().load(str(tiny_bundle_dir / "vae.safetensors"), "auto")


@pytest.mark.parametrize(
    ("cls", "argument"), [(LoadModel, "model_name"), (LoadVAE, "vae_name"), (LoadTextEncoders, "text_name")]
)
def test_a_missing_file_is_found_before_the_run(cls: type, argument: str, tiny_bundle_dir: Path) -> None:
    """By VALIDATE_INPUTS, whose words ComfyUI shows, where it hides those of an exception."""
    assert "missing.safetensors" in cls.VALIDATE_INPUTS(**{argument: "missing.safetensors"})
    assert cls.VALIDATE_INPUTS(**{argument: str(tiny_bundle_dir / "vae.safetensors")}) is True
    assert "missing-folder" in LoadAll.VALIDATE_INPUTS("missing-folder")
    assert "missing.mp4" in LoadVideo.VALIDATE_INPUTS("missing.mp4")


# --- lists ------------------------------------------------------------------------------------------------------------


def test_own_folders_are_listed(tiny_bundle_dir: Path) -> None:
    host = hosts.LocalNodeHost(folders=[tiny_bundle_dir.parent])
    assert host.model_folders()[tiny_bundle_dir.name] == tiny_bundle_dir
    with hosts.using(host):
        assert tiny_bundle_dir.name in LoadAll.INPUT_TYPES()["required"]["model_folder"][0]
        assert LoadAll.VALIDATE_INPUTS(tiny_bundle_dir.name) is True


def test_models_are_listed_as_comfyui_lays_them_out(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "vae" / "small").mkdir(parents=True)
    (tmp_path / "vae" / "small" / "a.safetensors").symlink_to(tiny_bundle_dir / "vae.safetensors")
    host = hosts.LocalNodeHost(folders=[tmp_path])
    assert host.names("codec")[-1] == "small/a.safetensors"
    assert host.find("codec", "small/a.safetensors") == tmp_path / "vae" / "small" / "a.safetensors"


def lay_out(place: Path) -> list[str]:
    """One checkpoint of each kind below ``place`` (empty files, an index with two shards); the names of a list."""
    folder = place / "model" / "transformer"
    folder.mkdir(parents=True)
    for name in ("a.gguf", "b.pt", "b_map.pt", "c.ckpt", "d.safetensors", "notes.txt", "e_map.pt"):
        (place / name).touch()
    shards = [f"w-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        (folder / shard).touch()
    (folder / "w.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("xy", shards, strict=True))}))
    index = "model/transformer/w.safetensors.index.json"
    return ["a.gguf", "b.pt", "c.ckpt", "d.safetensors", "e_map.pt", index]


def test_every_kind_of_checkpoint_is_listed_and_shards_once(tmp_path: Path) -> None:
    names = lay_out(tmp_path / "diffusion_models")
    host = hosts.LocalNodeHost(folders=[tmp_path])
    assert host.names("network")[len(hosts.bundled_names("network")) :] == names
    assert all(host.find("network", name).is_file() for name in names)
    assert host.find("network", "model/transformer").is_dir()
    (tmp_path / "diffusion_models" / "model").rename(tmp_path / "model")
    assert "model" in host.model_folders()


def test_the_choices_of_load_model_reach_the_core(tiny_bundle_dir: Path, parts: tuple[Any, Any, Any]) -> None:
    path = str(tiny_bundle_dir / "network.safetensors")
    (streamed,) = LoadModel().load(path, "auto", "auto", "stream blocks")
    assert all(tensor.is_meta for tensor in streamed.network.single_blocks.parameters())
    assert not any(tensor.is_meta for tensor in parts[0].network.parameters())
    (expected,), (found,) = (
        Sampler().sample(model, conditioning(parts), empty(parts), negative=conditioning(parts, "x"), **SETTINGS)
        for model in (parts[0], streamed)
    )
    assert torch.equal(expected["samples"], found["samples"])
    (model,) = LoadModel().load(path, "auto", "token_replace", "off")
    assert model.config.image_condition == "token_replace"
    assert model.network.config.image_condition == "token_replace"


def test_every_bundled_file_is_in_a_list() -> None:
    """In the one list of its part, told by its header."""
    listed = [(kind, name) for kind in ("network", "codec", "text") for name in hosts.bundled_names(kind)]
    files = [f"{f.parent.name}/{f.name}" for f in (ROOT / "models").glob("*/*.safetensors")]
    assert sorted(name for _, name in listed) == sorted(files)
    assert all(hosts.find_bundled(kind, name) is not None for kind, name in listed)


def test_every_bundled_lora_is_in_the_list_of_loras() -> None:
    listed = hosts.bundled_names("lora")
    files = [f"{f.parents[1].name}/{f.name}" for f in (ROOT / "models").glob("*/loras/*.safetensors")]
    assert sorted(listed) == sorted(files)
    assert all(hosts.find_bundled("lora", name) is not None for name in listed)
    assert all(hosts.find_bundled("network", name) is None for name in listed)
    assert all(hosts.LocalNodeHost().find("lora", name).is_file() for name in listed)


@pytest.mark.parametrize("name", ["../x", "a/../../b", "vidgen-tiny-hunyuan/../../pyproject.toml", "", "/", "x/y"])
def test_a_bundled_name_does_not_reach_outside(name: str) -> None:
    assert hosts.find_bundled("network", name) is None
    assert hosts.find_bundled("lora", name) is None


# --- inside ComfyUI ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_bundle_dir: Path) -> SimpleNamespace:
    """The few functions of ComfyUI that the host calls, with their real signatures, and a note of the calls."""
    seen = SimpleNamespace(bars=[], freed=[], interrupted=False, disable_metadata=False)

    class ProgressBar:
        def __init__(self, total: int, node_id: str | None = None) -> None:
            self.total, self.updates = total, []
            seen.bars.append(self)

        def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
            self.updates.append((value, preview))

    def throw_exception_if_processing_interrupted() -> None:
        if seen.interrupted:
            raise Interrupted

    def get_save_image_path(
        prefix: str, folder: str, width: int = 0, height: int = 0
    ) -> tuple[str, str, int, str, str]:
        place = Path(folder) / Path(prefix).parent
        place.mkdir(parents=True, exist_ok=True)
        return str(place), Path(prefix).name, 1, str(Path(prefix).parent), prefix

    (tmp_path / "input").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vidgen").symlink_to(tiny_bundle_dir.parent)
    modules: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.cli_args": {"args": seen},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "free_memory": lambda num_bytes, device, keep_loaded=(): seen.freed.append(num_bytes),
            "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
        },
        "folder_paths": {
            "models_dir": str(tmp_path / "models"),
            "get_filename_list": lambda folder: [f"{folder}.safetensors"],
            "get_folder_paths": lambda folder: [str(tmp_path / "models" / folder)],
            "get_full_path": lambda folder, name: str(tiny_bundle_dir / name) if name == "vae.safetensors" else None,
            "get_output_directory": lambda: str(tmp_path / "output"),
            "get_user_directory": lambda: str(tmp_path / "user"),
            "get_input_directory": lambda: str(tmp_path / "input"),
            "get_save_image_path": get_save_image_path,
            "exists_annotated_filepath": lambda name: (tmp_path / "input" / name).is_file(),
            "get_annotated_filepath": lambda name: str(tmp_path / "input" / name),
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return seen


def test_inside_comfyui_its_host_is_taken(comfy: SimpleNamespace) -> None:
    assert isinstance(hosts.current(), hosts.ComfyHost)
    with hosts.using(hosts.LocalNodeHost()) as own:
        assert hosts.current() is own


def test_outside_comfyui_the_local_host_is_taken() -> None:
    assert isinstance(hosts.current(), hosts.LocalNodeHost)


def test_the_main_path_inside_comfyui(comfy: SimpleNamespace, tmp_path: Path, tiny_bundle_dir: Path) -> None:
    """Lists, room, progress with previews, and the file in ComfyUI's output folder."""
    assert tiny_bundle_dir.name in LoadAll.INPUT_TYPES()["required"]["model_folder"][0]
    assert "vae.safetensors" in LoadVAE.INPUT_TYPES()["required"]["vae_name"][0]
    parts = LoadAll().load(tiny_bundle_dir.name, "auto")
    assert sum(comfy.freed) > 0
    (latent,) = Sampler().sample(
        parts[0], conditioning(parts), empty(parts), negative=conditioning(parts, "x"), node_id="5", **SETTINGS
    )
    sampling = comfy.bars[-1]
    assert sampling.total == 2
    previews = [preview for _, preview in sampling.updates if preview]
    assert len(previews) == 2
    kind, picture, size = previews[-1]
    # Two latent frames of 4 x 6 beside each other, large enough to see.
    assert (kind, picture.size, size) == ("JPEG", (342, 256), 342)
    (images,) = Decode().decode(parts[1], latent)
    shown = SaveVideo().save(images, 8, "video/VidGen", "mp4", 17, prompt={}, extra_pnginfo={})["ui"]["images"][0]
    assert read_video(tmp_path / "output" / shown["subfolder"] / shown["filename"])[0].shape == (5, 48, 32, 3)


def test_comfyui_lists_what_it_does_not_know_itself(
    comfy: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models" / "diffusion_models"
    names = lay_out(place)
    listed = [path.relative_to(place).as_posix() for path in place.glob("**/*.safetensors")]
    monkeypatch.setattr(sys.modules["folder_paths"], "get_filename_list", lambda folder: listed)
    shown = hosts.current().names("network")[len(hosts.bundled_names("network")) :]
    assert sorted(shown) == names


def test_interrupting_comfyui_passes_through(comfy: SimpleNamespace, parts: tuple[Any, Any, Any]) -> None:
    comfy.interrupted = True
    with pytest.raises(Interrupted):
        Sampler().sample(parts[0], conditioning(parts), empty(parts), negative=conditioning(parts, "x"), **SETTINGS)


def test_comfyui_goes_on_where_it_stood(
    comfy: SimpleNamespace, parts: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt queued again, by another server process too: the file is found by what the run is made of."""
    monkeypatch.setattr("vidgen.vidgen_core.resume.SAVE_EVERY_S", 0.0)
    runs = tmp_path / "user" / "vidgen" / "unfinished"
    arguments = SETTINGS | {"negative": conditioning(parts, "x"), "steps": 3, "node_id": "5"}
    forwards: list[int] = []

    def stop_in_the_second(module: object, inputs: object) -> None:
        forwards.append(1)
        comfy.interrupted = len(forwards) == 2

    hook = parts[0].network.register_forward_pre_hook(stop_in_the_second)
    with pytest.raises(Interrupted):
        Sampler().sample(parts[0], conditioning(parts), empty(parts), **arguments)
    hook.remove()
    assert len(list(runs.iterdir())) == 1
    comfy.interrupted = False
    forwards.clear()
    hook = parts[0].network.register_forward_pre_hook(lambda *_: forwards.append(1))
    (again,) = Sampler().sample(parts[0], conditioning(parts), empty(parts), **arguments)
    assert len(forwards) == 2
    Sampler().sample(parts[0], conditioning(parts), empty(parts), **arguments | {"node_id": "6"})
    hook.remove()
    assert len(forwards) == 2, "a finished run waits until its video is safe"
    with hosts.using(hosts.LocalNodeHost()):
        (expected,) = Sampler().sample(parts[0], conditioning(parts), empty(parts), **arguments)
    assert torch.equal(again["samples"], expected["samples"])
    SaveVideo().save(torch.rand(5, 16, 32, 3), 8, "a", "gif", 17)
    assert list(runs.iterdir()) == []


def test_comfyui_may_forbid_metadata(comfy: SimpleNamespace, tmp_path: Path) -> None:
    comfy.disable_metadata = True
    shown = SaveVideo().save(torch.zeros(1, 16, 16, 3), 8, "a", "mp4", 17, prompt={"1": {}})["ui"]["images"][0]
    assert "prompt" not in read_metadata(tmp_path / "output" / shown["filename"])


def test_comfyui_keeps_encoded_prompts_in_its_folders(
    comfy: SimpleNamespace, parts: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    shown = SaveEmbeddings().save(conditioning(parts), "embeddings/star")["ui"]["text"][0]
    assert (tmp_path / "output" / shown).is_file()
    kept = tmp_path / "models" / "embeddings" / "vidgen"
    kept.mkdir(parents=True)
    shutil.copy(tmp_path / "output" / shown, kept / "b.safetensors")
    names = LoadEmbeddings.INPUT_TYPES()["required"]["embeddings_name"][0]
    assert names == ["b.safetensors", f"{shown} [output]", *hosts.example_names({".safetensors"})]
    for name in names[:2]:
        found, prompt = LoadEmbeddings().load(name)
        assert prompt == "a red star"
        assert torch.equal(found.features.context, conditioning(parts).features.context)
    with pytest.raises(FileError):
        LoadEmbeddings().load(str(kept / "b.safetensors"))


def test_comfyui_names_the_folders_of_tokenizers(comfy: SimpleNamespace, tmp_path: Path) -> None:
    host = hosts.current()
    (tmp_path / "models" / "text_encoders" / "llama").mkdir(parents=True)
    assert host.text_folders() == [tmp_path / "models" / "text_encoders"]
    assert host.find_tokenizers("llama") == tmp_path / "models" / "text_encoders" / "llama"
    with pytest.raises(FileError, match="no such folder of tokenizers"):
        host.find_tokenizers(str(tmp_path))


def test_comfyui_reaches_no_file_outside_its_folders(comfy: SimpleNamespace, tiny_bundle_dir: Path) -> None:
    """A workflow from the net may name any path; only listed files are opened."""
    host = hosts.current()
    with pytest.raises(FileError):
        host.find("network", str(tiny_bundle_dir / "network.safetensors"))
    with pytest.raises(FileError):
        host.find("lora", str(tiny_bundle_dir / "network.safetensors"))
    with pytest.raises(FileError):
        host.find_model_folder(str(tiny_bundle_dir))
    with pytest.raises(FileError):
        host.find_model_folder("vidgen-tiny-cogvideox/../vidgen-tiny-hunyuan/network.safetensors")
    chosen = LoadAll.INPUT_TYPES()["required"]["model_folder"][0]
    cogvideox = "vidgen-tiny-cogvideox"
    assert chosen[:3] == ["vidgen-tiny-hunyuan", cogvideox, f"{cogvideox}/network_i2v.safetensors"]
    assert LoadAll.VALIDATE_INPUTS(chosen[2]) is True
    network = host.find_model_folder(chosen[2])
    assert network == bundled_models()["vidgen-tiny-cogvideox"] / "network_i2v.safetensors"
    with pytest.raises(FileError):
        host.find_input("missing.mp4")


def test_comfyui_lists_its_own_inputs_and_finds_the_examples(comfy: SimpleNamespace, tmp_path: Path) -> None:
    """A workflow that comes with the pack runs before anything is uploaded; an uploaded file of the name goes first."""
    host = hosts.current()
    (tmp_path / "input" / "mine.PNG").touch()
    assert host.inputs(hosts.IMAGE_ENDINGS) == [
        "mine.PNG",
        "vidgen-black.png",
        "vidgen-first-frame.png",
        "vidgen-last-frame.png",
        "vidgen-mask.png",
    ]
    assert host.find_input("vidgen-mask.png") == hosts.EXAMPLES / "vidgen-mask.png"
    own = tmp_path / "input" / "vidgen-mask.png"
    own.touch()
    assert host.find_input("vidgen-mask.png") == own
    assert host.inputs(hosts.IMAGE_ENDINGS).count("vidgen-mask.png") == 1


@pytest.mark.parametrize(("num_frames", "size"), [(1, (6, 4)), (4, (6, 16)), (5, (12, 16)), (9, (18, 16))])
def test_contact_sheet(num_frames: int, size: tuple[int, int]) -> None:
    frames = torch.arange(num_frames, dtype=torch.uint8)[:, None, None, None].expand(num_frames, 6, 4, 3)
    sheet = np.asarray(hosts.contact_sheet(frames, side_px=6))
    assert sheet.shape == (*size, 3)
    columns = min(num_frames, 4)
    for number in range(num_frames):
        assert int(sheet[number // columns * 6, number % columns * 4, 0]) == number


def test_a_contact_sheet_can_be_seen_and_taken_apart() -> None:
    """16 x 8 latents become a picture that is large enough, and its JPEG says how many there are and where."""
    frames = torch.linspace(0, 255, 33).to(torch.uint8)[:, None, None, None].expand(33, 8, 16, 3)
    sheet = hosts.contact_sheet(frames)
    assert sheet.size == (4 * 256, 4 * 128)
    pixels = np.asarray(sheet)
    seen = [int(pixels[row * 128 + 64, column * 256 + 128, 0]) for row in range(4) for column in range(4)]
    assert seen[0] == 0
    assert seen[-1] == 255
    assert seen == sorted(set(seen))
    file = io.BytesIO()
    sheet.resize(sheet.size).save(file, "JPEG", quality=95)  # as ComfyUI does
    assert json.loads(Image.open(file).info["comment"]) == {"vidgen": {"columns": 4, "frames": 16}}
