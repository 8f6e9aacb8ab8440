"""A call's arguments, checked and brought to one form, before any work is done."""

from __future__ import annotations

import dataclasses
import math
import secrets
import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.interfaces import Condition, Conditioner, Levels, Sampler
from ldmkit.noise import GeneratorNoise, KeyedNoise, NoiseSource
from ldmkit.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to draw (or what not to): inputs for the conditioner, or a condition made before."""

    inputs: list[Any] | None = None
    embeds: Tensor | Condition | None = None

    @property
    def count(self) -> int:
        """How many. Raises: InputError for a condition that sets nothing."""
        if self.inputs is not None:
            return len(self.inputs)
        size = self.embeds.shape[0] if isinstance(self.embeds, Tensor) else self.embeds.batch_size if self.embeds else None
        if not size:
            raise InputError("prompt_embeds is an empty Condition: it sets no field")
        return size

    def condition(self, conditioner: Conditioner | None, **options: Any) -> Condition:
        """The condition, from the conditioner unless it was made before."""
        if isinstance(self.embeds, Condition):
            return self.embeds
        if self.embeds is not None:
            return Condition(tokens_BLC=self.embeds)
        return Condition() if conditioner is None or self.inputs is None else conditioner(self.inputs, **options)


def asked(conditioner: Conditioner | None, prompt: Any, labels: Any, embeds: Any) -> Asked:
    """What to draw. Raises: InputError, InputTypeError."""
    given = [name for name, v in (("prompt", prompt), ("class_labels", labels), ("prompt_embeds", embeds)) if v is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were both given; give one of them")
    if embeds is not None:
        _check_embeds("prompt_embeds", embeds)
        return Asked(embeds=embeds)
    if conditioner is None:
        if given:
            raise InputError(f"{given[0]} was given, but this pipeline has no conditioner: it is unconditional")
        return Asked(inputs=[None])
    if not given:
        raise InputError("nothing to draw was given: pass prompt=, class_labels= or prompt_embeds=")
    if prompt is not None:
        inputs = _texts("prompt", prompt)
    else:
        labels = plain(labels)
        inputs = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    if not inputs:
        raise InputError(f"{given[0]} is an empty list")
    conditioner.check(inputs)
    return Asked(inputs=inputs)


def refused(conditioner: Conditioner | None, prompt: Any, embeds: Any, positive: Asked, scale: float) -> Asked | None:
    """What not to draw: the negative prompt, or the conditioner's null input; None where there can be no guidance.

    Raises:
        InputError, InputTypeError: as `asked`; and where counts differ.
    """
    if prompt is not None and embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
    if scale <= 1 and (prompt is not None or embeds is not None):
        text = f"the negative prompt has no effect at guidance_scale = {scale:g}: guidance is off up to 1"
        warnings.warn(text, stacklevel=4)
    if embeds is not None:
        _check_embeds("negative_prompt_embeds", embeds)
        return Asked(embeds=embeds)
    if conditioner is None:
        if prompt is not None:
            raise InputError("negative_prompt was given, but this pipeline has no conditioner")
        if positive.embeds is not None and scale > 1:
            raise InputError(
                f"guidance (guidance_scale = {scale:g}) of prompt_embeds without a conditioner needs negative_prompt_embeds"
            )
        return None
    values = [conditioner.null_input] if prompt is None else _texts("negative_prompt", prompt)
    if len(values) == 1:
        values = values * positive.count
    if len(values) != positive.count:
        raise InputError(f"{len(values)} negative prompts for {positive.count} prompts; give one, or one per prompt")
    conditioner.check(values)
    return Asked(inputs=values)


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, str | Sequence):
        raise InputTypeError(f"{name} must be a string or a list of strings, got {type(value).__name__}")
    texts = [value] if isinstance(value, str) else list(value)
    for k, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputTypeError(f"{name} must be a string or a list of strings, but entry {k} is {text!r}")
    return texts


def _check_embeds(name: str, value: Any) -> None:
    if not isinstance(value, Tensor | Condition):
        raise InputTypeError(f"{name} must be a tensor (B, L, C) or a Condition, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.ndim != 3:
        raise InputError(f"{name} must be (B, L, C), got shape {tuple(value.shape)}")


def conditioner_options(conditioner: Conditioner | None, embeds: Any, clip_skip: int | None) -> dict[str, Any]:
    """Keyword arguments for the conditioner. Raises: InputError where it does not take them, or is not asked."""
    clip_skip = plain(clip_skip)
    if clip_skip is None:
        return {}
    if conditioner is None or "clip_skip" not in signature(conditioner.forward).parameters:
        raise InputError(f"clip_skip = {clip_skip} was given, but {type(conditioner).__name__} does not take it")
    if embeds is not None:
        raise InputError(f"clip_skip = {clip_skip} was given with prompt_embeds, which are encoded already; leave it out")
    return {"clip_skip": clip_skip}


def with_eta(sampler: Sampler, eta: float | None) -> Sampler:
    """The sampler with another eta. Raises: InputError where it has none."""
    if eta is None:
        return sampler
    if "eta" not in type(sampler.config).model_fields:
        raise InputError(f"eta = {eta!r} was given, but the sampler {type(sampler).__name__} has none; leave it out")
    return type(sampler)(sampler.config.replace(eta=number("eta", eta, low=0)))


def levels(
    sampler: Sampler,
    schedule: Schedule,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    *,
    default: int,
) -> Levels:
    """The run's noise levels. Raises: InputError for more than one way of saying which, or as the sampler does."""
    named = {"num_inference_steps": steps, "timesteps": timesteps, "sigmas": sigmas}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were given; they exclude one another")
    if timesteps is not None:
        return sampler.levels_from_timesteps(schedule, _numbers("timesteps", timesteps))
    if sigmas is not None:
        return sampler.levels_from_sigmas(schedule, _numbers("sigmas", sigmas))
    return sampler.levels(schedule, default if steps is None else plain(steps))


def _numbers(name: str, values: Any) -> list[Any]:
    values = plain(values)
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputTypeError(f"{name} must be a list of numbers, got {values!r}")
    return list(values)


def noise_source(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    *,
    count: int,
    first_image: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[NoiseSource, int | list[int] | None]:
    """Where the run's noise comes from, and the seed in use (None for a generator). Raises: InputError, InputTypeError."""
    if generator is not None:
        if seed is not None:
            raise InputError("seed and generator were both given; give one of them")
        if first_image:
            raise InputError(f"first_image = {first_image} was given with generator; it numbers the pictures of a seed")
        source = GeneratorNoise(generator, device=device, draw_dtype=dtype)
        if isinstance(source.generator, list) and len(source.generator) != count:
            raise InputError(f"{len(source.generator)} generators for a batch of {count}; give one, or one per image")
        return source, None
    seed = plain(seed)
    if isinstance(seed, Sequence):
        return KeyedNoise(list(seed), [first_image] * count, device=device), list(seed)
    used = secrets.randbits(32) if seed is None else seed
    return KeyedNoise(used, [first_image + k for k in range(count)], device=device), used


def number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """A number in [low, high]. Raises: InputError."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        allowed = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise InputError(f"{name} = {value!r}: must be {allowed}")
    return float(value)


def count(name: str, value: Any) -> int:
    """A whole number of at least 1. Raises: InputError."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} = {value!r}: must be a whole number of at least 1")
    whole: int = value
    return whole


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own; anything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value
