"""Noise schedules against closed forms and against diffusers."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import NoiseSchedule
from ldmkit.errors import ConfigError, InputError
from ldmkit.schedule import CLEAN, vp_level
from ldmkit.testing.strategies import configs
from tests.peers import in_float64, scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers, with numpy 2

EPS = 2.0**-52
BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def schedule(**values: object) -> NoiseSchedule:
    return NoiseSchedule(NoiseSchedule.Config.parse(values))


@given(configs(NoiseSchedule.Config))
def test_signal_falls_from_nearly_clean_to_noise(config: NoiseSchedule.Config) -> None:
    made = NoiseSchedule(config)
    abar = made.alphas_cumprod
    assert abar.dtype == made.betas.dtype == np.float64
    assert abar.shape == made.betas.shape == (config.num_train_timesteps,)
    assert (np.diff(abar, prepend=1.0) < 0).all()
    assert (abar[-1] == 0) == config.rescale_betas_zero_snr
    assert (abar[:-1] > 0).all()
    np.testing.assert_array_equal(abar, np.cumprod(1 - made.betas))
    with pytest.raises(ValueError, match="read-only"):
        abar[0] = 0


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_tables_are_diffusers_in_float64(name: str, zero: bool) -> None:
    made = schedule(beta_schedule=name, rescale_betas_zero_snr=zero)
    with in_float64():
        peer = scheduler("ddim", made.config, "epsilon")
    assert peer.alphas_cumprod.dtype == torch.float64
    np.testing.assert_allclose(made.alphas_cumprod, peer.alphas_cumprod.numpy(), rtol=1e-11)


def test_stable_diffusions_numbers() -> None:
    """sigma_min and sigma_max that k-diffusion and the papers quote for it."""
    made = schedule()
    assert made.betas[0] == pytest.approx(0.00085, rel=4 * EPS)
    assert made.betas[-1] == pytest.approx(0.012, rel=4 * EPS)
    assert made.sigmas[0] == pytest.approx(0.0292, abs=5e-5)
    assert made.sigmas[-1] == pytest.approx(14.6146, abs=5e-5)


def test_closed_forms_of_the_betas() -> None:
    linear = schedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    scaled = schedule(beta_schedule="scaled_linear")
    cosine = schedule(beta_schedule="squaredcos_cap_v2")
    for t in (0, 1, 499, 998, 999):
        assert linear.betas[t] == pytest.approx(1e-4 + (0.02 - 1e-4) * t / 999, rel=1e-13)
        assert math.sqrt(scaled.betas[t]) == pytest.approx(
            math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999, rel=1e-13
        )
    ends = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 500)]
    assert cosine.alphas_cumprod[499] == pytest.approx(ends[1] / ends[0], rel=1e-12)  # Nichol and Dhariwal, eq. 17, f(t) / f(0)
    assert cosine.betas.max() == 0.999


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_keeps_the_first_level(name: str) -> None:
    plain, zero = (schedule(beta_schedule=name, rescale_betas_zero_snr=z) for z in (False, True))
    assert zero.alphas_cumprod[-1] == 0.0
    assert zero.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=8 * EPS)
    assert zero.level(999).alpha == 0.0
    assert zero.level(999).sigma == 1.0
    assert zero.level(999).ratio == math.inf


@given(configs(NoiseSchedule.Config).filter(lambda c: c.num_train_timesteps <= 1000))
def test_levels_are_the_chains_marginals(config: NoiseSchedule.Config) -> None:
    """Mean and variance of x_t | x_0 by running the chain x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) noise."""
    made = NoiseSchedule(config)
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(made.betas):
        mean, variance = mean * math.sqrt(1 - beta), (1 - beta) * variance + beta
        level = made.level(t)
        bound = 4 * EPS * (t + 2)  # a rounding per step
        assert level.alpha == pytest.approx(mean, rel=bound, abs=bound)
        assert level.sigma**2 == pytest.approx(variance, rel=bound, abs=bound)
        assert level.t == t


# -------------------------------------------------------------------------------------------------------------------- spacing


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("whole", [True, False])
def test_spacing_is_diffusers_for_every_n(spacing: str, whole: bool) -> None:
    """Every n for T = 1000.

    diffusers' trailing times come from np.arange with a fractional step: where its rounding makes one time too many (-1, at the
    end), or meets a half, they are not compared; ours are checked against whole-number arithmetic.
    """
    made = schedule(timestep_spacing=spacing, steps_offset=0)
    with in_float64():
        peer = scheduler("ddim" if whole else "euler", made.config, "epsilon")
        compared = 0
        for n in range(2, 1001):
            mine = made.timesteps(n, integers=whole)
            assert len(mine) == n
            peer.set_timesteps(n)
            if spacing == "trailing":
                down, rest = np.divmod(1000 * (n - np.arange(n)), n)
                half = 2 * rest == n
                np.testing.assert_array_equal(mine, down + ((2 * rest > n) | (half & (down % 2 == 1))) - 1)
                if len(peer.timesteps) != n or half.any():
                    continue
            compared += 1
            np.testing.assert_allclose(mine, peer.timesteps.numpy(), rtol=4 * EPS, atol=1e-9)
    assert compared >= 800


def test_one_step_starts_from_the_noise() -> None:
    for spacing, t in (("trailing", 999), ("linspace", 999), ("leading", 1)):
        assert schedule(timestep_spacing=spacing).timesteps(1) == [t]


@given(st.integers(1, 300), st.data())
def test_times_fall_and_stay_inside(total: int, data: st.DataObject) -> None:
    made = schedule(num_train_timesteps=total, steps_offset=0)
    n = data.draw(st.integers(1, total))
    for spacing, whole in itertools.product(("leading", "trailing", "linspace"), (True, False)):
        times = made.timesteps(n, spacing=spacing, integers=whole)
        assert len(times) == n
        assert all(b < a for a, b in itertools.pairwise(times))
        assert 0 <= times[-1] <= times[0] <= total - 1
        if whole:
            assert all(t == int(t) for t in times)


@pytest.mark.parametrize("n", [0, -3, 1001, 3.0, True, None, "5"])
def test_impossible_numbers_of_steps(n: object) -> None:
    with pytest.raises(InputError, match=r"num_inference_steps = .*: must be a whole number from 1 to the schedule's 1000"):
        schedule().timesteps(n)


def test_offset_beyond_the_schedule() -> None:
    with pytest.raises(InputError, match=r"= 1000 with steps_offset = 1 starts at t = 1000, beyond the schedule's last, 999"):
        schedule(steps_offset=1).timesteps(1000)
    assert schedule(steps_offset=0).timesteps(1000)[0] == 999


# ------------------------------------------------------------------------------------------------------------- fractional times


@given(st.floats(0, 999))
def test_fractional_levels_interpolate_the_ratio(t: float) -> None:
    made = schedule()
    level, low = made.level(t), math.floor(t)
    expected = made.sigmas[low] if t == low else (1 - (t - low)) * made.sigmas[low] + (t - low) * made.sigmas[low + 1]
    assert level.ratio == pytest.approx(expected, rel=1e-12)
    assert level.alpha**2 + level.sigma**2 == pytest.approx(1, rel=4 * EPS)
    assert level.t == t


@given(st.floats(0.03, 14.6))
def test_time_of_is_k_diffusions(ratio: float) -> None:
    made = schedule()
    peer = diffusers.EulerDiscreteScheduler()
    assert made.time_of(ratio) == pytest.approx(float(peer._sigma_to_t(np.array([ratio]), np.log(made.sigmas))[0]), abs=1e-9)


def test_time_of_whole_times_and_beyond() -> None:
    made = schedule()
    for t in (0, 1, 500, 999):
        assert made.time_of(made.sigmas[t]) == pytest.approx(t, abs=1e-9)
    assert made.time_of(0.0) == made.time_of(1e-9) == 0.0
    assert made.time_of(1e9) == made.time_of(math.inf) == 999.0
    zero = schedule(rescale_betas_zero_snr=True)
    assert zero.time_of(1e9) == 998.0
    assert zero.time_of(math.inf) == 999.0


def test_vp_level() -> None:
    assert vp_level(math.inf, 7.0) == type(CLEAN)(0.0, 1.0, 7.0)
    assert vp_level(0.0, 0.0) == CLEAN
    assert vp_level(1e200, 0.0).ratio == pytest.approx(1e200)


# ---------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"beta_start": 0.02, "beta_end": 0.01}, r"beta_end = 0\.01 is below beta_start = 0\.02"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0: Input should be greater than or equal to 1"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "needs a second one: num_train_timesteps >= 2"),
        ({"beta_start": 0.5, "beta_end": 0.5, "num_train_timesteps": 3000}, r"from 0 at t = 1021 .*smaller betas"),
        ({"beta_start": 1e-17, "beta_schedule": "linear"}, r"cannot be told from 1, .* at t = 0 \(1\)"),
        ({"beta_schedule": "cosine"}, "beta_schedule = 'cosine': Input should be 'linear', 'scaled_linear' or"),
        (
            {"timestep_spacing": "trialing"},
            "timestep_spacing = 'trialing': Input should be 'leading', 'trailing', 'linspace' or 'quadratic'",
        ),
        ({"beta_strat": 0.1}, "unknown key 'beta_strat' .*did you mean 'beta_start'"),
    ],
)
def test_impossible_schedules(values: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        schedule(**values)


@pytest.mark.parametrize("t", [-1, -0.5, 999.5, 1000, math.nan, math.inf])
def test_times_outside(t: float) -> None:
    with pytest.raises(InputError, match=r"timestep .* is outside the schedule's 0 \.\. 999"):
        schedule().level(t)


def test_no_level_beside_pure_noise() -> None:
    made = schedule(rescale_betas_zero_snr=True)
    assert made.level(998).ratio < math.inf
    with pytest.raises(InputError, match=r"timestep 998\.5 lies beside pure noise at t = 999"):
        made.level(998.5)
