"""Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, algorithm 1), as any D allows it."""

from __future__ import annotations

from pydantic import Field

from ldmkit import Config, Denoise, Level, Levels, Sampler, SamplerFacts, SamplerState, Schedule, Transition


class Renoise(Sampler):
    """At each level: estimate the clean latents, then noise them afresh to the next level."""

    class Config(Config):
        """Attributes:
        freshness: share of fresh noise in the next level's noise, 0 (none, and the result is smoother) to 1.
        """

        freshness: float = Field(1.0, ge=0, le=1)

    config: Config
    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="Song et al. 2023, arXiv:2303.01469")

    def levels(self, schedule: Schedule, num_inference_steps: int) -> Levels:
        """Trailing times, then the clean image."""
        times = schedule.timesteps(num_inference_steps, spacing="trailing")
        return Levels([*(schedule.level(t) for t in times), Level(1.0, 0.0, 0.0)])

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """x' = alpha' D(x) + sigma' freshness noise."""
        x0, to = denoise(state.x, state.level), state.next_level
        return Transition(to.alpha * x0, to.sigma * self.config.freshness, x0)
