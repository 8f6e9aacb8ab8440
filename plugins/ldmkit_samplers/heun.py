"""Heun's method with churn: Karras et al. 2022, arXiv:2206.00364, algorithm 2."""

from __future__ import annotations

from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._churn import ChurnConfig, churned
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._two_stage import heun


class HeunSampler(EulerFamily):
    """The trapezoidal rule along the probability flow: second order, two evaluations a step (one onto the clean image, and from
    pure noise). With churn, noise is added before each step, and removed by it.
    """

    class Config(ChurnConfig):
        """Attributes: see `ChurnConfig`."""

    facts = SamplerFacts(order=2, evaluations=2, stochastic=False, source="Karras et al. 2022, arXiv:2206.00364")

    def __init__(self, config: HeunSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step, after the draw of the raised x where there is churn."""

        def step(x: Tensor, level: Level) -> Transition:
            ahead, denoised = heun(denoise, x, level, state.next_level)
            return Transition(ahead, 0.0, denoised)

        return churned(self.config, state, step)
