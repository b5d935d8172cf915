"""Checkpoint files: headers, refusals that say what to do, atomic writes, loading by assignment."""

from __future__ import annotations

import contextlib
import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from vidgen.vidgen_core.errors import CheckpointError, FileError, RecipeError, UserError
from vidgen.vidgen_core.families.hunyuan.config import NetworkConfig, Template, TextConfig
from vidgen.vidgen_core.weights import files
from vidgen.vidgen_core.weights.config import config_from_dict, config_from_json, config_to_json
from vidgen.vidgen_core.weights.header import read_header
from vidgen.vidgen_core.weights.load import load_module, read_tensors
from vidgen.vidgen_core.weights.save import atomic_path, save_checkpoint, save_json, save_tensors

EIGHT = torch.float8_e4m3fn
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1.0, 2.0]).half()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_tensors(path, TENSORS, {"key": "value"})
    return path


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- headers ----------------------------------------------------------------------------------------------------------


def test_a_header_tells_names_shapes_dtypes_and_metadata(checkpoint: Path) -> None:
    header = read_header(checkpoint)
    assert header.shapes == {"weight": (2, 3), "bias": (2,)}
    assert header.tensors["bias"].dtype == torch.float16
    assert header.metadata == {"key": "value"}
    assert header.num_parameters == 8
    assert header.num_bytes == checkpoint.stat().st_size
    assert {name: tensor.device.type for name, tensor in header.meta_tensors().items()} == dict.fromkeys(
        TENSORS, "meta"
    )


