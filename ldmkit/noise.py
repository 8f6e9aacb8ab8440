"""Where random numbers come from. The global seed is never touched, and every draw is asked for by name.

`KeyedNoise` is counter-based: image k of a run with seed s gets the same normal numbers at step i, draw j, whatever the batch
it is in, the device, or the number of processes. `GeneratorNoise` follows torch.Generator, in the order diffusers draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldmkit import brownian
from ldmkit.errors import InputError, InputTypeError


class NoiseSource(Protocol):
    """Standard normal noise for a batch."""

    def __call__(self, shape_BCHW: Sequence[int], *, step: int, draw: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Noise for draw number `draw` (0, 1, ...) of step `step` (-1 before the first)."""

    def brownian(self, shape_BCHW: Sequence[int], high: float, low: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The increment of each image's Brownian motion over [low, high], divided by sqrt(high - low)."""


class StepNoise:
    """The noise of one step, as samplers take it: each call is the next draw."""

    def __init__(self, source: NoiseSource, step: int, like: Tensor) -> None:
        self._source, self._step, self._like = source, step, like
        self._draws = itertools.count()

    def __call__(self) -> Tensor:
        """A new draw."""
        return self._source(self._like.shape, step=self._step, draw=next(self._draws), dtype=self._like.dtype)

    def between(self, high: float, low: float) -> Tensor:
        """The motion's increment over [low, high], divided by sqrt(high - low)."""
        return self._source.brownian(self._like.shape, high, low, dtype=self._like.dtype)


def keyed_normal(seed: int, image: int, step: int, draw: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float64 numbers that are a pure function of the arguments.

    Philox-4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") keyed by the seed, its counter by (draw,
    step, image); 53-bit uniforms; Box-Muller. numpy guarantees Philox's raw stream across versions and platforms, though not
    the streams of its own distributions, so the normals are formed here.

    Raises:
        InputTypeError: a number that is not whole.
        InputError: seed, image or draw outside [0, 2^64), or step below -1.
    """
    seed, image, draw, step = _word("seed", seed), _word("image", image), _word("draw", draw), _word("step", step, low=-1)
    n = int(np.prod(shape, dtype=np.int64))
    counter = np.array([0, draw, step + 1, image], dtype=np.uint64)
    raw = np.random.Philox(counter=counter, key=np.array([seed, 0], dtype=np.uint64)).random_raw(n + n % 2)
    uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1]: the logarithm stays finite
    radius, angle = np.sqrt(-2.0 * np.log(uniform[0::2])), 2.0 * np.pi * uniform[1::2]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1)[:n]
    return normal.reshape(tuple(shape))


def _word(name: str, value: int, low: int = 0) -> int:
    """A whole number that fits a 64-bit word (counted from `low`)."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputTypeError(f"{name} = {value!r}: must be a whole number")
    value = int(value)
    if not low <= value < 2**64 + low:
        raise InputError(f"{name} = {value}: must be at least {low} and below 2**64")
    return value


_BROWNIAN = 2**62
"""Step numbers from about here on are octaves of the Brownian motion's axis."""


class KeyedNoise:
    """Noise keyed by (seed, image, step, draw).

    Args:
        seeds: one per image, or one for all.
        images: the image numbers, one per entry of the batch.

    Raises:
        InputTypeError, InputError: seeds or images that are no whole numbers in [0, 2^64), or whose counts differ.
    """

    def __init__(self, seeds: int | Sequence[int], images: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self.images = [_word("image", image) for image in images]
        given = list(seeds) if isinstance(seeds, Sequence) else [seeds] * len(self.images)
        self.seeds = [_word("seed", seed) for seed in given]
        self.device = device
        if len(self.seeds) != len(self.images):
            raise InputError(f"{len(self.seeds)} seeds for {len(self.images)} images; give one seed, or one per image")

    def __call__(self, shape_BCHW: Sequence[int], *, step: int, draw: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, C, H, W) with B the number of images."""
        if shape_BCHW[0] != len(self.images):
            raise InputError(f"noise for {shape_BCHW[0]} images was asked of a source keyed for {len(self.images)}")
        normals = [keyed_normal(s, k, step, draw, shape_BCHW[1:]) for s, k in zip(self.seeds, self.images, strict=True)]
        return torch.from_numpy(np.stack(normals)).to(dtype).to(self.device)

    def brownian(self, shape_BCHW: Sequence[int], high: float, low: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, C, H, W), a function of seed, image and interval alone."""

        def increment(seed: int, image: int) -> np.ndarray:
            def normal(octave: int, node: int) -> np.ndarray:
                return keyed_normal(seed, image, _BROWNIAN + octave, node, shape_BCHW[1:])

            return brownian.increment(normal, high, low)

        increments = [increment(seed, image) for seed, image in zip(self.seeds, self.images, strict=True)]
        return torch.from_numpy(np.stack(increments)).to(dtype).to(self.device)


class GeneratorNoise:
    """Noise drawn from one torch.Generator, or from one per image, in the order of the calls (as diffusers' randn_tensor)."""

    def __init__(
        self,
        generator: torch.Generator | Sequence[torch.Generator],
        *,
        device: torch.device | str = "cpu",
        draw_dtype: torch.dtype,
    ) -> None:
        given = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(given, Sequence) or not all(isinstance(g, torch.Generator) for g in given):
            raise InputTypeError(
                f"generator must be a torch.Generator or a list of them, got {generator!r}; a number is given as seed="
            )
        self.generator = generator if isinstance(generator, torch.Generator) else list(generator)
        self.device = device
        self.draw_dtype = draw_dtype
        self._motion: KeyedNoise | None = None

    def first(self, count: int) -> GeneratorNoise:
        """Noise of the first `count` generators, or of the only one."""
        given = self.generator if isinstance(self.generator, torch.Generator) else self.generator[:count]
        return GeneratorNoise(given, device=self.device, draw_dtype=self.draw_dtype)

    def __call__(self, shape_BCHW: Sequence[int], *, step: int, draw: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, C, H, W), drawn in `draw_dtype` on the generator's own device."""
        if isinstance(self.generator, torch.Generator):
            noise = self._draw(tuple(shape_BCHW), self.generator)
        else:
            if shape_BCHW[0] != len(self.generator):
                raise InputError(f"{len(self.generator)} generators for a batch of {shape_BCHW[0]}; give one, or one per image")
            noise = torch.cat([self._draw((1, *shape_BCHW[1:]), g) for g in self.generator])
        return noise.to(device=self.device, dtype=dtype)

    def brownian(self, shape_BCHW: Sequence[int], high: float, low: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, C, H, W). The motions are keyed by seeds that the first call draws from the generator(s)."""
        if self._motion is None:
            given = [self.generator] * shape_BCHW[0] if isinstance(self.generator, torch.Generator) else self.generator
            seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device)) for g in given]
            self._motion = KeyedNoise(seeds, range(shape_BCHW[0]), device=self.device)
        return self._motion.brownian(shape_BCHW, high, low, dtype=dtype)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=self.draw_dtype)
