"""Euler: Karras et al. 2022, arXiv:2206.00364, algorithm 2 with S_churn = 0 and no second-order correction."""

from __future__ import annotations

from ldmkit.interfaces import Level, SamplerFacts
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._gaussian import Coefficients, GaussianSampler, ddim


class EulerSampler(EulerFamily, GaussianSampler):
    """Follows the probability flow dx / d ratio = (x - D(x)) / ratio in straight steps; draws nothing."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        """

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="Karras et al. 2022, arXiv:2206.00364")

    def __init__(self, config: EulerSampler.Config) -> None:
        super().__init__(config)

    def coefficients(self, level: Level, to: Level) -> Coefficients:
        """x' = D + (ratio' / ratio) (x - D) in the origin's coordinates: DDIM with eta 0."""
        return ddim(level, to, 0.0)

    def draws(self, level: Level) -> bool:
        """Never."""
        return False
