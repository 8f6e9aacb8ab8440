"""safetensors files, read without trust: every promise of the header is checked before a tensor is looked at.

The format (huggingface/safetensors, "Format"): 8 bytes of length, a JSON header of that length, then the tensors' bytes,
without holes or overlaps. Tensors are views of the file mapped into memory: what is not used is not read, nothing is copied.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


@dataclass(frozen=True)
class Entry:
    """One tensor's line in the header: its bytes are those from `start` to `end`, counted from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been read and found to be true.

    Attributes:
        entries: what it holds, by key.
        metadata: the strings stored beside the tensors.

    Raises:
        CheckpointError: for a file that is missing, truncated, damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            with path.open("rb") as file:
                header, self._begin = _header(file, path, self._size)
        except FileNotFoundError:
            raise CheckpointError(f"weights file {path} is missing") from None
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"weights file {path} cannot be read: {error.strerror or error}") from None
        self.metadata = _metadata(header.pop("__metadata__", {}), path)
        self.entries = {key: _entry(key, value, path) for key, value in header.items()}
        self._check_places()
        self._bytes: Tensor | None = None

    def tensor(self, key: str) -> Tensor:
        """One tensor: a view of the mapped file (a copy where the file does not align it).

        What is written to it is seen by this process only. Its storage is its own bytes alone: torch.save writes no more.
        """
        entry = self.entries[key]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if self._bytes is None:
            self._bytes = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        begin = self._begin + entry.start
        part = torch.asarray(self._bytes.untyped_storage()[begin : self._begin + entry.end], dtype=torch.uint8)
        if begin % entry.dtype.itemsize:
            part = part.clone()
        return part.view(entry.dtype).view(entry.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All of them, as `tensor` gives them."""
        return {key: self.tensor(key) for key in self.entries}

    def _check_places(self) -> None:
        """Tensors lie one behind the other, from the header's end to the file's."""
        available = self._size - self._begin
        lost = sorted((entry.end, key) for key, entry in self.entries.items() if entry.end > available)
        if lost:
            raise CheckpointError(
                f"weights file {self.path} is truncated: it has {self._size} bytes of {self._begin + lost[-1][0]}, and "
                f"{len(lost)} of {len(self.entries)} tensors are cut off, the first being {lost[0][1]!r}; fetch it again"
            )
        reached = 0
        for start, end, key in sorted((entry.start, entry.end, key) for key, entry in self.entries.items()):
            if start != reached:
                what = "overlaps the tensor before it" if start < reached else "leaves a hole before it"
                raise CheckpointError(
                    f"weights file {self.path}: its header is corrupt: {key!r} (bytes {start} to {end}) {what}"
                )
            reached = end
        if reached != available:
            raise CheckpointError(
                f"weights file {self.path}: its header is corrupt: {available - reached} bytes at the end belong to no tensor"
            )


def _header(file: Any, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where it ends."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if 8 + length > size and prefix[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise CheckpointError(f"weights file {path} is a pickle, not a safetensors file; see allow_pickle of from_single_file")
    if len(prefix) < 8 or 8 + length > size:
        raise CheckpointError(f"weights file {path} is truncated within its header ({size} bytes); fetch it again")
    if length > LONGEST_HEADER:
        raise CheckpointError(f"weights file {path}: its header would have {length} bytes; the format allows {LONGEST_HEADER}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_twins)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"weights file {path} is not a safetensors file, or its header is corrupt ({error})") from None
    return header, 8 + length


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is there twice")
        result[key] = value
    return result


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"weights file {path}: its header is corrupt: __metadata__ must map strings to strings")
    return value


def _entry(key: str, value: Any, path: Path) -> Entry:
    try:
        name, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end))
        dtype = DTYPES.get(name)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"weights file {path}: its header is corrupt: {key!r} needs dtype, shape and two data_offsets"
        ) from None
    if not isinstance(shape, list) or not whole or start > end:
        raise CheckpointError(
            f"weights file {path}: its header is corrupt: {key!r} has shape {_short(shape)} and bytes {start!r} to {end!r}"
        )
    if dtype is None:
        raise CheckpointError(f"weights file {path}: {key!r} has dtype {_short(name)}; known are {', '.join(DTYPES)}")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise CheckpointError(
            f"weights file {path}: its header is corrupt: {key!r} of shape {_short(shape)} and dtype {name} would need "
            f"{math.prod(shape) * dtype.itemsize} bytes and has {end - start}"
        )
    return Entry(dtype, tuple(shape), start, end)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
