"""Hugging Face folders of BERT and CLIP => the values of our configs, and weights: local files, safetensors only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldmkit.checkpoints.files import read_json, read_object
from ldmkit.checkpoints.weights import load_weights, read_weights
from ldmkit.errors import CheckpointError, ConfigError
from ldmkit_text.added_tokens import listed, read_added
from ldmkit_text.packed import PACKED, read_packed
from ldmkit_text.wordpiece import read_vocab

BERT_IGNORED = {
    "pooler.": "the pooled vector is for classification; conditioning uses the last hidden states",
    "cls.": "heads of the pre-training tasks, after the last hidden states",
    "embeddings.position_ids": "a constant, 0 to max_position_embeddings - 1, that old versions stored",
}
CLIP_IGNORED = {
    "embeddings.position_ids": "a constant, 0 to max_position_embeddings - 1, that old versions stored",
}
"""Keys (or beginnings of keys) of a pretrained file that are left out, and why."""

WHOLE = "tokenizer.json"

BERT_COPIED = (
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
CLIP_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "eos_token_id",
    "layer_norm_eps",
)

BERT_FIXED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
CLIP_FIXED = {"model_type": "clip_text_model", "attention_dropout": 0.0}
"""Settings of config.json that our conditioners have only one way; absent ones have that value in transformers too."""


def bert_config_values(folder: Path) -> dict[str, Any]:
    """Values of `BertConditioner.Config` from a folder's config.json, tokenizer_config.json (where present) and vocab.txt.

    Raises:
        CheckpointError: where a file is missing or damaged. ConfigError: where the model is no BERT encoder.
    """
    return {**_config_values(folder, BERT_COPIED, BERT_FIXED), **bert_tokenizer_values(folder)}


def bert_tokenizer_values(folder: Path) -> dict[str, Any]:
    """`vocab` and `lowercase` from the folder of a BERT tokenizer: vocab.txt, or tokenizer.json where that is all there is.

    Raises:
        CheckpointError: where a file is damaged. ConfigError: for a way to split words that is not BERT's usual one.
    """
    path = folder / "vocab.txt"
    told: dict[str, Any] = {}
    if not path.exists() and (folder / WHOLE).exists():
        path = folder / WHOLE
        normalizer = read_object(path).get("normalizer")
        if isinstance(normalizer, dict):
            names = {"lowercase": "do_lower_case", "strip_accents": "strip_accents"}
            names |= {"handle_chinese_chars": "tokenize_chinese_chars"}
            told = {theirs: normalizer[name] for name, theirs in names.items() if name in normalizer}
    settings = {key: _tokenizer_setting(folder, key, told.get(key)) for key in ("strip_accents", "tokenize_chinese_chars")}
    lowercase = _tokenizer_setting(folder, "do_lower_case", told.get("do_lower_case", True))
    if settings["strip_accents"] not in (None, lowercase) or settings["tokenize_chinese_chars"] not in (None, True):
        raise ConfigError(
            f"{folder}: a tokenizer with {settings} cannot be served: accents go exactly where case goes "
            f"(do_lower_case = {lowercase!r}), and Chinese characters stand alone"
        )
    if added := sorted(listed(folder).keys() - read_vocab(path).keys()):
        raise ConfigError(f"{folder} adds {', '.join(map(repr, added[:5]))} to the vocabulary, which cannot be served for BERT")
    return {"vocab": str(path), "lowercase": lowercase}


def bert_tokenizer_files(vocab: Path, *, lowercase: bool, length: int) -> dict[str, Path | bytes]:
    """The files of a BERT tokenizer's folder, as transformers reads them."""
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, "model_max_length": length}
    names = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    return {
        (WHOLE if vocab.suffix == ".json" else "vocab.txt"): vocab,
        "tokenizer_config.json": json.dumps(settings | names, indent=2).encode(),
        "special_tokens_map.json": json.dumps(names, indent=2).encode(),
    }


def clip_config_values(folder: Path, tokenizer: Path) -> dict[str, Any]:
    """Values of `CLIPTextConditioner.Config` from config.json and the tokenizer's folder.

    Raises:
        CheckpointError: where a file is missing or damaged. ConfigError: where the model is no CLIP text encoder.
    """
    given = read_json(folder / "config.json")
    projected = isinstance(given, dict) and "CLIPTextModelWithProjection" in given.get("architectures", ())
    return clip_values(given, tokenizer, projected=projected, source=str(folder / "config.json"))


