"""The render benchmark on a random model of a few thousand weights: every phase that it reports is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vidgen.benchmarks import render
from vidgen.vidgen_core.families import FAMILIES
from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig, Template, TextConfig
from vidgen.vidgen_core.text.dims import ClipDims, LlamaDims
from vidgen.vidgen_core.text.tokenizer import Tokenizer
from vidgen.vidgen_core.types import Defaults
from vidgen.vidgen_core.weights.config import config_to_json
from vidgen.vidgen_core.weights.save import save_checkpoint

LLAMA = LlamaDims(
    vocab_size=16, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=16, skip_layers=1
)
CLIP = ClipDims(
    vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_length=8, eos_token_id=2
)
PLAIN = Template(text="{}", crop_start=0)
CONFIGS = {
    "network": NetworkConfig(
        hidden_size=16,
        num_heads=2,
        num_double_blocks=1,
        num_single_blocks=1,
        num_refiner_blocks=1,
        rope_axes=(4, 2, 2),
        text_width=16,
        pooled_width=16,
        guidance_embed=False,
    ),
    "codec": CodecConfig(block_channels=(4, 4, 4, 4), layers_per_block=1, num_groups=2),
    "text": TextConfig(
        llama=LLAMA,
        clip=CLIP,
        max_length=8,
        pad_token_id=0,
        bos_token_id=1,
        video_template=PLAIN,
        image_template=PLAIN,
    ),
}
DEFAULTS = Defaults(num_frames=5, height_px=32, width_px=32, fps=8, num_steps=2, cfg=2.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = {"vidgen.tokenizer": Tokenizer.from_words(["a", "red", "star"]).to_json()}
    metadata = {"network": {"vidgen.defaults": config_to_json(DEFAULTS)}, "text": tokenizer}
    torch.manual_seed(0)
    for part, config in CONFIGS.items():
        module = FAMILIES["hunyuan"].parts[part].build(config, metadata.get(part, {}))
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        save_checkpoint(
            folder / f"{part}.safetensors",
            module.state_dict(),
            family="hunyuan",
            part=part,
            config=config,
            metadata=metadata.get(part),
        )
    return folder


def test_every_phase_is_measured(model_folder: Path) -> None:
    run = render.measure("a red star", str(model_folder), seed=0, threads=None)
    assert tuple(run["seconds"]) == render.PHASES
    assert all(seconds > 0 for seconds in run["seconds"].values())
    assert all(run["peak_bytes"][phase] > 0 for phase in render.PHASES)
    assert run["video"]["shape"] == [1, 3, 5, 32, 32]
    assert run["video"]["file_bytes"] > 0
    assert set(run["checkpoint"]) == {"network", "codec", "text"}


def fake_run(sample_s: float, peak_mib: int) -> dict[str, Any]:
    seconds = dict.fromkeys(render.PHASES, 1.0) | {"sample": sample_s}
    peaks = dict.fromkeys(render.PHASES, render.MIB) | {"decode": peak_mib * render.MIB}
    return {"seconds": seconds, "peak_bytes": peaks, "ffmpeg_peak_bytes": 2 * render.MIB}


def test_summary_takes_medians_of_time_and_the_worst_of_memory() -> None:
    runs = [fake_run(2.0, 300), fake_run(9.0, 500), fake_run(4.0, 400)]
    summary = render.summarise(runs)
    assert summary["sample_s"] == 4.0
    assert summary["after_load_s"] == 7.0  # text 1, sample 4, decode 1, encode file 1
    assert summary["total_s"] == 9.0  # and import 1, load 1
    assert summary["peak_mib"] == 500
    assert "encode file" in render.table(runs, summary)
