"""Orders of convergence, measured on a Gaussian mixture, whose D is known; exact laws on a Gaussian; likelihoods of steps."""

import itertools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from ldmkit import Level, Levels, NoiseSchedule, SamplerState, available, build
from ldmkit.errors import InputError
from ldmkit.noise import KeyedNoise, StepNoise
from ldmkit.schedule import CLEAN, vp_level

HIGH, LOW = 8.0, 0.3
CENTRES, WIDTH = (-1.0, 1.0), 0.4
POINTS = torch.linspace(-9.0, 9.0, 13, dtype=torch.float64).view(1, 1, 1, -1)


def mixture(z, ratio):
    """E[x0 | z] at z = x0 + ratio noise, for equal parts of N(centre, WIDTH^2)."""
    variance = WIDTH**2 + ratio**2
    weights = torch.softmax(torch.stack([-((z - c) ** 2) / (2 * variance) for c in CENTRES]), dim=0)
    means = torch.stack([c + WIDTH**2 / variance * (z - c) for c in CENTRES])
    return (weights * means).sum(dim=0)


def denoise(x, level):
    return mixture(x / level.alpha, level.ratio)


def exact(z, ratio, to):
    """The probability flow from one ratio to another, by the classical Runge-Kutta method in log ratio."""
    rate = lambda z, u: z - mixture(z, math.exp(u))  # noqa: E731  (dz / d log ratio)
    steps = math.ceil(600 * abs(math.log(to / ratio)))
    h = math.log(to / ratio) / steps
    for i in range(steps):
        u = math.log(ratio) + i * h
        a = rate(z, u)
        b = rate(z + h / 2 * a, u + h / 2)
        c = rate(z + h / 2 * b, u + h / 2)
        z = z + h / 6 * (a + 2 * b + 2 * c + rate(z + h * c, u + h))
    return z


def even_levels(n, before, after):
    """n steps from HIGH to LOW, evenly in log ratio, which is the time, and some more on either side."""
    u = np.linspace(math.log(HIGH), math.log(LOW), n + 1)
    h = u[1] - u[0]
    ratios = np.exp(np.concatenate([u[0] - h * np.arange(before, 0, -1), u, u[-1] + h * np.arange(1, after + 1)]))
    return Levels([timed(math.log(r)) for r in ratios], at=lambda ratio: timed(math.log(ratio)), at_time=timed)


def timed(t):
    return vp_level(math.exp(t), t)


TRUTH = exact(POINTS, HIGH, LOW)


def error_of(sampler, n):
    """After n steps, the first of which find an exact history behind them and lower-order last steps out of sight."""
    before, after = 4, 16
    levels = even_levels(n, before, after)
    z = exact(POINTS, HIGH, levels[0].ratio)
    state = SamplerState(x=levels[0].alpha * z, levels=levels)
    for i in range(before + n):
        state = sampler.step(denoise, state, None)
        if i < before:
            here, z = z, exact(z, levels[i].ratio, levels[i + 1].ratio)
            latents = iter((levels[i].alpha * here, levels[i + 1].alpha * z))  # where a block started, where a step led to
            history = tuple(next(latents) if isinstance(entry, torch.Tensor) else entry for entry in state.history)
            state = SamplerState(x=levels[i + 1].alpha * z, levels=levels, step=i + 1, history=history)
    return float((state.x / state.level.alpha - TRUTH).abs().max())


NOISELESS = {
    "euler-ancestral": {"eta": 0.0},
    "dpm-2-ancestral": {"eta": 0.0},
    "dpm++-2s-ancestral": {"eta": 0.0},
    "dpm++-sde": {"eta": 0.0},
    "dpm++-2m-sde": {"eta": 0.0},
    "dpm++-3m-sde": {"eta": 0.0},
    "restart": {"intervals": []},
}
ONE_LENGTH = {"icoeff": 0.0}
"""A controller that heeds no error: as many steps as there are levels, of one length in log ratio."""
PLAIN = ("ddim", "plms", "pndm", "euler", "heun", "dpm-2", "lms", "dpm-singlestep", "dpm++-2m", "dpm++-3m", "deis", "unipc")
ORDERS = [
    *((name, {}, None) for name in PLAIN),
    *((name, config, None) for name, config in NOISELESS.items()),
    *(("dpm-adaptive", {"order": k, **ONE_LENGTH}, k) for k in (2, 3)),
    *(("lms", {"order": k}, k) for k in (1, 2, 3)),
    *(("deis", {"order": k}, k) for k in (1, 3)),
    *(("unipc", {"order": k}, k + 1) for k in (1, 3)),
    *(("unipc", {"order": k, "solver_type": "bh1"}, k + 1) for k in (1, 2, 3)),
    *(("unipc", {"order": k, "correct": False}, k) for k in (1, 2, 3)),
    ("dpm++-2m", {"solver_type": "heun"}, 2),
    *(
        ("dpm-singlestep", {"order": k, "algorithm_type": algorithm, "solver_type": solver}, k)
        for k in (1, 2, 3)
        for algorithm in ("dpmsolver++", "dpmsolver")
        for solver in ("midpoint", "heun")
    ),
]


