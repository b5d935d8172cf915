"""Runs that go wrong: stopped, out of memory, out of numbers, killed. What comes back, what is said, what goes on."""

from __future__ import annotations

import contextlib
import copy
import errno
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vidgen
from vidgen.benchmarks import leaks
from vidgen.vidgen_core import generate as generating
from vidgen.vidgen_core.bundle import Bundle, load_bundle
from vidgen.vidgen_core.codec import Codec
from vidgen.vidgen_core.errors import Cancelled, MemoryLimitError, NumericsError
from vidgen.vidgen_core.finite import Flag, is_finite
from vidgen.vidgen_core.generate import Sampling, decode_latents, encode_prompts, generate, sample_latents
from vidgen.vidgen_core.health import CheckedCodec, Suspect, find_suspect, remedy_for
from vidgen.vidgen_core.memory import cancel
from vidgen.vidgen_core.memory.attention_chunks import ChunkedAttention, plain_attention
from vidgen.vidgen_core.memory.cancel import check_cancelled, listening, result_of, watched
from vidgen.vidgen_core.memory.host import LocalHost
from vidgen.vidgen_core.memory.oom import Measure, is_out_of_memory, relieved, shortage
from vidgen.vidgen_core.memory.recast import recast
from vidgen.vidgen_core.resume import MAX_KEPT, RunFile, forget_finished
from vidgen.vidgen_core.sampling import SamplerState
from vidgen.vidgen_core.tiling import Tiling
from vidgen.vidgen_core.types import Conditioning, Grid
from vidgen.vidgen_core.weights.load import load_module

PROMPT = "a red star spins"
SHAPE = (1, 16, 2, 4, 4)


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return load_bundle(tiny_bundle_dir, device="cpu")


@pytest.fixture
def fragile(bundle: Bundle) -> Bundle:
    """A copy that a test may break."""
    return copy.deepcopy(bundle)


def prompt_of(bundle: Bundle) -> Conditioning:
    return encode_prompts(bundle.text, bundle.model, [PROMPT])


def sampled(bundle: Bundle, cond: Conditioning | None = None, **settings: Any) -> Tensor:
    options: dict[str, Any] = {"num_steps": 2, "cfg": 1.0, "seed": 3} | settings
    return sample_latents(bundle.model, cond or prompt_of(bundle), None, SHAPE, Sampling(**options))


# --- a stop is heard at once ------------------------------------------------------------------------------------------


class Asked(LocalHost):
    """Remembers that it was asked."""

    count = 0

    def check_cancelled(self) -> None:
        self.count += 1
        super().check_cancelled()


def test_every_layer_asks_on_a_cpu_and_the_hooks_go(bundle: Bundle) -> None:
    host, network = Asked(run_on="cpu"), bundle.model.network
    leaves = [module for module in network.modules() if not list(module.children())]
    with watched(host, network, bundle.codec, object()):
        hooked = [module for module in network.modules() if module._forward_pre_hooks]
        assert {id(leaf) for leaf in leaves} <= {id(module) for module in hooked}
        assert all(len(module._forward_pre_hooks) == 1 for module in hooked)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("part", ["load", "encode", "sample", "decode"])
