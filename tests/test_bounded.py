"""Exact coding within a bound: the numbers of one pass from every plan there is, and no more memory than was said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core import bounded
from vidgen.vidgen_core.bounded import Bound, exact, plan, smallest_budget
from vidgen.vidgen_core.bounded.planner import Job, Plan
from vidgen.vidgen_core.bounded.volumes import Store
from vidgen.vidgen_core.codec import Codec
from vidgen.vidgen_core.errors import Cancelled, FileError, NumericsError, SettingsError
from vidgen.vidgen_core.families.hunyuan.codec import HunyuanCodec
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.generate import decode_frames, decode_latents, encode_video
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.nn import strips
from vidgen.vidgen_core.nn.scratch import Scratch
from vidgen.vidgen_core.nn.strips import Size, SoftmaxOverParts, Statistics
from vidgen.vidgen_core.types import Grid, VideoShape

CONFIG = CodecConfig(latent_channels=4, block_channels=(4, 8, 8, 8), layers_per_block=1, num_groups=2)
PLENTY = 10**9
SHAPES = [(1, 8, 24), (9, 40, 24), (13, 16, 8)]
"""frames, height, width: a picture one latent high, and sides of an odd number of latents"""


def codec_of(config: CodecConfig = CONFIG, dtype: torch.dtype = torch.float64) -> HunyuanCodec:
    torch.manual_seed(0)
    vae = CausalVAE(config).to(dtype).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():  # norms that do something
        if "norm" in name:
            parameter.add_(torch.rand_like(parameter))
    return HunyuanCodec(vae)


def video_shape(frames: int, height: int, width: int) -> VideoShape:
    return VideoShape(num_frames=frames, height_px=height, width_px=width)


def latents_of(shape: VideoShape, codec: Codec, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, *shape.latent_shape(codec.grid), generator=torch.Generator().manual_seed(1)).to(dtype)


def close(ours: Tensor, one_pass: Tensor) -> None:
    """float64: the same sums in another order, through some thirty norms."""
    torch.testing.assert_close(ours, one_pass, rtol=0, atol=1e-11)


def plans(codec: HunyuanCodec, direction: Any, shape: VideoShape, *, spills: bool = False) -> list[int]:
    """Bounds from the smallest on that make different plans, those first that compute the most again."""
    low = smallest_budget(codec, direction, shape, spills=spills)
    found: dict[Any, int] = {}
    for budget in (low, low + 60_000, PLENTY):
        made = plan(codec, direction, shape, budget, spills=spills)
        found.setdefault(tuple((one.start, one.stop, len(one.passes)) for one in made.segments), budget)
    return list(found.values())


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES)
def test_decode_is_one_pass_whatever_the_plan(size: tuple[int, int, int]) -> None:
    codec, shape = codec_of(), video_shape(*size)
    latents = latents_of(shape, codec)
    one_pass = codec.decode(latents)
    for budget in plans(codec, "decode", shape):
        close(exact(codec, budget).decode(latents), one_pass)


@pytest.mark.parametrize("size", SHAPES)
def test_encode_is_one_pass_whatever_the_plan(size: tuple[int, int, int]) -> None:
    codec, shape = codec_of(), video_shape(*size)
    video = torch.rand(1, 3, *size, dtype=torch.float64) * 2 - 1
    mean, logvar = codec.moments(video)
    for budget in plans(codec, "encode", shape):
        ours = exact(codec, budget)
        assert isinstance(ours, Codec)
        close(ours.moments(video)[0], mean)
        close(ours.moments(video)[1], logvar)
    close(ours.encode(video), codec.encode(video))
    drawn = [one.encode(video, generator=torch.Generator().manual_seed(3)) for one in (ours, codec)]
    close(*drawn)


def test_small_bounds_compute_again_and_large_ones_once() -> None:
    codec, shape = codec_of(CodecConfig(block_channels=(32, 64, 128, 128), num_groups=8)), video_shape(33, 160, 160)
    low = smallest_budget(codec, "decode", shape)
    small, large = (plan(codec, "decode", shape, budget) for budget in (low, 10 * low))
    assert small.peak_bytes <= low
    assert small.relative_cost > 2
    assert large.relative_cost < 1.2  # strips share some rows
    assert max(one.stop - one.start for one in small.segments) > max(one.stop - one.start for one in large.segments)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_layers_in_a_file(direction: str, tmp_path: Path) -> None:
    codec, shape = codec_of(), video_shape(9, 40, 24)
    budget = smallest_budget(codec, direction, shape, spills=True)
    made = plan(codec, direction, shape, budget, spills=True)
    assert made.spilled_bytes > 0
    ours = exact(codec, budget, spill=tmp_path)
    if direction == "decode":
        latents = latents_of(shape, codec)
        close(ours.decode(latents), codec.decode(latents))
    else:
        video = torch.rand(1, 3, 9, 40, 24, dtype=torch.float64) * 2 - 1
        close(ours.encode(video), codec.encode(video))
    assert list(tmp_path.iterdir()) == []


def test_without_attention_and_with_other_steps() -> None:
    config = CodecConfig(
        latent_channels=4,
        block_channels=(4, 4, 4),
        layers_per_block=2,
        num_groups=1,
        spatial_compression=4,
        temporal_compression=2,
        mid_attention=False,
    )
    codec = codec_of(config)
    video = torch.rand(1, 3, 5, 12, 20, dtype=torch.float64) * 2 - 1
    latents = codec.encode(video)
    for spills in (False, True):
        low = smallest_budget(codec, "decode", video_shape(5, 12, 20), spills=spills)
        close(exact(codec, low).decode(latents), codec.decode(latents)) if not spills else None
    close(exact(codec, PLENTY).encode(video), latents)


def test_a_batch_is_its_videos() -> None:
    codec = codec_of()
    latents = torch.cat([latents_of(video_shape(5, 16, 16), codec) * factor for factor in (1, 2)])
    seen: list[tuple[int, int]] = []
    video = exact(codec, PLENTY, on_tile=lambda done, total: seen.append((done, total))).decode(latents)
    close(video, codec.decode(latents))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_one_pass(dtype: torch.dtype) -> None:
    """Against float64, both ways are off by rounding; which one by more is chance, so a factor of 2 is let pass."""
    codec, shape = codec_of(), video_shape(9, 32, 24)
    latents = latents_of(shape, codec)
    true = codec.decode(latents)
    codec.to(dtype)
    one_pass, ours = codec.decode(latents), exact(codec, PLENTY).decode(latents)
    assert ours.dtype == dtype
    off = [(one.double() - true).square().mean().sqrt() for one in (one_pass, ours)]
    assert off[1] <= 2 * off[0]
    if dtype == torch.float32:
        assert (ours - one_pass).abs().max() < 1e-4


def test_equals_the_published_codec(vae_twin: Any) -> None:
    codec = codec_of()
    latents = latents_of(video_shape(9, 32, 24), codec)
    published = vae_twin(codec.vae).decode(latents / CONFIG.scaling_factor).sample
    close(exact(codec, smallest_budget(codec, "decode", video_shape(9, 32, 24))).decode(latents), published)


# --- frames one by one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES)
def test_frames_come_in_order_and_are_the_video(size: tuple[int, int, int], tmp_path: Path) -> None:
    codec = codec_of()
    latents = latents_of(video_shape(*size), codec)
    for spill in (None, tmp_path):
        parts = list(exact(codec, PLENTY, spill=spill).frames(latents))
        assert len(parts) >= size[0] // 4
        close(torch.cat(parts, dim=1), codec.decode(latents)[0])


def test_frames_need_no_room_for_the_video() -> None:
    codec = codec_of()
    short, long = (
        smallest_budget(codec, "decode", video_shape(frames, 64, 64), spills=True, in_time_order=True)
        for frames in (129, 1025)
    )
    video_bytes = (1025 - 129) * 3 * 64 * 64 * 8
    assert long - short < video_bytes / 2


def test_decode_frames_skips_what_is_hidden_and_joins_a_batch() -> None:
    codec = codec_of(dtype=torch.float32)
    latents = torch.cat([latents_of(video_shape(9, 16, 16), codec, torch.float32)] * 2)
    whole = decode_latents(codec, latents, tiling=None)
    frames = torch.stack(list(decode_frames(codec, latents, bound=Bound(), hidden_frames=6)))
    torch.testing.assert_close(frames, whole[:, :, 6:].transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-4)


def test_the_main_path_takes_a_bound() -> None:
    codec, seen = codec_of(dtype=torch.float32), []
    host = LocalHost(on_progress=lambda what, done, total: seen.append((what, done / total)))
    latents = latents_of(video_shape(9, 16, 16), codec, torch.float32)
    bound = Bound(budget_bytes=PLENTY)
    video = decode_latents(codec, latents, tiling=bound, host=host)
    torch.testing.assert_close(video, decode_latents(codec, latents, tiling=None), rtol=0, atol=1e-4)
    ours = encode_video(codec, video, tiling=bound, host=host)
    torch.testing.assert_close(ours, encode_video(codec, video, tiling=None), rtol=0, atol=1e-4)
    assert seen[-1] == ("encode", 1.0)
    assert [share for what, share in seen if what == "decode"] == sorted(
        share for what, share in seen if what == "decode"
    )


def test_a_decoder_that_overflows_is_named() -> None:
    codec = codec_of(dtype=torch.float32)
    codec.vae.decoder.conv_out.conv.bias.fill_(float("inf"))
    latents = latents_of(video_shape(1, 8, 8), codec, torch.float32)
    with pytest.raises(NumericsError):
        list(decode_frames(codec, latents, bound=Bound()))


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spills", [False, True])
def test_the_smallest_bound_is_named_and_is_enough(spills: bool) -> None:
    with torch.device("meta"):
        codec = HunyuanCodec(CausalVAE(CodecConfig()).to(torch.bfloat16))
    shape = video_shape(129, 720, 1280)
    low = smallest_budget(codec, "decode", shape, spills=spills)
    made = plan(codec, "decode", shape, low, spills=spills)
    assert made.peak_bytes <= low
    with pytest.raises(SettingsError, match=f"at least {-(-low // 10**6)} MB"):
        plan(codec, "decode", shape, low - 10**6, spills=spills)
    # What one pass takes at the least: the widest layer, its first half and its result, 128 channels each at full size.
    one_pass = 3 * 129 * 720 * 1280 * 128 * 2
    assert low < one_pass / 4


def test_a_plan_keeps_within_its_bound_and_counts_its_tiles() -> None:
    codec, shape = codec_of(), video_shape(9, 40, 24)
    low = smallest_budget(codec, "decode", shape)
    costs = []
    for budget in (low, low + 10**5, low + 10**6, PLENTY):
        made = plan(codec, "decode", shape, budget)
        assert made.peak_bytes <= budget
        costs.append(sum(one.cost for one in made.segments))
        count = []
        exact(codec, budget, on_tile=lambda done, total, count=count: count.append(total)).decode(
            latents_of(shape, codec)
        )
        assert count == [made.tiles] * made.tiles
    assert costs == sorted(costs, reverse=True)


def test_the_peak_of_a_plan_as_its_bound_gives_the_same_plan() -> None:
    """What a render's plan asks for, and what it then takes."""
    codec, shape = codec_of(), video_shape(17, 64, 64)
    low = smallest_budget(codec, "decode", shape)
    for times in (1.0, 1.4, 4.0):
        made = plan(codec, "decode", shape, int(times * low))
        again = plan(codec, "decode", shape, made.peak_bytes)
        assert (again.peak_bytes, again.tiles, again.relative_cost) == (
            made.peak_bytes,
            made.tiles,
            made.relative_cost,
        )


