"""safetensors files, whole or in shards, read and written with every key accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.files import read_json, write_bytes, write_json
from ldmkit.errors import CheckpointError

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


def read_weights(folder: Path, *, stem: str = STEM, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of a folder: one file or shards with an index. They are views of the files, mapped into memory.

    Args:
        variant: "fp16" means `{stem}.fp16.safetensors`, or the shards of `{stem}.safetensors.index.fp16.json`.

    Raises:
        CheckpointError: where a file is missing, truncated or corrupt, naming the file and, where one can be, the key.
    """
    indices = [f"{stem}.safetensors.index.{variant}.json", f"{stem}.{variant}.safetensors.index.json"]
    for index in (folder / name for name in (indices if variant else [f"{stem}.safetensors.index.json"])):
        if index.exists():
            return _read_shards(index)
    file = folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors")
    if not file.exists() and (others := _variants(folder, stem)):
        raise CheckpointError(f"weights file {file} is missing; there is variant = {' or '.join(map(repr, others))}")
    return read_file(file)


def _variants(folder: Path, stem: str) -> list[str]:
    """Of which there are weights, in one file or in shards."""
    names = [path.name.removeprefix(stem) for path in folder.glob(f"{stem}[.-]*safetensors*")]
    words = {re.sub(r"-\d+-of-\d+|\.(safetensors|index|json)\b", "", name).strip(".") for name in names}
    return sorted(words - {""})


def _read_shards(index: Path) -> dict[str, Tensor]:
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{index} must hold a weight_map of keys to names of files; it is damaged or is something else")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name or "\\" in name or name in ("", ".", "..") or not name.isprintable():
            raise CheckpointError(f"{index}: shard name {name!r} points outside the folder, or is no name of a file")
        shard = read_file(index.parent / name)
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise CheckpointError(f"{index}: {', '.join(twice)} are in {name} and in another shard too")
        tensors |= shard
    missing = sorted(where.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{index} promises keys that no shard holds: {', '.join(missing)}")
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, mapped into memory. Raises: CheckpointError, as `read_weights`."""
    return SafetensorsFile(path).tensors()


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into a module; nothing may be missing, left over or of another shape.

    Raises:
        ArchitectureMismatchError: listing every such key.
    """
    Accounting.of(module.state_dict(), tensors, source=source, model=type(module).__name__).check()
    with torch.no_grad():
        module.load_state_dict(dict(tensors))
