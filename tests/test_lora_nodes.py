"""LoRAs from the outside: on a model, in a saved run, on a node, on the command line, under inspect."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vidgen.headless.cli import main, parse_lora
from vidgen.nodes import host as hosts
from vidgen.nodes.loaders import LoadAll
from vidgen.nodes.lora import MODES, ApplyLora
from vidgen.vidgen_core import lora as core_lora
from vidgen.vidgen_core.errors import Cancelled, CheckpointError, FileError, SettingsError
from vidgen.vidgen_core.generate import Sampling, load_bundle, sample_latents
from vidgen.vidgen_core.lora import BlockStrengths
from vidgen.vidgen_core.media import read_metadata, read_video
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.weights.lora import read_lora

WIDTH, CHANNELS = 32, 16
SHAPE = (1, CHANNELS, 2, 4, 4)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


QKV, FUSED = "double_blocks.0.img_attn_qkv", "single_blocks.0.linear1"
TENSORS = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": randn(4, WIDTH),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": randn(3 * WIDTH, 4),
    "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(4.0),
    "lora_unet_single_blocks_0_linear1.lora_down.weight": randn(4, WIDTH, seed=2),
    "lora_unet_single_blocks_0_linear1.lora_up.weight": randn(7 * WIDTH, 4, seed=2),
    "lora_unet_single_blocks_0_linear1.alpha": torch.tensor(4.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Laid out as ComfyUI's models folder."""
    loras = tmp_path_factory.mktemp("models") / "loras"
    (loras / "styles").mkdir(parents=True)
    save_file(TENSORS, loras / "styles" / "a.safetensors", {"modelspec.architecture": "hunyuan-video/lora"})
    other = {name: 0.5 * t if "up" in name else t for name, t in TENSORS.items()}
    save_file(other, loras / "b.safetensors")
    foreign = {f"transformer.transformer_blocks.0.attn1.to_q.lora_{w}.weight": randn(4, 4) for w in "AB"}
    save_file(foreign, loras / "cog.safetensors")
    text = {f"lora_te_x.lora_{which}.weight": randn(4, 4) for which in ("down", "up")}
    save_file(TENSORS | text, loras / "half.safetensors")
    return loras.parent


@pytest.fixture(scope="module")
def style(folder: Path) -> Path:
    return folder / "loras" / "styles" / "a.safetensors"


@pytest.fixture
def model(tiny_bundle_dir: Path) -> VideoModel:
    return load_bundle(tiny_bundle_dir, device="cpu").model


def conditioning(model: VideoModel, **fields: Any) -> Conditioning:
    return Conditioning(context=randn(1, 5, WIDTH), pooled=randn(1, WIDTH), **fields)


def sampled(model: VideoModel, **settings: Any) -> Tensor:
    options: dict[str, Any] = {"num_steps": 2, "cfg": 1.0, "seed": 3} | settings
    return sample_latents(model, conditioning(model), None, SHAPE, Sampling(**options))


def merged_by_hand(model: VideoModel, strength: float) -> VideoModel:
    other = copy.deepcopy(model)
    for module, stem in ((QKV, "double_blocks_0_img_attn_qkv"), (FUSED, "single_blocks_0_linear1")):
        down, up = (TENSORS[f"lora_unet_{stem}.lora_{w}.weight"] for w in ("down", "up"))
        weight = other.network.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        weight.data = weight.data + strength * up @ down
    return other


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- a model with LoRAs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_sampling_is_that_of_merged_weights_and_the_model_stays_as_it_was(
    mode: Any, model: VideoModel, style: Path
) -> None:
    stored = {name: (tensor, tensor.clone()) for name, tensor in model.network.named_parameters()}
    plain = sampled(model)
    with_lora = model.with_lora(read_lora(style), 0.8, mode=mode)
    assert with_lora.network is model.network
    assert model.loras == ()
    assert torch.equal(sampled(model), plain)
    result = sampled(with_lora)
    assert relative(result, plain) > 1e-3
    # Two steps of a network whose layers each round once more.
    assert relative(result, sampled(merged_by_hand(model, 0.8))) < 1e-5
    assert torch.equal(sampled(model), plain)
    for name, parameter in model.network.named_parameters():
        assert parameter is stored[name][0]
        assert torch.equal(parameter, stored[name][1])


