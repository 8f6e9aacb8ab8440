"""A call's arguments, checked and brought to one form, before any work is done."""

from __future__ import annotations

import dataclasses
import math
import secrets
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmkit.conjunction import And
from ldmkit.errors import InputError, InputTypeError, NumericalError
from ldmkit.guidance import Guidance
from ldmkit.interfaces import Condition, Conditioner, Denoiser, Levels, Sampler
from ldmkit.noise import GeneratorNoise, KeyedNoise, NoiseSource
from ldmkit.schedule import Schedule

NEGATIVE_SCORE = 2.5
"""Aesthetic score of what is not wanted, for XL's refiner (diffusers' default)."""


SIZES = ("original_size", "crops_coords_top_left", "target_size")
"""What Stable Diffusion XL is told of a picture, in pixels."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to draw (or what not to): inputs for the conditioner (an `And` among them stands for several), or a condition made
    before."""

    inputs: list[Any] | None = None
    embeds: Tensor | Condition | None = None

    def terms(self) -> tuple[list[Asked], list[list[float]]]:
        """What is asked at once, each for all pictures, and its weight in each picture (0 where a picture has fewer terms)."""
        if self.inputs is None or not any(isinstance(value, And) for value in self.inputs):
            return [self], [[1.0] * self.count]
        each = [value if isinstance(value, And) else And(value) for value in self.inputs]
        most = max(len(value.inputs) for value in each)
        inputs = [[v.inputs[k] if k < len(v.inputs) else v.inputs[0] for v in each] for k in range(most)]
        weights = [[v.weights[k] if k < len(v.weights) else 0.0 for v in each] for k in range(most)]
        return [Asked(inputs=values) for values in inputs], weights

    @property
    def count(self) -> int:
        """How many."""
        if self.inputs is not None:
            return len(self.inputs)
        return _pictures(self.embeds) if self.embeds is not None else 0

    def condition(self, conditioner: Conditioner | None, **options: Any) -> Condition:
        """The condition, from the conditioner unless it was made before."""
        if isinstance(self.embeds, Condition):
            return self.embeds
        if self.embeds is not None:
            return Condition(tokens_BLC=self.embeds)
        return Condition() if conditioner is None or self.inputs is None else conditioner(self.inputs, **options)


