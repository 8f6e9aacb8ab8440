"""Euler ancestral: k-diffusion's `sample_euler_ancestral`."""

from __future__ import annotations

import dataclasses

from pydantic import Field

from ldmkit.interfaces import Level, SamplerFacts
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._gaussian import Coefficients, GaussianSampler, ddim


class EulerAncestralSampler(EulerFamily, GaussianSampler):
    """An Euler step down to below the next level, then fresh noise back up to it."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        eta: 0 is plain Euler, 1 the full ancestral noise.
        s_noise: the noise's standard deviation.
        """

        eta: float = Field(1.0, ge=0, le=1)
        s_noise: float = Field(1.0, ge=0)

    facts = SamplerFacts(order=1, evaluations=1, stochastic=True, source="k-diffusion")

    def __init__(self, config: EulerAncestralSampler.Config) -> None:
        super().__init__(config)

    def coefficients(self, level: Level, to: Level) -> Coefficients:
        """k-diffusion's `get_ancestral_step`, which is DDIM's."""
        law = ddim(level, to, self.config.eta)
        return dataclasses.replace(law, std=law.std * self.config.s_noise)

    def draws(self, level: Level) -> bool:
        """At every step, unless eta is 0."""
        eta: float = self.config.eta
        return eta > 0
