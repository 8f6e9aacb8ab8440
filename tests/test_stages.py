"""Runs in two stages, as Stable Diffusion XL's base and refiner are run, beside diffusers' own."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldmkit import InputError, InputTypeError, NoiseSchedule, NumericalError, Pipeline, available, part_class
from ldmkit.images import from_pixels
from tests.checkpoint_peers import NEGATIVE, PROMPT
from tests.checkpoints.test_sdxl import stable_diffusion_xl
from tests.conditions import tiny_pipeline
from tests.peers import in_float64, scheduler

STAGES = ("base", "refiner")
CLASSES = {"base": diffusers.StableDiffusionXLPipeline, "refiner": diffusers.StableDiffusionXLImg2ImgPipeline}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    for name in STAGES:
        stable_diffusion_xl(folder / "tokenizers", refiner=name == "refiner").save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def ours(saved: Path) -> dict[str, Pipeline]:
    pipes = {name: Pipeline.from_pretrained(saved / name, dtype=torch.float64) for name in STAGES}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def theirs(saved: Path) -> dict[str, Any]:
    pipes = {name: CLASSES[name].from_pretrained(saved / name, torch_dtype=torch.float64) for name in STAGES}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def told(**arguments: Any) -> dict[str, Any]:
    common = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 3.0, "output_type": "latent"}
    return {**common, "generator": torch.Generator().manual_seed(7), "num_inference_steps": 9, **arguments}


def both_stages(pipes: dict[str, Any], share: float) -> tuple[Any, Tensor]:
    """What the first stage gives, and the final latents."""
    generator = torch.Generator().manual_seed(7)
    first = pipes["base"](**told(height=16, width=24, denoising_end=share, generator=generator))
    last: Tensor = pipes["refiner"](**told(image=first.images, denoising_start=share, generator=generator)).images
    return first, last


@pytest.mark.parametrize("share", [0.35, 0.8])
@pytest.mark.parametrize("name", ["euler", "euler-ancestral", "ddim", "dpm++-2m", "unipc"])
def test_as_diffusers_does(ours: dict[str, Pipeline], theirs: dict[str, Any], name: str, share: float) -> None:
    """In float64; both sides form time embeddings in float32. Euler's latents are x / alpha there, and x here."""
    schedule = NoiseSchedule.Config()
    with in_float64():
        for pipe in theirs.values():
            pipe.scheduler = scheduler(name, schedule, "epsilon")
        first, exact = both_stages(theirs, share)
    for pipe in ours.values():
        pipe.sampler, pipe.schedule = name, NoiseSchedule(schedule)
    mine, result = both_stages(ours, share)
    alpha = mine.state.state.level.alpha if name.startswith("euler") else 1.0
    assert 0 < mine.state.state.step < 9
    assert (mine.images / alpha - first.images).abs().max() <= 1e-6 * first.images.std()
    assert (result - exact).abs().max() <= 1e-6 * exact.std()


def test_a_part_of_a_run_from_an_image(ours: dict[str, Pipeline], theirs: dict[str, Any]) -> None:
    """With strength the run begins late, with denoising_end it ends early."""
    picture = 2 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)) - 1
    schedule, options = NoiseSchedule.Config(), {"image": picture, "strength": 0.7, "denoising_end": 0.6}
    with in_float64():
        theirs["refiner"].vae.register_to_config(force_upcast=False)  # else it encodes in float32
        theirs["refiner"].scheduler = scheduler("ddim", schedule, "epsilon")
        exact = theirs["refiner"](**told(**options)).images
    pipe = ours["refiner"]
    pipe.sampler, pipe.schedule = "ddim", NoiseSchedule(schedule)
    assert (pipe(**told(**options)).images - exact).abs().max() <= 1e-6 * exact.std()


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path)


STAGED = [name for name in available("sampler") if (facts := part_class("sampler", name).facts).stages and facts.from_noise]


@pytest.mark.parametrize("name", STAGED)
def test_every_sampler_that_says_so_goes_on_without_a_history(pipe: Pipeline, name: str) -> None:
    pipe.sampler = name
    steps = {"prompt": "a pear", "seed": 3, "num_inference_steps": 6}
    first = pipe(**steps, denoising_end=0.5, output_type="latent")
    assert pipe(**steps, image=first.images, denoising_start=0.5, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "ddpm", "heun", "euler-ancestral"])
