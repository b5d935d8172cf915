"""What a user gets who says nothing: each variant's own sampler, steps, guidance, size and frame rate, from the nodes
and from the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vidgen
from vidgen.headless.cli import _parser, generate_prompt, main
from vidgen.headless.plan import wish
from vidgen.headless.render import shipped
from vidgen.nodes.loaders import LoadAll
from vidgen.nodes.sampling import Sampler
from vidgen.nodes.wires import EncodedPrompt
from vidgen.vidgen_core import generate
from vidgen.vidgen_core.bundle import find_parts
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.cogvideox.config import NetworkConfig
from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer
from vidgen.vidgen_core.keyframes import Keyframe
from vidgen.vidgen_core.media import read_video
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.text.features import TextFeatures
from vidgen.vidgen_core.types import VideoShape
from vidgen.vidgen_core.weights.save import save_checkpoint

DDIM, DPM = ("ddim", "constant"), ("cogvideox_dpm", "dynamic")
PUBLISHED = {
    # sampler and curve of cfg, (width, height, frames, fps)
    "2b": (DDIM, (720, 480, 49, 8)),
    "5b": (DPM, (720, 480, 49, 8)),
    "5b_i2v": (DPM, (720, 480, 49, 8)),
    "1.5": (DPM, (1360, 768, 81, 16)),
    "1.5_i2v": (DPM, (1360, 768, 81, 16)),
    "fun_2b": (DDIM, (672, 384, 49, 8)),
    "fun_5b": (DDIM, (672, 384, 49, 8)),
    "fun_1.5": (DDIM, (672, 384, 81, 8)),
}
TINY = NetworkConfig(
    hidden_size=48, num_heads=3, num_layers=1, text_width=32, text_length=8, time_width=16, trained_grid=(13, 30, 45),
    rope_axes=(4, 6, 6),
)  # fmt: skip
LATER = replace(TINY, patch=(2, 2, 2), trained_grid=(11, 150, 150), rope_fit="slice")
NETWORKS = {
    "2b": replace(TINY, positions="sincos", snr_shift=3.0),
    "5b": TINY,
    "5b_i2v": replace(TINY, in_channels=32, positions="learned"),
    "1.5": LATER,
    "1.5_i2v": replace(LATER, in_channels=32, offset_embed=True, image_scale=2.0),
    "fun_2b": replace(TINY, in_channels=33, positions="sincos", sincos_fit="stretch"),
    "fun_5b": replace(TINY, in_channels=33),
    "fun_1.5": replace(LATER, in_channels=33),
}
"""the published kinds of network, small; nothing is computed with them"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_widgets_at_zero_and_auto(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Sampler hands on what the network's authors recommend."""
    config, (sampler, cfg_schedule) = NETWORKS[name], PUBLISHED[name][0]
    with torch.device("meta"):
        network = CogVideoXTransformer(config)
    model = VideoModel.of("cogvideox", config, network.to_empty(device="cpu"))
    asked: list[generate.Sampling] = []

    def sample_latents(model: VideoModel, positive: Any, negative: Any, shape: Any, settings: Any, **_: Any) -> Any:
        asked.append(settings.resolved(model.defaults))
        settings.resolved(model.defaults).check(model.diffusion)
        return torch.zeros(*shape)

    monkeypatch.setattr(generate, "sample_latents", sample_latents)
    features = TextFeatures(
        context=torch.zeros(1, 8, 32), context_mask=torch.ones(1, 8, dtype=torch.bool), pooled=torch.zeros(1, 0)
    )
    prompt = EncodedPrompt(prompt="a red star", features=features, text_config=None)
    widgets = dict.fromkeys(("seed", "steps"), 0) | dict.fromkeys(("cfg", "guidance", "shift"), 0.0)
    latent = {"samples": torch.zeros(1, 16, 3, 4, 4)}
    Sampler().sample(
        model, prompt, latent, **widgets, sampler="auto", schedule="auto", denoise=1.0, negative=prompt,
        cfg_schedule="auto",
    )  # fmt: skip
    (got,) = asked
    assert (got.sampler, got.cfg_schedule) == (sampler, cfg_schedule)
    assert (got.num_steps, got.cfg, got.schedule, got.shift) == (50, 6.0, "trailing", 1.0)


