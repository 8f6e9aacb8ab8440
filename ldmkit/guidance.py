"""Guidance, as closures over D(x, level): whatever a sampler is given is again a plain D.

Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6, in the convention of Imagen and Stable Diffusion, where
scale 1 is no guidance): D = D(uncond) + scale (D(cond) - D(uncond)). Being affine, it is the same on x0, eps and v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit.errors import InputError
from ldmkit.interfaces import Condition, Denoise, Level
from ldmkit.prediction import Model


def unguided(model: Model, condition: Condition) -> Denoise:
    """D under one condition."""
    prepared = model.denoiser.prepare(condition)
    return lambda x, level: model(x, level, prepared)


def classifier_free(
    model: Model, condition: Condition, negative: Condition, scale: float, *, rescale: float = 0.0, batched: bool = True
) -> Denoise:
    """D pushed away from `negative` and towards `condition`.

    Args:
        scale: the guidance scale; 1 means none, usual values are 3 to 12.
        rescale: in [0, 1]: how much of the prediction's standard deviation is brought back to the conditional one's
            (Lin et al. 2024, arXiv:2305.08891, eq. 15-16); acts on the raw prediction, per image.
        batched: one pass over both halves (faster) or two passes (half the memory).

    Raises:
        InputError: rescale outside [0, 1]; conditions of different batch size, or that set different fields.
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale = {rescale!r}: must be from 0 to 1")
    if condition.batch_size != negative.batch_size:
        raise InputError(
            f"the condition is for {condition.batch_size} images and the negative one for {negative.batch_size}; repeat one"
        )
    if batched:
        both = model.denoiser.prepare(Condition.cat([negative, condition]))
    else:
        one, other = model.denoiser.prepare(negative), model.denoiser.prepare(condition)

    def denoise(x: Tensor, level: Level) -> Tensor:
        if batched:
            without, with_ = model(torch.cat([x, x]), level, both).chunk(2)
        else:
            without, with_ = model(x, level, one), model(x, level, other)
        guided = without + scale * (with_ - without)
        return _rescaled(model, guided, with_, x, level, rescale) if rescale else guided

    return denoise


def _rescaled(model: Model, guided: Tensor, with_: Tensor, x: Tensor, level: Level, rescale: float) -> Tensor:
    raw, raw_with = (model.prediction.from_x0(x0, x, level) for x0 in (guided, with_))
    axes = tuple(range(1, raw.ndim))
    matched = raw * (raw_with.std(dim=axes, keepdim=True) / raw.std(dim=axes, keepdim=True))
    return model.prediction.to_x0(rescale * matched + (1 - rescale) * raw, x, level)
