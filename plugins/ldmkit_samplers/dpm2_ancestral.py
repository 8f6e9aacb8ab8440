"""DPM-Solver-2 with ancestral noise: k-diffusion's `sample_dpm_2_ancestral`."""

from __future__ import annotations

import math

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._multistep import along_the_flow, noise_in
from ldmkit_samplers._two_stage import ancestral, euler


class DPM2AncestralSampler(EulerFamily):
    """The midpoint rule down to below the next level, then fresh noise back up to it; two evaluations a step."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        eta: 0 is dpm-2, 1 the full ancestral noise.
        s_noise: the noise's standard deviation.
        """

        eta: float = Field(1.0, ge=0, le=1)
        s_noise: float = Field(1.0, ge=0)

    facts = SamplerFacts(order=2, evaluations=2, stochastic=True, source="k-diffusion")

    def __init__(self, config: DPM2AncestralSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The step's mean, and the noise that leads back up."""
        x, level, to = state.x, state.level, state.next_level
        down, up = ancestral(level, to, self.config.eta)
        denoised, draws = denoise(x, level), self.config.eta > 0
        if down == 0 or level.alpha == 0:
            below = state.levels.between(down)
            mean = (to.alpha / below.alpha) * euler(x, denoised, level, below)
            return Transition(mean, to.alpha * up * self.config.s_noise, denoised, draws=draws)
        middle = state.levels.between(math.sqrt(level.ratio * down))
        x_middle = euler(x, denoised, level, middle)
        denoised_middle = denoise(x_middle, middle)
        noise = noise_in(x_middle, denoised_middle, middle)
        mean = along_the_flow(x, level, to, [down - level.ratio], [noise])
        return Transition(mean, to.alpha * up * self.config.s_noise, denoised_middle, draws=draws)
