"""PLMS: the pseudo linear multistep part of PNDM (Liu et al. 2022, arXiv:2202.09778), Stable Diffusion's first sampler."""

from __future__ import annotations

from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit.schedule import Schedule
from ldmkit_samplers._base import SamplerConfig, SpacedSampler
from ldmkit_samplers._multistep import noise_in, remember
from ldmkit_samplers._two_stage import euler

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights for even steps in time, newest first (eq. 12)."""


class PLMSSampler(SpacedSampler):
    """DDIM's step by a fourth-order mean of the last noise estimates. The first step takes two evaluations (Heun's rule)."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`. The weights are those of evenly
            spaced times; with others the order is lost.
        """

    facts = SamplerFacts(order=4, evaluations=1, stochastic=False, source="Liu et al. 2022, arXiv:2202.09778")
    whole_times = True

    def __init__(self, config: PLMSSampler.Config) -> None:
        super().__init__(config)

    def last_level(self, schedule: Schedule) -> Level:
        """The level of t = 0, or clean."""
        return schedule.final_level()

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """1: the noise itself."""
        return 1.0

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step; the history holds estimates of the noise."""
        x, level, to = state.x, state.level, state.next_level
        denoised = denoise(x, level)
        memory = remember(state, noise_in(x, denoised, level), 4)
        if level.alpha == 0:
            return Transition(euler(x, denoised, level, to), 0.0, denoised, memory)
        if len(memory) > 1 or to.sigma == 0:
            weights = ADAMS_BASHFORTH[len(memory) - 1]
            noise = sum((w * e for w, (e, _) in zip(weights, memory, strict=True)), start=x * 0)
        else:
            ahead = _transfer(x, memory[0][0], level, to)
            noise = (memory[0][0] + noise_in(ahead, denoise(ahead, to), to)) / 2
        return Transition(_transfer(x, noise, level, to), 0.0, denoised, memory)


def _transfer(x: Tensor, noise: Tensor, level: Level, to: Level) -> Tensor:
    """Eq. 11: DDIM's step along a given noise."""
    return (to.alpha / level.alpha) * x + (to.sigma - to.alpha * level.ratio) * noise
