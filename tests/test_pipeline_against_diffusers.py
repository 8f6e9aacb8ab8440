"""Whole pipelines beside diffusers' own: same weights, same generator, same latents out."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldmkit import Pipeline
from ldmkit.schedule import NoiseSchedule
from tests.network_peers import unet_pair, vae_pair
from tests.peers import in_float64, scheduler

SIZE, TOKENS, WIDTH, STEPS = 16, 5, 12, 7
SAMPLERS = [("ddpm", None), ("ddim", 0.0), ("ddim", 1.0), ("euler", None), ("euler-ancestral", None)]
SPACINGS = ("leading", "trailing", "linspace")
THE_PEERS_OWN = {("ddim", "trailing"), ("ddim", "linspace"), ("ddpm", "trailing"), ("ddpm", "linspace")}
"""Spacings where diffusers steps to t - T // n, which with 7 steps is not the next time it visits. Ours goes to that."""
ROUNDING = 1e-6
"""Of the final latents' standard deviation. The networks run in float64, but both sides form time embeddings in float32."""

CASES = [
    (name, eta, spacing, prediction)
    for name, eta in SAMPLERS
    for spacing in SPACINGS
    for prediction in ("epsilon", "v_prediction")
    if (name, spacing) not in THE_PEERS_OWN
]


class Pair:
    """Our pipeline and diffusers', in float64, sharing weights."""

    def __init__(self, cls: type, unet: str, name: str, eta: float | None, spacing: str, prediction: str) -> None:
        schedule = NoiseSchedule.Config.parse({"timestep_spacing": spacing})
        (denoiser, peer_denoiser), (autoencoder, peer_autoencoder) = unet_pair(unet), vae_pair("sd")
        sampler = {"name": name} if eta is None else {"name": name, "eta": eta}
        self.ours = Pipeline(
            autoencoder=autoencoder, denoiser=denoiser, sampler=sampler, schedule=schedule, prediction=prediction
        ).to(torch.float64)
        self.ours.set_progress_bar_config(disable=True)
        peer_denoiser.register_to_config(sample_size=64)  # diffusers' image pipelines compare it with a number
        self.peer = cls(
            vae=peer_autoencoder.double(),
            unet=peer_denoiser.double(),
            scheduler=scheduler(name, schedule, prediction),
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.peer.set_progress_bar_config(disable=True)
        self.eta = {} if eta is None else {"eta": eta}

    def compare(self, *, count: int = 2, generators: bool = False, **arguments: Any) -> None:
        noise = torch.Generator().manual_seed(0)
        tokens, negative = (torch.randn(count, TOKENS, WIDTH, generator=noise, dtype=torch.float64) for _ in range(2))
        common = {
            "prompt_embeds": tokens,
            "negative_prompt_embeds": negative,
            "guidance_scale": 3.0,
            "num_inference_steps": STEPS,
            "output_type": "latent",
            **self.eta,
            **arguments,
        }

        def generator() -> Any:
            many = [torch.Generator().manual_seed(k) for k in range(count)]
            return many if generators else many[0]

        theirs = self.peer(generator=generator(), **common).images
        ours = self.ours(generator=generator(), **common).images
        assert ours.dtype == torch.float64
        assert (ours - theirs).abs().max() <= ROUNDING * theirs.std()


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    plane = np.zeros((SIZE, SIZE), dtype=np.uint8)
    plane[4:12, 2:10] = 255
    return Image.fromarray(plane)


@pytest.fixture(autouse=True)
def _float64() -> Any:
    """Schedulers are made and run without float32 roundings."""
    with in_float64():
        yield


@pytest.mark.parametrize(("name", "eta", "spacing", "prediction"), CASES)
def test_text_to_image(name: str, eta: float | None, spacing: str, prediction: str) -> None:
    pair = Pair(diffusers.StableDiffusionPipeline, "sd1", name, eta, spacing, prediction)
    pair.compare(height=SIZE, width=SIZE)


@pytest.mark.parametrize(("name", "eta", "spacing", "prediction"), CASES)
def test_image_to_image(name: str, eta: float | None, spacing: str, prediction: str) -> None:
    pair = Pair(diffusers.StableDiffusionImg2ImgPipeline, "sd1", name, eta, spacing, prediction)
    pair.compare(image=picture(), strength=0.6)


@pytest.mark.parametrize(("name", "eta", "spacing", "prediction"), CASES)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_blending(name: str, eta: float | None, spacing: str, prediction: str, strength: float) -> None:
    pair = Pair(diffusers.StableDiffusionInpaintPipeline, "sd1", name, eta, spacing, prediction)
    pair.compare(image=picture(), mask_image=mask(), strength=strength, height=SIZE, width=SIZE)


@pytest.mark.parametrize(("name", "eta"), SAMPLERS)
def test_inpainting_with_nine_channels(name: str, eta: float | None) -> None:
    pair = Pair(diffusers.StableDiffusionInpaintPipeline, "inpainting", name, eta, "leading", "epsilon")
    pair.compare(image=picture(), mask_image=mask(), strength=1.0, height=SIZE, width=SIZE)


def test_one_generator_per_picture() -> None:
    pair = Pair(diffusers.StableDiffusionPipeline, "sd1", "euler-ancestral", None, "trailing", "epsilon")
    pair.compare(height=SIZE, width=SIZE, generators=True)


@pytest.mark.parametrize(
    ("unet", "options"),
    [("sd1", {}), ("sd1", {"strength": 0.6}), ("sd1", {"strength": 1.0}), ("inpainting", {"strength": 1.0})],
    ids=["image to image", "inpainting from the image", "inpainting", "nine channels"],
)
def test_one_generator_per_picture_of_one_image(unet: str, options: dict[str, Any]) -> None:
    """diffusers has each draw for the image in image-to-image, and the first one for all in inpainting."""
    inpainting = {"mask_image": mask(), "height": SIZE, "width": SIZE, **options}
    cls = diffusers.StableDiffusionInpaintPipeline if options else diffusers.StableDiffusionImg2ImgPipeline
    pair = Pair(cls, unet, "euler-ancestral", None, "trailing", "epsilon")
    pair.compare(image=picture(), generators=True, **(inpainting if options else {}))


def test_guidance_rescale() -> None:
    pair = Pair(diffusers.StableDiffusionPipeline, "sd1", "ddim", 0.0, "leading", "v_prediction")
    pair.compare(height=SIZE, width=SIZE, guidance_rescale=0.7)


def test_without_guidance() -> None:
    pair = Pair(diffusers.StableDiffusionPipeline, "sd1", "ddim", 0.0, "leading", "epsilon")
    pair.compare(height=SIZE, width=SIZE, guidance_scale=1.0)
