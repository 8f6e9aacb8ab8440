"""Churn: noise added before a step, and removed by it (Karras et al. 2022, arXiv:2206.00364, algorithm 2, lines 4 to 6)."""

from __future__ import annotations

import math
from collections.abc import Callable

from pydantic import Field, model_validator
from torch import Tensor

from ldmkit.interfaces import Level, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig


class ChurnConfig(SamplerConfig):
    """Attributes:
    timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
    s_churn: how much noise is added in a whole run; 0 is deterministic. A step raises sigma / alpha by s_churn / steps, at
        most by sqrt(2) - 1.
    s_tmin, s_tmax: the range of sigma / alpha in which it is; None is no upper end.
    s_noise: the added noise's standard deviation, slightly above 1 to make up for lost detail.
    """

    s_churn: float = Field(0.0, ge=0)
    s_tmin: float = Field(0.0, ge=0)
    s_tmax: float | None = Field(None, ge=0)
    s_noise: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> ChurnConfig:
        if self.s_tmax is not None and self.s_tmin > self.s_tmax:
            raise ValueError(f"s_tmin = {self.s_tmin:g} is above s_tmax = {self.s_tmax:g}: no level is between")
        return self


def churned(config: ChurnConfig, state: SamplerState, step: Callable[[Tensor, Level], Transition]) -> Transition:
    """The law of the raised x, then `step` from it; `step` from x itself where there is no churn."""
    level = state.level
    gamma = min(config.s_churn / state.levels.num_steps, math.sqrt(2) - 1)
    top = math.inf if config.s_tmax is None else config.s_tmax
    if gamma == 0 or level.alpha == 0 or not config.s_tmin <= level.ratio <= top:
        return step(state.x, level)
    raised = state.levels.between(level.ratio * (1 + gamma))
    mean = (raised.alpha / level.alpha) * state.x
    std = config.s_noise * raised.alpha * level.ratio * math.sqrt(gamma * (2 + gamma))
    return Transition(mean, std, then=lambda x: step(x, raised))
