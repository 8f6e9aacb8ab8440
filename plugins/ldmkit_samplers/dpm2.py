"""DPM-Solver-2 in Karras' coordinates: k-diffusion's `sample_dpm_2` (Karras et al. 2022, app. D.2; Lu et al. 2022, alg. 1)."""

from __future__ import annotations

import math

from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._churn import ChurnConfig, churned
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._multistep import along_the_flow, noise_in
from ldmkit_samplers._two_stage import euler


class DPM2Sampler(EulerFamily):
    """The midpoint rule along the probability flow, the midpoint being that of log(sigma / alpha): second order, two
    evaluations a step (one onto the clean image, and from pure noise). With churn, noise is added before each step.
    """

    class Config(ChurnConfig):
        """Attributes: see `ChurnConfig`."""

    facts = SamplerFacts(order=2, evaluations=2, stochastic=False, source="k-diffusion; Karras et al. 2022, arXiv:2206.00364")

    def __init__(self, config: DPM2Sampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step, after the draw of the raised x where there is churn."""
        to = state.next_level

        def step(x: Tensor, level: Level) -> Transition:
            denoised = denoise(x, level)
            if to.sigma == 0 or level.alpha == 0:
                return Transition(euler(x, denoised, level, to), 0.0, denoised)
            middle = state.levels.between(math.sqrt(level.ratio * to.ratio))
            x_middle = euler(x, denoised, level, middle)
            denoised_middle = denoise(x_middle, middle)
            noise = noise_in(x_middle, denoised_middle, middle)
            return Transition(along_the_flow(x, level, to, [to.ratio - level.ratio], [noise]), 0.0, denoised_middle)

        return churned(self.config, state, step)