def clip_values(given: Any, tokenizer: Path, *, projected: bool, source: str) -> dict[str, Any]:
    """Values of `CLIPTextConditioner.Config` from the content of a config.json, `source`, and the tokenizer's folder.

    Args:
        projected: whether the model has a text_projection.

    A "pad_token" in the config, which only configs of recognised single files have, goes before the tokenizer's own.
    """
    values = _values(given, CLIP_COPIED, CLIP_FIXED, source)
    if projected:
        values["projection_dim"] = given.get("projection_dim", 512)
    alone = next((file for name in (WHOLE, PACKED) if (file := tokenizer / name).exists()), None)
    if alone is not None and not (tokenizer / "vocab.json").exists():
        values |= {"vocab": str(alone)}
    else:
        values |= {"vocab": str(tokenizer / "vocab.json"), "merges": str(tokenizer / "merges.txt")}
    values["added_tokens"] = read_added(tokenizer)
    return {**values, "pad_token": given.get("pad_token", _pad_token(tokenizer))}


def clip_tokenizer_files(vocab: Path, merges: Path | None, *, pad_token: str, length: int) -> dict[str, Path | bytes]:
    """The files of a CLIP tokenizer's folder, as transformers reads them."""
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
        "model_max_length": length,
    }
    special = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if merges is not None:
        files: dict[str, Path | bytes] = {"vocab.json": vocab, "merges.txt": merges}
    elif vocab.name.endswith(".gz"):
        pieces, pairs = read_packed(vocab)
        files = {"vocab.json": json.dumps(pieces, ensure_ascii=False).encode()}
        files["merges.txt"] = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs), ""]).encode()
    else:
        files = {WHOLE: vocab}
    return {
        **files,
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        "special_tokens_map.json": json.dumps(special, indent=2).encode(),
    }


def tokenizer_of(name: str, tokenizers: Mapping[str, Path]) -> Path:
    """The folder of a text encoder's tokenizer, of those in a diffusers folder. Raises: CheckpointError where there is none."""
    if "tokenizer" not in tokenizers:
        raise CheckpointError(f"{name} has no tokenizer beside it, and prompts cannot be read without; pass conditioner=...")
    return tokenizers["tokenizer"]


def load_bert(conditioner: nn.Module, folder: Path) -> None:
    """Fill a BERT conditioner with a folder's `model.safetensors` (or its shards).

    Raises:
        CheckpointError: where a file is missing or damaged. ArchitectureMismatchError: listing every key that does not fit.
    """
    renamed = {}
    for key, tensor in read_weights(folder).items():
        name = key.removeprefix("bert.")
        for old, new in (("gamma", "weight"), ("beta", "bias")):  # as the oldest files have them
            name = name.replace(f"LayerNorm.{old}", f"LayerNorm.{new}")
        renamed[name] = tensor
    load_weights(conditioner, _without(renamed, BERT_IGNORED), source=str(folder))


def load_clip(conditioner: nn.Module, folder: Path) -> None:
    """Fill a CLIP text conditioner with a folder's `model.safetensors` (or its shards), keys with or without `text_model.`

    Raises:
        CheckpointError: where a file is missing or damaged. ArchitectureMismatchError: listing every key that does not fit.
    """
    renamed = {key.removeprefix("text_model."): tensor for key, tensor in read_weights(folder).items()}
    load_weights(conditioner, _without(renamed, CLIP_IGNORED), source=str(folder))


def _without(tensors: Mapping[str, Tensor], ignored: Mapping[str, str]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(tuple(ignored))}


def _config_values(folder: Path, copied: tuple[str, ...], fixed: Mapping[str, Any]) -> dict[str, Any]:
    return _values(read_json(folder / "config.json"), copied, fixed, str(folder / "config.json"))


def _values(given: Any, copied: tuple[str, ...], fixed: Mapping[str, Any], path: str) -> dict[str, Any]:
    if not isinstance(given, dict) or "model_type" not in given:
        raise CheckpointError(f"{path} is not the config of a Hugging Face model: it has no model_type")
    for key, value in fixed.items():
        if given.get(key, value) != value:
            raise ConfigError(f"{path}: {key} = {given[key]!r} is not supported here, only {value!r} is")
    return {key: given[key] for key in copied if key in given}


def _tokenizer_setting(folder: Path, key: str, default: Any) -> Any:
    path = folder / "tokenizer_config.json"
    return read_object(path).get(key, default) if path.exists() else default


def _pad_token(folder: Path) -> str:
    """special_tokens_map.json has the last word where it exists, as in transformers."""
    special = folder / "special_tokens_map.json"
    default = _tokenizer_setting(folder, "pad_token", "<|endoftext|>")
    token = read_object(special).get("pad_token", default) if special.exists() else default
    return str(token.get("content", default) if isinstance(token, dict) else token)
