"""The times of models distilled from a solver of few steps: latent consistency models, and those of trajectory consistency."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from ldmkit.errors import InputError
from ldmkit.interfaces import Level
from ldmkit.schedule import NoiseSchedule, Schedule
from ldmkit_samplers._base import SamplerConfig, SpacedSampler


class DistilledConfig(SamplerConfig):
    """Attributes:
    timestep_spacing, sigma_schedule, rho: see `SamplerConfig`; with none of them, times are the distillation's own.
    original_inference_steps: steps of the solver that was distilled; a run's times are some of its.
    """

    original_inference_steps: int = Field(50, ge=1)


class DistilledSampler(SpacedSampler):
    """A sampler that visits some of the times that the distilled solver visited."""

    whole_times = True

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """1: the noise itself."""
        return 1.0

    def times(self, schedule: Schedule, n: int) -> list[float]:
        """n of the times that the distilled solver visited, evenly. Raises: InputError for more than it had."""
        original = self.config.original_inference_steps
        if self.config.timestep_spacing is not None or not isinstance(schedule, NoiseSchedule):
            return super().times(schedule, n)
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= original:
            raise InputError(
                f"num_inference_steps = {n!r}: must be a whole number from 1 to original_inference_steps = {original}"
            )
        stride = schedule.num_train_timesteps // original
        if stride == 0:
            raise InputError(
                f"original_inference_steps = {original} is above the schedule's {schedule.num_train_timesteps} times"
            )
        visited = np.arange(1, original + 1)[::-1] * stride - 1
        return [float(t) for t in visited[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)]]
