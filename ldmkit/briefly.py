"""What an interactive session shows: tensors by type and shape, long sequences by their ends, configs by what is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor


def briefly(value: Any) -> str:
    """A short repr.

    >>> briefly([1, 2, 3, 4])
    '[1, ..., 4: 4]'
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"{value.mode} {value.width}x{value.height}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {briefly(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) > 3:
            return f"[{briefly(value[0])}, ..., {briefly(value[-1])}: {len(value)}]"
        return f"[{', '.join(map(briefly, value))}]"
    if callable(value):
        return f"<{getattr(value, '__name__', type(value).__name__)}>"
    return repr(value)


def fields_briefly(self: Any) -> str:
    """The `__repr__` of a dataclass that holds tensors; what is None or empty is left out."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    empty = {name for name, value in values.items() if value is None or (isinstance(value, tuple | Mapping) and not value)}
    said = (f"{name}={briefly(value)}" for name, value in values.items() if name not in empty)
    return f"{type(self).__name__}({', '.join(said)})"


def config_briefly(self: Any) -> str:
    """The `__repr__` of what is made from a config: what differs from its defaults."""
    changed = self.config.model_dump(exclude_defaults=True)
    return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
