"""The x4 upscaler: beside diffusers' own, from its folder and from a single file, and back; what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from ldmkit import ConfigError, InputError, InputTypeError, Pipeline, build
from ldmkit.checkpoints.compvis import open_clip_map, unet_map, vae_map
from ldmkit.cli import main
from tests.checkpoint_peers import NEGATIVE, PROMPT, clip_text_model, write_tokenizer
from tests.network_peers import UNETS, VAES, randomise
from tests.peers import in_float64

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}
SMALL = 8


def upscaler(folder: Path) -> Any:
    """diffusers' pipeline, float32, with random weights; its autoencoder has a factor of 2."""
    unet = diffusers.UNet2DConditionModel(**{**UNETS["x4-upscaler"], "num_class_embeds": 1000}, sample_size=SMALL).eval()
    vae = diffusers.AutoencoderKL(**VAES["sd"], scaling_factor=0.08333).eval()
    randomise(unet, 1)
    randomise(vae, 2)
    pipe = diffusers.StableDiffusionUpscalePipeline(
        vae=vae,
        unet=unet,
        text_encoder=clip_text_model(hidden_act="gelu"),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(folder, pad_token="!")),
        low_res_scheduler=diffusers.DDPMScheduler(**BETAS),
        scheduler=diffusers.DDIMScheduler(
            **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        max_noise_level=300,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small(seed: int = 0, size: tuple[int, int] = (SMALL, SMALL)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def drawn(pipe: Any, prompts: int = 1, generators: bool = False, **arguments: Any) -> Tensor:
    """Final latents of ours or theirs, from the same generator."""
    if isinstance(pipe, Pipeline):
        pipe.set_progress_bar_config(disable=True)
    many = [torch.Generator().manual_seed(k) for k in range(prompts * arguments.get("num_images_per_prompt", 1))]
    given = {"image": small() if prompts == 1 else [small(k) for k in range(prompts)], "noise_level": 30, **arguments}
    images: Tensor = pipe(
        prompt=[PROMPT] * prompts if prompts > 1 else PROMPT,
        negative_prompt=[NEGATIVE] * prompts if prompts > 1 else NEGATIVE,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=many if generators else many[0],
        output_type="latent",
        **given,
    ).images
    return images


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return upscaler(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def saved(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "x4"
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(saved: Path) -> Pipeline:
    return Pipeline.from_pretrained(saved, dtype=torch.float64)


@pytest.fixture(scope="module")
def exact(saved: Path) -> Any:
    """diffusers' pipeline in float64, its schedulers' tables too."""
    with in_float64():
        wide = diffusers.StableDiffusionUpscalePipeline.from_pretrained(saved, torch_dtype=torch.float64)
    wide.set_progress_bar_config(disable=True)
    return wide


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"noise_level": 0},
    {"noise_level": 300, "image": 2 * torch.rand(1, 3, SMALL, SMALL + 4, generator=torch.Generator().manual_seed(1)) - 1},
    {"prompts": 2},
    {"prompts": 2, "generators": True},
    {"num_images_per_prompt": 2},
    {"num_images_per_prompt": 2, "generators": True},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: " ".join(arguments) or "one picture")
def test_drawn_as_by_diffusers(pipe: Pipeline, exact: Any, arguments: dict[str, Any]) -> None:
    """In float64. Both draw noise for the small picture first, then for the latents; both form time embeddings in float32."""
    with in_float64():
        theirs = drawn(exact, **arguments)
    ours = drawn(pipe, **arguments)
    assert ours.dtype == theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.std()


def test_the_folder_says_all(pipe: Pipeline, saved: Path, tmp_path: Path) -> None:
    assert pipe.upscaling is not None
    assert pipe.upscaling.noise is not None
    assert pipe.upscaling.noise.max_level == 300
    assert (pipe.defaults.guidance_scale, pipe.defaults.num_inference_steps) == (9.0, 75)
    theirs = pipe.save_pretrained(tmp_path / "theirs", format="diffusers")
    before, again = (
        diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder, torch_dtype=torch.float64)
        for folder in (saved, theirs)
    )
    assert again.config.max_noise_level == 300
    assert {key: again.low_res_scheduler.config[key] for key in BETAS} == BETAS
    for each in (before, again):
        each.set_progress_bar_config(disable=True)
    assert (drawn(again) - drawn(before)).abs().max() < 1e-12  # weights lie at other addresses, where products round otherwise
    for folder in (theirs, pipe.save_pretrained(tmp_path / "ours")):
        assert torch.equal(drawn(Pipeline.from_pretrained(folder, dtype=torch.float64)), drawn(pipe))


def test_old_copies_do_not_say_how_their_latents_are_scaled(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "old"))
    config = folder / "vae" / "config.json"
    config.write_text(
        json.dumps({key: value for key, value in json.loads(config.read_text()).items() if key != "scaling_factor"})
    )
    assert Pipeline.from_pretrained(folder).autoencoder.config.scaling_factor == 0.08333


