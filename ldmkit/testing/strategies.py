"""Hypothesis strategies for plugin authors' tests."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from hypothesis import assume
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from ldmkit.config import Config
from ldmkit.errors import ConfigError

C = TypeVar("C", bound=Config)

_LARGEST = 2**16
"""Whole numbers without a bound of their own go no further from 0, unless told."""


def configs(config_cls: type[C], *, largest: int | None = None) -> st.SearchStrategy[C]:
    """Valid configs of a class: its defaults, with any of its fields changed as far as the class's own checks allow.

    Fields are changed one by one, and a change that does not fit the others is dropped. A field of a type unknown here keeps
    its default.

    Args:
        largest: how far numbers go from 0, or from the one bound that the class sets, and none but 0 within 1/1000 of
            it; None: whole numbers to 65536, others anywhere.

    >>> from hypothesis import find
    >>> from ldmkit.schedule import NoiseSchedule
    >>> find(configs(NoiseSchedule.Config), lambda config: config.steps_offset > 0).steps_offset
    1
    """
    return _configs(config_cls, {name: _field(field, largest) for name, field in config_cls.model_fields.items()})


@st.composite
def _configs(draw: st.DrawFn, config_cls: type[C], fields: dict[str, st.SearchStrategy[Any]]) -> C:
    required = {name: draw(fields[name]) for name, field in config_cls.model_fields.items() if field.is_required()}
    try:
        config = config_cls.parse(required)
    except ConfigError:
        assume(False)
        raise
    for name in draw(st.lists(st.sampled_from(sorted(fields)), unique=True)) if fields else []:
        value = draw(fields[name])
        try:
            config = config.replace(**{name: value})
        except ConfigError:
            continue
    return config


def _field(field: FieldInfo, largest: int | None) -> st.SearchStrategy[Any]:
    known = _values(field.annotation, field.metadata, largest)
    if known is None and field.is_required():
        raise TypeError(f"no strategy for a required field of type {field.annotation!r}")
    return st.just(field.get_default(call_default_factory=True, validated_data={})) if known is None else known


def _values(annotation: Any, metadata: Iterable[Any], largest: int | None) -> st.SearchStrategy[Any] | None:
    """Values of an annotation, or None where it is not understood."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(args[0], [*metadata, *args[1:]], largest)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        options = [option for arg in args if (option := _values(arg, metadata, largest)) is not None]
        return st.one_of(options) if options else None
    if origin in (tuple, list):
        return _sequence(args, origin, metadata, largest)
    if origin is dict:
        keys, items = _values(args[0], (), largest), _values(args[1], (), largest)
        return None if keys is None or items is None else st.dictionaries(keys, items, max_size=3)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return _whole_numbers(metadata, _LARGEST if largest is None else largest)
    if annotation is float:
        return _numbers(metadata, largest)
    if annotation is str:
        shortest, longest = _lengths(metadata)
        return st.text(st.characters(codec="utf-8"), min_size=shortest, max_size=longest)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return configs(annotation, largest=largest)
    return None


def _whole_numbers(metadata: Iterable[Any], largest: int) -> st.SearchStrategy[int]:
    low, high = _bounds(metadata)
    return st.integers(
        -largest if low is None else math.floor(low) + 1 if _open(metadata, Gt) else math.ceil(low),
        max(largest, 2 * math.ceil(low or 0))
        if high is None
        else math.ceil(high) - 1
        if _open(metadata, Lt)
        else math.floor(high),
    )


def _numbers(metadata: Iterable[Any], largest: int | None) -> st.SearchStrategy[float]:
    low, high = _bounds(metadata)
    if largest is not None:
        low = min(-largest, (high or 0) - largest) if low is None else low
        high = max(largest, low + largest) if high is None else high
    numbers = st.floats(
        low, high, allow_nan=False, allow_infinity=False, exclude_min=_open(metadata, Gt), exclude_max=_open(metadata, Lt)
    )
    return numbers if largest is None else numbers.filter(lambda number: number == 0 or abs(number) > 1e-3)


def _sequence(
    args: tuple[Any, ...], origin: type, metadata: Iterable[Any], largest: int | None
) -> st.SearchStrategy[Any] | None:
    if origin is tuple and Ellipsis not in args:
        items = [_values(arg, (), largest) for arg in args]
        return None if None in items else st.tuples(*(item for item in items if item is not None))
    item = _values(args[0], (), largest)
    shortest, longest = _lengths(metadata)
    return None if item is None else st.lists(item, min_size=shortest, max_size=longest).map(origin)


def _bounds(metadata: Iterable[Any]) -> tuple[float | None, float | None]:
    low: Any = [m.ge if isinstance(m, Ge) else m.gt for m in metadata if isinstance(m, Ge | Gt)]
    high: Any = [m.le if isinstance(m, Le) else m.lt for m in metadata if isinstance(m, Le | Lt)]
    return (max(low) if low else None), (min(high) if high else None)


def _open(metadata: Iterable[Any], kind: type) -> bool:
    return any(isinstance(m, kind) for m in metadata)


def _lengths(metadata: Iterable[Any]) -> tuple[int, int]:
    shortest = max([m.min_length for m in metadata if isinstance(m, MinLen)], default=0)
    longest = min([m.max_length for m in metadata if isinstance(m, MaxLen)], default=shortest + 4)
    return shortest, longest
