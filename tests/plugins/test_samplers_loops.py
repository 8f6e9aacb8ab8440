"""Whole loops: same network, same generator, same noise as diffusers => the same latents.

Ours are variance-preserving throughout, Euler's of diffusers variance-exploding; both end at sigma = 0, where they agree.
"""

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from ldmkit import Condition, Denoiser, Model, NoiseSchedule, Prediction, Sampler, build, classifier_free
from ldmkit.config import Config
from ldmkit.noise import GeneratorNoise
from tests.peers import Job, Network, in_float64, run, scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers, with numpy 2

SAMPLERS = [("ddpm", None), ("ddim", 0.0), ("ddim", 0.6), ("ddim", 1.0), ("euler", None), ("euler-ancestral", None)]
SPACINGS = ["leading", "trailing", "linspace"]
SHAPE = (2, 3, 4, 4)
STEPS = 8

NOT_COMPARED = {
    ("ddim", "linspace"): "diffusers' DDIM goes from t to t - T // n, which is not the next time unless n = T; compared there",
    ("ddim", "trailing, n not dividing T"): "likewise",
    ("euler", "zero terminal SNR"): "diffusers' Euler replaces the last alpha-bar by 2^-24; ours starts at 0",
    (
        "ddpm",
        "fixed_large, last t > 0",
    ): "diffusers adds sqrt(beta) noise to the finished image; Ho et al. 2020, alg. 2, does not",
    ("ddpm", "learned_range, last t > 0"): "likewise, between sqrt(beta) and the floor of 1e-10",
    ("all", "linspace, n = 1"): "diffusers takes its one step at t = 0, from a nearly clean level; ours at T - 1",
}


class Wrapped(Denoiser):
    """A plain function as a denoiser."""

    class Config(Config):
        pass

    in_channels = out_channels = SHAPE[1]
    multiple_of = 1
    accepts = requires = frozenset({"vector_BC"})

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return self.network(x_BCHW, t_B, condition.vector_BC)


