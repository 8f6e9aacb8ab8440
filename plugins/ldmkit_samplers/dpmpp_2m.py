"""DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, algorithm 2."""

from __future__ import annotations

import math
from typing import Literal

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay, few
from ldmkit_samplers._multistep import remember


class DPMpp2MSampler(DPMFamily):
    """A second-order multistep exponential integrator on x0; one evaluation a step. The first step is of first order, and so
    is the last one of runs under 15 steps, or onto the clean image.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        solver_type: how x0's change is weighed: "midpoint" (the paper's) or "heun"; both are of second order.
        """

        solver_type: Literal["midpoint", "heun"] = "midpoint"

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="Lu et al. 2022, arXiv:2211.01095")

    def __init__(self, config: DPMpp2MSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' = sigma'/sigma x + alpha' (1 - e^-h) (x0 + its change), alg. 2; the history holds x0."""
        level, to = state.level, state.next_level
        denoised = denoise(state.x, level)
        memory = remember(state, denoised, 2)
        kept = decay(level, to)
        x = (to.sigma / level.sigma) * state.x + to.alpha * (1 - kept) * denoised
        last = state.step == state.levels.num_steps - 1
        if len(memory) == 2 and 0 < kept < 1 and not (last and few(state)):
            (_, ratio), (before, ratio_before) = memory
            h, h_before = -math.log(kept), math.log(ratio_before / ratio)
            weight = (1 - kept) / 2 if self.config.solver_type == "midpoint" else 1 - (1 - kept) / h
            x = x + to.alpha * weight * (h / h_before) * (denoised - before)
        return Transition(x, 0.0, denoised, memory)
