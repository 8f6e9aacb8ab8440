"""Words added to a vocabulary (textual inversion: Gal et al. 2022, arXiv:2208.01618), each of one embedding vector or several.

A word of n vectors is n pieces, `word`, `word_1`, ..., `word_{n-1}`, as diffusers names them; in a prompt it stands for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmkit.checkpoints.files import read_json
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, InputError

Words = Sequence[tuple[str, int]]
"""Words and the number of their vectors, in the order of their ids."""


def pieces(words: Words) -> list[str]:
    """Their pieces, in the order of their ids."""
    return [word if i == 0 else f"{word}_{i}" for word, count in words for i in range(count)]


def expand(prompt: str, words: Words) -> str:
    """A prompt with all pieces of each word in it written out; the longest word at a place is meant, in any case."""
    all_of = {word.lower(): " ".join(pieces([(word, count)])) for word, count in words}
    if not all_of:
        return prompt
    every = sorted(pieces(words), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, every)), re.IGNORECASE)
    return pattern.sub(lambda found: all_of.get(found[0].lower(), found[0]), prompt)


def fitting(word: str, vectors: Mapping[str, Tensor], width: int) -> Tensor:
    """A word's vectors for an encoder of this width, (n, width). Raises: ArchitectureMismatchError where there are none."""
    found = [each for each in vectors.values() if each.shape[1] == width]
    if len(found) != 1:
        widths = ", ".join(f"{name} {each.shape[1]}".strip() for name, each in vectors.items())
        raise ArchitectureMismatchError(f"{word!r} has vectors of width {widths}; the text encoder's embeddings have {width}")
    return found[0]


def check_new(word: str, count: int, tokenizer: Any, words: Words) -> None:
    """Raise InputError for a word that cannot be told from others in a prompt, or that is there already."""
    if not word or word != "".join(word.split()):
        raise InputError(f"token = {word!r}: must be a word without spaces, such as '<cat>'")
    known = {piece.lower() for piece in pieces(words)}
    taken = [p for p in pieces([(word, count)]) if tokenizer.token_to_id(p) is not None or p.lower() in known]
    if taken:
        raise InputError(
            f"token {', '.join(map(repr, taken))} is in the vocabulary already; give another name: token='<{word}-2>'"
        )


def grow(table: nn.Embedding, first: int, vectors_NC: Tensor) -> None:
    """Write vectors into rows from `first` on, adding rows where there are none yet."""
    old_RC = table.weight.detach()
    rows = max(len(old_RC), first + len(vectors_NC))
    new_RC = torch.cat([old_RC, old_RC.new_zeros(rows - len(old_RC), old_RC.shape[1])])
    new_RC[first : first + len(vectors_NC)] = vectors_NC.to(new_RC)
    table.weight = nn.Parameter(new_RC, requires_grad=table.weight.requires_grad)
    table.num_embeddings = rows


def read_added(folder: Path) -> list[tuple[str, int]]:
    """The words that a tokenizer's folder adds to its vocabulary. Raises: CheckpointError for ids that leave holes."""
    ids = listed(folder)
    files = [path for path in (folder / "vocab.json", folder / "tokenizer.json") if path.exists()]
    if not ids or not files:
        return []
    content = read_json(files[0])
    vocab = content if files[0].name == "vocab.json" else content.get("model", {}).get("vocab", {})
    added = sorted((number, piece) for piece, number in ids.items() if piece not in vocab)
    if [number for number, _ in added] != list(range(len(vocab), len(vocab) + len(added))):
        raise CheckpointError(f"{folder}: added tokens {added[:4]} do not follow the {len(vocab)} of the vocabulary")
    words: list[tuple[str, int]] = []
    for _, piece in added:
        if words and piece == f"{words[-1][0]}_{words[-1][1]}":
            words[-1] = (words[-1][0], words[-1][1] + 1)
        else:
            words.append((piece, 1))
    return words


def listed(folder: Path) -> dict[str, int]:
    """Piece => id, by the three files that may say so."""
    try:
        found: dict[str, int] = {}
        if (folder / "tokenizer.json").exists():
            found |= {each["content"]: int(each["id"]) for each in read_json(folder / "tokenizer.json").get("added_tokens", [])}
        if (folder / "added_tokens.json").exists():
            found |= {str(piece): int(number) for piece, number in read_json(folder / "added_tokens.json").items()}
        if (folder / "tokenizer_config.json").exists():
            decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
            found |= {str(each["content"]): int(number) for number, each in decoder.items()}
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: its added tokens are damaged: {type(error).__name__}: {error}") from None


def added_decoder(words: Words, first: int) -> dict[str, dict[str, Any]]:
    """`added_tokens_decoder` of a tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": False}
    return {str(first + i): {"content": piece, **flags} for i, piece in enumerate(pieces(words))}
