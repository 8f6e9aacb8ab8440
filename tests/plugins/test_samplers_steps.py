"""Steps and levels of the samplers: closed forms, identities, orders of convergence, statelessness, errors."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import Level, Levels, NoiseSchedule, Sampler, SamplerState, build
from ldmkit.errors import ConfigError, InputError
from ldmkit.noise import KeyedNoise
from ldmkit.schedule import CLEAN, vp_level
from ldmkit.testing.strategies import configs
from ldmkit_samplers.ddim import DDIMSampler
from ldmkit_samplers.ddpm import DDPMSampler
from ldmkit_samplers.euler import EulerSampler
from ldmkit_samplers.euler_ancestral import EulerAncestralSampler

CLASSES = [DDPMSampler, DDIMSampler, EulerSampler, EulerAncestralSampler]
SCHEDULE = NoiseSchedule()
EPS = 2.0**-52

ratios = st.floats(1e-4, 1e4)
levels_ = st.builds(vp_level, ratios, st.just(1.0))
etas = st.floats(0, 1)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Level, Level]:
    """Two levels, the noisier first; the first may be pure noise, the second clean."""
    high, low = sorted(draw(st.tuples(ratios, ratios)), reverse=True)
    first = Level(0.0, 1.0, 999.0) if draw(st.integers(0, 9)) == 0 else vp_level(high, 500.0)
    second = CLEAN if draw(st.integers(0, 9)) == 0 else vp_level(low, 100.0)
    return first, second


def transition(sampler: Sampler, pair: tuple[Level, Level], x: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    law = sampler.transition(lambda x, level: x0, SamplerState(x=x, levels=Levels(pair)))
    return law.mean, law.std


def normal(seed: int, shape: tuple[int, ...] = (2, 3, 4, 4)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(sampler: Sampler, levels: Levels, denoise, noise=lambda: normal(1)) -> Tensor:
    state = sampler.init(normal(0), levels)
    while not state.done:
        state = sampler.step(denoise, state, noise)
    return state.x


# ------------------------------------------------------------------------------------------------------------------ one step


@given(pairs(), etas)
def test_ddim_is_euler_ancestral_in_rescaled_coordinates(pair: tuple[Level, Level], eta: float) -> None:
    """k-diffusion's `get_ancestral_step` on x / alpha, written out."""
    level, to = pair
    x, x0 = normal(0), normal(1)
    mean, std = transition(DDIMSampler.build(eta=eta), pair, x, x0)
    assert torch.equal(mean, transition(EulerAncestralSampler.build(eta=eta), pair, x, x0)[0])
    if level.alpha > 0:
        high, low = level.ratio, to.ratio
        up = min(low, eta * math.sqrt(max(0.0, low**2 * (high**2 - low**2) / high**2)))
        down = math.sqrt(low**2 - up**2)
        derivative = (x / level.alpha - x0) / high
        expected = (x / level.alpha + derivative * (down - high)) * to.alpha
        size = max(float(x.abs().max()) / level.alpha, float(x0.abs().max()))  # what cancels in those coordinates
        assert float((mean - expected).abs().max()) <= 20 * EPS * size
        assert std == pytest.approx(up * to.alpha, rel=1e-6, abs=4 * math.sqrt(EPS) * to.sigma)


@given(pairs())
def test_a_ddpm_step_is_ddim_with_eta_1(pair: tuple[Level, Level]) -> None:
    x, x0 = normal(0), normal(1)
    one, other = (transition(sampler, pair, x, x0) for sampler in (DDPMSampler.build(), DDIMSampler.build(eta=1.0)))
    assert float((one[0] - other[0]).abs().max()) <= 50 * EPS * float(torch.maximum(x.abs(), x0.abs()).max())
    assert one[1] == pytest.approx(other[1], rel=50 * EPS, abs=50 * EPS)


