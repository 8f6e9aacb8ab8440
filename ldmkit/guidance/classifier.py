"""Classifier guidance: Dhariwal and Nichol 2021, arXiv:2105.05233, algorithm 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldmkit.denoised import Denoised
from ldmkit.errors import InputError, InputTypeError
from ldmkit.interfaces import Denoise, Level

Classifier = Callable[[Tensor, Level], Tensor]
"""log p(y | x, level) per image: noisy latents (B, C, H, W) => (B,) nats, differentiable. y is the caller's own."""


def classifier_guided(denoise: Denoise, log_prob_B: Classifier, scale: float = 1.0) -> Denoise:
    """D + scale sigma^2 / alpha grad_x log p(y | x, level).

    Algorithm 2 has eps - sigma scale grad log p; in x0 = (x - sigma eps) / alpha that is the term above. With the exact
    p(y | x) and scale 1 it is E[x0 | x, y]. The gradient is a constant to whoever differentiates D.

    Raises (when called):
        InputError: at alpha = 0, where x says nothing of x0 and the term has no finite form.
        InputTypeError, InputError: where the classifier does not give one differentiable number per image.
    """

    def guided(x: Tensor, level: Level) -> Tensor:
        if level.alpha == 0:
            raise InputError(
                "classifier guidance has no finite form at zero signal (alpha = 0); use a schedule without "
                "rescale_betas_zero_snr, or guidance_interval"
            )
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_checked(log_prob_B(here, level), here).sum(), here)
        x0 = denoise(x, level)
        return Denoised.carry(x0 + (scale * level.sigma**2 / level.alpha) * slope, x0)

    return guided


def _checked(value: Tensor, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"classifier must return a tensor (B,), got {type(value).__name__}")
    if value.shape != (len(x),):
        raise InputError(f"classifier must return log p per image, ({len(x)},), got shape {tuple(value.shape)}")
    if not value.requires_grad:
        raise InputError("what the classifier returns does not depend on x differentiably; is there a no_grad in it?")
    return value
