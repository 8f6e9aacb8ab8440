"""Valid files with something changed: bytes, a value of a safetensors header, or a value anywhere in JSON."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

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
