"""The model under several conditions at the same x: in one pass over all, or in one pass each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ldmkit.denoised import Denoised
from ldmkit.errors import InputError
from ldmkit.interfaces import Condition, Level
from ldmkit.prediction import Model


class Passes:
    """D(x, level) under each of the conditions, which are prepared once. Belongs to one run.

    Args:
        batched: True: one pass over all of them (faster). False: one each (less memory, for fewer activations). None: one pass
            until the device has no memory for it, then one each, with a warning. The results agree to rounding, for matrix
            products may round by batch.

    Raises:
        InputError: conditions for different numbers of images, or that set different fields.
    """

    def __init__(self, model: Model, conditions: Sequence[Condition], *, batched: bool | None) -> None:
        sizes = [condition.batch_size for condition in conditions]
        if len(set(sizes)) > 1:
            raise InputError(f"the conditions to combine are for {' and '.join(map(str, sizes))} images; repeat some")
        self._model, self._conditions = model, conditions
        self._batched = batched is not False and len(conditions) > 1
        self._may_split = batched is None
        self._prepare()

    def _prepare(self) -> None:
        given = [Condition.cat(self._conditions)] if self._batched else self._conditions
        self._prepared = [self._model.denoiser.prepare(condition) for condition in given]

    def __call__(self, x: Tensor, level: Level) -> tuple[Tensor, ...]:
        """One estimate of x0 per condition."""
        if not self._batched:
            return tuple(self._model(x, level, condition) for condition in self._prepared)
        count = len(self._conditions)
        try:
            return Denoised.chunk_of(self._model(torch.cat([x] * count), level, self._prepared[0]), count)
        except torch.OutOfMemoryError:
            if not self._may_split:
                raise
        warnings.warn(
            f"no memory for {count} conditions in one pass over {count * len(x)} latents; going on with one pass each "
            "(guidance_batched=False does so from the start)",
            stacklevel=2,
        )
        self._batched = False
        self._prepare()
        return self(x, level)
