"""How attention is computed: every way against plain arithmetic, the choice, the trust, and who gets to say."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import vidgen
from vidgen.headless.cli import main
from vidgen.headless.executor import execute
from vidgen.headless.render import shipped
from vidgen.nodes.attention import Attention
from vidgen.vidgen_core.errors import MissingLibraryError, SettingsError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig
from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
from vidgen.vidgen_core.generate import Sampling, load_bundle, sample_latents
from vidgen.vidgen_core.model import VideoModel
from vidgen.vidgen_core.nn import backends
from vidgen.vidgen_core.nn.attention import attending_with, attention, current
from vidgen.vidgen_core.nn.backends import BACKENDS, CHOICES, AttentionChoice, Backend, Dispatcher
from vidgen.vidgen_core.nn.joint_blocks import around_blocks, computing_attention, sliding_over
from vidgen.vidgen_core.nn.sliding_tiles import SlidingTiles, block_mask, flexed, gathered, sliding, spans
from vidgen.vidgen_core.types import Conditioning

ROUNDING = 2e-6
"""float32 sums in another order; a wrong key or a wrong scale is off by 1e-2 or more"""
Grid = tuple[int, int, int]


@pytest.fixture(autouse=True)
def fresh_verdicts() -> Iterator[None]:
    backends.forget_verdicts()
    yield
    backends.forget_verdicts()


def qkv(batch: int = 2, heads: int = 2, length: int = 40, keys: int | None = None, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + heads + length)
    sizes = (length, keys or length, keys or length)
    return [torch.randn(batch, heads, size, width, generator=generator) for size in sizes]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The formula, in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def lengths(*counts: int, keys: int = 40) -> Tensor:
    return (torch.arange(keys) < torch.tensor(counts)[:, None])[:, None, None, :]


# --- every way gives the same -----------------------------------------------------------------------------------------

HOLES = torch.rand(2, 1, 1, 40, generator=torch.Generator().manual_seed(0)) < 0.5
MASKS = {
    "none": None,
    "padding": lengths(31, 38),
    "padding of one sample": lengths(40, 12),
    "the same padding": lengths(17, 17),
    "one mask for the batch": lengths(22),
    "nothing masked": lengths(40, 40),
    "holes": HOLES,
    "few holes": torch.arange(40).view(1, 1, 1, 40) != 3,
    "pairs for all samples": torch.rand(40, 40, generator=torch.Generator().manual_seed(3)) < 0.5,
    "pairs of tokens": torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.5,
    "by head": torch.rand(1, 2, 1, 40, generator=torch.Generator().manual_seed(2)) < 0.5,
}


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa_math"])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_honoured_however_it_is_computed(name: str, backend: str) -> None:
    mask = MASKS[name]
    with torch.no_grad(), attending_with(Dispatcher(AttentionChoice(backend=backend))):
        assert error(attention(*qkv(), mask=mask), exact(*qkv(), mask)) < ROUNDING


def test_padding_is_left_out_and_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different length in a batch cost what they are long, and no kernel sees a mask."""
    seen: list[tuple[int, int]] = []
    plain = backends.plain

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None
        seen.append((q.shape[0], k.shape[2]))
        return plain(q, k, v, mask)

    monkeypatch.setattr(backends, "plain", spy)
    mask = lengths(30, 30, 36, 40)
    with torch.no_grad():
        attention(*qkv(batch=4), mask=mask)
    assert seen == [(2, 30), (1, 36), (1, 40)]


def test_a_mask_is_read_once() -> None:
    mask = lengths(30, 36)
    assert backends.key_groups(mask) is backends.key_groups(mask)
    assert backends.key_groups(mask.clone()) is not backends.key_groups(mask)


def test_few_holes_are_not_worth_a_copy() -> None:
    assert backends.without_padding(MASKS["few holes"]) is None
    assert backends.without_padding(MASKS["holes"]) is not None
    assert backends.without_padding(MASKS["pairs of tokens"]) is None


