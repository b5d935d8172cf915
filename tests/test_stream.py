"""Blocks read from the file while the network runs: the same bits, two blocks of memory, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.memory.stream import BlockStream
from vidgen.vidgen_core.model import VideoModel, build_part, load_network, open_part
from vidgen.vidgen_core.types import Conditioning
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.load import load_module
from vidgen.vidgen_core.weights.quantise import QuantisedLinear

CONFIG = NetworkConfig(
    hidden_size=32,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=3,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=32,
    pooled_width=32,
)
PREFIXES = {"comfy": "model.model.", "prefixed": "model.diffusion_model."}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = HunyuanVideoTransformer(CONFIG)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def in_layout(weights: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    if layout == "native":
        return weights
    return {PREFIXES.get(layout, "") + name: t for name, t in LAYOUTS[layout].to_foreign(weights).items()}


def ask(model: VideoModel) -> Tensor:
    generator, device = torch.Generator().manual_seed(1), model.device
    cond = Conditioning(
        context=torch.randn(1, 5, 32, generator=generator).to(device),
        pooled=torch.randn(1, 32, generator=generator).to(device),
        scalars={"guidance": torch.tensor([6.0], device=device)},
    )
    with torch.no_grad():
        return model.predict(torch.randn(1, 16, 2, 4, 4, generator=generator).to(device), torch.tensor(0.5), cond)


def blocks_of(model: VideoModel) -> list[nn.Module]:
    return [block for path in model.family.blocks for block in model.network.get_submodule(path).children()]


def assert_empty(model: VideoModel) -> None:
    for block in blocks_of(model):
        assert all(tensor.is_meta for tensor in (*block.parameters(), *block.buffers()))


@pytest.mark.parametrize("layout", ["native", *LAYOUTS])
@pytest.mark.parametrize("kind", ["safetensors", "folder", "torch", "float8", "float8_scaled"])
def test_streamed_and_resident_answers_are_the_same_bits(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, layout: str, kind: str
) -> None:
    path = published(kind, tmp_path, in_layout(weights, layout))
    streamed = load_network(path, stream=True)
    assert_empty(streamed)
    expected = ask(load_network(path))
    assert torch.equal(ask(streamed), expected)
    assert torch.equal(ask(streamed), expected)
    assert_empty(streamed)


@pytest.mark.parametrize(("kind", "packing"), [("float8_map", ""), ("gguf", "Q8_0"), ("gguf", "Q4_0")])
def test_quantised_files_stream_too_and_stay_small(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, packing: str
) -> None:
    path = published(kind, tmp_path, weights, packing=packing)
    streamed = load_network(path, stream=True)
    small = [module for module in streamed.network.modules() if isinstance(module, QuantisedLinear)]
    assert len(small) >= 10 * CONFIG.num_double_blocks + 3 * CONFIG.num_single_blocks
    seen = []
    streamed.network.single_blocks[0].linear1.register_forward_pre_hook(
        lambda layer, args: seen.extend(layer.state_dict().values())
    )
    assert torch.equal(ask(streamed), ask(load_network(path)))
    assert {torch.float8_e4m3fn, torch.uint8} & {tensor.dtype for tensor in seen}
    assert_empty(streamed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_that_was_asked_for_holds_in_every_block(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    path = published("float8_scaled", tmp_path, weights)
    streamed, resident = (load_network(path, stream=stream, dtype=dtype) for stream in (True, False))
    assert not any(isinstance(module, QuantisedLinear) for module in streamed.network.modules())
    assert torch.equal(ask(streamed), ask(resident))


def test_a_failure_inside_a_block_or_between_two_leaves_nothing_behind(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_network(published("safetensors", tmp_path, weights), stream=True)
    expected = ask(model)

    def fail(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    for module in (model.network.single_blocks[1].linear2, model.network.single_blocks[0], model.network.final_layer):
        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            ask(model)
        hook.remove()
        assert_empty(model)
    assert torch.equal(ask(model), expected)


def test_only_the_running_block_and_the_next_one_are_in_memory(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_network(published("safetensors", tmp_path, weights), stream=True)
    full: list[int] = []

    def count(module: nn.Module, args: object) -> None:
        full.append(sum(not next(block.parameters()).is_meta for block in blocks_of(model)))

    for block in blocks_of(model):
        next(layer for layer in block.modules() if isinstance(layer, nn.Linear)).register_forward_pre_hook(count)
    ask(model)
    assert full == [1] * (CONFIG.num_double_blocks + CONFIG.num_single_blocks)


def test_blocks_are_read_in_another_thread_which_can_be_left_waiting() -> None:
    readers: list[tuple[int, str]] = []

    def read(number: int) -> dict[str, Tensor]:
        readers.append((number, threading.current_thread().name))
        return {"weight": torch.full((1, 1), float(number + 1))}

    with torch.device("meta"):
        blocks = [nn.Linear(1, 1, bias=False) for _ in range(3)]
    stream = BlockStream(blocks, read=read, finish=lambda number, tensors: tensors)
    stream.end_with([])
    x = torch.ones(1, 1)
    for block in blocks:
        x = block(x)
    assert x.item() == 6
    assert [number for number, _ in readers] == [0, 1, 2]
    assert all(name.startswith("vidgen-blocks") for _, name in readers)


def test_a_read_that_fails_is_raised_where_the_block_runs(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    from vidgen.vidgen_core.errors import CheckpointError

    path = published("safetensors", tmp_path, weights)
    model = load_network(path, stream=True)
    data = path.read_bytes()
    path.unlink()  # what is mapped keeps the old file
    path.write_bytes(data[:2000])
    with pytest.raises(CheckpointError, match="became shorter"):
        ask(model)
    assert_empty(model)


def test_lists_inside_a_submodule_stream_as_well(tmp_path: Path, published: Callable[..., Path]) -> None:
    """As a text encoder's: the module that runs the blocks is not the one that is loaded."""
    from vidgen.vidgen_core.text.dims import LlamaDims
    from vidgen.vidgen_core.text.llama import build_llama, llama_states

    dims = LlamaDims(vocab_size=11, hidden_size=16, num_layers=4, num_heads=2, num_kv_heads=1, intermediate_size=24)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = build_llama(dims)

    torch.manual_seed(0)
    path = published("safetensors", tmp_path, Stack().state_dict())
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)
    answers = []
    for stream in ((), ("llama.layers",)):
        stack = load_module(read_header(path), Stack, stream=stream)
        with torch.no_grad():
            answers.append(llama_states(stack.llama, ids, mask))
    assert torch.equal(*answers)
    assert all(tensor.is_meta for tensor in stack.llama.layers.parameters())


