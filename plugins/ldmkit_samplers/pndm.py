"""PNDM: Liu et al. 2022, arXiv:2202.09778, F-PNDM: three steps of a pseudo Runge-Kutta method, then linear multistep."""

from __future__ import annotations

from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._multistep import noise_in
from ldmkit_samplers._pndm import PNDMFamily, transfer


class PNDMSampler(PNDMFamily):
    """As plms, but the first three steps take four evaluations each, by the classical Runge-Kutta rule in time."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`. The weights are those of evenly
            spaced times; with others the order is lost.
        """

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="Liu et al. 2022, arXiv:2202.09778")
    enough = 4

    def __init__(self, config: PNDMSampler.Config) -> None:
        super().__init__(config)

    def starting(self, denoise: Denoise, state: SamplerState, noise: Tensor) -> Tensor:
        """Eq. 13: noise at the start, twice in the middle of the times, and at the end."""
        x, level, to = state.x, state.level, state.next_level
        middle = state.levels.between_times((level.t + to.t) / 2)

        def at(place: Level, along: Tensor) -> Tensor:
            ahead = transfer(x, along, level, place)
            return noise_in(ahead, denoise(ahead, place), place)

        second = at(middle, noise)
        third = at(middle, second)
        return (noise + 2 * second + 2 * third + at(to, third)) / 6