@pytest.fixture(scope="module")
def folder_of(cogvideox_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model whose network says nothing of its defaults, with a VAE and a T5."""

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name.replace(".", "_"))
        state = CogVideoXTransformer(NETWORKS[name]).state_dict()
        path = folder / "network.safetensors"
        save_checkpoint(path, state, family="cogvideox", part="network", config=NETWORKS[name], metadata={})
        for file in ("vae/cogvideox_vae_bf16", "text_encoders/t5xxl_fp16"):
            (folder / f"{Path(file).name}.safetensors").symlink_to(cogvideox_models / f"{file}.safetensors")
        return folder

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_command_line_without_options(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Size, length and frame rate are the network's; the rest is left to the Sampler."""
    words = ["generate", "a red star", "--model", str(folder_of(name)), "-o", str(tmp_path / "a.mp4")]
    words += ["--image", "vidgen-first-frame.png"] if "i2v" in name else []
    prompt = generate_prompt(_parser().parse_args(words), vidgen.NODE_CLASS_MAPPINGS)
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    size = nodes["VidGenImageToVideo" if "i2v" in name else "VidGenEmptyLatent"]
    assert (size["width"], size["height"], size["num_frames"]) == PUBLISHED[name][1][:3]
    assert nodes["VidGenSaveVideo"]["fps"] == PUBLISHED[name][1][3]
    sampler = nodes["VidGenSampler"]
    assert {sampler[widget] for widget in ("sampler", "schedule", "cfg_schedule")} == {"auto"}
    assert {sampler[widget] for widget in ("steps", "cfg", "guidance", "shift")} == {0}
    assert "negative" in sampler


@pytest.mark.parametrize(
    "image", [[], ["--image", "vidgen-first-frame.png", "--method", "noisy"]], ids=["text", "image"]
)
def test_the_command_line_fills_in(image: list[str], cogvideox_models: Path, tmp_path: Path) -> None:
    """CogVideoX-Fun goes on from a picture, or from none."""
    folder, out = cogvideox_models / "CogVideoX-Fun-V1.1-5b-InP", tmp_path / "a.mp4"
    small = ["--size", "32x32", "--frames", "9", "--steps", "1"]
    assert main(["generate", "a red star", "--model", str(folder), "-o", str(out), "-q", *small, *image]) == 0
    assert read_video(out)[0].shape == (9, 32, 32, 3)


def test_a_diffusers_folder_says_what_its_tensors_do_not(cogvideox_models: Path) -> None:
    """The scale of 2B's VAE and the noise of Fun 1.1 stand in a config.json beside a single file."""
    loaded = {}
    for name in ("CogVideoX-2b", "CogVideoX-5b", "CogVideoX-Fun-V1.1-5b-InP"):
        model, vae, _ = LoadAll().load(str(cogvideox_models / name), "auto")
        loaded[name] = SimpleNamespace(network=model.config, scale=vae.config.scaling_factor)
    two, five, fun = loaded.values()
    assert [one.scale for one in (two, five, fun)] == [1.15258426, 0.7, 0.7]
    assert [one.network.positions for one in (two, five, fun)] == ["sincos", "rope", "rope"]
    assert [one.network.snr_shift for one in (two, five, fun)] == [3.0, 1.0, 1.0]
    assert [one.network.image_noise for one in (two, five, fun)] == [0.0, 0.0, 0.0563]
    assert [one.network.fills_in for one in (two, five, fun)] == [False, False, True]


def test_a_plan_counts_all_frames_that_are_encoded(cogvideox_models: Path) -> None:
    """A network that fills in is told its two pictures as a video."""
    parts = find_parts(cogvideox_models / "CogVideoX-Fun-V1.1-5b-InP")
    assert wish(shipped("cogvideox_fun_interpolation"), *parts).encodes_frames == 49
    assert wish(shipped("cogvideox_5b_t2v"), *parts).encodes_frames == 0
    assert wish(shipped("cogvideox_5b_i2v"), *find_parts(cogvideox_models / "CogVideoX-5b")).encodes_frames == 1


def test_python_goes_from_one_picture_to_another(cogvideox_models: Path) -> None:
    bundle = generate.load_bundle(cogvideox_models / "CogVideoX-Fun-V1.1-5b-InP")
    shape = VideoShape(num_frames=9, height_px=32, width_px=32)
    start, end = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = [[], [Keyframe(image=start)], [Keyframe(image=start), Keyframe(image=end, frame=-1)]]
    settings = generate.Sampling(num_steps=1)
    videos = [generate.generate(bundle, "a red star", shape, settings, keyframes=some) for some in given]
    assert all(video.shape == (1, 3, 9, 32, 32) for video in videos)
    assert len({video.sum().item() for video in videos}) == 3
    with pytest.raises(SettingsError, match="strength"):
        generate.generate(bundle, "a red star", shape, settings, keyframes=[Keyframe(image=start, strength=0.5)])
