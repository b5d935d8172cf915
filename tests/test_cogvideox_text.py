"""CogVideoX's T5: states and tokenizer against transformers, published files, and errors.

Compared in float32 are weights that do not amplify rounding: what a layer adds to the residual stream is at a tenth.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidgen.vidgen_core.embeddings import Embeddings, load_embeddings, save_embeddings
from vidgen.vidgen_core.errors import CheckpointError, FileError, MissingLibraryError, SettingsError
from vidgen.vidgen_core.families import FAMILIES, identify, identify_parts
from vidgen.vidgen_core.families.cogvideox.config import T5_XXL, T5Dims, TextConfig
from vidgen.vidgen_core.families.cogvideox.parts import TEXT_ASSEMBLY
from vidgen.vidgen_core.families.cogvideox.text import T5Text
from vidgen.vidgen_core.families.cogvideox.text_keys import T5_LAYOUTS, check_published
from vidgen.vidgen_core.model import inspect_file, load_text
from vidgen.vidgen_core.text.sentencepiece import tokenizer_from_metadata, tokenizer_from_spiece, unigram_tokenizer
from vidgen.vidgen_core.text.t5 import GatedFeedForward, build_t5, t5_states
from vidgen.vidgen_core.text.tokenizer import METADATA_KEY, Tokenizer
from vidgen.vidgen_core.text.tokenizer_files import TokenizerPlaces
from vidgen.vidgen_core.weights.config import config_to_json
from vidgen.vidgen_core.weights.header import Header, TensorInfo, read_header
from vidgen.vidgen_core.weights.load import check_names
from vidgen.vidgen_core.weights.quantise import Float8Linear, fit, quantise_linears
from vidgen.vidgen_core.weights.safetensors_file import DTYPES
from vidgen.vidgen_core.weights.save import save_checkpoint

CONTRACTS = Path(__file__).parent / "contracts"
SAME_ARITHMETIC = 1e-9  # float64; transformers sums attention in another order
PARITY = 2e-6  # float32, quiet weights
PROMPT = "A panda, dressed in a small red jacket, plays a guitar."
DIMS = T5Dims(vocab_size=320, hidden_size=32, num_layers=3, num_heads=4, head_size=8, intermediate_size=64)
CONFIG = TextConfig(t5=DIMS, max_length=24)
TEXTS = (
    PROMPT,
    "",
    " ",
    "  two   spaces\tand\nlines  ",
    "naïve café, ﬁne ½ ＡＢＣ",
    "unknown 漢字 and 🙂",
    "xyz" * 9,
    "don't -- (really) 12,345.67%",
)

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family's parts as the loaders find them."""
    if "cogvideox" not in FAMILIES:
        monkeypatch.setattr(FAMILIES, "_names", (*FAMILIES, "cogvideox"))


def trained(**options: Any) -> bytes:
    """A small unigram model with T5's special pieces."""
    import sentencepiece

    words = (
        "a panda dressed in small red jacket plays guitar the real don't unknown and café naïve fine two spaces lines"
    )
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{word}, {word}s. ({PROMPT}) 12,345.67%" for word in words.split()] * 4),
        model_writer=made,
        vocab_size=120,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return made.getvalue()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    """With T5's normalisation."""
    return trained(normalization_rule_name="nmt_nfkc")


@pytest.fixture(scope="module")
def tokenizer(spiece: bytes) -> Tokenizer:
    return tokenizer_from_spiece(spiece)


def made(tokenizer: Tokenizer | None = None, config: TextConfig = CONFIG) -> T5Text:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5Text(config, tokenizer)
        for name, parameter in text.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith(("SelfAttention.o.weight", "wo.weight")):
                parameter.data *= 0.1
    return text.requires_grad_(False)


def huggingface(text: T5Text) -> State:
    """As published, with the embedding once."""
    return T5_LAYOUTS["huggingface"].to_foreign(text.state_dict())


