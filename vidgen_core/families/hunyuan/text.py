"""HunyuanVideo's text encoders: LLaMA states per token and one pooled CLIP vector; with LLaVA's eyes, of a picture too.

The prompt is put into a template for LLaMA, whose leading tokens are cut from the states again; CLIP reads the bare
prompt. For image to video the picture's tokens stand inside the template and their states before those of the text.
Source: Tencent's HunyuanVideo and HunyuanVideo-I2V repositories (``hyvideo/text_encoder``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import CheckpointError, SettingsError
from ...text.clip import ClipText
from ...text.features import TextFeatures
from ...text.image import check_images, clip_pixels
from ...text.llama import build_llama, llama_states
from ...text.tokenizer import METADATA_KEY, METADATA_KEY_CLIP, Tokenizer, pad_right
from ...text.vision import LlavaVision
from .config import IMAGE_MARK, Template, TextConfig

__all__ = ["TextFeatures", "TextStack", "Tokens", "black_image"]

SLOT = "{}"
"""where a template takes the prompt"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids of a batch of prompts."""

    ids: Tensor
    """(B, crop_start + max_length) int64 for LLaMA, padded on the right; a picture is one token"""
    mask: Tensor
    """same shape, bool, true for real tokens"""
    clip_ids: Tensor
    """(B, clip.max_length) int64, padded with the end-of-text token"""
    crop_start: int
    """leading tokens of the template, to be cut from the states"""
    last: Tensor
    """(B,) where the last token of the template stands, or the length if it was cut off with a long prompt"""


def black_image() -> Tensor:
    """The picture that stands beside a negative prompt in Tencent's code, (1, H, W, 3); its size does not matter."""
    return torch.zeros(1, 8, 8, 3)


def check_vocabulary(encoder: str, tokenizer: Tokenizer | None, num_rows: int) -> None:
    """Raise CheckpointError where a tokenizer makes ids that the embedding has no row for."""
    if tokenizer is not None and tokenizer.num_ids > num_rows:
        raise CheckpointError(
            f"The tokenizer does not belong to the {encoder} text encoder",
            given=f"a tokenizer with {tokenizer.num_ids} entries",
            expected=f"at most {num_rows}, one for each row of the embedding",
            do="use the tokenizer.json that was published with the encoder",
        )