def smooth(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """An analytic network: smooth, bounded slopes, every argument matters."""
    t, c = t.view(-1, 1, 1, 1), c.view(-1, 1, 1, 1)
    return 0.8 * torch.tanh(x + 0.5 * c + 0.3 * torch.sin(t / 150)) + 0.1 * torch.roll(x, 1, -1) * torch.cos(t / 400 + c)


def with_variance(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The same with v beside it, which leaves [-1, 1] here and there, as a network's may."""
    return torch.cat([smooth(x, t, c), 1.2 * torch.sin(3 * x + t.view(-1, 1, 1, 1) / 90 + 2 * c.view(-1, 1, 1, 1))], dim=1)


def ours(
    sampler: Sampler,
    schedule: NoiseSchedule,
    prediction: Prediction,
    network: Network,
    job: Job,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Tensor:
    """The same job by our parts (the pipeline's loop has its own tests)."""
    source = GeneratorNoise(generator, draw_dtype=dtype)

    def noise() -> Tensor:
        return source(job.shape, step=0, draw=0, dtype=dtype)

    levels = sampler.levels(schedule, job.steps)[job.first_step :]
    prediction.check(levels)
    conditions = [Condition(vector_BC=torch.full((job.shape[0], 1), c, dtype=dtype)) for c in (job.condition, job.negative)]
    model = Model(Wrapped(network), prediction, keep_variance=sampler.takes_variance)
    denoise = classifier_free(model, conditions[0], conditions[1], job.guidance_scale)
    first = noise()
    blank = job.start is None or (job.mask is not None and job.strength == 1)
    state = sampler.init(first, levels, start=None if blank else job.start)
    while not state.done:
        state = sampler.step(denoise, state, noise)
        if job.mask is not None:
            kept = job.start if state.done else state.level.alpha * job.start + state.level.sigma * first
            state = dataclasses.replace(state, x=(1 - job.mask) * kept + job.mask * state.x)
    return state.x


def jobs() -> dict[str, Job]:
    """Text-to-image, image-to-image, and inpainting from pure noise and from the image."""
    random = torch.Generator().manual_seed(5)
    start = torch.randn(SHAPE, generator=random, dtype=torch.float64)
    mask = (torch.rand((SHAPE[0], 1, *SHAPE[2:]), generator=random) > 0.5).double()
    guided = {"shape": SHAPE, "steps": STEPS, "guidance_scale": 7.5}
    return {
        "text": Job(**guided),
        "image": Job(**guided, start=start, strength=0.6),
        "inpaint": Job(**guided, start=start, mask=mask),
        "inpaint-weak": Job(**guided, start=start, mask=mask, strength=0.6),
    }


JOBS = jobs()
SHORT = {"num_train_timesteps": STEPS, "beta_schedule": "linear", "beta_start": 0.02, "beta_end": 0.4}


def differs(
    name: str, job: Job, kind: str, schedule: NoiseSchedule.Config, *, eta: float | None = None, **options: str
) -> float:
    """Largest difference between the two final latents, in units of their standard deviation."""
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    own = {} if eta is None else {"eta": eta}
    sampler = build("sampler", name, **own, **({"variance": options["variance_type"]} if options else {}))
    with in_float64():
        peer = scheduler(name, schedule, kind, **options)
        network = smooth if options.get("variance_type") != "learned_range" else with_variance
        theirs = run(peer, network, job, generators[0], dtype=torch.float64, eta=eta if name == "ddim" else None)
    assert theirs.dtype == torch.float64
    prediction = Prediction(Prediction.Config(type=kind, variance="learned_range" if sampler.takes_variance else None))
    mine = ours(sampler, NoiseSchedule(schedule), prediction, network, job, generators[1], torch.float64)
    assert torch.equal(generators[0].get_state(), generators[1].get_state()), "the streams are out of step"
    return float((mine - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("task", JOBS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
def test_whole_loop_equals_diffusers(name: str, eta: float | None, spacing: str, kind: str, task: str) -> None:
    short = SHORT if (name, spacing) == ("ddim", "linspace") else {}
    schedule = NoiseSchedule.Config(timestep_spacing=spacing, **short)
    assert differs(name, JOBS[task], kind, schedule, eta=eta) < 1e-9


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [False, True])
def test_ddim_ends_where_diffusers_does(to_one: bool, offset: int, eta: float) -> None:
    """At t = 0 (in place when the last time is 0 already), or on the clean image."""
    schedule = NoiseSchedule.Config(steps_offset=offset, set_alpha_to_one=to_one)
    assert differs("ddim", JOBS["text"], "epsilon", schedule, eta=eta) < 1e-9


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
def test_other_schedules(name: str, eta: float | None, beta_schedule: str) -> None:
    schedule = NoiseSchedule.Config(beta_schedule=beta_schedule, beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    assert differs(name, JOBS["text"], "v_prediction", schedule, eta=eta) < 1e-9


@pytest.mark.parametrize(("name", "eta"), [sampler for sampler in SAMPLERS if sampler[0] in ("ddpm", "ddim")])
def test_zero_terminal_snr(name: str, eta: float | None) -> None:
    schedule = NoiseSchedule.Config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert build("sampler", name).levels(NoiseSchedule(schedule), STEPS)[0].alpha == 0
    assert differs(name, JOBS["text"], "v_prediction", schedule, eta=eta) < 1e-9


def test_ddpm_with_the_large_variance() -> None:
    schedule = NoiseSchedule.Config(timestep_spacing="linspace")
    assert differs("ddpm", JOBS["text"], "epsilon", schedule, variance_type="fixed_large") < 1e-9


@pytest.mark.parametrize("task", JOBS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_with_the_variance_the_model_says(spacing: str, kind: str, task: str) -> None:
    short = SHORT if spacing == "trailing" else {}  # all end at t = 0; see NOT_COMPARED
    schedule = NoiseSchedule.Config(timestep_spacing=spacing, steps_offset=0, **short)
    assert differs("ddpm", JOBS[task], kind, schedule, variance_type="learned_range") < 1e-9


def test_what_is_not_compared_is_the_peers_doing() -> None:
    """Each line of NOT_COMPARED, shown."""
    shown = set()
    for spacing, key in (("linspace", "linspace"), ("trailing", "trailing, n not dividing T")):
        peer = scheduler("ddim", NoiseSchedule.Config(timestep_spacing=spacing), "epsilon")
        peer.set_timesteps(7)
        assert (np.diff(peer.timesteps.numpy()) != -(1000 // 7)).any()
        shown.add(("ddim", key))

    peer = scheduler("euler", NoiseSchedule.Config(rescale_betas_zero_snr=True), "v_prediction")
    assert peer.alphas_cumprod[-1] == 2**-24
    shown.add(("euler", "zero terminal SNR"))

    leading = NoiseSchedule.Config(timestep_spacing="leading", steps_offset=1)
    assert differs("ddpm", JOBS["text"], "epsilon", leading, variance_type="fixed_large") > 1e-3
    peer = scheduler("ddpm", leading, "epsilon", variance_type="fixed_large")
    peer.set_timesteps(STEPS)
    assert peer._get_variance(peer.timesteps[-1]) > 0
    shown.add(("ddpm", "fixed_large, last t > 0"))
    assert differs("ddpm", JOBS["text"], "epsilon", leading, variance_type="learned_range") > 1e-3
    peer = scheduler("ddpm", leading, "epsilon", variance_type="learned_range")
    peer.set_timesteps(STEPS)
    assert torch.exp(0.5 * peer._get_variance(peer.timesteps[-1], torch.ones(()))) > 0
    shown.add(("ddpm", "learned_range, last t > 0"))

    peer = scheduler("euler", NoiseSchedule.Config(timestep_spacing="linspace"), "epsilon")
    peer.set_timesteps(1)
    assert peer.timesteps.tolist() == [0]
    assert build("sampler", "euler", timestep_spacing="linspace").levels(NoiseSchedule(), 1)[0].t == 999
    shown.add(("all", "linspace, n = 1"))
    assert shown == set(NOT_COMPARED)


@pytest.mark.parametrize("kind", ["timesteps", "sigmas"])
def test_euler_on_given_levels(kind: str) -> None:
    """`timesteps=` and `sigmas=` of diffusers' pipelines."""
    values = [980.0, 700.5, 420.0, 30.25] if kind == "timesteps" else [14.0, 6.5, 2.0, 0.3, 0.0]
    schedule = NoiseSchedule(NoiseSchedule.Config(timestep_spacing="trailing"))
    with in_float64():
        peer = scheduler("euler", schedule.config, "epsilon")
        peer.set_timesteps(**{kind: values})
    sampler = build("sampler", "euler")
    levels = getattr(sampler, f"levels_from_{kind}")(schedule, values)
    torch.testing.assert_close(torch.tensor([level.ratio for level in levels], dtype=torch.float64), peer.sigmas)
    torch.testing.assert_close(torch.tensor([level.t for level in levels[:4]], dtype=torch.float64)[:4], peer.timesteps)
    assert levels.initial_scale * math.hypot(1, levels[0].ratio) == pytest.approx(float(peer.init_noise_sigma), rel=1e-12)


@pytest.fixture(scope="module")
def unet() -> Network:
    """A default-initialised tiny U-Net in float32."""
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=4,
        in_channels=SHAPE[1],
        out_channels=SHAPE[1],
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=4,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    return lambda x, t, c: net(x, t, c.view(-1, 1, 1).expand(-1, 2, 4)).sample


@pytest.mark.parametrize("task", JOBS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
@torch.no_grad()
def test_whole_loop_with_a_network_in_float32(name: str, eta: float | None, kind: str, task: str, unet: Network) -> None:
    job = JOBS[task]
    job = dataclasses.replace(
        job, start=None if job.start is None else job.start.float(), mask=None if job.mask is None else job.mask.float()
    )
    schedule = NoiseSchedule.Config(timestep_spacing="trailing" if name == "ddim" else "linspace")
    theirs = run(
        scheduler(name, schedule, kind), unet, job, torch.Generator().manual_seed(3), dtype=torch.float32,
        eta=eta if name == "ddim" else None,
    )  # fmt: skip
    sampler = build("sampler", name, **({} if eta is None else {"eta": eta}))
    prediction = Prediction(Prediction.Config(type=kind))
    mine = ours(sampler, NoiseSchedule(schedule), prediction, unet, job, torch.Generator().manual_seed(3), torch.float32)
    assert float((mine - theirs).abs().max() / theirs.std()) < 1e-4