@pytest.mark.parametrize("wrong", [False, True])
def test_packed_samples_are_the_masked_ones(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The layout that kernels for sequences laid end to end want, with a kernel that computes them one by one."""
    mask = lengths(9, 40, 23)
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert (max_q, max_k) == (40, 40)
        calls.append(q.shape[1])
        assert ends_q.dtype == ends_k.dtype == torch.int32
        parts = []
        for (q0, q1), (k0, k1) in zip(
            itertools.pairwise(ends_q.tolist()), itertools.pairwise(ends_k.tolist()), strict=True
        ):
            one = (x[None].transpose(1, 2) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
            parts.append(exact(*one)[0].transpose(0, 1))
        return torch.cat(parts) * (1.1 if wrong else 1)

    monkeypatch.setattr(backends, "_has_varlen", lambda q: True)
    monkeypatch.setattr(backends, "_PACKABLE", ("sdpa",))
    monkeypatch.setattr(backends, "varlen_kernel", lambda: kernel)
    given = qkv(batch=3)
    with torch.no_grad():
        for _ in range(2):
            assert error(Dispatcher(AttentionChoice())(*given, mask), exact(*given, mask)) < ROUNDING
    assert calls == ([1] if wrong else [1, 2, 2])  # one head is tried first
    assert ("packed samples are left out" in caplog.text) == wrong


@pytest.mark.parametrize("name", ["none", "padding", "pairs of tokens"])
@pytest.mark.parametrize("num_bytes", [1, 8 * 2 * 2 * 40 * 7, 10**9])
def test_pieces_of_queries_give_the_same_within_their_room(name: str, num_bytes: int) -> None:
    sizes = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        sizes.append(q.shape[2])
        return backends.plain(q, k, v, mask)

    mask = MASKS[name]
    found = backends.chunked(spy, num_bytes)(*qkv(), mask)
    assert error(found, exact(*qkv(), mask)) < ROUNDING
    assert sum(sizes) == 40
    assert max(sizes) == {1: 1, 10**9: 40}.get(num_bytes, 7)


def test_scores_that_do_not_fit_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no fused kernel; where it has one, nothing is written and nothing is cut."""
    sizes = []
    plain = backends.plain

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        sizes.append(q.shape[2])
        return plain(q, k, v, mask)

    monkeypatch.setattr(backends, "plain", spy)
    tight = Dispatcher(AttentionChoice(max_score_bytes=8 * 2 * 2 * 40 * 10))
    with torch.no_grad():
        tight(*qkv(), None)
        monkeypatch.setattr(backends, "_writes_scores", lambda *given: True)
        found = tight(*qkv(), None)
    assert sizes == [40, 10, 10, 10, 10]
    assert error(found, exact(*qkv())) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 6])
def test_sums_of_exponentials_come_along(dtype: torch.dtype, width: int) -> None:
    q, k, v = (x.to(dtype) for x in qkv(width=width))
    for mask in (None, MASKS["holes"]):
        out, lse = backends.with_lse(q, k, v, mask, max_score_bytes=8 * 2 * 2 * 40 * 7)
        scores = q.double() @ k.double().transpose(-1, -2) / width**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        assert out.dtype == lse.dtype == torch.float32
        assert error(lse.double(), scores.logsumexp(-1, keepdim=True)) < ROUNDING
        assert error(out, exact(q.float(), k.float(), v.float(), mask)) < ROUNDING


def test_gradients_flow() -> None:
    given = [x.requires_grad_() for x in qkv()]
    mask = MASKS["padding"]
    found = torch.autograd.grad(attention(*given, mask=mask).square().sum(), given)
    expected = torch.autograd.grad(exact(*given, mask).square().sum(), given)
    assert all(error(a, b) < 10 * ROUNDING for a, b in zip(found, expected, strict=True))


# --- who says it ------------------------------------------------------------------------------------------------------


