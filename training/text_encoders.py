"""What the training of text encoders must know of a family: how captions are read, and what sizes the outputs.

Everything else, captions, losses and scores, is the same for all of them: :mod:`.text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..vidgen_core.families.cogvideox.config import TextConfig as T5TextConfig
from ..vidgen_core.families.cogvideox.text import T5Text
from ..vidgen_core.families.hunyuan.config import TextConfig
from ..vidgen_core.families.hunyuan.text import TextStack
from ..vidgen_core.text.features import TextFeatures
from ..vidgen_core.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A batch of captions as the encoders read them; gradients flow."""

    ids: Tensor
    """(B, L) int64"""
    features: TextFeatures
    """``context_mask`` is true for words and the special tokens around them, false for padding"""


class Encoders(Protocol):
    """The encoders of one family in training."""

    family: str
    summary: str
    """readout that is drawn towards a sum of attribute vectors"""
    ahead: int
    """a state predicts the word so many places after its own: the next one where states see only what comes before"""
    gives_padding: bool
    """the network attends to the states of padding, too"""

    @property
    def module(self) -> TextStack | T5Text: ...

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of each readout."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def spread_embeddings(self) -> None:
        """Start words and places far apart: the usual 0.02 suits vocabularies of many thousands."""
        ...

    def read(self, texts: Sequence[str]) -> Reading: ...

    def normalise(self, texts: Sequence[str]) -> None:
        """Bring the outputs to a root mean square of 1 over ``texts``, in the weights."""
        ...


class HunyuanEncoders:
    """LLaMA's states of the words, and CLIP's pooled vector."""

    family = "hunyuan"
    summary = "pooled"
    ahead = 1
    gives_padding = False

    def __init__(self, config: TextConfig, tokenizer: Tokenizer) -> None:
        self.module = TextStack(config, tokenizer)

    @property
    def widths(self) -> Mapping[str, int]:
        config = self.module.config
        return {"pooled": config.clip.hidden_size, "mean": config.llama.hidden_size, "last": config.llama.hidden_size}

    @property
    def vocab_size(self) -> int:
        return self.module.config.llama.vocab_size

    def spread_embeddings(self) -> None:
        embeddings = self.module.clip.text_model.embeddings
        nn.init.normal_(self.module.llama.get_parameter("embed_tokens.weight"), std=0.5)
        nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.1)

    def read(self, texts: Sequence[str]) -> Reading:
        """Without the columns that are padding in every row: the features stay the same."""
        tokens = self.module.tokenize(texts)
        longest = int(tokens.mask.sum(1).max())
        ids, mask, clip_ids = (columns[:, :longest] for columns in (tokens.ids, tokens.mask, tokens.clip_ids))
        return Reading(ids=ids, features=self.module.features(ids, mask, clip_ids))

    @torch.no_grad()
    def normalise(self, texts: Sequence[str]) -> None:
        """The pooled vector gets a mean of 0, too.

        LLaMA's blocks normalise what they read, so scaling all that is written to the residual stream
        scales the states and changes nothing else (but for the epsilon of the norms).
        """
        llama, features = self.module.llama, self.read(texts).features
        scale = features.context[features.context_mask].square().mean().rsqrt()
        llama.get_parameter("embed_tokens.weight").mul_(scale)
        for name, parameter in llama.named_parameters():
            if name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")):
                parameter.mul_(scale)
        norm = self.module.clip.text_model.final_layer_norm
        mean = features.pooled.mean(0)
        scale = (features.pooled - mean).square().mean().rsqrt()
        norm.bias.sub_(mean).mul_(scale)
        norm.weight.mul_(scale)


POSITION_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
"""of T5, for all layers"""


class CogVideoXEncoders:
    """T5's states of the words, of the end of the text and of the padding behind it, which all see each other."""

    family = "cogvideox"
    summary = "last"
    ahead = 0
    gives_padding = True

    def __init__(self, config: T5TextConfig, tokenizer: Tokenizer) -> None:
        self.module = T5Text(config, tokenizer)

    @property
    def widths(self) -> Mapping[str, int]:
        width = self.module.config.t5.hidden_size
        return {"mean": width, "last": width}

    @property
    def vocab_size(self) -> int:
        return self.module.config.t5.vocab_size

    def spread_embeddings(self) -> None:
        nn.init.normal_(self.module.t5.get_parameter("embed_tokens.weight"), std=0.5)
        # Heads that look to chosen places from the start learn early which noun a colour stands before.
        nn.init.normal_(self.module.t5.get_parameter(POSITION_BIAS), std=2.0)

    def read(self, texts: Sequence[str]) -> Reading:
        """At the full length: words see the padding, so its amount changes their states."""
        ids = self.module.tokenize(texts)
        features = self.module.features(ids)
        return Reading(ids=ids, features=replace(features, context_mask=ids != self.module.config.pad_token_id))

    @torch.no_grad()
    def normalise(self, texts: Sequence[str]) -> None:
        """Over all states, those of padding among them; the last norm's weight scales them exactly."""
        scale = self.read(texts).features.context.square().mean().rsqrt()
        self.module.t5.get_parameter("final_layer_norm.weight").mul_(scale)


def encoders_of(config: TextConfig | T5TextConfig, tokenizer: Tokenizer) -> Encoders:
    """Fresh encoders of ``config``, whose class tells the family."""
    if isinstance(config, T5TextConfig):
        return CogVideoXEncoders(config, tokenizer)
    return HunyuanEncoders(config, tokenizer)
