"""The text stack against plain transformers, its templates and tokenizers, all without a network.

Tolerance 2e-6 absolute: the same float32 operations in the same order, but for the rotary angles,
which are computed anew.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from vidgen.vidgen_core.errors import CheckpointError, FileError
from vidgen.vidgen_core.families.hunyuan.config import ClipDims, LlamaDims, Template, TextConfig
from vidgen.vidgen_core.families.hunyuan.text import TextStack
from vidgen.vidgen_core.text.clip import ClipText
from vidgen.vidgen_core.text.llama import build_llama, llama_states
from vidgen.vidgen_core.text.tokenizer import METADATA_KEY, METADATA_KEY_CLIP, Tokenizer, tokenizers_from_metadata

TOLERANCE = 2e-6
WORDS = ("describe", "a", "red", "blue", "circle", "moves", "left", "right", ",", ".", "video", "image")
LLAMA = LlamaDims(
    vocab_size=20, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=48, skip_layers=2
)
CLIP = ClipDims(
    vocab_size=20, hidden_size=24, num_layers=2, num_heads=3, intermediate_size=48, max_length=10, eos_token_id=3
)
CONFIG = TextConfig(
    llama=LLAMA,
    clip=CLIP,
    max_length=8,
    pad_token_id=1,
    bos_token_id=2,
    video_template=Template(text="describe video {}", crop_start=3),
    image_template=Template(text="image {}", crop_start=2),
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to open a connection fails the test."""
    import socket

    def refuse(*args: object) -> None:
        raise AssertionError("the text stack tried to reach a network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    torch.manual_seed(0)


def _reference_llama(dims: LlamaDims) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaModel

    settings = {
        "vocab_size": dims.vocab_size,
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "rms_norm_eps": dims.norm_eps,
        "rope_theta": dims.rope_theta,
    }
    return LlamaModel(LlamaConfig(**settings)).eval()


def _stack(config: TextConfig = CONFIG) -> TextStack:
    return TextStack(config, Tokenizer.from_words(WORDS))


def _ids(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(4, 20, (len(lengths), width))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 1), mask


@pytest.mark.parametrize("skip_layers", [1, 2])
def test_llama_states_are_those_of_transformers(skip_layers: int) -> None:
    dims = dataclasses.replace(LLAMA, skip_layers=skip_layers)
    reference, ours = _reference_llama(dims), build_llama(dims)
    assert getattr(reference.config, "rope_theta", None) == dims.rope_theta or (
        reference.config.rope_parameters["rope_theta"] == dims.rope_theta
    )
    unused = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not unused.missing_keys
    assert all(name == "norm.weight" or int(name.split(".")[1]) >= 4 - skip_layers for name in unused.unexpected_keys)
    ids, mask = _ids([12, 7, 1], 12)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        states = llama_states(ours, ids, mask)
    torch.testing.assert_close(states[mask], expected[-(skip_layers + 1)][mask], atol=TOLERANCE, rtol=0)


def test_llama_without_skipping_leaves_out_the_final_norm() -> None:
    dims = dataclasses.replace(LLAMA, skip_layers=0)
    reference, ours = _reference_llama(dims), build_llama(dims)
    ours.load_state_dict(reference.state_dict(), strict=False)
    ids, mask = _ids([9], 9)
    with torch.no_grad():
        normed = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        states = llama_states(ours, ids, mask)
        torch.testing.assert_close(reference.norm(states), normed, atol=TOLERANCE, rtol=0)


def test_rotary_angles_survive_half_precision() -> None:
    whole, half = build_llama(LLAMA), build_llama(LLAMA).to(torch.bfloat16)
    positions = torch.arange(500)[None]
    cos, _ = whole.rotary_emb(torch.zeros(1), positions)
    cos_half, _ = half.rotary_emb(torch.zeros(1), positions)
    torch.testing.assert_close(cos_half, cos, atol=0, rtol=0)


@pytest.mark.parametrize("eos", [3, 19])
def test_clip_vector_is_that_of_transformers(eos: int) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    dims = dataclasses.replace(CLIP, eos_token_id=eos)
    reference = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
            max_position_embeddings=10, hidden_act="quick_gelu", eos_token_id=eos, bos_token_id=2, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    ours = ClipText(dims)
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in reference.state_dict().items()}
    ours.load_state_dict(weights, strict=True)
    ids = torch.randint(4, 19, (3, 10))
    for row, end in enumerate((9, 4, 1)):
        ids[row, end:] = eos
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), reference(input_ids=ids).pooler_output, atol=TOLERANCE, rtol=0)


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def test_half_precision_is_as_close_as_transformers_own() -> None:
    """bfloat16: the mean distance to float32 is the reference's, give or take 2 % of chance."""
    from transformers import CLIPTextConfig, CLIPTextModel

    reference, ours = _reference_llama(LLAMA), build_llama(LLAMA)
    ours.load_state_dict(reference.state_dict(), strict=False)
    text_model = ClipText(CLIP)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=10, hidden_act="quick_gelu", eos_token_id=3, bos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    clip = CLIPTextModel(config).eval()
    weights = {f"text_model.{name.removeprefix('text_model.')}": w for name, w in clip.state_dict().items()}
    text_model.load_state_dict(weights)
    half = [copy.deepcopy(module).to(torch.bfloat16) for module in (reference, ours, clip, text_model)]
    near: dict[str, list[float]] = {"llama": [0.0, 0.0], "clip": [0.0, 0.0]}
    with torch.no_grad():
        for _ in range(20):
            ids, mask = _ids([12, 7, 3], 12)
            exact = llama_states(ours, ids, mask)[mask]
            theirs = half[0](input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[-3]
            near["llama"][0] += _distance(llama_states(half[1], ids, mask)[mask], exact)
            near["llama"][1] += _distance(theirs[mask], exact)
            clip_ids = torch.cat([torch.randint(4, 20, (3, 9)), torch.full((3, 1), 3)], dim=1)
            exact = text_model(clip_ids)
            near["clip"][0] += _distance(half[3](clip_ids), exact)
            near["clip"][1] += _distance(half[2](input_ids=clip_ids).pooler_output, exact)
    for name, (found, reference_distance) in near.items():
        assert 0 < found <= 1.02 * reference_distance, name


def test_padding_and_neighbours_do_not_matter() -> None:
    stack = _stack()
    together = stack.encode(["a red circle", "", "a blue circle moves left ,"])
    for index, prompt in enumerate(["a red circle", "", "a blue circle moves left ,"]):
        tokens = stack.tokenize([prompt])
        length = int(tokens.mask.sum())
        with torch.no_grad():
            alone = stack.features(
                tokens.ids[:, :length], tokens.mask[:, :length], tokens.clip_ids, crop_start=tokens.crop_start
            )
        valid = together.context_mask[index]
        torch.testing.assert_close(together.context[index][valid], alone.context[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(together.pooled[index], alone.pooled[0], atol=TOLERANCE, rtol=0)


def test_the_template_is_cut_off_and_yet_was_read() -> None:
    stack = _stack()
    prompt = "a red circle"
    video, image = stack.encode([prompt]), stack.encode([prompt], image_mode=True)
    assert video.context.shape == image.context.shape == (1, 8, 32)
    assert video.context_mask.sum() == image.context_mask.sum() == 4  # three words and <eos>
    whole = stack.tokenizer.encode([f"describe video {prompt}"])[0]
    ids = torch.tensor([whole])
    with torch.no_grad():
        states = llama_states(stack.llama, ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(video.context[0, :4], states[0, 3:], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(video.context[0, :4], image.context[0, :4], atol=1e-3)
    torch.testing.assert_close(video.pooled, image.pooled, atol=0, rtol=0)


def test_start_token_is_added_when_the_tokenizer_leaves_it_out() -> None:
    from tokenizers import Tokenizer as Backend

    bare = Backend.from_str(Tokenizer.from_words(WORDS).to_json())
    bare.post_processor = None  # type: ignore[assignment]
    tokens = TextStack(CONFIG, Tokenizer(bare), Tokenizer.from_words(WORDS)).tokenize(["a"])
    assert tokens.ids[0, :5].tolist() == [2, *bare.encode("describe video a").ids, 1]


def test_long_prompts_are_cut_at_the_end() -> None:
    stack = _stack()
    tokens = stack.tokenize(["red " * 50, "red"])
    red = stack.tokenizer.id_of("red")
    assert tokens.ids.shape == (2, 3 + 8)
    assert tokens.mask[0].all()
    assert tokens.ids[0, 3:].tolist() == [red] * 8
    assert tokens.clip_ids[0].tolist() == [2, *[red] * 8, 3]
    assert tokens.clip_ids[1].tolist() == [2, red, *[3] * 8]


@pytest.mark.parametrize("prompt", ["", "   ", "zebra", "Ünïcödé 🦓 \x00", "<eos> <pad> {} {0}", "A RED, circle."])
def test_any_text_can_be_encoded(prompt: str) -> None:
    features = _stack().encode([prompt])
    assert torch.isfinite(features.context).all()
    assert torch.isfinite(features.pooled).all()


def test_words_outside_of_the_vocabulary() -> None:
    tokenizer = Tokenizer.from_words(WORDS)
    row = tokenizer.encode(["A RED zebra,moves"])[0]
    assert row == [tokenizer.id_of(word) for word in ("<bos>", "a", "red", "<unk>", ",", "moves", "<eos>")]
    assert tokenizer.encode([""]) == [[2, 3]]


def test_tokenizers_travel_as_text() -> None:
    one = _stack()
    assert set(one.metadata()) == {METADATA_KEY}
    two = TextStack(CONFIG, Tokenizer.from_words(WORDS), Tokenizer.from_words(WORDS[:5]))
    assert set(two.metadata()) == {METADATA_KEY, METADATA_KEY_CLIP}
    for stack in (one, two):
        found = tokenizers_from_metadata(stack.metadata())
        assert found is not None
        again = TextStack(CONFIG, *found)
        again.load_state_dict(stack.state_dict())
        prompts = ["a red circle moves right", "an image"]
        torch.testing.assert_close(again.encode(prompts).pooled, stack.encode(prompts).pooled, atol=0, rtol=0)
    assert tokenizers_from_metadata({}) is None


def test_tokenizer_from_a_folder(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_words(WORDS)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).encode(["a red"]) == tokenizer.encode(["a red"])
    with pytest.raises(FileError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path / "elsewhere")


def test_errors_say_what_to_do() -> None:
    for text in ("", "not json", "{}", "[1]", "3"):
        with pytest.raises(CheckpointError, match="tokenizer.json"):
            Tokenizer.from_json(text)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        TextStack(CONFIG).encode(["a"])
    small = dataclasses.replace(CONFIG, clip=dataclasses.replace(CLIP, vocab_size=8))
    with pytest.raises(CheckpointError, match="CLIP"):
        _stack(small)


def test_built_on_meta_and_assigned() -> None:
    stack = _stack()
    with torch.device("meta"):
        empty = _stack()
    assert not list(empty.buffers())
    empty.load_state_dict(stack.state_dict(), assign=True)
    expected, found = stack.encode(["a red circle"]), empty.encode(["a red circle"])
    torch.testing.assert_close(found.context, expected.context, atol=0, rtol=0)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=0, rtol=0)


def test_published_sizes_and_names() -> None:
    """Parameters of LLaMA-3-8B's embedding and first 30 blocks, and of CLIP-L's text tower."""
    with torch.device("meta"):
        stack = TextStack(TextConfig())
    width, inner = 4096, 14336
    block = 2 * width * width + 2 * width * 1024 + 3 * width * inner + 2 * width
    assert sum(p.numel() for p in stack.llama.parameters()) == 128320 * width + 30 * block
    assert sum(p.numel() for p in stack.clip.parameters()) == 123_060_480
    names = set(stack.state_dict())
    assert {
        "llama.embed_tokens.weight",
        "llama.layers.29.mlp.down_proj.weight",
        "clip.text_model.embeddings.position_embedding.weight",
        "clip.text_model.encoder.layers.11.self_attn.out_proj.bias",
        "clip.text_model.final_layer_norm.weight",
    } <= names
    assert not any("norm.weight" in name and name.startswith("llama.norm") for name in names)


def test_gradients_reach_both_encoders() -> None:
    stack = _stack()
    tokens = stack.tokenize(["a red circle", "left"])
    features = stack.features(tokens.ids, tokens.mask, tokens.clip_ids, crop_start=tokens.crop_start)
    (features.context.square().mean() + features.pooled[:, 0].sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in stack.parameters())
