"""Tiny data and recipes that train in a second or two."""

from pathlib import Path
from typing import Any

import numpy as np

from ldmkit.training import AutoencoderRecipe, DiffusionRecipe

SIZE = 16
COLOURS = np.array([[230, 30, 30], [30, 200, 30], [30, 30, 230], [220, 220, 40]], np.uint8)

KL = {
    "name": "kl",
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": 3,
    "mid_block_add_attention": False,
}
UNET = {
    "name": "unet",
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "transformer_layers_per_block": [0, 1],
    "mid_transformer_layers": 0,
    "num_attention_heads": 2,
    "cross_attention_dim": 8,
    "dropout": 0.1,  # so that torch's random state matters
}
LABELS = {"name": "class-label", "num_classes": 4, "hidden_size": 8}


def squares(n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one colour with a black square somewhere, and the number of the colour."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % 4
    x = np.repeat(COLOURS[y][:, None, None], SIZE, axis=1).repeat(SIZE, axis=2)
    for picture, (top, left) in zip(x, rng.integers(0, SIZE - 6, (n, 2)), strict=True):
        picture[top : top + 6, left : left + 6] = 0
    return x, y


def autoencoder_values(folder: Path, /, **changes: Any) -> dict[str, Any]:
    """A stage-one recipe as plain values."""
    return {
        "autoencoder": KL,
        "data": {"npz": str(folder / "squares.npz"), "size": SIZE},
        "optimizer": {"lr": 3e-3, "warmup_steps": 1, "decay": "cosine"},
        "batch_size": 4,
        "steps": 8,
        "log_every": 3,
        "sample_every": 4,
        "checkpoint_every": 4,
        **changes,
    }


def diffusion_values(folder: Path, trained: Path, /, **changes: Any) -> dict[str, Any]:
    """A stage-two recipe as plain values."""
    return {
        **autoencoder_values(folder),
        "autoencoder": str(trained),
        "data": {"npz": str(folder / "squares.npz"), "size": SIZE, "condition_key": "y"},
        "denoiser": UNET,
        "conditioner": LABELS,
        "preview": {"inputs": [0, 1], "num_inference_steps": 2},
        **changes,
    }


def stage_one(folder: Path, /, **changes: Any) -> AutoencoderRecipe:
    """A stage-one recipe."""
    return AutoencoderRecipe.parse(autoencoder_values(folder, **changes))


def stage_two(folder: Path, trained: Path, /, **changes: Any) -> DiffusionRecipe:
    """A stage-two recipe."""
    return DiffusionRecipe.parse(diffusion_values(folder, trained, **changes))
