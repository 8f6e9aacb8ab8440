"""PNDM's family (Liu et al. 2022, arXiv:2202.09778): classical rules for even steps in time, with DDIM's step as transfer.

The rules' weights are of fourth order, but the transfer is the rule's only where sigma / alpha is linear in time: elsewhere the
methods are of second order (its theorem 3.2 proves that order).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerState, Transition
from ldmkit.schedule import Schedule
from ldmkit_samplers._base import SpacedSampler
from ldmkit_samplers._multistep import Memory, along_the_flow, noise_in, remember
from ldmkit_samplers._two_stage import euler

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights for even steps in time, newest first (eq. 12)."""


class PNDMFamily(SpacedSampler):
    """DDIM's step by a mean of the last noise estimates; the concrete ones say how a run starts, before there are enough."""

    whole_times = True
    enough: ClassVar[int]
    """Noise estimates from which on the step is the multistep one."""

    def last_level(self, schedule: Schedule) -> Level:
        """The level of t = 0, or clean."""
        return schedule.final_level()

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """1: the noise itself."""
        return 1.0

    @abstractmethod
    def starting(self, denoise: Denoise, state: SamplerState, noise: Tensor) -> Tensor:
        """The noise that one of the first steps goes along, from its estimate at the step's start."""

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step; the history holds estimates of the noise."""
        x, level, to = state.x, state.level, state.next_level
        denoised = denoise(x, level)
        memory: Memory = remember(state, noise_in(x, denoised, level), 4)
        if level.alpha == 0:
            return Transition(euler(x, denoised, level, to), 0.0, denoised, memory)
        if len(memory) < self.enough and to.sigma > 0:
            ahead = transfer(x, self.starting(denoise, state, memory[0][0]), level, to)
        else:
            weights = [(to.ratio - level.ratio) * share for share in ADAMS_BASHFORTH[len(memory) - 1]]
            ahead = along_the_flow(x, level, to, weights, [estimate for estimate, _ in memory])
        return Transition(ahead, 0.0, denoised, memory)


def transfer(x: Tensor, noise: Tensor, level: Level, to: Level) -> Tensor:
    """Eq. 11: DDIM's step along a given noise."""
    return along_the_flow(x, level, to, [to.ratio - level.ratio], [noise])
