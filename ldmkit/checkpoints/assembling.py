"""Components as diffusers knows them (a config and tensors each) => our parts, with every key accounted for."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.checkpoints.accounting import Accounting, grouped
from ldmkit.checkpoints.filling import DType, fill
from ldmkit.checkpoints.foreign import Reading
from ldmkit.checkpoints.keymap import IDENTITY, KeyMap
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.errors import CheckpointError, ConfigError, LdmkitError, PluginError, UnknownPartError
from ldmkit.plugin.registry import registry


class UnexpectedKeysWarning(UserWarning):
    """Keys of a file were left out because strict=False allowed it; the message names them."""


@dataclass(frozen=True)
class Source:
    """One component before it is a part.

    Attributes:
        class_name: of diffusers or transformers.
        config: as its config.json.
        tensors: by their names in the file; views of it.
        names: names in the file <-> in the diffusers layout (text encoders: without `text_model.`).
        ignored: patterns of keys in the file that are left out, and why.
        where: the file or folder, for messages.
    """

    class_name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    where: str
    names: KeyMap = IDENTITY
    ignored: Mapping[str, str] = field(default_factory=dict)


def part_class(kind: str, class_names: str) -> Any:
    """The class of the part that reads these classes ("CLIPTextModel", or several joined by "+").

    Raises:
        UnknownPartError: when no plugin reads them. PluginError: for a part that says it does and does not.
    """
    found = [component for component in registry().components(kind) if class_names in component.diffusers]
    if not found:
        known = sorted({name for component in registry().components(kind) for name in component.diffusers})
        raise UnknownPartError(
            f"no {kind} reads {class_names} of diffusers or transformers; those that are read: {', '.join(known) or 'none'}. "
            f"Pass {kind}=... to use another"
        )
    cls = registry().load(kind, found[0].name)  # two of one name are an error there
    if len({component.name for component in found}) > 1 or not hasattr(cls, "from_diffusers"):
        raise PluginError(
            f"{class_names} is said to be read by the {kind} parts {', '.join(component.name for component in found)}; "
            "exactly one may, and it must have from_diffusers (see ldmkit.checkpoints.foreign)"
        )
    return cls


def assemble(
    kind: str,
    sources: Mapping[str, Source],
    tokenizers: Mapping[str, Path],
    *,
    dtype: DType,
    device: torch.device | str,
    strict: bool = True,
) -> tuple[Any, Accounting]:
    """The part that is made of these components, filled, and where its keys came from.

    Raises:
        ConfigError, UnknownPartError, ArchitectureMismatchError, CheckpointError.
    """
    part, tensors, accounting = prepare(kind, sources, tokenizers)
    if accounting.unexpected and not strict:
        accounting = _forgiving(accounting)
    return fill(part, tensors, accounting, dtype=dtype, device=device), accounting


def prepare(
    kind: str, sources: Mapping[str, Source], tokenizers: Mapping[str, Path]
) -> tuple[Any, dict[str, Tensor], Accounting]:
    """The part without weights, the tensors meant for it under its names, and the accounting of both.

    Raises:
        ConfigError, UnknownPartError, CheckpointError.
    """
    cls = part_class(kind, "+".join(source.class_name for source in sources.values()))
    configs = {name: {"_class_name": source.class_name, **source.config} for name, source in sources.items()}
    where = " and ".join(dict.fromkeys(source.where for source in sources.values()))
    try:
        reading: Reading = cls.from_diffusers(configs, tokenizers)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, LdmkitError):
            raise
        raise ConfigError(f"{kind} in {where}: its config holds a value of a wrong type or length ({error})") from error
    held = [tensor for source in sources.values() for tensor in source.tensors.values()]
    part = skeleton(cls, cls.Config.parse(reading.config, owner=f"{kind} in {where}"), held=held, source=f"{kind} in {where}")
    tensors: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for name, source in sources.items():
        patterns = {**source.ignored, **reading.ignored}
        for key, tensor in source.tensors.items():
            reason = next((reason for pattern, reason in patterns.items() if re.match(pattern, key)), None)
            if reason is not None:
                ignored[key] = reason
                continue
            try:
                renamed = _renamed(key, tensor, source.names, reading.names.get(name, IDENTITY))
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {error}") from None
            for ours, made in renamed.items():
                if ours in tensors:
                    raise CheckpointError(f"{where}: {origins[ours]} and {key} are both {ours} of {cls.__name__}")
                tensors[ours], origins[ours] = made, key
    accounting = Accounting.of(part.state_dict(), tensors, source=where, model=cls.__name__, origins=origins, ignored=ignored)
    return part, tensors, accounting


def _renamed(key: str, tensor: Tensor, *maps: KeyMap) -> dict[str, Tensor]:
    """What a tensor of the file becomes; itself, under its old name, where a map does not know it."""
    found = {key: tensor}
    for keymap in maps:
        following: dict[str, Tensor] = {}
        for name, value in found.items():
            targets = keymap.targets(name)
            following |= {target: rule.take(value) for target, rule in targets} if targets else {name: value}
        found = following
    return found


def _forgiving(accounting: Accounting) -> Accounting:
    lines = "\n  ".join(grouped(accounting.unexpected))
    warnings.warn(
        f"{accounting.source}: {len(accounting.unexpected)} keys that {accounting.model} does not have are left out "
        f"(strict=False)\n  {lines}",
        UnexpectedKeysWarning,
        stacklevel=2,
    )
    extra = dict.fromkeys(accounting.unexpected, "not known to the model, and strict=False")
    return dataclasses.replace(accounting, unexpected={}, ignored={**accounting.ignored, **extra})
