"""The midpoint rule along the flow of a flow-matching model (Lipman et al. 2023, arXiv:2210.02747, sec. 3).

With x = (1 - s) x0 + s noise the flow is dx/ds = noise - x0 = (x - D(x, s)) / s.
"""

from __future__ import annotations

from torch import Tensor

import ldmkit
from ldmkit import Denoise, InputError, Level, Levels, Sampler, SamplerFacts, SamplerState, Transition
from ldmkit.schedule import Schedule


class FlowMidpoint(Sampler):
    """Half a step for the velocity in the middle, then the whole step with it; two evaluations, second order. Draws nothing."""

    class Config(ldmkit.Config):
        """Nothing to set."""

    facts = SamplerFacts(order=2, evaluations=2, stochastic=False, source="Lipman et al. 2023, arXiv:2210.02747")

    def levels(self, schedule: Schedule, num_inference_steps: int) -> Levels:
        """The schedule's own times, then the clean image.

        Raises:
            InputError: for a schedule that is no flow, alpha + sigma = 1.
        """
        levels = [schedule.level(t) for t in schedule.timesteps(num_inference_steps)]
        for level in levels:
            if abs(level.alpha + level.sigma - 1) > 1e-9:
                raise InputError(
                    f"FlowMidpoint follows flows, alpha + sigma = 1; at t = {level.t:g} alpha = {level.alpha:g}; "
                    "use a FlowSchedule, or another sampler"
                )
        return Levels([*levels, Level(1.0, 0.0, 0.0)], at=schedule.at)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' = x + (s' - s) v((s + s') / 2)."""
        x, here, to = state.x, state.level, state.next_level
        middle = 0.5 * (here.sigma + to.sigma)
        x_middle = x + (middle - here.sigma) * _velocity(denoise, x, here)
        level = state.levels.between(middle / (1 - middle))
        velocity = _velocity(denoise, x_middle, level)
        return Transition(x + (to.sigma - here.sigma) * velocity, 0.0, x_middle - middle * velocity)


def _velocity(denoise: Denoise, x: Tensor, level: Level) -> Tensor:
    return (x - denoise(x, level)) / level.sigma
