"""HunyuanVideo's two text encoders: LLaMA states per token and one pooled CLIP vector.

The prompt is put into a template for LLaMA, whose leading tokens are cut from the states again; CLIP
reads the bare prompt. Source: Tencent's HunyuanVideo repository (``hyvideo/text_encoder``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...text.clip import ClipText
from ...text.llama import build_llama, llama_states
from ...text.tokenizer import METADATA_KEY, METADATA_KEY_CLIP, Tokenizer, pad_right
from .config import Template, TextConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Token ids of a batch of prompts."""

    ids: Tensor
    """(B, crop_start + max_length) int64 for LLaMA, padded on the right"""
    mask: Tensor
    """same shape, bool, true for real tokens"""
    clip_ids: Tensor
    """(B, clip.max_length) int64, padded with the end-of-text token"""
    crop_start: int
    """leading tokens of the template, to be cut from the states"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFeatures:
    """What the network is told about a batch of prompts."""

    context: Tensor
    """(B, L, D) states of LLaMA, L = max_length"""
    context_mask: Tensor
    """(B, L) bool, true for real tokens"""
    pooled: Tensor
    """(B, P) CLIP vector"""


def _check_vocabulary(encoder: str, tokenizer: Tokenizer | None, num_rows: int) -> None:
    if tokenizer is not None and tokenizer.vocab_size > num_rows:
        raise CheckpointError(
            f"The tokenizer does not belong to the {encoder} text encoder",
            given=f"a tokenizer with {tokenizer.vocab_size} entries",
            expected=f"at most {num_rows}, one for each row of the embedding",
            do="use the tokenizer.json that was published with the encoder",
        )


class TextStack(nn.Module):
    """Both encoders with their tokenizers.

    Parameters are named ``llama.`` + LlamaModel's names and ``clip.`` + the names of CLIP's published file.

    Args:
        config: sizes, template and special ids.
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
        _check_vocabulary("LLaMA", self.tokenizer, config.llama.vocab_size)
        _check_vocabulary("CLIP", self.tokenizer_clip, config.clip.vocab_size)
        self.llama = build_llama(config.llama)
        self.clip = ClipText(config.clip)

    @property
    def device(self) -> torch.device:
        return next(self.llama.parameters()).device

    def metadata(self) -> dict[str, str]:
        """The tokenizers as entries for the metadata of a safetensors file."""
        if self.tokenizer is None or self.tokenizer_clip is None:
            return {}
        texts = {METADATA_KEY: self.tokenizer.to_json(), METADATA_KEY_CLIP: self.tokenizer_clip.to_json()}
        if texts[METADATA_KEY] == texts[METADATA_KEY_CLIP]:
            del texts[METADATA_KEY_CLIP]
        return texts

    def tokenize(self, prompts: Sequence[str], *, image_mode: bool = False) -> Tokens:
        """Ids on the CPU; prompts that are too long lose their end. ``image_mode`` takes the image template."""
        if self.tokenizer is None or self.tokenizer_clip is None:
            raise CheckpointError(
                "The text encoder has no tokenizer",
                expected="a tokenizer.json in the file's metadata or beside it",
                do="put the tokenizer.json of the text encoder next to its weights",
            )
        template = self.config.image_template if image_mode else self.config.video_template
        stripped = [prompt.strip() for prompt in prompts]
        ids, mask = self._llama_ids(self.tokenizer, stripped, template)
        return Tokens(
            ids=ids,
            mask=mask,
            clip_ids=self._clip_ids(self.tokenizer_clip, stripped),
            crop_start=template.crop_start,
        )

    def _llama_ids(self, tokenizer: Tokenizer, prompts: list[str], template: Template) -> tuple[Tensor, Tensor]:
        rows = tokenizer.encode([template.text.replace("{}", prompt, 1) for prompt in prompts])
        bos = self.config.bos_token_id
        # crop_start counts the start token, which some copies of LLaMA's tokenizer.json leave to the caller.
        rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
        return pad_right(rows, template.crop_start + self.config.max_length, self.config.pad_token_id)

    def _clip_ids(self, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
        length, eos = self.config.clip.max_length, self.config.clip.eos_token_id
        rows = [[*row[: length - 1], eos] for row in tokenizer.encode(prompts)]
        return pad_right(rows, length, eos)[0]

    def features(self, ids: Tensor, mask: Tensor, clip_ids: Tensor, *, crop_start: int = 0) -> TextFeatures:
        """The features of token ids; gradients flow to both encoders. Shapes as in :class:`Tokens`."""
        states = llama_states(self.llama, ids, mask)
        return TextFeatures(
            context=states[:, crop_start:], context_mask=mask[:, crop_start:], pooled=self.clip(clip_ids)
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, image_mode: bool = False) -> TextFeatures:
        """Features of ``prompts`` (B of them; an empty one is fine) on the encoders' device."""
        tokens = self.tokenize(prompts, image_mode=image_mode)
        ids, mask, clip_ids = (x.to(self.device) for x in (tokens.ids, tokens.mask, tokens.clip_ids))
        return self.features(ids, mask, clip_ids, crop_start=tokens.crop_start)