def asked(
    conditioner: Conditioner | None, prompt: Any, labels: Any, pictures: Any, embeds: Any, options: Mapping[str, Any]
) -> Asked:
    """What to draw. `options` are the conditioner's. Raises: InputError, InputTypeError."""
    told = {"prompt": prompt, "class_labels": labels, "image_prompt": pictures, "prompt_embeds": embeds}
    given = [name for name, value in told.items() if value is not None]
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
        raise InputError("nothing to draw was given: pass prompt=, class_labels=, image_prompt= or prompt_embeds=")
    if prompt is not None:
        inputs = _texts("prompt", prompt)
        if options.get("prompt_syntax") == "weighted":
            inputs = [And.parse(text) if isinstance(text, str) else text for text in inputs]
    elif pictures is not None:
        several = isinstance(pictures, list | tuple) or getattr(pictures, "ndim", 3) == 4
        inputs = list(pictures) if several else [pictures]
    else:
        labels = plain(labels)
        inputs = list(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else [labels]
    if not inputs:
        raise InputError(f"{given[0]} is an empty list")
    terms = [term for value in inputs for term in (value.inputs if isinstance(value, And) else [value])]
    conditioner.check(terms, **_known_to_check(conditioner, options))
    return Asked(inputs=inputs)


def refused(
    conditioner: Conditioner | None, prompt: Any, embeds: Any, positive: Asked, given: Guidance, options: Mapping[str, Any]
) -> Asked | None:
    """What not to draw: the negative prompt, or the conditioner's null input; None where there is nothing to guide away from.

    Raises:
        InputError, InputTypeError: as `asked`; and where counts differ.
    """
    if prompt is not None and embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
    if conditioner is None and prompt is not None:
        raise InputError("negative_prompt was given, but this pipeline has no conditioner")
    scale = given.scale
    if scale <= 1 and len(positive.terms()[0]) == 1 and (prompt is not None or embeds is not None):
        if given.told is not None:
            raise InputError("the negative prompt has no effect on a denoiser that is told the guidance scale; leave it out")
        text = "the negative prompt has no effect: guidance is off up to guidance_scale = 1"
        warnings.warn(text, stacklevel=4)
    if embeds is not None:
        _check_embeds("negative_prompt_embeds", embeds)
        given_for, wanted = _pictures(embeds), positive.count
        if given_for not in (1, wanted):
            raise InputError(
                f"negative_prompt_embeds are for {given_for} pictures, and there are {wanted} prompts; give one, or as many"
            )
        if given_for < wanted:
            embeds = embeds.repeat(wanted) if isinstance(embeds, Condition) else embeds.repeat_interleave(wanted, dim=0)
        return Asked(embeds=embeds)
    if conditioner is None:
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
    conditioner.check(values, **_known_to_check(conditioner, options))
    return Asked(inputs=values)


def _known_to_check(conditioner: Conditioner, options: Mapping[str, Any]) -> dict[str, Any]:
    known = signature(conditioner.check).parameters
    return {name: value for name, value in options.items() if name in known}


def check_fits(denoiser: Denoiser, conditioner: Conditioner | None, on: Asked | None, extra: frozenset[str]) -> None:
    """Raise InputError where the denoiser ignores or lacks a field, or a condition made before does not fit it.

    Args:
        extra: fields that the pipeline itself will set.
    """
    if on is None:
        return
    if on.inputs is not None:
        if conditioner is not None:
            denoiser.check_fields(conditioner.provides | extra)
        return
    made = on.condition(None)
    # Only their presence is looked at.
    stand_ins: dict[str, Any] = {name: torch.empty(on.count) for name in extra if getattr(made, name) is None}
    denoiser.check(dataclasses.replace(made, **stand_ins))


def _texts(name: str, value: Any) -> list[Any]:
    if not isinstance(value, str | Sequence | And):
        raise InputTypeError(f"{name} must be a string or a list of strings, got {type(value).__name__}")
    texts = [value] if isinstance(value, str | And) else list(value)
    for k, text in enumerate(texts):
        if isinstance(text, And) and name == "negative_prompt":
            raise InputTypeError(f"{name}: entry {k} is {text!r}; And is for the prompt, where weights may be negative")
        if not all(isinstance(part, str) for part in (text.inputs if isinstance(text, And) else [text])):
            raise InputTypeError(f"{name} must be a string or a list of strings, but entry {k} is {text!r}")
    return texts


def guidance(defaults: Any, denoiser: Denoiser, *, guided: bool, told: Mapping[str, Any]) -> Guidance:
    """What a call asks of guidance, `None` standing for what it does not say.

    Args:
        guided: whether there is anything to guide away from: a conditioner, or negative embeddings.
        told: the call's arguments, by name.

    Raises:
        InputError, InputTypeError: for values out of range, and for what could have no effect.
    """
    given = {name: plain(value) for name, value in told.items() if value is not None}
    scale = number("guidance_scale", given.get("guidance_scale", defaults.guidance_scale), low=0)
    rescale = number("guidance_rescale", given.get("guidance_rescale", defaults.guidance_rescale), low=0, high=1)
    pag_scale = number("pag_scale", given.get("pag_scale", 0.0), low=0)
    distilled = "guidance_B" in denoiser.accepts
    off = not guided or distilled or scale <= 1
    if "guidance_scale" in given and scale > 1 and not (guided or distilled):
        raise InputError(
            f"guidance_scale = {scale:g} has no effect: this pipeline is unconditional; leave it out, or take pag_scale="
        )
    if off and pag_scale == 0:
        why = f"there is no guidance (guidance_scale = {scale:g})" if guided else "this pipeline is unconditional"
        why = "the denoiser is told the scale" if distilled else why
        for name in ("guidance_rescale", "guidance_interval"):
            if given.get(name):
                raise InputError(f"{name} = {given[name]!r} has no effect where {why}; leave it out")
    for name, other in (
        ("pag_layers", "pag_scale"),
        ("classifier_scale", "classifier"),
        ("dynamic_thresholding_limit", "dynamic_thresholding_ratio"),
    ):
        if name in given and not given.get(other):
            raise InputError(f"{name} = {given[name]!r} has no effect without {other}")
    layers, batched = given.get("pag_layers", ("mid",)), given.get("guidance_batched")
    if not isinstance(layers, Sequence) or not all(isinstance(layer, str) for layer in layers):
        raise InputTypeError(f"pag_layers = {layers!r}: must be the name of a self-attention layer, or a list of names")
    if not isinstance(batched, bool | None):
        raise InputTypeError(f"guidance_batched = {batched!r}: must be True, False or None")
    classifier, ratio = given.get("classifier"), given.get("dynamic_thresholding_ratio")
    if classifier is not None and not callable(classifier):
        raise InputTypeError(f"classifier must be a function (x, level) -> log p(y | x) (B,), got {classifier!r}")
    return Guidance(
        scale=1.0 if off else scale,
        rescale=rescale,
        pag_scale=pag_scale,
        pag_layers=(layers,) if isinstance(layers, str) else tuple(layers),
        interval=_interval(given["guidance_interval"]) if "guidance_interval" in given else None,
        classifier=classifier,
        classifier_scale=number("classifier_scale", given.get("classifier_scale", 1.0), low=-math.inf),
        thresholding_ratio=None if ratio is None else number("dynamic_thresholding_ratio", ratio, low=0, high=1),
        thresholding_limit=number("dynamic_thresholding_limit", given.get("dynamic_thresholding_limit", 1.0), low=0),
        batched=batched,
        told=scale if distilled else None,
    )


def _interval(value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise InputTypeError(f"guidance_interval = {value!r}: must be a pair (low, high) in sigma / alpha")
    low, high = (number("guidance_interval", end, low=0, infinite=True) for end in value)
    if not low < high:
        raise InputError(f"guidance_interval = ({low:g}, {high:g}): low must be below high, in sigma / alpha")
    return low, high


def _check_embeds(name: str, value: Any) -> None:
    if not isinstance(value, Tensor | Condition):
        raise InputTypeError(f"{name} must be a tensor (B, L, C) or a Condition, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.ndim != 3:
        raise InputError(f"{name} must be (B, L, C), got shape {tuple(value.shape)}")
    if not _pictures(value):
        why = "it sets no field" if isinstance(value, Condition) and not value.given() else "its batch is empty"
        raise InputError(f"{name} is for no picture: {why}")
    for tensor in [value] if isinstance(value, Tensor) else [getattr(value, field) for field in value.given()]:
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise NumericalError(f"{name} holds {bad} NaN or infinite values of {tensor.numel()} (before step 1)")


def _pictures(embeds: Tensor | Condition) -> int:
    """How many a condition made before is for."""
    return len(embeds) if isinstance(embeds, Tensor) else embeds.batch_size or 0


def conditioner_options(conditioner: Conditioner | None, embeds: Any, *, prefix: str = "", **told: Any) -> dict[str, Any]:
    """Keyword arguments for the conditioner. Raises: InputError where it does not take them, or is not asked.

    Args:
        prefix: of the names in messages.
    """
    given = {name: plain(value) for name, value in told.items() if value is not None}
    for name, value in given.items():
        if not takes(conditioner, name):
            who = (
                "this pipeline has no conditioner that could"
                if conditioner is None
                else f"{type(conditioner).__name__} does not"
            )
            raise InputError(f"{prefix}{name} = {value!r} was given, but {who} take it")
        if embeds is not None:
            raise InputError(
                f"{prefix}{name} = {value!r} was given with {prefix}prompt_embeds, which are encoded already; leave it out"
            )
    return given


def negative_options(conditioner: Conditioner | None, embeds: Any, positive: Mapping[str, Any], **told: Any) -> dict[str, Any]:
    """The same for what is not wanted: as for what is, but for another text and score; and where one size is given, for sizes.

    Raises:
        InputError: as `conditioner_options`.
    """
    own = {"prompt_2", "aesthetic_score"}
    if any(told.get(name) is not None for name in SIZES):
        own.update(SIZES)
    shared = {name: value for name, value in positive.items() if name not in own}
    score = {"aesthetic_score": NEGATIVE_SCORE} if takes(conditioner, "aesthetic_score") else {}
    return {**shared, **score, **conditioner_options(conditioner, embeds, prefix="negative_", **told)}


def takes(conditioner: Conditioner | type[Any] | None, name: str) -> bool:
    """Whether the conditioner's `forward` has such an argument."""
    return conditioner is not None and name in signature(conditioner.forward).parameters


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
    if isinstance(seed, list):
        keyed = KeyedNoise(seed, [first_image] * count, device=device)
        return keyed, keyed.seeds
    keyed = KeyedNoise(secrets.randbits(32) if seed is None else seed, [first_image + k for k in range(count)], device=device)
    return keyed, keyed.seeds[0]


def seeds(value: Any) -> Any:
    """A seed, or a list of them, in Python's own numbers; anything else as it is."""
    value = plain(value)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [plain(seed) for seed in value] if several else value


def number(name: str, value: Any, low: float, high: float = math.inf, *, infinite: bool = False) -> float:
    """A number in [low, high], finite unless `infinite` ones are allowed. Raises: InputError."""
    value = plain(value)
    fits = not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= high
    if not fits or (abs(value) == math.inf and not infinite):
        kind = "a number" if infinite else "a finite number"
        bounds = "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" from {low:g} to {high:g}"
        raise InputError(f"{name} = {value!r}: must be {kind}{bounds}")
    return float(value)


def count(name: str, value: Any, low: int = 1) -> int:
    """A whole number of at least `low`. Raises: InputError."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"{name} = {value!r}: must be a whole number of at least {low}")
    whole: int = value
    return whole


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own; anything else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value
