"""What holds for every registered sampler: threads, half precision, no waiting for the device, what callbacks change stays."""

import dataclasses
import functools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmkit import Config, NoiseSchedule, Pipeline, Prediction, Sampler, SamplerFacts, available, build
from ldmkit.errors import ConfigError, InputError, NumericalError
from ldmkit.noise import KeyedNoise, StepNoise

NAMES = sorted(name for name in available("sampler") if build("sampler", name).facts is not None)
SHAPE = (2, 3, 4, 4)
CLEAN_ESTIMATES = ("consistency", "lcm")
"""Their steps go on from the estimate alone."""
MANY = {name: {"original_inference_steps": 1000} for name in ("lcm", "tcd")}
"""What a sampler has to be told to take 1000 steps."""


def network(x, t):
    """Random weights, about unit output at unit input, as a U-Net's noise; every value depends on its neighbours."""
    weights = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(x.dtype) / 27**0.5
    return 1.5 * torch.tanh(torch.nn.functional.conv2d(x, weights, padding=1) + 0.3 * math.cos(t / 200))


def denoiser(prediction):
    return lambda x, level: prediction.to_x0(network(x / level.scale, level.t), x, level)


DENOISE = denoiser(Prediction())


class InOrder(StepNoise):
    """Increments of the motion are new draws: many times as fast."""

    def between(self, high, low):
        return self()


def run(sampler, levels, *, denoise=DENOISE, seed=0, dtype=torch.float32, change=lambda state: state, draws=StepNoise):
    source = KeyedNoise(seed, range(SHAPE[0]))
    noise = source(SHAPE, step=-1, draw=0, dtype=dtype)
    state = sampler.init(noise, levels, start=None if sampler.facts.from_noise else noise)
    while not state.done:
        state = change(sampler.step(denoise, state, draws(source, state.step, state.x)))
        assert state.x.dtype == dtype
        assert state.x.isfinite().all(), (type(sampler).__name__, state.step)
    return state.x


@pytest.mark.parametrize("name", NAMES)
def test_one_object_serves_eight_threads(name):
    """Same bits as eight objects, one after the other."""
    one, schedule = build("sampler", name), NoiseSchedule()

    def job(sampler, seed):
        return run(sampler, sampler.levels(schedule, 5 + seed % 3), seed=seed)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(functools.partial(job, one), range(8)))
    for seed in range(8):
        assert torch.equal(together[seed], job(build("sampler", name), seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 50, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_half_precision_stays_finite(n, zero_terminal, dtype):
    """A noise prediction, whose x0 is large at great noise; a v prediction where the run starts at zero signal."""
    schedule = NoiseSchedule(NoiseSchedule.Config(rescale_betas_zero_snr=zero_terminal, timestep_spacing="trailing"))
    denoise = denoiser(Prediction(Prediction.Config(type="v_prediction" if zero_terminal else "epsilon")))
    for name in NAMES:
        sampler = build("sampler", name, **(MANY.get(name, {}) if n == 1000 else {}))
        run(sampler, sampler.levels(schedule, n), denoise=denoise, dtype=dtype, draws=InOrder)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: numbers read from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits_for_the_device(name):
    sampler, made = build("sampler", name), torch.randn(SHAPE)

    class Noise:
        def __call__(self):
            return made

        def between(self, high, low):
            return made

    state = sampler.init(made, sampler.levels(NoiseSchedule(), 6), start=None if sampler.facts.from_noise else made)
    with Waits() as waits:
        while not state.done:
            state = sampler.step(lambda x, level: 0.5 * x, state, Noise())
    assert (waits.count > 0) == (name == "dpm-adaptive")


AS_SIGMA = ["ddim", "euler", "heun", "dpm-2", "dpm-singlestep", "dpm++-2m", "unipc"]


@pytest.mark.parametrize("changed_at", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLEAN_ESTIMATES])
def test_what_is_changed_between_steps_stays(name, changed_at):
    """Inpainting and callbacks put new latents in the state; no step starts from older ones. With D = 0, x goes as sigma."""
    told = {"dpm-singlestep": {"order": 3}, "dpm-adaptive": {"h_init": 0.1, "icoeff": 0.0}}  # blocks of 3; as many steps
    sampler = build("sampler", name, **told.get(name, {}))
    levels = sampler.levels(NoiseSchedule(NoiseSchedule.Config(set_alpha_to_one=False)), 20)[:6]

    def changed(state):
        return dataclasses.replace(state, x=state.x + 1) if state.step == changed_at else state

    places = []
    nothing = functools.partial(run, sampler, levels, denoise=lambda x, level: 0 * x, dtype=torch.float64)
    plain, moved = nothing(), nothing(change=lambda state: places.append(state.level) or changed(state))
    assert (moved - plain).min() > 0
    if name in AS_SIGMA:
        torch.testing.assert_close(moved - plain, torch.full_like(plain, places[-1].sigma / places[changed_at - 1].sigma))


@pytest.mark.parametrize("name", NAMES)
def test_given_times_and_ratios_are_those_of_a_run(name):
    """`timesteps=` and `sigmas=` with a run's own numbers are that run; with others, a run through them."""
    sampler, schedule = build("sampler", name), NoiseSchedule()
    falling = lambda levels: levels.reversed() if levels.rising else levels  # noqa: E731
    own = falling(sampler.levels(schedule, 6))
    by_times = sampler.levels_from_timesteps(schedule, [level.t for level in own][:-1])
    assert falling(by_times) == own
    by_ratios = sampler.levels_from_sigmas(schedule, [level.ratio for level in own])
    for got, want in zip(falling(by_ratios), own, strict=True):
        assert (got.alpha, got.sigma) == pytest.approx((want.alpha, want.sigma), rel=1e-12)
    assert by_ratios.initial_scale == pytest.approx(by_times.initial_scale, rel=1e-12)
    for levels in (
        sampler.levels_from_timesteps(schedule, [950.0, 600.5, 33.0, 2.0]),
        sampler.levels_from_sigmas(schedule, [12.0, 3.0, 0.4, 0.05]),
    ):
        run(sampler, levels)


def test_networks_that_no_steps_suit():
    """One that never answers alike, and one that answers with no numbers."""
    sampler = build("sampler", "dpm-adaptive", rtol=1e-9, atol=1e-9)
    with pytest.raises(NumericalError, match=r"within rtol = 1e-09, atol = 1e-09 in torch\.float32; raise them"):
        run(sampler, sampler.levels(NoiseSchedule(), 10), denoise=lambda x, level: torch.randn_like(x))
    with pytest.raises(NumericalError, match=r"error is nan at sigma / alpha = .* not finite; in float16"):
        run(sampler, sampler.levels(NoiseSchedule(), 10), denoise=lambda x, level: x * torch.nan)


class PlainSampler(Sampler):
    """Says nothing of itself; goes down as it is told, and forgets what it saw."""

    class Config(Config):
        pass

    def levels(self, schedule, num_inference_steps):
        return build("sampler", "ddim").levels(schedule, num_inference_steps)

    def transition(self, denoise, state):
        return build("sampler", "ddim").transition(denoise, state)


class FromNoise(PlainSampler):
    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="here", image_to_image=False)


