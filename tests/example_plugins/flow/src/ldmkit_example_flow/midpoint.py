"""The midpoint rule along the flow of a flow-matching model (Lipman et al. 2023, arXiv:2210.02747, sec. 3).

With z = (1 - s) x0 + s noise the flow is dz/ds = noise - x0 = (z - D) / s. Any other x = alpha x0 + sigma noise is such a z
times alpha + sigma, with s = sigma / (alpha + sigma), so that models of every schedule can be sampled.
"""

from __future__ import annotations

import ldmkit
from ldmkit import Denoise, Level, Levels, Sampler, SamplerFacts, SamplerState, Transition
from ldmkit.schedule import Schedule


class FlowMidpoint(Sampler):
    """Half a step for the velocity in the middle, then the whole step with it; two evaluations, second order. Draws nothing."""

    class Config(ldmkit.Config):
        """Nothing to set."""

    facts = SamplerFacts(order=2, evaluations=2, stochastic=False, source="Lipman et al. 2023, arXiv:2210.02747")

    def levels(self, schedule: Schedule, num_inference_steps: int) -> Levels:
        """The schedule's own times, then the clean image. Raises: InputError, as `Schedule.timesteps`."""
        times = schedule.timesteps(num_inference_steps)
        return Levels([*(schedule.level(t) for t in times), Level(1.0, 0.0, 0.0)], at=schedule.at)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """z' = z + (s' - s) v((s + s') / 2)."""
        here, to = state.level, state.next_level
        s, s_to = _share(here), _share(to)
        s_middle = 0.5 * (s + s_to)
        middle = state.levels.between(s_middle / (1 - s_middle))
        z = state.x / _size(here)
        z_middle = z + (s_middle - s) * (z - denoise(state.x, here)) / s
        x0 = denoise(z_middle * _size(middle), middle)
        return Transition(_size(to) * (z + (s_to - s) * (z_middle - x0) / s_middle), 0.0, x0)


def _size(level: Level) -> float:
    return level.alpha + level.sigma


def _share(level: Level) -> float:
    return level.sigma / _size(level)
