"""The host without ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vidgen.vidgen_core.errors import Cancelled, FileError
from vidgen.vidgen_core.memory.host import (
    LocalHost,
    available_cores,
    available_memory,
    bundled_models,
    default_device,
)


def test_a_file_is_found_by_path_or_in_the_models_folders(tmp_path: Path) -> None:
    direct, kept = tmp_path / "direct.safetensors", tmp_path / "models" / "vae" / "kept.safetensors"
    kept.parent.mkdir(parents=True)
    direct.touch()
    kept.touch()
    host = LocalHost(folders=(tmp_path / "models",))
    assert host.find("codec", str(direct)) == direct
    assert host.find("codec", "kept.safetensors") == kept
    with pytest.raises(FileError, match="No network checkpoint"):
        host.find("network", "kept.safetensors")


def test_bundled_checkpoints_are_found_by_name() -> None:
    for name, folder in bundled_models().items():
        for file in folder.glob("*.safetensors"):
            assert LocalHost().find("network", f"{name}/{file.name}") == file


def test_nothing_outside_a_bundled_folder_is_found() -> None:
    for name in bundled_models():
        with pytest.raises(FileError):
            LocalHost().find("network", f"{name}/../../pyproject.toml")


def test_cancelling_raises_at_the_next_question() -> None:
    host = LocalHost()
    host.check_cancelled()
    host.cancel()
    with pytest.raises(Cancelled):
        host.check_cancelled()


def test_a_preview_nobody_watches_is_not_computed() -> None:
    def frames() -> torch.Tensor:
        raise AssertionError("computed in vain")

    LocalHost().preview(frames)
    seen: list[torch.Tensor] = []
    LocalHost(on_preview=seen.append).preview(lambda: torch.zeros(1))
    assert len(seen) == 1


def test_progress_reaches_the_callback() -> None:
    seen: list[tuple[str, int, int]] = []
    LocalHost(on_progress=lambda *event: seen.append(event)).progress("sample", 1, 3)
    assert seen == [("sample", 1, 3)]


def test_the_machine_is_described_in_sane_numbers() -> None:
    assert available_cores() >= 1
    assert available_memory() > 0
    assert default_device().type in ("cpu", "cuda", "mps")
    assert LocalHost(run_on="cpu").device() == torch.device("cpu")
    LocalHost(run_on="cpu").make_room(10**15)
