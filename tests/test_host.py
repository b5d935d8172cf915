"""The host without ComfyUI, and what ComfyUI's model manager is given."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from vidgen.nodes import host as hosts
from vidgen.vidgen_core.errors import Cancelled, FileError
from vidgen.vidgen_core.memory.host import (
    LocalHost,
    available_cores,
    available_memory,
    bundled_models,
    default_device,
    memory_in_use,
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


# --- evicted by a manager ---------------------------------------------------------------------------------------------

GPU, MAIN = torch.device("cuda", 0), torch.device("cpu")


class Manager:
    """Asks of a loaded model what ComfyUI's model manager (0.3.64) asks, in its order; a card of ``size`` bytes.

    It knows a model by a weak reference, and forgets it when the module is gone.
    """

    class Entry:
        def __init__(self, patcher: Any) -> None:
            self._patcher = weakref.ref(patcher)
            assert patcher.parent is None  # else it would be watched as well
            self.device = patcher.load_device
            self.module: Any = None
            self.finalizer: Any = None

        @property
        def patcher(self) -> Any:
            return self._patcher()

        def is_dead(self) -> bool:
            return self.module() is not None and self.patcher is None

        def missing(self) -> int:
            if self.device == self.patcher.current_loaded_device():
                return self.patcher.model_size() - self.patcher.loaded_size()
            return self.patcher.model_size()

        def load(self, room: float, forget: Any) -> None:
            self.patcher.model_patches_to(self.device)
            self.patcher.model_patches_to(self.patcher.model_dtype())
            self.patcher.partially_load(self.device, room or 1e32, force_patch_weights=False)
            self.module = weakref.ref(self.patcher.model)
            self.finalizer = weakref.finalize(self.patcher.model, forget)

        def unload(self, num_bytes: float) -> bool:
            """Whether it is off the card altogether."""
            if num_bytes < self.patcher.loaded_size():
                freed = self.patcher.partially_unload(self.patcher.offload_device, num_bytes)
                if freed >= num_bytes:
                    return False
            self.patcher.detach(True)
            self.finalizer.detach()
            return True

    def __init__(self, size: float) -> None:
        self.size = size
        self.loaded: list[Manager.Entry] = []

    def free(self) -> float:
        return self.size - sum(entry.patcher.loaded_size() for entry in self.loaded if entry.patcher is not None)

    def free_memory(self, num_bytes: float, device: torch.device, keep_loaded: Any = ()) -> None:
        entries = [entry for entry in reversed(self.loaded) if entry.device == device and not entry.is_dead()]
        for entry in sorted(entries, key=lambda one: one.patcher.loaded_size() - one.patcher.model_size()):
            assert not entry.patcher.is_dynamic()
            if self.free() > num_bytes:
                break
            if entry.unload(num_bytes - self.free()):
                self.loaded.remove(entry)

    def load_models_gpu(
        self,
        models: list[Any],
        memory_required: float = 0,
        force_patch_weights: bool = False,
        minimum_memory_required: float | None = None,
        force_full_load: bool = False,
    ) -> None:
        wanted = {*models, *(other for model in models for other in model.model_patches_models())}
        entries = []
        for patcher in wanted:
            known = [entry for entry in self.loaded if entry.patcher is patcher]
            entries.append(known[0] if known else Manager.Entry(patcher))
        for entry in entries:
            for other in [other for other in self.loaded if entry.patcher.is_clone(other.patcher)]:
                self.loaded.remove(other)
                other.patcher.detach(unpatch_all=False)
                other.finalizer.detach()
        for entry in entries:
            self.free_memory(1.1 * entry.missing() + memory_required, entry.device)
            assert entry.patcher.lowvram_patch_counter() == 0
            entry.load(0 if force_full_load else self.free(), self.forget_the_dead)
            self.loaded.insert(0, entry)

    def unload_all_models(self) -> None:
        """What the button and ``POST /free`` do."""
        self.free_memory(1e30, GPU)

    def forget_the_dead(self) -> None:
        self.loaded = [entry for entry in self.loaded if entry.module() is not None]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that weights are moved to, on a machine that has only one: each move makes new memory."""
    seen: list[torch.device] = []

    def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        seen.append(device)
        return tensor.clone()

    monkeypatch.setattr(hosts, "moved", move)
    return seen


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch, moves: list[torch.device]) -> Manager:
    """ComfyUI's, for a host whose device is a card."""
    manager = Manager(1e9)
    module = ModuleType("comfy.model_management")
    for name in ("free_memory", "load_models_gpu", "unload_all_models"):
        setattr(module, name, getattr(manager, name))
    parent = ModuleType("comfy")
    parent.model_management = module
    monkeypatch.setitem(sys.modules, "comfy", parent)
    monkeypatch.setitem(sys.modules, "comfy.model_management", module)
    monkeypatch.setattr(hosts.ComfyHost, "device", lambda self: GPU)
    return manager


def module_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4).to(torch.float8_e4m3fn))
    return module.eval().requires_grad_(False)


def bits(module: nn.Module) -> list[bytes]:
    return [tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in module.state_dict().values()]


