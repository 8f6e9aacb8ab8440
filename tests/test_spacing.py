"""Rules for sigma / alpha, and the schedules of flows and EDM: against diffusers and closed forms."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import EDMSchedule, FlowSchedule, NoiseSchedule, Pipeline, build, spaced_ratios
from ldmkit.continuous import make_schedule
from ldmkit.errors import ConfigError, InputError
from ldmkit.spacing import ALIGN_YOUR_STEPS, SIGMA_SCHEDULES
from tests.peers import in_float64, scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers, with numpy 2

SCHEDULE = NoiseSchedule()
RANGE = {"high": 14.6, "low": 0.03}


def flow(**values):
    return FlowSchedule(FlowSchedule.Config.parse(values))


@pytest.mark.parametrize("name", SIGMA_SCHEDULES)
@given(n=st.integers(1, 60))
def test_ratios_fall_within_what_the_rule_says(name, n):
    ratios = spaced_ratios(name, n, SCHEDULE, **RANGE)
    assert len(ratios) == n
    assert all(a > b > 0 for a, b in itertools.pairwise(ratios))
    if name in ("karras", "exponential", "polyexponential"):
        assert ratios[0] == pytest.approx(RANGE["high"], rel=1e-12)
        assert n == 1 or ratios[-1] == pytest.approx(RANGE["low"], rel=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("n", [2, 7, 30])
def test_levels_are_those_of_diffusers(ours, theirs, spacing, n):
    schedule = SCHEDULE.config.replace(timestep_spacing=spacing)
    with in_float64():
        peer = scheduler("euler", schedule, "epsilon", **{theirs: True})
        peer.set_timesteps(n)
    levels = build("sampler", "euler", timestep_spacing=spacing, sigma_schedule=ours).levels(SCHEDULE, n)
    np.testing.assert_allclose([level.ratio for level in levels], peer.sigmas, rtol=1e-9)
    np.testing.assert_allclose([level.t for level in levels[:-1]], peer.timesteps, atol=1e-6)


def test_rules_by_hand():
    assert spaced_ratios("simple", 4, SCHEDULE, **RANGE) == [SCHEDULE.level(t).ratio for t in (999, 749, 499, 249)]
    assert spaced_ratios("sgm-uniform", 3, SCHEDULE, **RANGE) == [SCHEDULE.level(t).ratio for t in (999, 666, 333)]
    assert spaced_ratios("ays-sd15", 10, SCHEDULE, **RANGE) == pytest.approx(ALIGN_YOUR_STEPS["ays-sd15"][:-1], rel=1e-12)
    third = spaced_ratios("polyexponential", 3, SCHEDULE, rho=2.0, **RANGE)[1]
    assert third == pytest.approx(math.exp(0.25 * math.log(14.6 / 0.03) + math.log(0.03)), rel=1e-12)
    # Half of a symmetric Beta is at one half, whatever its exponent: t = round(999 / 2).
    assert spaced_ratios("beta", 2, SCHEDULE, **RANGE)[1] == SCHEDULE.level(500).ratio
    first = spaced_ratios("vp", 2, SCHEDULE, **RANGE)[0]
    assert first == pytest.approx(math.sqrt(math.expm1(19.9 / 2 + 0.1)), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: spaced_ratios("exponential", 3, SCHEDULE, rho=2.0, **RANGE), "rho = 2 goes with 'karras'"),
        (lambda: spaced_ratios("karras", 3, SCHEDULE, high=math.inf, low=0.1), "needs a finite range .* give sigmas="),
        (lambda: spaced_ratios("simple", 3, EDMSchedule(), **RANGE), "the EDMSchedule has none; take 'karras'"),
        (lambda: build("sampler", "dpm++-2m").levels(SCHEDULE, 999), "= 999 with steps_offset = 1 starts at t = 1000, beyond"),
        (lambda: build("sampler", "deis").levels(EDMSchedule(), 3), "the EDMSchedule has none; take 'zero'"),
        (lambda: build("sampler", "tcd").levels(EDMSchedule(), 3), "tcd goes by times from 0 up"),
        (lambda: spaced_ratios("beta", 900, SCHEDULE, **RANGE), "the levels of 'beta' meet there"),
        (lambda: build("sampler", "euler", rho=3.0).levels(SCHEDULE, 3), "rho = 3 goes with sigma_schedule"),
        (lambda: EDMSchedule().timesteps(3, spacing="leading"), "an EDM schedule has its own"),
        (lambda: flow().timesteps(3, spacing="leading"), "a flow has 'trailing' and 'linspace'"),
        (lambda: flow().timesteps(0), "num_inference_steps = 0"),
        (lambda: flow().level(1000.5), r"outside the schedule's 0 \.\. 1000"),
    ],
)
def test_what_cannot_be(call, told):
    with pytest.raises(InputError, match=told):
        call()


def velocity(x, t):
    return torch.tanh(x + t / 1000)


@given(st.floats(0.3, 6.0), st.integers(2, 40))
def test_a_flow_run_is_that_of_diffusers(shift, n):
    """Latents too: Euler's update is linear, so it is the flow's own."""
    sampler = build("sampler", "euler")
    with in_float64():
        peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        trailing = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        peer.set_timesteps(n)
        trailing.set_timesteps(sigmas=list(np.linspace(1.0, 1 / n, n)))  # what its pipelines for SD3 and Flux ask for
        for spacing, theirs in (("linspace", peer), ("trailing", trailing)):
            levels = sampler.levels(flow(shift=shift, timestep_spacing=spacing), n)
            np.testing.assert_allclose([level.sigma for level in levels], theirs.sigmas, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose([level.t for level in levels[:-1]], theirs.timesteps, rtol=1e-9)

            y = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            state = sampler.init(y, levels)
            while not state.done:
                state = sampler.step(lambda z, level: z - level.sigma * velocity(z, level.t), state, None)
            for t in theirs.timesteps:
                y = theirs.step(velocity(y, t), t, y, return_dict=False)[0]
            assert y.dtype == torch.float64
            assert float((state.x - y).abs().max()) <= 1e-9 * float(y.std())


def test_edm_times_are_karras():
    schedule = EDMSchedule()
    ratios = [schedule.level(t).ratio for t in schedule.timesteps(18)]
    np.testing.assert_allclose(ratios, spaced_ratios("karras", 18, schedule, high=80.0, low=0.002), rtol=1e-12)
    assert schedule.at(0.5).t == pytest.approx(math.log(0.5) / 4)


@pytest.mark.parametrize("values", [{"kind": "flow", "shift": 3.0}, {"kind": "edm"}, {"num_train_timesteps": 10}, None])
def test_schedules_from_values_and_back(values):
    schedule = make_schedule(values)
    assert make_schedule(schedule) is schedule
    again = make_schedule(schedule.config.to_dict())
    assert type(again) is type(schedule)
    assert again.config == schedule.config == make_schedule(schedule.config).config


def test_unknown_schedules():
    with pytest.raises(ConfigError, match="schedule kind 'flwo': must be one of ddpm, flow, edm"):
        make_schedule({"kind": "flwo"})
    with pytest.raises(ConfigError, match="no config of a schedule"):
        make_schedule(build("sampler", "euler").config)


@pytest.mark.parametrize("value", ["0", True, [1], {"kind": ["flow"]}, {"kind": {}}])
def test_a_schedule_of_a_wrong_type_is_named(value):
    with pytest.raises(ConfigError, match="schedule"):
        make_schedule(value)


def test_a_flow_pipeline_is_saved_and_loaded(tmp_path):
    parts = {
        "autoencoder": {"name": "identity", "channels": 4},
        "denoiser": {
            "name": "unet",
            "block_out_channels": [8],
            "layers_per_block": 1,
            "transformer_layers_per_block": [0],
            "cross_attention_dim": None,
            "norm_num_groups": 4,
        },
    }
    pipe = Pipeline(**parts, sampler="euler", schedule={"kind": "flow", "shift": 3.0}, prediction="flow")
    options = {"height": 8, "width": 8, "num_inference_steps": 3, "seed": 1, "output_type": "latent", "progress": False}
    latents = pipe(**options).images
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "pipe"))
    assert isinstance(again.schedule, FlowSchedule)
    assert torch.equal(again(**options).images, latents)