@pytest.mark.parametrize(("name", "config", "order"), ORDERS, ids=str)
def test_the_measured_order_is_the_declared_one(name, config, order):
    sampler = build("sampler", name, **config)
    order = sampler.facts.order if order is None else order
    fewer, more = 320, 644  # with the steps before, multiples of 6: blocks of 2 and 3 steps end there
    errors = [error_of(sampler, n) for n in (fewer, more)]
    assert math.log(errors[0] / errors[1], more / fewer) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize(("order", "coarsest"), [(2, 14), (3, 24)])
def test_adaptive_steps_have_the_declared_order(order, coarsest):
    """Steps as long as the tolerance allows: the error goes with the tolerance, and with evaluations^-order."""
    evaluations, errors, tolerances = [], [], [2.0 ** -(coarsest + k) for k in (0, 3, 6)]
    for tolerance in tolerances:
        sampler, counted = build("sampler", "dpm-adaptive", order=order, rtol=tolerance, atol=tolerance), Mock(wraps=denoise)
        state = SamplerState(x=timed(math.log(HIGH)).alpha * POINTS, levels=even_levels(20, 0, 0))
        while not state.done:
            state = sampler.step(counted, state, None)
        evaluations.append(counted.call_count)
        errors.append(float((state.x / state.level.alpha - TRUTH).abs().max()))
    of_tolerance, of_evaluations = (np.polyfit(np.log(x), np.log(errors), 1)[0] for x in (tolerances, evaluations))
    assert of_tolerance == pytest.approx(1, abs=0.15), errors
    assert -of_evaluations == pytest.approx(order, abs=0.15), (evaluations, errors)


def test_inversion_and_back_return_at_the_declared_order():
    """DDIM up from nearly no noise, and down again."""
    up, down = build("sampler", "ddim-inverse"), build("sampler", "ddim")
    errors = []
    for n in (320, 640):
        levels = even_levels(n, 0, 0)
        start = levels[-1].alpha * POINTS / 4
        state = up.init(start, levels.reversed(), start=start)
        while not state.done:
            state = up.step(denoise, state, None)
        state = SamplerState(x=state.x, levels=levels)
        while not state.done:
            state = down.step(denoise, state, None)
        errors.append(float((state.x - start).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(up.facts.order, abs=0.15), errors


def test_no_declared_order_is_left_out():
    measured = {name for name, _, order in ORDERS if order is None} | {"ddim-inverse", "dpm-adaptive"}
    assert measured == {name for name in available("sampler") if build("sampler", name).facts.order is not None}


def test_every_sampler_says_what_it_is():
    for name in available("sampler"):
        facts = build("sampler", name).facts
        if facts is not None:
            assert facts.source
            assert facts.evaluations in (1, 2, 3)


# ------------------------------------------------------------------------------------------------------- laws, on a Gaussian


def gaussian(spread):
    """D for data N(0, spread^2)."""

    def estimate(x, level):
        return level.alpha * spread**2 / (level.alpha**2 * spread**2 + level.sigma**2) * x

    return estimate


STOCHASTIC = ["ddpm", "euler-ancestral", "dpm-2-ancestral", "dpm++-2s-ancestral", "dpm++-sde", "dpm++-2m-sde", "dpm++-3m-sde"]


@pytest.mark.parametrize("name", [*STOCHASTIC, "restart"])
def test_many_steps_reach_the_datas_variance(name):
    """Linear D keep everything Gaussian with mean 0: the variance is followed exactly, through the steps' own coefficients."""
    sampler, schedule, spread, n = build("sampler", name), NoiseSchedule(), 0.5, 300
    levels = sampler.levels(schedule, n)
    source = KeyedNoise(3, [0])
    state = sampler.init(source((1, 1, 1, 4000), step=-1, draw=0, dtype=torch.float64), levels)
    while not state.done:
        state = sampler.step(gaussian(spread), state, StepNoise(source, state.step, state.x))
    standard_error = spread**2 * math.sqrt(2 / 4000)
    assert abs(float(state.x.var()) - spread**2) < 4 * standard_error + 0.02 * spread**2
    assert abs(float(state.x.mean())) < 4 * spread / math.sqrt(4000)


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, {}) for name in STOCHASTIC), ("heun", {"s_churn": 40.0}), ("restart", {}), ("ddim", {"eta": 0.7}), ("lcm", {})],
)
def test_the_likelihood_of_what_was_drawn(name, config):
    """A step's chain of draws, written out: the density's integral is checked by that of standard normals."""
    sampler = build("sampler", name, **config)
    levels = sampler.levels(NoiseSchedule(), 20)
    source = KeyedNoise(1, range(3))
    state = sampler.init(source((3, 2, 2, 2), step=-1, draw=0, dtype=torch.float64), levels)
    seen = 0
    while not state.done:
        before = state
        with torch.enable_grad():
            state = sampler.step(gaussian(0.5), before, StepNoise(source, before.step, before.x))
            law, by_hand = sampler.transition(gaussian(0.5), before), torch.zeros(3, dtype=torch.float64)
            for y in state.drawn:
                if law.stochastic:
                    normal = torch.distributions.Normal(law.mean, torch.as_tensor(law.std, dtype=torch.float64))
                    by_hand = by_hand + normal.log_prob(y).flatten(1).sum(dim=1)
                    seen += 1
                law = law if law.then is None else law.then(y)
        torch.testing.assert_close(sampler.log_prob_B(gaussian(0.5), before, state.drawn), by_hand)
        assert torch.equal(state.drawn[-1], state.x)
    assert seen > 0
    with pytest.raises(InputError, match="does not make 7 draws"):
        sampler.log_prob_B(gaussian(0.5), before, [state.x] * 7)