@given(pairs())
def test_ddpm_is_the_posterior_of_a_gaussian_chain(pair: tuple[Level, Level]) -> None:
    """q(x' | x, x0) by Bayes' rule from q(x' | x0) and q(x | x'), rather than by Ho's formula."""
    level, to = pair
    x, x0 = normal(0), normal(1)
    mean, std = transition(DDPMSampler.build(), pair, x, x0)
    if to.sigma == 0:
        assert std == 0
        torch.testing.assert_close(mean, x0, rtol=0, atol=4 * EPS)
        return
    r = level.alpha / to.alpha
    forward = level.sigma**2 - r**2 * to.sigma**2
    if forward <= 1e-6 * level.sigma**2:  # no step to speak of: Bayes' rule divides by it
        return
    precision = 1 / to.sigma**2 + r**2 / forward
    torch.testing.assert_close(mean, (to.alpha * x0 / to.sigma**2 + r * x / forward) / precision, rtol=1e-8, atol=1e-8)
    assert std**2 == pytest.approx(1 / precision, rel=1e-8)
    large = transition(DDPMSampler.build(variance="fixed_large"), pair, x, x0)
    assert torch.equal(large[0], mean)
    assert large[1] ** 2 == pytest.approx(forward, rel=1e-8)


@pytest.mark.parametrize("cls", [DDPMSampler, DDIMSampler, EulerAncestralSampler])
@given(data=st.data())
def test_forward_marginals_are_kept(cls: type[Sampler], data: st.DataObject) -> None:
    """From x = alpha x0 + sigma z, a step with the true x0 gives alpha' x0 + sigma' z' (fixed_large draws more on purpose)."""
    pair, config = data.draw(pairs()), data.draw(configs(cls.Config))
    if getattr(config, "variance", "") == "fixed_large":
        config = config.replace(variance="fixed_small")
    if hasattr(config, "s_noise"):
        config = config.replace(s_noise=1.0)
    law = cls(config).coefficients(*pair)
    level, to = pair
    assert law.on_x * level.alpha + law.on_x0 == pytest.approx(to.alpha, rel=20 * EPS, abs=20 * EPS)
    assert (law.on_x * level.sigma) ** 2 + law.std**2 == pytest.approx(to.sigma**2, rel=20 * EPS, abs=20 * EPS)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_a_point_mass_is_hit_exactly(cls: type[Sampler], n: int) -> None:
    """D(x) = x0 whatever x: all methods end on alpha x0 + sigma z of their last level."""
    sampler, x0 = cls.build(), normal(9)
    levels = sampler.levels(NoiseSchedule(NoiseSchedule.Config(set_alpha_to_one=True)), n)
    assert levels[-1] == CLEAN
    torch.testing.assert_close(run(sampler, levels, lambda x, level: x0), x0, rtol=0, atol=50 * EPS * n)


def gaussian(spread: float):
    """D for data N(0, spread^2): E[x0 | x] in closed form."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        return level.alpha * spread**2 / (level.alpha**2 * spread**2 + level.sigma**2) * x

    return denoise


def test_euler_has_order_one_on_a_gaussian() -> None:
    """The flow's exact end is x spread / sqrt(alpha^2 spread^2 + sigma^2); the error falls like 1 / n."""
    spread, sampler = 0.5, EulerSampler.build()
    errors, counts = [], [32, 64, 128, 256, 512]
    for n in counts:
        sigmas = [*np.geomspace(20.0, 0.02, n), 0.0]
        levels = sampler.levels_from_sigmas(SCHEDULE, [float(s) for s in sigmas[:-1]])  # ends at 0.02, where it is smooth still
        state = sampler.init(normal(0), levels)
        first, last = levels[0], levels[-1]
        while not state.done:
            state = sampler.step(gaussian(spread), state, lambda: normal(1))
        grown = math.sqrt((last.alpha**2 * spread**2 + last.sigma**2) / (first.alpha**2 * spread**2 + first.sigma**2))
        errors.append(float((state.x - grown * normal(0) * levels.initial_scale).abs().max()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9


@pytest.mark.parametrize("cls", [DDPMSampler, EulerAncestralSampler])
def test_stochastic_samplers_approach_a_gaussians_variance(cls: type[Sampler]) -> None:
    """On linear D the variance of x follows a recursion in the coefficients alone; its limit is the data's, with order one."""
    spread, sampler, errors = 0.5, cls.build(timestep_spacing="trailing"), []
    for n in (50, 100, 200):
        levels = sampler.levels(SCHEDULE, n)
        variance = levels[0].alpha ** 2 * spread**2 + levels[0].sigma ** 2
        for level, to in itertools.pairwise(levels):
            law = sampler.coefficients(level, to)
            gain = law.on_x + law.on_x0 * float(gaussian(spread)(torch.ones((), dtype=torch.float64), level))
            variance = gain**2 * variance + law.std**2
        errors.append(abs(variance - spread**2))
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]


# ---------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("cls", CLASSES)
def test_one_object_serves_eight_threads(cls: type[Sampler]) -> None:
    """Same bits as eight objects, one after the other."""

    def job(sampler: Sampler, seed: int) -> Tensor:
        source = KeyedNoise(seed, [0, 1])
        levels, step = sampler.levels(SCHEDULE, 20 + seed), 0
        state = sampler.init(source((2, 3, 4, 4), step=-1, draw=0), levels)
        while not state.done:
            step = state.step
            state = sampler.step(gaussian(0.5), state, lambda step=step: source((2, 3, 4, 4), step=step, draw=0))
        return state.x

    one = cls.build()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: job(one, seed), range(8)))
    for seed in range(8):
        assert torch.equal(together[seed], job(cls.build(), seed))


