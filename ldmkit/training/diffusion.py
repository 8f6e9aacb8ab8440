"""Stage two: a denoiser (and a conditioner with it) on latents (Rombach et al. 2022, arXiv:2112.10752, sec. 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmkit.checkpoints.parts import load_part
from ldmkit.checkpoints.weights import load_weights
from ldmkit.errors import ConfigError
from ldmkit.images import grid
from ldmkit.interfaces import Autoencoder, Condition, Conditioner, Denoiser, Levels
from ldmkit.pipeline import Pipeline
from ldmkit.plugin.registry import build
from ldmkit.prediction import Prediction
from ldmkit.schedule import CLEAN, NoiseSchedule
from ldmkit.training.data import Pictures, open_pictures
from ldmkit.training.draws import Draw, Order, normal, shifted, uniform
from ldmkit.training.latents import LatentCache, encode_all
from ldmkit.training.loop import Options, Result, run
from ldmkit.training.losses import diffusion_loss, level_weight
from ldmkit.training.recipes import DiffusionRecipe, WeightingConfig
from ldmkit.training.sizes import told
from ldmkit.training.stage import Share, Stage, build_part, check_size, read_pixels

Batch = tuple[Tensor, Tensor, Tensor, list[Any] | None, dict[str, Any]]


def train_diffusion(recipe: DiffusionRecipe, options: Options, *, base: str | Path = ".") -> Result:
    """Train stage two; `out/pipeline` is the result, ready for `Pipeline.from_pretrained`.

    Args:
        base: what the recipe's paths are relative to.

    Raises:
        ConfigError, UnknownPartError, DataError, CheckpointError, OutputError: before training.
        NumericalError: when a loss is not finite.
    """
    return run(recipe, options, lambda device: DiffusionStage(recipe, Path(base), options, device))


class DiffusionObjective(nn.Module):
    """Denoiser and conditioner with their loss; its forward is what mixed precision and DDP wrap."""

    alphas_T: Tensor
    sigmas_T: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        conditioner: Conditioner | None,
        *,
        schedule: NoiseSchedule,
        prediction: Prediction,
        weighting: WeightingConfig,
        frozen: bool = False,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        prediction.check_trainable()
        self.distance = distance
        self.denoiser, self.conditioner, self.frozen = denoiser, conditioner, frozen
        self.prediction, self.weighting = prediction, weighting
        levels = [schedule.level(t) for t in range(schedule.num_train_timesteps)]
        self.register_buffer("alphas_T", torch.tensor([level.alpha for level in levels]), persistent=False)
        self.register_buffer("sigmas_T", torch.tensor([level.sigma for level in levels]), persistent=False)

    def forward(
        self,
        x0_BCHW: Tensor,
        noise_BCHW: Tensor,
        t_B: Tensor,
        inputs: list[Any] | None,
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Loss per picture, (B,).

        Args:
            x0_BCHW: final latents.
            noise_BCHW: standard normal.
            t_B: whole times of the schedule.
            inputs: the conditioner's, some of them replaced by its null input.
            options: the conditioner's.
        """
        condition = Condition()
        if self.conditioner is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                condition = self.conditioner(inputs, **(options or {}))
        alpha_B, sigma_B = self.alphas_T[t_B], self.sigmas_T[t_B]
        return diffusion_loss(
            self.denoiser, self.prediction, x0_BCHW, condition, noise_BCHW, alpha_B=alpha_B, sigma_B=sigma_B, t_B=t_B,
            weight_B=level_weight(self.weighting, self.prediction, alpha_B, sigma_B), distance=self.distance,
        )  # fmt: skip