class TextStack(nn.Module):
    """The encoders with their tokenizers.

    Parameters are named ``llama.`` + LlamaModel's names, ``clip.`` + the names of CLIP's published file, and
    ``vision.`` + those of ComfyUI's file of LLaVA's image encoder.

    Args:
        config: sizes, templates and special ids; without ``vision`` there is no image encoder.
        tokenizer: LLaMA's; None when only the weights matter (then :meth:`encode` is an error).
        tokenizer_clip: CLIP's; None means that LLaMA's serves both.
    """

    def __init__(
        self, config: TextConfig, tokenizer: Tokenizer | None = None, tokenizer_clip: Tokenizer | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.tokenizer_clip = tokenizer if tokenizer_clip is None else tokenizer_clip
        self.fingerprint = ""
        """of the files the weights came from"""
        check_vocabulary("LLaMA", self.tokenizer, config.llama.vocab_size)
        check_vocabulary("CLIP", self.tokenizer_clip, config.clip.vocab_size)
        self.llama = build_llama(config.llama)
        self.clip = ClipText(config.clip)
        self.vision = None if config.vision is None else LlavaVision(config.vision)
        self.read_vision: Callable[[], LlavaVision] | None = None
        """gives the image encoder where its weights were left in the file until a picture comes"""

    @property
    def device(self) -> torch.device:
        return next(self.llama.parameters()).device

    @property
    def sees_images(self) -> bool:
        """Whether there is an image encoder, read already or not."""
        return self.vision is not None or self.read_vision is not None

    def eyes(self) -> LlavaVision:
        """The image encoder, read from its file now if that was put off; CheckpointError without one."""
        if self.vision is None and self.read_vision is not None:
            with torch.inference_mode(False):  # it outlives this call
                self.vision = self.read_vision().to(self.device).eval().requires_grad_(False)
            self.read_vision = None
        if self.vision is None:
            raise CheckpointError(
                "These text encoders cannot see pictures",
                given="LLaMA and CLIP without LLaVA's image encoder",
                expected="the image encoder, llava_llama3_vision.safetensors, or the whole LLaVA in one file",
                do="load it with the text encoders, or encode the prompt without a picture",
            )
        return self.vision

    def metadata(self) -> dict[str, str]:
        """The tokenizers as entries for the metadata of a safetensors file."""
        if self.tokenizer is None or self.tokenizer_clip is None:
            return {}
        texts = {METADATA_KEY: self.tokenizer.to_json(), METADATA_KEY_CLIP: self.tokenizer_clip.to_json()}
        if texts[METADATA_KEY] == texts[METADATA_KEY_CLIP]:
            del texts[METADATA_KEY_CLIP]
        return texts

    # --- text to ids -------------------------------------------------------------------------------------------------

    def tokenize(
        self,
        prompts: Sequence[str],
        *,
        image_mode: bool = False,
        with_image: bool = False,
        custom_template: str | None = None,
    ) -> Tokens:
        """Ids on the CPU; prompts that are too long lose their end.

        Args:
            image_mode: the template for videos of one frame.
            with_image: the template for a prompt with a picture, whose place is one token.
            custom_template: a text with ``{}`` in place of the published template; see :meth:`template`.
        """
        tokenizer, tokenizer_clip = self._tokenizers()
        template = self.template(image_mode=image_mode, with_image=with_image, custom=custom_template)
        stripped = [prompt.strip() for prompt in prompts]
        make_rows = self._rows_with_image if with_image else self._rows
        rows = make_rows(tokenizer, stripped, template)
        length = template.crop_start + self.config.max_length
        ids, mask = pad_right(rows, length, self.config.pad_token_id)
        return Tokens(
            ids=ids,
            mask=mask,
            clip_ids=self._clip_ids(tokenizer_clip, stripped),
            crop_start=template.crop_start,
            last=torch.tensor([min(len(row) - 1, length) for row in rows]),
        )

    def template(self, *, image_mode: bool = False, with_image: bool = False, custom: str | None = None) -> Template:
        """The published template, or a custom one with its crop, found by counting the tokens before ``{}``.

        A custom template for a picture ends as the published one does where its last tokens are to be cut as well.

        Raises:
            SettingsError: a custom template without exactly one ``{}``, or whose mark for the picture is missing,
                behind the prompt, there twice, or there without a picture.
        """
        config = self.config
        if with_image:
            published = config.i2v_image_template if image_mode else config.i2v_video_template
        else:
            published = config.image_template if image_mode else config.video_template
        if custom is None or custom in (published.text, ""):
            return published
        _check_custom(custom, with_image=with_image)
        before, after = custom.split(SLOT)
        tokenizer, _ = self._tokenizers()
        same_end = after == published.text.split(SLOT)[1]
        return Template(
            text=custom,
            crop_start=len(self._marked(tokenizer, before)),
            assistant_tokens=published.assistant_tokens if same_end else 0,
        )

    def _tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        if self.tokenizer is None or self.tokenizer_clip is None:
            raise CheckpointError(
                "The text encoder has no tokenizer",
                expected="a tokenizer.json in the file's metadata or beside it",
                do="put the tokenizer.json of the text encoder next to its weights",
            )
        return self.tokenizer, self.tokenizer_clip

    def _rows(self, tokenizer: Tokenizer, prompts: list[str], template: Template) -> list[list[int]]:
        rows = tokenizer.encode([template.text.replace(SLOT, prompt, 1) for prompt in prompts])
        return [self._one_start(row) for row in rows]

    def _one_start(self, row: list[int]) -> list[int]:
        """Exactly one start token: some copies of LLaMA's tokenizer.json leave it out, a template may bring its own."""
        bos = self.config.bos_token_id
        first = next((index for index, token in enumerate(row) if token != bos), len(row))
        return [bos, *row[first:]]

    def _marked(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids with one start token and no end token; the mark of a picture is one token, known to the file or not."""
        parts = tokenizer.encode(text.split(IMAGE_MARK), special_tokens=False)
        row = parts[0]
        for part in parts[1:]:
            row = [*row, self.config.image_token_id, *part]
        return self._one_start(row)

    def _rows_with_image(self, tokenizer: Tokenizer, prompts: list[str], template: Template) -> list[list[int]]:
        for prompt in prompts:
            if IMAGE_MARK in prompt:
                raise SettingsError(
                    f"The prompt contains {IMAGE_MARK}, which stands for the picture in the template",
                    given=repr(prompt[:80]),
                    do=f"write the prompt without {IMAGE_MARK}",
                )
        return [self._marked(tokenizer, template.text.replace(SLOT, prompt, 1)) for prompt in prompts]

    def _clip_ids(self, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
        length, eos = self.config.clip.max_length, self.config.clip.eos_token_id
        rows = [[*row[: length - 1], eos] for row in tokenizer.encode(prompts)]
        return pad_right(rows, length, eos)[0]

    # --- ids to features ---------------------------------------------------------------------------------------------

    def features(self, ids: Tensor, mask: Tensor, clip_ids: Tensor, *, crop_start: int = 0) -> TextFeatures:
        """The features of token ids; gradients flow to both encoders. Shapes as in :class:`Tokens`."""
        states = llama_states(self.llama, ids, mask)
        return TextFeatures(
            context=states[:, crop_start:], context_mask=mask[:, crop_start:], pooled=self.clip(clip_ids)
        )

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, image_mode: bool = False, custom_template: str | None = None
    ) -> TextFeatures:
        """Features of ``prompts`` (B of them; an empty one is fine) on the encoders' device."""
        tokens = self.tokenize(prompts, image_mode=image_mode, custom_template=custom_template)
        tokens, used = self._placed(tokens)
        features = self.features(
            tokens.ids[:, :used], tokens.mask[:, :used], tokens.clip_ids, crop_start=tokens.crop_start
        )
        return _padded(features, self.config.max_length)

    def _placed(self, tokens: Tokens) -> tuple[Tokens, int]:
        """The tokens on the encoders' device, and how many columns any row needs: padding costs as much as words, and
        what a real token becomes does not depend on it."""
        used = int(tokens.mask.any(dim=0).nonzero().max()) + 1
        placed = {name: getattr(tokens, name).to(self.device) for name in ("ids", "mask", "clip_ids", "last")}
        return replace(tokens, **placed), max(used, tokens.crop_start)

    @torch.no_grad()
    def encode_with_image(
        self,
        prompts: Sequence[str],
        image: Tensor,
        *,
        interleave: int,
        image_mode: bool = False,
        custom_template: str | None = None,
    ) -> TextFeatures:
        """Features of prompts that speak of a picture: its tokens first, then those of the text.

        Args:
            image: (H, W, 3) or (1, H, W, 3) for all prompts, or (B, H, W, 3); in [0, 1]. The whole picture, not the
                crop that becomes the first frame. For a negative prompt :func:`black_image`.
            interleave: every how many-th token of the picture is kept: 4 for networks with token replacement, 2 for
                networks with latent concatenation.
            image_mode, custom_template: as :meth:`tokenize` has them.

        Returns:
            context of ceil(picture tokens / interleave) + max_length - assistant tokens: 144 + 252 or 288 + 252.

        Raises:
            CheckpointError: there is no image encoder.
            SettingsError: not a picture, as many pictures as neither 1 nor B, or an interleave below 1.
        """
        check_images(image)
        if interleave < 1:
            raise SettingsError(
                "The interleave cannot be used", given=interleave, expected="at least 1", do="use 4 or 2"
            )
        num_images = 1 if image.ndim == 3 else len(image)
        if num_images not in (1, len(prompts)):
            raise SettingsError(
                "The number of pictures does not fit the number of prompts",
                given=f"{num_images} pictures for {len(prompts)} prompts",
                expected="one picture for all prompts, or one for each",
            )
        template = self.template(image_mode=image_mode, with_image=True, custom=custom_template)
        tokens = self.tokenize(prompts, image_mode=image_mode, with_image=True, custom_template=custom_template)
        eyes = self.eyes()
        pixels = clip_pixels(image, eyes.dims.image_size).to(self.device)
        seen = eyes(pixels).expand(len(prompts), -1, -1)
        tokens, used = self._placed(tokens)
        used = max(used, tokens.crop_start + template.assistant_tokens)
        tokens = replace(tokens, ids=tokens.ids[:, :used], mask=tokens.mask[:, :used])
        features = self._features_with_image(tokens, seen, interleave, template.assistant_tokens)
        num_picture = -(-seen.shape[1] // interleave)
        return _padded(features, num_picture + self.config.max_length - template.assistant_tokens)

    def _features_with_image(self, tokens: Tokens, seen: Tensor, interleave: int, num_cut: int) -> TextFeatures:
        """``seen`` (B, N, D) takes the place of the picture's token; ``num_cut`` tokens before the last one go."""
        place = int((tokens.ids[0] == self.config.image_token_id).int().argmax())
        num_seen = seen.shape[1]
        words = self.llama.get_input_embeddings()(tokens.ids)  # type: ignore[operator]
        joined = torch.cat([words[:, :place], seen.to(words.dtype), words[:, place + 1 :]], dim=1)
        mask = torch.cat([tokens.mask[:, :place], _ones(seen), tokens.mask[:, place + 1 :]], dim=1)
        states = llama_states(self.llama, joined, mask)

        picture = states[:, place : place + num_seen : interleave]
        kept = torch.arange(tokens.crop_start, tokens.ids.shape[1] - num_cut, device=states.device)
        kept = kept + num_cut * (kept >= tokens.last[:, None] - num_cut)  # (B, L): the same number in every row
        rows = torch.arange(len(kept), device=states.device)[:, None]
        text = states[rows, kept + num_seen - 1]
        return TextFeatures(
            context=torch.cat([picture, text], dim=1),
            context_mask=torch.cat([_ones(picture), tokens.mask[rows, kept]], dim=1),
            pooled=self.clip(tokens.clip_ids),
        )


def _padded(features: TextFeatures, length: int) -> TextFeatures:
    """``length`` tokens, with zeros where nothing was computed."""
    missing = length - features.context.shape[1]
    return replace(
        features,
        context=F.pad(features.context, (0, 0, 0, missing)),
        context_mask=F.pad(features.context_mask, (0, missing)),
    )


def _ones(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _check_custom(text: str, *, with_image: bool) -> None:
    if text.count(SLOT) != 1:
        raise SettingsError(
            "The prompt has no place in the template" if SLOT not in text else "The template has several {}",
            given=repr(text[:120]),
            expected="a template with exactly one {}, where the prompt goes",
            do="write {} into the template, or leave it empty for the published one",
        )
    marks, before = text.count(IMAGE_MARK), IMAGE_MARK in text.split(SLOT)[0]
    if with_image and not (marks == 1 and before):
        raise SettingsError(
            "The picture has no place in the template",
            given=repr(text[:120]),
            expected=f"a template with exactly one {IMAGE_MARK}, before the {{}}",
            do=f"write {IMAGE_MARK} where the picture goes",
        )
    if marks and not with_image:
        raise SettingsError(
            f"The template has a place for a picture ({IMAGE_MARK}), but there is none",
            given=repr(text[:120]),
            expected=f"a picture, or a template without {IMAGE_MARK}",
            do="connect an image, or remove the mark",
        )
