"""Training in two stages: an autoencoder, then a denoiser (with its conditioner) on the autoencoder's latents.

The losses are plain functions (`autoencoder_loss`, `diffusion_loss`): the caller owns the optimizer. `train_autoencoder` and
`train_diffusion` are whole runs of a recipe, what `ldmkit train` calls.
"""

from ldmkit.training.autoencoder import train_autoencoder
from ldmkit.training.diffusion import train_diffusion
from ldmkit.training.loop import Options, Result
from ldmkit.training.losses import autoencoder_loss, diffusion_loss, level_weight, pixel_loss
from ldmkit.training.optim import EMA
from ldmkit.training.recipe_files import load_recipe
from ldmkit.training.recipes import AutoencoderRecipe, DiffusionRecipe

__all__ = [
    "EMA",
    "AutoencoderRecipe",
    "DiffusionRecipe",
    "Options",
    "Result",
    "autoencoder_loss",
    "diffusion_loss",
    "level_weight",
    "load_recipe",
    "pixel_loss",
    "train_autoencoder",
    "train_diffusion",
]
