"""Layouts that plugins read: each is asked whether it knows a file or folder, and the surest reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldmkit.checkpoints.parts import DType
from ldmkit.errors import CheckpointError, PluginError
from ldmkit.plugin.registry import registry


def read_foreign(path: Path, *, dtype: DType, device: torch.device | str) -> dict[str, Any] | None:
    """The arguments of a pipeline, read by the plugin that knows the layout; None where none does.

    Raises:
        CheckpointError: when two are equally sure of it.
        PluginError: for a plugin that answers with what it must not.
    """
    sure = {name: share for name in registry().available("checkpoint-format") if (share := _detect(name, path)) is not None}
    if not sure:
        return None
    best = [name for name, share in sure.items() if share == max(sure.values())]
    if len(best) > 1:
        raise CheckpointError(
            f"{path}: the checkpoint formats {' and '.join(map(repr, best))} are equally sure ({sure[best[0]]:g}) that it is "
            "theirs; block one with LDMKIT_DISABLE_PLUGINS"
        )
    arguments = registry().load("checkpoint-format", best[0]).load(path, dtype=dtype, device=device)
    if not isinstance(arguments, Mapping):
        raise PluginError(f"the checkpoint format {best[0]!r} must load a mapping of Pipeline's arguments, not {arguments!r}")
    return dict(arguments)


def _detect(name: str, path: Path) -> float | None:
    share = registry().load("checkpoint-format", name).detect(path)
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise PluginError(f"the checkpoint format {name!r} answered {share!r} for {path}; it must be from 0 to 1, or None")
    return float(share)
