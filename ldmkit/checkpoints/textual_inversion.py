"""Files of textual inversion (Gal et al. 2022, arXiv:2208.01618): words, and the embedding vectors each stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.pickles import is_pickle, unpickle
from ldmkit.errors import CheckpointError, InputError, InputTypeError

Vectors = Mapping[str, Tensor]
"""Encoder ("clip_l", "clip_g", or "" where the file names none) => vectors (n, C)."""

ENCODERS = ("clip_l", "clip_g")
WHOLE = "emb_params"
BUNDLE = "bundle_emb."
"""What kohya's trainer puts before the embeddings inside a LoRA file: bundle_emb.WORD.string_to_param.*"""


def read_textual_inversion(
    file: str | Path | Mapping[str, Any], token: str | None = None, *, allow_pickle: bool = False
) -> dict[str, Vectors]:
    """Words and their vectors.

    The formats: diffusers' `learned_embeds` (word => vector), the web UI's `string_to_param` and `emb_params`, SDXL's `clip_l`
    and `clip_g`, and embeddings inside LoRA files.

    Args:
        token: the word; not given, it is the file's own, or the file's name where the file has none.

    Raises:
        CheckpointError: for a file that is missing, damaged, a pickle that was not asked for, or something else.
        InputError: where a word must be given, or one is given for several. InputTypeError: for another argument.
    """
    content, source, stem, metadata = _content(file, allow_pickle)
    if token is not None and not isinstance(token, str):
        raise InputTypeError(f"token must be a string, got {token!r}")
    words = _words(content, metadata, source, token or stem)
    if token is not None:
        if len(words) != 1:
            raise InputError(f"{source} holds the words {', '.join(map(repr, words))}; token = {token!r} can name only one")
        words = {token: next(iter(words.values()))}
    return {
        str(word): {name: _vectors(source, name or str(word), x) for name, x in each.items()} for word, each in words.items()
    }


def _content(file: Any, allow_pickle: bool) -> tuple[Mapping[str, Any], str, str | None, Mapping[str, str]]:
    if isinstance(file, Mapping):
        return file, "the given embedding", None, {}
    if not isinstance(file, str | Path):
        raise InputTypeError(f"an embedding must be a file or a mapping, got {type(file).__name__}")
    path = Path(file)
    if not is_pickle(path):
        stored = SafetensorsFile(path)
        return stored.tensors(), str(path), path.stem, stored.metadata
    if not allow_pickle:
        raise CheckpointError(f"{path} is a pickle; allow_pickle=True reads it by torch's unpickler for tensors alone")
    content = unpickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not embeddings by name")
    return content, str(path), path.stem, {}


def _words(
    content: Mapping[str, Any], metadata: Mapping[str, str], source: str, stem: str | None
) -> Mapping[str, Mapping[str, Any]]:
    """Words (`stem` where the file names none) => encoder => what is there of it."""
    bundled: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        if str(key).startswith(BUNDLE):
            word, _, name = str(key).removeprefix(BUNDLE).partition(".")
            bundled.setdefault(word, {})[name if name in ENCODERS else ""] = value
    if bundled:
        return bundled
    if marked := [key for key in content if metadata.get(key) == "<embed>"]:
        return {key: {"": content[key]} for key in marked}
    if "string_to_param" in content:
        inner = content["string_to_param"]
        if not isinstance(inner, Mapping) or len(inner) != 1:
            raise CheckpointError(f"{source}: string_to_param must hold one embedding; it is damaged")
        return {_named(content.get("name") or stem, source): {"": next(iter(inner.values()))}}
    if content and set(content) <= {*ENCODERS}:
        return {_named(stem, source): dict(content)}
    if set(content) == {WHOLE}:
        return {_named(stem, source): {"": content[WHOLE]}}
    paths = len(content) > 1 and any("." in str(key) for key in content)  # those of a network's weights
    if not content or paths or not all(isinstance(value, Tensor) and value.ndim in (1, 2) for value in content.values()):
        shown = ", ".join(map(str, list(content)[:4])) or "nothing"
        raise CheckpointError(f"{source} holds no embeddings of textual inversion, but {shown}")
    return {key: {"": value} for key, value in content.items()}


def _named(word: Any, source: str) -> str:
    if not isinstance(word, str):
        raise InputError(f"{source} does not say what its word is; give token=...")
    return word


def _vectors(source: str, name: str, value: Any) -> Tensor:
    """(C,) or (n, C) => (n, C), finite, a copy of its own."""
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.is_floating_point() or not value.numel():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(f"{source}: {name} must be vectors of floating-point numbers, and is {shape}")
    if bad := int((~torch.isfinite(value)).sum()):
        raise CheckpointError(f"{source}: {name} holds {bad} NaN or infinite numbers of {value.numel()}")
    return value.detach().clone().reshape(-1, value.shape[-1])
