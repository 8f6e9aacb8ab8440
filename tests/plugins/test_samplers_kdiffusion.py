"""The samplers against k-diffusion's formulas and those of their papers, in float64, with drawn settings; and identities.

The formulas are written out in variance-exploding coordinates, z = x / alpha and sigma for sigma / alpha.
"""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ldmkit import Levels, SamplerState, build
from ldmkit.noise import KeyedNoise
from ldmkit.schedule import CLEAN, vp_level

START = torch.linspace(-6, 6, 6, dtype=torch.float64).view(1, 1, 1, 6)


def model(z, sigma):
    """A smooth D."""
    return 0.7 * torch.tanh(z / (1 + sigma) + 0.3 * math.sin(3 * sigma)) + 0.2 * torch.roll(z, 1, -1) / (1 + sigma**2)


class Noise:
    """Draws in order, increments by interval: the same for all that have the same key."""

    def __init__(self):
        self.source, self.draws = KeyedNoise(9, [0]), itertools.count()

    def __call__(self):
        return self.source(START.shape, step=0, draw=next(self.draws), dtype=torch.float64)

    def between(self, high, low):
        return self.source.brownian(START.shape, high, low, dtype=torch.float64)


class InOrder(Noise):
    """For steps whose length depends on the noise: a motion would make their rounding grow."""

    def between(self, high, low):
        return self()


def ours(sampler, sigmas, source=Noise):
    """The sampler's result at the last of sigmas, as z."""
    at = lambda ratio: vp_level(ratio, ratio)  # noqa: E731
    levels = Levels([at(s) if s else CLEAN for s in sigmas], at=at, at_time=at)
    state, noise = SamplerState(x=levels[0].alpha * START, levels=levels), source()
    while not state.done:
        state = sampler.step(lambda x, level: model(x / level.alpha, level.ratio), state, noise)
    return state.x / state.level.alpha


def close(a, b):
    return float((a - b).abs().max()) <= 1e-9 * float(b.std())


@st.composite
def falling(draw, last=(0.0,)):
    """Ratios of a run, falling; neighbours differ by enough for Brownian motion."""
    gaps = draw(st.lists(st.floats(0.05, 1.5), min_size=1, max_size=6))
    ratios = list(itertools.accumulate(gaps, lambda sigma, gap: sigma * math.exp(-gap), initial=draw(st.floats(0.5, 15))))
    end = draw(st.sampled_from(last))
    return ratios if end is None else [*ratios, end]


def eps(z, sigma, denoised):
    return (z - denoised) / sigma


