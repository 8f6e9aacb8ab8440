"""Laws that samplers are held against: the flow of a mixture, the variance of a Gaussian, densities by change of variables."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmkit.denoised import Denoised
from ldmkit.interfaces import Denoise, Level, Levels, Noise, Sampler, SamplerState
from ldmkit.schedule import NoiseSchedule, vp_level

HIGH, LOW = 3.0, 0.6
CENTRES, WIDTH = (-1.0, 1.0), 0.4
BEFORE = AFTER = 4
"""Steps around the measured ones, so that what a method does at the ends of a run is out of sight."""


def pause() -> None:
    """Lets other threads go first."""
    time.sleep(0)


def told(sampler: Sampler, denoise: Denoise) -> Denoise:
    """D as the sampler takes it: with a variance beside x0, somewhere between its bounds, where it asks for one."""
    if not sampler.takes_variance:
        return denoise

    def both(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(x, level)
        return Denoised.of(x0, 0.5 + 0.4 * torch.tanh(x0))

    return both


# -------------------------------------------------------------------------------------------------------- order of convergence


def mixture(x: Tensor, level: Level) -> Tensor:
    """D of equal parts of N(centre, WIDTH^2)."""
    z, variance = x / level.alpha, WIDTH**2 + level.ratio**2
    weights = torch.softmax(torch.stack([-((z - c) ** 2) / (2 * variance) for c in CENTRES]), dim=0)
    return (weights * torch.stack([c + WIDTH**2 / variance * (z - c) for c in CENTRES])).sum(dim=0)


def _share_below(z: Tensor, ratio: float) -> Tensor:
    width = math.hypot(WIDTH, ratio)
    parts = [torch.special.ndtr((z - c) / width) for c in CENTRES]
    return sum(parts, start=torch.zeros_like(z)) / len(CENTRES)


SHARES = torch.tensor([0.06, 0.21, 0.37, 0.55, 0.7, 0.88], dtype=torch.float64).view(1, 1, 1, -1)


def on_the_flow(ratio: float) -> Tensor:
    """Where the flow leads at a ratio, in x / alpha. In one dimension it keeps quantiles, so no equation need be solved."""
    low, high = torch.full_like(SHARES, -30.0), torch.full_like(SHARES, 30.0)
    for _ in range(100):
        middle = (low + high) / 2
        below = _share_below(middle, ratio) < SHARES
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def flow_error(sampler: Sampler, n: int) -> float:
    """After n steps from HIGH to LOW (from LOW up, where levels rise), even in sigma / alpha if the sampler takes them so. The
    first are told the exact latents, so that a multistep method begins with an exact memory.
    """
    step = (HIGH - LOW) / n
    ratios = [HIGH + (BEFORE - i) * step for i in range(BEFORE + n + AFTER + 1)]
    falling = Levels([_in_time(r) for r in ratios], at=_in_time, at_time=lambda t: vp_level(t / 100, t))
    levels = _its_way(sampler, falling)
    state = SamplerState(x=_exact(levels[0]), levels=levels)
    while state.step < BEFORE + n:
        state = sampler.step(mixture, state, _Silence(state.x))
        if state.step <= BEFORE:
            state = SamplerState(x=_exact(state.level), levels=state.levels, step=state.step, history=state.history)
    return float((state.x - _exact(state.level)).abs().max()) / state.level.alpha


def _exact(level: Level) -> Tensor:
    return level.alpha * on_the_flow(level.ratio)


def _its_way(sampler: Sampler, falling: Levels) -> Levels:
    """The levels from an image up, where that is the sampler's way."""
    return falling.reversed() if sampler.levels(NoiseSchedule(), 2).rising else falling


def _in_time(ratio: float) -> Level:
    """Times go with sigma / alpha."""
    return vp_level(ratio, 100 * ratio)


class _Silence:
    """No noise."""

    def __init__(self, like: Tensor) -> None:
        self._like = like

    def __call__(self) -> Tensor:
        return torch.zeros_like(self._like)

    def between(self, high: float, low: float) -> Tensor:
        return torch.zeros_like(self._like)


class Counting(_Silence):
    """No noise, and the number of draws."""

    def __init__(self, like: Tensor, draws: list[int]) -> None:
        super().__init__(like)
        self._draws = draws

    def __call__(self) -> Tensor:
        self._draws[0] += 1
        return super().__call__()

    def between(self, high: float, low: float) -> Tensor:
        self._draws[0] += 1
        return super().between(high, low)


# ------------------------------------------------------------------------------------------------------- variance on a Gaussian


