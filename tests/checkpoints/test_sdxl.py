"""Stable Diffusion XL in the diffusers layout: the conditioner, whole pipelines, and back."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ldmkit import InputError, Pipeline
from ldmkit.nn import sinusoidal_embedding
from ldmkit.testing.accuracy import assert_as_accurate
from tests.checkpoint_peers import NEGATIVE, PROMPT, SD, clip_text_model, latents, write_tokenizer
from tests.network_peers import UNETS, VAES, randomise
from tests.peers import in_float64

SIZES = {"original_size": (20, 24), "crops_coords_top_left": (3, 5), "target_size": (17, 19)}


def stable_diffusion_xl(folder: Path, *, refiner: bool = False) -> Any:
    """A pipeline of diffusers, float32, with random weights; contexts are 12 + 14 wide, or 14."""
    projected = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=14,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=20,
            projection_dim=10,
            hidden_act="gelu",
            vocab_size=518,
            bos_token_id=516,
            eos_token_id=517,
            pad_token_id=0,
        )
    ).eval()
    numbers = 5 if refiner else 6
    changes = {"cross_attention_dim": 14 if refiner else 26, "projection_class_embeddings_input_dim": 10 + numbers * 256}
    unet = diffusers.UNet2DConditionModel(**{**UNETS["sdxl"], **changes, "addition_time_embed_dim": 256}, sample_size=8).eval()
    vae = diffusers.AutoencoderKL(**VAES["sd"]).eval()
    for seed, network in enumerate((projected, unet, vae)):
        randomise(network, seed)
    cls = diffusers.StableDiffusionXLImg2ImgPipeline if refiner else diffusers.StableDiffusionXLPipeline
    pipe = cls(
        vae=vae,
        unet=unet,
        text_encoder=None if refiner else clip_text_model(),
        tokenizer=None if refiner else CLIPTokenizer.from_pretrained(write_tokenizer(folder / "one")),
        text_encoder_2=projected,
        tokenizer_2=CLIPTokenizer.from_pretrained(write_tokenizer(folder / "two", pad_token="!")),
        scheduler=diffusers.EulerDiscreteScheduler(**SD),
        force_zeros_for_empty_prompt=not refiner,
        **({"requires_aesthetics_score": True} if refiner else {}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion_xl(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def saved(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "xl"
    peer.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"prompt_2": "do dog"}, {"negative_prompt": None}, {"clip_skip": 1}], ids=str)
def test_what_the_network_is_told(peer: Any, saved: Path, arguments: dict[str, Any]) -> None:
    pipe = Pipeline.from_pretrained(saved)
    told = {"prompt": PROMPT, "negative_prompt": NEGATIVE, **arguments}
    wide = copy.deepcopy(peer).to(torch.float64)
    options = {"prompt_2": told.get("prompt_2"), "clip_skip": told.get("clip_skip"), "image_size": (16, 24)}
    ours = pipe.conditioner([told["prompt"]], **options)
    away = pipe.conditioner([told["negative_prompt"]], clip_skip=told.get("clip_skip"), image_size=(16, 24))
    theirs, exact = (each.encode_prompt(**told, device="cpu") for each in (peer, wide))
    for mine, i in ((ours, 0), (away, 1)) if "clip_skip" not in told else ((ours, 0),):  # theirs skips for the prompt alone
        assert_as_accurate(mine.tokens_BLC, theirs[i], exact[i], what="tokens")
        assert_as_accurate(mine.vector_BC[:, :10], theirs[i + 2], exact[i + 2], what="pooled")
    ids = torch.tensor([[16, 24, 0, 0, 16, 24]]).float()
    numbers = peer.unet.add_time_proj(ids.flatten()).flatten()
    assert torch.equal(ours.vector_BC[0, 10:], numbers)


def drawn(pipe: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return latents(pipe, dtype=dtype, **SIZES, negative_original_size=(8, 9), negative_target_size=(10, 11))


def test_drawn_as_by_diffusers_and_back(peer: Any, saved: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(saved)
    with in_float64():
        wide = copy.deepcopy(peer).to(torch.float64)
        wide.scheduler = type(peer.scheduler).from_config(peer.scheduler.config)
        exact = drawn(wide, torch.float64)
    assert_as_accurate(drawn(pipe), drawn(peer), exact)
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(pipe.save_pretrained(tmp_path / "theirs", format="diffusers"))
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        before, after = (getattr(each, name).state_dict() for each in (peer, again))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(drawn(Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "ours"))), drawn(pipe))


@torch.no_grad()
def test_each_prompt_may_have_its_own_sizes(saved: Path) -> None:
    pipe = Pipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    pipe.denoiser.register_forward_pre_hook(lambda _, told: seen.append(told[2].vector_BC[:, 10:]))
    call: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 24, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(["a", "b"], original_size=[(8, 9), (20, 24)], crops_coords_top_left=(3, 5), num_images_per_prompt=2, **call)
    rows = torch.tensor([[8, 9, 3, 5, 16, 24]] * 2 + [[20, 24, 3, 5, 16, 24]] * 2)
    assert torch.equal(seen[0], sinusoidal_embedding(rows.flatten(), 256).reshape(4, -1))


@torch.no_grad()
def test_the_refiner(tmp_path: Path) -> None:
    peer = stable_diffusion_xl(tmp_path / "tokenizers", refiner=True)
    peer.save_pretrained(tmp_path / "refiner")
    pipe = Pipeline.from_pretrained(tmp_path / "refiner")
    made = pipe.conditioner([PROMPT], image_size=(16, 24), aesthetic_score=7.5)
    theirs, _, pooled, _ = peer.encode_prompt(PROMPT, device="cpu")
    exact, _, wide, _ = copy.deepcopy(peer).to(torch.float64).encode_prompt(PROMPT, device="cpu")
    assert_as_accurate(made.tokens_BLC, theirs, exact)
    assert_as_accurate(made.vector_BC[:, :10], pooled, wide)
    assert torch.equal(made.vector_BC[0, 10:], peer.unet.add_time_proj(torch.tensor([16.0, 24, 0, 0, 7.5])).flatten())
    assert pipe.conditioner.null_input == ""


def test_what_does_not_fit_is_said(saved: Path) -> None:
    pipe = Pipeline.from_pretrained(saved)
    with pytest.raises(InputError, match="prompt_2 has 3 entries for 2 prompts"):
        pipe(["a", "b"], prompt_2=["c", "d", "e"])
    with pytest.raises(InputError, match="original_size is not known"):
        pipe.conditioner(["a"])
    with pytest.raises(InputError, match="negative_prompt_2"):
        Pipeline.from_pretrained("emoji")("a", negative_prompt_2="b")
