"""CLIP's vocabulary as OpenAI and open_clip ship it: one compressed list of merges, from which pieces and ids follow."""

from __future__ import annotations

import gzip
from pathlib import Path

from ldmkit.errors import CheckpointError

PACKED = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2
"""So many of the lines are used, as in OpenAI's `simple_tokenizer.py`; 512 single bytes and two special tokens join them."""
LONGEST = 10_000_000
"""Bytes, unpacked; the published file has a third of it."""


def read_packed(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary, piece => id, and the merges, best first.

    Raises:
        CheckpointError: for a file that is missing, damaged, too long or something else.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(LONGEST + 1)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"vocabulary {path} cannot be read: {error}") from None
    if len(content) > LONGEST:
        raise CheckpointError(f"vocabulary {path} has more than {LONGEST} bytes when unpacked; it is something else")
    letters = _letters()
    try:
        lines = content.decode().split("\n")[1 : MERGES + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines if line)]
    except ValueError as error:
        raise CheckpointError(f"vocabulary {path} is no list of merges: {error}") from None
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges)]
    return {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}, merges


def _letters() -> list[str]:
    """One printable character for each byte, the printable bytes first (Radford et al. 2019, GPT-2's code)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in (*printable, *range(256, 256 + others))]