def test_a_stop_is_heard_inside_every_part(bundle: Bundle, tiny_bundle_dir: Path, part: str) -> None:
    """Asked often, and not only at its begin: a stop at the last question of each part is obeyed there."""

    def run(host: LocalHost) -> None:
        with watched(host, bundle.text, bundle.model.network, bundle.codec), torch.no_grad():
            if part == "load":
                load_bundle(tiny_bundle_dir, device="cpu", host=host)
            elif part == "encode":
                encode_prompts(bundle.text, bundle.model, [PROMPT])
            elif part == "sample":
                sampled_with(host)
            else:
                bundle.codec.decode(torch.zeros(SHAPE))

    def sampled_with(host: LocalHost) -> None:
        sample_latents(bundle.model, cond, None, SHAPE, Sampling(num_steps=1, cfg=1.0), host=host)

    cond = prompt_of(bundle)
    host = leaks.CountingHost(run_on="cpu")
    run(host)
    assert host.asked > {"load": 50, "encode": 10, "sample": 30, "decode": 20}[part]
    for at in (1, host.asked // 2, host.asked):
        with pytest.raises(Cancelled):
            run(leaks.CountingHost(run_on="cpu", stop_at=at))
    assert not any(module._forward_pre_hooks for module in bundle.model.network.modules())


def test_nobody_is_asked_where_nobody_listens() -> None:
    host = LocalHost()
    host.cancel()
    check_cancelled()
    with listening(host), pytest.raises(Cancelled):
        check_cancelled()
    check_cancelled()


def test_waiting_for_a_disk_can_be_stopped() -> None:
    host, late = LocalHost(), Future()  # type: ignore[var-annotated]
    host.cancel()
    before = time.monotonic()
    with listening(host), pytest.raises(Cancelled):
        result_of(late)
    assert time.monotonic() - before < 10 * cancel.WAIT_S + 1
    late.set_exception(TimeoutError("the disk itself"))
    with pytest.raises(TimeoutError, match="the disk itself"):
        result_of(late)


def test_the_last_frames_of_a_file_can_be_stopped(tmp_path: Path) -> None:
    """ffmpeg works on for a while after it has been given everything."""
    from vidgen.vidgen_core.media.program import ended

    host = LocalHost()
    host.cancel()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with listening(host), pytest.raises(Cancelled):
            ended(process)
        process.kill()


def test_the_program_does_not_run_far_ahead_of_a_gpu() -> None:
    """Events stand in for the GPU's: the third block waits until the first one is done, and a stop ends the wait."""
    host, made = Asked(), deque[Any]()

    class Event:
        done = False

        def record(self) -> None:
            made.append(self)

        def query(self) -> bool:
            return self.done

    pace = cancel._Pace(host, Event)
    for _ in range(cancel.BLOCKS_AHEAD):
        pace(nn.Identity(), ())
    made[0].done = True
    pace(nn.Identity(), ())  # does not wait for the second
    host.cancel()
    with pytest.raises(Cancelled):
        pace(nn.Identity(), ())


def test_memory_comes_back(tiny_bundle_dir: Path) -> None:
    """The benchmark at a small size; its bar is 2 % after 50 of each."""
    report = leaks.measure(4, 4, str(tiny_bundle_dir))
    assert report["renders"]["count"] == report["cancels"]["count"] == 4
    assert report["passes"], leaks.table(report)
    assert report["files_left"] == ["a.mp4"]


# --- out of memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 100 bytes."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory_is_known_in_all_its_spellings(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_the_allocator_of_this_machine_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert shortage(caught.value) == f"{2**32:.2f} GiB at once"
    assert shortage(torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU")) == "20.00 GiB at once"


def test_measures_are_taken_one_after_the_other_and_then_it_is_said() -> None:
    tried: list[int] = []

    def work(plan: int) -> int:
        tried.append(plan)
        if plan > 2:
            raise MemoryError
        return plan

    halve = Measure(name="with half", tighten=lambda plan: plan // 2)
    never = Measure(name="never", tighten=lambda plan: None)
    options: dict[str, Any] = {"what": "The work", "advice": lambda: "ask for less than 8"}
    assert relieved(work, 8, [halve, never, halve], **options) == 2
    assert tried == [8, 4, 2]
    with pytest.raises(MemoryLimitError, match=r"does not fit.*also with half.*less than 8"):
        relieved(work, 80, [halve, never], **options)
    with pytest.raises(ZeroDivisionError):
        relieved(lambda plan: plan // 0, 1, [halve], **options)


def test_what_failed_is_freed_before_the_next_try() -> None:
    alive: list[int] = []

    class Big:
        def __init__(self) -> None:
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    def work(plan: int) -> int:
        assert alive == []
        big = Big()
        if plan:
            raise MemoryError
        del big
        return plan

    measure = Measure(name="again", tighten=lambda plan: plan - 1)
    assert relieved(work, 2, [measure, measure], what="It", advice=str) == 0


class SmallDevice:
    """A codec on a device that holds tiles of ``limit`` latents."""

    def __init__(self, codec: Codec, limit: int) -> None:
        self.codec, self.limit, self.refused = codec, limit, 0

    @property
    def grid(self) -> Grid:
        return self.codec.grid

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return self.codec.moments(video)

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.codec.encode(video, generator=generator)

    def decode(self, latents: Tensor) -> Tensor:
        if math.prod(latents.shape[2:]) > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.codec.decode(latents)


def test_decoding_goes_on_in_smaller_tiles(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    latents = torch.randn(1, 16, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    small = generating.SMALL_TILES
    device = SmallDevice(bundle.codec, 3 * 16 * 16)
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        video = decode_latents(device, latents, tiling=None)
    # 18 latents are 144 px: larger than the device takes in one piece, and than one small tile.
    assert device.refused == 2
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "Decoding ran out of memory (2.00 GiB at once)"
    ] * 2
    assert torch.equal(video, decode_latents(bundle.codec, latents, tiling=small))
    with pytest.raises(MemoryLimitError, match=r"also in tiles of 256 px.*9 frames of 144 x 144 px"):
        decode_latents(SmallDevice(bundle.codec, 1), latents, tiling=None)


class SmallNetwork(nn.Module):
    """A network on a device that holds one sample at a time."""

    def __init__(self, network: nn.Module, limit: int = 1) -> None:
        super().__init__()
        self.network, self.config, self.limit, self.refused = network, network.config, limit, 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.network(x, *args, **kwargs)


def test_sampling_goes_on_with_one_prompt_at_a_time(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    cond, settings = prompt_of(bundle), Sampling(num_steps=3, cfg=3.0, samples_at_once=2, seed=1)
    network = SmallNetwork(bundle.model.network)
    model = replace(bundle.model, network=network)
    shape = (2, *SHAPE[1:])
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        latents = sample_latents(model, cond, cond, shape, settings)
    assert network.refused == 1
    assert "one sample and one prompt at a time" in caplog.text
    one_by_one = replace(settings, cfg_batched=False, samples_at_once=1)
    assert torch.equal(latents, sample_latents(bundle.model, cond, cond, shape, one_by_one))
    network.limit = 0
    with pytest.raises(MemoryLimitError, match=r"chunks of queries.*beside the weights: try 1 frames in place of 5"):
        sample_latents(model, cond, cond, shape, settings)


def test_a_run_that_is_out_of_memory_for_good_can_be_taken_up(bundle: Bundle, tmp_path: Path) -> None:
    """On a larger machine, or with other programs closed."""
    path, network = tmp_path / "run", SmallNetwork(bundle.model.network)

    class Filling(LocalHost):
        def progress(self, what: str, done: int, total: int) -> None:
            network.limit = 0 if (what, done) == ("sample", 1) else network.limit

    cond, settings = prompt_of(bundle), Sampling(num_steps=3, cfg=1.0, resume_path=path)
    model = replace(bundle.model, network=network)
    with pytest.raises(MemoryLimitError):
        sample_latents(model, cond, None, SHAPE, settings, host=Filling())
    assert SamplerState.load(path).step == 1
    expected = sample_latents(bundle.model, cond, None, SHAPE, replace(settings, resume_path=None))
    assert torch.equal(sample_latents(bundle.model, cond, None, SHAPE, settings), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a POSIX system whose limits hold: Linux")
def test_a_real_limit_on_memory_is_survived() -> None:
    """An address space too small for one pass: the decoder goes on in tiles; the process lives."""
    code = """
import logging, resource, torch
logging.basicConfig(format="%(message)s")
torch.set_num_threads(1)
from vidgen.vidgen_core.families.hunyuan.codec import HunyuanCodec
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
from vidgen.vidgen_core.generate import decode_latents
config = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
codec = HunyuanCodec(CausalVAE(config).eval())
decode_latents(codec, torch.zeros(1, 16, 1, 4, 4))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(tuple(decode_latents(codec, torch.zeros(1, 16, 3, 60, 60), tiling=None).shape))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3, 9, 480, 480)"
    assert "Decoding ran out of memory" in done.stderr


def run_python(code: str, *, wait: bool = True, **environment: str) -> Any:
    """A process of its own that imports the package as this one does."""
    package = Path(vidgen.__file__).resolve().parent
    begin = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('vidgen', {str(package / '__init__.py')!r},\n"
        f"    submodule_search_locations=[{str(package)!r}])\n"
        "sys.modules['vidgen'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
    )
    command = [sys.executable, "-c", begin + code]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    if wait:
        return subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


# --- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_bad_number_is_seen(bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5, dtype=dtype)
    assert Flag(x)
    assert Flag(x).is_known
    x[1, 2] = bad
    assert not Flag(x)
    assert is_finite(torch.zeros(0))


def suspect_of(bundle: Bundle, cond: Conditioning | None = None, **settings: Any) -> str:
    with pytest.raises(NumericsError) as caught:
        sampled(bundle, cond, retry=False, **settings)
    return str(caught.value)


def test_a_weight_is_named(fragile: Bundle) -> None:
    fragile.model.network.double_blocks[0].img_mlp.fc2.weight.data[3, 1] = math.nan
    message = suspect_of(fragile)
    assert "step 1 of 2" in message
    assert "double_blocks.0.img_mlp.fc2.weight: a weight is not finite" in message
    assert "another copy" in message


def test_a_prompt_is_named(bundle: Bundle) -> None:
    cond = prompt_of(bundle)
    assert cond.context is not None
    assert "prompt's text: what it was given" in suspect_of(bundle, replace(cond, context=cond.context * math.inf))


def overflowing(bundle: Bundle) -> Bundle:
    """In float16, with a layer whose numbers are too large for it."""
    block = bundle.model.network.single_blocks[0]
    block.modulation.linear.bias.data[32:64] = 1000  # the scale
    block.linear1.weight.data.mul_(300)
    block.linear2.weight.data.mul_(1e-5)
    bundle.model.network.half()
    return bundle


def test_float16_overflows_are_named_and_retried_in_bfloat16(fragile: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    overflowing(fragile)
    message = suspect_of(fragile)
    assert "single_blocks.0" in message
    assert "float16" in message
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        latents = sampled(fragile)
    assert [record.message.rpartition(": ")[2] for record in caplog.records] == ["again in bfloat16"]
    assert bool(latents.isfinite().all())
    assert {p.dtype for p in fragile.model.network.parameters()} == {torch.float16}


def test_a_lora_is_named(fragile: Bundle, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from vidgen.vidgen_core.weights.lora import read_lora

    name = "lora_unet_single_blocks_0_linear2"
    width = fragile.model.network.single_blocks[0].linear2.in_features
    tensors = {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(32, 2)}
    tensors = {name: 1e30 * tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "style.safetensors")
    for mode in ("runtime", "merge"):
        model = fragile.model.with_lora(read_lora(tmp_path / "style.safetensors"), mode=mode)  # type: ignore[arg-type]
        message = suspect_of(replace(fragile, model=model))
        assert "single_blocks.0.linear2: a LoRA acts there" in message, mode
        assert "style" in message


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.inner(x)
        return nn.functional.scaled_dot_product_attention(q, q, q).softmax(-1)


def test_attention_is_named_also_where_its_kernel_is_not_torchs() -> None:
    torch.manual_seed(0)
    module = Attending()
    x = torch.full((1, 1, 3, 4), 1e30)
    module.inner.weight.data.copy_(torch.eye(4))
    found = find_suspect(module, lambda: module(x), inputs={"x": x})
    assert (found.cause, found.where) == ("attention", "Attending")

    class Foreign(Attending):
        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            with torch._C.DisableTorchFunction():  # as an extension's kernel, nobody sees it
                out = out * math.nan
            return out + 1

    x = torch.zeros(1, 4)
    module = Foreign()
    assert find_suspect(module, lambda: module(x), inputs={"x": x}).detail == "a kernel that is not torch's own"


def test_what_is_finite_the_second_time_is_not_blamed_on_anything() -> None:
    module, x = nn.Linear(2, 2), torch.zeros(1, 2)
    assert find_suspect(module, lambda: module(x), inputs={"x": x}).cause == "unknown"
    assert find_suspect(module, lambda: module(x), inputs={"x": x}, compiled=True).cause == "compile"
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_guidance_is_told_from_the_network() -> None:
    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    found = find_suspect(module, lambda: module(x) * 1e38 * 1e38, inputs={"x": x})
    assert found.cause == "guidance"
    assert "smaller guidance scale" in found.advice


@pytest.mark.parametrize(
    ("cause", "dtype", "name"),
    [
        ("overflow", torch.float16, "in bfloat16"),
        ("attention", torch.float16, "in bfloat16"),
        ("attention", torch.bfloat16, "with plain attention"),
        ("unknown", torch.float32, "with plain attention"),
        ("compile", torch.float16, "without torch.compile"),
        ("operation", torch.float32, None),
        ("weight", torch.float16, None),
        ("lora", torch.float16, None),
    ],
)
def test_every_suspect_has_its_remedy(cause: Any, dtype: torch.dtype, name: str | None) -> None:
    module = nn.Linear(2, 2).to(dtype)
    remedy = remedy_for(Suspect(cause=cause), module, dtype=torch.bfloat16, fragile=(torch.float16,))
    assert (None if remedy is None else remedy.name) == name
    assert Suspect(cause=cause).advice
    if remedy is not None:
        with remedy.apply():
            pass


def test_a_decoder_in_half_precision_is_tried_again_in_float32(
    fragile: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    codec = fragile.codec
    assert isinstance(codec, nn.Module)
    latents = torch.randn(1, 16, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    for conv in (codec.vae.post_quant_conv, codec.vae.decoder.conv_in.conv):
        conv.weight.data.mul_(300)
        conv.bias.data.mul_(300)
    expected = decode_latents(codec, latents)
    codec.half()
    with pytest.raises(NumericsError, match=r"decoded video.*decoder.conv_in.conv.*float16"):
        decode_latents(codec, latents, retry=False)
    with caplog.at_level(logging.WARNING, logger="vidgen"):
        video = decode_latents(codec, latents, tiling=Tiling(tile_px=32, stride_px=16))
    assert len(caplog.records) == 1, "once, and the tiles after it are in float32 at once"
    assert "decoding again in float32" in caplog.text
    assert {p.dtype for p in codec.parameters()} == {torch.float16}
    again = decode_latents(codec, latents)
    # The weights were rounded to half precision, 3 digits, of which some are lost on the way.
    assert float((again - expected).abs().mean()) < 0.02
    assert video.shape == expected.shape


def test_latents_that_are_bad_are_not_the_decoders_fault(bundle: Bundle) -> None:
    with pytest.raises(NumericsError, match=r"latents: what it was given is not finite"):
        decode_latents(bundle.codec, torch.full(SHAPE, math.nan))


def test_a_black_video_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    class Black(SmallDevice):
        def decode(self, latents: Tensor) -> Tensor:
            return torch.full((1, 3, 5, 32, 32), -1.0)

    codec = Black(None, 0)  # type: ignore[arg-type]
    decode_latents(codec, torch.zeros(SHAPE), tiling=None)
    assert "black throughout" in caplog.text


def test_recast_gives_back_the_same_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = dict((*module.named_parameters(), *module.named_buffers()))
    with contextlib.suppress(KeyError), recast(module, torch.bfloat16):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert module[2].num_batches_tracked.dtype == torch.int64
        raise KeyError
    after = dict((*module.named_parameters(), *module.named_buffers()))
    assert all(after[name] is tensor for name, tensor in before.items())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_chunks_is_the_same_attention(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidgen.vidgen_core.nn.attention import attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for length in (13, 7, 7))
    mask = torch.rand(2, 1, 13, 7, generator=generator) > 0.3 if masked else None
    if mask is not None:
        mask[..., 0] = True
    expected = attention(q, k, v, mask=mask)
    monkeypatch.setattr("vidgen.vidgen_core.memory.attention_chunks.SCORE_BYTES", 4 * 2 * 3 * 7 * 4)
    for mode in (ChunkedAttention(), plain_attention()):
        with mode:
            # Sums in another order: a few roundings of float32.
            torch.testing.assert_close(attention(q, k, v, mask=mask), expected, atol=1e-6, rtol=1e-5)


def test_the_state_goes_back_when_a_gpu_tells_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is known only when it is waited for stands in for the GPU's."""
    from vidgen.vidgen_core import sampling
    from vidgen.vidgen_core.diffusion import flow_matching

    class Late(Flag):
        is_known = False  # type: ignore[assignment]

    monkeypatch.setattr(sampling, "Flag", Late)
    ts, x = torch.linspace(1, 0, 7, dtype=torch.float64), torch.ones(1, 2)
    asked: list[int] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(1)
        return x * (math.nan if len(asked) == bad else 0.5)

    for bad in (3, 6):
        asked.clear()
        state = SamplerState()
        with pytest.raises(NumericsError, match=f"step {bad} of 6"):
            sampling.sample("dpmpp_2m", denoise, flow_matching(), x, ts, state=state)
        assert len(asked) == min(bad + 1, 6), "one step too many at most"
        assert state.step == bad - 1
        assert state.x is not None
        assert state.x.isfinite().all()
        bad_before, bad = bad, 0
        asked.clear()
        again = sampling.sample("dpmpp_2m", denoise, flow_matching(), x, ts, state=state)
        assert torch.equal(again, sampling.sample("dpmpp_2m", denoise, flow_matching(), x, ts))
        bad = bad_before


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
def test_a_run_that_was_killed_goes_on_to_the_same_bits(bundle: Bundle, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a step: nothing of the process runs any more, and what it kept is whole."""
    code = f"""
import os, signal
from pathlib import Path
from vidgen.vidgen_core import resume
from vidgen.vidgen_core.generate import Sampling, generate, load_bundle
from vidgen.vidgen_core.memory.host import LocalHost
resume.SAVE_EVERY_S = 0
asked = [0]
class Dying(LocalHost):
    def check_cancelled(self):
        if self.done == 2:
            asked[0] += 1
        if asked[0] == 12:
            os.kill(os.getpid(), signal.SIGKILL)
    def progress(self, what, done, total):
        self.done = done if what == "sample" else 0
Dying.done = 0
settings = Sampling(num_steps=4, resume_path=Path({str(tmp_path)!r}))
generate(load_bundle({str(tiny_bundle_dir)!r}, device="cpu"), {PROMPT!r}, settings=settings, host=Dying())
"""
    done = run_python(code)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (path,) = tmp_path.iterdir()
    assert SamplerState.load(path).step == 2
    steps: list[int] = []
    host = LocalHost(on_progress=lambda what, done, total: steps.append(done) if what == "sample" else None)
    video = generate(bundle, PROMPT, settings=Sampling(num_steps=4, resume_path=tmp_path), host=host)
    assert steps == [2, 3, 4]
    assert torch.equal(video, generate(bundle, PROMPT, settings=Sampling(num_steps=4)))
    assert list(tmp_path.iterdir()) == []


def state_of(step: int, x: float = 1.0) -> SamplerState:
    ts = torch.linspace(1, 0, 4, dtype=torch.float64)
    return SamplerState(sampler="euler", step=step, x=torch.full((1, 2), x), ts=ts)


def test_a_folder_keeps_no_run_that_is_as_quickly_made_again(tmp_path: Path) -> None:
    for run, is_kept in ((RunFile.at(tmp_path, {}), False), (RunFile.at(tmp_path / "named", {}), True)):
        run.keep(state_of(1))
        run.save()
        assert run.path.exists() == is_kept


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is long enough to be kept."""
    monkeypatch.setattr("vidgen.vidgen_core.resume.SAVE_EVERY_S", 0.0)


@pytest.mark.usefixtures("_at_once")
def test_a_folder_keeps_runs_apart_by_what_they_are_made_of(tmp_path: Path) -> None:
    first, second = (RunFile.at(tmp_path, {"seed": seed}) for seed in (1, 2))
    assert first.path != second.path == RunFile.at(tmp_path, {"seed": 2}).path
    first.keep(state_of(1))
    first.save()
    assert RunFile.at(tmp_path, {"seed": 1}).path.exists()
    first.path.write_bytes(b"cut off")
    assert RunFile.at(tmp_path, {"seed": 1}).load().step == 0
    assert not first.path.exists()


@pytest.mark.usefixtures("_at_once")
def test_a_folder_does_not_fill_up(tmp_path: Path) -> None:
    for number in range(MAX_KEPT + 3):
        run = RunFile.at(tmp_path, {"seed": number})
        run.keep(state_of(1))
        run.save()
        os.utime(run.path, (number, number))
    assert len(list(tmp_path.iterdir())) == MAX_KEPT
    half_written = tmp_path / f"{run.path.name}.123.part"
    half_written.write_bytes(b"x")
    RunFile.at(tmp_path, {"seed": number})
    assert not half_written.exists()


@pytest.mark.usefixtures("_at_once")
def test_finished_runs_go_when_their_video_is_safe(tmp_path: Path) -> None:
    done, half = (RunFile.at(tmp_path, {"step": step}) for step in (3, 2))
    for run, step in ((done, 3), (half, 2)):
        run.keep(state_of(step))
        run.save()
    forget_finished(tmp_path)
    assert list(tmp_path.iterdir()) == [half.path]
    forget_finished(tmp_path / "missing")


def test_numbers_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    run = RunFile(tmp_path / "run", {})
    run.keep(state_of(1))
    run.save()
    run.keep(state_of(2, math.nan))
    run.save()
    assert SamplerState.load(tmp_path / "run").step == 1


def test_loading_is_one_of_the_loops_that_listen(tmp_path: Path, tiny_bundle_dir: Path) -> None:
    """Also while the file is checked, which is before any weight is read."""
    from vidgen.vidgen_core.weights.header import read_header

    header = read_header(tiny_bundle_dir / "vae.safetensors")
    host = leaks.CountingHost(stop_at=1)
    with listening(host), pytest.raises(Cancelled):
        load_module(header, build_nothing(header))
    assert host.asked == 1


def build_nothing(header: Any) -> Callable[[], nn.Module]:
    from vidgen.vidgen_core.families.hunyuan.config import CodecConfig
    from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE

    config = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
    return lambda: CausalVAE(config)


def test_the_check_codec_is_a_codec(bundle: Bundle) -> None:
    video = torch.zeros(1, 3, 5, 16, 16)
    with CheckedCodec(bundle.codec) as checked:
        assert isinstance(checked, Codec)
        assert torch.equal(checked.encode(video), bundle.codec.encode(video))
        assert torch.equal(checked.moments(video)[1], bundle.codec.moments(video)[1])
