"""Class labels as a conditioner: one learned token for cross-attention (LDM on ImageNet), or the labels themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

import ldmkit.config
from ldmkit.checkpoints.foreign import Configs, Reading
from ldmkit.errors import InputError, InputTypeError
from ldmkit.interfaces import Condition, Conditioner


class ClassLabelConditioner(Conditioner):
    """Labels, by number or by name => a token sequence of length 1, or int64 labels for a denoiser with a class table.

    Label `num_classes` is the null class: nothing asked.
    """

    class Config(ldmkit.config.Config):
        """The classes, and what becomes of them.

        Attributes:
            num_classes: how many, the null class not counted.
            mode: "tokens" (an embedding table of num_classes + 1 rows; Rombach et al. 2022, app. E) or "labels".
            hidden_size: width of a token; used in mode "tokens" only.
            names: one name per class, each once; empty = by number only.
        """

        num_classes: int = Field(1000, ge=1)
        mode: Literal["tokens", "labels"] = "tokens"
        hidden_size: int = Field(512, ge=1)
        names: tuple[str, ...] = ()

        @model_validator(mode="after")
        def _named(self) -> Self:
            if self.names and len(self.names) != self.num_classes:
                raise ValueError(f"names must be empty or one per class: {len(self.names)} names, {self.num_classes} classes")
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            if twice:
                raise ValueError(f"names must differ: {', '.join(map(repr, twice))} appear more than once")
            return self

    config: ClassLabelConditioner.Config
    _device_marker: torch.Tensor

    def __init__(self, config: ClassLabelConditioner.Config) -> None:
        super().__init__()
        self.config = config
        self.null_input = config.num_classes
        self.provides = frozenset({"tokens_BLC" if config.mode == "tokens" else "labels_B"})
        self._numbers = {name: number for number, name in enumerate(config.names)}
        # Even without a table there is something that knows the device the labels belong on.
        self.register_buffer("_device_marker", torch.empty(0), persistent=False)
        if config.mode == "tokens":
            self.embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """The table of the latent-diffusion originals; see `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        (values,) = configs.values()
        return Reading({"num_classes": values["num_classes"] - 1, "hidden_size": values["embed_dim"]})

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise InputTypeError or InputError for an input that is no class."""
        self._labels(inputs)

    def forward(self, inputs: Sequence[int | str]) -> Condition:
        """Labels => tokens (B, 1, hidden_size), or labels (B,) in mode "labels".

        Raises:
            InputTypeError: for a label that is neither an integer nor a string.
            InputError: for a number outside 0 to num_classes (the null class), or an unknown name.
        """
        labels_B = torch.tensor(self._labels(inputs), device=self._device_marker.device)
        if self.config.mode == "labels":
            return Condition(labels_B=labels_B)
        return Condition(tokens_BLC=self.embedding(labels_B)[:, None])

    def _labels(self, inputs: Sequence[Any]) -> list[int]:
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
            raise InputTypeError(f"class labels must be a list, got {inputs!r}; put a single label in a list")
        if not inputs:
            raise InputError("no class labels given")
        return [self._label(i, label) for i, label in enumerate(inputs)]

    def _label(self, i: int, label: Any) -> int:
        if isinstance(label, str):
            if label not in self._numbers:
                close = get_close_matches(label, self.config.names)
                numbers = f"there are {len(self._numbers) or 'no'} names, and numbers from 0 to {self.config.num_classes - 1}"
                hint = f"did you mean {' or '.join(map(repr, close))}?" if close else numbers
                raise InputError(f"class label {i} is {label!r}, which names no class; {hint}")
            return self._numbers[label]
        if not isinstance(label, int) or isinstance(label, bool):
            raise InputTypeError(f"class label {i} must be an integer or a name, got {label!r} of type {type(label).__name__}")
        if not 0 <= label <= self.config.num_classes:
            top = self.config.num_classes
            raise InputError(f"class label {i} is {label}, outside 0 to {top - 1} ({top} is the null class)")
        return label