def test_pictures_are_larger_by_the_autoencoders_factor(pipe: Pipeline) -> None:
    options = {"num_inference_steps": 1, "seed": 3}
    (large,) = pipe("a cat", image=small(), **options).images
    assert large.size == (2 * SMALL, 2 * SMALL)
    (resized,) = pipe("a cat", image=small(), height=24, width=32, **options).images
    assert resized.size == (32, 24)
    both = pipe(["a cat", "dog"], image=small(), output_type="pt", **options).images
    (second,) = pipe("dog", image=small(), output_type="pt", first_image=1, **options).images
    assert (both[1] - second).abs().max() < 1e-5  # noise is keyed by picture, in the small one too


def compvis(peer: Any) -> dict[str, Tensor]:
    unet = unet_map(levels=2, layers_per_block=2, attention=(False, True)).prefixed("model.diffusion_model")
    vae = vae_map(levels=2, layers_per_block=2).prefixed("first_stage_model")
    text = {key.removeprefix("text_model."): value for key, value in peer.text_encoder.state_dict().items()}
    names = open_clip_map(layers=2).prefixed("cond_stage_model.model")
    tensors = unet.restore(peer.unet.state_dict()) | vae.restore(peer.vae.state_dict()) | names.restore(text)
    for key in [key for key in tensors if "resblocks.1." in key]:  # the last layer, which is not used
        tensors[key.replace("resblocks.1.", "resblocks.2.")] = torch.zeros_like(tensors[key])
    return {key: value.contiguous().clone() for key, value in tensors.items()}


@pytest.mark.parametrize("stored", [False, True], ids=["published betas", "stored betas"])
def test_a_single_file(peer: Any, pipe: Pipeline, tmp_path: Path, stored: bool) -> None:
    write_tokenizer(tmp_path / "tokenizer", pad_token="!")
    tensors, ends = compvis(peer), [0.0002, 0.03] if stored else [0.0001, 0.02]
    if stored:
        tensors["low_scale_model.betas"] = torch.linspace(ends[0] ** 0.5, ends[1] ** 0.5, 1000, dtype=torch.float64).square()
    save_file(tensors, tmp_path / "x4.safetensors")
    groups = {"norm_num_groups": 8}
    config = {"unet": {**groups, "attention_head_dim": 2}, "vae": groups, "text_encoder": {"num_attention_heads": 2}}
    single = Pipeline.from_single_file(tmp_path / "x4.safetensors", config, dtype=torch.float64)
    assert single.upscaling is not None
    assert single.upscaling.noise is not None
    noise = single.upscaling.noise
    assert [noise.schedule.beta_start, noise.schedule.beta_end, noise.max_level] == [*ends, 350]
    assert single.prediction.config.type == "v_prediction"
    assert single.defaults.guidance_scale == 9.0
    if not stored:
        assert torch.equal(drawn(single), drawn(pipe))


