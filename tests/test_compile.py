"""torch.compile from outside: equal to eager, compiled once, and never a reason to fail.

Most tests run what the compiler traced as it is (see conftest.py): tracing and guards decide how often it compiles.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.headless.cli import main
from vidgen.nodes import compile as compile_node
from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.generate import Sampling, sample_latents
from vidgen.vidgen_core.health import find_suspect
from vidgen.vidgen_core.memory import compiled as compiling
from vidgen.vidgen_core.memory.cancel import is_compiled, watched
from vidgen.vidgen_core.memory.compiled import MODES, compiled, why_not
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.model import VideoModel, load_network, open_part
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.weights.load import load_module
from vidgen.vidgen_core.weights.lora import read_lora
from vidgen.vidgen_core.weights.quantise import QuantisedLinear

pytestmark = pytest.mark.usefixtures("nothing_compiled")

CONFIG = NetworkConfig(
    hidden_size=32,
    num_heads=2,
    num_double_blocks=0,  # one kind of block is traced in half the time; the command line's test has both
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=32,
    pooled_width=32,
    guidance_embed=False,
)
PATHS = ("double_blocks", "single_blocks")
FUSED = {"atol": 1e-5, "rtol": 1e-4}
"""of numbers about 1: the compiler adds and rounds in another order"""


def weights_of(config: NetworkConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = HunyuanVideoTransformer(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return weights_of(CONFIG)


@pytest.fixture(scope="module")
def both_kinds() -> dict[str, Tensor]:
    """Of a network that a file without metadata is recognised as."""
    return weights_of(replace(CONFIG, num_double_blocks=1, num_single_blocks=1))


@pytest.fixture
def model(weights: dict[str, Tensor]) -> VideoModel:
    network = HunyuanVideoTransformer(CONFIG).eval().requires_grad_(False)
    network.load_state_dict(weights)
    return VideoModel.of("hunyuan", CONFIG, network)


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(model: VideoModel, *, num_text: int = 5, frames: int = 2, num_steps: int = 2, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(num_text)
    cond = Conditioning(
        context=torch.randn(1, num_text, 32, generator=generator), pooled=torch.randn(1, 32, generator=generator)
    )
    settings = Sampling(num_steps=num_steps, cfg=1.0, seed=1)
    return sample_latents(model, cond, None, (1, 16, frames, 4, 4), settings, **options)


def is_untouched(model: VideoModel) -> bool:
    return not any("forward" in vars(module) for module in model.network.modules())


# --- compiled once ----------------------------------------------------------------------------------------------------


def test_no_step_prompt_or_seed_compiles_again(model: VideoModel) -> None:
    """One graph for each kind of block, whatever their number; all that follows finds it."""
    fast = model.with_compile()
    assert fast.will_compile
    result = run(fast, num_steps=1)
    assert num_graphs() == 1
    assert not fast.will_compile
    torch.testing.assert_close(result, run(model, num_steps=1), **FUSED)
    torch.testing.assert_close(run(fast, num_steps=3), run(model, num_steps=3), **FUSED)
    for num_text in (9, 17):
        torch.testing.assert_close(run(fast, num_text=num_text), run(model, num_text=num_text), **FUSED)
    assert num_graphs() == 1
    torch.testing.assert_close(run(fast, frames=3), run(model, frames=3), **FUSED)
    assert num_graphs() <= 2, "another size may cost one more, and no size after it"
    graphs = num_graphs()
    for frames in (4, 5):
        run(fast, frames=frames)
    assert num_graphs() == graphs
    assert is_untouched(model)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")), reason="needs a C++ compiler"
)
@pytest.mark.usefixtures("plain_loops")
def test_real_code_gives_the_same_numbers(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    blocks = model.network.single_blocks
    network = nn.Module()
    network.single_blocks = blocks
    assert isinstance(blocks, nn.ModuleList)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 13, 32, generator=generator)
    from vidgen.vidgen_core.families.hunyuan.network import _Context
    from vidgen.vidgen_core.nn.rope import rope_table

    vec = torch.randn(1, 1, 32, generator=generator)
    rope = rope_table((2, 2, 2), (4, 6, 6), 256.0, num_plain=5, device=x.device)
    context = _Context(vec=vec, frame_vec=vec, rope=rope, mask=None, num_video=8, grid=(2, 2, 2))
    with torch.inference_mode():
        expected = [block(x, context) for block in blocks]
        with compiled(network, ("single_blocks",)) as is_on:
            assert is_on
            results = [block(x, context) for block in blocks]
    assert num_graphs() == 1
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, **FUSED)
    assert compiling._failed == set()


# --- what stands around the blocks ------------------------------------------------------------------------------------


@pytest.fixture
def style(tmp_path: Path) -> Any:
    from safetensors.torch import save_file

    name, generator = "lora_unet_single_blocks_0_linear2", torch.Generator().manual_seed(4)
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 160, generator=generator),
        f"{name}.lora_up.weight": torch.randn(32, 4, generator=generator),
    }
    save_file(tensors, tmp_path / "style.safetensors")
    return read_lora(tmp_path / "style.safetensors")


def test_a_lora_is_merged_and_seen(model: VideoModel, style: Any) -> None:
    """Compiled without it first: the graph must not go on without it, nor with it when it is off again."""
    fast = model.with_compile()
    run(fast)
    graphs = num_graphs()
    with_lora = fast.with_lora(style, 0.5)
    expected = run(model.with_lora(style, 0.5))
    assert (expected - run(model)).abs().max() > 0.01
    torch.testing.assert_close(run(with_lora), expected, **FUSED)
    assert num_graphs() == graphs, "other weights are no other graph"
    torch.testing.assert_close(run(fast), run(model), **FUSED)
    assert is_untouched(model)


def test_a_lora_at_run_time_keeps_its_block_from_being_compiled(
    model: VideoModel, style: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fast = model.with_compile()
    run(fast)
    expected = run(model.with_lora(style, 0.5, mode="runtime"))
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        result = run(fast.with_lora(style, 0.5, mode="runtime"))
    assert "1 of 2 blocks are not compiled: a LoRA" in caplog.text
    torch.testing.assert_close(result, expected, **FUSED)


@pytest.mark.parametrize(("kind", "packing"), [("float8_scaled", ""), ("gguf", "Q8_0")])
def test_quantised_layers_are_compiled_or_run_as_they_are(
    published: Callable[..., Path], both_kinds: dict[str, Tensor], tmp_path: Path, kind: str, packing: str
) -> None:
    header, found = open_part(published(kind, tmp_path, both_kinds, packing=packing or "Q8_0"), "network")
    part = found.family.parts["network"]
    network = load_module(header, lambda: part.build(found.config, header.metadata), dtype=torch.float32)
    assert sum(isinstance(module, QuantisedLinear) for module in network.modules()) > 10
    model = VideoModel.of("hunyuan", found.config, network)
    expected = run(model, num_steps=1)
    torch.testing.assert_close(run(model.with_compile(), num_steps=1), expected, **FUSED)
    torch.testing.assert_close(run(model, num_steps=1), expected, atol=0, rtol=0)


def test_streamed_blocks_are_refused_with_a_note(
    published: Callable[..., Path], both_kinds: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_network(published("safetensors", tmp_path, both_kinds), stream=True)
    expected = run(model)
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        assert torch.equal(run(model.with_compile()), expected)
    assert "not compiled: the blocks are read from the file as they run" in caplog.text
    assert num_graphs() == 0
    assert torch.equal(run(model), expected), "streaming still stands around its blocks"


# --- what is missing --------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_runs_as_it_is(
    model: VideoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert torch.equal(run(model.with_compile()), run(model))
    assert "needs a C++ compiler" in caplog.text
    assert num_graphs() == 0


@pytest.mark.parametrize(
    ("capability", "dtype", "words"),
    [
        ((6, 1), torch.float16, "capability 7.0, this one has 6.1"),
        ((8, 0), torch.float8_e4m3fn, "float8 weights from compute capability 8.9 on, and this GPU has 8.0"),
        ((8, 0), torch.bfloat16, None),
        ((8, 9), torch.float8_e4m3fn, None),
        ((9, 0), torch.float8_e5m2, None),
    ],
)
def test_what_a_gpu_can_do_is_asked_first(
    capability: tuple[int, int], dtype: torch.dtype, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = nn.Module()
    block.register_buffer("stored", torch.zeros(2, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    reason = why_not([block], torch.device("cuda"))
    assert reason is None if words is None else words in str(reason)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton" in str(why_not([block], torch.device("cuda")))


def test_a_compiler_that_fails_is_asked_once(
    model: VideoModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def broken(graph: object, inputs: object) -> None:
        asked.append(1)
        raise ValueError("no such instruction")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        assert torch.equal(run(model.with_compile()), run(model))
        assert torch.equal(run(model.with_compile()), run(model))
    assert len(asked) == 1
    said = [record.message for record in caplog.records if "cannot be compiled" in record.message]
    assert len(said) == 1
    assert not model.with_compile().will_compile
    assert is_untouched(model)


def test_what_fails_besides_the_compiler_passes_through(model: VideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in a compiled block is answered by those who answer it everywhere."""

    def full(*inputs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(compiling, "BACKEND", lambda graph, inputs: full)
    fast, x = model.with_compile(), torch.randn(1, 16, 2, 4, 4)
    inputs = (x, torch.tensor([500.0]), torch.randn(1, 5, 32), None, torch.randn(1, 32))
    with fast.patched(), torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        fast.network(*inputs)
    assert compiling._failed == set()
    # Sampling answers it: attention in chunks, and for that the blocks run as they are.
    assert torch.equal(run(fast), run(model))


# --- with the rest ----------------------------------------------------------------------------------------------------


def test_a_compiled_block_is_asked_as_a_whole(model: VideoModel) -> None:
    network = model.network
    with compiled(network, PATHS), watched(LocalHost(run_on="cpu"), network):
        assert all(is_compiled(block) for path in PATHS for block in network.get_submodule(path))
        assert network.single_blocks[0]._forward_pre_hooks
        assert not network.single_blocks[0].linear1._forward_pre_hooks
        assert any(module._forward_pre_hooks for module in network.img_in.modules())


def test_a_compiled_block_that_gives_nan_is_told_from_its_plain_self(model: VideoModel) -> None:
    x = torch.randn(1, 16, 2, 4, 4)
    inputs = (x, torch.tensor([500.0]), torch.randn(1, 5, 32), None, torch.randn(1, 32))
    with compiled(model.network, PATHS), torch.inference_mode():
        found = find_suspect(model.network, lambda: model.network(*inputs), inputs={"x": x}, compiled=True)
    assert found.cause == "compile"
    assert num_graphs() == 0, "the search itself runs without"


def test_the_wait_is_announced(model: VideoModel) -> None:
    events: list[tuple[str, int, int]] = []
    host = LocalHost(run_on="cpu", on_progress=lambda *event: events.append(event))
    for _ in range(2):
        run(model.with_compile(), host=host)
    assert events.count(("compile", 0, 1)) == 1
    assert events[0] == ("compile", 0, 1)


def test_the_node_takes_the_cores_modes_and_leaves_its_input_alone(model: VideoModel) -> None:
    assert tuple(compile_node.MODES) == MODES
    (fast,) = compile_node.Compile().compile(model, MODES[1])
    assert fast.compile_mode == MODES[1]
    assert fast.network is model.network
    assert model.compile_mode is None
    with pytest.raises(SettingsError, match="mode of torch.compile"):
        model.with_compile("fastest")


def test_the_command_line_compiles(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    import json

    from vidgen.vidgen_core.media import read_metadata

    out = tmp_path / "a.mp4"
    options = ["--model", str(tiny_bundle_dir), "--compile", "--steps", "1", "--frames", "5", "-q", "-o", str(out)]
    assert main(["generate", "a red star", *options]) == 0
    prompt = json.loads(read_metadata(out)["prompt"])
    (node_id,) = [key for key, node in prompt.items() if node["class_type"] == "VidGenCompile"]
    assert next(n for n in prompt.values() if n["class_type"] == "VidGenSampler")["inputs"]["model"] == [node_id, 0]
    assert num_graphs() >= 1
