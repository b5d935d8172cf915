"""Image to video whose prompt is read together with the image: in `generate`, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.headless.cli import main
from vidgen.vidgen_core.bundle import find_parts, load_bundle, sees_images
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keyframes import RULES
from vidgen.vidgen_core.generate import Sampling, Seen, encode_prompts, generate, seen_picture
from vidgen.vidgen_core.keyframes import Keyframe
from vidgen.vidgen_core.media import read_metadata
from vidgen.vidgen_core.types import VideoShape

PLACES = {
    "transformer/model.safetensors": "diffusion_models/hunyuan_video_image_to_video_720p_bf16.safetensors",
    "vae/model.safetensors": "vae/hunyuan_video_vae_bf16.safetensors",
    "text_encoder/model.safetensors": "text_encoders/llava_llama3_fp8_scaled.safetensors",
    "text_encoder_2/model.safetensors": "clip/clip_l.safetensors",
    "tokenizer": "text_encoders/llama",
    "tokenizer_2": "text_encoders/clip",
}
EYES = {"image_encoder/model.safetensors": "clip_vision/llava_llama3_vision.safetensors"}
SHAPE = VideoShape(num_frames=9, height_px=32, width_px=32)
IMAGE = "vidgen-first-frame.png"


def laid_out(folder: Path, models: Path, places: dict[str, str]) -> Path:
    for place, source in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(models / source)
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, i2v_v1_models: Path) -> Path:
    """I2V v1 in one folder, as diffusers lays it out, with LLaVA's image encoder."""
    return laid_out(tmp_path_factory.mktemp("seeing"), i2v_v1_models, PLACES | EYES)


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory, i2v_v1_models: Path) -> Path:
    return laid_out(tmp_path_factory.mktemp("blind"), i2v_v1_models, PLACES)


def picture(seed: int) -> torch.Tensor:
    return torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(seed))


def test_every_way_to_take_an_image_has_its_interleave() -> None:
    """https://github.com/Tencent-Hunyuan/HunyuanVideo-I2V: 144 tokens of 576 for v2, 288 for v1."""
    v1 = NetworkConfig(in_channels=33, image_condition="latent_concat")
    assert RULES.interleave(v1) == 2
    assert RULES.interleave(NetworkConfig(image_condition="token_replace")) == 4
    assert RULES.interleave(RULES.methods["token_replace"](NetworkConfig())) == 4
    assert RULES.interleave(NetworkConfig()) is None


def test_a_folder_says_whether_it_has_eyes(seeing: Path, blind: Path, tiny_bundle_dir: Path) -> None:
    assert sees_images(*find_parts(seeing))
    assert not sees_images(*find_parts(blind))
    assert not sees_images(*find_parts(tiny_bundle_dir))


def test_generate_shows_the_image_to_the_prompt(seeing: Path, blind: Path) -> None:
    bundle = load_bundle(seeing, device="cpu")
    frame = Keyframe(image=picture(1).movedim(-1, 0)[None] * 2 - 1)

    def video(bundle: Any, **more: Any) -> torch.Tensor:
        return generate(bundle, "a red circle", SHAPE, Sampling(num_steps=1), keyframes=[frame], **more)

    assert bundle.text.vision is None  # type: ignore[attr-defined]
    first = video(bundle)
    assert torch.equal(first, video(bundle, prompt_image=picture(1)))
    assert not torch.equal(first, video(bundle, prompt_image=picture(2)))
    without = load_bundle(blind, device="cpu")
    assert not torch.equal(first, video(without))
    assert torch.equal(video(without), video(without, prompt_image=picture(2)))


def test_the_tokens_of_the_picture_come_first(seeing: Path) -> None:
    bundle = load_bundle(seeing, device="cpu")
    config = bundle.model.config
    seen = seen_picture(bundle.text, RULES, config, picture(1))
    assert isinstance(seen, Seen)
    assert seen.interleave == 2
    cond = encode_prompts(bundle.text, bundle.model, ["a red circle"], seen=seen)
    plain = bundle.text.encode_with_image(["a red circle"], picture(1), interleave=2)
    num = cond.context.shape[1]
    assert torch.equal(cond.context, plain.context[:, :num])
    assert plain.context.shape[1] == 4 // 2 + 252
    assert seen.black().image.shape == seen.image.shape
    assert not seen.black().image.any()
    assert seen_picture(bundle.text, RULES, NetworkConfig(), picture(1)) is None
    assert seen_picture(bundle.text, RULES, config, None) is None


def rendered(folder: Path, out: Path, *more: str) -> dict[str, dict[str, Any]]:
    """The workflow that ran, by title."""
    options = ["--image", IMAGE, "--frames", "9", "--size", "32x32", "--steps", "1", "-q", *more]
    assert main(["generate", "a red circle", "--model", str(folder), "-o", str(out), *options]) == 0
    prompt = json.loads(read_metadata(out)["prompt"])
    return {node["_meta"]["title"]: node["inputs"] | {"id": node_id} for node_id, node in prompt.items()}


def test_the_command_line_shows_the_image_to_the_prompt(seeing: Path, blind: Path, tmp_path: Path) -> None:
    one = rendered(seeing, tmp_path / "a.mp4")
    assert one["Prompt"]["image"] == [one["First Frame"]["id"], 0]
    assert one["Prompt"]["image_interleave"] == 2
    assert "image" not in one["Negative Prompt"]
    two = rendered(seeing, tmp_path / "b.mp4", "--cfg", "2")
    assert two["Prompt"]["image"] == [two["First Frame"]["id"], 0]
    assert two["Negative Prompt"]["image"] == [two["Black Image"]["id"], 0]
    assert "image" not in rendered(blind, tmp_path / "c.mp4")["Prompt"]


def test_the_method_is_named_where_the_file_does_not_say_it(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    said = rendered(tiny_bundle_dir, tmp_path / "a.mp4", "--method", "token_replace")
    assert said["Image to Video"]["method"] == "token_replace"
    assert "image" not in said["Prompt"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "token_replace"], "There is no image"),
        (["--image", IMAGE, "--method", "token_place"], 'did you mean "token_replace"'),
    ],
)
def test_a_method_that_cannot_be_is_refused(
    options: list[str], words: str, tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "x", "--model", str(tiny_bundle_dir), "-o", str(tmp_path / "a.mp4"), *options]) == 1
    assert words in capsys.readouterr().err


def test_v1_is_not_told_to_replace(seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--image", IMAGE, "--method", "token_replace", "--frames", "9", "--size", "32x32"]
    assert main(["generate", "x", "--model", str(seeing), "-o", str(tmp_path / "a.mp4"), *options]) == 1
    assert "channels of its own" in capsys.readouterr().err
