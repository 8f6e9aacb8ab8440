"""Prompts => token ids: what the text conditioners share. The tokenizers themselves are Hugging Face's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from tokenizers import Encoding
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit_text.added_tokens import Words, expand, pieces

SHOWN = 200
"""A message quotes at most this many characters of a prompt."""


class PromptTruncatedWarning(UserWarning):
    """A prompt was longer than the text encoder's window; the message quotes what the model does not see."""


class Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer` and of the ready-made `tokenizers.implementations`."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding: ...
    def token_to_id(self, token: str) -> int | None: ...
    def enable_truncation(self, max_length: int) -> None: ...
    def add_tokens(self, tokens: list[str]) -> int: ...


def check_prompts(prompts: Sequence[Any]) -> None:
    """Raise unless `prompts` is a sequence of at least one well-formed string.

    Raises:
        InputTypeError: for a bare string instead of a sequence of them, or an item that is no string.
        InputError: for no prompt at all, or a string with half a surrogate pair, which no encoding can hold.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise InputTypeError(f"prompts must be a list of strings, got {_quote(prompts)}; put a single prompt in a list")
    if not prompts:
        raise InputError('no prompts given; for an unconditional image give [""]')
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InputTypeError(f"prompt {i} must be a string, got {_quote(prompt)} of type {type(prompt).__name__}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt {i} is not valid Unicode: {prompt[error.start]!r} at character {error.start}") from None


class PromptEncoder:
    """Cuts, pads and batches what a tokenizer makes of each prompt.

    Args:
        tokenizer: adds its own start and end tokens.
        max_length: most tokens of a prompt, start and end included.
        pad_token, pad_id: what shorter prompts are filled with.
        to_longest: pad to the longest prompt of the batch instead of to `max_length`.

    Attributes:
        words: added to the vocabulary, and written out in prompts; see `ldmkit_text.added_tokens`.
    """

    words: Words = ()

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, pad_token: str, pad_id: int, to_longest: bool = False) -> None:
        tokenizer.enable_truncation(max_length)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token, self.pad_id = pad_token, pad_id
        self.to_longest = to_longest

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts => (ids_BL int64, mask_BL bool, True = a token of the prompt), on the CPU.

        Warns:
            PromptTruncatedWarning: for a prompt that does not fit, quoting the part that is cut off.
        """
        # One by one: encode_batch starts threads, after which forked data loaders complain.
        prompts = [expand(prompt, self.words) for prompt in prompts]
        encodings = [self.tokenizer.encode(prompt) for prompt in prompts]
        for prompt, encoding in zip(prompts, encodings, strict=True):
            self._warn_if_cut(prompt, encoding)
        length = max(len(encoding) for encoding in encodings) if self.to_longest else self.max_length
        for encoding in encodings:
            encoding.pad(length, pad_id=self.pad_id, pad_token=self.pad_token)
        ids_BL = torch.tensor([encoding.ids for encoding in encodings])
        mask_BL = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)
        return ids_BL, mask_BL

    def add(self, words: Words) -> None:
        """Give new words the next free ids."""
        self.tokenizer.add_tokens(pieces(words))
        self.words = (*self.words, *words)

    def ids(self, text: str) -> list[int]:
        """All token ids of a text of any length, without start and end."""
        encoding = self.tokenizer.encode(expand(text, self.words), add_special_tokens=False)
        return [token for window in (encoding, *encoding.overflowing) for token in window.ids]

    def _warn_if_cut(self, prompt: str, encoding: Encoding) -> None:
        if not encoding.overflowing:
            return
        rest = encoding.overflowing[0]
        start = next(begin for (begin, _), special in zip(rest.offsets, rest.special_tokens_mask, strict=True) if not special)
        warnings.warn(
            f"the text encoder takes {self.max_length} tokens (start and end included); this part of the prompt is cut off: "
            f"{_quote(prompt[start:])}",
            PromptTruncatedWarning,
            stacklevel=6,  # the line that calls the conditioner
        )


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
