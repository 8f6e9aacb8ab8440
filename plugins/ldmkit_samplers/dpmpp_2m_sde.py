"""DPM-Solver++ (2M SDE): k-diffusion's `sample_dpmpp_2m_sde`, the stochastic form of Lu et al. 2022, arXiv:2211.01095."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay, reverse_step
from ldmkit_samplers._multistep import remember


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
        """As `reverse_step`, of x0 + its change in place of x0; the history holds x0."""
        level, to, eta = state.level, state.next_level, self.config.eta
        denoised = denoise(state.x, level)
        memory = remember(state, denoised, 2)
        mean, std = reverse_step(state.x, denoised, level, to, eta)
        kept = decay(level, to)
        if len(memory) == 2 and 0 < kept < 1:
            h = -math.log(kept)
            total = h * (1 + eta)
            (_, ratio), (before, ratio_before) = memory
            weight = -math.expm1(-total) / 2 if self.config.solver_type == "midpoint" else 1 + math.expm1(-total) / total
            mean = mean + to.alpha * weight * (h / math.log(ratio_before / ratio)) * (denoised - before)
        return Transition(mean, std * self.config.s_noise, denoised, memory, interval=(level.ratio, to.ratio))
