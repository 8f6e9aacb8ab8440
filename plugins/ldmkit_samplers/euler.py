"""Euler with churn: Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its second-order correction."""

from __future__ import annotations

from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._churn import ChurnConfig, churned
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._two_stage import euler


class EulerSampler(EulerFamily):
    """Follows the probability flow dx / d ratio = (x - D(x)) / ratio in straight steps, also along a flow-matching model's
    path; draws nothing, unless there is churn.
    """

    class Config(ChurnConfig):
        """Attributes: see `ChurnConfig`."""

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="Karras et al. 2022, arXiv:2206.00364")

    def __init__(self, config: EulerSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' = D + (ratio' / ratio) (x - D) in the origin's coordinates, which is DDIM with eta 0."""

        def step(x: Tensor, level: Level) -> Transition:
            denoised = denoise(x, level)
            return Transition(euler(x, denoised, level, state.next_level), 0.0, denoised)

        return churned(self.config, state, step)