def zeros(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.zeros_like(q)


def test_the_choice_holds_for_a_block_and_a_thread() -> None:
    outside = current()
    elsewhere = []
    with attending_with(zeros):
        assert not attention(*qkv()).any()
        with attending_with(outside):
            assert attention(*qkv()).any()
        assert not attention(*qkv()).any()
        thread = threading.Thread(target=lambda: elsewhere.append(attention(*qkv())))
        thread.start()
        thread.join()
    assert elsewhere[0].any()
    with pytest.raises(KeyError), attending_with(zeros):
        raise KeyError
    assert current() is outside


def test_a_compiled_function_hears_of_another_choice_without_a_new_graph() -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * attention(q, k, v)

    with torch.no_grad():
        assert error(compiled(*qkv()), 2 * exact(*qkv())) < ROUNDING
        with attending_with(zeros):
            assert not compiled(*qkv()).any()
    assert len(graphs) == 1
    given = [x.requires_grad_() for x in qkv()]
    compiled(*given).sum().backward()
    assert all(x.grad is not None for x in given)


# --- what is taken, and what is trusted -------------------------------------------------------------------------------


def a_backend(run: Any, **fields: Any) -> Backend:
    return Backend(name="new", title="A new kernel", run=run, takes=lambda *given: True, needs_gpu=False, **fields)


def offered(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> Dispatcher:
    monkeypatch.setitem(BACKENDS, "new", backend)
    monkeypatch.setattr(backends, "CHOICES", (*CHOICES, "new"))
    return Dispatcher(AttentionChoice(backend="new"))


def right(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, max_score_bytes: int) -> Tensor:
    return exact(q, k, v, mask)


def a_little_off(*given: Any) -> Tensor:
    return 1.03 * right(*given)


def not_finite(*given: Any) -> Tensor:
    return right(*given) * float("nan")


def raising(*given: Any) -> Tensor:
    raise RuntimeError("no kernel image\nand more")


def of_another_shape(*given: Any) -> Tensor:
    return right(*given).transpose(1, 2)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (a_little_off, "off by 0.03"),
        (not_finite, "off by nan"),
        (raising, "it fails: no kernel image"),
        (of_another_shape, "gives shape"),
    ],
)
def test_a_wrong_kernel_is_left_out_and_the_log_says_so(
    run: Any, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch = offered(monkeypatch, a_backend(run))
    with caplog.at_level(logging.INFO, "vidgen"), torch.no_grad():
        for _ in range(3):
            assert error(dispatch(*qkv(), None), exact(*qkv())) < ROUNDING
        dispatch(*qkv(length=900), None)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len({line for line in warnings if "A new kernel is left out" in line and why in line}) >= 1
    assert [line for line in warnings if why not in line] == []


def test_a_right_kernel_is_tried_once_for_a_class_of_shapes_and_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []

    def run(q: Tensor, *given: Any) -> Tensor:
        sizes.append(tuple(q.shape[:3]))
        return right(q, *given)

    dispatch = offered(monkeypatch, a_backend(run))
    with caplog.at_level(logging.INFO, "vidgen"), torch.no_grad():
        for length in (1100, 1100, 1200, 40):
            dispatch(*qkv(heads=3, length=length), None)
    small, first, second, third = (1, 2, 256), (2, 3, 1100), (2, 3, 1100), (2, 3, 1200)
    assert sizes == [small, first, second, third, (1, 2, 40), (2, 3, 40)]
    assert [record.getMessage() for record in caplog.records] == ["attention on cpu runs on A new kernel (new)"]


def test_running_out_of_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*given: Any) -> Tensor:
        raise torch.cuda.OutOfMemoryError("no room")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        offered(monkeypatch, a_backend(run))(*qkv(), None)


