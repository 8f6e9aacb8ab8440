"""DPM-Solver++(2S) with ancestral noise: Lu et al. 2022, arXiv:2211.01095, algorithm 1, in k-diffusion's form."""

from __future__ import annotations

import math

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._two_stage import ancestral, euler


class DPMpp2SAncestralSampler(EulerFamily):
    """A second-order singlestep exponential integrator to below the next level, then fresh noise up to it; two evaluations."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        eta: 0 is deterministic, 1 the full ancestral noise.
        s_noise: the noise's standard deviation.
        """

        eta: float = Field(1.0, ge=0, le=1)
        s_noise: float = Field(1.0, ge=0)

    facts = SamplerFacts(order=2, evaluations=2, stochastic=True, source="Lu et al. 2022, arXiv:2211.01095; k-diffusion")

    def __init__(self, config: DPMpp2SAncestralSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The step's mean, and the noise that leads back up."""
        x, level, to = state.x, state.level, state.next_level
        down, up = ancestral(level, to, self.config.eta)
        denoised, below = denoise(x, level), state.levels.between(down)
        if down > 0 and level.alpha > 0:
            middle = state.levels.between(math.sqrt(level.ratio * down))
            denoised = denoise(euler(x, denoised, level, middle), middle)
        mean = (to.alpha / below.alpha) * euler(x, denoised, level, below)
        return Transition(mean, to.alpha * up * self.config.s_noise, denoised, draws=self.config.eta > 0)
