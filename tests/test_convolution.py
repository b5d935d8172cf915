"""A CPU's fast convolutions and the group norm beside them: the numbers of torch's own, in either layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vidgen.vidgen_core.errors import Cancelled
from vidgen.vidgen_core.memory.live import cost_of
from vidgen.vidgen_core.nn import convolution
from vidgen.vidgen_core.nn.convolution import CHANNELS_LAST, Conv3d, conv3d, empty_like, fast_layout, is_channels_last
from vidgen.vidgen_core.nn.group_norm import PIECE_NUMBERS, GroupNorm, GroupNormSiLU
from vidgen.vidgen_core.stop import asking
from vidgen.vidgen_core.weights.empty import built_empty

ROUNDING = 1e-6
"""float32, of sums of some hundred numbers in another order"""


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_both_layouts_give_the_numbers_of_torch(batch: int, kernel: int, stride: tuple[int, int, int]) -> None:
    x, weight, bias = normal(batch, 6, 5, 6, 7), normal(4, 6, kernel, kernel, kernel, seed=1), normal(4, seed=2)
    expected = F.conv3d(x.double(), weight.double(), bias.double(), stride)
    with torch.no_grad():
        plain, fast = conv3d(x, weight, bias, stride), conv3d(fast_layout(x), weight, bias, stride)
    assert relative(plain, expected) <= ROUNDING
    assert relative(fast, expected) <= ROUNDING
    assert is_channels_last(fast)


def test_with_gradients_everything_is_as_torch_has_it() -> None:
    layer, twin = Conv3d(3, 4, 3), nn.Conv3d(3, 4, 3)
    twin.load_state_dict(layer.state_dict())
    x = normal(1, 3, 4, 5, 5)
    assert fast_layout(x) is x
    assert torch.equal(layer(x), twin(x))
    layer(x).sum().backward()
    twin(x).sum().backward()
    assert torch.equal(layer.weight.grad, twin.weight.grad)


def test_float64_keeps_its_layout() -> None:
    with torch.no_grad():
        x = normal(1, 3, 4, 5, 5)
        assert not is_channels_last(fast_layout(x.double()))
        assert is_channels_last(fast_layout(x.to("meta"))) == torch.backends.mkldnn.is_available()  # planned for a CPU
        assert is_channels_last(fast_layout(x)) == torch.backends.mkldnn.is_available()


def test_new_tensors_keep_the_layout() -> None:
    x = normal(1, 3, 4, 5, 5)
    assert empty_like(x, (1, 2, 3, 4, 5)).is_contiguous()
    made = empty_like(x.to(torch.bfloat16).contiguous(memory_format=CHANNELS_LAST), (1, 2, 3, 4, 5))
    assert is_channels_last(made)
    assert made.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [GroupNorm, GroupNormSiLU])
@pytest.mark.parametrize("batch", [1, 2])
def test_group_norm_is_exact_with_channels_last(kind: type[GroupNorm], batch: int) -> None:
    """Over several pieces, and far from zero, where torch's own is 1e-5 off (in this layout alone)."""
    norm = kind(2, 8, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(normal(8, seed=1))
        norm.bias.copy_(normal(8, seed=2))
        x = 3 + normal(batch, 8, 3, 120, 100)
        assert x.numel() > PIECE_NUMBERS
        expected = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), 1e-6)
        expected = F.silu(expected) if kind is GroupNormSiLU else expected
        given = x.contiguous(memory_format=CHANNELS_LAST)
        made = norm(given)
        assert is_channels_last(made)
        assert relative(made, expected) <= ROUNDING
        assert relative(norm(x), expected) <= ROUNDING
        assert relative(norm.by_frames(given, 2)(given[:, :, :2]), expected[:, :, :2]) <= ROUNDING
        rounded, plain = norm(given.bfloat16()), norm(x.bfloat16())
        assert relative(rounded, expected) <= 1.1 * relative(plain, expected)


def test_an_empty_module_has_every_shape_and_no_memory() -> None:
    drawn = nn.Sequential(nn.Linear(3, 4), nn.Conv3d(2, 3, 3), nn.Embedding(5, 2), nn.LayerNorm(4))
    empty = built_empty(lambda: nn.Sequential(nn.Linear(3, 4), nn.Conv3d(2, 3, 3), nn.Embedding(5, 2), nn.LayerNorm(4)))
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in drawn.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert float(nn.Linear(3, 4).weight.detach().std()) > 0  # outside, start values are drawn as ever


@pytest.mark.parametrize("padding", [(0, 0, 0), (0, 1, 1), (1, 2, 1)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2), (1, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_convolution_goes_row_by_row_and_asks_in_between(padding, stride, dtype, monkeypatch):
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 4, 3, 3, 3, dtype=dtype), torch.randn(6, dtype=dtype)
    asked: list[int] = []
    for layout in (torch.contiguous_format, convolution.CHANNELS_LAST):
        x = torch.randn(2, 4, 4, 11, 9, dtype=dtype).contiguous(memory_format=layout)
        with torch.no_grad():
            whole = convolution.conv3d(x, weight, bias, stride, padding)
            with monkeypatch.context() as patch, asking(lambda: asked.append(1)):
                patch.setattr(convolution, "PARTS", 1)
                for limit, rows in ((1, 1), (2 * 4 * 27 * whole.numel() / whole.shape[3] * 3.5, 3)):
                    asked.clear()
                    patch.setattr(convolution, "PART_OPERATIONS", limit)
                    parts = convolution.conv3d(x, weight, bias, stride, padding)
                    assert len(asked) == -(-whole.shape[3] // rows)
                    assert is_channels_last(parts) == is_channels_last(whole)
                    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
                    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance * 10)


def test_what_is_copied_for_one_part_takes_little_and_is_planned(monkeypatch):
    """Beside what is given and comes out, an eighth of both, and the rows around it."""
    x = torch.zeros(1, 8, 6, 64, 32, device="meta")
    weight = torch.zeros(8, 8, 3, 3, 3, device="meta")
    x = x.contiguous(memory_format=convolution.CHANNELS_LAST)

    def peak() -> int:
        return cost_of(lambda x: convolution.conv3d(x, weight, None, (1, 1, 1), (0, 1, 1)), x).peak - x.nbytes

    with torch.no_grad():
        out = 4 * x.nbytes // 6
        whole = peak()
        assert out <= whole < 1.2 * out
        monkeypatch.setattr(convolution, "PART_OPERATIONS", 2 * 8 * 27 * out / 4 / 1.5)
        assert whole < peak() <= whole + 1.3 * (x.nbytes + out) / 8


def test_a_stop_ends_a_convolution_that_has_begun(monkeypatch):
    monkeypatch.setattr(convolution, "PART_OPERATIONS", 1)
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise Cancelled("stopped")

    with torch.no_grad(), asking(ask), pytest.raises(Cancelled):
        convolution.conv3d(torch.randn(1, 2, 3, 16, 8), torch.randn(2, 2, 3, 3, 3), None)
    assert len(asked) == 3
