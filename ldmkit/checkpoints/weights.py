"""safetensors files, whole or in shards, read and written with every key accounted for."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ldmkit.checkpoints.files import read_json, write_bytes, write_json
from ldmkit.errors import ArchitectureMismatchError, CheckpointError

STEM = "model"
"""Weights are `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`."""
WEIGHT_FILES = (f"{STEM}.safetensors.index.json", f"{STEM}.safetensors", f"{STEM}-*.safetensors")
"""Patterns of these names, what is read first in front."""


def write_weights(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_size: int | None = None, stem: str = STEM) -> None:
    """Write tensors into a folder, in shards of at most `max_shard_size` bytes where given (a larger tensor gets its own).

    Raises:
        OutputError: where the folder cannot be written.
    """
    tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
    shards = _shards(tensors, max_shard_size)
    if len(shards) == 1:
        write_bytes(folder / f"{stem}.safetensors", save(shards[0], metadata={"format": "pt"}))
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_bytes(folder / name, save(shard, metadata={"format": "pt"}))
        where |= dict.fromkeys(shard, name)
    total = sum(t.nbytes for t in tensors.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


def read_weights(folder: Path, *, stem: str = STEM) -> dict[str, Tensor]:
    """All tensors of a folder written by `write_weights`.

    Raises:
        CheckpointError: where a file is missing, truncated or corrupt, naming the file and, where one can be, the key.
    """
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_file(folder / f"{stem}.safetensors")
    where: dict[str, str] = read_json(index)["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: shard name {name!r} points outside the folder")
        tensors |= read_file(folder / name)
    missing = sorted(set(where) - set(tensors))
    if missing:
        raise CheckpointError(f"{index} promises keys that no shard holds: {', '.join(missing)}")
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises: CheckpointError, as `read_weights`."""
    if not path.is_file():
        raise CheckpointError(f"weights file {path} is missing")
    _check_whole(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights file {path} cannot be read: {error}") from error


def _check_whole(path: Path) -> None:
    """Compare the header's promises with the file's size, so that a truncated file is reported by its first lost key."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if len(prefix) < 8 or 8 + length > size:
            raise CheckpointError(f"weights file {path} is truncated within its header ({size} bytes); fetch it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = {key: 8 + length + entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"weights file {path} is not a safetensors file, or its header is corrupt ({error})"
            ) from None
    lost = sorted((end, key) for key, end in ends.items() if end > size)
    if lost:
        raise CheckpointError(
            f"weights file {path} is truncated: it has {size} bytes of {lost[-1][0]}, and {len(lost)} of {len(ends)} tensors "
            f"are cut off, the first being {lost[0][1]!r}; fetch it again"
        )


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into a module; nothing may be missing, left over or of another shape.

    Raises:
        ArchitectureMismatchError: listing every such key.
    """
    own = module.state_dict()
    problems = [f"missing     {key} {tuple(own[key].shape)}" for key in sorted(set(own) - set(tensors))]
    problems += [f"unexpected  {key} {tuple(tensors[key].shape)}" for key in sorted(set(tensors) - set(own))]
    for key in sorted(set(own) & set(tensors)):
        if own[key].shape != tensors[key].shape:
            problems.append(f"shape       {key}: file {tuple(tensors[key].shape)}, model {tuple(own[key].shape)}")
    if problems:
        lines = "\n  ".join(problems)
        raise ArchitectureMismatchError(
            f"{source} does not fit {type(module).__name__}: {len(problems)} of {len(set(own) | set(tensors))} keys differ; "
            f"the weights belong to another architecture or config\n  {lines}"
        )
    with torch.no_grad():
        module.load_state_dict(dict(tensors))
