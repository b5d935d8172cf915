"""The mean of checkpoints is the mean of their numbers, in the last one's dtypes and with its config."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidgen.training.average import main
from vidgen.vidgen_core.model import load_network


@pytest.fixture
def files(tiny_bundle_dir: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A network and one that stands half a unit from it, in half the bytes."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    shutil.copy(tiny_bundle_dir / "network.safetensors", first)
    with safe_open(first, "pt") as file:
        metadata = file.metadata()
    moved = {name: (tensor + 0.5).half() for name, tensor in load_file(first).items()}
    save_file(moved, second, metadata | {"modelspec.title": "the later one"})
    return first, second


def test_the_mean_lies_between(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "mean.safetensors"
    assert main([*map(str, files), "-o", str(out)]) == 0
    first, mean = load_file(files[0]), load_file(out)
    assert set(mean) == set(first)
    for name, tensor in mean.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), first[name].float() + 0.25, atol=2e-3, rtol=2e-3)
    with safe_open(out, "pt") as file:
        assert file.metadata()["modelspec.title"] == "the later one"
    load_network(out)


def test_other_networks_are_refused(
    files: tuple[Path, Path], tiny_bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean.safetensors"
    assert main([str(files[0]), str(tiny_bundle_dir / "vae.safetensors"), "-o", str(out)]) == 1
    assert "not of one architecture" in capsys.readouterr().err
    assert main([str(files[0]), "-o", str(out)]) == 1
    assert "nothing to average" in capsys.readouterr().err
    assert not out.exists()
