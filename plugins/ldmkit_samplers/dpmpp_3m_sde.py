"""DPM-Solver++ (3M SDE): k-diffusion's `sample_dpmpp_3m_sde`."""

from __future__ import annotations

import math

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay, reverse_step
from ldmkit_samplers._multistep import remember, slopes


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
        """As `reverse_step`, and what x0's first and second derivative in log(alpha / sigma) add; the history holds x0."""
        level, to, eta = state.level, state.next_level, self.config.eta
        denoised = denoise(state.x, level)
        memory = remember(state, denoised, 3)
        mean, std = reverse_step(state.x, denoised, level, to, eta)
        kept = decay(level, to)
        if len(memory) > 1 and 0 < kept < 1:
            h = -math.log(kept)
            total = h * (1 + eta)
            phi_2 = math.expm1(-total) / total + 1
            slope, gap = slopes(memory, h)
            change = phi_2 * slope[0]
            if len(memory) == 3:
                bend = (slope[0] - slope[1]) / (gap[0] + gap[1])
                change = change + (phi_2 * gap[0] - (phi_2 / total - 0.5)) * bend
            mean = mean + to.alpha * change
        return Transition(mean, std * self.config.s_noise, denoised, memory, interval=(level.ratio, to.ratio))
