"""Models that predict the variance beside the mean: Nichol and Dhariwal 2021. The steps themselves: test_samplers_loops.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from ldmkit import (
    Condition,
    Denoised,
    Denoiser,
    Level,
    Model,
    Pipeline,
    Prediction,
    Sampler,
    build,
    classifier_free,
    classifier_guided,
    combined,
    thresholded,
    unguided,
    within,
)
from ldmkit.checkpoints.schedulers import read_scheduler, write_scheduler
from ldmkit.config import Config
from ldmkit.errors import ConfigError, InputError
from ldmkit.schedule import NoiseSchedule, vp_level
from ldmkit.testing import conformance
from ldmkit.training.diffusion import DiffusionObjective
from ldmkit.training.losses import WeightingConfig

LEARNED = {"type": "sample", "variance": "learned_range"}
DDPM = {"name": "ddpm", "variance": "learned_range"}
LEVEL = vp_level(1.5, 600.0)


class Both(Denoiser):
    """x0 = tanh(w x + c), and v = sin(2 w x + c)."""

    class Config(Config):
        pass

    in_channels, out_channels, multiple_of = 3, 6, 1
    accepts, requires = frozenset({"vector_BC"}), frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        c = 0.0 if condition.vector_BC is None else condition.vector_BC[:, :, None, None]
        return torch.cat([torch.tanh(self.w * x_BCHW + c), torch.sin(2 * self.w * x_BCHW + c)], dim=1)


class Half(Both):
    """The same without the variance."""

    out_channels = 3

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return super().forward(x_BCHW, t_B, condition)[:, :3]


def pipeline(**options: Any) -> Pipeline:
    return Pipeline(**{"autoencoder": "identity", "denoiser": Both(), "sampler": DDPM, "prediction": LEARNED, **options})


def draw(pipe: Pipeline, **options: Any) -> Any:
    size = {"height": 2, "width": 2, "num_inference_steps": 6, "num_images_per_prompt": 3, "seed": 1}
    return pipe(**size, progress=False, output_type="latent", **options)


def normal() -> Tensor:
    return torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def at(c: float) -> Condition:
    return Condition(vector_BC=torch.full((2, 1), c, dtype=torch.float64))


def test_the_variance_of_a_run_and_its_likelihood_are_the_model_s() -> None:
    pipe = pipeline()
    way = draw(pipe, return_trajectory=True).trajectory
    small, large = (build("sampler", "ddpm", variance=f"fixed_{size}") for size in ("small", "large"))
    for k in range(5):
        level, to = way.levels[k], way.levels[k + 1]
        x, after, w = way.latents_NBCHW[k], way.latents_NBCHW[k + 1], pipe.denoiser.w
        least, most = (math.log(sampler.coefficients(level, to).std ** 2) for sampler in (small, large))
        fraction = (torch.sin(2 * w * x / level.scale) + 1) / 2
        std = torch.exp((fraction * most + (1 - fraction) * least) / 2)  # eq. 15
        torch.testing.assert_close(way.stds[k], std.detach(), rtol=1e-12, atol=0)
        law = small.coefficients(level, to)
        exact_B = Normal(law.on_x * x + law.on_x0 * torch.tanh(w * x / level.scale), std).log_prob(after).flatten(1).sum(dim=1)
        torch.testing.assert_close(way.log_probs_NB[k], exact_B.detach(), rtol=1e-10, atol=1e-10)
        (slope,), (exact,) = (torch.autograd.grad(p.sum(), w) for p in (way.log_prob_B(k), exact_B))
        torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-9)
        assert type(way.states[k + 1].denoised) is Tensor
    assert way.stds[5] == 0


def test_other_samplers_leave_the_variance_out() -> None:
    """To the bits of a model that has none."""

    for sampler in ("ddpm", "dpm++-2m", "euler-ancestral"):
        one, other = pipeline(sampler=sampler), pipeline(denoiser=Half(), sampler=sampler, prediction="sample")
        assert torch.equal(draw(one).images, draw(other).images), sampler
    assert type(Model(Both(), Prediction(Prediction.Config(**LEARNED)))(normal(), LEVEL, Condition())) is Tensor


def log_p(x: Tensor, level: Level) -> Tensor:
    return -x.square().flatten(1).sum(dim=1)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_moves_x0_and_keeps_the_variance_of_what_is_asked(batched: bool) -> None:
    model = Model(Both(), Prediction(Prediction.Config(**LEARNED)), keep_variance=True)
    plain = Model(model.denoiser, model.prediction)
    want = unguided(model, at(0.7))(normal(), LEVEL).variance_fraction
    assert not torch.equal(want, unguided(model, at(-0.4))(normal(), LEVEL).variance_fraction)

    def closures(of: Model) -> dict[str, Any]:
        free = classifier_free(of, at(0.7), at(-0.4), 7.5, batched=batched)
        return {
            "scale": free,
            "scale 1": classifier_free(of, at(0.7), at(-0.4), 1.0, batched=batched),
            "rescale": classifier_free(of, at(0.7), at(-0.4), 7.5, rescale=0.7, batched=batched),
            "the first of several": combined(
                of, [at(0.7), at(0.1)], weights=[0.8, 0.6], negative=at(-0.4), scale=3.0, batched=batched
            ),
            "inside an interval": within(free, unguided(of, at(0.2)), 1.0, 2.0),
            "outside of one": within(unguided(of, at(0.2)), unguided(of, at(0.7)), 2.0, 3.0),
            "classifier": classifier_guided(free, log_p, 2.0),
            "threshold": thresholded(free, 0.9, 0.5),
        }

    both, alone = closures(model), closures(plain)
    for name, denoise in both.items():
        got = denoise(normal(), LEVEL)
        assert isinstance(got, Denoised), name
        x0, fraction = Denoised.parts_of(got)
        torch.testing.assert_close(fraction, want, rtol=1e-13, atol=1e-13)
        expected = alone[name](normal(), LEVEL)
        assert type(expected) is Tensor
        assert torch.equal(x0, expected), name


def test_a_denoised_is_x0_until_something_is_done_to_it() -> None:
    x0 = normal().requires_grad_()
    denoised = Denoised.of(2 * x0, torch.zeros_like(x0))
    assert type(denoised + 0) is Tensor
    assert type(denoised.clone()) is Tensor
    (slope,) = torch.autograd.grad(denoised.sum(), x0)
    assert torch.equal(slope, torch.full_like(x0, 2.0))


def test_what_does_not_fit_is_named_before_the_run() -> None:
    for settings, message in (
        ({"prediction": "sample"}, r"predicts 6 channels and the autoencoder's latents have 3; .* 'learned_range'"),
        ({"autoencoder": {"name": "identity", "channels": 6}}, "predicts 6 channels and the autoencoder's latents have 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipeline(**settings)
    three = Half()
    three.register_forward_pre_hook(lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match=r"the prediction has none \(variance = None\); take the sampler's"):
        draw(pipeline(denoiser=three, prediction="sample"))
    with pytest.raises(ConfigError, match=r"Half predicts 3 channels; with a learned variance .* twice the latents' 3"):
        Model(Half(), Prediction(Prediction.Config(**LEARNED)))(normal(), LEVEL, Condition())
    with pytest.raises(ConfigError, match="variance = 'learned': Input should be 'learned_range'"):
        Prediction.Config.parse({"variance": "learned"})


def test_a_guidance_that_drops_the_variance_is_told_so() -> None:
    sampler: Sampler = build("sampler", "ddpm", variance="learned_range")
    state = sampler.init(normal(), sampler.levels(NoiseSchedule(), 3))
    with pytest.raises(InputError, match=r"gave x0 alone: .* end with ldmkit.Denoised.carry"):
        sampler.step(lambda x, level: 0.5 * x, state, normal)


def test_the_sampler_keeps_all_that_samplers_promise() -> None:
    subject = conformance.subject("sampler", "ddpm", configs=[{"variance": "learned_range"}])
    report = conformance.check(subject, examples=1)
    assert report.passed, report.table()


def test_there_is_no_training_of_it() -> None:
    with pytest.raises(ConfigError, match=r"variance = 'learned_range': there is no loss for it"):
        DiffusionObjective(
            Both(), None, schedule=NoiseSchedule(), prediction=Prediction(Prediction.Config(**LEARNED)),
            weighting=WeightingConfig(),
        )  # fmt: skip


def test_a_saved_pipeline_has_it(tmp_path: Path) -> None:
    unet = {"block_out_channels": [8], "layers_per_block": 1, "transformer_layers_per_block": [0], "norm_num_groups": 4}
    torch.manual_seed(0)
    pipe = pipeline(denoiser={"name": "unet", "in_channels": 3, "out_channels": 6, "cross_attention_dim": None, **unet})
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "saved"))
    assert again.prediction.config == pipe.prediction.config
    assert torch.equal(draw(again).images, draw(pipe).images)


def test_scheduler_files_of_diffusers() -> None:
    file = {"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned_range"}
    read = read_scheduler(file)
    assert read["sampler"] == DDPM
    assert read["prediction"] == {"type": "epsilon", "variance": "learned_range"}
    whole = NoiseSchedule.Config.parse(read["schedule"]).to_dict()
    written = write_scheduler("ddpm", {"variance": "learned_range"}, {"variance": "fixed_small"}, whole, read["prediction"])
    assert read_scheduler(written) == read
    solver = read_scheduler({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned_range"})
    assert (solver["sampler"]["name"], solver["prediction"]["variance"]) == ("dpm++-2m", "learned_range")
    for name, config, variance in (("ddpm", "fixed_small", "learned_range"), ("ddpm", "learned_range", None)):
        with pytest.raises(ConfigError, match=rf"variance {variance!r} of the prediction"):
            write_scheduler(name, {"variance": config}, {}, whole, {"type": "epsilon", "variance": variance})
    with pytest.raises(ConfigError, match="variance_type = 'learned' "):
        read_scheduler({**file, "variance_type": "learned"})
