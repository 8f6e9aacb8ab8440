"""Upscaling: a small picture is told beside the latents, which are of its size; decoded, they are larger.

The super-resolution of latent diffusion tells the picture as it is (Rombach et al. 2022, arXiv:2112.10752, section 4.4). Stable
Diffusion's x4 upscaler noises it, and tells how much by a class label (conditioning augmentation, Ho et al. 2022,
arXiv:2106.15282).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

import ldmkit.config
from ldmkit.errors import ConfigError, InputError, InputTypeError
from ldmkit.images import to_pixels
from ldmkit.interfaces import Autoencoder, Denoiser
from ldmkit.schedule import NoiseSchedule
from ldmkit.tasks import Run, Task


class LowResNoise(ldmkit.config.Config):
    """Noise in the small picture; its level, a time of the schedule, is told as the class label.

    Attributes:
        schedule: how much noise a level is; of another training than the latents', so often with other betas.
        level: for calls that do not say.
        max_level: the highest a call may ask for, that is, the highest of the training.
    """

    schedule: NoiseSchedule.Config
    level: int = Field(20, ge=0)
    max_level: int = Field(350, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> LowResNoise:
        if not self.level <= self.max_level < self.schedule.num_train_timesteps:
            raise ValueError(
                f"level = {self.level}, max_level = {self.max_level}, num_train_timesteps = "
                f"{self.schedule.num_train_timesteps}: each must be at most the next, the last above"
            )
        return self


class Upscaling(ldmkit.config.Config):
    """That a pipeline upscales the `image` of its call.

    Attributes:
        noise: of the small picture; None = it is told as it is.
    """

    noise: LowResNoise | None = None

    def check(self, denoiser: Denoiser, autoencoder: Autoencoder) -> None:
        """Raise ConfigError where the denoiser cannot be told a picture of the autoencoder's channels, or its noise level."""
        told = denoiser.in_channels - autoencoder.latent_channels
        if told != autoencoder.image_channels:
            raise ConfigError(
                f"upscaling needs a denoiser with {autoencoder.image_channels} input channels beside the latents' "
                f"{autoencoder.latent_channels}, for the small picture; this one has {told}"
            )
        if self.noise is not None and "labels_B" not in denoiser.accepts:
            raise ConfigError(
                f"upscaling with noise tells its level as a class label, and {type(denoiser).__name__} accepts "
                f"{sorted(denoiser.accepts)}; configure it with classes, or leave out upscaling's noise"
            )


def prepare_upscaling(
    upscaling: Upscaling,
    run: Run,
    *,
    image: Any,
    noise_level: Any,
    size: tuple[Any, Any],
    latents: Any,
    others: dict[str, Any],
) -> Task:
    """Check the arguments, noise the small picture and tell it; noise is drawn for it first, then for the latents.

    Args:
        image: the small picture, or one per prompt.
        noise_level: a whole number; None = the config's.
        size: (height, width) of the large picture, to which the small one is resized (if it is PIL); None = as it is.
        others: arguments of other tasks, by name.

    Raises:
        InputError, InputTypeError: for arguments that cannot be served, before any work.
    """
    run.check_sampler(image=False, mask=False)  # the latents start from noise
    if image is None:
        raise InputError("this pipeline upscales pictures: give image=, the small one")
    for name, value in others.items():
        if value is not None:
            raise InputError(f"{name} was given, but this pipeline upscales the whole picture from noise; leave it out")
    label = _label(upscaling.noise, noise_level)
    pixels = _small(run, image, size).to(device=run.device, dtype=run.dtype)
    if upscaling.noise is not None:
        level = NoiseSchedule(upscaling.noise.schedule).level(label)
        noise = run.noise_for(pixels, draw=1, once=True)
        pixels = level.alpha * pixels.repeat_interleave(len(noise) // len(pixels), dim=0) + level.sigma * noise
    first = run.first_noise(latents, (pixels.shape[2], pixels.shape[3]))
    labels = None if upscaling.noise is None else torch.full((run.count,), label, device=run.device)
    return Task(run.levels, first, spatial=run.per_picture(pixels), labels=labels)


def _label(noise: LowResNoise | None, level: Any) -> int:
    """The level to noise the picture to. Raises: InputError, InputTypeError."""
    if noise is None:
        if level is not None:
            raise InputError(f"noise_level = {level!r} was given, but this upscaler takes the picture as it is; leave it out")
        return 0
    if level is None:
        return noise.level
    if isinstance(level, bool) or not isinstance(level, int):
        raise InputTypeError(f"noise_level = {level!r}: must be a whole number from 0 to {noise.max_level}")
    if not 0 <= level <= noise.max_level:
        raise InputError(
            f"noise_level = {level}: must be from 0 to {noise.max_level}, the levels this upscaler was trained with"
        )
    return level


def _small(run: Run, image: Any, size: tuple[Any, Any]) -> Tensor:
    """Raw pixels (n, C, H, W), one latent each."""
    if (size[0] is None) != (size[1] is None):
        raise InputError("give both height and width of the large picture, or neither")
    wanted = None if size == (None, None) else run.latent_size(*size)
    pixels = to_pixels(image, channels=run.autoencoder.image_channels, size=wanted)
    if run.count % len(pixels):
        raise InputError(
            f"{len(pixels)} images for {run.count} pictures; give one, or one per prompt (without: num_images_per_prompt)"
        )
    multiple, factor = run.denoiser.multiple_of, run.autoencoder.downscale
    for name, side in zip(("height", "width"), pixels.shape[2:], strict=True):
        if side % multiple:
            near = sorted({max(multiple, side // multiple * multiple), (side // multiple + 1) * multiple})
            raise InputError(
                f"the image's {name} is {side}: must be a multiple of {multiple}, and the nearest are "
                f"{' and '.join(map(str, near))}; crop it, or give height= and width=, {factor} times as large, to resize it"
            )
    return pixels
