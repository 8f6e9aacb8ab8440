"""Small parts for tests of the pipeline: real ones, tiny, with weights that do something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldmkit import Pipeline, build

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "apple", "pear", "on", "background"]


def randomise(module: torch.nn.Module, seed: int = 0, std: float = 0.08) -> None:
    """Give every parameter a random value: layers that start at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1) * 0.5)


def tiny_pipeline(folder: Path, *, spatial: int = 0, **options: Any) -> Pipeline:
    """Text to 32 x 32 pixels through 16 x 16 latents, in milliseconds. `spatial`: extra input channels of the denoiser."""
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(WORDS) + "\n")
    autoencoder = build(
        "autoencoder", "kl", latent_channels=4, block_out_channels=[8, 16], layers_per_block=1, norm_num_groups=4
    )
    denoiser = build(
        "denoiser",
        "unet",
        in_channels=4 + spatial,
        spatial_channels=spatial,
        out_channels=4,
        block_out_channels=[16, 32],
        layers_per_block=1,
        transformer_layers_per_block=[1, 1],
        num_attention_heads=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    conditioner = build(
        "conditioner",
        "bert",
        vocab=str(vocab),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_length=12,
    )
    for seed, module in enumerate((autoencoder, denoiser, conditioner)):
        randomise(module, seed)
    pipe = Pipeline(
        autoencoder=autoencoder,
        denoiser=denoiser,
        conditioner=conditioner,
        defaults={"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 3.0},
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
