"""How a part tells what it is called in the diffusers layout: what a plugin implements so that its part loads and saves there.

A part that serves classes of diffusers or transformers names them in its `Component(diffusers=...)`, and has two methods:

    @classmethod
    def from_diffusers(cls, configs, tokenizers) -> Reading
    def to_diffusers(self) -> Mapping[str, Written]

`configs` are the `config.json`s of the components that make up the part, by folder ("unet", "text_encoder"), `tokenizers` the
folders of their tokenizers ("tokenizer").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ldmkit.checkpoints.keymap import IDENTITY, KeyMap

Configs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Reading:
    """How a part is made from components.

    Attributes:
        config: values for the part's Config.
        names: component => names in its file <-> names in the part; those that are not given are the same.
        ignored: patterns of keys (in the files) that are left out, and why.
    """

    config: Mapping[str, Any]
    names: Mapping[str, KeyMap] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """How a component is written.

    Attributes:
        library, class_name: for `model_index.json`.
        config: the content of its `config.json`; None = there is none (a tokenizer).
        names: names in its file <-> names in the part.
        files: further files, name => where their content lies or the content itself.
    """

    library: str
    class_name: str
    config: Mapping[str, Any] | None = None
    names: KeyMap = IDENTITY
    files: Mapping[str, Path | bytes] = field(default_factory=dict)


class DiffusersPart(Protocol):
    """What `Component(diffusers=...)` promises."""

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """Raises: ConfigError for a config that the part cannot serve."""

    def to_diffusers(self) -> Mapping[str, Written]:
        """Components by folder. Raises: ConfigError for a config that diffusers cannot express."""
