"""Before the first step of a run: which checkpoint it goes on from, and Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ldmkit.errors import ConfigError, InputError, MissingDependencyError
from ldmkit.training import state as states
from ldmkit.training.recipe_files import differences
from ldmkit.training.recipes import Recipe

Start = Literal["auto", "resume", "fresh"]
ARCHITECTURE = ("autoencoder.", "denoiser.", "conditioner.", "loss.adversarial.")
"""Of a recipe: what a run cannot change and go on."""


def checkpoint_to_resume(recipe: Recipe, out: Path, start: Start, say: Callable[[str], None]) -> Path | None:
    """Decide between a new run and an old one, before anything is read or written.

    Args:
        out: the run's folder.
        start: "auto" resumes where the folder has a checkpoint, "resume" demands one, "fresh" does not look.
        say: is told what the recipe has changed in since.

    Raises:
        InputError: where there is nothing to resume, or for another `start`.
        ConfigError: where the old run had other parts, or was of the other stage.
    """
    if start not in get_args(Start):
        raise InputError(f"start = {start!r}: must be {', '.join(map(repr, get_args(Start)))}")
    checkpoints = out / "checkpoints"
    found = states.find(checkpoints)
    if start == "resume" and not found:
        raise InputError(f"there is no checkpoint to resume in {checkpoints}; leave out --resume to start")
    if start == "fresh" or not found:
        return None
    folder = found[-1]
    info = states.read_info(folder)
    if info["recipe_kind"] != type(recipe).__name__:
        raise ConfigError(f"{folder} is of a run of {info['recipe_kind']}, not {type(recipe).__name__}; choose another folder")
    changed = differences(info["recipe"], recipe.to_dict())
    lines = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items()]
    if any(f"{key}.".startswith(ARCHITECTURE) for key in changed):
        raise ConfigError(f"{folder} was trained with other parts ({'; '.join(lines)}); use --fresh or another folder")
    for line in lines:
        say(f"the recipe has changed since: {line}")
    return folder


def make_accelerator(recipe: Recipe, device: str) -> Any:
    """Hugging Face Accelerate, set up for the recipe's precision and the wanted device: "auto", "cpu" or "cuda".

    Raises:
        MissingDependencyError: without Accelerate. InputError: for another device, or one that is not there.
        ConfigError: for a precision that the device does not have.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError:
        raise MissingDependencyError("training needs Accelerate: pip install 'ldmkit[train]'") from None
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device = {device!r}: must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda' was asked for, but torch sees no CUDA device; use cpu")
    if recipe.mixed_precision == "fp16" and (device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("mixed_precision = 'fp16' needs a GPU; use bf16 or no")
    # Accelerate keeps its choices for the life of the process; a second run in it may choose otherwise.
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=alone)
    return Accelerator(
        mixed_precision=recipe.mixed_precision,
        cpu=device == "cpu" or not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
