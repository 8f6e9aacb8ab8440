"""Multistep consistency sampling: Song et al. 2023, arXiv:2303.01469, algorithm 1."""

from __future__ import annotations

import math

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily


class ConsistencySampler(EulerFamily):
    """At each level: the model's clean estimate, then fresh noise to the next level; for consistency models, in few steps."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        sigma_min: the noise that is left in the model's estimates (its epsilon).
        """

        sigma_min: float = Field(0.002, ge=0)

    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="Song et al. 2023, arXiv:2303.01469")

    def __init__(self, config: ConsistencySampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' ~ N(alpha' x0, alpha'^2 (ratio'^2 - sigma_min^2))."""
        to = state.next_level
        estimate = denoise(state.x, state.level)
        left = min(self.config.sigma_min, to.ratio)
        return Transition(to.alpha * estimate, to.alpha * math.sqrt((to.ratio - left) * (to.ratio + left)), estimate)
