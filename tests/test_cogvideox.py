"""CogVideoX from a prompt to a video: its three parts from files, through the main path and the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from vidgen.vidgen_core.errors import SettingsError
from vidgen.vidgen_core.families.cogvideox.config import CodecConfig, NetworkConfig, T5Dims, TextConfig, defaults
from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer
from vidgen.vidgen_core.families.cogvideox.text import T5Text
from vidgen.vidgen_core.families.cogvideox.vae import CogVideoXVAE
from vidgen.vidgen_core.generate import Sampling, generate, load_bundle
from vidgen.vidgen_core.keyframes import Keyframe
from vidgen.vidgen_core.text.sentencepiece import tokenizer_from_spiece
from vidgen.vidgen_core.types import VideoShape
from vidgen.vidgen_core.weights.save import save_checkpoint

TINY = NetworkConfig(
    hidden_size=48, num_heads=3, num_layers=1, text_width=32, text_length=8, time_width=16, trained_grid=(3, 2, 3),
    rope_axes=(4, 6, 6),
)  # fmt: skip
LATER = replace(TINY, patch=(2, 2, 2), trained_grid=(2, 5, 6), rope_fit="slice")
NETWORKS = {
    "2b": replace(TINY, positions="sincos", snr_shift=3.0),
    "5b": TINY,
    "5b_i2v": replace(TINY, in_channels=32, positions="learned"),
    "1.5_5b": LATER,
    "1.5_5b_i2v": replace(LATER, in_channels=32, offset_embed=True, image_scale=2.0),
}
SHAPE = VideoShape(num_frames=9, height_px=32, width_px=48)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of random weights in a folder, the three files that ours have."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle moves to the left", "a blue star turns"] * 4),
        model_writer=made, vocab_size=40, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    dims = T5Dims(vocab_size=160, hidden_size=32, num_layers=1, num_heads=2, head_size=8, intermediate_size=32)
    known: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name in known:
            return known[name]
        folder = tmp_path_factory.mktemp(name.replace(".", "_"))
        config, codec = NETWORKS[name], CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, vae = CogVideoXTransformer(config), CogVideoXVAE(codec)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            text = T5Text(TextConfig(t5=dims, max_length=8), tokenizer_from_spiece(made.getvalue()))
            small = replace(defaults(config), num_frames=9, height_px=32, width_px=48, num_steps=2)
        told = {"vidgen.defaults": json.dumps(asdict(small))}
        parts = (
            ("network", "network", network, config, told),
            ("vae", "codec", vae, codec, {}),
            ("text", "text", text, text.config, text.metadata()),
        )
        for file, part, module, own, metadata in parts:
            path = folder / f"{file}.safetensors"
            save_checkpoint(path, module.state_dict(), family="cogvideox", part=part, config=own, metadata=metadata)
        known[name] = folder
        return folder

    return write


@pytest.mark.parametrize("name", NETWORKS)
def test_a_prompt_becomes_a_video(name: str, folder_of: Callable[[str], Path]) -> None:
    bundle = load_bundle(folder_of(name))
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    takes = NETWORKS[name].takes_image
    keyframes = [Keyframe(image=picture)] if takes else []
    video = generate(bundle, "a red circle", keyframes=keyframes)
    assert video.shape == (1, 3, 9, 32, 48)
    assert bool(video.isfinite().all())
    other = generate(bundle, "a blue star", keyframes=keyframes)
    assert not torch.equal(video, other)
    assert torch.equal(generate(bundle, "a red circle", keyframes=keyframes), video)
    if takes:
        with pytest.raises(SettingsError, match="was given none"):
            generate(bundle, "a red circle")
        with pytest.raises(SettingsError, match="frame 0"):
            generate(bundle, "a red circle", keyframes=[Keyframe(image=picture, frame=8)])
    else:
        with pytest.raises(SettingsError, match="from text alone"):
            generate(bundle, "a red circle", keyframes=[Keyframe(image=picture)])


def test_a_length_that_the_vae_cannot_decode_is_refused_before_anything_runs(folder_of: Callable[[str], Path]) -> None:
    bundle = load_bundle(folder_of("5b"))
    with pytest.raises(SettingsError, match="frames"):
        generate(bundle, "a red circle", replace(SHAPE, num_frames=5))


def test_several_videos_are_what_their_seeds_give_alone(folder_of: Callable[[str], Path]) -> None:
    bundle = load_bundle(folder_of("1.5_5b"))
    both = generate(bundle, "a red circle", settings=Sampling(num_videos=2, seed=4))
    assert torch.equal(both[1:], generate(bundle, "a red circle", settings=Sampling(seed=5)))


@pytest.mark.parametrize("name", ["5b", "1.5_5b"])
def test_the_command_line_takes_what_the_checkpoint_recommends(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from vidgen.headless.cli import main
    from vidgen.vidgen_core.media import read_video

    out = tmp_path / "a.mp4"
    assert main(["generate", "a red circle", "--model", str(folder_of(name)), "-o", str(out), "-q"]) == 0
    frames, fps = read_video(out)
    assert frames.shape == (9, 32, 48, 3)
    assert fps == defaults(NETWORKS[name]).fps
