"""The text encoder of latent diffusion's text-to-image model (Rombach et al. 2022, arXiv:2112.10752, app. E.2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

import ldmkit.config
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.config import AssetPath
from ldmkit.errors import ConfigError
from ldmkit.interfaces import Condition, Conditioner
from ldmkit_text.bert_prompts import bert_prompts
from ldmkit_text.huggingface import bert_tokenizer_files, bert_tokenizer_values, tokenizer_of
from ldmkit_text.pre_norm import PreNormEncoder
from ldmkit_text.prompts import check_prompts

HEAD = {r"to_logits\.": "the language model's head; conditioning uses the last hidden states"}
"""Keys that are left out, and why."""
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "head_dim": "head_dim",
    "intermediate_size": "encoder_ffn_dim",
    "max_length": "max_position_embeddings",
    "dropout": "dropout",
}
"""Ours, and those of diffusers' `LDMBertConfig`; the defaults of all but dropout are the same."""
_FIXED = {"activation_function": "gelu", "activation_dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0}


class LDMBertConditioner(Conditioner):
    """Prompts => (B, max_length, hidden_size) tokens, one per WordPiece; padding takes part, as it did in training.

    State dict: model.{embed_tokens, embed_positions, layers.i, layer_norm}, named as in diffusers' `LDMBertModel`.
    """

    class Config(ldmkit.config.Config):
        """The defaults are the published 1.45-billion-parameter model's.

        Attributes:
            vocab: WordPiece vocabulary, one piece a line, or a `tokenizer.json` of BERT's.
            vocab_size: rows of the embedding table; at least the vocabulary's.
            hidden_size: width. num_hidden_layers: transformer layers. intermediate_size: width inside the feed-forward layers.
            num_attention_heads, head_dim: heads, and channels of each, which need not add up to the width.
            max_length: tokens of every prompt, [CLS], [SEP] and padding included; what is longer is cut off.
            dropout: after the embeddings and each layer, in training mode.
            lowercase: also strips accents, as uncased BERT does.
        """

        vocab: AssetPath
        vocab_size: int = Field(30522, ge=1)
        hidden_size: int = Field(1280, ge=1)
        num_hidden_layers: int = Field(32, ge=1)
        num_attention_heads: int = Field(8, ge=1)
        head_dim: int = Field(64, ge=1)
        intermediate_size: int = Field(5120, ge=1)
        max_length: int = Field(77, ge=3)
        dropout: float = Field(0.0, ge=0, lt=1)
        lowercase: bool = True

    config: LDMBertConditioner.Config
    null_input = ""
    provides = frozenset({"tokens_BLC"})

    def __init__(self, config: LDMBertConditioner.Config) -> None:
        super().__init__()
        self.config = config
        self.prompt_encoder, _ = bert_prompts(
            config.vocab, vocab_size=config.vocab_size, lowercase=config.lowercase, max_length=config.max_length
        )
        self.model = PreNormEncoder(
            vocab_size=config.vocab_size,
            length=config.max_length,
            channels=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            inner_channels=config.intermediate_size,
            dropout=config.dropout,
        )

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise InputTypeError or InputError unless the inputs are a list of strings."""
        check_prompts(inputs)

    def forward(self, inputs: Sequence[str]) -> Condition:
        """Prompts => tokens (B, max_length, hidden_size).

        Raises:
            InputTypeError, InputError: as `check`.

        Warns:
            PromptTruncatedWarning: for a prompt that does not fit, quoting what is cut off.
        """
        self.check(inputs)
        ids_BL, _ = self.prompt_encoder(inputs)
        return Condition(tokens_BLC=self.model(ids_BL.to(self.model.embed_tokens.weight.device)))

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError, CheckpointError."""
        ((name, given),) = configs.items()
        tokenizer = tokenizer_of(name, tokenizers)
        wrong = [
            f"{key} = {given[key]!r} (only {value!r} can be served)"
            for key, value in _FIXED.items()
            if given.get(key, value) != value
        ]
        if wrong:
            raise ConfigError(f"the config of {name}: {'; '.join(wrong)}")
        values = {ours: given[theirs] for ours, theirs in _NAMES.items() if theirs in given}
        return Reading({**values, **bert_tokenizer_values(tokenizer)}, ignored=HEAD)

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`."""
        values = self.config.to_dict()
        config = {"architectures": ["LDMBertModel"], "model_type": "ldmbert", "pad_token_id": self.prompt_encoder.pad_id}
        config |= _FIXED | {theirs: values[ours] for ours, theirs in _NAMES.items()}
        files = bert_tokenizer_files(Path(self.config.vocab), lowercase=self.config.lowercase, length=self.config.max_length)
        return {
            "bert": Written("latent_diffusion", "LDMBertModel", config),
            "tokenizer": Written("transformers", "BertTokenizer", files=files),
        }
