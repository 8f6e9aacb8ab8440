"""DPM-Solver++(3M): Lu et al. 2022, arXiv:2211.01095, algorithm 2 with one estimate more, as its authors' code has it."""

from __future__ import annotations

import math
from typing import Literal

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay, few
from ldmkit_samplers._multistep import remember, slopes


class DPMpp3MSampler(DPMFamily):
    """A multistep exponential integrator on x0 by three estimates; one evaluation a step. The first steps are of lower orders,
    and so are the last ones of runs under 15 steps, or onto the clean image.

    As published, the second derivative's term has half the weight that third order needs: its order is two, with a small error.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        solver_type: how steps by two estimates weigh x0's change: "midpoint" or "heun".
        """

        solver_type: Literal["midpoint", "heun"] = "midpoint"

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="Lu et al. 2022, arXiv:2211.01095")

    def __init__(self, config: DPMpp3MSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' = sigma'/sigma x + alpha' ((1 - e^-h) x0 + phi_2 x0' - phi_3 x0''), derivatives in units of h; it remembers x0."""
        level, to = state.level, state.next_level
        denoised = denoise(state.x, level)
        memory = remember(state, denoised, 3)
        kept = decay(level, to)
        x = (to.sigma / level.sigma) * state.x + to.alpha * (1 - kept) * denoised
        left = state.levels.num_steps - state.step
        order = min(len(memory), left) if few(state) else len(memory)
        if order == 1 or not 0 < kept < 1:
            return Transition(x, 0.0, denoised, memory)
        h = -math.log(kept)
        slope, gap = slopes(memory[:order], h)
        phi_2 = 1 - (1 - kept) / h
        if order == 2:
            weight = (1 - kept) / 2 if self.config.solver_type == "midpoint" else phi_2
            return Transition(x + to.alpha * weight * slope[0], 0.0, denoised, memory)
        bend = (slope[0] - slope[1]) / (gap[0] + gap[1])
        x = x + to.alpha * (phi_2 * (slope[0] + gap[0] * bend) - (phi_2 / h - 0.5) * bend)
        return Transition(x, 0.0, denoised, memory)