@pytest.fixture(scope="module")
def pipe():
    unet = {"block_out_channels": [8], "layers_per_block": 1, "transformer_layers_per_block": [0], "norm_num_groups": 4}
    parts = {
        "autoencoder": {"name": "identity", "channels": 3},
        "denoiser": {"name": "unet", "in_channels": 3, "out_channels": 3, "cross_attention_dim": None, **unet},
    }
    torch.manual_seed(0)
    made = Pipeline(**parts)
    torch.nn.init.normal_(made.denoiser.conv_out.weight, std=0.05)  # it starts from 0, and then says nothing
    made.set_progress_bar_config(disable=True)
    return made


IMAGE = torch.linspace(-0.5, 0.5, 3 * 64).view(1, 3, 8, 8)
MASK = torch.ones(1, 1, 8, 8)


@pytest.mark.parametrize(
    ("sampler", "arguments", "told"),
    [
        ("ddim-inverse", {"height": 8, "width": 8}, "DDIMInverseSampler does not start from noise: give image="),
        ("ddim-inverse", {"image": IMAGE, "mask_image": MASK}, "DDIMInverseSampler cannot keep a part of the image"),
        (FromNoise.build(), {"image": IMAGE}, "FromNoise starts from noise only: leave out image"),
    ],
)
def test_what_a_sampler_cannot_is_said_before_anything_runs(pipe, monkeypatch, sampler, arguments, told):
    for part in (pipe.autoencoder, pipe.denoiser):
        monkeypatch.setattr(part, "encode" if part is pipe.autoencoder else "forward", None)
    pipe.sampler = sampler
    with pytest.raises(InputError, match=told):
        pipe(**arguments, num_inference_steps=2, seed=0)


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("restart", {"intervals": [{"low": 0.3, "high": 0.14}]}, "low = 0.3, high = 0.14: a restart goes up"),
        ("euler", {"s_churn": 1.0, "s_tmin": 5.0, "s_tmax": 1.0}, "s_tmin = 5 is above s_tmax = 1"),
    ],
)
def test_configs_that_could_never_act_are_refused(name, config, told):
    with pytest.raises(ConfigError, match=told):
        build("sampler", name, **config)


@pytest.mark.parametrize("sampler", [*NAMES, pytest.param(PlainSampler.build(), id="plain")])
def test_every_sampler_does_what_it_says(pipe, sampler):
    """Text-to-image, image-to-image and inpainting through the pipeline; what is kept of an image is kept."""
    pipe.sampler = sampler
    facts = pipe.sampler.facts or FromNoise.facts
    options = {"num_inference_steps": 4, "seed": 0, "output_type": "latent"}
    if facts.from_noise:
        assert pipe(height=8, width=8, **options).images.isfinite().all()
    if facts.image_to_image:
        part = {"strength": 0.5} if facts.from_noise else {}
        assert pipe(image=IMAGE, **part, **options).images.isfinite().all()
    if facts.inpainting:
        kept = pipe(image=IMAGE, mask_image=0 * MASK, **options).images
        torch.testing.assert_close(kept, IMAGE)


def test_an_image_is_inverted_and_comes_back(pipe):
    """Through the pipeline; the way back differs by first order in the steps."""
    apart = []
    for n in (50, 100):
        pipe.sampler = "ddim-inverse"
        options = {"num_inference_steps": n, "output_type": "latent", "seed": 0}
        noise = pipe(image=IMAGE, **options).images
        pipe.sampler = "ddim"
        again = pipe(height=8, width=8, latents=noise, **options).images
        apart.append(float((again - IMAGE).abs().max()))
    assert 0 < apart[1] < 0.7 * apart[0] < 0.7 * float(IMAGE.std())


def test_rising_levels_rise():
    levels = build("sampler", "ddim").levels(NoiseSchedule(), 5)
    assert levels.reversed().reversed() == levels
    assert levels.reversed().rising
    assert levels.reversed()[1:].rising
    with pytest.raises(ConfigError, match="noise levels must rise"):
        levels.reversed().through(levels)
