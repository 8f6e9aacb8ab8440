"""What the tasks put into the one sampling loop: where it starts, what it blends in, what it is conditioned on besides.

Text-to-image starts from noise; image-to-image from a noised picture, part of the way down (Meng et al. 2022, SDEdit,
arXiv:2108.01073); inpainting blends the kept part back in after each step (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1
without resampling), or, with a denoiser that has the channels for it, is told mask and masked picture (Rombach et al. 2022).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ldmkit.errors import ConfigError, InputError, InputTypeError, NumericalError
from ldmkit.images import to_mask, to_pixels
from ldmkit.interfaces import Autoencoder, Condition, Denoiser, Level, Levels, Sampler, SamplerState
from ldmkit.noise import GeneratorNoise, NoiseSource


@dataclasses.dataclass(frozen=True)
class Task:
    """Inputs of the sampling loop.

    Attributes:
        levels: the levels to go through.
        noise: standard normal, (B, C, H, W); or, where steps were taken before, the latents that they left.
        taken: how many of the steps an earlier stage took.
        start: final latents to begin from, or None for pure noise.
        keep: final latents of the picture to keep, and `mask` (B, 1, H, W), 1 = repaint: blended after each step.
        spatial: channels to concatenate.
        labels: class labels (B,) that the task tells.
        until: the step after which it ends; None = the last.
    """

    levels: Levels
    noise: Tensor
    start: Tensor | None = None
    taken: int = 0
    keep: Tensor | None = None
    mask: Tensor | None = None
    spatial: Tensor | None = None
    labels: Tensor | None = None
    until: int | None = None

    @property
    def steps(self) -> int:
        """Where it ends."""
        return self.levels.num_steps if self.until is None else self.until

    def extend(self, condition: Condition) -> Condition:
        """The condition with the task's own channels and labels merged in."""
        return condition.merge(Condition(spatial_BCHW=self.spatial, labels_B=self.labels))

    def begin(self, sampler: Sampler) -> SamplerState:
        """The state before the first step."""
        if self.taken:
            return SamplerState(x=self.noise, levels=self.levels, step=self.taken)
        return sampler.init(self.noise, self.levels, start=self.start)

    def blend(self, state: SamplerState) -> SamplerState:
        """Put the kept part back, noised to the state's level with the run's first noise; clean after the last step, and into
        the estimate, which is the picture of a run that is stopped."""
        if self.keep is None or self.mask is None:
            return state
        level: Level = state.level
        kept = self.keep if state.done else level.alpha * self.keep + level.sigma * self.noise
        denoised = None if state.denoised is None else self.mask * state.denoised + (1 - self.mask) * self.keep
        return dataclasses.replace(state, x=self.mask * state.x + (1 - self.mask) * kept, denoised=denoised)