def ancestral(sigma, to, eta):
    up = min(to, eta * math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
    return math.sqrt(max(0.0, to**2 - up**2)), up


# ---------------------------------------------------------------------------------------------------------- one step of each


def k_churn(z, sigma, steps, noise, s_churn, s_tmin, s_tmax, s_noise):
    gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
    hat = sigma * (1 + gamma)
    return (z + noise() * s_noise * math.sqrt(hat**2 - sigma**2) if gamma > 0 else z), hat


def k_euler(z, sigmas, noise, **churn):
    for a, b in itertools.pairwise(sigmas):
        z, a = k_churn(z, a, len(sigmas) - 1, noise, **churn)
        z = z + eps(z, a, model(z, a)) * (b - a)
    return z


def k_heun(z, sigmas, noise, **churn):
    for a, b in itertools.pairwise(sigmas):
        z, a = k_churn(z, a, len(sigmas) - 1, noise, **churn)
        d = eps(z, a, model(z, a))
        ahead = z + d * (b - a)
        z = ahead if b == 0 else z + (d + eps(ahead, b, model(ahead, b))) / 2 * (b - a)
    return z


def k_dpm_2(z, sigmas, noise, **churn):
    for a, b in itertools.pairwise(sigmas):
        z, a = k_churn(z, a, len(sigmas) - 1, noise, **churn)
        d = eps(z, a, model(z, a))
        if b > 0:
            middle = math.exp((math.log(a) + math.log(b)) / 2)
            half = z + d * (middle - a)
            d = eps(half, middle, model(half, middle))
        z = z + d * (b - a)
    return z


def k_euler_ancestral(z, sigmas, noise, eta, s_noise):
    for a, b in itertools.pairwise(sigmas):
        down, up = ancestral(a, b, eta)
        z = z + eps(z, a, model(z, a)) * (down - a)
        z = z + noise() * s_noise * up if b > 0 and eta > 0 else z
    return z


def k_dpm_2_ancestral(z, sigmas, noise, eta, s_noise):
    for a, b in itertools.pairwise(sigmas):
        down, up = ancestral(a, b, eta)
        d = eps(z, a, model(z, a))
        if down > 0:
            middle = math.exp((math.log(a) + math.log(down)) / 2)
            half = z + d * (middle - a)
            d = eps(half, middle, model(half, middle))
        z = z + d * (down - a)
        z = z + noise() * s_noise * up if b > 0 and eta > 0 else z
    return z


def k_dpmpp_2s_ancestral(z, sigmas, noise, eta, s_noise):
    for a, b in itertools.pairwise(sigmas):
        down, up = ancestral(a, b, eta)
        denoised = model(z, a)
        if down == 0:
            z = z + eps(z, a, denoised) * (down - a)
        else:
            t, t_next = -math.log(a), -math.log(down)
            h = t_next - t
            s = t + h / 2
            half = (math.exp(-s) / a) * z - math.expm1(-h / 2) * denoised
            z = (down / a) * z - math.expm1(-h) * model(half, math.exp(-s))
        z = z + noise() * s_noise * up if b > 0 and eta > 0 else z
    return z


def k_dpmpp_sde(z, sigmas, noise, eta, s_noise, r):
    for a, b in itertools.pairwise(sigmas):
        denoised = model(z, a)
        if b == 0:
            z = z + eps(z, a, denoised) * (b - a)
            continue
        t = -math.log(a)
        s = t + r * (-math.log(b) - t)
        down, up = ancestral(a, math.exp(-s), eta)
        half = (down / a) * z - math.expm1(t + math.log(down)) * denoised
        half = half + noise.between(a, math.exp(-s)) * s_noise * up
        down, up = ancestral(a, b, eta)
        mixed = (1 - 1 / (2 * r)) * denoised + 1 / (2 * r) * model(half, math.exp(-s))
        z = (down / a) * z - math.expm1(t + math.log(down)) * mixed + noise.between(a, b) * s_noise * up
    return z


def k_dpmpp_2m_sde(z, sigmas, noise, eta, s_noise, solver_type):
    old, h_last = None, None
    for a, b in itertools.pairwise(sigmas):
        denoised = model(z, a)
        if b == 0:
            return denoised
        h = math.log(a) - math.log(b)
        grown = -math.expm1(-h - eta * h)
        z = b / a * math.exp(-eta * h) * z + grown * denoised
        if old is not None:
            weight = grown / (-h - eta * h) + 1 if solver_type == "heun" else 0.5 * grown
            z = z + weight * (h / h_last) * (denoised - old)
        z = z + noise.between(a, b) * b * math.sqrt(-math.expm1(-2 * eta * h)) * s_noise
        old, h_last = denoised, h
    return z


def k_dpmpp_3m_sde(z, sigmas, noise, eta, s_noise):
    before, gaps = [], []
    for a, b in itertools.pairwise(sigmas):
        denoised = model(z, a)
        if b == 0:
            return denoised
        h = math.log(a) - math.log(b)
        long = h * (1 + eta)
        z = math.exp(-long) * z - math.expm1(-long) * denoised
        phi_2 = math.expm1(-long) / long + 1
        phi_3 = phi_2 / long - 0.5
        if len(before) >= 2:
            r0, r1 = gaps[-1] / h, gaps[-2] / h
            d0, d1 = (denoised - before[-1]) / r0, (before[-1] - before[-2]) / r1
            z = z + phi_2 * (d0 + (d0 - d1) * r0 / (r0 + r1)) - phi_3 * (d0 - d1) / (r0 + r1)
        elif before:
            z = z + phi_2 * (denoised - before[-1]) / (gaps[-1] / h)
        z = z + noise.between(a, b) * b * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        before.append(denoised)
        gaps.append(h)
    return z


def consistency(z, sigmas, noise, sigma_min):
    """Song et al. 2023, algorithm 1: every level but the last is visited."""
    for a, b in itertools.pairwise(sigmas):
        z = model(z, a)
        z = z + math.sqrt(max(0.0, b**2 - sigma_min**2)) * noise()
    return z


CHURN = {
    "s_churn": st.floats(0.1, 20),
    "s_tmin": st.sampled_from([0.0, 0.3]),
    "s_tmax": st.sampled_from([3.0, 100.0]),
    "s_noise": st.floats(0.9, 1.1),
}
NOISY = {"eta": st.sampled_from([0.0, 0.4, 1.0]), "s_noise": st.floats(0.9, 1.1)}
PAIRS = {
    "euler": (k_euler, CHURN),
    "heun": (k_heun, CHURN),
    "dpm-2": (k_dpm_2, CHURN),
    "euler-ancestral": (k_euler_ancestral, NOISY),
    "dpm-2-ancestral": (k_dpm_2_ancestral, NOISY),
    "dpm++-2s-ancestral": (k_dpmpp_2s_ancestral, NOISY),
    "dpm++-sde": (k_dpmpp_sde, NOISY | {"r": st.floats(0.2, 0.8)}),
    "dpm++-2m-sde": (k_dpmpp_2m_sde, NOISY | {"solver_type": st.sampled_from(["midpoint", "heun"])}),
    "dpm++-3m-sde": (k_dpmpp_3m_sde, NOISY),
    "consistency": (consistency, {"sigma_min": st.sampled_from([0.0, 0.002])}),
}


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data())
def test_latents_are_those_of_the_formulas(name, data):
    formula, drawn = PAIRS[name]
    config = {key: data.draw(values, key) for key, values in drawn.items()}
    sigmas = data.draw(falling(last=(0.0,) if name == "consistency" else (0.0, None)), "sigmas")
    assert close(ours(build("sampler", name, **config), sigmas), formula(START, sigmas, Noise(), **config))


