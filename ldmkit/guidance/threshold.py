"""x0 kept where data are: clipped, or by dynamic thresholding (Saharia et al. 2022, Imagen, arXiv:2205.11487, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit.denoised import Denoised
from ldmkit.errors import InputError
from ldmkit.interfaces import Denoise, Level


def clipped(denoise: Denoise, limit: float) -> Denoise:
    """x0 clamped to [-limit, limit], as pixel-space models do (Ho et al. 2020's code; "static thresholding" in Imagen)."""

    def bounded(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(x, level)
        return Denoised.carry(x0.clamp(-limit, limit), x0)

    return bounded


def thresholded(denoise: Denoise, ratio: float, limit: float = 1.0) -> Denoise:
    """x0 clamped to its own `ratio` quantile s and scaled by limit / s, per image, wherever s is above `limit`.

    Args:
        ratio: in (0, 1]; Imagen takes 0.995.
        limit: the largest value that data has: 1 for pixels in [-1, 1] (Imagen is a pixel-space model). Latents have no such
            bound; of Stable Diffusion's they say about 4.

    Raises:
        InputError: a ratio outside (0, 1], a limit that is not above 0.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"dynamic_thresholding_ratio = {ratio!r}: must be above 0, up to 1")
    if not limit > 0:
        raise InputError(f"dynamic_thresholding_limit = {limit!r}: must be above 0")

    def bounded(x: Tensor, level: Level) -> Tensor:
        x0 = denoise(x, level)
        sizes = x0.abs().flatten(1)
        s = _quantile(sizes, ratio).clamp(min=limit).view(-1, *(1,) * (x0.ndim - 1))
        return Denoised.carry(x0.clamp(-s, s) * (limit / s), x0)

    return bounded


def _quantile(values_BN: Tensor, ratio: float) -> Tensor:
    """Interpolated, as torch.quantile, which refuses half precision and more than 16 million values."""
    place = ratio * (values_BN.shape[1] - 1)
    low = int(place)
    ordered_BN = values_BN.sort(dim=1).values
    return torch.lerp(ordered_BN[:, low], ordered_BN[:, min(low + 1, values_BN.shape[1] - 1)], place - low)