def test_two_in_a_row_add_up(model: VideoModel, style: Path, folder: Path) -> None:
    first, second = read_lora(style), read_lora(folder / "loras" / "b.safetensors")
    one_way = sampled(model.with_lora(first, 0.4).with_lora(second, 0.6))
    other_way = sampled(model.with_lora(second, 0.6).with_lora(first, 0.4))
    assert relative(one_way, other_way) < 1e-5
    assert relative(one_way, sampled(merged_by_hand(model, 0.4 + 0.3))) < 1e-5


def test_a_failed_or_cancelled_run_leaves_the_model_as_it_was(model: VideoModel, style: Path) -> None:
    plain = sampled(model)
    host = LocalHost()
    host.on_progress = lambda what, done, total: host.cancel() if done else None
    modes: tuple[Any, ...] = ("runtime", "merge")
    for mode in modes:
        host.cancelled.clear()
        with_lora = model.with_lora(read_lora(style), mode=mode)
        with pytest.raises(Cancelled):
            sample_latents(with_lora, conditioning(model), None, SHAPE, Sampling(num_steps=2, cfg=1.0), host=host)
        assert torch.equal(sampled(model), plain)


def test_a_control_lora_reads_more_channels(model: VideoModel, tmp_path: Path) -> None:
    wide = randn(WIDTH, 2 * CHANNELS, 1, 2, 2)
    save_file({"diffusion_model.img_in.proj.diff": wide}, tmp_path / "control.safetensors")
    control = model.with_lora(read_lora(tmp_path / "control.safetensors"), 0.5)
    assert (control.config.in_channels, model.config.in_channels) == (2 * CHANNELS, CHANNELS)
    settings = Sampling(num_steps=2, cfg=1.0, seed=3)
    plain = sampled(model)

    def run(signal: Tensor) -> Tensor:
        return sample_latents(control, conditioning(model, concat=signal), None, SHAPE, settings)

    weight = model.network.get_submodule("img_in.proj").weight
    assert isinstance(weight, Tensor)
    by_hand = copy.deepcopy(model)
    by_hand.network.get_submodule("img_in.proj").weight.data += 0.5 * wide[:, :CHANNELS]  # type: ignore[union-attr, operator]
    # A control signal of zeros leaves what the first channels say, any other shows.
    assert relative(run(torch.zeros(SHAPE)), sampled(by_hand)) < 1e-5
    assert relative(run(randn(*SHAPE)), sampled(by_hand)) > 1e-3
    with pytest.raises(SettingsError, match=r"32 channels"):
        sampled(control)
    off = model.with_lora(read_lora(tmp_path / "control.safetensors"), 0.0)
    assert torch.equal(sampled(off), plain)
    assert torch.equal(sampled(model), plain)
    assert model.network.config is model.config


def test_what_was_found_is_logged(
    model: VideoModel, folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO, logger="vidgen"):
        model.with_lora(read_lora(folder / "loras" / "half.safetensors"))
    told, warned = caplog.messages
    assert told == "half.safetensors: kohya, native names, 2 modules, rank 4, alpha 4"
    assert "2 of 8 keys belong to no module of HunyuanVideo" in warned
    assert "lora_te_x.lora_down.weight" in warned
    caplog.clear()
    # Flux has blocks of the same names and the same size.
    save_file(TENSORS, tmp_path / "flux.safetensors", {"modelspec.architecture": "flux-1-dev/lora"})
    model.with_lora(read_lora(tmp_path / "flux.safetensors"))
    assert "made for flux-1-dev/lora, not HunyuanVideo" in caplog.text


# --- saved runs -------------------------------------------------------------------------------------------------------


def stopped(model: VideoModel, path: Path) -> None:
    host = LocalHost()
    host.on_progress = lambda what, done, total: host.cancel() if done == 1 else None
    settings = Sampling(num_steps=3, cfg=1.0, seed=3, resume_path=path)
    with pytest.raises(Cancelled):
        sample_latents(model, conditioning(model), None, SHAPE, settings, host=host)
    assert path.exists()


