"""What the tasks put into the one sampling loop: where it starts, what it blends in, what it is conditioned on besides.

Text-to-image starts from noise; image-to-image from a noised picture, part of the way down (Meng et al. 2022, SDEdit,
arXiv:2108.01073); inpainting blends the kept part back in after each step (Lugmayr et al. 2022, arXiv:2201.09865, alg. 1
without resampling), or, with a denoiser that has the channels for it, is told mask and masked picture (Rombach et al. 2022).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldmkit.errors import ConfigError, InputError, InputTypeError, NumericalError
from ldmkit.images import to_mask, to_pixels
from ldmkit.interfaces import Condition, Level, Levels, SamplerState
from ldmkit.noise import GeneratorNoise, NoiseSource

if TYPE_CHECKING:
    from ldmkit.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Task:
    """Inputs of the sampling loop.

    Attributes:
        levels: the levels to go through.
        noise: standard normal, (B, C, H, W).
        start: final latents to begin from, or None for pure noise.
        keep: final latents of the picture to keep, and `mask` (B, 1, H, W), 1 = repaint: blended after each step.
        spatial: channels to concatenate.
    """

    levels: Levels
    noise: Tensor
    start: Tensor | None = None
    keep: Tensor | None = None
    mask: Tensor | None = None
    spatial: Tensor | None = None

    def extend(self, condition: Condition) -> Condition:
        """The condition with the task's own channels merged in."""
        if self.spatial is None:
            return condition
        return condition.merge(Condition(spatial_BCHW=self.spatial))

    def blend(self, state: SamplerState) -> SamplerState:
        """Put the kept part back, noised to the state's level with the run's first noise; clean after the last step."""
        if self.keep is None or self.mask is None:
            return state
        level: Level = state.level
        kept = self.keep if state.done else level.alpha * self.keep + level.sigma * self.noise
        return dataclasses.replace(state, x=self.mask * state.x + (1 - self.mask) * kept)


def prepare_task(
    pipe: Pipeline,
    *,
    image: Any,
    mask_image: Any,
    strength: float | None,
    height: int | None,
    width: int | None,
    latents: Tensor | None,
    levels: Levels,
    count: int,
    noise: NoiseSource,
    dtype: torch.dtype,
) -> Task:
    """Check the task's arguments and encode its pictures.

    Raises:
        InputError, InputTypeError: for arguments that cannot be served.
    """
    channels = pipe.autoencoder.latent_channels
    told = pipe.denoiser.in_channels - channels
    if image is None:
        if mask_image is not None:
            raise InputError("mask_image was given without image; inpainting needs both")
        if strength is not None:
            raise InputError(f"strength = {strength!r} was given without image; it belongs to image-to-image and inpainting")
        shape = (count, channels, *_latent_size(pipe, *_size(pipe, height, width)))
        return Task(levels, _initial(latents, shape, noise, dtype, pipe.device))
    if isinstance(strength, bool) or not isinstance(strength, int | float | None) or not 0 <= (strength or 0) <= 1:
        raise InputError(f"strength = {strength!r}: must be a number from 0 to 1")
    if strength is None:
        strength = 0.8 if mask_image is None else 1.0
    if latents is not None and mask_image is None:
        raise InputError("latents and image were both given: image-to-image makes its own start from the image")
    size = None
    if height is not None or width is not None:
        if height is None or width is None:
            raise InputError("give both height and width to resize the image, or neither")
        size = (height, width)
    pixels = to_pixels(image, channels=pipe.autoencoder.image_channels, size=size)
    if count % len(pixels):
        raise InputError(f"{len(pixels)} images for {count} pictures; give one, or one per prompt")
    latent_size = _latent_size(pipe, *pixels.shape[2:])
    mask = None if mask_image is None else to_mask(mask_image, size=(pixels.shape[2], pixels.shape[3]))
    if mask is not None and count % len(mask):
        raise InputError(f"{len(mask)} masks for {count} pictures; give one, or one per prompt")
    if mask is not None and told not in (0, channels + 1):
        raise ConfigError(
            f"inpainting needs a denoiser with {channels} input channels (blending) or {2 * channels + 1} (latents, mask, "
            f"masked image); this one has {pipe.denoiser.in_channels}"
        )

    rest = _last_part(levels, strength)
    from_noise = mask is not None and strength == 1
    start = None  # in the order in which diffusers encodes and draws, so that a generator gives the same numbers
    if told == 0 or not from_noise:
        start = _encode(pipe, pixels, noise, count, draw=1, dtype=dtype)
    shape = (count, channels, *latent_size)
    first = _initial(latents, shape, noise, dtype, pipe.device)
    if mask is None:
        return Task(rest, first, start=start)

    mask = mask.to(device=pipe.device, dtype=dtype)
    latent_mask = _per_picture(torch.nn.functional.interpolate(mask, size=latent_size), count)
    masked = pixels.to(mask) * (mask < 0.5)
    if told == 0:
        if isinstance(noise, GeneratorNoise):  # diffusers encodes the masked image here too, though nothing uses it
            noise((len(masked), *shape[1:]), step=-1, draw=2, dtype=dtype)
        return Task(rest, first, start=None if from_noise else start, keep=start, mask=latent_mask)
    masked_latents = _encode(pipe, masked, noise, count, draw=2, dtype=dtype)
    spatial = torch.cat([latent_mask, masked_latents], dim=1).to(pipe.dtype)
    return Task(rest, first, start=start, spatial=spatial)


