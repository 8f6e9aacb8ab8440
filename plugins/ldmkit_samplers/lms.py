"""LMS: linear multistep (Adams-Bashforth) in sigma / alpha, k-diffusion's `sample_lms`."""

from __future__ import annotations

from pydantic import Field

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._multistep import along_the_flow, lagrange_weights, noise_in, remember
from ldmkit_samplers._two_stage import euler


class LMSSampler(EulerFamily):
    """Integrates the polynomial in sigma / alpha through the last estimates of the noise (Hairer, Norsett and Wanner 1993,
    sec. III.1); one evaluation a step. The first steps of a run have lower orders.
    """

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        order: 1 (Euler) to 4.
        """

        order: int = Field(4, ge=1, le=4)

    facts = SamplerFacts(order=4, evaluations=1, stochastic=False, source="k-diffusion")

    def __init__(self, config: LMSSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step; the history holds estimates of the noise."""
        level, to = state.level, state.next_level
        denoised = denoise(state.x, level)
        memory = remember(state, noise_in(state.x, denoised, level), self.config.order)
        if level.alpha == 0:
            return Transition(euler(state.x, denoised, level, to), 0.0, denoised, memory)
        nodes, length = [ratio - level.ratio for _, ratio in memory], to.ratio - level.ratio
        weights = lagrange_weights(nodes, [length ** (k + 1) / (k + 1) for k in range(len(nodes))])
        x = along_the_flow(state.x, level, to, weights, [estimate for estimate, _ in memory])
        return Transition(x, 0.0, denoised, memory)
