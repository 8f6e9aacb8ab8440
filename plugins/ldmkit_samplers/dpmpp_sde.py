"""DPM-Solver++ (SDE): k-diffusion's `sample_dpmpp_sde`, two evaluations and two draws a step, both from one Brownian motion."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._two_stage import ancestral, euler


class DPMppSDESampler(EulerFamily):
    """An ancestral half step, then a whole one by an estimate mixed from both of its ends.

    The noise of the whole step contains that of the half: given the first, what is left to chance is the motion's increment
    over the second half alone, so that the step is a chain of two Gaussian draws.
    """

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        eta: 0 is deterministic, 1 the full ancestral noise.
        s_noise: the noise's standard deviation.
        r: where the middle is, as a share of the step in log(sigma / alpha).
        """

        eta: float = Field(1.0, ge=0, le=1)
        s_noise: float = Field(1.0, ge=0)
        r: float = Field(0.5, gt=0, lt=1)

    facts = SamplerFacts(order=2, evaluations=2, stochastic=True, source="k-diffusion")

    def __init__(self, config: DPMppSDESampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The half step's law, then the whole one's given it. Onto the clean image and from pure noise: Euler, with noise."""
        x, level, to, config = state.x, state.level, state.next_level, self.config
        denoised = denoise(x, level)
        if to.sigma == 0 or level.alpha == 0:
            mean, up = self._down(x, denoised, level, to, state)
            return Transition(mean, up, denoised)
        middle = state.levels.between(level.ratio ** (1 - config.r) * to.ratio**config.r)
        half_mean, half_up = self._down(x, denoised, level, middle, state)

        def whole(half: Tensor) -> Transition:
            share = 1 / (2 * config.r)
            mixed = (1 - share) * denoised + share * denoise(half, middle)
            mean, up = self._down(x, mixed, level, to, state)
            if up == 0:
                return Transition(mean, 0.0, mixed)
            length, first = level.ratio - to.ratio, level.ratio - middle.ratio
            drawn = (half - half_mean) / half_up
            known = mean + up * math.sqrt(first / length) * drawn
            return Transition(known, up * math.sqrt(1 - first / length), mixed, interval=(middle.ratio, to.ratio))

        return Transition(half_mean, half_up, interval=(level.ratio, middle.ratio), then=whole)

    def _down(self, x: Tensor, denoised: Tensor, level: Level, to: Level, state: SamplerState) -> tuple[Tensor, float]:
        down, up = ancestral(level, to, self.config.eta)
        below = state.levels.between(down)
        return (to.alpha / below.alpha) * euler(x, denoised, level, below), to.alpha * up * self.config.s_noise
