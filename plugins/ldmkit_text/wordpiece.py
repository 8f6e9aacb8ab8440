"""WordPiece vocabularies: read one, train one. `python -m ldmkit_text.wordpiece CAPTIONS.txt --size N -o vocab.txt`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers.implementations import BertWordPieceTokenizer

from ldmkit.checkpoints.files import read_json, write_bytes
from ldmkit.errors import CheckpointError, DataError, InputError, LdmkitError

PAD, UNK, CLS, SEP = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""The tokens every vocabulary must have; training puts them first."""


def read_vocab(path: str | Path) -> dict[str, int]:
    """Read a BERT vocabulary, one piece a line or inside a tokenizer.json, as piece => id.

    Raises:
        CheckpointError: for a file that cannot be read, is empty, is not UTF-8, repeats a piece, has an empty line, or lacks a
            special token; it names the file and the line.
    """
    vocab = _of_tokenizer(Path(path)) if Path(path).suffix == ".json" else _of_lines(path)
    lacking = [token for token in SPECIAL if token not in vocab]
    if lacking:
        raise CheckpointError(f"vocabulary {path} lacks {', '.join(lacking)}; a BERT vocabulary holds {', '.join(SPECIAL)}")
    return vocab


def _of_tokenizer(path: Path) -> dict[str, int]:
    """The vocabulary inside a tokenizer.json."""
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocab = model.get("vocab") if isinstance(model, dict) and "merges" not in model else None
    if not isinstance(vocab, dict) or sorted(vocab.values(), key=str) != sorted(range(len(vocab)), key=str):
        raise CheckpointError(f"{path} is no tokenizer.json of a WordPiece tokenizer with pieces numbered from 0 on; BERT's is")
    return vocab


def _of_lines(path: str | Path) -> dict[str, int]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"vocabulary {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"vocabulary {path} is not UTF-8 text: {error}") from None
    pieces = text.removesuffix("\n").split("\n")  # not splitlines: pieces may hold other line separators
    if pieces == [""]:
        raise CheckpointError(f"vocabulary {path} is empty")
    vocab: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        if not piece:
            raise CheckpointError(f"vocabulary {path}: line {index + 1} is empty")
        if piece in vocab:
            raise CheckpointError(f"vocabulary {path}: {piece!r} stands on lines {vocab[piece] + 1} and {index + 1}")
        vocab[piece] = index
    return vocab


def train_wordpiece(texts: Iterable[str], size: int, *, lowercase: bool = True) -> list[str]:
    """Learn a vocabulary of at most `size` pieces, special tokens included and first. The same texts give the same pieces.

    Raises:
        InputError: where `size` cannot hold even the special tokens and the texts' single characters.
        DataError: where the texts hold no word.
    """
    if size < 1:
        raise InputError(f"size must be positive, got {size}")
    texts = list(texts)
    tokenizer = BertWordPieceTokenizer(lowercase=lowercase)
    # The trainer numbers inner characters in a hash table's order, and breaks ties by number: naming them first fixes both.
    first = [*SPECIAL, *_inner_characters(tokenizer, texts)]
    tokenizer.train_from_iterator(texts, vocab_size=size, min_frequency=1, special_tokens=first, show_progress=False)
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(pieces) == len(SPECIAL):
        raise DataError("no words to learn a vocabulary from: the texts are empty")
    if len(pieces) > size:
        raise InputError(f"size {size} is too small: special tokens and single characters alone are {len(pieces)} pieces")
    return [piece for piece, _ in pieces]


def _inner_characters(tokenizer: BertWordPieceTokenizer, texts: Iterable[str]) -> list[str]:
    """The pieces `##x` for every character x that stands in a word but not first, sorted."""
    normalize, split = tokenizer.normalizer.normalize_str, tokenizer.pre_tokenizer.pre_tokenize_str
    return sorted({"##" + character for text in texts for word, _ in split(normalize(text)) for character in word[1:]})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_text.wordpiece", description="Learn a WordPiece vocabulary.")
    parser.add_argument("captions", type=Path, help="UTF-8 text, one caption a line")
    parser.add_argument("--size", type=int, required=True, help="most pieces the vocabulary may have")
    parser.add_argument("--cased", action="store_true", help="keep upper case and accents apart")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the vocabulary to write, one piece a line")
    args = parser.parse_args(arguments)
    try:
        pieces = train_wordpiece(_lines(args.captions), args.size, lowercase=not args.cased)
        write_bytes(args.output, "".join(piece + "\n" for piece in pieces).encode())
    except LdmkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(pieces)} pieces in {args.output}")
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read captions from {path}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
