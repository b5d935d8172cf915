"""CogVideoX's text encoder: T5's states of the bare prompt, padding and all.

Source: zai-org's CogVideo repository (``sat/sgm/modules/encoders/modules.py``) and the diffusers pipeline. There is no
template and no mask: the states of padding are made, and read, like those of words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, SettingsError
from ...text.features import TextFeatures
from ...text.t5 import build_t5, t5_states
from ...text.tokenizer import METADATA_KEY, Tokenizer, pad_right
from .config import TextConfig


class T5Text(nn.Module):
    """The encoder with its tokenizer. Parameters are named ``t5.`` + those of ``text.t5.build_t5``.

    Args:
        config: sizes, length and special ids.
        tokenizer: None when only the weights matter (then :meth:`encode` is an error).
    """

    sees_images = False

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.fingerprint = ""
        """of the file the weights came from"""
        if tokenizer is not None and tokenizer.num_ids > config.t5.vocab_size:
            raise CheckpointError(
                "The tokenizer does not belong to the T5 text encoder",
                given=f"a tokenizer with {tokenizer.num_ids} entries",
                expected=f"at most {config.t5.vocab_size}, one for each row of the embedding",
                do="use the spiece.model that was published with the encoder",
            )
        self.t5 = build_t5(config.t5)

    @property
    def device(self) -> torch.device:
        return next(self.t5.parameters()).device

    def metadata(self) -> dict[str, str]:
        """The tokenizer as an entry for the metadata of a safetensors file."""
        return {} if self.tokenizer is None else {METADATA_KEY: self.tokenizer.to_json()}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """(B, max_length) int64 ids on the CPU: the prompt as it is, the end-of-text token, padding. Prompts that are
        too long lose their end."""
        if self.tokenizer is None:
            raise CheckpointError(
                "The text encoder has no tokenizer",
                expected="T5's spiece.model or tokenizer.json in the file's metadata or beside it",
                do="put spiece.model next to the weights of T5",
            )
        config = self.config
        rows = self.tokenizer.encode(prompts, special_tokens=False)
        ended = [[*row[: config.max_length - 1], config.eos_token_id] for row in rows]
        return pad_right(ended, config.max_length, config.pad_token_id)[0]

    def features(self, ids: Tensor) -> TextFeatures:
        """The features of token ids (B, L); gradients flow. Every token counts as real, and there is no pooled vector
        (B, 0)."""
        states = t5_states(self.t5, ids)
        mask = torch.ones(ids.shape, dtype=torch.bool, device=states.device)
        return TextFeatures(context=states, context_mask=mask, pooled=states.new_zeros(len(ids), 0))

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, image_mode: bool = False, custom_template: str | None = None
    ) -> TextFeatures:
        """Features of ``prompts`` (B of them) on the encoder's device; an empty one as ``config.empty_prompt`` says.

        Raises:
            SettingsError: a template, which this encoder does not have.
        """
        if custom_template:
            raise SettingsError(
                "CogVideoX's text encoder reads the prompt without a template",
                given=repr(custom_template[:80]),
                do="leave the template empty",
            )
        features = self.features(self.tokenize(prompts).to(self.device))
        if self.config.empty_prompt == "zeros":
            for row, prompt in zip(features.context, prompts, strict=True):
                if not prompt:
                    row.zero_()
        return features

    def encode_with_image(
        self,
        prompts: Sequence[str],
        image: Tensor,
        *,
        interleave: int,
        image_mode: bool = False,
        custom_template: str | None = None,
    ) -> TextFeatures:
        """Raises CheckpointError: T5 reads text only."""
        raise CheckpointError(
            "This text encoder cannot see pictures",
            given="T5, which reads text only",
            do="encode the prompt without a picture; CogVideoX is given pictures as latents",
        )
