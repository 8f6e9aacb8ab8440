"""A run in two stages: one model ends early (`denoising_end`), another goes on from its latents (`denoising_start`), as Stable
Diffusion XL's base and refiner do (Podell et al. 2023, arXiv:2307.01952, section 2.5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError, NumericalError
from ldmkit.interfaces import Levels
from ldmkit.schedule import Schedule
from ldmkit.tasks import Run, Task


def steps_before(name: str, share: Any, run: Run, schedule: Schedule) -> int | None:
    """The steps of the first stage: those from times of at least round(T (1 - share)), as diffusers counts them; None for None.

    Raises:
        InputError: where that are none or all, where the run rises, times are not those of a training of T steps, or the
            sampler chooses its own; and for a share that is none.
    """
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise InputError(f"{name} = {share!r}: must be between 0 and 1, the share of the training's times before it")
    levels, facts = run.levels, run.sampler.facts
    if facts is not None and not facts.stages:
        raise InputError(
            f"{name} = {share:g}: {type(run.sampler).__name__} cannot hand over a run between its steps; take another"
        )
    total = getattr(schedule.config, "num_train_timesteps", None)
    if total is None or levels.rising:
        raise InputError(f"{name} = {share:g} needs a run that falls through times of a training; leave it out")
    cut: int = round(total - share * total)
    steps = sum(level.t >= cut for level in levels[:-1])
    if not 0 < steps < levels.num_steps:
        which = "before" if name == "denoising_end" else "after"
        raise InputError(
            f"{name} = {share:g} leaves none of {levels.num_steps} steps {which} it, or all; the run's times go from "
            f"{levels[0].t:g} to {levels[-2].t:g}, and the cut is at {cut}: take more steps, or another share"
        )
    return steps


def ended(task: Task, levels: Levels, until: int | None) -> Task:
    """The task, to end after `until` steps of the whole run. Raises: InputError where that leaves none."""
    if until is None:
        return task
    steps = until - (levels.num_steps - task.levels.num_steps)
    if steps <= task.taken:
        raise InputError(
            "denoising_end comes before the first step of this run; raise it, or lower denoising_start or strength"
        )
    return dataclasses.replace(task, until=steps)


def go_on(run: Run, taken: int, *, image: Any, others: dict[str, Any]) -> Task:
    """The rest of a run, from latents that an earlier stage left.

    Args:
        taken: steps that the earlier stage took.
        image: its latents, (B, C, H, W), one or one per prompt.
        others: arguments of other tasks, by name.

    Raises:
        InputError, InputTypeError, NumericalError: for arguments that cannot be served, before any work.
    """
    for name, value in others.items():
        if value is not None:
            raise InputError(f"{name} was given with denoising_start, which goes on from latents as they are; leave it out")
    if run.told:
        raise InputError(
            f"denoising_start needs a denoiser that takes latents alone; this one takes {run.told} channels beside"
        )
    if not isinstance(image, Tensor):
        raise InputTypeError(
            "denoising_start goes on from latents: give the images of the first stage's output, drawn with denoising_end and "
            f"output_type='latent', as image=; got {type(image).__name__}"
        )
    multiple = run.denoiser.multiple_of
    fits = image.ndim == 4 and image.shape[1] == run.channels and not any(side % multiple for side in image.shape[2:])
    if not fits or not len(image) or run.count % len(image):
        raise InputError(
            f"image has shape {tuple(image.shape)}; with denoising_start it must be latents (B, {run.channels}, H, W), sides "
            f"multiples of {multiple}, for one or all of the {run.count} pictures"
        )
    if bad := int((~torch.isfinite(image)).sum()):
        raise NumericalError(f"the given latents hold {bad} NaN or infinite values (before step 1)")
    latents = run.per_picture(image.to(device=run.device, dtype=run.dtype))
    return Task(run.levels, latents, taken=taken)
