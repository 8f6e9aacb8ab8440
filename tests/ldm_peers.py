"""The originals of latent diffusion as tiny pipelines of diffusers with random weights, and their files in CompVis' naming."""

from __future__ import annotations

import copy
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor
from transformers import BertTokenizer

from ldmkit import Pipeline
from ldmkit.checkpoints.keymap import KeyMap
from tests.network_peers import UNETS, randomise
from tests.peers import in_float64

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", "on", "dog", ",", "red"]
PROMPT, NEGATIVE = "A cat, on a dog", ""
BERT = {
    "vocab_size": len(PIECES),
    "d_model": 12,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "head_dim": 4,
    "encoder_ffn_dim": 24,
}
F8 = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
"""A KL autoencoder to 1/8, as the text-to-image pipeline of diffusers takes for granted."""
SCHEDULER = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}


def write_bert_tokenizer(folder: Path) -> Path:
    """A WordPiece vocabulary, one piece a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    return folder


def bert(**changes: Any) -> LDMBertModel:
    """A text encoder, every parameter random."""
    model = LDMBertModel(LDMBertConfig(**{**BERT, **changes})).eval()
    randomise(model, 3)
    return model


def text_to_image(folder: Path) -> Any:
    """LDMTextToImagePipeline; the tokenizer lies in `folder`."""
    unet = diffusers.UNet2DConditionModel(**UNETS["sd1"], sample_size=8).eval()
    autoencoder = diffusers.AutoencoderKL(**F8).eval()
    randomise(unet, 1)
    randomise(autoencoder, 2)
    return quiet(
        diffusers.LDMTextToImagePipeline(
            vqvae=autoencoder,
            bert=bert(),
            tokenizer=BertTokenizer.from_pretrained(write_bert_tokenizer(folder)),
            unet=unet,
            scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, **SCHEDULER),
        )
    )


VQ = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "num_vq_embeddings": 32,
    "scaling_factor": 1.0,
}
"""VQ-f4 in small."""
PLAIN = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "norm_num_groups": 8,
}
CHURCHES = {
    **PLAIN,
    "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 4,
    "attn_norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
"""Two levels of the U-Net for churches: res blocks that are scaled and shifted, and that change the resolution."""


def unconditional(unet: dict[str, Any], autoencoder: Any) -> Any:
    """LDMPipeline."""
    channels = autoencoder.config.latent_channels
    network = diffusers.UNet2DModel(**{"in_channels": channels, "out_channels": channels, **unet}, sample_size=8).eval()
    randomise(network, 1)
    randomise(autoencoder, 2)
    scheduler = diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0195, **SCHEDULER)
    return quiet(diffusers.LDMPipeline(vqvae=autoencoder.eval(), unet=network, scheduler=scheduler))


def super_resolution() -> Any:
    """LDMSuperResolutionPipeline; its autoencoder tells a scale, which the pipeline passes over."""
    unet = diffusers.UNet2DModel(**{**PLAIN, "in_channels": 6, "out_channels": 3}, sample_size=8).eval()
    autoencoder = diffusers.VQModel(**{**VQ, "scaling_factor": 0.18215}).eval()
    randomise(unet, 1)
    randomise(autoencoder, 2)
    scheduler = diffusers.DDIMScheduler(beta_start=0.0015, beta_end=0.0155, **SCHEDULER)
    return quiet(diffusers.LDMSuperResolutionPipeline(vqvae=autoencoder, unet=unet, scheduler=scheduler))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, *, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 4, 8, 8), **arguments: Any) -> Tensor:
    """Final latents, of ours or theirs: from the same noise, in a few steps. Theirs are what they give the decoder."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    if isinstance(pipe, Pipeline):
        count = 1 if {"prompt", "class_labels"} & arguments.keys() else shape[0]
        told = {"num_inference_steps": 4, "num_images_per_prompt": count, **arguments}
        return quiet(pipe)(output_type="latent", latents=start, **told).images
    caught: list[Tensor] = []
    module, decode = sys.modules[type(pipe).__module__], pipe.vqvae.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vqvae, "decode", lambda z, *args, **options: caught.append(z) or decode(z, *args, **options))
        if "latents" in signature(pipe.__call__).parameters:
            arguments["latents"] = start
        else:
            patch.setattr(module, "randn_tensor", lambda *args, **options: start)
        pipe(output_type="np", num_inference_steps=4, **arguments)
    unscaled = isinstance(pipe, diffusers.LDMSuperResolutionPipeline)
    return caught[0] if unscaled else caught[0] * pipe.vqvae.config.scaling_factor


def exact(peer: Any, **arguments: Any) -> Tensor:
    """diffusers' latents in float64, its scheduler's tables too."""
    with in_float64():
        wide = quiet(copy.deepcopy(peer).to(torch.float64))
        wide.scheduler = type(peer.scheduler).from_config(peer.scheduler.config)
        return drawn(wide, dtype=torch.float64, **arguments)


def named(*parts: tuple[KeyMap, Any]) -> dict[str, Tensor]:
    """Networks' weights under CompVis' names, by the key maps' inverse."""
    return {
        key: value.contiguous().clone()
        for keymap, network in parts
        for key, value in keymap.restore(network.state_dict()).items()
    }
