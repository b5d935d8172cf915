"""LLaVA for image to video: against transformers' own model, and the crops against a plain computation.

Tolerance 2e-6 of the largest value in float32: the same operations but for the rotary angles and the order of sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vidgen.vidgen_core.errors import CheckpointError, SettingsError, UserError
from vidgen.vidgen_core.families.hunyuan.config import (
    I2V_IMAGE_TEMPLATE,
    I2V_VIDEO_TEMPLATE,
    ClipDims,
    LlamaDims,
    Template,
    TextConfig,
    VisionDims,
)
from vidgen.vidgen_core.families.hunyuan.text import TextStack, black_image
from vidgen.vidgen_core.text.image import clip_pixels
from vidgen.vidgen_core.text.tokenizer import Tokenizer

TOLERANCE = 2e-6
IMAGE, PAD, BOS = 30, 1, 2
WORDS = (
    *("describe", "a", "red", "blue", "circle", "moves", "left", "right", "video", "image", "system", "user"),
    *("assistant", "start", "end", "eot", "break"),
)
VISION = VisionDims(
    image_size=28, patch_size=7, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, out_size=32
)
"""16 tokens of a picture"""
CONFIG = TextConfig(
    llama=LlamaDims(
        vocab_size=32, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=48, skip_layers=2
    ),
    clip=ClipDims(
        vocab_size=32, hidden_size=24, num_layers=2, num_heads=3, intermediate_size=48, max_length=10, eos_token_id=3
    ),
    vision=VISION,
    max_length=12,
    pad_token_id=PAD,
    bos_token_id=BOS,
    image_token_id=IMAGE,
    video_template=Template(text="describe video {}", crop_start=3),
    image_template=Template(text="image {}", crop_start=2),
    # as the published one: five tokens after the prompt, of which the first four are cut
    i2v_video_template=Template(
        text="start system <image> describe video user end {} eot start assistant end break",
        crop_start=8,
        assistant_tokens=4,
    ),
    i2v_image_template=Template(
        text="system <image> image {} eot start assistant end break", crop_start=4, assistant_tokens=4
    ),
)


@pytest.fixture(scope="module")
def stack() -> TextStack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = TextStack(CONFIG, Tokenizer.from_words(WORDS))
        for parameter in made.parameters():  # transformers' small initial weights would hide errors
            torch.nn.init.normal_(parameter, std=0.15)
    return made


@pytest.fixture(scope="module")
def twin(stack: TextStack) -> Any:
    """transformers' LLaVA with the same weights; its layers that we leave out are random."""
    return llava_twin(stack)


