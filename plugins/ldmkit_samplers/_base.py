"""What the samplers here share: which levels a run visits.

All levels of DDPM schedules are variance-preserving, alpha^2 + sigma^2 = 1, also for methods born in variance-exploding
coordinates: their updates are linear, so they are the same in any coordinates, and here nothing overflows and alpha may be 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ldmkit.config import Config
from ldmkit.errors import InputError
from ldmkit.interfaces import Level, Levels, Sampler
from ldmkit.schedule import CLEAN, Schedule, Spacing
from ldmkit.spacing import SigmaSchedule, spaced_ratios


class SamplerConfig(Config):
    """Attributes:
    timestep_spacing: "leading", "trailing", "linspace" or "quadratic"; None takes the schedule's own.
    sigma_schedule: a rule for sigma / alpha, in the range of the times above, which then are fractions; None stays with the
        times. See `ldmkit.spacing`.
    rho: the exponent of "karras" and "polyexponential"; None is their usual one.
    """

    timestep_spacing: Spacing | None = None
    sigma_schedule: SigmaSchedule | None = None
    rho: float | None = Field(None, gt=0)


class SpacedSampler(Sampler):
    """A sampler whose levels come from times of the schedule, or from a rule for sigma / alpha."""

    config: Any
    whole_times: ClassVar[bool] = False
    """Whether linspace times are rounded to whole ones."""

    def last_level(self, schedule: Schedule) -> Level:
        """Where a run ends: on the clean image."""
        return CLEAN

    @abstractmethod
    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """What the noise that a run starts from is multiplied by."""

    def spacing(self, schedule: Schedule) -> Spacing:
        """The spacing in force."""
        spacing: Spacing = self.config.timestep_spacing or schedule.timestep_spacing
        return spacing

    def times(self, schedule: Schedule, n: int) -> list[float]:
        """The n times of an ordinary run, falling. Raises: InputError, as `Schedule.timesteps`."""
        return schedule.timesteps(n, spacing=self.spacing(schedule), integers=self.whole_times)

    def ends(self, schedule: Schedule, levels: Sequence[Level]) -> tuple[float, float]:
        """The greatest and least sigma / alpha that a rule fills the range between: those of the levels by times."""
        return levels[0].ratio, levels[-1].ratio

    def levels(self, schedule: Schedule, num_inference_steps: int) -> Levels:
        """The levels of an ordinary run. Raises: InputError, as `Schedule.timesteps`."""
        levels = [schedule.level(t) for t in self.times(schedule, num_inference_steps)]
        if self.config.sigma_schedule is not None:
            high, low = self.ends(schedule, levels)
            rule, rho = self.config.sigma_schedule, self.config.rho
            ratios = spaced_ratios(rule, num_inference_steps, schedule, high=high, low=low, rho=rho)
            levels = [schedule.at(ratio) for ratio in ratios]
        elif self.config.rho is not None:
            raise InputError(
                f"rho = {self.config.rho:g} goes with sigma_schedule 'karras' or 'polyexponential', and none is set"
            )
        return self._ending(schedule, levels)

    def levels_from_timesteps(self, schedule: Schedule, timesteps: Sequence[float]) -> Levels:
        """Levels at the given times (whole or fractional), falling, and the method's own last one.

        Raises:
            InputError: no times, times that do not fall, or lie outside the schedule.
        """
        if not len(timesteps):
            raise InputError("timesteps = []: give at least one")
        _falling("timesteps", timesteps)
        return self._ending(schedule, [schedule.level(float(t)) for t in timesteps])

    def levels_from_sigmas(self, schedule: Schedule, sigmas: Sequence[float]) -> Levels:
        """Levels at the given sigma / alpha ratios, falling, the last one (usually 0) included.

        The network is told the time of each ratio, and the schedule's first or last time for a ratio beyond its range.

        Raises:
            InputError: fewer than two, negative, or not falling.
        """
        if len(sigmas) < 2:
            raise InputError(f"sigmas = {list(sigmas)}: give at least two; the last is where the run ends, usually 0")
        _falling("sigmas", sigmas)
        if sigmas[-1] < 0:
            raise InputError(f"sigmas[{len(sigmas) - 1}] = {sigmas[-1]:g}: must not be negative")
        levels = [schedule.at(float(ratio)) for ratio in sigmas]
        return self._levels(schedule, levels)

    def _ending(self, schedule: Schedule, levels: list[Level]) -> Levels:
        return self._levels(schedule, [*levels, self.last_level(schedule)])

    def _levels(self, schedule: Schedule, levels: list[Level]) -> Levels:
        scale = self.initial_scale(schedule, levels[0])
        return Levels(levels, initial_scale=scale, at=schedule.at, at_time=schedule.level)


def _falling(name: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise InputError(f"{name}[{i}] = {value!r}: must be a number")
        if i and not value < values[i - 1]:
            raise InputError(f"{name} must fall: {name}[{i - 1}] = {values[i - 1]:g}, {name}[{i}] = {value:g}")
