"""BERT as a conditioner: trained together with the denoiser (Rombach et al. 2022, app. E.2.1), or from pretrained weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import BertConfig, BertModel

import ldmkit.config
from ldmkit.config import AssetPath
from ldmkit.interfaces import Condition, Conditioner
from ldmkit_text.bert_prompts import bert_prompts
from ldmkit_text.prompts import check_prompts
from ldmkit_text.wordpiece import UNK


class BertConditioner(Conditioner):
    """Prompts => (B, L, hidden_size) tokens, one per WordPiece, of transformers' BERT encoder.

    Weights start random, drawn from torch's global generator as in any module; `from_huggingface` loads pretrained ones.
    State-dict keys are those of transformers' `BertModel`, without the pooler.
    """

    class Config(ldmkit.config.Config):
        """Architecture as in transformers' `BertConfig`, and how prompts are cut and padded.

        Attributes:
            vocab: WordPiece vocabulary, one piece a line.
            vocab_size: rows of the embedding table; None = the lines of `vocab`.
            hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps,
                type_vocab_size: as there.
            max_length: most tokens of a prompt, [CLS] and [SEP] included.
            max_position_embeddings: rows of the position table; None = `max_length`.
            dropout: of hidden states and attention, in training mode.
            lowercase: also strips accents, as uncased BERT does.
            padding: to `max_length` always (one shape for every batch), or to the longest prompt of the batch.
            attend_padding: the padding takes part, here and in cross-attention, as in the LDM paper; else it is masked.
            pooled: also give the mean of the prompt's tokens as `vector_BC`, which a U-Net with a `vector_dim` adds to its time
                embedding: the prompt then reaches every layer from the first step of training on.
        """

        vocab: AssetPath
        vocab_size: int | None = Field(None, ge=1)
        hidden_size: int = Field(512, ge=1)
        num_hidden_layers: int = Field(8, ge=1)
        num_attention_heads: int = Field(8, ge=1)
        intermediate_size: int = Field(2048, ge=1)
        hidden_act: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
        layer_norm_eps: float = Field(1e-12, gt=0)
        type_vocab_size: int = Field(2, ge=1)
        max_position_embeddings: int | None = Field(None, ge=1)
        max_length: int = Field(77, ge=3)
        dropout: float = Field(0.0, ge=0, lt=1)
        lowercase: bool = True
        padding: Literal["max_length", "longest"] = "max_length"
        attend_padding: bool = False
        pooled: bool = False

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
                )
            if self.max_position_embeddings is not None and self.max_length > self.max_position_embeddings:
                raise ValueError(f"max_length {self.max_length} exceeds max_position_embeddings {self.max_position_embeddings}")
            if self.attend_padding and self.padding == "longest":
                raise ValueError(
                    "attend_padding with padding = 'longest' would make a picture depend on its batch; use 'max_length'"
                )
            return self

    config: BertConditioner.Config
    null_input = ""

    def __init__(self, config: BertConditioner.Config) -> None:
        super().__init__()
        self.config = config
        masked = set() if config.attend_padding else {"mask_BL"}
        self.provides = frozenset({"tokens_BLC", *masked, *({"vector_BC"} if config.pooled else ())})
        self.prompt_encoder, pieces = bert_prompts(
            config.vocab,
            vocab_size=config.vocab_size,
            lowercase=config.lowercase,
            max_length=config.max_length,
            to_longest=config.padding == "longest",
        )
        bert = BertModel(_bert_config(config, pieces, self.prompt_encoder.pad_id), add_pooling_layer=False)
        # Its parts are registered, it is not: parameters then have BertModel's own names, and it sees them move and load.
        self._bert = (bert,)
        self.embeddings, self.encoder = bert.embeddings, bert.encoder

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise InputTypeError or InputError unless the inputs are a list of strings."""
        check_prompts(inputs)

    def forward(self, inputs: Sequence[str]) -> Condition:
        """Prompts => tokens (B, L, hidden_size), their mask (B, L) unless padding is attended to, their mean if `pooled`.

        Raises:
            InputTypeError, InputError: as `check`.

        Warns:
            PromptTruncatedWarning: for a prompt of more than `max_length` tokens, quoting what is cut off.
        """
        self.check(inputs)
        ids_BL, mask_BL = self.prompt_encoder(inputs)
        if self.config.attend_padding:
            mask_BL = torch.ones_like(mask_BL)
        device = self.embeddings.word_embeddings.weight.device
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
        tokens_BLC = self._bert[0](input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        vector_BC = None
        if self.config.pooled:
            weights_BL1 = mask_BL[..., None].to(tokens_BLC.dtype)
            vector_BC = (tokens_BLC * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)
        masked = None if self.config.attend_padding else mask_BL
        return Condition(tokens_BLC=tokens_BLC, mask_BL=masked, vector_BC=vector_BC)

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary cannot spell, in order; the model sees [UNK] in their place."""
        self.check([prompt])
        encoding = self.prompt_encoder.tokenizer.encode(prompt)
        windows = [encoding, *encoding.overflowing]
        unknown = [offsets for w in windows for offsets, piece in zip(w.offsets, w.tokens, strict=True) if piece == UNK]
        return [prompt[start:end] for start, end in unknown]

    @classmethod
    def from_huggingface(cls, folder: str | Path, **changes: Any) -> Self:
        """Pretrained weights from a local folder with `config.json`, `model.safetensors` and `vocab.txt`, in evaluation mode.

        Dropout is off unless given. See `ldmkit_text.huggingface` for the keys that are left out and why.

        Args:
            changes: fields of the config to set otherwise, such as `max_length`.

        Raises:
            CheckpointError: for a missing or damaged file. ConfigError: for a model that is no BERT encoder.
            ArchitectureMismatchError: listing every key that does not fit.
        """
        from ldmkit_text.huggingface import bert_config_values, load_bert

        conditioner = cls.build(**{**bert_config_values(Path(folder)), **changes})
        load_bert(conditioner, Path(folder))
        return conditioner.eval()


def _bert_config(config: BertConditioner.Config, pieces: int, pad_token_id: int) -> BertConfig:
    return BertConfig(
        vocab_size=config.vocab_size or pieces,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=config.max_position_embeddings or config.max_length,
        type_vocab_size=config.type_vocab_size,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=pad_token_id,
    )
