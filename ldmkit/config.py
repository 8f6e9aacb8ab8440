"""Strict, frozen, round-tripping configs.

A config is JSON: every value is validated as JSON is (no "4" for 4, no 1 for True), unknown keys are errors with close names
suggested, and `config -> JSON -> config` is the identity.
"""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ldmkit.errors import ConfigError


class Asset:
    """Marks a config field that names a file. See `AssetPath`."""


AssetPath = Annotated[str, Asset]
"""A path to a file that belongs to the part (a vocabulary, say). `save_pretrained` copies the file beside the weights and
stores its bare name; `from_pretrained` resolves the bare name against the folder."""


class Config(BaseModel):
    """Base of every part's nested `Config`.

    >>> class Tiny(Config):
    ...     channels: int = 4
    >>> Tiny.parse({"channels": 8}).channels
    8
    >>> Tiny.parse({"chanels": 8})
    Traceback (most recent call last):
        ...
    ldmkit.errors.ConfigError: Tiny: unknown key 'chanels' (= 8); did you mean 'channels'?
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, owner: str | None = None) -> Self:
        """Validate plain values as strictly as JSON.

        Raises:
            ConfigError: naming each offending key, its value, and what is allowed there.
        """
        owner = owner or cls.__qualname__.removesuffix(".Config")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{owner}: expected a mapping of settings, got {values!r}")
        try:
            text = json.dumps(dict(values), default=_plain)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{owner}: the config holds a value that is not JSON: {error}") from None
        return cls.parse_json(text, owner=owner)

    @classmethod
    def parse_json(cls, text: str | bytes, *, owner: str | None = None) -> Self:
        """Validate JSON text. Raises: ConfigError, as `parse` does."""
        owner = owner or cls.__qualname__.removesuffix(".Config")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            lines = [_explain(cls, dict(item)) for item in error.errors(include_url=False)]
            raise ConfigError(f"{owner}: " + "; ".join(lines)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (tuples become lists)."""
        values: dict[str, Any] = self.model_dump(mode="json")
        return values

    def to_json(self) -> str:
        """Indented JSON text that `parse_json` turns back into an equal config."""
        return self.model_dump_json(indent=2) + "\n"

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed. Raises: ConfigError."""
        return type(self).parse({**self.to_dict(), **changes})

    @classmethod
    def asset_fields(cls) -> tuple[str, ...]:
        """Names of the fields declared as `AssetPath` (or `AssetPath | None`)."""
        return tuple(name for name, field in cls.model_fields.items() if _is_asset(field.annotation, field.metadata))


def _is_asset(annotation: Any, metadata: list[Any]) -> bool:
    if Asset in metadata:
        return True
    return any(Asset in getattr(arg, "__metadata__", ()) for arg in getattr(annotation, "__args__", ()))


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _explain(cls: type[Config], item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    given = item.get("input")
    if item["type"] == "extra_forbidden":
        names = _field_names(cls, item["loc"][:-1])
        close = get_close_matches(str(item["loc"][-1]), names, n=3, cutoff=0.6)
        hint = "did you mean " + " or ".join(map(repr, close)) + "?" if close else "known keys: " + ", ".join(names)
        return f"unknown key {where!r} (= {given!r}); {hint}"
    if item["type"] == "missing":
        return f"key {where!r} is required"
    prefix = f"{where} = {given!r}: " if where else ""
    return f"{prefix}{item['msg'].removeprefix('Value error, ')}"


def _field_names(cls: type[Config], loc: tuple[Any, ...]) -> list[str]:
    """Known keys of the (nested) model that a location points into."""
    model: Any = cls
    for part in loc:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            continue
        model = next(_models_in(field.annotation), model)
    return sorted(getattr(model, "model_fields", {}))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models an annotation names, at any depth: `Sub`, `Sub | None`, `tuple[Sub, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
