"""LoRA files, read before their keys are understood, with what PEFT says beside them of scales."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.files import read_object
from ldmkit.checkpoints.lora_names import RAW_PEFT
from ldmkit.checkpoints.pickles import is_pickle, read_pickle
from ldmkit.errors import CheckpointError, InputTypeError

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT call the file in a folder."""
SETTINGS = "adapter_config.json"
"""PEFT's, beside its file."""


@dataclass(frozen=True)
class LoraFile:
    """A file before its keys are understood.

    Attributes:
        source: for messages.
        settings: of PEFT, by component ("" = all).
    """

    source: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_lora(file: str | Path | Mapping[str, Tensor], *, allow_pickle: bool = False) -> LoraFile:
    """A safetensors file, a folder that holds one, tensors by name, or (where that is allowed) a pickle of these.

    Raises:
        CheckpointError: for a file that is missing, damaged or something else. InputTypeError: for another argument.
    """
    if isinstance(file, Mapping):
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in file.items()):
            raise InputTypeError("LoRA weights given as a mapping must map names to tensors")
        return LoraFile("the given tensors", file)
    if not isinstance(file, str | Path):
        raise InputTypeError(f"LoRA weights must be a file, a folder or a mapping, got {type(file).__name__}")
    path = _in_folder(Path(file)) if Path(file).is_dir() else Path(file)
    if is_pickle(path):
        if not allow_pickle:
            raise CheckpointError(f"{path} is a pickle; allow_pickle=True reads it by torch's unpickler for tensors alone")
        return LoraFile(str(path), read_pickle(path), settings=_settings(path, {}))
    content = SafetensorsFile(path)
    return LoraFile(str(path), content.tensors(), content.metadata, _settings(path, content.metadata))


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in FILES if (folder / name).is_file()] or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder} must hold one LoRA file (*.safetensors), and holds {names}; name the file")
    return found[0]


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """How PEFT was told to scale: diffusers keeps it in the metadata, PEFT in a file of its own."""
    if "lora_adapter_metadata" in metadata:
        try:
            flat = json.loads(metadata["lora_adapter_metadata"])
            settings: dict[str, dict[str, Any]] = {}
            for key, value in flat.items():
                component, _, name = key.partition(".")
                settings.setdefault(component, {})[name] = value
            return dict(settings)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: its lora_adapter_metadata is no JSON object: {error}") from None
    beside = path.parent / SETTINGS
    if path.name != FILES[1] or not beside.is_file():
        return {}
    return {"": read_object(beside)}


def settings_of(file: LoraFile, name: str) -> Mapping[str, Any] | None:
    """PEFT's, for the component that a layer belongs to."""
    return file.settings.get(name.partition(".")[0], file.settings.get(""))


def scale_of(file: LoraFile, name: str, key: str, alpha: float | None, rank: int) -> float:
    """alpha / rank (LoRA, sec. 4.1), or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732); 1 where none is told.

    Args:
        name: the layer's. key: of its down matrix, in the file. alpha: what the file holds for it.

    Raises:
        CheckpointError: for settings that say no scale, or none that can be told.
    """
    if alpha is not None:
        return alpha / rank
    settings, path = settings_of(file, name), name.partition(".")[2]
    if settings is None:
        if key.startswith(RAW_PEFT):
            raise CheckpointError(
                f"{file.source} has PEFT's own names, whose scale is told by {SETTINGS}; put it beside {FILES[1]}, "
                "or give .alpha with the tensors"
            )
        return 1.0
    own = _own_alpha(file, settings.get("alpha_pattern") or {}, path)
    told = settings.get("lora_alpha", rank) if own is None else own
    if not isinstance(told, int | float) or not math.isfinite(told):
        raise CheckpointError(f"{file.source}: lora_alpha = {told!r} must be a finite number")
    return told / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _own_alpha(file: LoraFile, patterns: Any, path: str) -> Any:
    """What `alpha_pattern` says of a layer: its keys are ends of paths, or after ^ whole ones, with or without escaped dots."""
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{file.source}: alpha_pattern = {patterns!r} must map names of layers to numbers")
    for pattern, value in patterns.items():
        end = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", end):
            raise CheckpointError(f"{file.source}: alpha_pattern has the key {pattern!r}; only names of layers are read")
        whole = str(pattern).startswith("^")
        if any(name == end or (not whole and name.endswith(f".{end}")) for name in (path, f"text_model.{path}")):
            return value
    return None
