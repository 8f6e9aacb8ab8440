"""Text as the bytes of its UTF-8 (Xue et al. 2022, "ByT5", arXiv:2105.13626): no vocabulary, so no word is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

import ldmkit
from ldmkit import Condition, Conditioner, InputError, InputTypeError

START = 256
"""The token in front of every text, so that even the empty one has something to attend to."""


class ByteConditioner(Conditioner):
    """A learned vector for each byte and each place. Shorter texts are padded to the longest, and masked."""

    class Config(ldmkit.Config):
        """Attributes:
        hidden_size: width of a token.
        max_bytes: the longest text; a longer one is an error.
        """

        hidden_size: int = Field(64, ge=1)
        max_bytes: int = Field(64, ge=1)

    config: ByteConditioner.Config
    provides = frozenset({"tokens_BLC", "mask_BL"})
    null_input = ""

    def __init__(self, config: ByteConditioner.Config) -> None:
        super().__init__()
        self.config = config
        self.bytes = nn.Embedding(START + 1, config.hidden_size)
        self.places = nn.Embedding(config.max_bytes + 1, config.hidden_size)

    def check(self, inputs: Sequence[Any]) -> None:
        """Raises: InputTypeError for what is no text, InputError for a text that is too long."""
        if isinstance(inputs, str) or not all(isinstance(text, str) for text in inputs):
            raise InputTypeError(f"texts must be a list of strings, got {inputs!r}")
        if not inputs:
            raise InputError("no texts given")
        for text in inputs:
            if (length := len(text.encode())) > self.config.max_bytes:
                raise InputError(
                    f"a text of {length} bytes is longer than max_bytes = {self.config.max_bytes}: {text[:40]!r}..."
                )

    def forward(self, inputs: Sequence[str]) -> Condition:
        """Texts => tokens (B, L, hidden_size) and their mask (B, L), L = 1 + bytes of the longest. Raises: as `check`."""
        self.check(inputs)
        rows = [[START, *text.encode()] for text in inputs]
        length = max(map(len, rows))
        device = self.bytes.weight.device
        ids_BL = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
        mask_BL = torch.arange(length, device=device) < torch.tensor([[len(row)] for row in rows], device=device)
        tokens_BLC = self.bytes(ids_BL) + self.places.weight[:length]
        return Condition(tokens_BLC=tokens_BLC * mask_BL[..., None], mask_BL=mask_BL)
