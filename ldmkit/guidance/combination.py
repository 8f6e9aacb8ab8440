"""Guidance by combining estimates under several conditions, linearly.

Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6, in the convention of Imagen and Stable Diffusion, where
scale 1 is no guidance):  D = D(negative) + scale (D(asked) - D(negative)).
Several things asked at once, "AND" (Liu et al. 2022, arXiv:2206.01714, algorithm 1):
    D(asked) = D(negative) + sum_i weight_i (D(asked_i) - D(negative)).
Perturbed attention (Ahn et al. 2024, arXiv:2403.17377) adds pag_scale (D(asked) - D(asked, perturbed)); see `perturb`.
Being affine with coefficients that add up to 1, all of it is the same on x0, eps and v.
A variance that the model predicts is not guided: it stays that of the (first) condition asked, as in diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmkit.denoised import Denoised
from ldmkit.errors import InputError
from ldmkit.guidance.passes import Passes
from ldmkit.guidance.perturbed import perturb
from ldmkit.interfaces import Condition, Denoise, Level
from ldmkit.prediction import Model

Weight = float | Tensor
"""One for all images, or one for each, (B,)."""


def unguided(model: Model, condition: Condition) -> Denoise:
    """D under one condition."""
    prepared = model.denoiser.prepare(condition)
    return lambda x, level: model(x, level, prepared)


def classifier_free(
    model: Model, condition: Condition, negative: Condition, scale: float, *, rescale: float = 0.0, batched: bool | None = True
) -> Denoise:
    """D pushed away from `negative` and towards `condition`; see `combined`. Scale 1 is D under `condition`, by one pass."""
    return combined(model, [condition], negative=negative, scale=scale, rescale=rescale, batched=batched)


def combined(
    model: Model,
    conditions: Sequence[Condition],
    *,
    weights: Sequence[Weight] = (1.0,),
    negative: Condition | None = None,
    scale: float = 1.0,
    rescale: float = 0.0,
    pag_scale: float = 0.0,
    pag_layers: Sequence[str] = (),
    batched: bool | None = True,
) -> Denoise:
    """D by the formulas above. What has no share in it costs no pass: the negative condition where scale is 1 and the weights
    add up to 1, the perturbed pass where pag_scale is 0.

    Args:
        conditions, weights: what is asked, each with its weight.
        negative: what to go away from; needed where it has a share.
        scale: the guidance scale; 1 means none, usual values are 3 to 12.
        rescale: in [0, 1]: how much of the prediction's standard deviation is brought back to that of D(asked)
            (Lin et al. 2024, arXiv:2305.08891, eq. 15-16); acts on the raw prediction, per image.
        pag_scale, pag_layers: of perturbed attention (of one condition).
        batched: one pass or several; see `Passes`.

    Raises:
        InputError: rescale outside [0, 1]; as many weights as conditions; a negative condition that is needed and not given;
            conditions of different batch size, or that set different fields; layers that the denoiser does not have.
    """
    if not 0 <= rescale <= 1:
        raise InputError(f"guidance rescale = {rescale!r}: must be from 0 to 1")
    if len(weights) != len(conditions):
        raise InputError(f"{len(weights)} weights for {len(conditions)} conditions; give one for each")
    if pag_scale and len(conditions) > 1:
        raise InputError(f"pag_scale = {pag_scale:g}: perturbed attention is defined for one condition, not {len(conditions)}")
    alone = all(bool(torch.as_tensor(w == 1).all()) for w in weights) and len(weights) == 1
    needed = list(conditions)
    if has_negative_share(scale, weights):
        if negative is None:
            raise InputError(f"guidance at scale {scale:g} of weights {_shown(weights)} needs a negative condition")
        needed.insert(0, negative)
    else:
        negative = None
    if pag_scale:
        needed = [perturb(model.denoiser, c, pag_layers, False) for c in needed]
        needed.append(perturb(model.denoiser, conditions[0], pag_layers, True))
    elif len(needed) == 1:
        return unguided(model, needed[0])
    passes = Passes(model, needed, batched=batched)

    def denoise(x: Tensor, level: Level) -> Tensor:
        estimates = passes(x, level)
        first = int(negative is not None)
        asked = estimates[first] if alone else _weighted(estimates[: first + len(weights)], weights, negative is not None)
        guided = asked if scale == 1 else estimates[0] + scale * (asked - estimates[0])
        if pag_scale:
            guided = guided + pag_scale * (asked - estimates[-1])
        if rescale and guided is not asked:
            guided = _rescaled(model, guided, asked, x, level, rescale)
        return Denoised.carry(guided, estimates[first])

    return denoise


def has_negative_share(scale: float, weights: Sequence[Weight]) -> bool:
    """Whether the negative condition has a share, 1 - scale * (the weights' sum), in any image, or in what is rescaled to."""
    rest = torch.as_tensor(sum(weights)) - 1
    return scale != 1 or bool((rest.abs() > 1e-6).any())  # 0.7 + 0.2 + 0.1 need not be 1 to the bit


def _weighted(estimates: Sequence[Tensor], weights: Sequence[Weight], from_negative: bool) -> Tensor:
    """D(asked); the first estimate is the negative one, if there is one."""
    if not from_negative:
        return sum((_per_image(w) * d for w, d in zip(weights, estimates, strict=True)), start=estimates[0] * 0)
    without, *asked = estimates
    return sum((_per_image(w) * (d - without) for w, d in zip(weights, asked, strict=True)), start=without)


def _per_image(weight: Weight) -> Weight:
    return weight.view(-1, 1, 1, 1) if isinstance(weight, Tensor) else weight


def _shown(weights: Sequence[Weight]) -> str:
    return ", ".join(str(w.tolist()) if isinstance(w, Tensor) else f"{w:g}" for w in weights)


def _rescaled(model: Model, guided: Tensor, with_: Tensor, x: Tensor, level: Level, rescale: float) -> Tensor:
    raw, raw_with = (model.prediction.from_x0(x0, x, level) for x0 in (guided, with_))
    axes = tuple(range(1, raw.ndim))
    matched = raw * (raw_with.std(dim=axes, keepdim=True) / raw.std(dim=axes, keepdim=True))
    return model.prediction.to_x0(rescale * matched + (1 - rescale) * raw, x, level)
