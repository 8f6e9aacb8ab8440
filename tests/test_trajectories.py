"""Trajectories with their likelihoods; runs that stop and go on."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributions import Normal

from ldmkit import Condition, Denoiser, Pipeline, RunState, Trajectory, available, part_class
from ldmkit.config import Config
from ldmkit.errors import CheckpointError, InputError, InputTypeError
from tests.conditions import tiny_pipeline

SAMPLERS = sorted(available("sampler"))
BITS = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
HALF = torch.ones(1, 1, 32, 32).index_fill_(2, torch.arange(16), 0.0)
TASKS: dict[str, dict[str, Any]] = {
    "text": {},
    "image": {"image": BITS},
    "inpaint": {"image": BITS, "mask_image": HALF},
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))


def draw(pipe: Pipeline, sampler: str = "ddpm", **options: Any) -> Any:
    pipe.sampler = sampler
    return pipe("a red apple", **{"num_inference_steps": 5, "seed": 3, "output_type": "latent", **options})


def stopping_at(step: int) -> Any:
    return lambda pipe, now, t, tensors: {"stop": now == step}


# ---------------------------------------------------------------------------------------------------------------- trajectory


class Linear(Denoiser):
    """x0 = w x: with it every transition is Gaussian in w too."""

    class Config(Config):
        pass

    in_channels = out_channels = 3
    multiple_of = 1
    accepts = requires = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return self.w * x_BCHW


def test_the_likelihood_and_its_gradient_are_the_gaussian_s() -> None:
    pipe = Pipeline(autoencoder={"name": "identity"}, denoiser=Linear(), sampler="ddpm", prediction="sample")
    options = {"height": 2, "width": 2, "num_inference_steps": 6, "num_images_per_prompt": 3, "seed": 1, "progress": False}
    way: Trajectory = pipe(return_trajectory=True, **options).trajectory
    assert way.latents_NBCHW.shape == (7, 3, 3, 2, 2)
    for k in range(6):
        level, to, w = way.levels[k], way.levels[k + 1], pipe.denoiser.w
        law = pipe.sampler.coefficients(level, to)
        if law.std == 0:
            assert k == 5
            assert not way.log_probs_NB[k].any()
            continue
        x, after = way.latents_NBCHW[k], way.latents_NBCHW[k + 1]
        mean = (law.on_x + law.on_x0 * w.detach()) * x
        exact_B = Normal(mean, law.std).log_prob(after).flatten(1).sum(dim=1)
        torch.testing.assert_close(way.means_NBCHW[k], mean, rtol=1e-13, atol=1e-13)
        assert way.stds[k] == law.std
        torch.testing.assert_close(way.log_probs_NB[k], exact_B, rtol=1e-11, atol=1e-11)
        (slope,) = torch.autograd.grad(way.log_prob_B(k).sum(), w)
        exact = ((after - mean) / law.std**2 * law.on_x0 * x).sum()
        torch.testing.assert_close(slope, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", ["ddpm", "euler-ancestral", "dpm++-2m-sde", "dpm++-sde", "lcm", "restart"])
def test_unchanged_weights_have_the_ratio_1_and_a_gradient(pipe: Pipeline, sampler: str) -> None:
    """Steps of several draws and multistep memories included; with guidance, through the keys and values prepared once."""
    way = draw(pipe, sampler, return_trajectory=True, guidance_scale=2.0).trajectory
    projections = [p for name, p in pipe.denoiser.named_parameters() if "attn2.to_k" in name]
    chances = [k for k in range(5) if any(law.stochastic for law in way.states[k + 1].laws)]
    assert len(chances) >= (1 if sampler == "restart" else 4)
    denoise = way.guided()
    for k in chances:
        now = way.log_prob_B(k, denoise)
        size = float(way.log_probs_NB[k].abs().max() + way.means_NBCHW[k].numel())
        assert (now - way.log_probs_NB[k]).abs().max() <= 1e-4 * size  # float32 sums over the elements
    slopes = torch.autograd.grad(way.log_prob_B(chances[0]).sum(), projections)
    assert all(slope.abs().max() > 0 for slope in slopes)


@pytest.mark.parametrize("step", [5, -1, "a", 0.5])
def test_a_step_that_is_not_on_the_way_is_named(pipe: Pipeline, step: Any) -> None:
    way = draw(pipe, return_trajectory=True).trajectory
    with pytest.raises(InputError, match=f"step = {step!r}: this trajectory has steps 0 to 4"):
        way.log_prob_B(step)


def test_states_of_the_way_lead_to_the_picture(pipe: Pipeline) -> None:
    asked = draw(pipe, "ddim", return_trajectory=True)
    assert torch.equal(asked.images, draw(pipe, "ddim").images)
    assert draw(pipe, "ddim").trajectory is None
    assert torch.equal(asked.trajectory.latents_NBCHW[-1], asked.images)
    assert [state.step for state in asked.trajectory.states] == list(range(6))
    assert asked.trajectory.stds == [0.0] * 5
    assert not asked.trajectory.log_probs_NB.any()


# ------------------------------------------------------------------------------------------------------------ stop and go on


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_does_every_task_and_goes_on_to_the_same_bits(
    pipe: Pipeline, sampler: str, task: str, tmp_path: Path
) -> None:
    facts = part_class("sampler", sampler).facts
    if not {"text": facts.from_noise, "image": facts.image_to_image, "inpaint": facts.inpainting}[task]:
        with pytest.raises(InputError, match=r"Sampler (does not start from noise|cannot keep a part)"):
            draw(pipe, sampler, **TASKS[task])
        return
    whole = draw(pipe, sampler, **TASKS[task])
    assert whole.images.isfinite().all()
    assert whole.state.state.done
    if task == "inpaint":
        other = draw(pipe, sampler, guidance_scale=1.0, **TASKS[task]).images
        assert torch.equal(whole.images[:, :, :8], other[:, :, :8])
        assert not torch.equal(whole.images, other)
    seen: list[int] = []
    half = draw(pipe, sampler, callback_on_step_end=stopping_at(1), **TASKS[task])
    assert half.state.state.step == 2
    assert torch.equal(half.images, half.state.state.denoised)
    saved = half.state.save(tmp_path / "run.safetensors")
    for resume in (saved,) if task != "text" else (saved, half.state):
        watch = {"callback_on_step_end": lambda p, k, t, x: seen.append(k)}
        rest = draw(pipe, sampler, seed=None, resume=resume, **watch, **TASKS[task])
        assert torch.equal(rest.images, whole.images)
        assert rest.seed == 3
    assert seen == [*range(2, whole.state.state.step)] * (2 if task == "text" else 1)


def test_a_state_can_be_saved_without_stopping(pipe: Pipeline, tmp_path: Path) -> None:
    def keep(_: Pipeline, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["state"].save(tmp_path / f"{step}.safetensors")
        return tensors  # as they are

    whole = draw(pipe, "unipc", callback_on_step_end=keep, seed=[5, 6], num_images_per_prompt=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{k}.safetensors" for k in range(5)]
    rest = draw(pipe, "unipc", resume=tmp_path / "2.safetensors", seed=None, num_images_per_prompt=2)
    assert torch.equal(rest.images, whole.images)
    assert rest.seed == [5, 6]
    for seed in ((5, 6), np.array([5, 6]), [np.int64(5), np.uint8(6)]):
        again = draw(pipe, "unipc", resume=tmp_path / "2.safetensors", seed=seed, num_images_per_prompt=2)
        assert torch.equal(again.images, whole.images)


def test_numbers_of_numpy_are_saved_as_numbers(pipe: Pipeline, tmp_path: Path) -> None:
    half = draw(pipe, seed=[np.int64(5)], first_image=np.int64(2), callback_on_step_end=stopping_at(1)).state
    loaded = RunState.load(half.save(tmp_path / "run.safetensors"))
    assert (loaded.seed, loaded.first_image) == ([5], 2)


def test_a_run_that_does_not_fit_the_call_is_refused(pipe: Pipeline, tmp_path: Path) -> None:
    half = draw(pipe, callback_on_step_end=stopping_at(1)).state
    generated = draw(pipe, seed=None, generator=torch.Generator(), callback_on_step_end=stopping_at(1)).state
    for options, message in (
        ({"seed": 4}, "seed = 4 was given, but the run to resume has seed = 3"),
        ({"first_image": 2}, "first_image = 2 was given"),
        ({"sampler": "ddim"}, "the sampler .*DDPMSampler.* this call's is .*DDIMSampler"),
        ({"num_inference_steps": 7}, "goes through 5 steps .* this call through 7"),
        ({"num_images_per_prompt": 2}, r"latents \(1, 4, 16, 16\) .* this call \(2, 4, 16, 16\)"),
        ({"seed": None, "generator": torch.Generator()}, "generator was given with resume"),
        ({"resume": generated, "seed": None}, "drew its noise from a torch.Generator"),
        ({"resume": draw(pipe).state}, "has taken all its 5 steps"),
    ):
        with pytest.raises(InputError, match=message):
            draw(pipe, **{"resume": half, **options})
    with pytest.raises(InputError, match=r"drew its noise from a torch\.Generator"):
        generated.save(tmp_path / "run.safetensors")
    with pytest.raises(InputTypeError, match="resume must be a file or the `state` of an output, got int"):
        draw(pipe, resume=3)
    with pytest.raises(InputTypeError, match="'stop' = 1; it must be True or False"):
        draw(pipe, callback_on_step_end=lambda *_: {"stop": 1})


def test_samplers_that_cannot_say_so_before_any_work(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    half = draw(pipe, "ddim", callback_on_step_end=stopping_at(1)).state
    facts = part_class("sampler", "ddim").facts
    handle = pipe.denoiser.register_forward_pre_hook(lambda *_: pytest.fail("the denoiser ran"))
    try:
        for fact, options, message in (
            ("from_noise", {}, "DDIMSampler does not start from noise"),
            ("image_to_image", TASKS["image"], "DDIMSampler starts from noise only"),
            ("inpainting", TASKS["inpaint"], "DDIMSampler cannot keep a part of the image"),
            ("resume", {"resume": half}, "DDIMSampler cannot resume a run"),
        ):
            monkeypatch.setattr(part_class("sampler", "ddim"), "facts", dataclasses.replace(facts, **{fact: False}))
            with pytest.raises(InputError, match=message):
                draw(pipe, "ddim", **options)
    finally:
        handle.remove()


def test_damaged_and_foreign_files_are_named(pipe: Pipeline, tmp_path: Path) -> None:
    whole = draw(pipe, callback_on_step_end=stopping_at(1)).state.save(tmp_path / "run.safetensors").read_bytes()
    other = safetensors.torch.save({"x": torch.zeros(1)})
    hollow = safetensors.torch.save({"x": torch.zeros(1)}, metadata={"ldmkit.run": "{}"})
    foreign = {"short": whole[:-9], "empty": b"", "other": other, "hollow": hollow}
    for name, data in foreign.items():
        message = "is a safetensors file, but not the state" if name == "other" else "cannot be read"
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
            RunState.load(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing cannot be read"):
        RunState.load(tmp_path / "missing")
    about = json.loads(safetensors.safe_open(tmp_path / "run.safetensors", "pt").metadata()["ldmkit.run"])
    assert about["seed"] == 3


def test_nan_after_going_on_is_at_its_own_step(pipe: Pipeline) -> None:
    half = draw(pipe, callback_on_step_end=stopping_at(2)).state
    handle = pipe.denoiser.register_forward_hook(lambda m, args, out: out * torch.nan)
    try:
        with pytest.raises(ArithmeticError, match="at step 4 of 5"):
            draw(pipe, resume=half)
    finally:
        handle.remove()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if part_class("sampler", name).facts.from_noise])
def test_one_sampler_in_eight_threads_is_eight_samplers(sampler: str) -> None:
    pipe = Pipeline(autoencoder={"name": "identity"}, denoiser=Linear(), sampler=sampler, prediction="sample")

    def work(k: int) -> Tensor:
        options = {"height": 4, "width": 4, "num_inference_steps": 3, "progress": False, "output_type": "latent"}
        latents: Tensor = pipe(seed=k, **options).images
        return latents

    wanted = [work(k) for k in range(8)]
    with ThreadPoolExecutor(8) as threads:
        assert all(torch.equal(a, b) for a, b in zip(wanted, threads.map(work, range(8)), strict=True))
