"""Training checkpoints: a folder per step with weights, averages, optimizers, random state and recipe.

Safetensors and JSON only. A folder appears under its name whole or not at all, so the latest name is the latest checkpoint,
whatever killed the writer.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmkit.checkpoints.files import atomic_folder, read_json, write_json
from ldmkit.checkpoints.weights import load_weights, read_weights, write_weights
from ldmkit.errors import ArchitectureMismatchError, CheckpointError

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds: live objects on writing, into which reading copies.

    Attributes:
        modules: trained networks by name.
        averages: the EMA's tensors by name.
        optimizers: by name.
    """

    modules: Mapping[str, nn.Module]
    averages: Mapping[str, Tensor]
    optimizers: Mapping[str, torch.optim.Optimizer]


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return root / f"step-{step:08d}"


def find(root: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def write(
    root: Path, step: int, state: TrainingState, rng: Mapping[str, Tensor], extra: Mapping[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint, then delete all but the latest `keep`.

    Args:
        rng: random states, uint8.
        extra: JSON values to keep beside.

    Raises:
        OutputError: for a full disk or an unwritable folder; earlier checkpoints are untouched.
    """
    folder = folder_of(root, step)
    if not folder.exists():
        with atomic_folder(folder) as temporary:
            write_weights(temporary, _flat_modules(state.modules))
            write_weights(temporary, state.averages, stem="ema")
            write_weights(temporary, _flat_optimizers(state.optimizers), stem="optimizer")
            write_weights(temporary, rng, stem="rng")
            write_json(temporary / "state.json", {"format": FORMAT, "step": step, **extra})
    for old in find(root)[:-keep]:
        remove(old)
    return folder


def remove(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that half of one is never taken for one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what a killed writer left behind."""
    for path in [*root.glob(".step-*.tmp"), *root.glob(".step-*.deleted")]:
        shutil.rmtree(path, ignore_errors=True)


def read_info(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises: CheckpointError."""
    info = read_json(folder / "state.json")
    if not isinstance(info, dict) or not isinstance(info.get("step"), int) or not isinstance(info.get("format"), int):
        raise CheckpointError(f"{folder / 'state.json'} is not a training checkpoint's")
    if info["format"] > FORMAT:
        raise CheckpointError(f"{folder} has format {info['format']}; this ldmkit reads up to {FORMAT}: upgrade it")
    return info


def read(folder: Path, state: TrainingState) -> dict[str, Tensor]:
    """Copy a checkpoint into live objects; returns the random states.

    Raises:
        CheckpointError: for damaged files. ArchitectureMismatchError: where the recipe builds other networks.
    """
    weights = read_weights(folder)
    strangers = sorted({key.partition(".")[0] for key in weights} ^ set(state.modules))
    if strangers:
        raise ArchitectureMismatchError(f"{folder} and the recipe differ in which networks there are: {', '.join(strangers)}")
    for name, module in state.modules.items():
        own = {key.removeprefix(f"{name}."): t for key, t in weights.items() if key.startswith(f"{name}.")}
        load_weights(module, own, source=f"{folder} ({name})")
    averages = read_weights(folder, stem="ema")
    if {k: t.shape for k, t in averages.items()} != {k: t.shape for k, t in state.averages.items()}:
        raise ArchitectureMismatchError(f"{folder / 'ema.safetensors'} does not hold the averages of these networks")
    for key, average in state.averages.items():
        average.copy_(averages[key])
    _read_optimizers(read_weights(folder, stem="optimizer"), state.optimizers, folder)
    # Copies: torch.set_rng_state reads from the start of the storage (torch 2.13), wherever in it a view of the file begins.
    return {name: tensor.clone() for name, tensor in read_weights(folder, stem="rng").items()}


def _flat_modules(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}


def _flat_optimizers(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Keys "optimizer.index.quantity", the index counting parameters through all groups."""
    return {
        f"{name}.{i}.{key}": torch.as_tensor(value)
        for name, optimizer in optimizers.items()
        for i, parameter in enumerate(_parameters(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _read_optimizers(tensors: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer], folder: Path) -> None:
    for key, tensor in tensors.items():
        name, index, quantity = key.split(".", 2)
        parameters = _parameters(optimizers[name]) if name in optimizers else []
        if int(index) >= len(parameters):
            raise ArchitectureMismatchError(
                f"{folder / 'optimizer.safetensors'}: {key!r} belongs to no parameter of this recipe"
            )
        parameter = parameters[int(index)]
        if tensor.ndim == 0:
            restored = tensor.to(parameter.device if parameter.is_cuda else "cpu")  # the step count, where AdamW keeps it
        elif tensor.shape != parameter.shape:
            raise ArchitectureMismatchError(
                f"{folder / 'optimizer.safetensors'}: {key!r} has shape {tuple(tensor.shape)} and the parameter in its place "
                f"{tuple(parameter.shape)}; the recipe groups parameters otherwise than the run did"
            )
        else:  # in the parameter's own memory order, which fused kernels rely on
            restored = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        optimizers[name].state[parameter][quantity] = restored


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