@dataclasses.dataclass(frozen=True)
class Run:
    """What every task needs to know of the run it is prepared for.

    Attributes:
        levels: of the whole run. count: pictures to make. noise: where random numbers come from.
        device, dtype: of the latents.
    """

    autoencoder: Autoencoder
    denoiser: Denoiser
    sampler: Sampler
    levels: Levels
    count: int
    noise: NoiseSource
    device: torch.device
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.autoencoder.latent_channels

    @property
    def told(self) -> int:
        """Channels the denoiser takes beside the latents."""
        return self.denoiser.in_channels - self.channels

    def latent_size(self, height: Any, width: Any) -> tuple[int, int]:
        """Pixels => latents. Raises: InputError, InputTypeError for what is missing, no whole number, or not divisible."""
        multiple = self.autoencoder.downscale * self.denoiser.multiple_of
        for name, value in (("height", height), ("width", width)):
            if value is None:
                raise InputError(f"{name} was not given and this pipeline has no default for it; pass {name}= in pixels")
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputTypeError(f"{name} = {value!r}: must be a whole number of pixels")
            if value < 1 or value % multiple:
                near = sorted({max(multiple, (value // multiple + up) * multiple) for up in (0, 1)})
                nearest = " and ".join(map(str, near))
                are = "is" if len(near) == 1 else "are"
                raise InputError(f"{name} = {value}: must be a multiple of {multiple}; the nearest {are} {nearest}")
        return height // self.autoencoder.downscale, width // self.autoencoder.downscale

    def first_noise(self, latents: Any, size: tuple[int, int]) -> Tensor:
        """The noise the run starts from, (B, C, H, W): drawn, or the user's own."""
        shape = (self.count, self.channels, *size)
        if latents is None:
            return self.noise(shape, step=-1, draw=0, dtype=self.dtype)
        if not isinstance(latents, Tensor):
            raise InputTypeError(f"latents must be a tensor, got {type(latents).__name__}")
        if tuple(latents.shape) != shape:
            raise InputError(f"latents have shape {tuple(latents.shape)}; this call needs {shape}")
        if bad := int((~torch.isfinite(latents)).sum()):
            raise NumericalError(f"the given latents hold {bad} NaN or infinite values (before step 1)")
        return latents.to(device=self.device, dtype=self.dtype)

    def encode(self, pixels: Tensor, *, draw: int, once: bool = False) -> Tensor:
        """Pictures => sampled latents, one per wanted picture. `once`: see `noise_for`."""
        posterior = self.autoencoder.encode(like_weights(pixels.to(self.device), self.autoencoder))
        mode = posterior.mode()
        if not bool(torch.isfinite(mode).all()):
            raise NumericalError("the autoencoder produced NaN or infinite values at encoding the image (before step 1)")
        noise = self.noise_for(mode, draw=draw, once=once).to(mode.device)
        copies = len(noise) // len(mode)
        samples = torch.stack([posterior.sample(noise[k::copies]) for k in range(copies)], dim=1).flatten(0, 1)
        return self.per_picture(samples).to(device=self.device, dtype=self.dtype)

    def noise_for(self, given: Tensor, *, draw: int, once: bool = False) -> Tensor:
        """Noise like what was given, for every picture to make. A generator is asked as diffusers asks it: one for one draw per
        given image; one per picture for a draw each, or, with `once`, the first of them for one per given image."""
        source, count = self.noise, self.count
        if isinstance(source, GeneratorNoise) and (once or isinstance(source.generator, torch.Generator)):
            source, count = source.first(len(given)), len(given)
        return source((count, *given.shape[1:]), step=-1, draw=draw, dtype=given.dtype)

    def per_picture(self, x: Tensor) -> Tensor:
        """Rows repeated (a, a, b, b) up to the number of pictures."""
        return x.repeat_interleave(self.count // len(x), dim=0)

    def part(self, strength: float) -> Levels:
        """The last int(N * strength) steps, as diffusers counts them; the first, of a run that leads an image up into noise.

        Raises:
            InputError: where none is left.
        """
        total = self.levels.num_steps
        steps = min(int(total * strength), total)
        if steps < 1:
            raise InputError(
                f"strength = {strength:g} of {total} steps leaves none to take; raise strength or num_inference_steps"
            )
        return self.levels[: steps + 1] if self.levels.rising else self.levels[total - steps :]

    def check_sampler(self, *, image: bool, mask: bool) -> None:
        """Raise InputError where the sampler says that it cannot do the task."""
        facts, name = self.sampler.facts, type(self.sampler).__name__
        if facts is None:
            return
        if not image and not facts.from_noise:
            raise InputError(f"{name} does not start from noise: give image=, or take another sampler")
        if mask and not facts.inpainting:
            raise InputError(f"{name} cannot keep a part of the image as it was: leave out mask_image, or take another sampler")
        if image and not facts.image_to_image:
            raise InputError(f"{name} starts from noise only: leave out image, or take another sampler")


def like_weights(x: Tensor, module: nn.Module) -> Tensor:
    """x on the device and in the dtype of a module's weights; as it is where there are none."""
    weights = next((p for p in module.parameters() if p.is_floating_point()), x)
    return x.to(device=weights.device, dtype=weights.dtype)


def prepare_task(
    run: Run,
    *,
    image: Any,
    mask_image: Any,
    strength: float | None,
    size: tuple[int | None, int | None],
    default_size: tuple[int | None, int | None],
    latents: Any,
) -> Task:
    """Check the task's arguments and encode its pictures.

    Args:
        size, default_size: (height, width) in pixels, as given and as the pipeline's defaults have them.

    Raises:
        InputError, InputTypeError, ConfigError: for arguments that cannot be served, before any work.
    """
    run.check_sampler(image=image is not None, mask=mask_image is not None)
    if image is None:
        for name, value in (("mask_image", mask_image), ("strength", strength)):
            if value is not None:
                shown = "" if name == "mask_image" else f" = {value!r}"
                raise InputError(f"{name}{shown} was given without image; it belongs to image-to-image and inpainting")
        height, width = (default if given is None else given for given, default in zip(size, default_size, strict=True))
        return Task(run.levels, run.first_noise(latents, run.latent_size(height, width)))

    if strength is None:
        strength = 0.8 if mask_image is None and not run.levels.rising else 1.0
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise InputError(f"strength = {strength!r}: must be a number from 0 to 1")
    pixels = _pixels(run, image, size)
    if mask_image is not None:
        return _inpainting(run, pixels, mask_image, strength, latents, resize=size != (None, None))
    if latents is not None:
        raise InputError("latents and image were both given: image-to-image makes its own start from the image")
    rest = run.part(strength)
    start = run.encode(pixels, draw=1)
    return Task(rest, run.first_noise(None, (start.shape[2], start.shape[3])), start=start)


def _pixels(run: Run, image: Any, size: tuple[int | None, int | None]) -> Tensor:
    height, width = size
    if (height is None) != (width is None):
        raise InputError("give both height and width to resize the image, or neither")
    wanted = None if height is None or width is None else (height, width)
    if wanted is not None:
        run.latent_size(*wanted)
    pixels = to_pixels(image, channels=run.autoencoder.image_channels, size=wanted)
    if run.count % len(pixels):
        raise InputError(
            f"{len(pixels)} images for {run.count} pictures; give one, or one per prompt (without: num_images_per_prompt)"
        )
    run.latent_size(*pixels.shape[2:])
    return pixels


def _inpainting(run: Run, pixels: Tensor, mask_image: Any, strength: float, latents: Any, *, resize: bool) -> Task:
    """Blending with a plain denoiser; mask and masked picture told to one that takes them.

    Encodes and draws in the order diffusers does, so that a generator gives the same numbers.
    """
    if run.told not in (0, run.channels + 1):
        raise ConfigError(
            f"inpainting needs a denoiser with {run.channels} input channels (blending) or {2 * run.channels + 1} (latents, "
            f"mask, masked image); this one has {run.denoiser.in_channels}"
        )
    mask = to_mask(mask_image, size=(pixels.shape[2], pixels.shape[3]), resize=resize)
    if run.count % len(mask) or (len(pixels) > 1 and len(mask) not in (1, len(pixels))):
        raise InputError(f"{len(mask)} masks for {len(pixels)} images and {run.count} pictures; give one, or one per image")
    rest, size = run.part(strength), run.latent_size(*pixels.shape[2:])
    mask = mask.to(device=run.device, dtype=run.dtype)
    latent_mask = run.per_picture(torch.nn.functional.interpolate(mask, size=size))
    masked = pixels.to(mask) * (mask < 0.5)
    blending, from_noise = run.told == 0, strength == 1
    encoded = run.encode(pixels, draw=1, once=True) if blending or not from_noise else None
    first = run.first_noise(latents, size)
    start = None if from_noise else encoded
    if blending:
        if isinstance(run.noise, GeneratorNoise):  # diffusers encodes the masked image here too, though nothing uses it
            run.noise_for(first[: len(masked)], draw=2, once=True)
        return Task(rest, first, start=start, keep=encoded, mask=latent_mask)
    told = run.encode(masked, draw=2, once=True)
    return Task(rest, first, start=start, spatial=torch.cat([latent_mask, told], dim=1))
