"""DEIS: Zhang and Chen 2023, arXiv:2204.13902, with the polynomial in log(sigma / alpha) (rho-AB in log rho)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, few, phi
from ldmkit_samplers._multistep import along_the_flow, lagrange_weights, noise_in, remember
from ldmkit_samplers._two_stage import euler


class DEISSampler(DPMFamily):
    """Takes the noise to be a polynomial in log(sigma / alpha), and integrates it exactly; one evaluation a step.

    The first steps have lower orders; so have the last ones of runs under 15 steps, and the one onto the clean image.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        order: 1 (DDIM) to 3.
        """

        order: int = Field(2, ge=1, le=3)
        final_sigmas_type: Literal["zero", "sigma_min"] = "sigma_min"

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="Zhang and Chen 2023, arXiv:2204.13902")

    def __init__(self, config: DEISSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step (eq. 15); the history holds estimates of the noise."""
        level, to = state.level, state.next_level
        denoised = denoise(state.x, level)
        memory = remember(state, noise_in(state.x, denoised, level), self.config.order)
        left = state.levels.num_steps - state.step
        order = min(len(memory), left) if few(state) else len(memory)
        if order == 1 or to.sigma == 0 or level.alpha == 0:
            return Transition(euler(state.x, denoised, level, to), 0.0, denoised, memory)
        ratios = [ratio for _, ratio in memory[:order]]
        x = along_the_flow(state.x, level, to, _weights(ratios, to.ratio), [estimate for estimate, _ in memory[:order]])
        return Transition(x, 0.0, denoised, memory)


def _weights(ratios: list[float], to: float) -> list[float]:
    """Integrals over r from ratios[0] to `to` of the Lagrange polynomials in u = log(r / ratios[0]) through `ratios`.

    With dr = r du that of u^k is `to` u'^(k+1) k! phi_(k+1)(-u'), u' = log(to / ratios[0]).
    """
    nodes, end = [math.log(ratio / ratios[0]) for ratio in ratios], math.log(to / ratios[0])
    moments = [to * end ** (k + 1) * math.factorial(k) * phi(k + 1, -end) for k in range(len(nodes))]
    return lagrange_weights(nodes, moments)