def test_a_result_elsewhere_takes_nothing() -> None:
    codec, shape = codec_of(), video_shape(129, 64, 64)
    with_result, without = (
        plan(codec, "decode", shape, PLENTY, counts_result=counts).segments[-1].peak_bytes for counts in (True, False)
    )
    assert with_result > without


def test_what_lies_in_memory_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes that live at the same time, summed up as they are made and released."""
    codec, shape = codec_of(dtype=torch.float32), video_shape(17, 64, 64)
    live, most = 0, 0
    take, give_back = bounded.volumes.MemoryPieces.take, bounded.volumes.MemoryPieces.give_back

    def taking(self: Any) -> int:
        nonlocal live, most
        live += torch.Size(self.shape).numel() * 4
        most = max(most, live)
        return take(self)

    def giving(self: Any, piece: int) -> None:
        nonlocal live
        live -= torch.Size(self.shape).numel() * 4
        give_back(self, piece)

    monkeypatch.setattr(bounded.volumes.MemoryPieces, "take", taking)
    monkeypatch.setattr(bounded.volumes.MemoryPieces, "give_back", giving)
    for budget in plans(codec, "decode", shape):
        most = 0
        made = plan(codec, "decode", shape, budget)
        exact(codec, budget).decode(latents_of(shape, codec, torch.float32))
        assert live == 0
        assert most <= made.peak_bytes


# --- refusals, cancelling, files --------------------------------------------------------------------------------------


def test_a_bound_too_small_is_refused_before_any_work() -> None:
    codec = codec_of()
    with pytest.raises(SettingsError, match="at least"):
        exact(codec, 1000, on_tile=lambda done, total: pytest.fail("work")).decode(
            latents_of(video_shape(9, 16, 16), codec)
        )


def test_bad_input_is_named() -> None:
    codec = codec_of()
    ours = exact(codec, PLENTY)
    with pytest.raises(SettingsError, match="18 frames"):
        ours.encode(torch.zeros(1, 3, 18, 64, 64))
    with pytest.raises(SettingsError, match="60 px"):
        ours.encode(torch.zeros(1, 3, 17, 60, 64))
    with pytest.raises(SettingsError, match=r"\(batch, 4, frames"):
        ours.decode(torch.zeros(1, 3, 1, 8, 8))
    with pytest.raises(SettingsError, match="a batch of 2"):
        next(ours.frames(torch.zeros(2, 4, 1, 2, 2)))


def test_a_codec_that_does_not_tell_its_layers() -> None:
    class Opaque:
        grid = Grid(channels=4, spatial=8, temporal=4)
        moments = encode = decode = None

    with pytest.raises(SettingsError, match="layer by layer"):
        exact(Opaque(), PLENTY)


def test_cancelling_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, shape = codec_of(), video_shape(9, 40, 24)
    stores: list[Store] = []
    begin = Store.__init__

    def watched(self: Store, *arguments: Any) -> None:
        begin(self, *arguments)
        stores.append(self)

    monkeypatch.setattr(Store, "__init__", watched)
    budget = smallest_budget(codec, "decode", shape, spills=True)
    total = plan(codec, "decode", shape, budget, spills=True).tiles
    files: list[Any] = []

    def stop(done: int, _: int) -> None:
        if done == total // 2:
            files.extend(stores[0].open)
            raise Cancelled

    with pytest.raises(Cancelled):
        exact(codec, budget, spill=tmp_path, on_tile=stop).decode(latents_of(shape, codec))
    assert files
    assert all(file.closed for file in files)
    assert list(tmp_path.iterdir()) == []


def test_frames_that_are_not_wanted_any_more_leave_no_file(tmp_path: Path) -> None:
    codec, shape = codec_of(), video_shape(9, 40, 24)
    budget = smallest_budget(codec, "decode", shape, spills=True, in_time_order=True)
    frames = exact(codec, budget, spill=tmp_path).frames(latents_of(shape, codec))
    next(frames)
    frames.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, shape = codec_of(), video_shape(9, 40, 24)
    budget = smallest_budget(codec, "decode", shape, spills=True)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(FileError, match="no room"):
        exact(codec, budget, spill=tmp_path).decode(latents_of(shape, codec))
    monkeypatch.undo()
    with pytest.raises(FileError, match="cannot be written"):
        exact(codec, budget, spill=tmp_path / "missing").decode(latents_of(shape, codec))


# --- the pieces -------------------------------------------------------------------------------------------------------


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    """Far from 0, where differences of squares would cancel."""
    norm = torch.nn.GroupNorm(3, 6, eps=1e-6)
    torch.nn.init.uniform_(norm.weight)
    torch.nn.init.uniform_(norm.bias)
    x = 1000 + torch.randn(7, 5, 4, 6) * torch.arange(1, 7)
    statistics = Statistics(norm)
    for part in x.split([1, 4, 2]):
        statistics.add(part)
    affine = statistics.affine()
    with torch.no_grad():
        whole = norm.double()(x.double().permute(3, 0, 1, 2)[None])[0].permute(1, 2, 3, 0)
    torch.testing.assert_close(x.double() * affine.scale.double() + affine.shift.double(), whole, rtol=0, atol=2e-3)


def test_convolutions_of_strips_stay_in_the_layout_with_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stride of the one video wrong by its length, torch copies what goes in and comes out: a third of the
    speed, and as much memory again."""
    layouts: set[tuple[bool, bool]] = set()
    convolve = torch.mkldnn_convolution

    def watched(x: Tensor, *arguments: Any) -> Tensor:
        out = convolve(x, *arguments)
        layouts.add((_has_channels_last(x), _has_channels_last(out)))
        return out

    monkeypatch.setattr(torch, "mkldnn_convolution", watched)
    codec = codec_of(dtype=torch.float32)
    exact(codec, PLENTY).decode(latents_of(video_shape(9, 16, 16), codec, torch.float32))
    assert layouts == {(True, True)}


