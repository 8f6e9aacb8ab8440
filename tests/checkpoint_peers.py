"""Tiny pipelines of diffusers with random weights, written as people's folders are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldmkit import Pipeline
from tests.network_peers import UNETS, VAES, randomise

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["a t</w>", "c at</w>", "d o", "do g</w>"]
PROMPT, NEGATIVE = "a cat, on a dog", "dog"
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def write_tokenizer(folder: Path, pad_token: str = EOS) -> Path:
    """A byte-pair vocabulary of every byte, four merges, and CLIP's special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "pad_token": pad_token}))
    return folder


def clip_text_model(**changes: Any) -> CLIPTextModel:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPTextConfig(
        **{**sizes, "vocab_size": 518, "bos_token_id": 516, "eos_token_id": 517, "pad_token_id": 517, **changes}
    )
    model = CLIPTextModel(config).eval()
    randomise(model, 3)
    return model


def stable_diffusion(folder: Path, unet: str = "sd1", vae: str = "sd", **scheduler: Any) -> Any:
    """A Stable Diffusion pipeline of diffusers, float32."""
    denoiser = diffusers.UNet2DConditionModel(**UNETS[unet], sample_size=8).eval()
    autoencoder = diffusers.AutoencoderKL(**VAES[vae]).eval()
    randomise(denoiser, 1)
    randomise(autoencoder, 2)
    cls = diffusers.StableDiffusionInpaintPipeline if unet == "inpainting" else diffusers.StableDiffusionPipeline
    pipe = cls(
        vae=autoencoder,
        unet=denoiser,
        text_encoder=clip_text_model(),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(folder)),
        scheduler=diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, **scheduler)
        if scheduler
        else diffusers.PNDMScheduler(**SD, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, *, dtype: torch.dtype = torch.float32, **arguments: Any) -> Tensor:
    """Final latents of ours or theirs: same prompts, same starting noise, a few steps."""
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    if isinstance(pipe, Pipeline):
        pipe.set_progress_bar_config(disable=True)
    out: Tensor = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        latents=start,
        guidance_scale=3.0,
        num_inference_steps=4,
        height=16,
        width=16,
        output_type="latent",
        **arguments,
    ).images
    return out
