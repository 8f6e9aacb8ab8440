"""CLIP's byte-pair vocabularies, read from any of the files that people have them in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmkit.checkpoints.files import read_json
from ldmkit.errors import CheckpointError
from ldmkit_text.packed import read_packed

BOS, EOS = "<|startoftext|>", "<|endoftext|>"

Pieces = dict[str, int]
Pair = tuple[str, str]


def read_byte_pairs(vocab: str, merges: str | None, *, pad_token: str) -> tuple[Pieces, list[Pair]]:
    """The vocabulary, piece => id, and the merges, best first.

    Args:
        vocab, merges: `vocab.json` and `merges.txt`; or, without `merges`, one file that holds both: `tokenizer.json`, or
            `bpe_simple_vocab_16e6.txt.gz` as open_clip ships it.
        pad_token: must be a piece, as <|startoftext|> and <|endoftext|> must.

    Raises:
        CheckpointError: for a file that is missing, damaged or something else, naming it and what is wrong.
    """
    path = Path(vocab)
    if merges is not None:
        return _checked(read_json(path), vocab, pad_token), _merges(_lines(merges), merges)
    if vocab.endswith(".gz"):
        pieces, pairs = read_packed(path)
        return _checked(pieces, vocab, pad_token), pairs
    pieces, lines = _parts_of_tokenizer(read_json(path), vocab)
    return _checked(pieces, vocab, pad_token), _merges(lines, vocab)


def _checked(pieces: Any, path: str, pad_token: str) -> Pieces:
    if not isinstance(pieces, dict) or sorted(pieces.values(), key=str) != sorted(range(len(pieces)), key=str):
        raise CheckpointError(f"vocabulary {path} must map pieces to the numbers from 0 on, each once")
    lacking = [token for token in (BOS, EOS, pad_token) if token not in pieces]
    if lacking:
        raise CheckpointError(f"vocabulary {path} lacks {', '.join(lacking)}")
    return pieces


def _parts_of_tokenizer(content: Any, path: str) -> tuple[Pieces, list[str]]:
    """Vocabulary and merges out of a tokenizer.json."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise CheckpointError(f"{path} is no tokenizer.json of a byte-pair tokenizer; give vocab.json and merges.txt")
    lines = [" ".join(pair) if _is_pair(pair) else str(pair) for pair in model["merges"]]
    return model["vocab"], lines


def _is_pair(value: Any) -> bool:
    """As newer files have merges, where older ones have one text with a space in it."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(piece, str) for piece in value)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CheckpointError(f"merges {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"merges {path} is not UTF-8 text: {error}") from None


def _merges(lines: Sequence[str], path: str) -> list[Pair]:
    merges: list[Pair] = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        first, space, second = line.partition(" ")
        if not (first and space and second) or " " in second:
            raise CheckpointError(f"merges {path}: line {number} is not two pieces with a space between: {line!r}")
        merges.append((first, second))
    return merges
