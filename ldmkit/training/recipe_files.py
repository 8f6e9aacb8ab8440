"""Recipes in YAML: read, changed from the command line, and compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ldmkit.errors import ConfigError
from ldmkit.training.recipes import Recipe

R = TypeVar("R", bound=Recipe)


class _Loader(yaml.SafeLoader):
    """YAML 1.2, as people read it: 1e-4 is a number, `no` is a word, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_recipe(kind: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read a recipe.

    Args:
        kind: `AutoencoderRecipe` or `DiffusionRecipe`.
        overrides: "key.subkey=value" in YAML, each taking the place of what the file says.

    Raises:
        ConfigError: for a missing file, bad YAML, an unknown key (with close names) or an impossible value.
    """
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe {path} is not valid YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"the recipe {path} must be a mapping of keys to values, not {type(values).__name__}")
    values = dict(values)
    for override in overrides:
        _override(values, override)
    return kind.parse(values, owner=str(path))


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not (equals and key):
        raise ConfigError(f"--set {override!r}: must be of the form key=value or key.subkey=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        child = values.get(parent)
        values[parent] = {} if child is None else dict(child) if isinstance(child, Mapping) else child
        if not isinstance(values[parent], dict):
            raise ConfigError(f"--set {override!r}: {parent!r} is {child!r}, which has no keys of its own")
        values = values[parent]
    values[last] = value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys (dotted) at which two recipes differ, with both values."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found
