"""The pseudo-Huber distance (Charbonnier et al. 1997; for diffusion: Song and Dhariwal 2024, arXiv:2310.14189, eq. 12)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

import ldmkit


class PseudoHuber:
    """delta^2 (sqrt(1 + (difference / delta)^2) - 1), twice its mean: the squared error near 0, linear far from it."""

    class Config(ldmkit.Config):
        """Attributes:
        delta: where it turns from square to linear, in standard deviations of the target.
        """

        delta: float = Field(0.5, gt=0)

    def __init__(self, config: PseudoHuber.Config) -> None:
        self.config = config

    def __call__(self, output_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """One value per picture, (B,)."""
        delta = self.config.delta
        scaled = (output_BCHW - target_BCHW) / delta
        return 2 * delta**2 * ((1 + scaled.square()).sqrt() - 1).flatten(1).mean(dim=1)
