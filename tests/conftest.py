"""What every test shares: one torch thread, and a guard against skips that hide a missing install step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Many tiny tensors on many threads are slower than on one, and the order of a sum depends on their number.
torch.set_num_threads(1)

LEGITIMATE_SKIPS = (
    "needs a CUDA device",
    "needs a C++ compiler",
    "needs a user without root's rights",
    "needs a POSIX system",
)
"""How the reason of a skip begins when it speaks of the machine; any other means that something is not installed."""

FORBIDDEN = os.environ.get("VIDGEN_FORBID_SKIPS") == "1"
"""As in CI: a skip for any other reason fails the run."""

_unexpected: set[str] = set()


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(LEGITIMATE_SKIPS):
        _unexpected.add(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """pytest-xdist: a worker does not report the modules it skipped while collecting, so it sends them at the end."""
    _unexpected.update(getattr(node, "workeroutput", {}).get("unexpected_skips", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["unexpected_skips"] = sorted(_unexpected)
    elif FORBIDDEN and _unexpected and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FORBIDDEN and _unexpected:
        terminalreporter.section("skips that are not allowed here (VIDGEN_FORBID_SKIPS=1)", red=True)
        for line in sorted(_unexpected):
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _quick_compiler() -> Iterator[None]:
    """torch.compile traces and guards as always, but runs what it traced as it is: C++ for every test takes minutes."""
    # A patch of its own: the order in which fixtures end must not depend on this one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vidgen.vidgen_core.memory.compiled.BACKEND", "eager")
        yield


@pytest.fixture
def plain_loops() -> Iterator[None]:
    """C++ without vector units: probing the processor takes longer than the test, and plain loops compute the same."""
    from torch._inductor import config

    with config.patch({"cpp.vec_isa_ok": False}):
        yield


# --- oracles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vae_twin() -> Callable[[Any], Any]:
    """diffusers' HunyuanVideo VAE with the weights and dtype of one of ours."""

    def twin_of(vae: Any) -> Any:
        from vidgen.benchmarks.compare_hunyuan import diffusers_vae

        twin = diffusers_vae(vae.config)
        twin.use_framewise_encoding = twin.use_framewise_decoding = False  # it would cut 17 frames in two otherwise
        twin.to(next(vae.parameters()).dtype).load_state_dict(vae.state_dict())
        return twin.eval()

    return twin_of


@pytest.fixture(scope="session")
def network_twin() -> Callable[[Any], Any]:
    """diffusers' HunyuanVideo transformer with the weights of one of ours, through the key map."""

    def twin_of(network: Any) -> Any:
        from vidgen.benchmarks.compare_hunyuan import diffusers_network
        from vidgen.vidgen_core.families.hunyuan.keys import LAYOUTS

        twin = diffusers_network(network.config)
        twin.load_state_dict(LAYOUTS["diffusers"].to_foreign(network.state_dict()))
        return twin.eval()

    return twin_of


@pytest.fixture(scope="session")
def cogvideox_twin() -> Callable[[Any], Any]:
    """diffusers' CogVideoX transformer with the weights of one of ours, through the key map.

    Its output layer's norm has the eps of the official code; tests/test_cogvideox_network.py says what its own costs.
    """

    def twin_of(network: Any) -> Any:
        from vidgen.benchmarks.compare_cogvideox import diffusers_network
        from vidgen.vidgen_core.families.cogvideox.keys import LAYOUTS

        twin = diffusers_network(network.config)
        twin.load_state_dict(LAYOUTS["diffusers"].to_foreign(network.state_dict()))
        return twin.eval()

    return twin_of


