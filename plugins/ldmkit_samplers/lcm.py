"""LCM: multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378, algorithm 3)."""

from __future__ import annotations

import math

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._distilled import DistilledConfig, DistilledSampler


class LCMSampler(DistilledSampler):
    """At each level: the consistency function's clean estimate, then fresh noise to the next level; few steps (1 to 8)."""

    class Config(DistilledConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, original_inference_steps: which levels a run visits; see `DistilledConfig`.
        timestep_scaling: how fast the boundary condition lets go of x; 0 leaves it out.
        sigma_data: of the boundary condition c_skip = sigma_data^2 / ((scaling t)^2 + sigma_data^2).
        """

        timestep_scaling: float = Field(10.0, ge=0)
        sigma_data: float = Field(0.5, gt=0)

    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="Luo et al. 2023, arXiv:2310.04378")

    def __init__(self, config: LCMSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' ~ N(alpha' f(x), sigma'^2), f = c_skip x + c_out x0 (Luo et al. 2023, eq. 9)."""
        level, to, config = state.level, state.next_level, self.config
        estimate = denoise(state.x, level)
        if config.timestep_scaling > 0:
            width = math.hypot(config.timestep_scaling * level.t, config.sigma_data)
            skip, out = (config.sigma_data / width) ** 2, config.timestep_scaling * level.t / width
            estimate = skip * state.x + out * estimate
        return Transition(to.alpha * estimate, to.sigma, estimate)
