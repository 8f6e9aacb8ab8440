"""Restart sampling: Xu et al. 2023, arXiv:2306.14878, algorithm 1, around Heun's method."""

from __future__ import annotations

import math
from itertools import pairwise

from pydantic import Field, model_validator
from torch import Tensor

from ldmkit.config import Config
from ldmkit.interfaces import Denoise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._euler import EulerFamily
from ldmkit_samplers._two_stage import heun


class Interval(Config):
    """Attributes:
    low, high: sigma / alpha at the interval's ends.
    repeats: how often the run is thrown back from `low` to `high`.
    steps: Heun steps down again, each time.
    """

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    repeats: int = Field(1, ge=1)
    steps: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _rises(self) -> Interval:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low:g}, high = {self.high:g}: a restart goes up from low to high; low must be below")
        return self


class RestartSampler(EulerFamily):
    """Heun's method; where a step first reaches an interval's lower end, noise back up to its upper end and down again,
    repeatedly: the noise contracts the errors made before.
    """

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`.
        intervals: where to restart. The default suits Stable Diffusion (its table 3 has more for other models).
        """

        intervals: tuple[Interval, ...] = (Interval(low=0.14, high=0.30, repeats=2, steps=4),)

    facts = SamplerFacts(order=2, evaluations=2, stochastic=True, source="Xu et al. 2023, arXiv:2306.14878")

    def __init__(self, config: RestartSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """Heun's step, then for every repeat a draw up and `steps` steps down."""
        level, to = state.level, state.next_level
        x, denoised = heun(denoise, state.x, level, to)
        repeats: list[Interval] = []
        for interval in self.config.intervals:
            if to.sigma > 0 and to.ratio <= interval.low < level.ratio and to.ratio < interval.high:
                repeats += [interval] * interval.repeats
        return self._from(denoise, state, x, denoised, repeats)

    def _from(self, denoise: Denoise, state: SamplerState, x: Tensor, denoised: Tensor, repeats: list[Interval]) -> Transition:
        to = state.next_level
        if not repeats:
            return Transition(x, 0.0, denoised)
        interval, *rest = repeats
        up = state.levels.between(interval.high)

        def down(raised: Tensor) -> Transition:
            here, estimate = raised, denoised
            levels = [up, *(state.levels.between(r) for r in _inner(interval.high, to.ratio, interval.steps)), to]
            for a, b in pairwise(levels):
                here, estimate = heun(denoise, here, a, b)
            return self._from(denoise, state, here, estimate, rest)

        std = up.alpha * math.sqrt((interval.high - to.ratio) * (interval.high + to.ratio))
        return Transition((up.alpha / to.alpha) * x, std, then=down)


def _inner(high: float, low: float, steps: int, rho: float = 7.0) -> list[float]:
    """The ratios between, spaced as Karras et al. 2022, eq. 5."""
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + (b - a) * i / steps) ** rho for i in range(1, steps)]