# --- a model for every test -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three parts of a HunyuanVideo of random weights: the real classes, 0.2 M parameters.

    Its network is not zero at the output, as a fresh one is, so that prompt, seed and guidance all show.
    """
    from vidgen.training.export import export_bundle
    from vidgen.training.text import caption_tokenizer, tiny_text_config
    from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
    from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
    from vidgen.vidgen_core.families.hunyuan.text import TextStack
    from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
    from vidgen.vidgen_core.types import Defaults

    folder = tmp_path_factory.mktemp("models") / "random-tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network_config = NetworkConfig(
            hidden_size=32,
            num_heads=2,
            num_double_blocks=1,
            num_single_blocks=1,
            num_refiner_blocks=1,
            rope_axes=(4, 6, 6),
            text_width=32,
            pooled_width=32,
            guidance_embed=False,
            accepts_first_frame=True,
        )
        codec_config = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4, scaling_factor=0.7)
        network = HunyuanVideoTransformer(network_config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        export_bundle(
            folder,
            network=(
                network,
                network_config,
                Defaults(num_frames=9, height_px=32, width_px=32, fps=8, num_steps=3, shift=1.0, cfg=2.0),
            ),
            codec=(CausalVAE(codec_config), codec_config),
            text=TextStack(tiny_text_config(width=32), caption_tokenizer()),
        )
    return folder


# --- checkpoints as others publish them -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def published() -> Callable[..., Path]:
    """Writes weights the way others do: ``published(kind, folder, tensors)`` gives the path to load.

    Kinds: safetensors, shards, folder, torch, torch_bare, gguf (packed as ``packing``), float8 (a plain cast),
    float8_scaled and float8_noted (ComfyUI's scales beside each weight, the older and the newer way), float8_map
    (Tencent's two files).
    """

    def is_linear(name: str, tensor: torch.Tensor) -> bool:
        return "blocks" in name and name.endswith(".weight") and tensor.ndim == 2

    def float8(tensors: dict[str, torch.Tensor], scaled: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        scales = {
            name: (tensor.abs().amax().float() / 448 if scaled else torch.tensor(1.0))
            for name, tensor in tensors.items()
            if is_linear(name, tensor)
        }
        small = {name: (tensors[name] / scale).to(torch.float8_e4m3fn) for name, scale in scales.items()}
        return {**tensors, **small}, scales

    def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
        from safetensors.torch import save_file

        files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
        where = {name: files[index % 3] for index, name in enumerate(tensors)}
        for file in files:
            save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return index

    def write_gguf(path: Path, tensors: dict[str, torch.Tensor], packing: str, architecture: str) -> Path:
        import gguf

        writer = gguf.GGUFWriter(path, architecture)
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType[packing if is_linear(name, tensor) else "F32"]
            if tensor.ndim > 4:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
                tensor = tensor.flatten(1)
            data = gguf.quants.quantize(tensor.float().numpy(), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def write(
        kind: str,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        *,
        packing: str = "Q8_0",
        architecture: str = "hyvid",
    ) -> Path:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        single, torch_file = folder / "model.safetensors", folder / "model.pt"
        if kind in ("shards", "folder"):
            index = write_shards(folder, tensors)
            return index if kind == "shards" else folder
        if kind == "gguf":
            return write_gguf(folder / "model.gguf", tensors, packing, architecture)
        if kind in ("torch", "torch_bare"):
            torch.save({"module": tensors} if kind == "torch" else tensors, torch_file)
            return torch_file
        if kind == "float8_map":
            small, scales = float8(tensors, scaled=True)
            torch.save({"module": small}, torch_file)
            layers = {name.removesuffix(".weight"): scale.reshape(1) for name, scale in scales.items()}
            torch.save(layers, folder / "model_map.pt")
            return torch_file
        if kind.startswith("float8"):
            tensors, scales = float8(tensors, scaled=kind != "float8")
            if kind == "float8_noted":
                note = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
                tensors |= {f"{name}_scale": scale for name, scale in scales.items()}
                tensors |= {name.removesuffix("weight") + "comfy_quant": note.clone() for name in scales}
            if kind == "float8_scaled":
                tensors |= {name.removesuffix("weight") + "scale_weight": scale for name, scale in scales.items()}
                tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        else:
            assert kind == "safetensors", kind
        save_file(tensors, single)
        return single

    return write


@pytest.fixture(scope="session")
def write_encoders() -> Callable[[Path], None]:
    """Writes tiny random text encoders into a folder laid out as ComfyUI's ``models``, under their published names and
    with their tokenizers. LLaMA is 128 wide, CLIP 64; a picture is 4 tokens. They know the words "a red circle"."""
    from dataclasses import replace

    from vidgen.benchmarks.full_size import write_random
    from vidgen.benchmarks.full_size_text import clip_entries, llama_entries, stub_clip_files, stub_llama_tokenizer
    from vidgen.vidgen_core.families.hunyuan.config import ClipDims, LlamaDims, VisionDims
    from vidgen.vidgen_core.families.hunyuan.text_files import build_vision_part
    from vidgen.vidgen_core.weights.save import save_tensors

    llama = replace(LlamaDims(), hidden_size=128, num_layers=3, num_heads=1, num_kv_heads=1, intermediate_size=64)
    clip = replace(ClipDims(), hidden_size=64, num_layers=2, num_heads=1, intermediate_size=32)
    vision = VisionDims(
        image_size=28, hidden_size=64, num_layers=2, num_heads=1, intermediate_size=32, out_size=128, skip_layers=0
    )

    def write(root: Path) -> None:
        for folder in ("text_encoders/llama", "text_encoders/clip", "clip", "clip_vision"):
            (root / folder).mkdir(parents=True)
        write_random(root / "text_encoders" / "llava_llama3_fp8_scaled.safetensors", llama_entries(llama))
        write_random(root / "clip" / "clip_l.safetensors", clip_entries(clip))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            eyes = build_vision_part(vision, {}).state_dict()
        eyes |= {f"vision.vision_model.post_layernorm.{leaf}": torch.ones(64) for leaf in ("weight", "bias")}
        bare = {name.removeprefix("vision."): tensor for name, tensor in eyes.items()}
        save_tensors(root / "clip_vision" / "llava_llama3_vision.safetensors", bare)
        tokenizer = root / "text_encoders" / "llama" / "tokenizer.json"
        tokenizer.write_text(stub_llama_tokenizer("a red circle"), encoding="utf-8")
        stub_clip_files(root / "text_encoders" / "clip")

    return write


@pytest.fixture(scope="session")
def i2v_v1_models(tmp_path_factory: pytest.TempPathFactory, write_encoders: Callable[[Path], None]) -> Path:
    """ComfyUI's ``models`` with HunyuanVideo-I2V v1 in it, tiny and random, under the names of the published files."""
    from vidgen.training.export import export_codec, export_network
    from vidgen.vidgen_core.families.hunyuan.config import CodecConfig, NetworkConfig
    from vidgen.vidgen_core.families.hunyuan.network import HunyuanVideoTransformer
    from vidgen.vidgen_core.families.hunyuan.vae import CausalVAE
    from vidgen.vidgen_core.types import Defaults

    root = tmp_path_factory.mktemp("published") / "models"
    write_encoders(root)
    config = NetworkConfig(
        in_channels=33, hidden_size=32, num_heads=2, num_double_blocks=1, num_single_blocks=1, num_refiner_blocks=1,
        rope_axes=(4, 6, 6), text_width=128, pooled_width=64, guidance_embed=False, image_condition="latent_concat",
    )  # fmt: skip
    codec = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, vae = HunyuanVideoTransformer(config), CausalVAE(codec)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    for folder in ("diffusion_models", "vae"):
        (root / folder).mkdir()
    name = "hunyuan_video_image_to_video_720p_bf16.safetensors"
    export_network(root / "diffusion_models" / name, network, config, Defaults())
    export_codec(root / "vae" / "hunyuan_video_vae_bf16.safetensors", vae, codec)
    return root


@pytest.fixture(scope="session")
def cogvideox_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's ``models`` with CogVideoX's releases in it, tiny and random, under the names of the published files.

    Folders are as diffusers writes them (names of tensors, ``config.json``); T5 and single files are ours, because
    nothing but the published sizes is recognised there. The tiny model in the box has a stand-in, too.
    """
    import io
    from dataclasses import asdict, replace

    import sentencepiece

    from vidgen.benchmarks.compare_cogvideox import diffusers_config
    from vidgen.vidgen_core.families.cogvideox.config import FUN_5B, CodecConfig, NetworkConfig, T5Dims, TextConfig
    from vidgen.vidgen_core.families.cogvideox.config import defaults as defaults_of
    from vidgen.vidgen_core.families.cogvideox.keys import LAYOUTS
    from vidgen.vidgen_core.families.cogvideox.network import CogVideoXTransformer
    from vidgen.vidgen_core.families.cogvideox.text import T5Text
    from vidgen.vidgen_core.families.cogvideox.vae import CogVideoXVAE
    from vidgen.vidgen_core.text.sentencepiece import tokenizer_from_spiece
    from vidgen.vidgen_core.weights.save import save_checkpoint, save_tensors

    root = tmp_path_factory.mktemp("cogvideox") / "models"
    for folder in ("diffusion_models", "vae", "text_encoders", "loras", "vidgen-tiny-cogvideox"):
        (root / folder).mkdir(parents=True)
    first = NetworkConfig(
        hidden_size=48, num_heads=3, num_layers=1, text_width=32, text_length=8, time_width=16, trained_grid=(3, 2, 2),
        rope_axes=(4, 6, 6),
    )  # fmt: skip
    later = replace(first, patch=(2, 2, 2), trained_grid=(2, 5, 6), rope_fit="slice")
    tiny = replace(later, patch=(2, 1, 1), in_channels=24, out_channels=24)
    codec = CodecConfig(block_channels=(8, 8, 8, 8), layers_per_block=1, num_groups=4)
    wide = replace(codec, latent_channels=24)

    def write(name: str, part: str, module: torch.nn.Module, config: Any, metadata: dict[str, str]) -> None:
        path = root / f"{name}.safetensors"
        save_checkpoint(path, module.state_dict(), family="cogvideox", part=part, config=config, metadata=metadata)

    def network_of(config: NetworkConfig) -> CogVideoXTransformer:
        network = CogVideoXTransformer(config)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return network

    def write_folder(name: str, config: NetworkConfig, told: dict[str, Any], scale: float) -> None:
        """As diffusers lays a model out."""
        network = LAYOUTS["diffusers"].to_foreign(network_of(config).state_dict())
        for part, tensors, config_json in (
            ("transformer", network, diffusers_config(config) | told),
            ("vae", CogVideoXVAE(codec).state_dict(), {"norm_num_groups": 4, "scaling_factor": scale}),
        ):
            folder = root / name / part
            folder.mkdir(parents=True)
            save_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config_json))
        (root / name / "text_encoder").mkdir()
        (root / name / "text_encoder" / "model.safetensors").symlink_to(
            root / "text_encoders" / "t5xxl_fp16.safetensors"
        )

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red star moves to the right", "a blue circle on a grey background"] * 4),
        model_writer=made, vocab_size=40, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    dims = T5Dims(vocab_size=160, hidden_size=32, num_layers=1, num_heads=2, head_size=8, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5Text(TextConfig(t5=dims, max_length=8), tokenizer_from_spiece(made.getvalue()))
        singles = {
            "diffusion_models/CogVideoX_1_0_5b_I2V_bf16": replace(first, in_channels=32, positions="learned"),
            "diffusion_models/CogVideoX_1_5_5b_T2V_bf16": later,
            "diffusion_models/CogVideoX_1_5_5b_I2V_bf16": replace(
                later, in_channels=32, offset_embed=True, image_scale=2.0
            ),
            "vidgen-tiny-cogvideox/network": tiny,
            "vidgen-tiny-cogvideox/network_i2v": replace(tiny, in_channels=48, offset_embed=True),
        }
        for name, config in singles.items():
            told = {"vidgen.defaults": json.dumps(asdict(defaults_of(config)))}
            write(name, "network", network_of(config), config, told)
        for name, config in (("vae/cogvideox_vae_bf16", codec), ("vidgen-tiny-cogvideox/vae", wide)):
            write(name, "codec", CogVideoXVAE(config), config, {})
        for name in ("text_encoders/t5xxl_fp16", "vidgen-tiny-cogvideox/text"):
            write(name, "text", text, text.config, text.metadata())
        write_folder("CogVideoX-2b", replace(first, positions="sincos"), {}, 1.15258426)
        write_folder("CogVideoX-5b", first, {}, 0.7)
        fun = replace(first, in_channels=FUN_5B.in_channels)
        write_folder("CogVideoX-Fun-V1.1-5b-InP", fun, {"add_noise_in_inpaint_model": True}, 0.7)
        name = "transformer.transformer_blocks.0.attn1.to_q"
        factors = {f"{name}.lora_A.weight": torch.randn(4, 48), f"{name}.lora_B.weight": torch.randn(48, 4)}
        save_tensors(root / "loras" / "pytorch_lora_weights.safetensors", factors, {"format": "pt"})
    return root


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled, nothing failed."""
    from vidgen.vidgen_core.memory import compiled

    monkeypatch.setattr(compiled, "_failed", set())
    monkeypatch.setattr(compiled, "_ready", set())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
