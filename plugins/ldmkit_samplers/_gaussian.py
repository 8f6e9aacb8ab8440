"""What the samplers here share: a step draws x' ~ N(on_x x + on_x0 x0, std^2) with x0 = D(x, level).

All levels are variance-preserving, alpha^2 + sigma^2 = 1, also for methods born in variance-exploding coordinates: Euler's
update is linear, so it is the same in x / sqrt(1 + ratio^2), where nothing overflows and alpha may be 0.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ldmkit.config import Config
from ldmkit.errors import InputError
from ldmkit.interfaces import Denoise, Level, Levels, Sampler, SamplerState, Transition
from ldmkit.schedule import NoiseSchedule, Spacing


class SamplerConfig(Config):
    """Attributes:
    timestep_spacing: "leading", "trailing" or "linspace"; None takes the schedule's own.
    """

    timestep_spacing: Spacing | None = None


@dataclass(frozen=True)
class Coefficients:
    """The law of one step, x' ~ N(on_x x + on_x0 x0, std^2)."""

    on_x: float
    on_x0: float
    std: float


class GaussianSampler(Sampler):
    """A sampler whose step is Gaussian given D(x, level); the concrete ones say which levels, and which Gaussian."""

    config: Any
    whole_times: ClassVar[bool]
    """Whether linspace times are rounded to whole ones."""

    @abstractmethod
    def last_level(self, schedule: NoiseSchedule) -> Level:
        """Where a run ends."""

    @abstractmethod
    def initial_scale(self, schedule: NoiseSchedule, first: Level) -> float:
        """What the noise that a run starts from is multiplied by."""

    @abstractmethod
    def coefficients(self, level: Level, to: Level) -> Coefficients:
        """The law of the step from one level to the next."""

    @abstractmethod
    def draws(self, level: Level) -> bool:
        """Whether the step from this level takes noise: exactly where diffusers takes it, so that a generator stays in step."""

    def spacing(self, schedule: NoiseSchedule) -> Spacing:
        """The spacing in force."""
        spacing: Spacing = self.config.timestep_spacing or schedule.config.timestep_spacing
        return spacing

    def levels(self, schedule: NoiseSchedule, num_inference_steps: int) -> Levels:
        """The levels of an ordinary run. Raises: InputError, as `NoiseSchedule.timesteps`."""
        times = schedule.timesteps(num_inference_steps, spacing=self.spacing(schedule), integers=self.whole_times)
        return self._ending(schedule, [schedule.level(t) for t in times])

    def levels_from_timesteps(self, schedule: NoiseSchedule, timesteps: Sequence[float]) -> Levels:
        """Levels at the given times (whole or fractional), falling, and the method's own last one.

        Raises:
            InputError: no times, times that do not fall, or lie outside the schedule.
        """
        if not len(timesteps):
            raise InputError("timesteps = []: give at least one")
        _falling("timesteps", timesteps)
        return self._ending(schedule, [schedule.level(float(t)) for t in timesteps])

    def levels_from_sigmas(self, schedule: NoiseSchedule, sigmas: Sequence[float]) -> Levels:
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
        return Levels(levels, initial_scale=self.initial_scale(schedule, levels[0]), at=schedule.at)

    def _ending(self, schedule: NoiseSchedule, levels: list[Level]) -> Levels:
        return Levels(
            [*levels, self.last_level(schedule)], initial_scale=self.initial_scale(schedule, levels[0]), at=schedule.at
        )

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The Gaussian that `coefficients` say, by one evaluation of the model."""
        denoised, law = denoise(state.x, state.level), self.coefficients(state.level, state.next_level)
        mean = law.on_x * state.x + law.on_x0 * denoised
        return Transition(mean, law.std, denoised, draws=self.draws(state.level))


def ratio_kept(level: Level, to: Level) -> float:
    """rho, the next level's sigma / alpha over this one's, in [0, 1]; 0 from pure noise or to a clean image."""
    return min(1.0, (to.sigma * level.alpha) / (level.sigma * to.alpha))  # rounding can pass 1 where the levels are equal


def ddim(level: Level, to: Level, eta: float) -> Coefficients:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), which is also Euler's ancestral step.

    With rho = `ratio_kept`, eq. 16 reads std = eta sigma' sqrt(1 - rho^2). In variance-exploding coordinates this is
    k-diffusion's `get_ancestral_step`: sigma_up = eta sigma' sqrt(1 - rho^2), sigma_down = sqrt(sigma'^2 - sigma_up^2).
    """
    rho = ratio_kept(level, to)
    on_noise = to.sigma * math.sqrt((1 - eta) * (1 + eta) + (eta * rho) ** 2)  # sqrt(sigma'^2 - std^2), without cancellation
    on_x = on_noise / level.sigma
    std = eta * to.sigma * math.sqrt((1 - rho) * (1 + rho))
    return Coefficients(on_x=on_x, on_x0=to.alpha - on_x * level.alpha, std=std)


def _falling(name: str, values: Sequence[float]) -> None:
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise InputError(f"{name}[{i}] = {value!r}: must be a number")
        if i and not value < values[i - 1]:
            raise InputError(f"{name} must fall: {name}[{i - 1}] = {values[i - 1]:g}, {name}[{i}] = {value:g}")
