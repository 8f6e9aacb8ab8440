"""Noise schedules: how much signal and noise there is at each time of the diffusion, and which times a run visits.

A discrete schedule has T levels, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise (Ho et al. 2020, arXiv:2006.11239, eq. 4), in
float64 throughout. Names and defaults of the config are those of Stable Diffusion's `scheduler_config.json`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

import ldmkit.config
from ldmkit.briefly import config_briefly
from ldmkit.errors import InputError
from ldmkit.interfaces import Level

Spacing = Literal["leading", "trailing", "linspace", "quadratic"]


class Schedule(ABC):
    """How much signal and noise there is at each time that a model is told, and which times a run visits."""

    Config: ClassVar[type[ldmkit.config.Config]]
    config: Any
    timestep_spacing: Spacing
    """The rule for a run's times, unless its sampler has another."""

    __repr__ = config_briefly

    def __init__(self, config: Any = None) -> None:
        self.config = config or self.Config()
        self.timestep_spacing = getattr(self.config, "timestep_spacing", "linspace")

    @abstractmethod
    def level(self, t: float) -> Level:
        """The level at time t. Raises: InputError outside the schedule."""

    @abstractmethod
    def at(self, ratio: float) -> Level:
        """The level with sigma / alpha = ratio, told at its time (the first or last for a ratio beyond the schedule's)."""

    @abstractmethod
    def timesteps(self, n: int, *, spacing: Spacing | None = None, integers: bool = True) -> list[float]:
        """The n times a run visits, falling. Raises: InputError for an n or a spacing that it does not have."""

    def final_level(self) -> Level:
        """Where methods end that do not insist on the clean image."""
        return CLEAN


