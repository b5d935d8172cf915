"""The one place where networks are asked, and the loaders of each part."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.errors import CheckpointError
from vidgen.vidgen_core.model import (
    VideoModel,
    choose_dtype,
    denoiser,
    denoiser_pair,
    inspect_file,
    join,
    load_codec,
    load_network,
    load_text,
)
from vidgen.vidgen_core.types import Conditioning, Defaults
from vidgen.vidgen_core.weights.header import Header, TensorInfo, read_header
from vidgen.vidgen_core.weights.load import read_tensors
from vidgen.vidgen_core.weights.save import save_tensors

SHAPE = (2, 16, 3, 4, 4)


@pytest.fixture(scope="module")
def model(tiny_bundle_dir: Path) -> VideoModel:
    return load_network(tiny_bundle_dir / "network.safetensors")


def conditioning(*lengths: int, seed: int = 0) -> Conditioning:
    """One sample per length, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return Conditioning(
        context=torch.randn(len(lengths), longest, 32, generator=generator),
        context_mask=None if bool(mask.all()) else mask,
        pooled=torch.randn(len(lengths), 32, generator=generator),
    )


def rewritten(source: Path, target: Path, **metadata: str) -> Path:
    header = read_header(source)
    save_tensors(target, read_tensors(header), {**header.metadata, **metadata})
    return target


# --- asking -----------------------------------------------------------------------------------------------------------


def test_the_network_is_told_the_clock_and_its_flow_becomes_x0(model: VideoModel) -> None:
    x, cond, t = torch.randn(SHAPE), conditioning(3, 3), torch.tensor(0.25, dtype=torch.float64)
    flow = model.network(x, torch.full((2,), 250.0), cond.context, None, cond.pooled)
    assert torch.equal(model.predict(x, t, cond), flow)
    # x_t = (1 - t) x0 + t noise and flow = noise - x0, hence x0 = x_t - t flow; float32 rounding of one line
    assert torch.allclose(denoiser(model, cond)(x, t), x - 0.25 * flow, atol=1e-6, rtol=0)


def test_training_gets_gradients_through_the_same_method(model: VideoModel) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    model.predict(x, torch.rand(2), conditioning(3, 2)).square().mean().backward()
    assert x.grad.abs().sum() > 0


def test_the_answer_has_the_dtype_of_the_question(model: VideoModel) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert model.predict(x, torch.tensor(0.5), conditioning(3, 3)).dtype == torch.float64


def test_a_conditioning_of_one_serves_every_sample(model: VideoModel) -> None:
    x, t, one = torch.randn(SHAPE), torch.tensor(0.5), conditioning(3)
    twice = join(one, one)
    # a repeated tensor lies in memory differently and takes other kernels: float32 rounding
    assert torch.allclose(denoiser(model, one)(x, t), denoiser(model, twice)(x, t), atol=1e-5, rtol=0)


def count_forwards(model: VideoModel) -> tuple[list[int], object]:
    batches: list[int] = []
    return batches, model.network.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["x"])), with_kwargs=True
    )


def test_a_pair_asks_once_and_answers_as_two(model: VideoModel) -> None:
    x, t = torch.randn(SHAPE), torch.tensor(0.5, dtype=torch.float64)
    cond, uncond = conditioning(5, 3), conditioning(1, seed=1)
    expected = denoiser(model, cond)(x, t), denoiser(model, uncond)(x, t)
    first, second = denoiser_pair(model, cond, uncond)
    batches, hook = count_forwards(model)
    got = first(x, t), second(x, t)
    hook.remove()
    assert batches == [4]
    # another batch size and padding: other kernels, so float32 rounding and no more
    assert all(torch.allclose(a, b, atol=1e-5, rtol=0) for a, b in zip(got, expected, strict=True))


def test_a_pair_answers_afresh_for_another_question_and_saves_work_where_one_is_enough(model: VideoModel) -> None:
    x, early, late = torch.randn(SHAPE), torch.tensor(0.9), torch.tensor(0.1)
    cond, uncond = conditioning(3), conditioning(2, seed=1)
    first, second = denoiser_pair(model, cond, uncond, both_at=lambda t: t > 0.5)
    first(x, early)
    batches, hook = count_forwards(model)
    assert torch.equal(second(x, late), denoiser(model, uncond)(x, late))
    assert torch.equal(first(x, late), denoiser(model, cond)(x, late))
    hook.remove()
    assert set(batches) == {2}


def test_joining_pads_masks_and_can_be_undone() -> None:
    parts = conditioning(3), conditioning(5, seed=1), conditioning(2, seed=2)
    both = join(*parts)
    assert both.context.shape == (3, 5, 32)
    assert both.context_mask.sum(dim=1).tolist() == [3, 5, 2]
    for index, part in enumerate(parts):
        again = both.take(slice(index, index + 1))
        assert again.context_mask is None
        assert torch.equal(again.context, part.context)
        assert torch.equal(again.pooled, part.pooled)


def test_joining_equal_lengths_needs_no_mask() -> None:
    assert join(conditioning(3), conditioning(3, seed=1)).context_mask is None


# --- loading ----------------------------------------------------------------------------------------------------------


