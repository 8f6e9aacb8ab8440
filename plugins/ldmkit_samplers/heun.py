"""Heun's method with churn: Karras et al. 2022, arXiv:2206.00364, algorithm 2."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._two_stage import heun


class HeunSampler(EulerFamily):
    """The trapezoidal rule along the probability flow: second order, two evaluations a step (one onto the clean image, and from
    pure noise). With churn, noise is added before each step, and removed by it.
    """

    class Config(SamplerConfig):
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

    facts = SamplerFacts(order=2, evaluations=2, stochastic=False, source="Karras et al. 2022, arXiv:2206.00364")

    def __init__(self, config: HeunSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step, after the draw of the raised x where there is churn."""
        level, config = state.level, self.config
        gamma = min(config.s_churn / state.levels.num_steps, math.sqrt(2) - 1)
        top = math.inf if config.s_tmax is None else config.s_tmax
        if gamma == 0 or level.alpha == 0 or not config.s_tmin <= level.ratio <= top:
            return self._heun(denoise, state.x, level, state.next_level)
        raised = state.levels.between(level.ratio * (1 + gamma))
        mean = (raised.alpha / level.alpha) * state.x
        std = config.s_noise * raised.alpha * level.ratio * math.sqrt(gamma * (2 + gamma))
        return Transition(mean, std, then=lambda x: self._heun(denoise, x, raised, state.next_level))

    def _heun(self, denoise: Denoise, x: Tensor, level: Level, to: Level) -> Transition:
        ahead, denoised = heun(denoise, x, level, to)
        return Transition(ahead, 0.0, denoised)
