"""Valid files with something changed: bytes, a value of a safetensors header, or a value anywhere in JSON."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SPOILT = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 2**40), max_size=3),
    st.just({}),
    st.sampled_from([2**31, 2**40, 10**30, -1, 0, 1.5, "../x.safetensors", "/x", "a\0b", [[]], {"a": [1]}]),
)
"""What a value may be replaced by."""


def header_of(whole: bytes) -> dict[str, Any]:
    """A safetensors file's."""
    return dict(json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]]))


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file; the header may be bytes that are no JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def bytes_mutants(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes changed, cut, put in, or there twice."""
    kind, at = draw(st.sampled_from(["flip", "cut", "insert", "double"])), draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at] + whole[draw(st.integers(at, len(whole))) :]
    if kind == "insert":
        return whole[:at] + draw(st.binary(min_size=1, max_size=20)) + whole[at:]
    if kind == "double":
        return whole[:at] + whole[draw(st.integers(0, at)) :]
    changed = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        changed[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


@st.composite
def safetensors_mutants(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes changed, or (more often) one value of the header replaced."""
    if draw(st.integers(0, 6)) < 4:
        return draw(bytes_mutants(whole))
    header, data = header_of(whole), whole[8 + struct.unpack("<Q", whole[:8])[0] :]
    key = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    if field is None:
        header[draw(st.sampled_from([key, "__metadata__", "new"]))] = draw(SPOILT)
    else:
        header[key][field] = draw(SPOILT)
    return with_header(header, data)


@st.composite
def json_mutants(draw: st.DrawFn, content: Any, values: st.SearchStrategy[Any] = SPOILT) -> bytes:
    """One value, at any depth, replaced, taken away or joined by another; or bytes changed."""
    if draw(st.integers(0, 6)) == 0:
        return draw(bytes_mutants(json.dumps(content).encode()))
    changed = copy.deepcopy(content)
    place, key = draw(st.sampled_from(list(_places(changed)))) if isinstance(changed, dict | list) and changed else (None, 0)
    how = draw(st.sampled_from(["replace", "replace", "delete", "add", "whole"]))
    if place is None or how == "whole":
        return json.dumps(draw(values)).encode()
    if how == "delete":
        del place[key]
    elif how == "replace":
        place[key] = draw(values)
    elif isinstance(place, dict):
        place[draw(st.text(max_size=8))] = draw(values)
    else:
        place.insert(key, draw(values))
    return json.dumps(changed).encode()


Change = tuple[str, str, Any]


@st.composite
def changes(draw: st.DrawFn, keys: Sequence[str], telling: str) -> list[Change]:
    """One to three changes of tensors by key, for `changed`. Those whose key matches `telling` are changed more often."""
    told = [key for key in keys if re.search(telling, key)]
    return [_change(draw, draw(st.sampled_from(told) | st.sampled_from(keys))) for _ in range(draw(st.integers(1, 3)))]


def _change(draw: st.DrawFn, key: str) -> Change:
    how = draw(st.sampled_from(["called", "renumbered", "shaped", "shaped", "cast"]))
    if how == "called":
        return key, how, draw(st.sampled_from([None, "x", f"{key}.weight", key.rpartition(".")[0], key.partition(".")[2]]))
    if how == "renumbered":
        start, end = draw(st.sampled_from([match.span() for match in re.finditer(r"\d+|$", key)]))
        return key, "called", key[:start] + draw(st.sampled_from(["0", "1", "2", "7", "9" * 10, "9" * 5000])) + key[end:]
    if how == "shaped":
        return key, how, draw(st.sampled_from(sorted(SHAPED)))
    return key, how, draw(st.sampled_from([torch.int64, torch.bool, torch.float16, torch.complex64, torch.float64]))


SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "one row": lambda x: x.reshape(-1),
    "a rank more": lambda x: x[None],
    "axes reversed": lambda x: x.movedim(tuple(range(x.ndim)), tuple(reversed(range(x.ndim)))),
    "one number": lambda x: x.reshape(-1)[0] if x.numel() else x.sum(),
    "nothing": lambda x: x[:0] if x.ndim else x,
    "the first": lambda x: x[:1] if x.ndim else x,
    "thrice": lambda x: torch.cat([x, x, x]) if x.ndim else x,
}


def changed(tensors: Mapping[str, Tensor], by: Sequence[Change]) -> dict[str, Tensor]:
    """The tensors after the changes; one whose key is gone already is left."""
    result = dict(tensors)
    for key, how, what in by:
        if key not in result:
            continue
        if how == "called":
            tensor = result.pop(key)
            result |= {} if what is None else {what: tensor}
        else:
            tensor = result[key].real if result[key].is_complex() else result[key]
            result[key] = tensor.to(what) if how == "cast" else SHAPED[what](tensor)
    return {key: tensor.contiguous().clone() for key, tensor in result.items()}


def _places(content: Any) -> Any:
    """Each value inside, as its container and key."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list):
            yield from _places(value)


class Spoilt:
    """While the block runs, a file has other content."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.before = path, content, path.read_bytes()

    def __enter__(self) -> None:
        self.path.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.before)
