"""Steps that evaluate the model twice: the two points, and what moves x between levels along a straight line."""

from __future__ import annotations

import math

from torch import Tensor

from ldmkit.interfaces import Denoise, Level
from ldmkit_samplers._gaussian import ddim
from ldmkit_samplers._multistep import noise_in


def euler(x: Tensor, denoised: Tensor, level: Level, to: Level) -> Tensor:
    """Euler's step along the probability flow, which is DDIM's; also from pure noise, and onto the clean image."""
    law = ddim(level, to, 0.0)
    return law.on_x * x + law.on_x0 * denoised


def heun(denoise: Denoise, x: Tensor, level: Level, to: Level) -> tuple[Tensor, Tensor]:
    """The trapezoidal rule along the probability flow (Karras et al. 2022, arXiv:2206.00364, alg. 1), and the estimate at x.
    Onto the clean image and from pure noise it is Euler's step.
    """
    denoised = denoise(x, level)
    straight = euler(x, denoised, level, to)
    if to.sigma == 0 or level.alpha == 0:
        return straight, denoised
    bend = (noise_in(straight, denoise(straight, to), to) - noise_in(x, denoised, level)) / 2
    return straight + to.alpha * (to.ratio - level.ratio) * bend, denoised


def ancestral(level: Level, to: Level, eta: float) -> tuple[float, float]:
    """k-diffusion's `get_ancestral_step`: the ratio to go down to, and the noise to come back up, in units of alpha'."""
    ratio, ahead = level.ratio, to.ratio
    shrink = 0.0 if math.isinf(ratio) else (ahead / ratio) ** 2
    up = min(ahead, eta * ahead * math.sqrt(max(0.0, 1 - shrink)))
    return math.sqrt((ahead - up) * (ahead + up)), up