def test_an_approximate_kernel_may_be_rougher(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch = offered(monkeypatch, a_backend(a_little_off, approximate=True))
    with torch.no_grad():
        assert error(dispatch(*qkv(), None), exact(*qkv())) > 0.02


def test_auto_never_takes_what_rounds_more() -> None:
    order = backends._order(torch.device("cpu"))
    assert order == ("sdpa",)
    assert all(not BACKENDS[name].approximate for name in order)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("flash_attn_2", "flash_attn", "flash_attn_func"),
        ("flash_attn_3", "flash_attn_interface", "flash_attn_func"),
        ("xformers", "xformers.ops", "memory_efficient_attention"),
        ("sageattn", "sageattention", "sageattn"),
    ],
)
@pytest.mark.parametrize("with_sums", [False, True])
def test_libraries_are_called_as_they_want_to_be(
    name: str, module: str, function: str, with_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their layouts, with plain arithmetic in their place."""

    def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = exact(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, torch.zeros(1)) if with_sums else out

    def heads_first(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
        assert (tensor_layout, is_causal) == ("HND", False)
        assert q.is_contiguous()
        return exact(q, k, v)

    fake = ModuleType(module)
    setattr(fake, function, heads_first if name == "sageattn" else tokens_first)
    monkeypatch.setitem(sys.modules, module, fake)
    given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(heads=3)]
    found = BACKENDS[name].run(*given, None, backends.MAX_SCORE_BYTES)
    assert error(found, exact(*given)) < ROUNDING


def test_a_choice_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match="sageattn"):
        AttentionChoice(backend="sageatn")
    with pytest.raises(SettingsError, match="above 0"):
        AttentionChoice(max_score_bytes=0)


def test_a_choice_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_is_installed", lambda module: False)
    with pytest.raises(MissingLibraryError, match="pip install sageattention"):
        AttentionChoice(backend="sageattn").check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="GPU"):
        AttentionChoice(backend="sdpa_flash").check()
    for name in ("auto", "sdpa", "sdpa_math"):
        AttentionChoice(backend=name).check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_every_backend_of_a_gpu_is_right(name: str, masked: bool) -> None:
    q, k, v = (x.to("cuda", torch.bfloat16) for x in qkv(length=700, width=128))
    mask = lengths(650, 690, keys=700).cuda() if masked else None
    if name != "auto" and not BACKENDS[name].is_installed:
        return
    with torch.no_grad():
        found = Dispatcher(AttentionChoice(backend=name))(q, k, v, mask).float()
    approximate = name != "auto" and BACKENDS[name].approximate
    limit = backends.ROUGH if approximate else backends.TOLERANCE[torch.bfloat16]
    assert error(found, exact(q.float(), k.float(), v.float(), mask)) < limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_of_a_gpu_is_the_gathered_one() -> None:
    pattern, grid = SlidingTiles(tile=(2, 4, 4), window=(1, 3, 3)), (4, 18, 22)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in qkv(length=4 * 18 * 22 + 30, width=64))
    with torch.no_grad():
        found = sliding(pattern, grid, backends.plain)(q, k, v, None).float()
        expected = gathered(pattern, grid, exact, q.float(), k.float(), v.float(), None)
    assert error(found, expected) < backends.TOLERANCE[torch.bfloat16]


# --- sliding tiles ----------------------------------------------------------------------------------------------------


def seen_tiles(place: int, size: int, tile: int, window: int) -> range:
    """The tiles that a place sees, from the description alone."""
    num_tiles = -(-size // tile)
    window = min(window, num_tiles)
    first = min(max(place // tile - window // 2, 0), num_tiles - window)
    return range(first, first + window)


def pattern_mask(pattern: SlidingTiles, grid: Grid, num_text: int) -> Tensor:
    """Which joint token sees which, one by one."""
    places = list(itertools.product(*(range(size) for size in grid)))
    total = len(places) + num_text
    sees = torch.ones(total, total, dtype=torch.bool)
    for (i, query), (j, key) in itertools.product(enumerate(places), repeat=2):
        sees[i, j] = all(
            key[axis] // pattern.tile[axis]
            in seen_tiles(query[axis], grid[axis], pattern.tile[axis], pattern.window[axis])
            for axis in range(3)
        )
    return sees


PATTERNS: list[tuple[SlidingTiles, Grid, int]] = [
    (SlidingTiles(tile=(1, 1, 1), window=(1, 1, 1)), (2, 3, 2), 0),
    (SlidingTiles(tile=(1, 2, 2), window=(1, 3, 1)), (3, 6, 4), 5),
    (SlidingTiles(tile=(2, 2, 2), window=(3, 1, 3)), (5, 3, 7), 3),
    (SlidingTiles(tile=(2, 4, 3), window=(1, 1, 1)), (3, 5, 4), 1),
]


@pytest.mark.parametrize(("pattern", "grid", "num_text"), PATTERNS)
def test_tiles_are_a_mask_that_is_never_made(pattern: SlidingTiles, grid: Grid, num_text: int) -> None:
    sees = pattern_mask(pattern, grid, num_text)
    assert not sees.all()
    given = qkv(length=len(sees))
    found = sliding(pattern, grid, backends.plain)(*given, None)
    assert error(found, exact(*given, sees)) < ROUNDING


@pytest.mark.parametrize("texts", [(6, 8), (10, 1)])
def test_tiles_with_padded_texts(texts: tuple[int, int]) -> None:
    pattern, grid, _ = PATTERNS[1]
    mask = lengths(72 + texts[0], 72 + texts[1], keys=82)
    given = qkv(length=82)
    expected = exact(*given, mask & pattern_mask(pattern, grid, 10))
    for dense in (backends.plain, Dispatcher(AttentionChoice())):
        assert error(sliding(pattern, grid, dense)(*given, mask), expected) < ROUNDING
        assert error(gathered(pattern, grid, dense, *given, mask), expected) < ROUNDING


def test_text_with_holes_in_tiles() -> None:
    pattern, grid, num_text = PATTERNS[2]
    mask = torch.arange(108).view(1, 1, 1, 108) != 106
    given = qkv(length=108)
    expected = exact(*given, mask & pattern_mask(pattern, grid, num_text))
    assert error(sliding(pattern, grid, backends.plain)(*given, mask), expected) < ROUNDING


@pytest.mark.parametrize("window", [3, 5, 255])
def test_a_window_as_long_as_the_video_is_full_attention(window: int) -> None:
    """To the bit: the very same call."""
    pattern, grid = SlidingTiles(tile=(2, 2, 2), window=(window,) * 3), (5, 6, 4)
    given = qkv(length=5 * 6 * 4 + 7)
    assert torch.equal(sliding(pattern, grid, backends.plain)(*given, None), backends.plain(*given, None))
    assert error(gathered(pattern, grid, backends.plain, *given, None), exact(*given)) < ROUNDING


def test_every_query_sees_equally_many_tiles_and_its_own() -> None:
    for size, tile, window in itertools.product((1, 5, 8, 12), (1, 2, 3), (1, 3, 5)):
        found = spans(size, tile, window)
        assert [place for span in found for place in range(size)[span.queries]] == list(range(size))
        for span in found:
            tiles = {place // tile for place in range(size)[span.keys]}
            assert len(tiles) == min(window, -(-size // tile))
            assert {place // tile for place in range(size)[span.queries]} <= tiles


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize(("pattern", "grid", "num_text"), PATTERNS)
def test_flex_attention_is_given_the_same_pattern(pattern: SlidingTiles, grid: Grid, num_text: int, block: int) -> None:
    """Its numbers, without its compiler, and its table of blocks against the one that torch makes token by token."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sees = pattern_mask(pattern, grid, num_text)
    given = qkv(length=len(sees))
    found = flexed(pattern, grid, backends.plain, *given, flex_attention, block)
    assert error(found, exact(*given, sees)) < ROUNDING
    mask = block_mask(pattern, grid, num_text, torch.device("cpu"), block)
    expected = create_block_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(mask.to_dense(), expected.to_dense())


@pytest.mark.parametrize(
    "sizes", [{"tile": (0, 8, 8)}, {"window": (2, 3, 3)}, {"window": (3, 3)}, {"window": (-1, 3, 3)}]
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        SlidingTiles(**sizes)


# --- in a network -----------------------------------------------------------------------------------------------------

CONFIG = NetworkConfig(
    in_channels=4,
    out_channels=4,
    hidden_size=32,
    num_heads=2,
    num_double_blocks=1,
    num_single_blocks=1,
    num_refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=24,
    pooled_width=20,
    guidance_embed=False,
)
SMALL = SlidingTiles(tile=(1, 2, 2), window=(1, 1, 1))


@pytest.fixture
def network() -> HunyuanVideoTransformer:
    network = HunyuanVideoTransformer(CONFIG).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def ask(network: HunyuanVideoTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return network(
        torch.randn(2, 4, 3, 8, 8, generator=generator),
        torch.tensor([731.5, 12.25]),
        torch.randn(2, 7, 24, generator=generator),
        torch.arange(7) < torch.tensor([[3], [6]]),
        torch.randn(2, 20, generator=generator),
    )


def test_tiles_in_a_network_concern_its_video_alone(network: HunyuanVideoTransformer) -> None:
    """Text is refined as before; a whole window changes nothing; and the network is as it was afterwards."""
    plain = ask(network)
    with sliding_over(network, SlidingTiles(tile=(1, 2, 2), window=(255, 255, 255))):
        assert torch.equal(ask(network), plain)
    grids, texts = [], []
    with sliding_over(network, SMALL):
        with around_blocks(network, lambda inner, *given: (texts.append(given[1]), inner(*given))[1]):
            tiled = ask(network)
        with around_blocks(network, lambda inner, *given: (grids.append(given[2].grid), inner(*given))[1]):
            ask(network)
    assert error(tiled, plain) > 1e-3
    assert grids == [(3, 4, 4)]
    assert texts[0].shape == (2, 7, 32)
    assert torch.equal(ask(network), plain)
    assert "through_blocks" not in vars(network)
    with pytest.raises(KeyError), sliding_over(network, SMALL):
        raise KeyError
    assert "through_blocks" not in vars(network)


def test_a_network_without_such_blocks_is_refused() -> None:
    choice = AttentionChoice(tiles=SMALL)
    with pytest.raises(SettingsError, match="Linear"), computing_attention(torch.nn.Linear(2, 2), choice):
        pass


# --- for users --------------------------------------------------------------------------------------------------------

NODE = {
    "backend": "auto",
    "pattern": "sliding tiles",
    "tile_frames": 1,
    "tile_rows": 1,
    "tile_columns": 1,
    "window_frames": 1,
    "window_rows": 1,
    "window_columns": 1,
    "max_score_mb": 64,
}


@pytest.fixture(scope="module")
def model(tiny_bundle_dir: Path) -> VideoModel:
    return load_bundle(tiny_bundle_dir, device="cpu").model


def sampled(model: VideoModel, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    cond = Conditioning(
        context=torch.randn(1, 5, 32, generator=generator), pooled=torch.randn(1, 32, generator=generator)
    )
    return sample_latents(model, cond, None, (1, 16, 2, 4, 4), Sampling(num_steps=2, cfg=1.0, **settings))


def test_the_node_gives_a_model_with_the_choice_and_leaves_the_other_alone(model: VideoModel) -> None:
    plain = sampled(model)
    (tiled,) = Attention().choose(model, **NODE)
    assert tiled.network is model.network
    assert tiled.attention == AttentionChoice(
        tiles=SlidingTiles(tile=(1, 1, 1), window=(1, 1, 1)), max_score_bytes=64 * 2**20
    )
    assert error(sampled(tiled), plain) > 1e-3
    (whole,) = Attention().choose(model, **NODE | {"pattern": "full", "backend": "sdpa_math"})
    assert whole.attention == AttentionChoice(backend="sdpa_math", max_score_bytes=64 * 2**20)
    assert 0 < error(sampled(whole), plain) < 1e-5
    assert torch.equal(sampled(model), plain)


def test_a_run_with_other_tiles_is_another_run(model: VideoModel, tmp_path: Path) -> None:
    path = tmp_path / "run"
    (tiled,) = Attention().choose(model, **NODE)
    sampled(replace(tiled, attention=AttentionChoice(backend="sdpa_math")), resume_path=path)
    sampled(model, resume_path=path)  # another kernel is the same run
    with pytest.raises(SettingsError, match="sliding tiles"):
        sampled(tiled, resume_path=path)


def test_the_command_line_says_it(tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vidgen.vidgen_core.media import read_metadata

    words = ["generate", "a red star", "--model", str(tiny_bundle_dir), "-q", "--steps", "1", "--frames", "1"]
    out = tmp_path / "a.mp4"
    assert main([*words, "-o", str(out), "--attention", "sdpa_math"]) == 0
    assert '"sdpa_math"' in read_metadata(out)["prompt"]
    assert main([*words, "-o", str(out), "--attention", "flash"]) == 1
    assert "no such attention backend" in capsys.readouterr().err


def test_a_prompt_can_be_run_up_to_a_node(tiny_bundle_dir: Path) -> None:
    """What helpers of a render do: everything that the sampler needs, and nothing after it."""
    prompt = shipped("hunyuan_sliding_tiles")
    prompt["1"]["inputs"]["model_folder"] = str(tiny_bundle_dir)
    prompt["4"]["inputs"] |= {"width": 32, "height": 32, "num_frames": 5}
    prompt["5"]["inputs"]["steps"] = 1
    ran: list[str] = []
    execute(
        prompt,
        vidgen.NODE_CLASS_MAPPINGS,
        on_event=lambda event: ran.append(event.node_id) if event.kind == "executed" else None,
        up_to=("VidGenSampler",),
    )
    assert sorted(ran) == ["1", "2", "3", "4", "5", "8"]