def _has_channels_last(x: Tensor) -> bool:
    """As torch looks at it: by the strides, that of the batch included."""
    _, channels, frames, rows, columns = x.shape
    pixels = frames * rows * columns
    return x.stride() == (pixels * channels, 1, rows * columns * channels, columns * channels, channels)


def test_a_frame_is_carried_over_where_the_next_slab_is_longer() -> None:
    """As behind an enlarging layer, whose first slab lacks a frame."""
    torch.manual_seed(0)
    layer = strips.ConvLayer(torch.nn.Conv3d(2, 3, 3, dtype=torch.float64))
    x = torch.randn(9, 5, 4, 2, dtype=torch.float64)
    size = Size(2, 9, 5, 4)
    whole = layer.strip(size, (1, 4), {}, Scratch(x.dtype, x.device)).push(x)
    strip = layer.strip(size, (1, 4), {}, Scratch(x.dtype, x.device))
    parts = [strip.push(part) for part in x.split([1, 2, 4, 1, 1])]
    assert whole is not None
    torch.testing.assert_close(torch.cat([part for part in parts if part is not None]), whole)


def test_scratch_memory_is_used_again() -> None:
    scratch = Scratch(torch.float32, torch.device("cpu"))
    first = scratch.take("a", (2, 3)).fill_(7)
    assert scratch.take("a", (3, 1)).data_ptr() == first.data_ptr()
    assert scratch.take("b", (2, 3)).data_ptr() != first.data_ptr()
    larger = scratch.take("a", (5, 2))
    assert larger.flatten()[:6].tolist() == [7] * 6
    made = [scratch.once("fold", lambda: [1]) for _ in range(2)]
    assert made[0] is made[1]


def test_softmax_over_parts_is_softmax() -> None:
    queries, keys, values = torch.randn(3, 40, 8, dtype=torch.float64).unbind(0)
    keys = keys * 30  # so that the largest score changes a lot from part to part
    softmax = SoftmaxOverParts(queries)
    for some in range(0, 40, 7):
        softmax.add(keys[some : some + 7], values[some : some + 7])
    whole = torch.nn.functional.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]
    torch.testing.assert_close(softmax.result(), whole, rtol=0, atol=1e-12)


def test_a_job_knows_the_sizes_between_blocks() -> None:
    codec = codec_of()
    job = Job(blocks=codec.decoder_chain().blocks, given=Size(4, 3, 5, 3), itemsize=8, counts_result=True)
    assert job.sizes()[-1] == (3, 9, 40, 24)
    assert isinstance(plan(codec, "decode", video_shape(9, 40, 24), PLENTY), Plan)
