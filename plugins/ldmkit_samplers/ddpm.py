"""DDPM: Ho et al. 2020, arXiv:2006.11239, between any two levels of the schedule."""

from __future__ import annotations

import math
from typing import Literal

from ldmkit.interfaces import Level, SamplerFacts
from ldmkit.schedule import Schedule
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._gaussian import Coefficients, GaussianSampler, ratio_kept


class DDPMSampler(GaussianSampler):
    """Draws the next level from the diffusion's posterior q(x' | x, x0)."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        variance: "fixed_small", the posterior's own (right for a point mass), or "fixed_large", that of the forward step (right
            for a unit normal); the two choices of Ho et al. 2020, section 3.2. "learned_range": between the two, where the
            model says (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15); for models of the prediction variance
            "learned_range". The last step to the clean image adds no noise in any.
        """

        variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"

    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="Ho et al. 2020, arXiv:2006.11239")
    whole_times = True

    def __init__(self, config: DDPMSampler.Config) -> None:
        super().__init__(config)

    @property
    def takes_variance(self) -> bool:
        """With variance = "learned_range"."""
        return bool(self.config.variance == "learned_range")

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """1: the noise itself."""
        return 1.0

    def coefficients(self, level: Level, to: Level) -> Coefficients:
        """Ho et al. 2020, eq. 6 and 7. The forward step's variance is beta = sigma^2 (1 - rho^2), rho = `ratio_kept`."""
        rho = ratio_kept(level, to)
        beta = level.sigma**2 * (1 - rho) * (1 + rho)
        variance = to.sigma**2 / level.sigma**2 * beta
        if self.config.variance == "fixed_large" and to.sigma > 0:  # alg. 2 adds no noise to the image itself
            variance = beta
        return Coefficients(
            on_x=level.alpha / to.alpha * to.sigma**2 / level.sigma**2,
            on_x0=to.alpha * beta / level.sigma**2,
            std=math.sqrt(variance),
            most=math.sqrt(beta) if self.takes_variance and variance > 0 else None,
        )

    def draws(self, level: Level) -> bool:
        """At every time but 0."""
        return level.t > 0
