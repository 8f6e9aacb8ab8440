"""DDIM: Song et al. 2021, arXiv:2010.02502."""

from __future__ import annotations

from pydantic import Field

from ldmkit.interfaces import Level, SamplerFacts
from ldmkit.schedule import Schedule
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._gaussian import Coefficients, GaussianSampler, ddim


class DDIMSampler(GaussianSampler):
    """Implicit steps between whole times, ending at t = 0 (Stable Diffusion), or on the clean image (`set_alpha_to_one`)."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        eta: 0 is deterministic, 1 has the posterior's noise (as DDPM).
        """

        eta: float = Field(0.0, ge=0, le=1)

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="Song et al. 2021, arXiv:2010.02502")
    whole_times = True

    def __init__(self, config: DDIMSampler.Config) -> None:
        super().__init__(config)

    def last_level(self, schedule: Schedule) -> Level:
        """The level of t = 0, or clean. A run whose last time is 0 already takes its last step in place, as its origin does."""
        return schedule.final_level()

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """1: the noise itself."""
        return 1.0

    def coefficients(self, level: Level, to: Level) -> Coefficients:
        """Song et al. 2021, eq. 12 and 16."""
        return ddim(level, to, self.config.eta)

    def draws(self, level: Level) -> bool:
        """At every step, unless eta is 0."""
        eta: float = self.config.eta
        return eta > 0