def test_the_likelihood_has_the_gradient_of_its_closed_form():
    """For DDPM on a linear D = c x: d log p / dc by hand."""
    sampler, levels = build("sampler", "ddpm"), NoiseSchedule()
    state = SamplerState(
        x=torch.randn(2, 1, 3, 3, dtype=torch.float64), levels=Levels([levels.level(500), levels.level(400), CLEAN])
    )
    drawn = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    log_p = sampler.log_prob_B(lambda x, level: c * x, state, [drawn]).sum()
    (slope,) = torch.autograd.grad(log_p, c)
    law = sampler.coefficients(state.level, state.next_level)
    mean = (law.on_x + law.on_x0 * 0.3) * state.x
    by_hand = ((drawn - mean) / law.std**2 * law.on_x0 * state.x).sum()
    torch.testing.assert_close(slope, by_hand)


def test_a_deterministic_step_has_no_density():
    sampler = build("sampler", "heun")
    state = SamplerState(x=torch.ones(2, 1, 1, 1), levels=Levels([vp_level(2.0, 1.0), vp_level(1.0, 1.0)]))
    assert torch.equal(sampler.log_prob_B(gaussian(1.0), state, [state.x]), torch.zeros(2))
    with pytest.raises(InputError, match="deterministic"):
        sampler.transition(gaussian(1.0), state).log_prob_B(state.x)


# ------------------------------------------------------------------------------------------------- k-diffusion's formulas


class Recorded:
    """Noise that both sides read: plain draws in order, increments by interval."""

    def __init__(self):
        self.source = KeyedNoise(9, [0])

    def between(self, high, low):
        return self.source.brownian((1, 1, 1, 5), high, low, dtype=torch.float64)


def k_dpmpp_sde(z, sigmas, noise, eta, s_noise, r):
    """`sample_dpmpp_sde` on z = x / alpha, the noise sampler being the motion's increments."""

    def step(a, b):
        up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
        return math.sqrt(b**2 - up**2), up

    for a, b in itertools.pairwise(sigmas):
        estimate = mixture(z, a)
        if b == 0:
            z = z + (z - estimate) / a * (b - a)
            continue
        t, t_next = -math.log(a), -math.log(b)
        s = t + r * (t_next - t)
        down, up = step(a, math.exp(-s))
        half = (down / a) * z - math.expm1(t + math.log(down)) * estimate + noise.between(a, math.exp(-s)) * s_noise * up
        second = mixture(half, math.exp(-s))
        down, up = step(a, b)
        mixed = (1 - 1 / (2 * r)) * estimate + 1 / (2 * r) * second
        z = (down / a) * z - math.expm1(t + math.log(down)) * mixed + noise.between(a, b) * s_noise * up
    return z


@pytest.mark.parametrize(("eta", "s_noise", "r"), [(1.0, 1.0, 0.5), (0.6, 1.0, 0.5), (1.0, 1.0, 0.3), (0.0, 1.0, 0.5)])
def test_dpmpp_sde_is_that_of_k_diffusion(eta, s_noise, r):
    """The second draw, given the first, is the same motion: the latents agree, not only their law."""
    sigmas = [6.0, 3.0, 1.7, 0.8, 0.2, 0.0]
    at = lambda ratio: vp_level(ratio, 1.0)  # noqa: E731
    levels, noise = Levels([at(s) if s else CLEAN for s in sigmas], at=at), Recorded()
    start = torch.linspace(-6, 6, 5, dtype=torch.float64).view(1, 1, 1, 5)
    state = SamplerState(x=levels[0].alpha * start, levels=levels)
    sampler = build("sampler", "dpm++-sde", eta=eta, s_noise=s_noise, r=r)
    while not state.done:
        state = sampler.step(denoise, state, noise)
    theirs = k_dpmpp_sde(start, sigmas, noise, eta, s_noise, r)
    assert float((state.x - theirs).abs().max()) < 1e-9 * float(theirs.std())


def test_a_level_between_needs_to_be_known():
    levels = Levels([Level(0.6, 0.8, 1.0), CLEAN])
    with pytest.raises(InputError, match=r"say nothing of sigma / alpha = 0\.5"):
        levels.between(0.5)