def test_a_stopped_run_goes_on_with_its_loras_only(model: VideoModel, style: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with_lora = model.with_lora(read_lora(style), 0.8)
    whole = sampled(with_lora, num_steps=3)
    for other in (
        model,
        model.with_lora(read_lora(style), 0.7),
        model.with_lora(read_lora(style), 0.8, blocks=BlockStrengths.parse("double only")),
        with_lora.with_lora(read_lora(style), 0.1),
    ):
        stopped(with_lora, path)
        with pytest.raises(SettingsError, match="another LoRAs"):
            sampled(other, num_steps=3, resume_path=path)
        assert torch.equal(sampled(with_lora, num_steps=3, resume_path=path), whole)
        path.unlink()


def test_a_run_kept_before_there_were_loras_goes_on(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidgen.vidgen_core.resume import RunFile

    path = tmp_path / "run"
    whole = sampled(model, num_steps=3)
    init = RunFile.__init__

    def without(self: RunFile, path: Path, identity: Any, *, writes: bool = True) -> None:
        init(self, path, {key: value for key, value in identity.items() if key != "LoRAs"}, writes=writes)

    with monkeypatch.context() as patch:
        patch.setattr(RunFile, "__init__", without)
        stopped(model, path)
    assert torch.equal(sampled(model, num_steps=3, resume_path=path), whole)


# --- the node ---------------------------------------------------------------------------------------------------------


def test_the_node_lists_and_finds_loras(folder: Path, model: VideoModel) -> None:
    with hosts.using(hosts.LocalNodeHost(folders=[folder])):
        names = ApplyLora.INPUT_TYPES()["required"]["lora_name"][0]
        bundled = hosts.bundled_names("lora")
        assert names[: len(bundled)] == bundled
        assert names[len(bundled) :] == ["b.safetensors", "cog.safetensors", "half.safetensors", "styles/a.safetensors"]
        assert ApplyLora.VALIDATE_INPUTS("styles/a.safetensors") is True
        assert "c.safetensors" in str(ApplyLora.VALIDATE_INPUTS("c.safetensors"))
        outside = "../" + folder.name + "/loras/b.safetensors"
        assert outside in str(ApplyLora.VALIDATE_INPUTS(outside))
        (once,) = ApplyLora().apply(model, "styles/a.safetensors", 0.4, "auto", "")
        (twice,) = ApplyLora().apply(once, "b.safetensors", 0.6, "merge", "double_blocks only")
    assert [use.strength for use in twice.loras] == [0.4, 0.6]
    assert [use.mode for use in twice.loras] == ["auto", "merge"]
    assert [use.lora.report.name for use in twice.loras] == ["a.safetensors", "b.safetensors"]
    assert twice.loras[1].blocks.of(FUSED) == 0.0
    assert (len(once.loras), len(model.loras)) == (1, 0)


def test_the_modes_are_those_of_the_core() -> None:
    assert list(core_lora.MODES) == MODES


@pytest.mark.parametrize(
    ("name", "strength", "blocks", "error", "words"),
    [
        ("cog.safetensors", 1.0, "", CheckpointError, "CogVideoX"),
        ("missing.safetensors", 1.0, "", FileError, "missing"),
        ("b.safetensors", float("nan"), "", SettingsError, "nan"),
        ("b.safetensors", 1.0, "triple: 1", SettingsError, "triple"),
        ("b.safetensors", 1.0, "double", SettingsError, "PATTERN: NUMBER"),
    ],
)
def test_the_node_refuses_before_anything_is_sampled(
    folder: Path, model: VideoModel, name: str, strength: float, blocks: str, error: type, words: str
) -> None:
    with hosts.using(hosts.LocalNodeHost(folders=[folder])), pytest.raises(error, match=words):
        ApplyLora().apply(model, name, strength, "auto", blocks)


def test_a_lora_for_a_larger_model_is_refused(model: VideoModel, tmp_path: Path) -> None:
    """As one for the published network, put on the small one in the box."""
    stem = "transformer.double_blocks.0.img_attn_qkv"
    published = {f"{stem}.lora_A.weight": torch.ones(1, 3072), f"{stem}.lora_B.weight": torch.ones(9216, 1)}
    save_file(published, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"another size.*\(9216, 3072\).*\(96, 32\)"):
        model.with_lora(read_lora(tmp_path / "a.safetensors"))


def test_a_lora_in_the_loader_of_networks(style: Path) -> None:
    from vidgen.nodes.loaders import LoadModel

    with pytest.raises(CheckpointError, match="LoRA"):
        LoadModel().load(str(style), "auto")


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1", ("a.safetensors", -1.0)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
        ("C:\\a.safetensors:2", ("C:\\a.safetensors", 2.0)),
        (":2", (":2", 1.0)),
    ],
)
def test_file_and_strength(text: str, expected: tuple[str, float]) -> None:
    assert parse_lora(text) == expected