class NoiseSchedule(Schedule):
    """The training schedule of a model, t = 0 .. T - 1, from nearly clean to nearly (or wholly) noise."""

    class Config(ldmkit.config.Config):
        """Shape of the schedule, and the times that runs visit unless a sampler has its own rule.

        Attributes:
            num_train_timesteps: T, at most a million: there is a table of as many levels.
            beta_schedule: "linear" (Ho et al. 2020), "scaled_linear" (linear in sqrt(beta); Rombach et al. 2022) or
                "squaredcos_cap_v2" (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).
            rescale_betas_zero_snr: shift and scale sqrt(abar) so that the last level is pure noise (Lin et al. 2024,
                arXiv:2305.08891, alg. 1).
            timestep_spacing: "leading", "trailing" or "linspace" (Lin et al. 2024, table 2), or "quadratic" (Song et al. 2021,
                arXiv:2010.02502, app. D.2).
            steps_offset: added to the times of leading spacing; Stable Diffusion uses 1.
            set_alpha_to_one: whether DDPM-like methods end on the clean image rather than at t = 0.
        """

        num_train_timesteps: int = Field(1000, ge=1, le=10**6)
        beta_start: float = Field(0.00085, gt=0, lt=1)
        beta_end: float = Field(0.012, gt=0, lt=1)
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
        rescale_betas_zero_snr: bool = False
        timestep_spacing: Spacing = "leading"
        steps_offset: int = Field(1, ge=0)
        set_alpha_to_one: bool = False

        @model_validator(mode="after")
        def _falls(self) -> NoiseSchedule.Config:
            if self.beta_end < self.beta_start:
                raise ValueError(f"beta_end = {self.beta_end:g} is below beta_start = {self.beta_start:g}")
            if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
                raise ValueError(
                    "rescale_betas_zero_snr keeps the first level and needs a second one: num_train_timesteps >= 2"
                )
            _tables(self)
            return self

    config: NoiseSchedule.Config

    def __init__(self, config: NoiseSchedule.Config | None = None) -> None:
        super().__init__(config)
        self.betas, self.alphas_cumprod = _tables(self.config)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.config.num_train_timesteps

    def level(self, t: float) -> Level:
        """The (variance-preserving) level at time t. Between two whole times, sigma / alpha is interpolated, as diffusers does.

        Raises:
            InputError: t outside [0, T - 1], or between two whole times of which the later is pure noise.
        """
        top = self.num_train_timesteps - 1
        if not 0 <= t <= top:
            raise InputError(f"timestep {t:g} is outside the schedule's 0 .. {top}")
        low = math.floor(t)
        if low == t:
            abar = float(self.alphas_cumprod[low])
            return Level(math.sqrt(abar), math.sqrt(1.0 - abar), float(t))
        ratio = float(np.interp(t, np.arange(top + 1), self.sigmas))
        if math.isinf(ratio):
            raise InputError(
                f"timestep {t:g} lies beside pure noise at t = {low + 1}, where sigma / alpha cannot be interpolated"
            )
        return vp_level(ratio, float(t))

    @property
    def sigmas(self) -> np.ndarray:
        """sigma / alpha at each t (T,), rising; inf where abar is 0."""
        with np.errstate(divide="ignore"):
            ratios: np.ndarray = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
        return ratios

    def time_of(self, ratio: float) -> float:
        """The (fractional) time whose sigma / alpha is `ratio`, interpolated in the logarithm as k-diffusion's `sigma_to_t`.

        Ratios below the first level's give 0, those above the last's T - 1 (the last before pure noise, if finite).
        """
        if ratio <= 0:
            return 0.0
        if math.isinf(ratio):
            return float(self.num_train_timesteps - 1)
        log_sigmas = np.log(self.sigmas[np.isfinite(self.sigmas)])
        return float(np.interp(math.log(ratio), log_sigmas, np.arange(len(log_sigmas))))

    def at(self, ratio: float) -> Level:
        """The (variance-preserving) level with sigma / alpha = ratio, told at its time."""
        return vp_level(ratio, self.time_of(ratio))

    def final_level(self) -> Level:
        """The level of t = 0, or clean (`set_alpha_to_one`)."""
        return CLEAN if self.config.set_alpha_to_one else self.level(0)

    def timesteps(self, n: int, *, spacing: Spacing | None = None, integers: bool = True) -> list[float]:
        """The n times a run visits, falling.

        Args:
            n: number of steps.
            spacing: overrides the config's.
            integers: round linspace times to whole ones (as DDPM and DDIM do; Euler does not).

        Raises:
            InputError: n below 1, above T, too large for the steps offset, or so large that quadratic times meet.
        """
        total, spacing = self.num_train_timesteps, spacing or self.config.timestep_spacing
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= total:
            raise InputError(f"num_inference_steps = {n!r}: must be a whole number from 1 to the schedule's {total}")
        if spacing == "linspace":
            times = np.linspace(0, total - 1, n)[::-1] if n > 1 else np.array([total - 1.0])  # one step starts from the noise
            return [float(t) for t in (np.round(times) if integers else times)]
        if spacing == "trailing":
            return [float(np.round(total - i * total / n)) - 1 for i in range(n)]
        if spacing == "quadratic":
            return self._quadratic(n, integers)
        offset = self.config.steps_offset
        first = (n - 1) * (total // n) + offset
        if first > total - 1:
            raise InputError(
                f"num_inference_steps = {n} with steps_offset = {offset} starts at t = {first}, beyond the schedule's last, "
                f"{total - 1}; use fewer steps, or timestep_spacing 'trailing'"
            )
        return [float(first - i * (total // n)) for i in range(n)]

    def _quadratic(self, n: int, integers: bool) -> list[float]:
        """Times i^2 over the first four fifths of the schedule, as DDIM's authors have them."""
        if n == 1:  # one step starts from the noise
            return [self.num_train_timesteps - 1.0]
        roots = np.linspace(0, math.sqrt(0.8 * self.num_train_timesteps), n)
        times = (np.floor(roots**2) if integers else roots**2)[::-1] + self.config.steps_offset
        if (np.diff(times) >= 0).any():
            raise InputError(f"num_inference_steps = {n}: whole quadratic times meet; use fewer steps or another spacing")
        if times[0] > self.num_train_timesteps - 1:
            offset, top = self.config.steps_offset, self.num_train_timesteps - 1
            raise InputError(f"num_inference_steps = {n} with steps_offset = {offset} starts beyond the schedule's last, {top}")
        return [float(t) for t in times]


def vp_level(ratio: float, t: float) -> Level:
    """The variance-preserving level with sigma / alpha = ratio."""
    if math.isinf(ratio):
        return Level(0.0, 1.0, t)
    scale = math.hypot(1.0, ratio)
    return Level(1.0 / scale, ratio / scale, t)


CLEAN = Level(1.0, 0.0, 0.0)
"""The noise-free level that Euler-like methods end on."""


def _tables(config: NoiseSchedule.Config) -> tuple[np.ndarray, np.ndarray]:
    """beta and abar, (T,) each, read-only. Raises ValueError where abar does not fall, or underflows."""
    betas = _betas(config)
    abar = _checked(np.cumprod(1.0 - betas))
    if config.rescale_betas_zero_snr:
        betas = _zero_terminal_snr(abar)
        abar = np.cumprod(1.0 - betas)
        _checked(abar[:-1])
    for table in (betas, abar):
        table.setflags(write=False)
    return betas, abar


def _checked(abar: np.ndarray) -> np.ndarray:
    stuck = np.flatnonzero((np.diff(abar, prepend=1.0) >= 0) | (abar < np.finfo(np.float64).tiny))
    if len(stuck):
        raise ValueError(
            f"alpha-bar cannot be told from 1, from its neighbour or from 0 at t = {stuck[0]} ({abar[stuck[0]]:g}); "
            "choose larger or smaller betas, or fewer num_train_timesteps"
        )
    return abar


def _betas(config: NoiseSchedule.Config) -> np.ndarray:
    total = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, total)
    if config.beta_schedule == "scaled_linear":
        return np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), total) ** 2

    def abar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - abar((i + 1) / total) / abar(i / total), 0.999) for i in range(total)])


def _zero_terminal_snr(abar: np.ndarray) -> np.ndarray:
    """Betas of the schedule shifted and scaled to end at 0 (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(abar)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    shifted = root**2
    betas: np.ndarray = 1.0 - np.concatenate([shifted[:1], shifted[1:] / shifted[:-1]])
    return betas
