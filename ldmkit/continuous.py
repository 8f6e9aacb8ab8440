"""Schedules without a table: flow matching and EDM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

import ldmkit.config
from ldmkit.config import Config
from ldmkit.errors import ConfigError, InputError
from ldmkit.interfaces import Level
from ldmkit.schedule import NoiseSchedule, Schedule, Spacing, vp_level


class FlowSchedule(Schedule):
    """Straight paths from data to noise, x = (1 - s) x0 + s noise (Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023,
    arXiv:2209.03003), the model told t = s T.
    """

    class Config(ldmkit.config.Config):
        """Attributes:
        num_train_timesteps: T.
        shift: how much more of a run is spent near the noise, s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024,
            arXiv:2403.03206, eq. 23; 3 for Stable Diffusion 3). Resolution-dependent shifts exp(mu) are given the same way.
        timestep_spacing: "trailing" visits s = 1, 1 - 1/n, ... (Flux); "linspace" as diffusers' flow-matching scheduler
            does by itself: evenly from the largest to the smallest shifted s, and shifted again.
        """

        kind: Literal["flow"] = "flow"
        num_train_timesteps: int = Field(1000, ge=2)
        shift: float = Field(1.0, gt=0)
        timestep_spacing: Literal["trailing", "linspace"] = "trailing"

    config: FlowSchedule.Config

    def __init__(self, config: FlowSchedule.Config | None = None) -> None:
        super().__init__(config)

    def level(self, t: float) -> Level:
        """(1 - t/T, t/T). Raises: InputError outside [0, T]."""
        total = self.config.num_train_timesteps
        if not 0 <= t <= total:
            raise InputError(f"timestep {t:g} is outside the schedule's 0 .. {total}")
        return Level(1.0 - t / total, t / total, float(t))

    def at(self, ratio: float) -> Level:
        """s = ratio / (1 + ratio)."""
        s = 1.0 if math.isinf(ratio) else ratio / (1.0 + ratio)
        return Level(1.0 - s, s, s * self.config.num_train_timesteps)

    def timesteps(self, n: int, *, spacing: Spacing | None = None, integers: bool = True) -> list[float]:
        """The n times of a run, falling from T; they are fractions.

        Raises:
            InputError: n below 1, or a spacing that flows do not have.
        """
        spacing = spacing or self.timestep_spacing
        total, shift = self.config.num_train_timesteps, self.config.shift
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"num_inference_steps = {n!r}: must be a whole number from 1 up")
        if spacing == "trailing":
            s = 1.0 - np.arange(n) / n
        elif spacing == "linspace":
            s = np.linspace(1.0, _shifted(np.array([1.0 / total]), shift)[0], n)
        else:
            raise InputError(f"timestep_spacing = {spacing!r}: a flow has 'trailing' and 'linspace'")
        return [float(t) for t in total * _shifted(s, shift)]


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (shift * s + (1.0 - s))  # in this form 1 stays 1


class EDMSchedule(Schedule):
    """Karras et al. 2022 (arXiv:2206.00364): x = x0 + sigma noise, the model told ln(sigma) / 4 (table 1). Levels are the
    variance-preserving ones of the same ratio.
    """

    class Config(ldmkit.config.Config):
        """Attributes:
        sigma_min, sigma_max: the least and greatest noise of a run; it ends on the clean image.
        rho: 7 crowds steps towards little noise (eq. 5).
        """

        kind: Literal["edm"] = "edm"
        sigma_min: float = Field(0.002, gt=0)
        sigma_max: float = Field(80.0, gt=0)
        rho: float = Field(7.0, gt=0)

    config: EDMSchedule.Config

    def __init__(self, config: EDMSchedule.Config | None = None) -> None:
        super().__init__(config)

    def level(self, t: float) -> Level:
        """sigma = exp(4 t)."""
        return vp_level(math.exp(4.0 * t), float(t))

    def at(self, ratio: float) -> Level:
        """t = ln(ratio) / 4, of sigma_min for anything below it."""
        return vp_level(ratio, math.log(max(ratio, self.config.sigma_min)) / 4.0)

    def timesteps(self, n: int, *, spacing: Spacing | None = None, integers: bool = True) -> list[float]:
        """The times of eq. 5's sigmas, falling; they are fractions.

        Raises:
            InputError: n below 1, or any other spacing.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"num_inference_steps = {n!r}: must be a whole number from 1 up")
        if spacing not in (None, self.timestep_spacing):
            raise InputError(f"timestep_spacing = {spacing!r}: an EDM schedule has its own, Karras et al. 2022, eq. 5")
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        sigmas = (high ** (1 / rho) + np.linspace(0, 1, n) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        return [float(t) for t in np.log(sigmas) / 4.0]


SCHEDULES: dict[str, type[Schedule]] = {"ddpm": NoiseSchedule, "flow": FlowSchedule, "edm": EDMSchedule}
"""By the `kind` in a config; a config without one is DDPM's."""


def make_schedule(value: Schedule | Config | Mapping[str, Any] | None) -> Schedule:
    """A schedule from itself, from its config, or from plain values, whose "kind" ("ddpm" if not given) says which.

    Raises:
        ConfigError: for an unknown kind, or values that do not fit.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Config):
        made = next((cls for cls in SCHEDULES.values() if isinstance(value, cls.Config)), None)
        if made is None:
            raise ConfigError(f"schedule: a {type(value).__qualname__} is no config of a schedule")
        return made(value)
    if not isinstance(value, Mapping | None):
        raise ConfigError(f"schedule: expected a mapping of settings, got {value!r}")
    values = dict(value or {})
    kind = values.get("kind", "ddpm")
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise ConfigError(f"schedule kind {kind!r}: must be one of {', '.join(SCHEDULES)}")
    if kind == "ddpm":
        values.pop("kind", None)
    cls = SCHEDULES[kind]
    return cls(cls.Config.parse(values, owner=cls.__name__))
