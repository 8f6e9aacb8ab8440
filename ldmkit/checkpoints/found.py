"""What recognition finds, and how it asks keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldmkit.checkpoints.keymap import KeyMap
from ldmkit.errors import ArchitectureMismatchError

Shapes = Mapping[str, tuple[int, ...]]
Told = Callable[[str], Mapping[str, Any]]
"""What is known of a component besides, by its name: values that go before what shapes say."""


@dataclass(frozen=True)
class Found:
    """One component of a file.

    Attributes:
        name: the folder it would have in the diffusers layout ("unet", "vae", "text_encoder").
        class_name: of diffusers or transformers.
        config: as its config.json would be.
        keymap: names in the file <-> in the diffusers layout (text encoders: without `text_model.`).
        ignored: further patterns of keys that are left out, and why.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    keymap: KeyMap
    ignored: dict[str, str] = field(default_factory=dict)


def below(shapes: Shapes, prefix: str) -> Shapes:
    """The keys below a path, without it."""
    return {key.removeprefix(f"{prefix}."): shape for key, shape in shapes.items() if key.startswith(f"{prefix}.")}


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that the pattern's group matches, 0 if none.

    Raises:
        ArchitectureMismatchError: for more than there are keys: each that is counted has one at least.
    """
    numbers = [(len(match[1]), match[1], key) for key in shapes if (match := re.match(pattern, key))]
    _, highest, key = max(numbers, default=(0, "-1", ""))
    if len(highest) > 9 or int(highest) >= len(shapes):
        raise ArchitectureMismatchError(f"{key[:200]} has a number above that of all keys, {len(shapes)}; the file is damaged")
    return int(highest) + 1


def shape_of(shapes: Shapes, key: str, what: str) -> tuple[int, ...]:
    """A key's shape. Raises: ArchitectureMismatchError where it is missing."""
    if key not in shapes:
        raise ArchitectureMismatchError(f"{what} lacks {key}, by which it would be recognised; the file is not complete")
    return shapes[key]