def test_the_digest_follows_the_content_and_not_the_name(checkpoint: Path, tmp_path: Path) -> None:
    same, other = tmp_path / "renamed.safetensors", tmp_path / "other.safetensors"
    same.write_bytes(checkpoint.read_bytes())
    save_tensors(other, {**TENSORS, "weight": TENSORS["weight"] + 1}, {"key": "value"})
    assert read_header(same).digest == read_header(checkpoint).digest != read_header(other).digest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(100), "torch file is damaged, cut short"),
        (b"\x80\x02}q\x00" + bytes(100), "pickled PyTorch"),
        (b"GGUF\x03\x00\x00\x00" + b"\x09\x00\x00", "GGUF file is damaged"),
        (b"<!DOCTYPE html><html>not found</html>" + bytes(100), "web page"),
        (b"\n <html>not found</html>" + bytes(100), "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "PNG"),
        (b"hello", "not a checkpoint"),
        (b"just some text that is longer than eight bytes", "not a checkpoint"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_header(path)


@pytest.mark.parametrize("kept", [4, 20, 100, -1])
def test_a_file_cut_anywhere_is_refused(checkpoint: Path, kept: int) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cut short|not a checkpoint"):
        read_header(checkpoint)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{broken", "not valid JSON"),
        (b"[1, 2, 3]", "not a table"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "malformed"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "size of 'w'"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, "size of 'w'"),
        ({"w": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}, "number format"),
        ({"__metadata__": 3}, "metadata"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "cut short"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: object, says: str) -> None:
    path = raw_file(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=says):
        read_header(path)


def test_bytes_after_the_last_tensor_are_refused(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="4 bytes more"):
        read_header(checkpoint)


def test_a_missing_file_and_a_folder_are_file_errors(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_header(tmp_path / "nothing.safetensors")
    with pytest.raises(FileError, match="folder"):
        read_header(tmp_path)
    with pytest.raises(FileError, match="usable path"):
        read_header(tmp_path / ("x" * 5000))


# --- configs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    size: int
    kind: Literal["a", "b"] = "a"
    limit: float | None = None


@pytest.mark.parametrize(
    "config",
    [NetworkConfig(hidden_size=8, patch=(1, 1, 1)), TextConfig(video_template=Template(text="{} ü\n", crop_start=2))],
)
def test_a_config_survives_json(config: object) -> None:
    assert config_from_json(type(config), config_to_json(config), where="test") == config


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 1, "kin": "a"}, "did you mean 'kind'"),
        ({"size": "1"}, "Sample.size"),
        ({"size": True}, "Sample.size"),
        ({"size": 1, "kind": "c"}, "Sample.kind"),
        ({"size": 1, "limit": "x"}, "Sample.limit"),
        ({}, "needs 'size'"),
        ([1], "not a table"),
    ],
)
def test_a_wrong_config_names_the_key(values: object, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        config_from_dict(Sample, values, where="recipe.toml", error=RecipeError)


def test_optional_numbers_take_none_and_whole_numbers() -> None:
    assert config_from_dict(Sample, {"size": 1, "limit": None}, where="test").limit is None
    assert config_from_dict(Sample, {"size": 1, "limit": 2}, where="test").limit == 2.0


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    save_json(path, {"a": 1})

    def write_and_fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_ordinary_permissions(tmp_path: Path, checkpoint: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.touch()
    save_json(ours, 1)
    assert ours.stat().st_mode == plain.stat().st_mode == checkpoint.stat().st_mode


def test_a_missing_folder_or_a_folder_as_target_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="folder does not exist"):
        save_tensors(tmp_path / "missing" / "a.safetensors", TENSORS)
    with pytest.raises(FileError, match="output is a folder"):
        save_tensors(tmp_path, TENSORS)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a POSIX system with sysfs")
def test_no_permission_is_a_file_error() -> None:
    """In /sys not even root may make a file."""
    with pytest.raises(FileError, match="may not be written"):
        save_tensors("/sys/kernel/a.safetensors", TENSORS)


@contextlib.contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """The kernel refuses longer files half-way, as a full disk does."""
    resource = pytest.importorskip("resource", reason="needs a POSIX system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_file_error_and_leaves_nothing(tmp_path: Path) -> None:
    with no_file_above(4096), pytest.raises(FileError, match="disk is full"):
        save_tensors(tmp_path / "big.safetensors", {"w": torch.zeros(100_000)})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    config = NetworkConfig(hidden_size=8)
    save_checkpoint(
        path,
        TENSORS,
        family="hunyuan",
        part="network",
        config=config,
        metadata={"modelspec.title": "mine"},
        dtype=torch.bfloat16,
    )
    header = read_header(path)
    assert header.metadata["vidgen.family"] == "hunyuan"
    assert header.metadata["vidgen.part"] == "network"
    assert header.metadata["vidgen.format"] == "1"
    assert header.metadata["modelspec.title"] == "mine"
    assert config_from_json(NetworkConfig, header.metadata["vidgen.config"], where="test") == config
    assert {info.dtype for info in header.tensors.values()} == {torch.bfloat16}


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_tensors(tmp_path / "a.safetensors", {"a": shared, "b": shared[:2], "c": shared[::2]})
    read = read_tensors(read_header(tmp_path / "a.safetensors"))
    assert torch.equal(read["b"], shared[:2])
    assert torch.equal(read["c"], shared[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_are_cast_piece_by_piece_as_they_are_read(tmp_path: Path, monkeypatch, dtype: torch.dtype) -> None:
    """What torch's own cast of the whole gives; numbers that are not floating, float8 and strided ones stay."""
    monkeypatch.setattr(files, "_PIECE_BYTES", 64)
    stored = {
        "half": torch.randn(7, 11).half(), "brain": torch.randn(33).bfloat16(), "single": torch.randn(5, 5),
        "one": torch.tensor(2.5), "none": torch.zeros(0, 3), "count": torch.arange(40),
        "eight": torch.randn(9).to(EIGHT),
    }  # fmt: skip
    save_tensors(tmp_path / "a.safetensors", stored)
    header = read_header(tmp_path / "a.safetensors")
    read = read_tensors(header, mapped=False, dtype=dtype)
    for name, tensor in stored.items():
        stays = name in ("count", "eight")
        assert read[name].dtype == (tensor.dtype if stays else dtype)
        assert torch.equal(read[name].float(), tensor.to(read[name].dtype).float())
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="became shorter"):
        read_tensors(header, mapped=False, dtype=dtype)


# --- loading ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {**Small().state_dict(), "count": torch.tensor([7])}
    save_tensors(tmp_path / "small.safetensors", state)
    return tmp_path / "small.safetensors", state


def test_loaded_weights_are_the_files_bits(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, state = small
    module = load_module(read_header(path), Small)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_cast_on_the_way_in_leaves_whole_numbers_alone(small: tuple[Path, dict[str, torch.Tensor]]) -> None:
    module = load_module(read_header(small[0]), Small, dtype=torch.bfloat16)
    assert module.layer.weight.dtype == torch.bfloat16
    assert module.count.dtype == torch.long


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("layer.bias"), "lacks 1 of 3 weights.*layer.bias"),
        (lambda s: s.update({"layer.wieght": s.pop("layer.weight")}), "without layer.weight.*unknown layer.wieght"),
        (lambda s: s.update({"layer.bais": torch.zeros(1)}), "does not know.*layer.bais.*layer.bias"),
        (lambda s: s.update({"layer.bias": torch.zeros(3)}), r"'layer.bias' has another shape.*\(3,\).*\(2,\)"),
    ],
)
def test_a_wrong_set_of_weights_is_named(
    small: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, change: object, says: str
) -> None:
    state = dict(small[1])
    change(state)  # type: ignore[operator]
    save_tensors(tmp_path / "wrong.safetensors", state)
    with pytest.raises(CheckpointError, match=says):
        load_module(read_header(tmp_path / "wrong.safetensors"), Small)


def test_every_user_error_says_what_was_given() -> None:
    error = UserError("It broke", given=3, expected="4", do="use 4")
    assert str(error) == "It broke. Given: 3. Expected: 4. What to do: use 4."


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_torch_file_that_would_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_packed: bool
) -> None:
    """torch.save packs nothing, and its entries are in the file whole; anything else is refused before it is read."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if is_packed else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    if not is_packed:  # the first entry of the directory says that it is larger
        content = bytearray(path.read_bytes())
        at = content.index(b"PK\x01\x02") + 20
        content[at : at + 8] = struct.pack("<II", 2**31, 2**31)
        path.write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(CheckpointError, match="zip archive"):
        read_header(path)
