"""Stage one: an autoencoder from pictures (Rombach et al. 2022, arXiv:2112.10752, sec. 3.1 and app. G)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from ldmkit.checkpoints.parts import save_part
from ldmkit.errors import ConfigError
from ldmkit.images import from_pixels, grid
from ldmkit.interfaces import Autoencoder
from ldmkit.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from ldmkit.training.data import Pictures, open_pictures
from ldmkit.training.draws import Draw, Order, normal, permutation
from ldmkit.training.latents import latent_moments
from ldmkit.training.loop import Options, Result, run
from ldmkit.training.losses import autoencoder_loss
from ldmkit.training.perceptual import PerceptualLoss
from ldmkit.training.recipes import AutoencoderLossConfig, AutoencoderRecipe
from ldmkit.training.stage import Share, Stage, build_part, check_size, read_pixels, to_pixels

ENCODE_BATCH = 64


def train_autoencoder(recipe: AutoencoderRecipe, options: Options, *, base: str | Path = ".") -> Result:
    """Train stage one; `out/autoencoder` is the result, with its latents' scale measured.

    Args:
        base: what the recipe's paths are relative to.

    Raises:
        ConfigError, UnknownPartError, DataError, OutputError: before training. NumericalError: when a loss is not finite.
    """
    return run(recipe, options, lambda device: AutoencoderStage(recipe, Path(base), progress=options.progress))


class AutoencoderObjective(nn.Module):
    """The autoencoder's loss; its forward is what mixed precision and DDP wrap."""

    def __init__(self, autoencoder: Autoencoder, config: AutoencoderLossConfig, perceptual: PerceptualLoss | None) -> None:
        super().__init__()
        self.autoencoder, self.config, self.perceptual = autoencoder, config, perceptual

    def forward(
        self, x_BCHW: Tensor, noise_BCHW: Tensor, discriminator: nn.Module | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss (a scalar), the reconstruction, and each term. Without a discriminator there is no adversarial term."""
        pixel_B, kl_B, made_BCHW, _ = autoencoder_loss(
            self.autoencoder, x_BCHW, noise_BCHW, pixel=self.config.pixel, kl_weight=self.config.kl_weight
        )
        terms = {"pixel": pixel_B.mean(), "kl": kl_B.mean()}
        reconstruction = terms["pixel"]
        if self.perceptual is not None and self.config.perceptual is not None:
            terms["perceptual"] = self.perceptual(made_BCHW, x_BCHW).mean()
            reconstruction = reconstruction + self.config.perceptual.weight * terms["perceptual"]
        loss = reconstruction + terms["kl"]
        adversarial = self.config.adversarial
        if discriminator is not None and adversarial is not None:
            terms["adversarial"] = generator_loss(discriminator(made_BCHW))
            weight = adaptive_weight(
                reconstruction, terms["adversarial"], self.autoencoder.get_parameter(adversarial.last_layer)
            )
            terms["adversarial_weight"] = adversarial.weight * weight
            loss = loss + terms["adversarial_weight"] * terms["adversarial"]
        return loss, made_BCHW.detach(), {"loss": loss, **terms}


class DiscriminatorObjective(nn.Module):
    """The discriminator's loss."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x_BCHW: Tensor, made_BCHW: Tensor) -> Tensor:
        """Hinge loss, a scalar."""
        real, made = self.discriminator(torch.cat([x_BCHW, made_BCHW.to(x_BCHW.dtype)])).chunk(2)
        return discriminator_loss(real, made)


class AutoencoderStage(Stage):
    """Networks, data and losses of stage one."""

    averaged = ("autoencoder",)

    def __init__(self, recipe: AutoencoderRecipe, base: Path, *, progress: bool = False) -> None:
        self.recipe = recipe
        self.autoencoder: Autoencoder = build_part("autoencoder", recipe.autoencoder, base)
        check_size(recipe.data, self.autoencoder.downscale)
        loss = recipe.loss
        perceptual = None if loss.perceptual is None else PerceptualLoss(base / loss.perceptual.weights)
        self.networks = {"autoencoder": self.autoencoder}
        self.objectives = {"autoencoder": AutoencoderObjective(self.autoencoder, loss, perceptual)}
        self.discriminator: PatchDiscriminator | None = None
        if loss.adversarial is not None:
            _check_last_layer(self.autoencoder, loss.adversarial.last_layer)
            channels, layers = loss.adversarial.channels, loss.adversarial.layers
            self.discriminator = PatchDiscriminator(self.autoencoder.image_channels, channels, layers)
            self.networks["discriminator"] = self.discriminator
            self.objectives["discriminator"] = DiscriminatorObjective(self.discriminator)
        self.pictures: Pictures = open_pictures(
            recipe.data, base, channels=self.autoencoder.image_channels, conditioned=False, progress=progress
        )
        self._order = Order(recipe.seed, len(self.pictures), recipe.batch_size)
        height, width = recipe.data.height_width
        down = self.autoencoder.downscale
        self._latent_shape = (self.autoencoder.latent_channels, height // down, width // down)

    def batch(self, step: int, share: Share) -> tuple[Tensor, Tensor]:
        recipe = self.recipe
        x_BCHW = read_pixels(self.pictures, share(self._order(step)), recipe, step, share)
        noise_BCHW = share(normal(recipe.seed, Draw.POSTERIOR, step, (recipe.batch_size, *self._latent_shape)))
        return x_BCHW, torch.from_numpy(noise_BCHW)

    def losses(
        self, step: int, batch: tuple[Tensor, Tensor], device: torch.device
    ) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        x_BCHW, noise_BCHW = (t.to(device, non_blocking=True) for t in batch)
        if self.recipe.channels_last:
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        adversarial = self.recipe.loss.adversarial
        judge = self.discriminator if adversarial is not None and step >= adversarial.start else None
        if judge is not None:
            judge.requires_grad_(False)  # it judges here, and learns below
        loss, made_BCHW, terms = self.objectives["autoencoder"](x_BCHW, noise_BCHW, judge)
        yield "autoencoder", loss, terms
        if judge is not None:
            judge.requires_grad_(True)
            loss = self.objectives["discriminator"](x_BCHW, made_BCHW)
            yield "discriminator", loss, {"discriminator": loss}

    def preview(self, path: Path, device: torch.device) -> None:
        """Originals over reconstructions of some fixed pictures."""
        count = min(self.recipe.preview_images, len(self.pictures))
        x_BCHW = to_pixels(self.pictures.read(permutation(self.recipe.seed, Draw.SCALE, 0, len(self.pictures))[:count])).to(
            device
        )
        made_BCHW = self.autoencoder.decode(self.autoencoder.encode(x_BCHW).mode())
        grid(from_pixels(torch.cat([x_BCHW, made_BCHW]), "pil"), columns=count).save(path)

    def export(self, folder: Path, device: torch.device) -> Path:
        """The autoencoder with its latents' scale measured over the data, as a part."""
        config = self.recipe.latent_scale
        whole = copy.deepcopy(self.autoencoder)
        rescale(whole, torch.ones(1), torch.zeros(1))
        chosen = permutation(self.recipe.seed, Draw.SCALE, 0, len(self.pictures))[: config.samples]
        shape = (ENCODE_BATCH, *self._latent_shape)

        def latents() -> Iterator[Tensor]:
            for i in range(0, len(chosen), ENCODE_BATCH):
                x_BCHW = to_pixels(self.pictures.read(chosen[i : i + ENCODE_BATCH])).to(device)
                noise_BCHW = torch.from_numpy(normal(self.recipe.seed, Draw.SCALE, i + 1, shape)[: len(x_BCHW)]).to(device)
                yield whole.encode(x_BCHW).sample(noise_BCHW)

        std, mean = latent_moments(latents(), per_channel=config.per_channel)
        rescale(whole, std, mean if config.shift else torch.zeros_like(mean))
        return save_part(whole, folder / "autoencoder")


def rescale(autoencoder: Autoencoder, std: Tensor, mean: Tensor) -> None:
    """Make final latents (z - mean) / std of the encoder's own ones, in place; one value each, or one per channel.

    Raises:
        ConfigError: for an autoencoder that has no scale to set.
    """
    rescaled = getattr(autoencoder, "rescaled", None)
    if rescaled is None:
        raise ConfigError(
            f"{type(autoencoder).__name__} has no rescaled(scaling_factor=, shift_factor=): its latents' scale cannot be set"
        )
    scale, shift = (values[0] if len(values) == 1 else tuple(values) for values in ((1 / std).tolist(), mean.tolist()))
    rescaled(scaling_factor=scale, shift_factor=shift)


def _check_last_layer(autoencoder: Autoencoder, name: str) -> None:
    names = [key for key, _ in autoencoder.named_parameters()]
    if name not in names:
        close = ", ".join(map(repr, get_close_matches(name, names, n=3, cutoff=0.3) or names[-3:]))
        raise ConfigError(
            f"loss.adversarial.last_layer = {name!r} is no parameter of {type(autoencoder).__name__}; near it are {close}"
        )