def llava_twin(stack: TextStack) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    dims = CONFIG.llama
    text = LlamaConfig(
        vocab_size=dims.vocab_size, hidden_size=dims.hidden_size, num_hidden_layers=dims.num_layers,
        num_attention_heads=dims.num_heads, num_key_value_heads=dims.num_kv_heads, rms_norm_eps=dims.norm_eps,
        intermediate_size=dims.intermediate_size, rope_theta=dims.rope_theta, pad_token_id=PAD,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=VISION.hidden_size, intermediate_size=VISION.intermediate_size,
        num_hidden_layers=VISION.num_layers, num_attention_heads=VISION.num_heads, image_size=VISION.image_size,
        patch_size=VISION.patch_size, hidden_act="quick_gelu",
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    model = LlavaForConditionalGeneration(config).eval()
    ours = stack.state_dict()
    theirs = {}
    for name in model.state_dict():
        bare = name.removeprefix("model.")
        for start, own in (
            ("language_model.", "llama."),
            ("vision_tower.", "vision.vision_model."),
            ("multi_modal_projector.", "vision.multi_modal_projector."),
        ):
            key = own + bare.removeprefix(start).removeprefix("vision_model.").removeprefix("model.")
            if bare.startswith(start) and key in ours:
                theirs[name] = ours[key]
    left = model.load_state_dict(theirs, strict=False)
    assert all("norm" in name or "lm_head" in name or ".2." in name or ".3." in name for name in left.missing_keys)
    assert len(theirs) == sum(not name.startswith("clip.") for name in ours)
    return model


def picture(seed: int = 0, height: int = 40, width: int = 52) -> Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def ids_of(prompt: str, template: Template = CONFIG.i2v_video_template) -> list[int]:
    """Ids of a template, word by word: the tokenizer knows every one of these words."""
    tokenizer = Tokenizer.from_words(WORDS)
    words = template.text.replace("{}", prompt).split()
    return [BOS, *(IMAGE if word == "<image>" else tokenizer.id_of(word) or 0 for word in words)]


def plain(model: Any, prompt: str, image: Tensor, interleave: int, template: Template) -> tuple[Tensor, list[bool]]:
    """Context and mask by lists: transformers' states of the expanded ids, then the published crops one by one."""
    num_image = VISION.num_tokens
    length = template.crop_start + CONFIG.max_length
    row = ids_of(prompt, template)
    whole = len(row) <= length
    row = (row + [PAD] * length)[:length]
    place = row.index(IMAGE)
    expanded = row[:place] + [IMAGE] * num_image + row[place + 1 :]
    ids = torch.tensor([expanded])
    with torch.no_grad():
        output = model(
            input_ids=ids,
            pixel_values=clip_pixels(image, VISION.image_size),
            attention_mask=(ids != PAD).long(),
            output_hidden_states=True,
        )
    states = output.hidden_states[-3][0]
    breaks = [index for index, token in enumerate(row) if token == ids_of("break")[8]]
    last = breaks[-1] if whole else length  # the break after the assistant's header, if the prompt left room for it
    crop = template.crop_start - 1 + num_image
    text = [*states[crop : last - 1 + num_image - 4], *states[last - 1 + num_image :]]
    mask = [token != PAD for token in row]
    seen = [state for index, state in enumerate(states[place : place + num_image]) if index % interleave == 0]
    kept = [*mask[template.crop_start : last - 4], *mask[last:]]
    return torch.stack([*seen, *text]), [True] * len(seen) + kept


PROMPTS = {
    "empty": "",
    "short": "a red circle",
    "with breaks": "a break red break circle",
    "just fits": "red " * 7,
    "one too long": "red " * 8,
    "four too long": "red " * 11,
    "much too long": "a red circle moves left " * 9,
}


@pytest.mark.parametrize("interleave", [1, 2, 4])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_states_and_crops_are_those_of_llava(stack: TextStack, twin: Any, prompt: str, interleave: int) -> None:
    image = picture()
    found = stack.encode_with_image([prompt], image, interleave=interleave)
    expected, mask = plain(twin, prompt.strip(), image, interleave, CONFIG.i2v_video_template)
    assert found.context.shape == (1, 16 // interleave + 12 - 4, 32)
    assert found.context_mask[0].tolist() == mask
    real = torch.tensor(mask)
    assert relative(found.context[0][real], expected[real]) <= TOLERANCE
    assert torch.equal(found.pooled, stack.encode([prompt]).pooled)


def test_the_template_for_single_frames(stack: TextStack, twin: Any) -> None:
    found = stack.encode_with_image(["a red circle"], picture(), interleave=2, image_mode=True)
    expected, mask = plain(twin, "a red circle", picture(), 2, CONFIG.i2v_image_template)
    real = torch.tensor(mask)
    assert found.context_mask[0].tolist() == mask
    assert relative(found.context[0][real], expected[real]) <= TOLERANCE


def test_samples_do_not_depend_on_their_neighbours(stack: TextStack) -> None:
    prompts = list(PROMPTS.values())
    images = torch.cat([picture(seed) for seed in range(len(prompts))])
    together = stack.encode_with_image(prompts, images, interleave=4)
    for index, prompt in enumerate(prompts):
        alone = stack.encode_with_image([prompt], images[index], interleave=4)
        real = alone.context_mask[0]
        assert torch.equal(together.context_mask[index], real)
        assert relative(together.context[index][real], alone.context[0][real]) <= TOLERANCE


def test_one_picture_serves_all_prompts_and_is_seen(stack: TextStack) -> None:
    both = stack.encode_with_image(["a circle", "a circle"], picture(), interleave=4)
    assert torch.equal(both.context[0], both.context[1])
    other = stack.encode_with_image(["a circle"], picture(1), interleave=4)
    black = stack.encode_with_image(["a circle"], black_image(), interleave=4)
    assert relative(other.context[0], both.context[0]) > 1e-2
    assert relative(black.context[0], both.context[0]) > 1e-2


def test_half_precision_is_as_close_as_the_reference(stack: TextStack, twin: Any) -> None:
    """bfloat16: no further from float32 than transformers' own bfloat16."""
    import copy

    half = copy.deepcopy(stack).to(torch.bfloat16)
    half_twin = copy.deepcopy(twin).to(torch.bfloat16)
    distances: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed, prompt in enumerate(list(PROMPTS.values()) * 2):
        exact, mask = plain(twin, prompt.strip(), picture(seed), 2, CONFIG.i2v_video_template)
        theirs, _ = plain(half_twin, prompt.strip(), picture(seed), 2, CONFIG.i2v_video_template)
        ours = half.encode_with_image([prompt], picture(seed), interleave=2).context[0]
        real = torch.tensor(mask)
        for name, value in (("ours", ours), ("theirs", theirs)):
            distances[name].append(float((value.float() - exact)[real].norm() / exact[real].norm()))
    assert sum(distances["ours"]) <= 1.02 * sum(distances["theirs"])  # the mean of 14; single ones differ by chance


def test_published_numbers() -> None:
    """576 tokens at their places, 144 or 288 of them kept, 252 of the text: from the reference implementation."""
    config = TextConfig(vision=VisionDims())
    assert config.vision is not None
    assert config.vision.num_tokens == 576
    for template, crop in ((I2V_VIDEO_TEMPLATE, 103), (I2V_IMAGE_TEMPLATE, 36)):
        assert template.crop_start == crop
        assert template.assistant_tokens == 4
        assert template.text.startswith("<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the ")
        assert template.text.endswith("{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert 256 + 103 - 1 + 576 == 934
    assert (config.image_token_id, config.pad_token_id) == (128257, 128258)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width"), [(336, 336), (720, 1280), (101, 77), (77, 101), (28, 28), (500, 20), (337, 339), (1, 1)]
)
def test_pictures_are_prepared_as_transformers_does(height: int, width: int) -> None:
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(height * 10_000 + width)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    expected = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    found = clip_pixels(torch.from_numpy(pixels).float() / 255, 56)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(1, 8, 8, 4), "alpha channel"),
        (torch.zeros(8, 8), "not a picture"),
        (torch.zeros(1, 5, 8, 8, 3), "not a picture"),
        (torch.zeros(1, 3, 8, 8), "not a picture"),
        (torch.zeros(1, 0, 8, 3), "empty"),
        (torch.full((1, 8, 8, 3), float("nan")), "not finite"),
        (torch.zeros(3, 8, 8, 3), "3 pictures for 2 prompts"),
    ],
)
def test_pictures_that_are_none(stack: TextStack, image: Tensor, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        stack.encode_with_image(["a", "b"], image, interleave=4)


# --- templates ------------------------------------------------------------------------------------------------------


def test_a_custom_template_is_cut_where_the_prompt_begins(stack: TextStack) -> None:
    custom = "system describe a blue image user {} eot"
    found = stack.encode(["a red circle"], custom_template=custom)
    config = dataclasses.replace(CONFIG, video_template=Template(text=custom, crop_start=7))
    other = TextStack(config, Tokenizer.from_words(WORDS))
    other.load_state_dict(stack.state_dict())
    expected = other.encode(["a red circle"])
    assert torch.equal(found.context, expected.context)
    assert torch.equal(found.context_mask, expected.context_mask)
    assert not torch.equal(found.context[:, 0], stack.encode(["a red circle"]).context[:, 0])


def test_the_published_template_as_a_custom_one_changes_nothing(stack: TextStack) -> None:
    for text in ("", CONFIG.video_template.text):
        assert torch.equal(stack.encode(["a"], custom_template=text).context, stack.encode(["a"]).context)


def test_a_custom_template_for_a_picture(stack: TextStack, twin: Any) -> None:
    """With the published end its last tokens are cut as well; with another end nothing is."""
    ended = "describe <image> red {} eot start assistant end break"
    template = Template(text=ended, crop_start=4, assistant_tokens=4)
    expected, mask = plain(twin, "a circle", picture(), 4, template)
    found = stack.encode_with_image(["a circle"], picture(), interleave=4, custom_template=ended)
    real = torch.tensor(mask)
    assert found.context_mask[0].tolist() == mask
    assert relative(found.context[0][real], expected[real]) <= TOLERANCE
    open_end = stack.encode_with_image(["a circle"], picture(), interleave=4, custom_template="<image> {}")
    assert open_end.context_mask.sum() == 4 + 2


@pytest.mark.parametrize(
    ("custom", "with_image", "words"),
    [
        ("describe", False, "no place in the template"),
        ("{} {}", False, "several"),
        ("<image> {}", False, "place for a picture"),
        ("describe {}", True, "picture has no place"),
        ("{} <image>", True, "picture has no place"),
        ("<image> <image> {}", True, "picture has no place"),
    ],
)
def test_templates_that_cannot_work(stack: TextStack, custom: str, with_image: bool, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        stack.tokenize(["a"], with_image=with_image, custom_template=custom)


def test_start_tokens_are_one() -> None:
    """A template may bring its own, and the tokenizer may add one."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(Tokenizer.from_words(WORDS).to_json())
    backend.add_special_tokens([AddedToken("<bos>", normalized=False)])
    marked = TextStack(CONFIG, Tokenizer(backend))
    for template in ("describe {}", "<bos> describe {}", "<bos><bos>describe {}"):
        tokens = marked.tokenize(["red"], custom_template=template)
        assert tokens.ids[0].tolist().count(BOS) == 1
        assert tokens.crop_start == 2


def test_what_cannot_be_encoded_with_a_picture(stack: TextStack) -> None:
    with pytest.raises(SettingsError, match="prompt contains <image>"):
        stack.encode_with_image(["an <image>"], picture(), interleave=4)
    with pytest.raises(SettingsError, match="interleave"):
        stack.encode_with_image(["a"], picture(), interleave=0)
    blind = TextStack(dataclasses.replace(CONFIG, vision=None), Tokenizer.from_words(WORDS))
    with pytest.raises(CheckpointError, match="cannot see pictures") as problem:
        blind.encode_with_image(["a"], picture(), interleave=4)
    assert isinstance(problem.value, UserError)
    assert problem.value.given
    assert problem.value.expected
    assert problem.value.do
