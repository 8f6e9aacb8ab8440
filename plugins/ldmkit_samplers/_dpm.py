"""The levels of DPM-Solver's family: n + 1 times of which the last is left out, as its authors and hosts space them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from ldmkit.errors import InputError
from ldmkit.interfaces import Level, SamplerState
from ldmkit.schedule import CLEAN, NoiseSchedule, Schedule
from ldmkit_samplers._base import SamplerConfig, SpacedSampler
from ldmkit_samplers._two_stage import euler


class DPMConfig(SamplerConfig):
    """Attributes:
    timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`. A rule for sigma / alpha has the
        whole range of a schedule with times, as its authors and hosts have it.
    final_sigmas_type: where it ends: "zero" is the clean image, "sigma_min" the first level, t = 0, of a schedule with times.
    """

    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"


class DPMFamily(SpacedSampler):
    """Exponential integrators in lambda = log(alpha / sigma) (Lu et al. 2022, arXiv:2206.00927)."""

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """1: the noise itself."""
        return 1.0

    def last_level(self, schedule: Schedule) -> Level:
        """The clean image, or the level of t = 0. Raises: InputError for "sigma_min" of a schedule without whole times."""
        if self.config.final_sigmas_type == "zero":
            return CLEAN
        if not isinstance(schedule, NoiseSchedule):
            raise InputError(
                f"final_sigmas_type 'sigma_min' is the level of t = 0, and the {type(schedule).__name__} has none; take 'zero'"
            )
        return schedule.level(0)

    def ends(self, schedule: Schedule, levels: Sequence[Level]) -> tuple[float, float]:
        """Those of the whole schedule, where it has whole times."""
        if not isinstance(schedule, NoiseSchedule):
            return super().ends(schedule, levels)
        return schedule.level(schedule.num_train_timesteps - 1).ratio, schedule.level(0).ratio

    def times(self, schedule: Schedule, n: int) -> list[float]:
        """n whole times, falling. Trailing spacing is everyone's; schedules without whole times have their own.

        Raises:
            InputError: n below 1, or so large that times meet.
        """
        spacing = self.spacing(schedule)
        if not isinstance(schedule, NoiseSchedule) or spacing in ("trailing", "quadratic"):
            return schedule.timesteps(n, spacing=spacing)
        total = schedule.num_train_timesteps
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < total:
            raise InputError(
                f"num_inference_steps = {n!r}: must be a whole number from 1 to {total - 1} with {spacing!r} spacing"
            )
        if spacing == "linspace":
            return [float(t) for t in np.linspace(0, total - 1, n + 1).round()[:0:-1]]
        step, offset = total // (n + 1), schedule.config.steps_offset
        if (first := n * step + offset) > total - 1:
            raise InputError(
                f"num_inference_steps = {n} with steps_offset = {offset} starts at t = {first}, beyond the schedule's last, "
                f"{total - 1}; use fewer steps, or timestep_spacing 'trailing'"
            )
        return [float(i * step + offset) for i in range(n, 0, -1)]


def few(state: SamplerState) -> bool:
    """Whether a run has so few steps that its last ones are taken at lower orders, as the solver's authors advise."""
    return state.levels.num_steps < 15


def decay(level: Level, to: Level) -> float:
    """exp(-h), h = lambda' - lambda: from 0 (from pure noise, or to the clean image) to 1."""
    return (to.sigma * level.alpha) / (level.sigma * to.alpha)


def reverse_step(x: Tensor, denoised: Tensor, level: Level, to: Level, eta: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of a step of the reverse stochastic equation that takes x0 to stay (k-diffusion's
    `sample_dpmpp_2m_sde` without memory): x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-h - eta h)) x0
    + sigma' sqrt(1 - e^(-2 eta h)) noise. From pure noise and onto the clean image it is Euler's, without noise.
    """
    kept = decay(level, to)
    if kept == 0:
        return euler(x, denoised, level, to), 0.0
    h = -math.log(kept)
    mean = (to.sigma / level.sigma) * math.exp(-eta * h) * x - to.alpha * math.expm1(-h * (1 + eta)) * denoised
    return mean, to.sigma * math.sqrt(-math.expm1(-2 * eta * h))


INVERSE_FACTORIALS = tuple(1 / math.factorial(j) for j in range(24))


def phi(k: int, z: float) -> float:
    """phi_k(z) = (phi_(k-1)(z) - 1 / (k-1)!) / z, phi_0 = exp: the integrals of exponential integrators (Hochbruck and
    Ostermann 2010, doi:10.1017/S0962492910000048, eq. 2.10), by their series where the differences would cancel.
    """
    if abs(z) < 1:
        return sum(z**j * share for j, share in enumerate(INVERSE_FACTORIALS[k : k + 20]))
    return math.exp(z) if k == 0 else (phi(k - 1, z) - INVERSE_FACTORIALS[k - 1]) / z


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma); -inf at pure noise, inf on the clean image."""
    return -math.log(level.ratio) if level.sigma else math.inf
