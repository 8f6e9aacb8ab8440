"""A whole pipeline on disk: `pipeline.json` and a folder for each part that has weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ldmkit.checkpoints.files import atomic_folder, read_json, write_json
from ldmkit.checkpoints.parts import DType, describe_part, load_part, write_part
from ldmkit.errors import CheckpointError, InputTypeError, UnknownPartError
from ldmkit.plugin.registry import registry

if TYPE_CHECKING:
    from ldmkit.pipeline import Pipeline

P = TypeVar("P", bound="Pipeline")

FORMAT = 1
INDEX = "pipeline.json"
MODULES = ("autoencoder", "denoiser", "conditioner")


def save_pipeline(pipe: Pipeline, folder: Path, *, max_shard_size: int | None = None) -> Path:
    """Write a pipeline; see `Pipeline.save_pretrained`."""
    from ldmkit import __version__

    sampler = describe_part(pipe.sampler)
    with atomic_folder(folder) as temporary:
        for kind, part in pipe.modules.items():
            (temporary / kind).mkdir()
            write_part(part, temporary / kind, max_shard_size=max_shard_size)  # type: ignore[arg-type]
        index = {
            "format": FORMAT,
            "ldmkit_version": __version__,
            "parts": {kind: kind if kind in pipe.modules else None for kind in MODULES},
            "sampler": {"name": sampler["name"], **sampler["config"]},
            "schedule": pipe.schedule.config.to_dict(),
            "prediction": pipe.prediction.config.to_dict(),
            "defaults": pipe.defaults.to_dict(),
        }
        write_json(temporary / INDEX, index)
    return folder


def resolve(name_or_folder: str | Path) -> Path:
    """The folder of a saved pipeline: a path, or the name of one that a plugin registers.

    Raises:
        UnknownPartError: when it is neither.
    """
    path = Path(name_or_folder)
    if path.is_dir():
        return path
    if isinstance(name_or_folder, Path) or path.parent != Path():
        raise CheckpointError(f"{path} is not a folder")
    try:
        return Path(registry().load("pipeline", name_or_folder)())
    except UnknownPartError as error:
        raise UnknownPartError(f"{name_or_folder!r} is not a folder, and {error}") from None


def load_pipeline(
    cls: type[P], name_or_folder: str | Path, *, dtype: DType, device: torch.device | str, parts: Mapping[str, Any]
) -> P:
    """Read a pipeline; see `Pipeline.from_pretrained`."""
    if not isinstance(name_or_folder, str | Path):
        raise InputTypeError(f"from_pretrained takes a folder or a name, got {type(name_or_folder).__name__}")
    folder = resolve(name_or_folder)
    index = read_json(folder / INDEX)
    try:
        if index["format"] > FORMAT:
            raise CheckpointError(
                f"{folder / INDEX} has format {index['format']}; this ldmkit reads up to {FORMAT}: upgrade it"
            )
        arguments: dict[str, Any] = {key: index[key] for key in ("sampler", "schedule", "prediction", "defaults")}
        present = {kind: index["parts"][kind] for kind in MODULES}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} lacks or mangles {error}; it is not a pipeline that save_pretrained wrote"
        ) from None
    arguments |= parts
    for kind, where in present.items():
        if kind not in parts:
            arguments[kind] = None if where is None else load_part(folder / kind, kind=kind, dtype=dtype, device=device)
    return cls(**arguments)
