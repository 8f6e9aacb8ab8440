"""PLMS: the pseudo linear multistep part of PNDM (Liu et al. 2022, arXiv:2202.09778), Stable Diffusion's first sampler."""

from __future__ import annotations

from torch import Tensor

from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._multistep import noise_in
from ldmkit_samplers._pndm import PNDMFamily, transfer


class PLMSSampler(PNDMFamily):
    """DDIM's step by a mean of the last four noise estimates. The first step takes two evaluations (Heun's rule)."""

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`. The weights are those of evenly
            spaced times; with others the order is lost.
        """

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="Liu et al. 2022, arXiv:2202.09778")
    enough = 2

    def __init__(self, config: PLMSSampler.Config) -> None:
        super().__init__(config)

    def starting(self, denoise: Denoise, state: SamplerState, noise: Tensor) -> Tensor:
        """Heun's rule: the mean of the noise at both ends."""
        to = state.next_level
        ahead = transfer(state.x, noise, state.level, to)
        return (noise + noise_in(ahead, denoise(ahead, to), to)) / 2
