"""The main path: a prompt becomes a video; it can be stopped at any moment, taken up again, and refuses nonsense."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.bundle import Bundle, load_bundle, network_for_picture
from vidgen.vidgen_core.errors import (
    Cancelled,
    CheckpointError,
    FileError,
    NumericsError,
    SettingsError,
)
from vidgen.vidgen_core.generate import (
    Sampling,
    check_prompts,
    choose_threads,
    decode_latents,
    encode_prompts,
    fingerprint,
    generate,
    sample_latents,
    using_threads,
)
from vidgen.vidgen_core.memory.host import LocalHost, bundled_models
from vidgen.vidgen_core.preview import LatentRGB, fit_preview
from vidgen.vidgen_core.sampling import SAMPLERS
from vidgen.vidgen_core.tiling import Tiling
from vidgen.vidgen_core.types import Conditioning, Grid, VideoShape
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.load import read_tensors
from vidgen.vidgen_core.weights.save import save_tensors

PROMPT = "a red star spins"
STEPS = 3


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return load_bundle(tiny_bundle_dir, device="cpu")


def video_of(bundle: Bundle, prompt: str | list[str] = PROMPT, **settings: object) -> Tensor:
    return generate(bundle, prompt, settings=Sampling(**settings))  # type: ignore[arg-type]


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_video_of_the_default_size(bundle: Bundle) -> None:
    video = generate(bundle, PROMPT)
    assert video.shape == (1, 3, 9, 32, 32)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    assert video.std() > 0


def test_the_size_can_be_chosen_and_one_frame_is_an_image(bundle: Bundle) -> None:
    assert generate(bundle, PROMPT, VideoShape(num_frames=5, height_px=16, width_px=48)).shape == (1, 3, 5, 16, 48)
    assert generate(bundle, PROMPT, VideoShape(num_frames=1, height_px=32, width_px=32)).shape == (1, 3, 1, 32, 32)


def test_equal_runs_are_equal_and_seed_prompt_and_guidance_all_show(bundle: Bundle) -> None:
    first = video_of(bundle)
    assert torch.equal(first, video_of(bundle))
    for change in ({"seed": 1}, {"cfg": 3.0}, {"num_steps": 2}, {"negative_prompt": "blue"}, {"cfg_rescale": 0.5}):
        assert not torch.equal(first, video_of(bundle, **change)), change
    assert not torch.equal(first, video_of(bundle, "a blue circle"))


def test_unknown_words_and_long_prompts_still_render(bundle: Bundle) -> None:
    for prompt in ("quixotic zyzzyva ünïcödé 🦊", "red " * 500, "line\nbreak\ttab"):
        assert video_of(bundle, prompt, num_steps=1).isfinite().all()


def test_a_batch_of_four_equals_four_singles_to_the_bit(bundle: Bundle) -> None:
    """On a CPU each sample runs on its own, so there is nothing to round differently."""
    prompts = [PROMPT, "blue", "?", "a small green square moves left on a red background"]
    batch = video_of(bundle, prompts, seed=5)
    for index, prompt in enumerate(prompts):
        assert torch.equal(batch[index : index + 1], video_of(bundle, prompt, seed=5 + index))


def test_together_or_apart_is_the_same_up_to_rounding(bundle: Bundle) -> None:
    prompts = [PROMPT, "blue", "?"]
    expected = video_of(bundle, prompts)
    # Random weights with deviation 0.1 amplify float32 rounding about tenfold; trained ones do not.
    for change in ({"samples_at_once": 3}, {"samples_at_once": 2}, {"cfg_batched": False}):
        assert torch.allclose(video_of(bundle, prompts, **change), expected, atol=1e-4, rtol=0), change


def test_several_videos_of_one_prompt_differ_by_their_seed(bundle: Bundle) -> None:
    both = video_of(bundle, num_videos=2)
    assert torch.equal(both[1:], video_of(bundle, seed=1))


def test_guidance_that_acts_only_early_is_plain_later(bundle: Bundle) -> None:
    never = video_of(bundle, cfg=1.0)
    early = video_of(bundle, cfg=5.0, cfg_schedule="interval", cfg_start=1.0, cfg_end=0.9)
    assert not torch.equal(early, never)
    outside = video_of(bundle, cfg=5.0, cfg_schedule="interval", cfg_start=0.02, cfg_end=0.01)
    assert torch.allclose(outside, never, atol=1e-4, rtol=0)


def test_given_latents_are_changed_less_the_less_noise_they_get(bundle: Bundle) -> None:
    model = bundle.model
    cond = encode_prompts(bundle.text, model, [PROMPT])
    start = torch.randn(1, 16, 3, 4, 4)

    def distance(denoise: float) -> float:
        settings = Sampling(cfg=1.0, denoise=denoise)
        return (sample_latents(model, cond, None, start.shape, settings, start=start) - start).norm().item()

    assert distance(0.1) < distance(0.5)
    with pytest.raises(SettingsError, match="nothing to start from"):
        sample_latents(model, cond, None, start.shape, Sampling(cfg=1.0, denoise=0.5))


# --- bad input, before any work ---------------------------------------------------------------------------------------


class IdleHost(LocalHost):
    """Any work it hears of is a failure."""

    def progress(self, what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what} has begun")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_steps": 0}, "number of steps"),
        ({"num_steps": 2.5}, "number of steps"),
        ({"cfg": math.nan}, "cfg cannot be used"),
        ({"cfg": -1.0}, "cfg cannot be used"),
        ({"guidance": math.inf}, "guidance cannot be used"),
        ({"shift": 0.0}, "shift cannot be used"),
        ({"sampler": "eulr"}, 'did you mean "euler"'),
        ({"schedule": "simpel"}, 'did you mean "simple"'),
        ({"seed": -1}, "seed cannot be used"),
        ({"seed": 2**64}, "seed cannot be used"),
        ({"num_videos": 0}, "number of videos"),
        ({"threads": 0}, "number of threads"),
        ({"negative_prompt": 3}, "negative prompt"),
        ({"denoise": 0.0}, "denoising strength"),
        ({"cfg_schedule": "cosin"}, "cosine"),
        ({"cfg_rescale": 2.0}, "cfg_rescale"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_before_any_work(
    bundle: Bundle, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        generate(bundle, PROMPT, settings=Sampling(**settings), host=IdleHost())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((0, 32, 32), "use 1 frame."),
        ((2, 32, 32), "use 5 frames"),
        ((6, 32, 32), "use 5 frames"),
        ((-3, 32, 32), "frames"),
        ((9, -32, 32), "height"),
        ((9, 32, 40), "width.*multiple of 16"),
    ],
)
def test_sizes_that_cannot_be_made_are_refused_before_any_work(
    bundle: Bundle, size: tuple[int, int, int], says: str
) -> None:
    shape = VideoShape(num_frames=size[0], height_px=size[1], width_px=size[2])
    with pytest.raises(SettingsError, match=says):
        generate(bundle, PROMPT, shape, host=IdleHost())


@pytest.mark.parametrize("prompt", [None, 3, [], [PROMPT, 4], b"bytes", "null\0character", "", " \n", [PROMPT, ""]])
def test_only_texts_that_say_something_are_prompts(prompt: object) -> None:
    with pytest.raises(SettingsError):
        check_prompts(prompt)


def test_guidance_without_a_negative_prompt_is_refused(bundle: Bundle) -> None:
    cond = encode_prompts(bundle.text, bundle.model, [PROMPT])
    with pytest.raises(SettingsError, match="needs a negative prompt"):
        sample_latents(bundle.model, cond, None, (1, 16, 3, 4, 4), Sampling(cfg=4.0))


def test_numbers_that_are_not_finite_are_an_error(tiny_bundle_dir: Path) -> None:
    broken = load_bundle(tiny_bundle_dir, device="cpu")
    with torch.no_grad():
        broken.model.network.final_layer.linear.bias = torch.nn.Parameter(torch.full((64,), math.nan))
    with pytest.raises(NumericsError):
        generate(broken, PROMPT)
    with pytest.raises(NumericsError, match="decoded video"):
        decode_latents(broken.codec, torch.full((1, 16, 1, 4, 4), math.nan))


# --- stopping and going on --------------------------------------------------------------------------------------------


class StoppingHost(LocalHost):
    """Raises ``error`` when ``what`` has reached ``done``."""

    def stop_at(self, what: str, done: int, error: BaseException) -> StoppingHost:
        def on_progress(now: str, count: int, total: int) -> None:
            if (now, count) == (what, done):
                raise error

        self.on_progress = on_progress
        return self


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_stopped_run_goes_on_to_the_same_bits(bundle: Bundle, tmp_path: Path, sampler: str, step: int) -> None:
    expected = video_of(bundle, sampler=sampler)
    settings = Sampling(sampler=sampler, resume_path=tmp_path / "run.safetensors")
    with pytest.raises(Cancelled):
        generate(bundle, PROMPT, settings=settings, host=StoppingHost().stop_at("sample", step, Cancelled()))
    assert settings.resume_path is not None
    assert settings.resume_path.exists()
    events: list[tuple[str, int, int]] = []
    host = LocalHost(on_progress=lambda *event: events.append(event))
    assert torch.equal(generate(bundle, PROMPT, settings=settings, host=host), expected)
    assert ("sample", step, STEPS) in events
    assert not any(what == "sample" and done < step for what, done, _ in events)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk"), RuntimeError("crash")])
def test_whatever_ends_a_run_its_state_is_kept(bundle: Bundle, tmp_path: Path, error: BaseException) -> None:
    settings = Sampling(resume_path=tmp_path / "run.safetensors")
    with pytest.raises(type(error)):
        generate(bundle, PROMPT, settings=settings, host=StoppingHost().stop_at("sample", 2, error))
    assert torch.equal(generate(bundle, PROMPT, settings=settings), video_of(bundle))


def test_a_run_stopped_while_decoding_only_decodes_again(bundle: Bundle, tmp_path: Path) -> None:
    settings = Sampling(resume_path=tmp_path / "run.safetensors")
    with pytest.raises(Cancelled):
        generate(bundle, PROMPT, settings=settings, host=StoppingHost().stop_at("decode", 0, Cancelled()))
    forwards: list[object] = []
    hook = bundle.model.network.register_forward_pre_hook(lambda *args: forwards.append(args))
    video = generate(bundle, PROMPT, settings=settings)
    hook.remove()
    assert forwards == []
    assert torch.equal(video, video_of(bundle))


def test_a_run_stopped_before_its_first_step_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    settings = Sampling(resume_path=tmp_path / "run.safetensors")
    host = LocalHost()
    host.cancel()
    with pytest.raises(Cancelled):
        generate(bundle, PROMPT, settings=settings, host=host)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prompt", "change", "named"),
    [
        ("a blue circle", {}, "prompt"),
        (PROMPT, {"seed": 9}, "seed"),
        (PROMPT, {"cfg": 9.0}, "cfg"),
        (PROMPT, {"num_steps": 9, "shift": 2.0}, "num_steps and shift"),
        (PROMPT, {"sampler": "heun"}, "sampler"),
        ([PROMPT, PROMPT], {}, "prompt and shape"),
    ],
)
def test_a_saved_run_is_not_taken_for_another(
    bundle: Bundle, tmp_path: Path, prompt: str | list[str], change: dict[str, object], named: str
) -> None:
    settings = Sampling(resume_path=tmp_path / "run.safetensors")
    with pytest.raises(Cancelled):
        generate(bundle, PROMPT, settings=settings, host=StoppingHost().stop_at("sample", 1, Cancelled()))
    with pytest.raises(SettingsError, match=f"another {named}"):
        generate(bundle, prompt, settings=replace(settings, **change))  # type: ignore[arg-type]
    assert torch.equal(generate(bundle, PROMPT, settings=settings), video_of(bundle))


def test_a_saved_run_of_another_checkpoint_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    settings = Sampling(resume_path=tmp_path / "run.safetensors")
    with pytest.raises(Cancelled):
        generate(bundle, PROMPT, settings=settings, host=StoppingHost().stop_at("sample", 1, Cancelled()))
    other = replace(bundle, model=replace(bundle.model, fingerprint="other"))
    with pytest.raises(SettingsError, match="another checkpoint"):
        generate(other, PROMPT, settings=settings)


def test_a_damaged_or_foreign_state_is_refused(bundle: Bundle, tmp_path: Path, tiny_bundle_dir: Path) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError):
        video_of(bundle, resume_path=path)
    shutil.copy(tiny_bundle_dir / "vae.safetensors", path)
    with pytest.raises(CheckpointError, match="not a saved run"):
        video_of(bundle, resume_path=path)


def test_a_place_that_cannot_keep_a_run_is_refused_before_sampling(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be kept"):
        video_of(bundle, resume_path=tmp_path / "missing" / "run.safetensors")


def test_steps_alone_are_told_apart_by_their_conditioning(bundle: Bundle, tmp_path: Path) -> None:
    model, path, shape = bundle.model, tmp_path / "run.safetensors", (1, 16, 3, 4, 4)
    first, second = (encode_prompts(bundle.text, model, [prompt]) for prompt in (PROMPT, "blue"))
    assert fingerprint(first) == fingerprint(encode_prompts(bundle.text, model, [PROMPT])) != fingerprint(second)
    settings = Sampling(cfg=1.0, resume_path=path)
    with pytest.raises(Cancelled):
        sample_latents(model, first, None, shape, settings, host=StoppingHost().stop_at("sample", 1, Cancelled()))
    with pytest.raises(SettingsError, match="another conditioning"):
        sample_latents(model, second, None, shape, settings)


def test_cancelling_is_heard_inside_a_forward_and_the_hooks_go_away(bundle: Bundle) -> None:
    """The tiny network has two blocks and a refiner block: the question is asked before each of them."""

    class Impatient(LocalHost):
        asked = 0

        def check_cancelled(self) -> None:
            self.asked += 1
            if self.asked > 2:
                raise Cancelled

    def hooks() -> int:
        parts = (bundle.model.network, bundle.codec)
        return sum(len(m._forward_pre_hooks) for part in parts for m in part.modules())  # type: ignore[attr-defined]

    host, forwards = Impatient(), []
    handle = bundle.model.network.final_layer.register_forward_pre_hook(lambda *args: forwards.append(args))
    with pytest.raises(Cancelled):
        generate(bundle, PROMPT, host=host)
    assert forwards == []
    handle.remove()
    assert hooks() == 0
    video_of(bundle)
    assert hooks() == 0


def test_large_videos_are_decoded_in_tiles_that_can_be_stopped(bundle: Bundle) -> None:
    tiling = Tiling(tile_px=32, stride_px=16, tile_frames=8, stride_frames=8)
    events: list[tuple[int, int]] = []
    host = LocalHost(on_progress=lambda what, done, total: events.append((done, total)))
    latents = torch.randn(2, 16, 3, 6, 4)
    video = decode_latents(bundle.codec, latents, tiling=tiling, host=host)
    assert video.shape == (2, 3, 9, 48, 32)
    tiles = max(total for _, total in events) // 2
    assert tiles > 1
    assert events[-1] == (2, 2)
    assert (2 * tiles, 2 * tiles) in events
    with pytest.raises(Cancelled):
        decode_latents(bundle.codec, latents, tiling=tiling, host=StoppingHost().stop_at("decode", 2, Cancelled()))


# --- around it --------------------------------------------------------------------------------------------------------


def test_previews_are_small_pictures_of_every_step(bundle: Bundle) -> None:
    seen: list[Tensor] = []
    generate(bundle, PROMPT, host=LocalHost(on_preview=seen.append))
    assert [tuple(frames.shape) for frames in seen] == [(3, 4, 4, 3)] * STEPS
    assert all(frames.dtype == torch.uint8 for frames in seen)


class LinearCodec:
    """A codec whose preview is known: latents are the mean colour of 8 x 8 px, mixed by a matrix."""

    grid = Grid(channels=5, spatial=8, temporal=1, causal=False)
    mix = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))

    def encode(self, video: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        small = torch.nn.functional.avg_pool3d(video, (1, 8, 8))
        return torch.einsum("lc,bcthw->blthw", self.mix, small) + 0.3

    def decode(self, latents: Tensor) -> Tensor:
        raise AssertionError("the preview needs no decoder")


def test_the_preview_of_a_linear_codec_is_exact() -> None:
    codec = LinearCodec()
    preview = fit_preview(codec, ridge=1e-9)
    colours = torch.rand(1, 3, 2, 4, 4) * 1.8 - 0.9
    frames = preview.frames(codec.encode(colours.repeat_interleave(8, 3).repeat_interleave(8, 4)))
    expected = (colours[0].permute(1, 2, 3, 0) + 1) * 127.5
    assert (frames.float() - expected).abs().max() <= 0.6  # half a grey level, and float32
    assert LatentRGB.from_json(preview.to_json()) == preview


def test_threads_are_set_for_the_run_only(bundle: Bundle) -> None:
    before = torch.get_num_threads()
    with using_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    small, large = (1, 16, 3, 4, 4), (1, 16, 33, 1000, 1000)
    assert choose_threads(Sampling(), bundle.model, small) == 1
    assert choose_threads(Sampling(threads=3), bundle.model, small) == 3
    assert choose_threads(Sampling(threads=None), bundle.model, large) is None
    assert choose_threads(Sampling(), bundle.model, large) >= 1


def test_features_do_not_depend_on_neighbours(bundle: Bundle) -> None:
    long, short = "a small green square moves left on a red background", "blue"
    both = encode_prompts(bundle.text, bundle.model, [long, short, long])
    alone = encode_prompts(bundle.text, bundle.model, [short])
    taken: Conditioning = both.take(slice(1, 2))
    assert torch.equal(taken.context, alone.context)
    assert torch.equal(both.context[0], both.context[2])


# --- loading a whole model --------------------------------------------------------------------------------------------


def test_a_bundle_is_found_by_folder_or_files_and_describes_itself(tiny_bundle_dir: Path) -> None:
    files = sorted(tiny_bundle_dir.glob("*.safetensors"))
    for source in (tiny_bundle_dir, str(tiny_bundle_dir), files, list(reversed(files))):
        bundle = load_bundle(source, device="cpu")
        assert set(bundle.info()) == {"network", "codec", "text"}
    assert bundle.default_shape == VideoShape(num_frames=9, height_px=32, width_px=32)


def test_other_files_in_the_folder_do_no_harm(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bundle_dir, folder)
    save_tensors(folder / "a_lora.safetensors", {"lora": torch.zeros(1)})
    (folder / "broken.safetensors").write_bytes(b"<html>")
    load_bundle(folder, device="cpu")
    shutil.copy(folder / "vae.safetensors", folder / "vae2.safetensors")
    with pytest.raises(CheckpointError, match="two files with a VAE"):
        load_bundle(folder, device="cpu")


def test_a_model_without_a_part_is_refused(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    alone = tmp_path / "deep" / "alone"
    alone.mkdir(parents=True)
    shutil.copy(tiny_bundle_dir / "network.safetensors", alone)
    for source in (alone, alone / "network.safetensors", [tiny_bundle_dir / "network.safetensors"]):
        with pytest.raises(CheckpointError, match="lacks its VAE and text encoders"):
            load_bundle(source, device="cpu")
    with pytest.raises(FileError, match="no checkpoint in this folder"):
        load_bundle(tmp_path, device="cpu")
    with pytest.raises(FileError, match="no such model"):
        load_bundle(tmp_path / "nothing", device="cpu")
    shutil.copy(tiny_bundle_dir / "network.safetensors", tmp_path)
    (tmp_path / "vae.safetensors").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="web page"):
        load_bundle(tmp_path, device="cpu")


def test_a_network_beside_another_one(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    """A folder with both kinds makes videos from text; naming the other file takes VAE and text encoders beside it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_bundle_dir, folder)
    header = read_header(folder / "network.safetensors")
    config = header.metadata["vidgen.config"].replace('"image_condition":"none"', '"image_condition":"token_replace"')
    tensors = {name: tensor.clone() for name, tensor in read_tensors(header).items()}
    save_tensors(folder / "a_i2v.safetensors", tensors, {**header.metadata, "vidgen.config": config})
    assert load_bundle(folder, device="cpu").model.config.image_condition == "none"
    named = load_bundle(folder / "a_i2v.safetensors", device="cpu")
    assert named.model.config.image_condition == "token_replace"
    assert named.headers["codec"].path == folder / "vae.safetensors"
    assert network_for_picture(folder) == folder / "a_i2v.safetensors"
    assert network_for_picture(tiny_bundle_dir) is None
    shutil.copy(folder / "network.safetensors", folder / "other.safetensors")
    with pytest.raises(CheckpointError, match="two files with a"):
        load_bundle(folder, device="cpu")
    shutil.copy(folder / "a_i2v.safetensors", folder / "b_i2v.safetensors")
    assert network_for_picture(folder) is None  # nobody knows which of both


def test_who_names_no_model_gets_the_first_bundled_one() -> None:
    assert next(iter(bundled_models())) == "vidgen-tiny-hunyuan"
    part = load_bundle("vidgen-tiny-hunyuan/network.safetensors", device="cpu")
    assert part.headers["network"].path == bundled_models()["vidgen-tiny-hunyuan"] / "network.safetensors"


def test_parts_that_do_not_fit_are_refused(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    for part, old, new, says in (
        ("vae", '"latent_channels":16', '"latent_channels":8', "VAE does not belong"),
        ("text", '"hidden_size":32', '"hidden_size":64', "text encoders do not belong"),
    ):
        folder = tmp_path / part
        shutil.copytree(tiny_bundle_dir, folder)
        path = folder / f"{part}.safetensors"
        header = read_header(path)
        metadata = {**header.metadata, "vidgen.config": header.metadata["vidgen.config"].replace(old, new)}
        tensors = {name: tensor.clone() for name, tensor in read_tensors(header).items()}
        save_tensors(path, tensors, metadata)
        with pytest.raises(CheckpointError, match=says):
            load_bundle(folder, device="cpu")
