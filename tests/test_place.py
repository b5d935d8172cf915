"""Ways to store weights, put in and taken out of plain modules, and which blocks stay in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.memory import float8, place
from vidgen.vidgen_core.memory.float8 import float8_linear, kernel_of, round_tokens
from vidgen.vidgen_core.memory.place import (
    NF4,
    STORAGES,
    QuantisedLinear,
    StoredLinear,
    parse_bytes,
    resident_blocks,
    store_linears,
)
from vidgen.vidgen_core.model import VideoModel, load_network
from vidgen.vidgen_core.types import Conditioning

QUANTISED = [name for name, storage in STORAGES.items() if storage.scaled != "no"]
CONFIG = NetworkConfig(
    hidden_size=32,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=2,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=32,
    pooled_width=32,
)


def matrix(rows: int = 24, columns: int = 200, seed: int = 0) -> Tensor:
    """Weights whose rows differ a lot in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 0, rows).unsqueeze(1)


def decoded(name: str, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    made = STORAGES[name].encode(weight)
    return STORAGES[name].decode(made["stored"], made.get("scale"), weight.shape[1], dtype)


def error(name: str, weight: Tensor) -> float:
    return float((decoded(name, weight) - weight).norm() / weight.norm())


# --- numbers ----------------------------------------------------------------------------------------------------------


def groups(name: str, weight: Tensor) -> Tensor:
    """The largest magnitude that shares a scale with each weight."""
    storage = STORAGES[name]
    if storage.scaled == "tensor":
        return weight.abs().amax().expand_as(weight)
    block = storage.block or weight.shape[1]
    parts = [part.abs().amax(dim=1, keepdim=True).expand_as(part) for part in weight.split(block, dim=1)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("columns", [200, 64, 1, 77])
@pytest.mark.parametrize("name", STORAGES)
def test_no_weight_is_further_off_than_the_format_says(name: str, columns: int) -> None:
    weight = matrix(columns=columns)
    storage = STORAGES[name]
    off, largest = (decoded(name, weight) - weight).abs(), groups(name, weight)
    if storage.dtype == torch.int8:
        bound = largest / 127 / 2
    elif storage.dtype == torch.uint8:
        bound = largest * (torch.tensor(NF4).diff().max() / 2)
    else:
        info = torch.finfo(storage.dtype)
        scale = largest / storage.top if storage.scaled != "no" else torch.ones(())
        # Half a step of the significand, or of the subnormal numbers.
        bound = torch.maximum(weight.abs() * info.eps / 2, scale * info.smallest_normal * info.eps / 2)
    assert bool((off <= bound * (1 + 1e-5)).all())  # the scale itself is rounded to float32


@pytest.mark.parametrize("name", STORAGES)
def test_what_is_stored_is_what_was_announced(name: str) -> None:
    storage = STORAGES[name]
    for rows, columns in ((5, 200), (1, 1), (3, 64)):
        for weight in (torch.randn(rows, columns), torch.empty(rows, columns, device="meta")):
            made = storage.encode(weight)
            assert {k: (tuple(t.shape), t.dtype) for k, t in made.items()} == storage.shapes(rows, columns)
            assert sum(t.nbytes for t in made.values()) == storage.num_bytes(rows, columns)


@pytest.mark.parametrize("name", STORAGES)
def test_bytes_per_weight(name: str) -> None:
    per_weight = STORAGES[name].num_bytes(3072, 3072) / 3072**2
    wanted = {"float32": 4, "bfloat16": 2, "float16": 2, "nf4": 0.5 + 4 / 64}.get(name, 1)
    assert per_weight == pytest.approx(wanted, rel=0.04)  # scales of rows and of 128 weights come on top


@pytest.mark.parametrize("name", QUANTISED)
def test_storing_depends_on_nothing_but_the_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the dtype it came in, nor on how much is converted at once: blocks are read again and again."""
    weight = matrix().bfloat16()
    first = STORAGES[name].encode(weight)
    monkeypatch.setattr(place, "_PIECE", 3 * weight.shape[1])
    for other in (STORAGES[name].encode(weight), STORAGES[name].encode(weight.float())):
        assert all(torch.equal(first[k].float(), other[k].float()) for k in first)
    assert torch.equal(decoded(name, weight), decoded(name, weight.float()))


@pytest.mark.parametrize("name", STORAGES)
def test_storing_leaves_the_weight_alone_and_keeps_zeros(name: str) -> None:
    weight = torch.randn(4, 130)
    weight[2] = 0
    before = weight.clone()
    result = decoded(name, weight)
    assert torch.equal(weight, before)
    assert bool((result[2] == 0).all())
    assert bool(result.isfinite().all())
    assert bool((decoded(name, torch.zeros(3, 5)) == 0).all())


@pytest.mark.parametrize("name", QUANTISED)
def test_storing_what_was_stored_changes_nothing_more(name: str) -> None:
    once = decoded(name, matrix())
    assert torch.allclose(decoded(name, once), once, rtol=1e-6, atol=0)  # its scale is rounded anew


def test_finer_scales_are_more_exact() -> None:
    weight = matrix(64, 1024)
    # Rows that are tiny beside the largest one fall among the subnormal numbers of float8.
    small = weight[:8]
    one_scale = (decoded("float8", weight)[:8] - small).norm() / small.norm()
    own_scales = (decoded("float8 per row", weight)[:8] - small).norm() / small.norm()
    assert own_scales < 0.6 * one_scale
    assert error("float8 per block", weight) < 1.05 * error("float8 per row", weight)
    assert error("int8", weight) < error("float8 per row", weight) < error("float8 e5m2 per row", weight)
    assert error("float8 e5m2", weight) < error("nf4", weight) < 0.12


def test_nf4_is_what_the_paper_defines() -> None:
    """Quantiles of the normal distribution: eight on the positive side, seven on the other, 0, scaled to 1."""
    normal, offset = NormalDist(), 0.9677083
    positive = [normal.inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    negative = [-normal.inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    wanted = sorted([*positive, *negative, 0.0])
    assert [value / max(wanted) for value in wanted] == pytest.approx(NF4, abs=1e-6)
    assert all(abs(float(decoded("nf4", torch.tensor([[value, 1.0]]))[0, 0]) - value) < 1e-7 for value in NF4)


def test_weights_are_scaled_before_they_are_rounded() -> None:
    """To the nearest number of the dtype asked for, not to the product of two rounded ones."""
    weight = matrix()
    for name in QUANTISED:
        assert torch.equal(decoded(name, weight, torch.bfloat16), decoded(name, weight).bfloat16())


# --- layers -----------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "blocks": nn.Sequential(nn.Linear(48, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False)),
            "out": nn.Linear(16, 4),
        }
    ).requires_grad_(False)


def run(module: nn.Module, x: Tensor) -> Tensor:
    return module["out"](module["blocks"](x))  # type: ignore[index]


@pytest.mark.parametrize("name", STORAGES)
def test_stored_layers_compute_what_their_weights_say(name: str) -> None:
    module, x = net(), torch.randn(5, 48)
    stored = store_linears(module, STORAGES[name], ["blocks"])
    layers = [item for item in module.modules() if isinstance(item, StoredLinear)]
    assert [layer.out_features for layer in layers] == [32, 16]
    assert type(module["out"]) is nn.Linear
    answer = run(module, x)
    stored.undo()
    assert not any(isinstance(item, QuantisedLinear) for item in module.modules())
    # float8 products round the inputs as well: up to 2**-4 each, twice, of which a part averages out.
    tolerance = 0.1 if STORAGES[name].products else 1e-6
    assert torch.allclose(run(module, x), answer, rtol=0, atol=tolerance * float(answer.abs().max()))
    stored.undo()


def test_kept_layers_come_back_to_the_bit() -> None:
    module, x = net(), torch.randn(5, 48)
    before, parameters = run(module, x), list(module.parameters())
    stored = store_linears(module, STORAGES["nf4"], ["blocks"], keep=True)
    assert not torch.equal(run(module, x), before)
    stored.undo()
    assert torch.equal(run(module, x), before)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


def test_stored_layers_are_part_of_the_state() -> None:
    module, other = net(), net()
    store_linears(module, STORAGES["int8"], ["blocks"])
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    store_linears(other, STORAGES["int8"], ["blocks"])
    other.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(2, 48)
    assert torch.equal(run(module, x), run(other, x))


# --- on the way in ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = HunyuanVideoTransformer(CONFIG)
    return {name: torch.randn(tensor.shape).mul(0.1).bfloat16() for name, tensor in network.state_dict().items()}


def ask(model: VideoModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    cond = Conditioning(
        context=torch.randn(1, 5, 32, generator=generator).to(model.device),
        pooled=torch.randn(1, 32, generator=generator).to(model.device),
        scalars={"guidance": torch.tensor([6.0], device=model.device)},
    )
    x = torch.randn(1, 16, 2, 4, 4, generator=generator).to(model.device)
    with torch.no_grad():
        return model.predict(x, torch.tensor(0.5), cond)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("name", QUANTISED)
def test_storing_on_the_way_in_is_storing_afterwards(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, name: str, layout: str
) -> None:
    tensors = weights if layout == "native" else LAYOUTS[layout].to_foreign(weights)
    path = published("safetensors", tmp_path, tensors)
    model, later = load_network(path, storage=name), load_network(path)
    assert not any(isinstance(item, StoredLinear) for item in later.network.modules())
    plain = ask(later)
    store_linears(later.network, STORAGES[name], later.family.blocks)
    assert torch.equal(ask(model), ask(later))
    assert not torch.equal(ask(model), plain)


def test_only_the_matrices_of_blocks_are_stored(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_network(published("safetensors", tmp_path, weights), storage="int8")
    state = model.network.state_dict()
    small = {name for name, tensor in state.items() if tensor.dtype == torch.int8}
    assert small == {
        f"{name.removesuffix('weight')}stored"
        for name, tensor in weights.items()
        if name.startswith(model.family.blocks) and tensor.ndim == 2
    }
    assert {tensor.dtype for name, tensor in state.items() if name not in small} == {torch.float32}


@pytest.mark.parametrize("kind", ["float8_scaled", "gguf"])
def test_a_quantised_file_can_be_stored_otherwise(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    floats = {name: tensor.float() for name, tensor in weights.items()}
    path = published(kind, tmp_path, floats)
    dense = load_network(path, dtype=torch.float32)
    store_linears(dense.network, STORAGES["int8"], dense.family.blocks)
    assert torch.equal(ask(load_network(path, storage="int8")), ask(dense))
    kept = load_network(path, storage="as the file")
    assert {torch.float8_e4m3fn, torch.uint8} & {tensor.dtype for tensor in kept.network.state_dict().values()}


@pytest.mark.parametrize(
    ("storage", "dtype", "held"),
    [
        ("as the file", None, torch.bfloat16),
        ("bfloat16", None, torch.bfloat16),
        ("float32", None, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_plain_storage(
    published: Callable[..., Path],
    weights: dict[str, Tensor],
    tmp_path: Path,
    storage: str,
    dtype: torch.dtype | None,
    held: torch.dtype,
) -> None:
    model = load_network(published("safetensors", tmp_path, weights), storage=storage, dtype=dtype)
    layer = model.network.single_blocks[0].linear1
    assert isinstance(layer, StoredLinear) == (dtype is not None)
    assert (layer.stored if dtype is not None else layer.weight).dtype == held
    if dtype is not None:  # bfloat16 in memory, float32 in every product: nothing is lost
        assert torch.equal(ask(model), ask(load_network(model_path(tmp_path), dtype=dtype)))


def model_path(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_an_unknown_storage_is_refused(
    published: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"nf3.*float8 per row.*nf4"):
        load_network(published("safetensors", tmp_path, weights), storage="nf3")


def test_converting_takes_little_more_memory_than_what_is_stored(tmp_path: Path) -> None:
    """64 MB in bfloat16 become 18 in NF4; what is above is one weight and pieces of it."""
    from vidgen.benchmarks.full_size import write_random
    from vidgen.benchmarks.render import forget_peak, peak_bytes, status_bytes
    from vidgen.vidgen_core.weights.header import read_header
    from vidgen.vidgen_core.weights.load import load_module

    if not status_bytes("self", "VmHWM"):
        pytest.skip("needs a POSIX system with /proc")

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(32)))

    path = tmp_path / "a.safetensors"
    write_random(path, [(f"list.{number}.weight", (1024, 1024), "BF16") for number in range(32)])
    header = read_header(path)
    load_module(header, lambda: nn.ModuleDict({"list": build()}), storage=STORAGES["nf4"], stored=["list"])
    forget_peak()
    before = status_bytes("self", "VmRSS")
    module = load_module(header, lambda: nn.ModuleDict({"list": build()}), storage=STORAGES["nf4"], stored=["list"])
    grown = peak_bytes() - before
    stored = sum(tensor.nbytes for tensor in module.state_dict().values())
    assert stored < 19e6
    assert grown < stored + 25e6  # a piece of 4 MB of weights in float32, and what it is rounded through


# --- products in float8 -----------------------------------------------------------------------------------------------


def product(kernel: float8.Kernel, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(what the kernel gives, the same numbers multiplied in float64)."""
    x, weight = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)), matrix(32, 64)
    bias = torch.linspace(-1, 1, 32)
    made = STORAGES["float8 matmul"].encode(weight)
    x = x.to(dtype)
    small, scale = round_tokens(x.flatten(0, 1))
    exact = (small.double() * scale) @ (made["stored"].double() * made["scale"]).t() + bias
    given = [tensor.to(device) for tensor in (x, made["stored"], made["scale"], bias)]
    return float8_linear(*given, kernel=kernel).cpu(), exact.unflatten(0, (2, 40))


TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""relative, as float8.py states it"""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", ["none", "tensor", "row"])
def test_every_kernel_gives_the_same_products(kernel: float8.Kernel, dtype: torch.dtype) -> None:
    """torch has the chip's function for the CPU as well."""
    given, exact = product(kernel, dtype)
    assert given.dtype == dtype
    assert (given.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    if kernel == "none" and dtype == torch.float32:
        assert torch.allclose(given.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available() or kernel_of(torch.device("cuda", 0)) == "none",
    reason="needs a CUDA device with float8 units",
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernel", ["none", "tensor", "row"])
def test_the_chips_products_are_those_of_the_fallback(kernel: float8.Kernel, dtype: torch.dtype) -> None:
    if kernel == "row" and kernel_of(torch.device("cuda", 0)) != "row":
        kernel = "tensor"
    given, exact = product(kernel, dtype, "cuda")
    assert (given.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    made = [STORAGES["float8 matmul"].encode(matrix(32, 64).to(device)) for device in ("cpu", "cuda")]
    assert all(torch.equal(made[0][name].float(), made[1][name].cpu().float()) for name in made[0])


def test_inputs_get_a_scale_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = matrix(9, 50)
    tokens[4] = 0
    small, scale = round_tokens(tokens)
    assert torch.allclose(small.float() * scale, tokens, rtol=2**-4, atol=1e-6)
    monkeypatch.setattr(float8, "_PIECE", 100)
    again, scale_again = round_tokens(tokens)
    assert torch.equal(small.float(), again.float())
    assert torch.equal(scale, scale_again)


def test_a_cpu_takes_the_fallback_and_so_do_odd_sizes() -> None:
    assert kernel_of(torch.device("cpu")) == "none"
    made = STORAGES["float8 matmul"].encode(matrix(5, 7))
    assert float8_linear(torch.randn(3, 7), made["stored"], made["scale"], None).shape == (3, 5)
    assert float8_linear(torch.randn(0, 7), made["stored"], made["scale"], None).shape == (0, 5)


# --- which blocks stay ------------------------------------------------------------------------------------------------


def test_as_many_blocks_stay_as_fit() -> None:
    sizes, staging = [10] * 6, [20] * 6
    kept = [len(resident_blocks(sizes, staging, room)) for room in (20, 29, 30, 45, 59, 60, 1000)]
    assert kept == [0, 0, 1, 2, 3, 6, 6]
    with pytest.raises(SettingsError, match="too small"):
        resident_blocks(sizes, staging, 19)


def test_resident_blocks_lie_between_streamed_ones() -> None:
    assert resident_blocks([1] * 6, [0] * 6, 3) == {1, 3, 5}
    assert resident_blocks([1] * 6, [0] * 6, 2) == {2, 5}
    assert resident_blocks([1] * 6, [0] * 6, 4) == {1, 2, 4, 5}


def test_room_is_kept_for_the_largest_block_that_is_streamed() -> None:
    assert resident_blocks([9, 2], [8, 2], 10) == {1}
    assert resident_blocks([9, 2], [9, 2], 10) == frozenset()


@pytest.mark.parametrize(
    ("text", "number"), [("700MB", 700e6), ("8 GB", 8e9), ("7.5GiB", 7.5 * 2**30), ("8", 8e9), ("512 kib", 2**19)]
)
def test_amounts_of_memory_are_read(text: str, number: float) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "8 PB", "1e3MB", "GB"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="amount of memory"):
        parse_bytes(text)
