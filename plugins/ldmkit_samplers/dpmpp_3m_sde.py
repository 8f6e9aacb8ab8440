"""DPM-Solver++ (3M SDE): k-diffusion's `sample_dpmpp_3m_sde`."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay
from ldmkit_samplers._multistep import remember
from ldmkit_samplers._two_stage import euler


class DPMpp3MSDESampler(DPMFamily):
    """A multistep exponential integrator of the reverse stochastic equation, by three estimates; one evaluation a step.

    As published, the second derivative's term has half the weight that third order needs: its order is two, with a small error.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        eta: how much of the reverse equation's noise there is; 0 is deterministic, 1 all of it.
        s_noise: the noise's standard deviation.
        """

        eta: float = Field(1.0, ge=0)
        s_noise: float = Field(1.0, ge=0)

    facts = SamplerFacts(order=2, evaluations=1, stochastic=True, source="k-diffusion")

    def __init__(self, config: DPMpp3MSDESampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """As dpm++-2m-sde's, with x0's first and second derivative in log(alpha / sigma); the history holds x0."""
        level, to, eta = state.level, state.next_level, self.config.eta
        denoised = denoise(state.x, level)
        memory = remember(state, denoised, 3)
        kept = decay(level, to)
        if kept == 0:
            return Transition(euler(state.x, denoised, level, to), 0.0, denoised, memory)
        h = -math.log(kept)
        total = h * (1 + eta)
        mean = (to.sigma / level.sigma) * math.exp(-eta * h) * state.x - to.alpha * math.expm1(-total) * denoised
        if len(memory) > 1 and h > 0:
            phi_2 = math.expm1(-total) / total + 1
            estimates, ratios = zip(*memory, strict=True)
            gaps = [math.log(b / a) / h for a, b in pairwise(ratios)]
            slopes = [
                (a - b) / gap for a, b, gap in ((*pair, gap) for pair, gap in zip(pairwise(estimates), gaps, strict=True))
            ]
            change = phi_2 * slopes[0]
            if len(memory) == 3:
                bend = (slopes[0] - slopes[1]) / (gaps[0] + gaps[1])
                change = change + (phi_2 * gaps[0] - (phi_2 / total - 0.5)) * bend
            mean = mean + to.alpha * change
        std = to.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * self.config.s_noise
        return Transition(mean, std, denoised, memory, interval=(level.ratio, to.ratio))
