"""Prompts => token ids by BERT's vocabulary: what both BERT conditioners share."""

from __future__ import annotations

from tokenizers.implementations import BertWordPieceTokenizer

from ldmkit.errors import ConfigError
from ldmkit_text.prompts import PromptEncoder
from ldmkit_text.wordpiece import PAD, read_vocab


def bert_prompts(
    vocab: str, *, vocab_size: int | None, lowercase: bool, max_length: int, to_longest: bool = False
) -> tuple[PromptEncoder, int]:
    """The encoder of prompts by the vocabulary in a file, and how many pieces there are.

    Args:
        vocab: as `read_vocab` takes it.
        vocab_size: rows of the embedding table; None = one for each piece.
        lowercase: also strips accents, as uncased BERT does.
        max_length, to_longest: as in `PromptEncoder`.

    Raises:
        CheckpointError: as `read_vocab`. ConfigError: for a table of fewer rows than there are pieces.
    """
    pieces = read_vocab(vocab)
    if vocab_size is not None and vocab_size < len(pieces):
        raise ConfigError(f"vocab_size {vocab_size} is less than the {len(pieces)} pieces of {vocab}")
    tokenizer = BertWordPieceTokenizer(pieces, lowercase=lowercase)
    encoder = PromptEncoder(tokenizer, max_length=max_length, pad_token=PAD, pad_id=pieces[PAD], to_longest=to_longest)
    return encoder, len(pieces)
