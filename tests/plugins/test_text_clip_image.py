"""CLIP's image encoder beside transformers, and image variations beside diffusers, from their folder and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ldmkit import ConfigError, InputError, InputTypeError, Pipeline, build
from ldmkit.cli import main
from ldmkit.testing.accuracy import assert_as_accurate
from tests.checkpoint_peers import SD
from tests.network_peers import UNETS, VAES, double, randomise
from tests.peers import in_float64

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "projection_dim": 12,
}


def picture(seed: int = 0, height: int = 40, width: int = 33, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode) if mode != "RGBA" else Image.fromarray(pixels)


def processor(edge: int = 28) -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": 28, "width": 28})


def encoder() -> Any:
    peer = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES)).eval()
    randomise(peer, 4)
    return peer


def variations(image_encoder: Any) -> Any:
    """A pipeline of diffusers, float32."""
    unet = diffusers.UNet2DConditionModel(**UNETS["sd1"], sample_size=8).eval()
    vae = diffusers.AutoencoderKL(**VAES["sd"]).eval()
    randomise(unet, 1)
    randomise(vae, 2)
    return diffusers.StableDiffusionImageVariationPipeline(
        vae=vae,
        unet=unet,
        image_encoder=image_encoder,
        scheduler=diffusers.PNDMScheduler(**SD, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=processor(30),
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variations")
    variations(encoder()).save_pretrained(folder)
    return folder


@given(height=st.integers(1, 90), width=st.integers(1, 90), edge=st.integers(28, 40), mode=st.sampled_from(["RGB", "L", "P"]))
def test_pictures_are_prepared_to_the_bit(height: int, width: int, edge: int, mode: str) -> None:
    ours = build("conditioner", "clip-image", **SIZES, shortest_edge=edge)
    given_picture = picture(height + 91 * width, height, width, mode)
    theirs = processor(edge)(images=given_picture, return_tensors="np").pixel_values[0]
    mine = ours.prepare(given_picture)
    assert mine.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(mine, theirs)


def test_what_is_transparent_is_white() -> None:
    ours = build("conditioner", "clip-image", **SIZES)
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    np.testing.assert_array_equal(ours.prepare(clear), ours.prepare(Image.new("RGB", (30, 30), (255, 255, 255))))


def test_pictures_without_a_known_white_are_refused() -> None:
    grey = Image.fromarray(np.full((30, 30), 20000, np.uint16))  # PIL's conversion to 8 bits would make it white
    with pytest.raises(InputError, match="does not say which number is white"):
        build("conditioner", "clip-image", **SIZES)([grey])


@torch.no_grad()
def test_embeddings_as_accurate_as_transformers(saved: Path) -> None:
    ours = Pipeline.from_pretrained(saved).conditioner
    assert ours is not None
    peer = encoder()
    pictures = [picture(k, 40 + k, 50) for k in range(3)]
    pixels = processor(30)(images=pictures, return_tensors="pt").pixel_values
    made = ours(pictures).tokens_BLC
    assert_as_accurate(made[:, 0], peer(pixels).image_embeds, double(peer)(pixels.double()).image_embeds)
    with_nothing = ours([pictures[0], None, pictures[2]]).tokens_BLC
    assert with_nothing[1].abs().max() == 0
    assert (with_nothing[2] - made[2]).abs().max() <= 1e-6 * made.abs().max()
    array = np.asarray(pictures[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1
    for same in (array, tensor):
        assert torch.equal(ours([same]).tokens_BLC, ours([pictures[0]]).tokens_BLC)


def drawn(pipe: Any, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "height": 16, "width": 24}
    images: Tensor = pipe(generator=torch.Generator().manual_seed(3), **options, **arguments).images
    return images


@pytest.mark.parametrize("copies", [1, 2])
def test_variations_as_diffusers_draws_them_and_back(saved: Path, tmp_path: Path, copies: int) -> None:
    pictures = [picture(1), picture(2)]
    with in_float64():
        wide = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(
            saved, torch_dtype=torch.float64, safety_checker=None, feature_extractor=processor(30)
        )
        exact = drawn(wide, image=pictures, num_images_per_prompt=copies)
    pipe = Pipeline.from_pretrained(saved, dtype=torch.float64)
    mine = drawn(pipe, image_prompt=pictures, num_images_per_prompt=copies)
    assert (mine - exact).abs().max() <= 1e-6 * exact.std()  # both sides form time embeddings in float32
    theirs = pipe.save_pretrained(tmp_path / "theirs", format="diffusers")
    assert json.loads((theirs / "model_index.json").read_text())["_class_name"] == "StableDiffusionImageVariationPipeline"
    with in_float64():
        prepared = CLIPImageProcessorPil.from_pretrained(theirs / "feature_extractor")
        again = diffusers.StableDiffusionImageVariationPipeline.from_pretrained(
            theirs, torch_dtype=torch.float64, feature_extractor=prepared
        )
        assert torch.equal(drawn(again, image=pictures, num_images_per_prompt=copies), exact)
    for folder in (theirs, pipe.save_pretrained(tmp_path / "ours")):
        loaded = Pipeline.from_pretrained(folder, dtype=torch.float64)
        assert torch.equal(drawn(loaded, image_prompt=pictures, num_images_per_prompt=copies), mine)


def test_from_the_command_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture().save(tmp_path / "cat.png")
    common = ["generate", "--model", str(saved), "--no-progress", "-o", str(tmp_path / "out")]
    given_picture = ["--image-prompt", str(tmp_path / "cat.png"), "--steps", "2", "--seed", "1"]
    assert main([*common, *given_picture, "-n", "2", "--batch", "1"]) == 0
    first, second = (Image.open(tmp_path / f"out/cat-{k}.png").tobytes() for k in (1, 2))
    assert first != second
    assert main([*common, "--like", str(tmp_path / "out/cat-2.png")]) == 0
    assert Image.open(tmp_path / "out/cat-3.png").tobytes() == second
    assert main([*common, "a cat", *given_picture]) == 2
    assert "is instead of a PROMPT" in capsys.readouterr().err
    picture(5).save(tmp_path / "cat.png")
    assert main([*common, "--like", str(tmp_path / "out/cat-2.png")]) == 2
    assert "pass --image-prompt" in capsys.readouterr().err


def test_a_vector_for_the_time_embedding() -> None:
    ours = build("conditioner", "clip-image", **SIZES, gives="vector").eval()
    condition = ours([picture(), None])
    assert condition.given() == {"vector_BC"}
    assert condition.vector_BC.shape == (2, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": "a cat"}, InputTypeError, "picture prompt 0 must be a PIL image, an array or a tensor, got str"),
        ({"image_prompt": []}, InputError, "image_prompt is an empty list"),
        ({"image_prompt": torch.zeros(4, 8, 8)}, InputError, "4 channels was given where 3 are needed"),
        ({}, InputError, "pass prompt=, class_labels=, image_prompt="),
    ],
)
def test_what_is_no_picture_is_refused(saved: Path, arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Pipeline.from_pretrained(saved)(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 2}, r"resample = 2 \(only 3 can be served\)"),
        ({"do_center_crop": False}, "do_center_crop = False"),
        ({"size": {"height": 28, "width": 28}}, "only a shortest_edge can be served"),
        ({"crop_size": 32}, "crop_size = 32, and the network sees 28 x 28 pixels"),
        ({"size": 20, "crop_size": 28}, "shortest_edge 20 leaves no square of image_size 28"),
    ],
)
def test_other_preparations_are_refused(saved: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    path = folder / "feature_extractor" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=message):
        Pipeline.from_pretrained(folder)