def _size(pipe: Pipeline, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    return pipe.defaults.height if height is None else height, pipe.defaults.width if width is None else width


def _latent_size(pipe: Pipeline, height: Any, width: Any) -> tuple[int, int]:
    factor = pipe.autoencoder.downscale
    multiple = factor * pipe.denoiser.multiple_of
    for name, value in (("height", height), ("width", width)):
        if value is None:
            raise InputError(f"{name} was not given and this pipeline has no default for it; pass {name}= in pixels")
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputTypeError(f"{name} = {value!r}: must be a whole number of pixels")
        if value < 1 or value % multiple:
            near = sorted({max(multiple, value // multiple * multiple), (value // multiple + 1) * multiple})
            raise InputError(
                f"{name} = {value}: must be a multiple of {multiple}; the nearest are {' and '.join(map(str, near))}"
            )
    return height // factor, width // factor


def _initial(
    latents: Tensor | None, shape: tuple[int, ...], noise: NoiseSource, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if latents is None:
        return noise(shape, step=-1, draw=0, dtype=dtype)
    if not isinstance(latents, Tensor):
        raise InputTypeError(f"latents must be a tensor, got {type(latents).__name__}")
    if tuple(latents.shape) != shape:
        raise InputError(f"latents have shape {tuple(latents.shape)}; this call needs {shape}")
    if not bool(torch.isfinite(latents).all()):
        raise NumericalError(
            f"the given latents hold {int((~torch.isfinite(latents)).sum())} NaN or infinite values (before step 1)"
        )
    return latents.to(device=device, dtype=dtype)


def _encode(pipe: Pipeline, pixels: Tensor, noise: NoiseSource, count: int, *, draw: int, dtype: torch.dtype) -> Tensor:
    """Pictures => sampled latents, one per wanted picture.

    Keyed noise gives every picture its own draw. A generator is asked for one draw per given image, as diffusers asks it.
    """
    weights = next((p for p in pipe.autoencoder.parameters()), pixels)
    posterior = pipe.autoencoder.encode(pixels.to(device=weights.device, dtype=weights.dtype))
    mode = posterior.mode()
    if not bool(torch.isfinite(mode).all()):
        raise NumericalError("the autoencoder produced NaN or infinite values at encoding the image (before step 1)")
    rows = len(mode) if isinstance(noise, GeneratorNoise) and isinstance(noise.generator, torch.Generator) else count
    drawn = posterior.sample(noise((rows, *mode.shape[1:]), step=-1, draw=draw, dtype=mode.dtype))
    return _per_picture(drawn, count).to(dtype)


def _per_picture(x: Tensor, count: int) -> Tensor:
    """Rows repeated (a, a, b, b) up to the number of pictures."""
    return x.repeat_interleave(count // len(x), dim=0)


def _last_part(levels: Levels, strength: float) -> Levels:
    """The last int(N * strength) steps, as diffusers counts them."""
    steps = min(int(levels.num_steps * strength), levels.num_steps)
    if steps < 1:
        raise InputError(
            f"strength = {strength:g} of {levels.num_steps} steps leaves none to take; raise strength or num_inference_steps"
        )
    rest: Levels = levels[levels.num_steps - steps :]
    return rest