def test_from_the_command_line(saved: Path, tmp_path: Path) -> None:
    small().save(tmp_path / "small.png")
    common = ["generate", "a cat", "--model", str(saved), "--image", str(tmp_path / "small.png"), "--steps", "1", "--seed", "1"]
    for level in (0, 200):
        options = ["--noise-level", str(level), "-o", str(tmp_path / f"{level}.png"), "--no-progress"]
        assert main([*common, *options]) == 0
    clear, noisy = (Image.open(tmp_path / f"{level}.png") for level in (0, 200))
    assert clear.size == (2 * SMALL, 2 * SMALL)
    assert clear.tobytes() != noisy.tobytes()
    assert main(["generate", "--like", str(tmp_path / "200.png"), "-o", str(tmp_path / "again.png"), "--no-progress"]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == noisy.tobytes()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"image": None}, InputError, "this pipeline upscales pictures: give image="),
        ({"image": small(size=(7, 8))}, InputError, r"the image's height is 7: must be a multiple of 2, .* 6 and 8; crop it"),
        ({"height": 30, "width": 32}, InputError, "height = 30: must be a multiple of 4; the nearest are 28 and 32"),
        ({"height": 32}, InputError, "give both height and width"),
        ({"image": [small(), small()]}, InputError, "2 images for 1 pictures"),
        ({"noise_level": 301}, InputError, "noise_level = 301: must be from 0 to 300"),
        ({"noise_level": -1}, InputError, "noise_level = -1"),
        ({"noise_level": 2.5}, InputTypeError, "noise_level = 2.5: must be a whole number"),
        ({"strength": 0.5}, InputError, "strength was given, but this pipeline upscales"),
        ({"mask_image": small()}, InputError, "mask_image was given"),
        (
            {"latents": torch.zeros(1, 4, 4, 4)},
            InputError,
            r"latents have shape \(1, 4, 4, 4\); this call needs \(1, 4, 8, 8\)",
        ),
    ],
)
def test_refused_before_any_work(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type, message: str
) -> None:
    monkeypatch.setattr("ldmkit.arguments.Asked.condition", None)
    with pytest.raises(error, match=message):
        pipe("a cat", **{"image": small(), **arguments})


def test_parts_must_fit() -> None:
    values = {"block_out_channels": [16, 32], "transformer_layers_per_block": [0, 1], "norm_num_groups": 8}
    vae = build("autoencoder", "kl", block_out_channels=[8, 16], norm_num_groups=4)
    plain = build("denoiser", "unet", **values)
    told = build("denoiser", "unet", **values, in_channels=7, spatial_channels=3)
    noise = {"noise": {"schedule": {}}}
    with pytest.raises(ConfigError, match="3 input channels beside the latents' 4, for the small picture; this one has 0"):
        Pipeline(autoencoder=vae, denoiser=plain, upscaling={})
    with pytest.raises(ConfigError, match="tells its level as a class label"):
        Pipeline(autoencoder=vae, denoiser=told, upscaling=noise)
    with pytest.raises(ConfigError, match="level = 20, max_level = 10"):
        Pipeline(autoencoder=vae, denoiser=told, upscaling={"noise": {"schedule": {}, "max_level": 10}})
    pipe = Pipeline(autoencoder=vae, denoiser=plain)
    with pytest.raises(InputError, match="noise_level = 20 was given, but this pipeline is no upscaler"):
        pipe(image=small(), noise_level=20, prompt_embeds=torch.zeros(1, 1, 768), guidance_scale=1.0)


def test_without_noise_the_picture_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"block_out_channels": [16, 32], "transformer_layers_per_block": [0, 1], "norm_num_groups": 8}
    unet = build("denoiser", "unet", **values, in_channels=7, spatial_channels=3, cross_attention_dim=None)
    vae = build("autoencoder", "kl", block_out_channels=[8, 16], norm_num_groups=4)
    pipe = Pipeline(autoencoder=vae, denoiser=unet, upscaling={}, defaults={"num_inference_steps": 1})
    told = []
    monkeypatch.setattr(unet, "check", told.append)
    picture = 2 * torch.rand(2, 3, 8, 4) - 1
    assert pipe(image=picture[:1], output_type="np").images.shape == (1, 16, 8, 3)
    assert torch.equal(told[0].spatial_BCHW, picture[:1])
    assert told[0].labels_B is None
    with pytest.raises(InputError, match="noise_level = 3 was given, but this upscaler takes the picture as it is"):
        pipe(image=picture[:1], noise_level=3)