def oracle(text: T5Text) -> Any:
    from transformers import T5Config, T5EncoderModel

    dims = text.config.t5
    model = T5EncoderModel(
        T5Config(
            vocab_size=dims.vocab_size, d_model=dims.hidden_size, d_kv=dims.head_size, d_ff=dims.intermediate_size,
            num_layers=dims.num_layers, num_heads=dims.num_heads, feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=dims.num_buckets, relative_attention_max_distance=dims.max_distance,
            layer_norm_epsilon=dims.norm_eps,
        )
    )  # fmt: skip
    state = huggingface(text)
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    return model.eval()


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, PARITY), (torch.float64, SAME_ARITHMETIC)])
def test_states_equal_transformers(tokenizer: Tokenizer, dtype: torch.dtype, bar: float) -> None:
    """As the diffusers pipeline calls it: ids padded to the full length, and no mask."""
    text = made(tokenizer)
    theirs = oracle(text).to(dtype)
    text = text.to(dtype)
    ids = text.tokenize([PROMPT, "a red guitar", ""])
    assert ids.shape == (3, 24)
    features = text.encode([PROMPT, "a red guitar", ""])
    with torch.no_grad():
        expected = theirs(ids)[0]
    assert relative_error(features.context, expected) <= bar
    assert bool(features.context_mask.all())
    assert features.pooled.shape == (3, 0)


def test_long_distances_share_a_bucket() -> None:
    """226 tokens: farther than the 128 from which on positions are alike."""
    text = made()
    ids = torch.randint(0, 320, (1, 226), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(text.features(ids).context, oracle(text)(ids)[0]) <= PARITY


def test_padding_is_attended_to_and_handed_on(tokenizer: Tokenizer) -> None:
    text = made(tokenizer)
    whole = text.encode(["a red guitar"]).context
    short = t5_states(text.t5, text.tokenize(["a red guitar"])[:, :12])
    assert relative_error(short, whole[:, :12]) > 1e-3  # the rows of words depend on how many pads follow
    assert float(whole[:, 20:].abs().min(dim=-1).values.max()) > 0


def test_float16_rounds_no_worse_than_transformers() -> None:
    """Published pipelines load float16 with ``wo`` in float32; ours widens it when it is used, to the same numbers."""
    text = made()
    for name, parameter in text.named_parameters():
        parameter.data = (parameter.data * (100 if name.endswith("wo.weight") else 1)).half().float()
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = t5_states(text.t5, ids)
        theirs = oracle(text).half()
        for block in theirs.encoder.block:
            block.layer[1].DenseReluDense.wo.float()
        expected, ours = theirs(ids)[0], t5_states(text.half().t5, ids)
    assert ours.dtype == expected.dtype == torch.float16
    assert relative_error(ours.float(), exact) <= 1.1 * relative_error(expected.float(), exact) < 5e-3


def test_float16_does_not_overflow_in_wo() -> None:
    layer = GatedFeedForward(DIMS).half()
    for linear in (layer.wi_0, layer.wi_1):
        nn.init.constant_(linear.weight, 0.5)
    nn.init.constant_(layer.wo.weight, 30.0)
    with torch.no_grad():
        x = torch.full((1, 1, 32), 0.5, dtype=torch.float16)
        out = layer(x)
        h = nn.functional.gelu(layer.wi_0(x), approximate="tanh") * layer.wi_1(x)
        assert bool(torch.isinf(layer.wo(h)).all())  # what plain float16 gives
    assert out.dtype == torch.float32
    assert bool(torch.isfinite(out).all())


def test_gradients_flow(tokenizer: Tokenizer) -> None:
    text = made(tokenizer).requires_grad_(True)
    text.features(text.tokenize([PROMPT])).context.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in text.parameters())