@pytest.mark.parametrize(
    ("sampler", "steps_with_noise"),
    [
        (DDPMSampler.build(), [0, 1, 2, 3]),
        (DDPMSampler.build(timestep_spacing="linspace"), [0, 1, 2]),  # its last time is 0
        (DDIMSampler.build(), []),
        (DDIMSampler.build(eta=0.3), [0, 1, 2, 3]),
        (EulerSampler.build(), []),
        (EulerAncestralSampler.build(), [0, 1, 2, 3]),
        (EulerAncestralSampler.build(eta=0.0), []),
    ],
)
def test_noise_is_drawn_when_diffusers_draws(sampler: Sampler, steps_with_noise: list[int]) -> None:
    """Once a step, after the model's call."""
    calls: list[str] = []
    state, drew = sampler.init(normal(0), sampler.levels(SCHEDULE, 4)), []

    def denoise(x: Tensor, level: Level) -> Tensor:
        calls.append("model")
        return x

    def noise() -> Tensor:
        calls.append("noise")
        return normal(1)

    while not state.done:
        calls.clear()
        state = sampler.step(denoise, state, noise)
        assert calls in (["model"], ["model", "noise"])
        drew += [state.step - 1] if "noise" in calls else []
    assert drew == steps_with_noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_dtype_of_the_latents_is_kept(cls: type[Sampler], dtype: torch.dtype) -> None:
    sampler = cls.build()
    state = sampler.init(normal(0).to(dtype), sampler.levels(SCHEDULE, 3))
    while not state.done:
        state = sampler.step(lambda x, level: 0.5 * x, state, lambda: normal(1).to(dtype))
        assert state.x.dtype == dtype