def test_each_loader_takes_its_part_only(tiny_bundle_dir: Path) -> None:
    network, vae, text = (tiny_bundle_dir / f"{name}.safetensors" for name in ("network", "vae", "text"))
    with pytest.raises(CheckpointError, match="is a VAE, not a diffusion network"):
        load_network(vae)
    with pytest.raises(CheckpointError, match="is a diffusion network, not a VAE"):
        load_codec(network)
    with pytest.raises(CheckpointError, match="is a VAE, not a text encoder"):
        load_text(vae)
    assert load_codec(vae).grid.channels == 16
    assert load_text(text).encode(["a red star"]).context.shape[0] == 1


def test_defaults_travel_with_the_network(tiny_bundle_dir: Path, tmp_path: Path, model: VideoModel) -> None:
    assert (model.defaults.num_frames, model.defaults.cfg) == (9, 2.0)
    source = tiny_bundle_dir / "network.safetensors"
    other = rewritten(source, tmp_path / "a.safetensors", **{"vidgen.defaults": '{"num_step": 3}'})
    with pytest.raises(CheckpointError, match="did you mean 'num_steps'"):
        load_network(other)
    wanted = replace(Defaults(), fps=30)
    other = rewritten(source, tmp_path / "b.safetensors", **{"vidgen.defaults": json.dumps(asdict(wanted))})
    assert load_network(other).defaults == wanted


def test_a_checkpoint_brings_its_preview(model: VideoModel, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    assert model.preview is not None
    assert model.preview.frames(torch.randn(SHAPE)).shape == (3, 4, 4, 3)
    source = tiny_bundle_dir / "network.safetensors"
    with pytest.raises(CheckpointError, match="preview matrix"):
        load_network(rewritten(source, tmp_path / "a.safetensors", **{"vidgen.preview": '{"weight": [1]}'}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_half_precision_files_compute_in_float32_on_a_cpu_unless_told_otherwise(
    tiny_bundle_dir: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    header = read_header(tiny_bundle_dir / "network.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in read_tensors(header).items()}
    save_tensors(tmp_path / "half.safetensors", half, header.metadata)
    model = load_network(tmp_path / "half.safetensors", dtype=dtype)
    assert {p.dtype for p in model.network.parameters()} == {dtype or torch.float32}
    x0 = denoiser(model, conditioning(3))(torch.randn(SHAPE), torch.tensor(0.5))
    assert x0.dtype == torch.float32
    assert bool(x0.isfinite().all())


@pytest.mark.parametrize(
    ("dtype", "num", "device", "chosen"),
    [
        (torch.float16, 1e6, "cpu", torch.float32),
        (torch.float16, 1e6, "cuda", torch.float32),
        (torch.bfloat16, 13e9, "cuda", None),
        (torch.bfloat16, 1e15, "cpu", None),
        (torch.float8_e4m3fn, 13e9, "cuda", torch.bfloat16),
        (torch.float32, 13e9, "cuda", None),
    ],
)
def test_the_dtype_follows_size_and_device(
    dtype: torch.dtype, num: float, device: str, chosen: torch.dtype | None
) -> None:
    tensors = {"w": TensorInfo((int(num),), dtype)}
    header = Header(path=Path("x"), tensors=tensors, metadata={}, num_bytes=1, digest="")
    assert choose_dtype(header, torch.device(device)) == chosen


def test_a_foreign_layout_loads_to_the_same_network(tmp_path: Path) -> None:
    """Without our metadata the rotary axes follow from the head's width, so a head of the published proportions."""
    from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
    from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS
    from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer

    config = NetworkConfig(
        hidden_size=32,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=1,
        rope_axes=(4, 6, 6),
        text_width=32,
        pooled_width=32,
        guidance_embed=False,
    )
    native = HunyuanVideoTransformer(config).eval()
    save_tensors(tmp_path / "foreign.safetensors", LAYOUTS["diffusers"].to_foreign(native.state_dict()))
    loaded = load_network(tmp_path / "foreign.safetensors")
    assert loaded.config == config
    assert all(torch.equal(a, b) for a, b in zip(native.parameters(), loaded.network.parameters(), strict=True))


def test_inspecting_reads_no_tensor_and_is_plain_data(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    shutil.copy(tiny_bundle_dir / "network.safetensors", path)
    info = inspect_file(path)
    assert info["title"] == "HunyuanVideo diffusion network"
    assert info["config"]["hidden_size"] == 32
    assert info["defaults"]["num_frames"] == 9
    assert info["dtypes"] == {"float32": info["num_parameters"]}
    assert json.loads(json.dumps(info))["fingerprint"] == read_header(path).digest
    text = inspect_file(tiny_bundle_dir / "text.safetensors")
    assert not any("tokenizer" in key for key in text["metadata"])


def test_the_fingerprint_follows_the_weights(tiny_bundle_dir: Path, tmp_path: Path, model: VideoModel) -> None:
    header = read_header(tiny_bundle_dir / "network.safetensors")
    tensors: dict[str, Tensor] = read_tensors(header)
    name = "final_layer.linear.bias"
    save_tensors(tmp_path / "other.safetensors", {**tensors, name: tensors[name] + 1}, header.metadata)
    assert load_network(tmp_path / "other.safetensors").fingerprint != model.fingerprint