def test_an_empty_prompt_is_encoded_or_zeros(tokenizer: Tokenizer) -> None:
    """diffusers encodes "", the original release has zeros in its place; other prompts are alike."""
    encoded = made(tokenizer).encode(["", PROMPT]).context
    zeros = made(tokenizer, replace(CONFIG, empty_prompt="zeros")).encode(["", PROMPT]).context
    assert float(encoded[0].abs().min(dim=-1).values.max()) > 0
    assert not bool(zeros[0].any())
    assert torch.equal(zeros[1], encoded[1])


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_tokenizer(spiece: bytes, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The one of the diffusers pipeline."""
    from transformers import T5Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "spiece.model").write_bytes(spiece)
    return T5Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_transformers(text: str, tokenizer: Tokenizer, transformers_tokenizer: Any) -> None:
    expected = transformers_tokenizer(text).input_ids
    assert tokenizer.encode([text])[0] == expected
    assert expected[-1] == 1
    assert tokenizer.encode([text], special_tokens=False)[0] == expected[:-1]
    assert tokenizer.num_ids == tokenizer.vocab_size == len(transformers_tokenizer)


def test_a_tokenizer_is_a_copy_away_from_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_ids_of_pieces(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_of(word) for word in ("<pad>", "</s>", "<unk>", "no such piece")] == [0, 1, 2, None]
    (panda,) = tokenizer.encode(["a"], special_tokens=False)
    assert panda == [tokenizer.id_of("▁a")]


def test_prompts_end_and_are_padded(tokenizer: Tokenizer) -> None:
    text = made(tokenizer)
    ids = text.tokenize(["", "a red guitar", PROMPT * 9])
    words = tokenizer.encode(["a red guitar"], special_tokens=False)[0]
    assert ids[0].tolist() == [1] + [0] * 23
    assert ids[1].tolist() == [*words, 1] + [0] * (23 - len(words))
    assert ids[2].tolist() == tokenizer.encode([PROMPT * 9], special_tokens=False)[0][:23] + [1]


def test_the_published_length() -> None:
    assert (T5_XXL.max_length, T5_XXL.pad_token_id, T5_XXL.eos_token_id) == (226, 0, 1)


# --- every published file ---------------------------------------------------------------------------------------------


@pytest.fixture
def header_of(tmp_path: Path) -> Callable[[str], Header]:
    """A file of the full size, read as any other: its data are a hole that takes no room on the disk."""

    def write(name: str) -> Header:
        with gzip.open(CONTRACTS / f"{name}.json.gz", "rt", encoding="utf-8") as file:
            entries = json.load(file)["tensors"]
        names = {dtype: label for label, dtype in DTYPES.items()}
        table, end = {}, 0
        for key, entry in entries.items():
            info = TensorInfo(tuple(entry["shape"]), getattr(torch, entry["dtype"]))
            start, end = end, end + info.num_bytes
            table[key] = {"dtype": names[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
        head = json.dumps(table).encode()
        path = tmp_path / f"{name}.safetensors"
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(head)) + head)
            out.truncate(8 + len(head) + end)
        return read_header(path)

    return write


def gguf_names(header: Header) -> Header:
    """The same encoder as llama.cpp names it."""
    foreign = T5_LAYOUTS["gguf"].to_foreign(T5_LAYOUTS["huggingface"].to_native(header.meta_tensors()))
    return replace(header, tensors={name: TensorInfo(tuple(t.shape), t.dtype) for name, t in foreign.items()})


def assert_complete(header: Header, layout: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    (found,) = identify_parts(header)
    assert (found.family.name, found.part, found.layout) == ("cogvideox", "t5", layout)
    assert found.config == T5Dims()
    check_published(TextConfig(t5=found.config))
    record = found.family.parts["t5"]
    with torch.device("meta"):
        module = record.build(found.config, {})
    assert sum(parameter.numel() for parameter in module.parameters()) == 4_762_310_656
    stored = {name: tensor for weight in header.tensors for name, tensor in with_scale(header, weight)}
    native = record.layouts[layout].to_native(stored)
    quantise_linears(module, native, dtype=dtype)
    wanted = module.state_dict()
    check_names(wanted, fit(native, wanted, dtype), where=str(header.path))
    return module


def with_scale(header: Header, weight: str) -> list[tuple[str, Tensor]]:
    info = header.tensors[weight]
    tensors = [torch.empty(info.shape, dtype=info.dtype, device="meta"), torch.empty(info.shape[:1], device="meta")]
    return list(zip(header.stored_names(weight), tensors, strict=False))


@pytest.mark.parametrize(
    "name",
    [
        "cogvideox_te_t5xxl__diffusers",
        "te_t5xxl__comfy_fp16",
        "te_t5xxl__comfy_fp8_e4m3fn",
        "te_t5xxl__comfy_fp8_e4m3fn_scaled",
    ],
)
def test_every_published_t5_is_known_and_complete(name: str, header_of: Callable[[str], Header]) -> None:
    """0 missing, 0 unknown, 4,762,310,656 parameters, of float8 as well, with scales and without."""
    header = header_of(name)
    module = assert_complete(header, "huggingface")
    layer: Any = module.get_submodule("t5.block.23.layer.1.DenseReluDense.wo")
    assert isinstance(layer, Float8Linear) == ("fp8" in name)
    if "fp8" in name:
        assert (layer.scale is not None) == ("scaled" in name)
        assert len(header.scales) == (168 if "scaled" in name else 0)


def test_gguf_is_known_and_complete(header_of: Callable[[str], Header]) -> None:
    header = gguf_names(header_of("cogvideox_te_t5xxl__diffusers"))
    assert "enc.blk.0.attn_rel_b.weight" in header.tensors
    assert_complete(header, "gguf")


def test_whole_models_and_other_spellings_of_the_embedding(header_of: Callable[[str], Header]) -> None:
    plain = header_of("te_t5xxl__comfy_fp16")
    row = TensorInfo((32128, 4096), torch.float16)
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": row, "decoder.embed_tokens.weight": row}
    assert_complete(replace(plain, tensors={**plain.tensors, **decoder, "lm_head.weight": row}), "huggingface")
    once = {name: info for name, info in plain.tensors.items() if name != "shared.weight"}
    assert_complete(replace(plain, tensors=once), "embedding_once")
    wrapped = {f"text_encoders.t5xxl.transformer.{name}": info for name, info in plain.tensors.items()}
    assert_complete(replace(plain, tensors=wrapped), "huggingface")


# --- files that load --------------------------------------------------------------------------------------------------

WIDE = T5Dims(vocab_size=320, hidden_size=64, num_layers=2, num_heads=2, head_size=32, intermediate_size=96)


@pytest.fixture(scope="module")
def wide(tokenizer: Tokenizer) -> T5Text:
    """With rows of 32 weights and more, as GGUF's blocks want them."""
    return made(tokenizer, TextConfig(t5=WIDE))


@pytest.fixture
def tokens(tmp_path: Path, spiece: bytes) -> TokenizerPlaces:
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(spiece)
    return TokenizerPlaces(named=folder)


def assert_same(found: Any, text: T5Text, bar: float = 0.0) -> None:
    assert isinstance(found, T5Text)
    assert found.fingerprint
    assert relative_error(found.encode([PROMPT]).context.float(), text.encode([PROMPT]).context) <= bar


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "folder", "torch"])
def test_files_load(
    kind: str, stream: bool, wide: T5Text, tokens: TokenizerPlaces, published: Callable[..., Path], tmp_path: Path
) -> None:
    path = published(kind, tmp_path / "t5", huggingface(wide))
    assert_same(load_text(path, tokenizers=tokens, stream=stream), wide, 1e-6)


