"""Hugging Face BERT folders => `BertConditioner`: local files, safetensors only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldmkit.checkpoints.files import read_json
from ldmkit.checkpoints.weights import load_weights, read_weights
from ldmkit.errors import CheckpointError, ConfigError

IGNORED = {
    "pooler.": "the pooled vector is for classification; conditioning uses the last hidden states",
    "cls.": "heads of the pre-training tasks, after the last hidden states",
    "embeddings.position_ids": "a constant, 0 to max_position_embeddings - 1, that old versions stored",
}
"""Keys (or beginnings of keys) of a pretrained file that are left out, and why."""

COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)
FIXED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
"""Settings of config.json that BertConditioner has only one way; absent ones have that value in transformers too."""


def bert_config_values(folder: Path) -> dict[str, Any]:
    """Values of `BertConditioner.Config` from a folder's config.json, tokenizer_config.json (where present) and vocab.txt.

    Raises:
        CheckpointError: where a file is missing or damaged. ConfigError: where the model is no BERT encoder.
    """
    path = folder / "config.json"
    given = read_json(path)
    if not isinstance(given, dict) or "model_type" not in given:
        raise CheckpointError(f"{path} is not the config of a Hugging Face model: it has no model_type")
    for key, value in FIXED.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{path}: {key} = {given[key]!r} is not supported by the bert conditioner, only {value!r} is")
    values: dict[str, Any] = {key: given[key] for key in COPIED if key in given}
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists():
        values["lowercase"] = read_json(tokenizer).get("do_lower_case", True)
    return {**values, "vocab": str(folder / "vocab.txt")}


def load_bert(conditioner: nn.Module, folder: Path) -> None:
    """Fill a conditioner with a folder's `model.safetensors` (or its shards).

    Raises:
        CheckpointError: where a file is missing or damaged. ArchitectureMismatchError: listing every key that does not fit.
    """
    load_weights(conditioner, _canonical(read_weights(folder)), source=str(folder))


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys as `BertModel` has them: no `bert.` prefix, old files' gamma and beta renamed, and none of `IGNORED`."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("bert.")
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            name = name.replace(f"LayerNorm.{old}", f"LayerNorm.{new}")
        if not name.startswith(tuple(IGNORED)):
            renamed[name] = tensor
    return renamed