class DiffusionStage(Stage):
    """Networks, data and losses of stage two."""

    averaged: tuple[str, ...]

    def __init__(self, recipe: DiffusionRecipe, base: Path, options: Options, device: torch.device) -> None:
        self.recipe = recipe
        self.schedule, self.prediction = NoiseSchedule(recipe.schedule), Prediction(recipe.prediction)
        self.prediction.check_trainable()
        self.prediction.check(Levels([self.schedule.level(self.schedule.num_train_timesteps - 1), CLEAN]))
        self.autoencoder: Autoencoder = load_part(_part_folder(base / recipe.autoencoder), kind="autoencoder").requires_grad_(
            False
        )
        check_size(recipe.data, self.autoencoder.downscale)
        self.denoiser: Denoiser = build_part("denoiser", recipe.denoiser, base)
        if recipe.denoiser_weights is not None:
            _start_from(base / recipe.denoiser_weights, self.denoiser, "denoiser")
        self.conditioner = _conditioner(recipe, base)
        self.pipeline = Pipeline(
            autoencoder=self.autoencoder,
            denoiser=self.denoiser,
            conditioner=self.conditioner,
            sampler=(recipe.preview.sampler if recipe.preview else {"name": "ddim"}),
            schedule=self.schedule,
            prediction=self.prediction,
            defaults=recipe.defaults,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pictures: Pictures = open_pictures(
            recipe.data,
            base,
            channels=self.autoencoder.image_channels,
            conditioned=self.conditioner is not None,
            progress=options.progress,
        )
        self._check_conditions()
        self.networks = {"denoiser": self.denoiser}
        if self.conditioner is not None and not recipe.freeze_conditioner:
            self.networks["conditioner"] = self.conditioner
        for network in self.networks.values():
            network.train()
        self.averaged = tuple(self.networks)
        self.objectives = {
            "diffusion": DiffusionObjective(
                self.denoiser, self.conditioner, schedule=self.schedule, prediction=self.prediction, weighting=recipe.weighting,
                frozen=recipe.freeze_conditioner, distance=_distance(recipe),
            )
        }  # fmt: skip
        self._order = Order(recipe.seed, len(self.pictures), recipe.batch_size)
        height, width = recipe.data.height_width
        down = self.autoencoder.downscale
        self._latent_shape = (recipe.batch_size, self.autoencoder.latent_channels, height // down, width // down)
        self.autoencoder.to(device)
        self._cache: LatentCache | None = None
        if recipe.cache_latents:
            self._cache = encode_all(
                self.autoencoder,
                self.pictures,
                folder=options.out,
                dtype=getattr(torch, recipe.cache_dtype),
                device=device,
                progress=options.progress,
            )

    def learning_rates(self, name: str) -> list[tuple[nn.Module, float]]:
        """The conditioner may have a rate of its own."""
        if self.recipe.conditioner_lr is None or self.conditioner is None:
            return super().learning_rates(name)
        return [(self.denoiser, 1.0), (self.conditioner, self.recipe.conditioner_lr / self.recipe.optimizer.lr)]

    def _check_conditions(self) -> None:
        preview = self.recipe.preview
        if self.conditioner is None:
            self.denoiser.check(Condition())
            if preview is not None and preview.inputs:
                raise ConfigError(
                    f"preview.inputs = {list(preview.inputs)}, but without a conditioner there is nothing to give"
                )
            return
        assert self.pictures.conditions is not None
        self.conditioner.check([*self.pictures.conditions, self.conditioner.null_input])
        with torch.no_grad():  # guidance dropout gives it the null input: a class table without a row for that says so here
            self.denoiser.prepare(self.conditioner([self.conditioner.null_input], **self._told(np.array([0]))))
        if preview is not None:
            if not preview.inputs:
                raise ConfigError("preview.inputs is empty: name some prompts or labels to draw, or leave out preview")
            self.conditioner.check(list(preview.inputs))
        with torch.no_grad():
            self.denoiser.check(self.conditioner(self.pictures.conditions[:1], **self._told(np.array([0]))))

    def _told(self, indices: np.ndarray) -> dict[str, Any]:
        if self.conditioner is None:
            return {}
        return told(self.conditioner, self.pictures, indices, self.recipe.data.height_width)

    def batch(self, step: int, share: Share) -> Batch:
        seed, size = self.recipe.seed, self.recipe.batch_size
        indices = share(self._order(step))
        posterior_BCHW = torch.from_numpy(share(normal(seed, Draw.POSTERIOR, step, self._latent_shape)))
        noise_BCHW = torch.from_numpy(share(normal(seed, Draw.NOISE, step, self._latent_shape)))
        count = self.schedule.num_train_timesteps
        ratios = shifted(uniform(seed, Draw.TIME, step, size), self.recipe.time_shift)
        times = np.minimum(np.floor(ratios * count), count - 1).astype(np.int64)  # a ratio can be rounded up to 1
        inputs = None
        if self.conditioner is not None:
            assert self.pictures.conditions is not None
            dropped = share(uniform(seed, Draw.DROPOUT, step, size)) < self.recipe.guidance_dropout
            null, conditions = self.conditioner.null_input, self.pictures.conditions
            inputs = [null if drop else conditions[i] for i, drop in zip(indices.tolist(), dropped.tolist(), strict=True)]
        if self._cache is not None:
            x0_BCHW = self._cache.sample(indices, posterior_BCHW)
        else:
            x0_BCHW = self._encode(read_pixels(self.pictures, indices, self.recipe, step, share), posterior_BCHW)
        return x0_BCHW, noise_BCHW, torch.from_numpy(share(times)), inputs, self._told(indices)

    @torch.no_grad()
    def _encode(self, x_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        device = next(self.autoencoder.parameters()).device
        return self.autoencoder.encode(x_BCHW.to(device)).sample(noise_BCHW.to(device))

    def losses(self, step: int, batch: Batch, device: torch.device) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        x0_BCHW, noise_BCHW, t_B = (t.to(device, non_blocking=True) for t in batch[:3])
        if self.recipe.channels_last:
            x0_BCHW = x0_BCHW.contiguous(memory_format=torch.channels_last)
        options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch[4].items()}
        loss = self.objectives["diffusion"](x0_BCHW, noise_BCHW, t_B, batch[3], options).mean()
        yield "diffusion", loss, {"loss": loss}

    def preview(self, path: Path, device: torch.device) -> None:
        """The recipe's prompts (or labels), drawn with always the same noise."""
        preview = self.recipe.preview
        if preview is None:
            return
        height, width = self.recipe.data.height_width
        values = list(preview.inputs)
        worded = all(isinstance(value, str) for value in values)
        images = self.pipeline(
            prompt=[str(value) for value in values] if values and worded else None,
            class_labels=None if worded else values,
            height=height,
            width=width,
            num_inference_steps=preview.num_inference_steps,
            guidance_scale=preview.guidance_scale if self.pipeline.conditioner is not None else None,
            seed=self.recipe.seed,
        ).images
        grid(images, labels=[str(value) for value in values] or None).save(path)

    def export(self, folder: Path, device: torch.device) -> Path:
        """The whole pipeline."""
        return self.pipeline.save_pretrained(folder / "pipeline")


def _part_folder(folder: Path) -> Path:
    """Stage one's own folder stands for the part inside it."""
    return folder / "autoencoder" if not (folder / "part.json").exists() and (folder / "autoencoder").is_dir() else folder


def _distance(recipe: DiffusionRecipe) -> Callable[[Tensor, Tensor], Tensor] | None:
    """What a plugin offers under the recipe's `loss`; None for the squared error."""
    if recipe.loss is None:
        return None
    values = dict(recipe.loss)
    distance: Callable[[Tensor, Tensor], Tensor] = build("training-loss", values.pop("name"), **values)
    return distance


def _conditioner(recipe: DiffusionRecipe, base: Path) -> Conditioner | None:
    if recipe.conditioner is None:
        return None
    conditioner: Conditioner = build_part("conditioner", recipe.conditioner, base)
    if recipe.conditioner_weights is not None:
        _start_from(base / recipe.conditioner_weights, conditioner, "conditioner")
    if recipe.freeze_conditioner:
        conditioner.requires_grad_(False)
    return conditioner


def _start_from(folder: Path, part: Denoiser | Conditioner, kind: str) -> None:
    stored = load_part(folder, kind=kind)
    if type(stored) is not type(part):
        raise ConfigError(f"{kind}_weights holds a {type(stored).__name__}, the recipe asks for {type(part).__name__}")
    load_weights(part, stored.state_dict(), source=f"{kind}_weights ({folder})")