def packed(text: T5Text, *, scaled: bool) -> State:
    """ComfyUI's float8 files."""
    state = huggingface(text)
    linears = [name for name in state if "SelfAttention" in name or "DenseReluDense" in name]
    linears = [name for name in linears if "relative" not in name] if scaled else list(state)
    small = {}
    for name in linears:
        scale = state[name].abs().amax().float() / 448 if scaled else torch.tensor(1.0)
        small[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        if scaled:
            small[name.removesuffix("weight") + "scale_weight"] = scale
    duplicate = {"encoder.embed_tokens.weight": (state | small)["shared.weight"].clone()}
    return state | small | duplicate | ({"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)} if scaled else {})


@pytest.mark.parametrize("scaled", [False, True])
def test_float8_files_load(scaled: bool, wide: T5Text, tokens: TokenizerPlaces, tmp_path: Path) -> None:
    """Rounding to 3 bits changes weights, the embedding's among them, by 2 to 6 %. Streaming changes nothing."""
    from safetensors.torch import save_file

    path = tmp_path / "t5xxl_fp8.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in packed(wide, scaled=scaled).items()}, path)
    found = load_text(path, tokenizers=tokens)
    assert_same(found, wide, 0.15)
    streamed = load_text(path, tokenizers=tokens, stream=True)
    assert relative_error(streamed.encode([PROMPT]).context, found.encode([PROMPT]).context) < 1e-5  # type: ignore[operator]


def parsed(spiece: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(spiece)


def write_gguf(path: Path, text: T5Text, spiece: bytes | None) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "t5encoder")
    if spiece is not None:
        model = parsed(spiece)
        writer.add_tokenizer_model("t5")
        writer.add_token_list([piece.piece for piece in model.pieces])
        writer.add_token_scores([piece.score for piece in model.pieces])
        writer.add_token_types([piece.type for piece in model.pieces])
        writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    for name, tensor in T5_LAYOUTS["gguf"].to_foreign(text.state_dict()).items():
        is_linear = tensor.ndim == 2 and "rel_b" not in name
        kind = gguf.GGMLQuantizationType["Q8_0" if is_linear else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_brings_its_tokenizer(wide: T5Text, tokens: TokenizerPlaces, tmp_path: Path) -> None:
    """8 bits and numbers in bfloat16: 1.6 % from float32. The table of normalisation is small here: the ``gguf``
    library takes two seconds to open a file with the published one."""
    spiece = trained(user_defined_symbols="<extra_id_0>", normalization_rule_tsv=str(small_table(tmp_path)))
    own = tokenizer_from_spiece(spiece)
    found: Any = load_text(write_gguf(tmp_path / "t5.gguf", wide, spiece))
    assert found.tokenizer.num_ids == own.num_ids - 100
    assert [found.tokenizer.encode([t]) for t in TEXTS] == [own.encode([t]) for t in TEXTS]
    assert found.tokenizer.encode(["ａ red"]) == own.encode(["a red"])
    bare = write_gguf(tmp_path / "bare.gguf", wide, None)
    with pytest.raises(CheckpointError, match="tokenizer of T5"):
        load_text(bare)
    assert_same(load_text(bare, tokenizers=tokens), wide, 0.03)


def small_table(folder: Path) -> Path:
    """One full-width letter to its plain one."""
    path = folder / "rules.tsv"
    path.write_text("FF41\t61\n")
    return path


def test_a_file_brings_its_tokenizer_as_bytes(wide: T5Text, spiece: bytes, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    blob = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file({**huggingface(wide), "spiece_model": blob}, tmp_path / "t5.safetensors")
    assert_same(load_text(tmp_path / "t5.safetensors"), wide)


@pytest.mark.parametrize("place", ["beside", "tokenizer", "../tokenizer", "t5", "shared"])
def test_places_of_the_tokenizer(
    place: str, wide: T5Text, spiece: bytes, published: Callable[..., Path], tmp_path: Path
) -> None:
    path = published("safetensors", tmp_path / "model" / "text_encoder", huggingface(wide))
    folder = {"beside": path.parent, "shared": tmp_path / "shared" / "t5"}.get(place, path.parent / place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(spiece)
    assert_same(load_text(path, tokenizers=TokenizerPlaces(shared=[tmp_path / "shared"])), wide)


def test_our_own_file_carries_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = made(tokenizer, replace(CONFIG, empty_prompt="zeros"))
    path = tmp_path / "text.safetensors"
    save_checkpoint(
        path, text.state_dict(), family="cogvideox", part="text", config=text.config, metadata=text.metadata()
    )
    found: Any = load_text(path)
    assert found.config == text.config
    assert_same(found, text)
    assert inspect_file(path)["part"] == "text"


def test_a_file_that_carries_a_tokenizer_json(spiece: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As files had it before the sentencepiece library cut their prompts: the same vocabulary, spelled out."""
    model = parsed(spiece)
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    spelled = unigram_tokenizer(pieces, model.normalizer_spec.precompiled_charsmap)
    assert spelled.encode(TEXTS) == tokenizer.encode(TEXTS)
    text = made(spelled)
    path = tmp_path / "text.safetensors"
    save_checkpoint(
        path, text.state_dict(), family="cogvideox", part="text", config=text.config, metadata=text.metadata()
    )
    assert "model" in json.loads(read_header(path).metadata[METADATA_KEY])
    assert_same(load_text(path), made(tokenizer))


def test_encoded_prompts_are_saved_and_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = made(tokenizer)
    features = text.encode([PROMPT])
    save_embeddings(tmp_path / "e.safetensors", Embeddings(features=features, text_config=CONFIG, prompt=PROMPT))
    found = load_embeddings(tmp_path / "e.safetensors")
    assert torch.equal(found.features.context, features.context)
    assert found.features.pooled.shape == (1, 0)
    assert found.text_config == CONFIG


def test_config_travels_as_json() -> None:
    from vidgen.vidgen_core.weights.config import config_from_json

    config = replace(CONFIG, empty_prompt="zeros")
    assert config_from_json(TextConfig, config_to_json(config), where="here") == config


# --- what is wrong is said --------------------------------------------------------------------------------------------


def test_a_missing_tokenizer_says_where_it_goes(wide: T5Text, published: Callable[..., Path], tmp_path: Path) -> None:
    path = published("safetensors", tmp_path / "t5", huggingface(wide))
    places = TokenizerPlaces(shared=[tmp_path / "text_encoders"])
    with pytest.raises(CheckpointError, match=r"tokenizer of T5 was not found.*spiece\.model.*t5-v1_1-xxl") as caught:
        load_text(path, tokenizers=places)
    assert str(tmp_path / "text_encoders" / "t5") in str(caught.value)
    with pytest.raises(FileError, match="does not exist"):
        load_text(path, tokenizers=TokenizerPlaces(named=tmp_path / "nowhere"))


def test_a_tokenizer_of_another_vocabulary_is_passed_over(
    wide: T5Text, spiece: bytes, published: Callable[..., Path], tmp_path: Path
) -> None:
    path = published("safetensors", tmp_path / "t5", huggingface(wide))
    (path.parent / "tokenizer.json").write_text(Tokenizer.from_words(["a", "red"]).to_json())
    (path.parent / "spiece.model").write_bytes(spiece[:-1000])
    with pytest.raises(CheckpointError, match=r"does not end with token 1.*spiece\.model \(cannot be read\)"):
        load_text(path)
    (path.parent / "spiece.model").write_bytes(spiece)
    assert_same(load_text(path), wide)


def test_without_a_tokenizer_nothing_is_encoded() -> None:
    with pytest.raises(CheckpointError, match="spiece"):
        made().encode([PROMPT])


def test_a_tokenizer_larger_than_the_embedding() -> None:
    with pytest.raises(CheckpointError, match="at most 320"):
        T5Text(CONFIG, Tokenizer.from_words([f"w{number}" for number in range(400)]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 pieces"),
        (b"{}", "damaged or something else"),
        (b"<!doctype html>", "damaged or something else"),
        (b"\x00" * 64, "pieces|damaged"),
        (b"\xff" * 64, "damaged or something else"),
        (b"\x0a\xff\xff\x03abc", "damaged or something else"),
    ],
)
def test_bytes_that_are_no_tokenizer(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_spiece(data)


def test_a_vocabulary_without_an_end() -> None:
    with pytest.raises(CheckpointError, match=r"without </s>"):
        tokenizer_from_spiece(trained(eos_piece="<end>"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tokenizer cannot be read"),
        ("[]", "tokenizer cannot be read"),
        ('{"spiece.model": 3}', "no base64"),
        ('{"spiece.model": "$$$$"}', "no base64"),
        ('{"spiece.model": ""}', "0 pieces"),
        ('{"spiece.model": "aGVsbG8="}', "damaged or something else"),
    ],
)
def test_metadata_that_is_no_tokenizer(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_metadata(text)


def test_without_the_library_the_message_names_it(
    spiece: bytes,
    wide: T5Text,
    published: Callable[..., Path],
    tokens: TokenizerPlaces,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not as a tokenizer that is damaged or was not found."""
    path = published("safetensors", tmp_path / "t5", huggingface(wide))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingLibraryError, match="pip install sentencepiece"):
        tokenizer_from_spiece(spiece)
    with pytest.raises(MissingLibraryError, match="pip install sentencepiece"):
        load_text(path, tokenizers=tokens)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_tokenizer_that_is_cut_short(share: float, spiece: bytes) -> None:
    with pytest.raises(CheckpointError):
        tokenizer_from_spiece(spiece[: int(len(spiece) * share)])


def test_a_tokenizer_of_another_kind() -> None:
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT] * 4), model_writer=made, vocab_size=40, model_type="bpe", minloglevel=2
    )
    with pytest.raises(CheckpointError, match="another kind than unigram"):
        tokenizer_from_spiece(made.getvalue())


def test_templates_and_pictures_are_refused(tokenizer: Tokenizer) -> None:
    text = made(tokenizer)
    with pytest.raises(SettingsError, match="without a template"):
        text.encode([PROMPT], custom_template="say {}")
    with pytest.raises(CheckpointError, match="cannot see pictures"):
        text.encode_with_image([PROMPT], torch.zeros(8, 8, 3), interleave=2)
    assert not text.sees_images
    assert not TEXT_ASSEMBLY.sees_images(CONFIG)


def test_a_missing_weight_is_named(
    wide: T5Text, tokens: TokenizerPlaces, published: Callable[..., Path], tmp_path: Path
) -> None:
    state = huggingface(wide)
    del state["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    with pytest.raises(CheckpointError, match=r"block\.1\.layer\.1\.DenseReluDense\.wo\.weight"):
        load_text(published("safetensors", tmp_path / "t5", state), tokenizers=tokens)


def test_a_shard_of_the_encoder_is_not_complete() -> None:
    with pytest.raises(CheckpointError, match="12 layers.*24 layers"):
        check_published(TextConfig(t5=T5Dims(num_layers=12)))
    with pytest.raises(CheckpointError, match="not CogVideoX's"):
        check_published(TextConfig(t5=T5Dims(vocab_size=1, hidden_size=8)))


def test_the_encoder_given_twice(wide: T5Text, published: Callable[..., Path], tmp_path: Path) -> None:
    paths = [published("safetensors", tmp_path / name, huggingface(wide)) for name in ("one", "two")]
    with pytest.raises(CheckpointError, match="T5"):
        load_text(*paths)
    with pytest.raises(CheckpointError, match="given twice"):
        TEXT_ASSEMBLY.config({"text": CONFIG, "t5": DIMS})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2)}, "UMT5|T5"),
        ({"encoder.block.0.layer.1.DenseReluDense.wi.weight": (96, 64)}, "without gates|a T5 text encoder"),
    ],
)
def test_other_t5s_are_refused(
    names: dict[str, tuple[int, ...]], message: str, wide: T5Text, published: Callable[..., Path], tmp_path: Path
) -> None:
    state = huggingface(wide) | {name: torch.zeros(shape) for name, shape in names.items()}
    if any(".wi." in name for name in names):
        state = {name: tensor for name, tensor in state.items() if ".wi_" not in name}
    path = published("safetensors", tmp_path / "t5", state)
    with pytest.raises(CheckpointError, match=message):
        load_text(path)
    with pytest.raises(CheckpointError):
        identify(read_header(path))


def test_the_embedding_is_there_once() -> None:
    """As one parameter: a second name for it would be missing from every file that has it once."""
    names = [name for name, _ in build_t5(DIMS).named_parameters(remove_duplicate=False)]
    assert sum("embed" in name or "shared" in name for name in names) == 1