def test_the_free_button_moves_a_model_off_and_its_next_use_brings_it_back(
    manager: Manager, moves: list[torch.device]
) -> None:
    host, module = hosts.ComfyHost(), module_of()
    before, parameters = bits(module), list(module.parameters())
    host.manage(module)
    (entry,) = manager.loaded
    assert entry.patcher.loaded_size() == entry.patcher.model_size() == sum(map(len, before))
    assert moves == []  # it was loaded there

    manager.unload_all_models()
    assert manager.loaded == []
    assert set(moves) == {MAIN}
    assert len(moves) == len(before)
    assert entry.patcher.loaded_size() == 0
    assert entry.patcher.current_loaded_device() == MAIN
    assert bits(module) == before

    host.need(module)
    assert set(moves) == {MAIN, GPU}
    assert bits(module) == before
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    host.need(module)
    host.manage(module)
    assert len(manager.loaded) == 1
    assert len(moves) == 2 * len(before)


def test_another_model_that_needs_the_room_moves_ours_off(manager: Manager) -> None:
    host, ours, other = hosts.ComfyHost(), module_of(), nn.Linear(300, 300)
    host.manage(ours)
    host.manage(other)
    assert len(manager.loaded) == 2
    size = sum(map(len, bits(ours)))
    manager.size = 1.05 * 300 * 301 * 4 + size  # the manager wants a tenth more than a model takes
    manager.unload_all_models()
    host.need(ours)
    host.need(other)
    assert [entry.patcher.model for entry in manager.loaded] == [other]
    host.need(ours)
    assert manager.loaded[0].patcher.model is ours


def test_a_model_that_nobody_holds_leaves_the_manager(manager: Manager) -> None:
    """At once, without the garbage collector: its memory is wanted back."""
    host, module = hosts.ComfyHost(), module_of()
    host.manage(module)
    known = len(hosts._handles)
    gc.disable()
    try:
        del module
        assert manager.loaded == []
        assert len(hosts._handles) == known - 1
    finally:
        gc.enable()


def test_streamed_blocks_are_left_alone(manager: Manager, tiny_bundle_dir: Path) -> None:
    from vidgen.vidgen_core.model import load_network

    model = load_network(tiny_bundle_dir / "network.safetensors", stream=True)
    host = hosts.ComfyHost()
    host.manage(model.network)
    (entry,) = manager.loaded
    assert 0 < entry.patcher.model_size() < (tiny_bundle_dir / "network.safetensors").stat().st_size
    manager.unload_all_models()
    host.need(model.network)
    assert all(tensor.is_meta for tensor in model.network.single_blocks.parameters())


def test_nodes_bring_back_what_was_moved_off(
    manager: Manager, tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vidgen.nodes.loaders import LoadAll
    from vidgen.nodes.sampling import EmptyLatent, Sampler
    from vidgen.nodes.text import EncodePrompt
    from vidgen.nodes.video import Decode, EncodeVideo

    host = hosts.ComfyHost()
    for name in ("progress", "preview", "check_cancelled"):
        monkeypatch.setattr(hosts.ComfyHost, name, lambda self, *args: None)
    needed: list[nn.Module] = []
    monkeypatch.setattr(hosts.ComfyHost, "find_model_folder", lambda self, name: tiny_bundle_dir)
    monkeypatch.setattr(hosts.ComfyHost, "make_room", lambda self, num_bytes: None)
    monkeypatch.setattr(hosts.ComfyHost, "resume_path", lambda self, node_id: None)
    monkeypatch.setattr("vidgen.nodes.loaders.torch_dtype", lambda name: torch.float32)
    monkeypatch.setattr(hosts.ComfyHost, "need", lambda self, module: needed.append(module))
    with hosts.using(host):
        with monkeypatch.context() as loading:  # on this machine
            loading.setattr(hosts.ComfyHost, "device", lambda self: MAIN)
            model, vae, text = LoadAll().load("", "auto")
        for module in (model.network, vae, text):
            host.manage(module)
        assert needed == [model.network, vae, text]
        needed.clear()
        (encoded,) = EncodePrompt().encode(text, "a red star", "video")
        (latent,) = EmptyLatent().make(vae, 32, 32, 5, 1)
        settings = {"seed": 0, "steps": 1, "cfg": 1.0, "guidance": 0.0, "shift": 1.0, "denoise": 1.0}
        (latent,) = Sampler().sample(model, encoded, latent, sampler="euler", schedule="auto", **settings)
        (images,) = Decode().decode(vae, latent)
        EncodeVideo().encode(vae, images, "crop")
    assert [type(module).__name__ for module in needed] == [
        type(module).__name__ for module in (text, model.network, vae, vae)
    ]


def test_on_a_cpu_there_is_nothing_to_manage(manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.ComfyHost, "device", lambda self: MAIN)
    module = module_of()
    hosts.ComfyHost().manage(module)
    hosts.ComfyHost().need(module)
    assert manager.loaded == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_off_a_gpu_and_back_is_the_same_to_the_bit() -> None:
    module = module_of().to(GPU)
    before, parameters = bits(module.cpu()), list(module.to(GPU).parameters())
    handle = hosts.ModelHandle(module, GPU)
    assert handle.partially_unload(MAIN, 1) == handle.model_size()
    assert all(parameter.device == MAIN for parameter in parameters)
    assert bits(module) == before
    handle.partially_load(GPU, 1e32)
    assert all(parameter.device == GPU for parameter in module.parameters())
    assert bits(module.cpu()) == before


def test_the_memory_of_this_process_is_known() -> None:
    assert memory_in_use("cpu") > 50e6  # torch alone takes more