def generate(bundle: Path, out: Path, *options: str) -> int:
    words = ["--model", str(bundle), "--steps", "2", "--frames", "5", "--cfg", "1", "-q"]
    return main(["generate", "a red star", *words, "-o", str(out), *options])


def test_generate_with_loras(tiny_bundle_dir: Path, folder: Path, style: Path, tmp_path: Path) -> None:
    outs = {name: tmp_path / f"{name}.mp4" for name in ("plain", "two", "off")}
    assert generate(tiny_bundle_dir, outs["plain"]) == 0
    two = ("--models", str(folder), "--lora", f"{style}:0.8", "--lora", "b.safetensors:-0.5")
    assert generate(tiny_bundle_dir, outs["two"], *two) == 0
    assert generate(tiny_bundle_dir, outs["off"], "--lora", f"{style}:0") == 0
    frames = {name: read_video(out)[0] for name, out in outs.items()}
    assert (frames["plain"] == frames["off"]).all()
    assert (frames["plain"] != frames["two"]).any()
    prompt = json.loads(read_metadata(outs["two"])["prompt"])
    nodes = [node["inputs"] for node in prompt.values() if node["class_type"] == "VidGenApplyLora"]
    assert [(node["lora_name"], node["strength"]) for node in nodes] == [(str(style), 0.8), ("b.safetensors", -0.5)]
    assert prompt["5"]["inputs"]["model"][0] not in ("1", prompt["5"]["inputs"]["latent"][0])


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("cog.safetensors", ["Nothing in this LoRA", "CogVideoX"]),
        ("missing.safetensors", ["lora", "missing.safetensors"]),
        ("b.safetensors:nan", ["strength", "nan"]),
        ("b.safetensors:much", ["b.safetensors:much"]),
        ("../loras/b.safetensors", ["../loras/b.safetensors"]),
    ],
)
def test_a_lora_that_cannot_be_used_is_told_before_any_weights_are_read(
    tiny_bundle_dir: Path,
    folder: Path,
    tmp_path: Path,
    lora: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LoadAll, "load", lambda *_: pytest.fail("the model was loaded"))
    assert generate(tiny_bundle_dir, tmp_path / "a.mp4", "--models", str(folder), "--lora", lora) == 1
    said = capsys.readouterr().err
    assert said.startswith("vidgen: ")
    assert all(word in said for word in words), said
    assert list(tmp_path.iterdir()) == []


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_lora_is(style: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(style)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "  LoRA for HunyuanVideo: kohya, native names",
        "  changes 2 modules, rank 4, alpha 4",
        "  made for: hunyuan-video/lora",
    ]
    assert main(["inspect", "--json", str(folder / "loras" / "half.safetensors")]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["family"], info["num_modules"], info["num_tensors"]) == ("LoRA", "hunyuan", 2, 8)
    assert len(info["unmatched"]) == 2
    assert main(["inspect", str(folder / "loras" / "cog.safetensors")]) == 0
    assert "LoRA for CogVideoX" in capsys.readouterr().out


def test_inspect_of_a_broken_lora(style: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(style, tmp_path / "a.safetensors")
    tensors = dict(TENSORS)
    del tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    save_file(tensors, tmp_path / "a.safetensors")
    assert main(["inspect", str(tmp_path / "a.safetensors")]) == 1
    assert "without up" in capsys.readouterr().err


def test_the_model_is_a_plain_record(model: VideoModel, style: Path) -> None:
    """Another model may be made of one with LoRAs; it keeps them."""
    with_lora = model.with_lora(read_lora(style))
    assert replace(with_lora, fingerprint="x").loras == with_lora.loras
