"""Where runs of every sampler end, on data whose D is known: the mean exactly, the distribution by a statistical test."""

import dataclasses
import math

import pytest
import torch
from torch.special import ndtr

from ldmkit import NoiseSchedule, available, build

NAMES = available("sampler")
CONSISTENCY = ("consistency", "lcm")
SCHEDULE = NoiseSchedule(NoiseSchedule.Config(timestep_spacing="trailing"))


class Silence:
    """No noise."""

    def __call__(self):
        return torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def between(self, high, low):
        return self()


NO_MEAN = {"ddim-inverse": "it asks D at the level that it goes to, of x at the one before: exact in the limit of many steps"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_MEAN])
def test_the_mean_is_kept(name):
    """On Gaussian data D maps mean to mean, at every level: steps are affine, so the mean of all runs is that without noise."""
    mean, spread = 0.7, 0.5
    sampler = build("sampler", name, **({"timestep_scaling": 0.0} if name == "lcm" else {}))  # D itself is f
    levels = sampler.levels(SCHEDULE, 10)

    def denoise(x, level):
        variance = level.alpha**2 * spread**2 + level.sigma**2
        return mean + level.alpha * spread**2 / variance * (x - level.alpha * mean)

    start = torch.full((1, 1, 1, 1), mean, dtype=torch.float64)
    state = dataclasses.replace(sampler.init(start, levels, start=start), x=levels[0].alpha * start)
    while not state.done:
        state = sampler.step(denoise, state, Silence())
    # Rounding: some eps a step, and as much again for each division by a small alpha.
    assert float(state.x) == pytest.approx(state.level.alpha * mean, abs=1000 * 2.0**-52)


# ------------------------------------------------------------------------------------------------------------ a mixture

CENTRES, SHARES, WIDTH = torch.tensor([-1.0, 0.8], dtype=torch.float64).view(2, 1), torch.tensor([[0.3], [0.7]]), 0.3
COUNT = 4000


def share_below(x, alpha, sigma):
    """The distribution of x = alpha x0 + sigma noise, at each of x."""
    return (SHARES * ndtr((x.flatten() - alpha * CENTRES) / math.hypot(alpha * WIDTH, sigma))).sum(dim=0).view(x.shape)


def posterior_mean(x, level):
    variance = (level.alpha * WIDTH) ** 2 + level.sigma**2
    off = x.flatten() - level.alpha * CENTRES
    weights = torch.softmax(torch.log(SHARES) - off**2 / (2 * variance), dim=0)
    return (weights * (CENTRES + level.alpha * WIDTH**2 / variance * off)).sum(dim=0).view(x.shape)


def end_of_the_flow(x, level):
    """A consistency function: the flow keeps quantiles, so it is the data's quantile at x's."""
    below = share_below(x, level.alpha, level.sigma)
    low, high = torch.full_like(x, -4.0), torch.full_like(x, 4.0)
    for _ in range(50):
        middle = (low + high) / 2
        short = share_below(middle, 1.0, 0.0) < below
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (low + high) / 2


STEPS = {"ddpm": 1000, "consistency": 4, "lcm": 4}
TOLD = {"tcd": {"eta": 0.0, "original_inference_steps": 200}}  # else it wants a model of jumps to before the next level


class Draws:
    """New noise each time. A motion's increments are independent, for no two steps share a part of it."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self):
        return torch.randn(1, 1, 1, COUNT, generator=self.generator, dtype=torch.float64)

    def between(self, high, low):
        return self()


@pytest.mark.parametrize("name", NAMES)
def test_the_data_s_distribution_is_reached(name):
    """Kolmogorov and Smirnov's test at the level of one in a thousand; the seeds are fixed."""
    generator = torch.Generator().manual_seed(11)
    sampler = build("sampler", name, **TOLD.get(name, {}))
    levels = sampler.levels(SCHEDULE, STEPS.get(name, 200))
    draw, which = Draws(generator), (torch.rand(COUNT, generator=generator) > SHARES[0]).long()
    x0, noise = CENTRES.flatten()[which] + WIDTH * draw(), draw()
    state = sampler.init(noise, levels, start=x0)
    state = dataclasses.replace(state, x=levels[0].alpha * x0 + levels[0].sigma * noise)  # an inversion starts from x0 itself
    while not state.done:
        state = sampler.step(end_of_the_flow if name in CONSISTENCY else posterior_mean, state, draw)
    below = share_below(state.x, state.level.alpha, state.level.sigma).flatten().sort().values
    ranks = torch.arange(COUNT + 1, dtype=torch.float64) / COUNT
    distance = float(torch.maximum(below - ranks[:-1], ranks[1:] - below).max())
    assert distance < math.sqrt(-math.log(0.001 / 2) / (2 * COUNT))
