"""LCM: multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378, algorithm 3)."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from ldmkit.errors import InputError
from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit.schedule import NoiseSchedule, Schedule
from ldmkit_samplers._base import SamplerConfig, SpacedSampler


class LCMSampler(SpacedSampler):
    """At each level: the consistency function's clean estimate, then fresh noise to the next level; few steps (1 to 8)."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: see `SamplerConfig`; with none of them, times are the distillation's own.
        original_inference_steps: steps of the solver that was distilled; a run's times are some of its.
        timestep_scaling: how fast the boundary condition lets go of x; 0 leaves it out.
        sigma_data: of the boundary condition c_skip = sigma_data^2 / ((scaling t)^2 + sigma_data^2).
        """

        original_inference_steps: int = Field(50, ge=1)
        timestep_scaling: float = Field(10.0, ge=0)
        sigma_data: float = Field(0.5, gt=0)

    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="Luo et al. 2023, arXiv:2310.04378")
    whole_times = True

    def __init__(self, config: LCMSampler.Config) -> None:
        super().__init__(config)

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

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' ~ N(alpha' f(x), sigma'^2), f = c_skip x + c_out x0 (Luo et al. 2023, eq. 9)."""
        level, to, config = state.level, state.next_level, self.config
        estimate = denoise(state.x, level)
        if config.timestep_scaling > 0:
            width = math.hypot(config.timestep_scaling * level.t, config.sigma_data)
            skip, out = (config.sigma_data / width) ** 2, config.timestep_scaling * level.t / width
            estimate = skip * state.x + out * estimate
        return Transition(to.alpha * estimate, to.sigma, estimate)