@pytest.mark.parametrize("cls", CLASSES)
def test_zero_terminal_snr_stays_finite(cls: type[Sampler]) -> None:
    schedule = NoiseSchedule(NoiseSchedule.Config(rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    sampler = cls.build()
    levels = sampler.levels(schedule, 10)
    assert (levels[0].alpha, levels[0].sigma, levels.initial_scale) == (0.0, 1.0, 1.0)
    assert torch.isfinite(run(sampler, levels, gaussian(0.5))).all()


def test_eta_of_one_run() -> None:
    """The pipeline's `eta=`: a new sampler from a changed config."""
    for cls in CLASSES:
        if "eta" in cls.Config.model_fields:
            sampler = cls.build()
            assert type(sampler)(sampler.config.replace(eta=0.25)).config.eta == 0.25
            with pytest.raises(ConfigError, match=r"eta = 1\.5: Input should be less than or equal to 1"):
                sampler.config.replace(eta=1.5)
        else:
            with pytest.raises(ConfigError, match="unknown key 'eta'"):
                cls.build(eta=1.0)


# -------------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler-ancestral"])
@given(data=st.data())
def test_levels_are_variance_preserving_and_fall(name: str, data: st.DataObject) -> None:
    schedule = NoiseSchedule(data.draw(configs(NoiseSchedule.Config).filter(lambda c: c.num_train_timesteps <= 4000)))
    sampler = build("sampler", name)
    n = data.draw(st.integers(1, schedule.num_train_timesteps))
    offset = schedule.config.steps_offset if schedule.config.timestep_spacing == "leading" else 0
    if (n - 1) * (schedule.num_train_timesteps // n) + offset >= schedule.num_train_timesteps:
        with pytest.raises(InputError, match=rf"steps_offset = {offset} starts at t = \d+, beyond the schedule's last"):
            sampler.levels(schedule, n)
        return
    if schedule.config.timestep_spacing == "quadratic":
        times = np.linspace(0, math.sqrt(0.8 * schedule.num_train_timesteps), n) ** 2
        times = np.floor(times) if sampler.whole_times else times
        beyond = times[-1] + schedule.config.steps_offset > schedule.num_train_timesteps - 1
        if n > 1 and (beyond or (np.diff(times) <= 0).any()):
            with pytest.raises(InputError, match=r"whole quadratic times meet|starts beyond the schedule's last"):
                sampler.levels(schedule, n)
            return
    levels = sampler.levels(schedule, n)
    assert levels.num_steps == n
    for level in levels:
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=4 * EPS)
    assert all(b.ratio <= a.ratio for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("cls", [EulerSampler, EulerAncestralSampler])
def test_euler_starts_as_its_origin(cls: type[Sampler]) -> None:
    for spacing, n in itertools.product(("leading", "trailing", "linspace"), (1, 5, 50)):
        levels = cls.build(timestep_spacing=spacing).levels(SCHEDULE, n)
        ratio = levels[0].ratio
        in_origin = math.sqrt(ratio**2 + 1) if spacing == "leading" else ratio
        assert levels.initial_scale == pytest.approx(in_origin / math.sqrt(ratio**2 + 1), rel=4 * EPS)
        assert levels[-1] == CLEAN


@pytest.mark.parametrize("cls", CLASSES)
def test_levels_from_timesteps(cls: type[Sampler]) -> None:
    sampler = cls.build()
    own = sampler.levels(SCHEDULE, 10)
    assert sampler.levels_from_timesteps(SCHEDULE, [level.t for level in own][:-1]) == own
    given_ = sampler.levels_from_timesteps(SCHEDULE, [900, 450.5, 3])
    assert [level.t for level in given_] == [900.0, 450.5, 3.0, 0.0]
    assert SCHEDULE.level(451).ratio > given_[1].ratio > SCHEDULE.level(450).ratio
    for bad, text in [
        ([], "give at least one"),
        ([100, 100], r"must fall: timesteps\[0\] = 100, timesteps\[1\] = 100"),
        ([100, 200], r"must fall: timesteps\[0\] = 100, timesteps\[1\] = 200"),
        ([1000, 1], r"timestep 1000 is outside the schedule's 0 \.\. 999"),
        ([1, -1], "timestep -1 is outside"),
        ([1, "0"], r"timesteps\[1\] = '0': must be a number"),
        ([True], "must be a number"),
        ([math.nan], "must be a number"),
    ]:
        with pytest.raises(InputError, match=text):
            sampler.levels_from_timesteps(SCHEDULE, bad)


@pytest.mark.parametrize("cls", CLASSES)
def test_levels_from_sigmas(cls: type[Sampler]) -> None:
    sampler = cls.build()
    levels = sampler.levels_from_sigmas(SCHEDULE, [20.0, 3.0, 0.5, 0])
    assert [level.ratio for level in levels] == pytest.approx([20.0, 3.0, 0.5, 0], rel=4 * EPS)
    assert levels[0].t == 999.0  # beyond the schedule's range: its last time
    assert SCHEDULE.level(levels[1].t).ratio == pytest.approx(3.0, rel=1e-4)
    for bad, text in [
        ([], "at least two"),
        ([1.0], "at least two"),
        ([1.0, 2.0], "must fall"),
        ([1.0, -0.5], r"sigmas\[1\] = -0.5: must not be negative"),
        ([None, 1.0], r"sigmas\[0\] = None: must be a number"),
    ]:
        with pytest.raises(InputError, match=text):
            sampler.levels_from_sigmas(SCHEDULE, bad)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("n", [0, -1, 1001, 2.0, True, "20"])
def test_impossible_numbers_of_steps(cls: type[Sampler], n: object) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps = .*: must be a whole number from 1 to the schedule's 1000"):
        cls.build().levels(SCHEDULE, n)
