"""TCD: sampling of trajectory consistency models (Zheng et al. 2024, arXiv:2402.19159, algorithm 4)."""

from __future__ import annotations

import math

from pydantic import Field

from ldmkit.continuous import EDMSchedule
from ldmkit.errors import InputError
from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit.schedule import Schedule
from ldmkit_samplers._distilled import DistilledConfig, DistilledSampler
from ldmkit_samplers._gaussian import ddim


class TCDSampler(DistilledSampler):
    """A step along the trajectory to before the next time, then the forward process up to it ("strategic stochastic sampling");
    few steps (2 to 20). A run ends at t = 0.
    """

    class Config(DistilledConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, original_inference_steps: which levels a run visits; see `DistilledConfig`.
        eta: the paper's gamma: 0 is DDIM's deterministic step, 1 goes down to t = 0 and all the way back up, as `lcm`.
        """

        eta: float = Field(0.3, ge=0, le=1)

    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="Zheng et al. 2024, arXiv:2402.19159")

    def __init__(self, config: TCDSampler.Config) -> None:
        super().__init__(config)

    def last_level(self, schedule: Schedule) -> Level:
        """The level of t = 0. Raises: InputError for a schedule whose times do not begin there."""
        if isinstance(schedule, EDMSchedule):
            raise InputError("tcd goes by times from 0 up, and those of an EDMSchedule are logarithms; take another sampler")
        return schedule.level(0)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' ~ N((alpha' / alpha_s) x_s, ...): DDIM's x_s at the whole time s at or before (1 - eta) t', and q(x' | x_s)."""
        level, to = state.level, state.next_level
        below = state.levels.between_times(math.floor((1 - self.config.eta) * to.t))
        if below.ratio > to.ratio:  # a run that ends below t = 0, by `sigmas`
            below = to
        denoised = denoise(state.x, level)
        law, kept = ddim(level, below, 0.0), to.alpha / below.alpha
        std = math.sqrt((to.sigma - kept * below.sigma) * (to.sigma + kept * below.sigma)) if below != to else 0.0
        return Transition(kept * (law.on_x * state.x + law.on_x0 * denoised), std, denoised)
