"""DPM-Solver++ (2M SDE): k-diffusion's `sample_dpmpp_2m_sde`, the stochastic form of Lu et al. 2022, arXiv:2211.01095."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay
from ldmkit_samplers._multistep import remember
from ldmkit_samplers._two_stage import euler


class DPMpp2MSDESampler(DPMFamily):
    """A second-order multistep exponential integrator of the reverse stochastic equation; one evaluation a step."""

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        eta: how much of the reverse equation's noise there is; 0 is dpm++-2m, 1 all of it.
        s_noise: the noise's standard deviation.
        solver_type: how x0's change is weighed, "midpoint" or "heun".
        """

        eta: float = Field(1.0, ge=0)
        s_noise: float = Field(1.0, ge=0)
        solver_type: Literal["midpoint", "heun"] = "midpoint"

    facts = SamplerFacts(order=2, evaluations=1, stochastic=True, source="Lu et al. 2022, arXiv:2211.01095; k-diffusion")

    def __init__(self, config: DPMpp2MSDESampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^(-h - eta h)) (x0 + its change) + noise; the history holds x0."""
        level, to, eta = state.level, state.next_level, self.config.eta
        denoised = denoise(state.x, level)
        memory = remember(state, denoised, 2)
        kept = decay(level, to)
        if kept == 0:
            return Transition(euler(state.x, denoised, level, to), 0.0, denoised, memory)
        h = -math.log(kept)
        total = h * (1 + eta)
        mean = (to.sigma / level.sigma) * math.exp(-eta * h) * state.x - to.alpha * math.expm1(-total) * denoised
        if len(memory) == 2 and h > 0:
            (_, ratio), (before, ratio_before) = memory
            weight = -math.expm1(-total) / 2 if self.config.solver_type == "midpoint" else 1 + math.expm1(-total) / total
            mean = mean + to.alpha * weight * (h / math.log(ratio_before / ratio)) * (denoised - before)
        std = to.sigma * math.sqrt(-math.expm1(-2 * eta * h)) * self.config.s_noise
        return Transition(mean, std, denoised, memory, interval=(level.ratio, to.ratio))