def variance_error(sampler: Sampler, n: int, spread: float, *, consistency: bool) -> float:
    """How far the variance is off after n steps, as a part of itself.

    D of a Gaussian is linear, so x is a sum of draws with coefficients. Each draw gets an element of the latents to itself:
    what stands there in the end is its coefficient, and the variance follows without any sampling.
    """
    levels = _even(sampler, n)
    elements = 64 * n
    draws = _OneByOne(elements)
    x = torch.zeros(1, 1, 1, elements, dtype=torch.float64)
    x[..., 0] = math.sqrt(_variance(levels[0], spread))
    state = SamplerState(x=x, levels=levels)
    denoise = _consistency_function(spread) if consistency else _posterior_mean(spread)
    while not state.done:
        state = sampler.step(told(sampler, denoise), state, draws)
    coefficients = state.x.flatten()[: draws.count + 1].numpy()
    variance = float(coefficients @ draws.covariance() @ coefficients)
    want = _variance(levels[-1], spread)
    return abs(variance - want) / want


def ray_error(sampler: Sampler, n: int, x0: Tensor, noise: Tensor) -> float:
    """How far a run of n steps is off alpha x0 + sigma noise in the end, where all data is x0."""
    levels = _even(sampler, n)
    state = SamplerState(x=levels[0].alpha * x0 + levels[0].sigma * noise, levels=levels)
    while not state.done:
        state = sampler.step(told(sampler, lambda x, level: x0), state, _Silence(state.x))
    return float((state.x - levels[-1].alpha * x0 - levels[-1].sigma * noise).abs().max())


def _even(sampler: Sampler, n: int) -> Levels:
    """n steps, even in log(sigma / alpha)."""
    schedule = NoiseSchedule()
    levels = [schedule.at(ratio) for ratio in np.geomspace(14.0, 0.06, n + 1).tolist()]
    return _its_way(sampler, Levels(levels, at=schedule.at, at_time=schedule.level))


def _variance(level: Level, spread: float) -> float:
    return level.alpha**2 * spread**2 + level.sigma**2


def _posterior_mean(spread: float) -> Denoise:
    return lambda x, level: level.alpha * spread**2 / _variance(level, spread) * x


def _consistency_function(spread: float) -> Denoise:
    """Where the flow from x ends."""
    return lambda x, level: spread / math.sqrt(_variance(level, spread)) * x


class _OneByOne:
    """Draw k is 1 at element k, 0 elsewhere."""

    def __init__(self, elements: int) -> None:
        self.count = 0
        self._elements = elements
        self._intervals: list[tuple[float, float] | None] = []

    def __call__(self) -> Tensor:
        return self._next(None)

    def between(self, high: float, low: float) -> Tensor:
        return self._next((high, low))

    def _next(self, interval: tuple[float, float] | None) -> Tensor:
        self.count += 1
        assert self.count < self._elements, f"a step draws noise more than {self._elements} times in a run"
        self._intervals.append(interval)
        draw = torch.zeros(1, 1, 1, self._elements, dtype=torch.float64)
        draw[..., self.count] = 1.0
        return draw

    def covariance(self) -> Any:
        """Of the start and all draws: increments of one motion over overlapping intervals are correlated."""
        matrix = np.eye(self.count + 1)
        for i, a in enumerate(self._intervals, start=1):
            for j, b in enumerate(self._intervals[: i - 1], start=1):
                if a is not None and b is not None:
                    shared = max(0.0, min(a[0], b[0]) - max(a[1], b[1]))
                    matrix[i, j] = matrix[j, i] = shared / math.sqrt((a[0] - a[1]) * (b[0] - b[1]))
        return matrix


# -------------------------------------------------------------------------------------------------------------------- densities


class Traced:
    """Noise that autograd follows."""

    def __init__(self, source: Noise) -> None:
        self.draws: list[Tensor] = []
        self._source = source

    def __call__(self) -> Tensor:
        return self._kept(self._source())

    def between(self, high: float, low: float) -> Tensor:
        return self._kept(self._source.between(high, low))

    def _kept(self, draw: Tensor) -> Tensor:
        self.draws.append(draw.requires_grad_())
        return self.draws[-1]


def density_B(drawn: Sequence[Tensor], noises: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """log density of what was drawn, (B,), from that of the noise behind it and the slope from one to the other; and whether
    any of it was left to chance.
    """
    total, left, chance = drawn[-1].new_zeros(len(drawn[-1])), list(noises), False
    for y in drawn:
        if not left or not y.requires_grad:
            continue
        slope: Tensor | None = torch.autograd.grad(y.sum(), left[0], retain_graph=True, allow_unused=True)[0]
        if slope is None:
            continue
        noise = left.pop(0)
        if not bool((slope != 0).any()):
            continue
        chance = True
        elementwise = -0.5 * (noise * noise + math.log(2 * math.pi)) - torch.log(slope.abs())
        total = total + elementwise.flatten(1).sum(dim=1)
    return total.detach(), chance


def detached(value: Any) -> Any:
    """The same nested tuples, outside any graph."""
    if isinstance(value, tuple):
        return tuple(detached(item) for item in value)
    return value.detach() if isinstance(value, Tensor) else value
