"""Guidance in a limited interval of noise levels: Kynkäänniemi et al. 2024, arXiv:2404.07724."""

from __future__ import annotations

from torch import Tensor

from ldmkit.errors import InputError
from ldmkit.interfaces import Denoise, Level


def within(guided: Denoise, plain: Denoise, low: float, high: float) -> Denoise:
    """`guided` where low < sigma / alpha <= high, `plain` (usually D under the condition alone, one pass) elsewhere.

    Raises:
        InputError: unless 0 <= low < high.
    """
    if not 0 <= low < high:
        raise InputError(f"guidance_interval = ({low:g}, {high:g}): needs 0 <= low < high, in sigma / alpha")

    def denoise(x: Tensor, level: Level) -> Tensor:
        return guided(x, level) if low < level.ratio <= high else plain(x, level)

    return denoise
