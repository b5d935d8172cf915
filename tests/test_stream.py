"""Blocks read from the file while the network runs: the same bits, two blocks of memory, nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.memory.stream import BlockStream, DeviceFeed, FileFeed, flat_bytes, powers_of_two, stream_of
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
    stream = BlockStream(blocks, FileFeed(read))
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
    monkeypatch.setattr("vidgen.vidgen_core.memory.plan.available_memory", lambda: free)
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


# --- a budget ---------------------------------------------------------------------------------------------------------


def full_blocks(model: VideoModel) -> list[bool]:
    return [not next(block.parameters()).is_meta for block in blocks_of(model)]


def with_budget(path: Path, monkeypatch: pytest.MonkeyPatch, share: float, **options: Any) -> VideoModel:
    """The network under a budget of this share of its weights, in a process that takes nothing itself."""
    monkeypatch.setattr("vidgen.vidgen_core.model.memory_in_use", lambda device: 0)
    monkeypatch.setattr("vidgen.vidgen_core.model.room_for_weights", lambda header, found, device, budget: budget)
    whole = load_network(path, **options).network.state_dict().values()
    return load_network(path, stream=None, budget=round(share * sum(t.nbytes for t in whole)), **options)


@pytest.fixture(scope="module")
def deep_weights() -> dict[str, Tensor]:
    """Of so many blocks that two of them are little beside all."""
    torch.manual_seed(0)
    network = HunyuanVideoTransformer(replace(CONFIG, num_single_blocks=16))
    return {name: torch.randn(tensor.shape).mul(0.1).bfloat16() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("share", [0.85, 0.95, 1.0])
@pytest.mark.parametrize("storage", ["auto", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_under_a_budget_some_blocks_stay_and_the_bits_are_the_same(
    published: Callable[..., Path],
    deep_weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    storage: str,
    layout: str,
) -> None:
    path = published("safetensors", tmp_path, in_layout(deep_weights, layout))
    model = with_budget(path, monkeypatch, share, storage=storage)
    before = full_blocks(model)
    assert all(before) if share == 1.0 else sum(before) < len(before)
    assert sum(before) > 0 or share == 0.85  # small weights are little beside what making them takes
    expected = ask(load_network(path, storage=storage))
    assert torch.equal(ask(model), expected)
    assert torch.equal(ask(model), expected)
    assert full_blocks(model) == before


def test_a_budget_that_is_too_small_is_refused_before_anything_is_read(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published("safetensors", tmp_path, weights)
    with pytest.raises(SettingsError, match="too small.*raise the budget by"):
        with_budget(path, monkeypatch, 0.1)
    with pytest.raises(SettingsError, match="too small"):
        load_network(path, stream=False, budget=1000)


def test_the_room_for_weights_leaves_some_for_the_run(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidgen.vidgen_core.model import room_for_weights

    header, found = open_part(published("safetensors", tmp_path, weights), "network")
    monkeypatch.setattr("vidgen.vidgen_core.model.memory_in_use", lambda device: 300_000_000)
    assert room_for_weights(header, found, "cpu", 10**12) < 10**12 - 300_000_000
    assert room_for_weights(header, found, "cpu", 500_000_000) == 100_000_000  # half of what is left


@pytest.mark.parametrize("storage", ["auto", "float8 per row"])
def test_loras_on_streamed_blocks_give_the_bits_of_resident_ones(
    published: Callable[..., Path],
    deep_weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
) -> None:
    from safetensors.torch import save_file

    from vidgen.vidgen_core.weights.lora import read_lora

    path = published("safetensors", tmp_path, deep_weights)
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for module in ("double_blocks.1.img_attn_qkv", "single_blocks.0.linear1", "single_blocks.9.linear2"):
        rows, columns = deep_weights[f"{module}.weight"].shape
        factors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        factors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(factors, tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors")
    answers = []
    for model in (load_network(path, storage=storage), with_budget(path, monkeypatch, 0.95, storage=storage)):
        patched = model.with_lora(lora, mode="runtime")
        with patched.patched():
            answers.append(ask(patched))
        answers.append(ask(model))
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])
    assert not torch.equal(answers[0], answers[1])


def test_a_profile_is_told_of_waiting_and_running(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_network(published("safetensors", tmp_path, weights), stream=True)
    stream = stream_of(model.network)
    assert stream is not None
    told: list[tuple[str, int, float, float]] = []
    stream.watch = lambda *span: told.append(span)
    ask(model)
    assert [number for what, number, _, _ in told if what == "run"] == list(range(5))
    assert sorted(number for what, number, _, _ in told if what == "read") == list(range(5))
    assert all(start <= end for _, _, start, end in told)


# --- a device with memory of its own, played by main memory -----------------------------------------------------------


def feeding(model: VideoModel, held: int | None) -> tuple[DeviceFeed, list[int]]:
    """Streams the blocks of a resident model through slots; the numbers of the blocks that were read."""
    states = [{name: t.detach().clone() for name, t in block.state_dict().items()} for block in blocks_of(model)]
    read: list[int] = []

    def state(number: int) -> dict[str, Tensor]:
        read.append(number)
        return states[number]

    sizes = [flat_bytes(tensor.nbytes for tensor in own.values()) for own in states]
    feed = DeviceFeed(state, sizes, torch.device("cpu"), held=held)
    for block in blocks_of(model):
        block.to("meta")
    BlockStream(blocks_of(model), feed).end_with([model.network])
    return feed, read


@pytest.mark.parametrize("held", [None, 0, 100_000])
@pytest.mark.parametrize("kind", ["safetensors", "float8_scaled"])
def test_one_copy_for_each_block_gives_the_same_bits(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str, held: int | None
) -> None:
    model = load_network(published(kind, tmp_path, weights), dtype=None)
    expected = ask(model)
    feed, read = feeding(model, held)
    at_load = len(read)
    with torch.inference_mode():  # as a render does it; the thread is in no such mode
        assert torch.equal(ask(model), expected)
    assert torch.equal(ask(model), expected)
    if held is None:
        assert read == [0, 1, 2, 3, 4]
    else:
        assert at_load < 5
        assert len(read) == at_load + 2 * (5 - at_load)
    assert_empty(model)
    assert feed._slots == [None, None]


@pytest.mark.parametrize("held", [None, 0])
def test_slots_are_given_back_when_a_run_fails(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, held: int | None
) -> None:
    model = load_network(published("safetensors", tmp_path, weights))
    expected = ask(model)
    feed, _ = feeding(model, held)

    def fail(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    for module in (model.network.single_blocks[1].linear2, model.network.txt_in, model.network.final_layer):
        hook = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            ask(model)
        hook.remove()
        assert_empty(model)
        assert feed._slots == [None, None]
        assert not feed._coming
    assert torch.equal(ask(model), expected)


def test_a_flat_block_gives_back_its_tensors() -> None:
    from vidgen.vidgen_core.memory.stream import FlatBlock

    tensors = {
        "a": torch.randn(3, 5, dtype=torch.float64),
        "b": torch.randn(7).to(torch.float8_e4m3fn),
        "c": torch.arange(6).view(2, 3).t(),
        "d": torch.tensor(2.5),
    }
    block = FlatBlock.of(tensors, lambda num_bytes: torch.empty(num_bytes + 9, dtype=torch.uint8))
    assert block.num_bytes == flat_bytes(tensor.nbytes for tensor in tensors.values()) == 4 * 256
    place = torch.empty(2000, dtype=torch.uint8)
    cut = FlatBlock(tuple(block.pieces[0].split([512, 256, 256])), block.layout)
    cut.copy_to(place)
    for name, view in block.views(place).items():
        assert view.dtype == tensors[name].dtype
        assert torch.equal(view.double(), tensors[name].double())


def test_a_pinned_block_is_cut_where_nothing_is_lost() -> None:
    mib = 2**20
    assert powers_of_two(680 * mib + 5) == [512 * mib, 128 * mib, 32 * mib, 8 * mib, 5]
    assert powers_of_two(3 * mib) == [2 * mib, mib]
    assert powers_of_two(100) == [100]
    assert powers_of_two(0) == []


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("storage", ["auto", "int8", "nf4"])
@pytest.mark.parametrize("free", [None, 0], ids=["pinned", "from the file"])
@pytest.mark.parametrize("kind", ["safetensors", "float8_scaled", "gguf"])
def test_streaming_to_a_gpu(
    published: Callable[..., Path],
    weights: dict[str, Tensor],
    tmp_path: Path,
    kind: str,
    free: int | None,
    storage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = published(kind, tmp_path, weights)
    resident = load_network(path, device="cuda", dtype=torch.bfloat16, storage=storage)
    if free is not None:
        monkeypatch.setattr("vidgen.vidgen_core.memory.stream.available_memory", lambda: free)
    streamed = load_network(path, stream=True, device="cuda", dtype=torch.bfloat16, storage=storage)
    expected = ask(resident)
    for _ in range(3):
        assert torch.equal(ask(streamed), expected)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ask(streamed)
    assert torch.cuda.memory_allocated() == before