@given(falling(), st.floats(0.1, 3.0), st.floats(1.2, 4.0), st.integers(1, 3), st.integers(1, 4))
def test_restart_is_that_of_its_paper(sigmas, low, wider, repeats, steps):
    """Xu et al. 2023, algorithm 1: down past the interval's lower end, then `repeats` times up with noise, and down again."""
    assume(not any(math.isclose(sigma, low) for sigma in sigmas))  # rounding says on which side of its own end a level lies
    high, still = low * wider, {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
    z, noise, restarted = START, Noise(), False
    for a, b in itertools.pairwise(sigmas):
        z = k_heun(z, [a, b], noise, **still)
        if b > 0 and b <= low < a and not restarted:
            restarted = True
            for _ in range(repeats):
                z = z + math.sqrt(high**2 - b**2) * noise()
                ramp = [(high ** (1 / 7) + i / steps * (b ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(steps)]
                z = k_heun(z, [*ramp, b], noise, **still)
    interval = {"low": low, "high": high, "repeats": repeats, "steps": steps}
    assert close(ours(build("sampler", "restart", intervals=[interval]), sigmas), z)


# ------------------------------------------------------------------------------------------------------------------- adaptive


def k_dpm_adaptive(z, sigma_max, sigma_min, noise, *, order, rtol, atol, h_init, pid, accept_safety, eta, s_noise):
    """`DPMSolver.dpm_solver_adaptive` and `PIDStepSizeController`; also how many attempts were accepted and rejected."""
    s, t_end, before, h, memory, counts = -math.log(sigma_max), -math.log(sigma_min), z, h_init, None, [0, 0]
    p, i, d = pid
    powers = [(p + i + d), -(p + 2 * d), d]

    def noise_at(z, t):
        return eps(z, math.exp(-t), model(z, math.exp(-t)))

    def second(t, e, r):
        h = t - s
        e_r = noise_at(z - math.exp(-(s + r * h)) * math.expm1(r * h) * e, s + r * h)
        return z - math.exp(-t) * math.expm1(h) * e - math.exp(-t) / (2 * r) * math.expm1(h) * (e_r - e), e_r

    def third(t, e, e_r1):
        h, r1, r2 = t - s, 1 / 3, 2 / 3
        s2 = s + r2 * h
        u = z - math.exp(-s2) * math.expm1(r2 * h) * e
        u = u - math.exp(-s2) * (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * (e_r1 - e)
        e_r2 = noise_at(u, s2)
        return z - math.exp(-t) * math.expm1(h) * e - math.exp(-t) / r2 * (math.expm1(h) / h - 1) * (e_r2 - e)

    while s < t_end - 1e-5:
        t = min(t_end, s + h)
        below, up = t, 0.0
        if eta:
            down, _ = ancestral(math.exp(-s), math.exp(-t), eta)
            below = min(t_end, -math.log(down))
            up = math.sqrt(max(0.0, math.exp(-2 * t) - math.exp(-2 * below)))
        e = noise_at(z, s)
        if order == 2:
            low = z - math.exp(-below) * math.expm1(below - s) * e
            high, _ = second(below, e, 1 / 2)
        else:
            low, e_r1 = second(below, e, 1 / 3)
            high = third(below, e, e_r1)
        delta = torch.maximum(torch.tensor(atol, dtype=z.dtype), rtol * torch.maximum(low.abs(), before.abs()))
        inverse = 1 / (float(torch.linalg.norm((low - high) / delta) / z.numel() ** 0.5) + 1e-8)
        memory = [inverse, *memory[1:]] if memory else [inverse] * 3
        power = 1.5 if eta else order
        factor = 1 + math.atan(math.prod(m ** (k / power) for m, k in zip(memory, powers, strict=True)) - 1)
        h *= factor
        if factor >= accept_safety:
            memory = [memory[0], memory[0], memory[1]]
            before, z = low, high + (up * s_noise * noise.between(math.exp(-s), math.exp(-t)) if up else 0.0)
            s = t
            counts[0] += 1
        else:
            counts[1] += 1
    return z, counts


@given(
    st.floats(2, 15),
    st.floats(0.02, 0.2),
    st.sampled_from([2, 3]),
    st.sampled_from([0.01, 0.05, 0.2]),
    st.floats(0.03, 1.0),
    st.sampled_from([(0.0, 1.0, 0.0), (0.2, 0.6, 0.1)]),
    st.sampled_from([0.0, 0.0, 0.5, 1.0]),
)
def test_dpm_adaptive_is_that_of_k_diffusion(sigma_max, sigma_min, order, rtol, h_init, pid, eta):
    config = {
        "order": order,
        "rtol": rtol,
        "atol": rtol / 6,
        "h_init": h_init,
        "accept_safety": 0.81,
        "eta": eta,
        "s_noise": 1.02,
    }
    theirs, _ = k_dpm_adaptive(START, sigma_max, sigma_min, InOrder(), pid=pid, **config)
    names = dict(zip(("pcoeff", "icoeff", "dcoeff"), pid, strict=True))
    sampler = build("sampler", "dpm-adaptive", **config, **names)
    assert close(ours(sampler, [sigma_max, math.sqrt(sigma_max * sigma_min), sigma_min], InOrder), theirs)


def test_dpm_adaptive_accepts_and_rejects():
    """The settings above reach both."""
    _, (accepted, rejected) = k_dpm_adaptive(
        START,
        15.0,
        0.02,
        Noise(),
        order=3,
        rtol=0.01,
        atol=0.002,
        h_init=1.0,
        pid=(0, 1, 0),
        accept_safety=0.81,
        eta=0,
        s_noise=1,
    )
    assert accepted > 5
    assert rejected > 0


# ------------------------------------------------------------------------------------------------------------------ identities

IDENTITIES = [
    ("ddim", {}, "euler", {}),
    ("ddim", {"eta": 1.0}, "ddpm", {}),
    ("ddim", {"eta": 0.3}, "euler-ancestral", {"eta": 0.3}),
    ("euler-ancestral", {"eta": 0.0}, "euler", {}),
    ("dpm-2-ancestral", {"eta": 0.0}, "dpm-2", {}),
    ("dpm++-2m-sde", {"eta": 0.0}, "dpm++-3m-sde", {"eta": 0.0}, 2),
    ("lms", {"order": 1}, "euler", {}),
    ("deis", {"order": 1}, "ddim", {}),
    ("dpm-singlestep", {"order": 1}, "ddim", {}),
    ("dpm-singlestep", {"order": 1, "algorithm_type": "dpmsolver"}, "ddim", {}),
    ("unipc", {"order": 1, "correct": False}, "ddim", {}),
    ("dpm++-2m", {}, "ddim", {}, 1),
    ("dpm++-2m-sde", {}, "ddim", {}, 1),
    ("restart", {"intervals": []}, "heun", {}),
]
"""Two samplers that are one; a number is the most steps for which they are."""


@pytest.mark.parametrize("pair", IDENTITIES, ids=str)
@given(data=st.data())
def test_identities(pair, data):
    one, config, other, others_config, *most = pair
    if most == [2]:  # they differ in x0's weight unless it is "heun", and in the third estimate
        config = {**config, "solver_type": "heun"}
    sigmas = data.draw(falling(), "sigmas")
    sigmas = sigmas[-(most[0] + 1) :] if most else sigmas
    assert close(ours(build("sampler", one, **config), sigmas), ours(build("sampler", other, **others_config), sigmas))


@given(falling(last=(0.0, None)))
def test_heun_without_churn_is_heuns_rule(sigmas):
    theirs = START
    for a, b in itertools.pairwise(sigmas):
        slope = eps(theirs, a, model(theirs, a))
        ahead = theirs + (b - a) * slope
        theirs = ahead if b == 0 else theirs + (b - a) * (slope + eps(ahead, b, model(ahead, b))) / 2
    assert close(ours(build("sampler", "heun", s_noise=1.1), sigmas), theirs)