@pytest.mark.parametrize("is_full", [True, False])
def test_a_network_streams_by_itself_where_memory_is_short(
    published: Callable[..., Path],
    weights: dict[str, Tensor],
    tmp_path: Path,
    is_full: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = published("safetensors", tmp_path, weights)
    free = path.stat().st_size if is_full else 2 * path.stat().st_size
    monkeypatch.setattr("vidgen.vidgen_core.model.available_memory", lambda: free)
    with caplog.at_level("INFO", logger="vidgen"):
        model = load_network(path, stream=None)
    assert all(tensor.is_meta for block in blocks_of(model) for tensor in block.parameters()) == is_full
    assert ("read from the file as they run" in caplog.text) == is_full


def test_a_part_is_built_with_streams_of_choice(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    header, found = open_part(published("safetensors", tmp_path, weights), "network")
    network = build_part(header, found, stream=("single_blocks",))
    assert all(tensor.is_meta for tensor in network.single_blocks.parameters())
    assert not any(tensor.is_meta for tensor in network.double_blocks.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["safetensors", "float8_scaled", "gguf"])
def test_streaming_to_a_gpu(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    path = published(kind, tmp_path, weights)
    streamed, resident = (load_network(path, stream=stream, device="cuda") for stream in (True, False))
    assert torch.equal(ask(streamed), ask(resident))
