"""One part on disk: `part.json` (kind, name, provider, config), its weights, and the files its config names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.files import atomic_folder, read_json, write_json
from ldmkit.checkpoints.filling import DType, check_dtype, fill
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.checkpoints.weights import WEIGHT_FILES, read_weights, write_weights
from ldmkit.errors import CheckpointError, ConfigError, OutputError
from ldmkit.interfaces import Part
from ldmkit.plugin.provenance import Saved, name_to_load
from ldmkit.plugin.registry import registry

__all__ = ["DType", "describe_part", "load_part", "restore_part", "save_part", "write_part"]


def describe_part(part: Part) -> dict[str, Any]:
    """A part as plain data: kind, registered name, who provides it, config. Raises: PluginError if unregistered."""
    plugin, component = registry().offer_of(type(part))
    return {
        "kind": component.kind,
        "name": component.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "config": part.config.to_dict(),
    }


def save_part(part: Part, folder: str | Path, *, max_shard_size: int | None = None) -> Path:
    """Write a part so that `load_part` gives it back bit for bit.

    Raises:
        PluginError: when no plugin registers the part's class.
        OutputError: when the folder cannot be written, or a file the config names cannot be read.
    """
    folder = Path(folder)
    with atomic_folder(folder, stale=WEIGHT_FILES) as temporary:
        write_part(part, temporary, max_shard_size=max_shard_size)
    return folder


def write_part(part: Part, folder: Path, *, max_shard_size: int | None = None) -> None:
    """`save_part` into a folder that is itself about to appear atomically."""
    description = describe_part(part)
    for field in type(part.config).asset_fields():
        source = getattr(part.config, field)
        if source is None:
            continue
        description["config"][field] = Path(source).name
        try:
            shutil.copyfile(source, folder / Path(source).name)
        except OSError as error:
            raise OutputError(f"{type(part).__name__}.{field}: cannot copy {source}: {error.strerror}") from error
    if isinstance(part, nn.Module):
        write_weights(folder, part.state_dict(), max_shard_size=max_shard_size)
    write_json(folder / "part.json", description)


def load_part(
    folder: str | Path, *, kind: str | None = None, dtype: DType = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Read a part written by `save_part`.

    Args:
        kind: what it must be, for a clear error where the folder holds something else.
        dtype: floating-point type of the weights; "auto" keeps the stored one.

    Raises:
        CheckpointError: for a missing or damaged file. ArchitectureMismatchError: for weights that do not fit the config.
        ConfigError, UnknownPartError: for a config or a part that the installed plugins do not know; a part whose distribution
            is not installed says what to install.
    """
    check_dtype(dtype)
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    return restore_part(read_json(folder / "part.json"), folder, kind=kind, dtype=dtype, device=device)


def restore_part(
    description: dict[str, Any], folder: Path, *, kind: str | None = None, dtype: DType, device: torch.device | str = "cpu"
) -> Any:
    """Build the described part and fill it with the folder's weights."""
    try:
        found, name, values = description["kind"], description["name"], dict(description["config"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{folder / 'part.json'} must hold kind, name and config") from None
    if kind is not None and found != kind:
        raise CheckpointError(f"{folder} holds a part of kind {found!r}, not {kind!r}")
    saved = Saved.read(found, description, str(folder / "part.json"))
    part_class = registry().load(found, name_to_load(registry(), saved))
    for field in part_class.Config.asset_fields():
        asset = values.get(field)
        if asset is not None:
            if not isinstance(asset, str) or asset in ("", "..") or Path(asset).name != asset:
                raise ConfigError(f"{folder / 'part.json'}: {field} = {asset!r} must be the bare name of a file in that folder")
            values[field] = str(folder / asset)
    config = part_class.Config.parse(values, owner=f"{found} {name!r} in {folder}")
    if not issubclass(part_class, nn.Module):
        return part_class(config)
    tensors = read_weights(folder)
    part = skeleton(part_class, config, held=tensors.values(), source=str(folder))
    accounting = Accounting.of(part.state_dict(), tensors, source=str(folder), model=part_class.__name__)
    return fill(part, tensors, accounting, dtype=dtype, device=device)