def test_two_stages_are_one_run(pipe: Pipeline, sampler: str) -> None:
    """Of methods without a memory, noise included; the tiny pipeline is both models."""
    pipe.sampler = sampler
    common = {"prompt": "a pear", "seed": 3, "num_inference_steps": 6, "output_type": "latent"}
    whole = pipe(**common).images
    first = pipe(**common, denoising_end=0.5)
    assert torch.equal(pipe(**common, image=first.images, denoising_start=0.5).images, whole)
    assert torch.equal(pipe("a pear", num_inference_steps=6, output_type="latent", resume=first.state).images, whole)
    picture = pipe(**{**common, "output_type": "pt"}, denoising_end=0.5).images
    assert torch.equal(picture, from_pixels(pipe.autoencoder.decode(first.state.state.denoised), "pt"))


def test_what_inpainting_keeps_is_as_noisy_as_the_rest(pipe: Pipeline) -> None:
    picture, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 32, 32)
    mask[:, :16] = 0
    seen: list[Tensor] = []
    options = {"image": picture, "mask_image": mask, "seed": 1, "output_type": "latent", "num_inference_steps": 6}
    pipe("a pear", **options, callback_on_step_end=lambda pipe, step, t, now: seen.append(now["latents"]))
    early = pipe("a pear", **options, denoising_end=0.5)
    assert torch.equal(early.images, seen[early.state.state.step - 1])


LATENTS = torch.zeros(1, 4, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"denoising_end": 1.0}, InputError, "denoising_end = 1.0: must be between 0 and 1"),
        ({"denoising_end": "half"}, InputError, "denoising_end = 'half'"),
        ({"denoising_end": 0.01}, InputError, "denoising_end = 0.01 leaves none of 4 steps before it"),
        ({"denoising_end": 0.9999}, InputError, "leaves none of 4 steps before it, or all; .* from 751 to 1"),
        ({"denoising_start": 0.5, "denoising_end": 0.5, "image": LATENTS}, InputError, "comes before the first step"),
        ({"denoising_start": 0.5}, InputTypeError, "give the images of the first stage's output"),
        ({"denoising_start": 0.5, "image": LATENTS[:, :3]}, InputError, r"shape \(1, 3, 16, 16\).* latents \(B, 4, H, W\)"),
        ({"denoising_start": 0.5, "image": LATENTS[..., 1:]}, InputError, "sides multiples of 2"),
        ({"denoising_start": 0.5, "image": LATENTS.repeat(2, 1, 1, 1)}, InputError, "for one or all of the 1 pictures"),
        ({"denoising_start": 0.5, "image": LATENTS / 0}, NumericalError, "1024 NaN"),
        ({"denoising_start": 0.5, "image": LATENTS, "strength": 0.5}, InputError, "strength was given with denoising_start"),
        ({"denoising_start": 0.5, "image": LATENTS, "height": 32}, InputError, "height was given with denoising_start"),
    ],
)
def test_refused_before_any_work(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type, message: str
) -> None:
    monkeypatch.setattr("ldmkit.arguments.Asked.condition", None)
    with pytest.raises(error, match=message):
        pipe("a pear", **arguments)


def test_samplers_and_models_that_cannot_be_handed_over(pipe: Pipeline, tmp_path: Path) -> None:
    for name in ("dpm-adaptive", "dpm-singlestep"):
        pipe.sampler = name
        with pytest.raises(InputError, match="Sampler cannot hand over a run between its steps"):
            pipe("a pear", denoising_end=0.5)
    with pytest.raises(InputError, match="takes 5 channels beside"):
        tiny_pipeline(tmp_path, spatial=5)("a pear", image=LATENTS, denoising_start=0.5)
    pipe.sampler = "ddim"
    half = pipe("a pear", denoising_end=0.6).state
    with pytest.raises(InputError, match="has taken 2 steps, and denoising_end ends it after 1"):
        pipe("a pear", resume=half, denoising_end=0.4)
