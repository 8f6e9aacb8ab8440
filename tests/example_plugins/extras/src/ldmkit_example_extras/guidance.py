"""Guidance that grows as the noise falls (Sadat et al. 2024, arXiv:2310.17347, give reasons to guide little at first)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

import ldmkit
from ldmkit import Condition, Denoise, Level, Model


class Rising:
    """Classifier-free guidance of scale 1 + (scale - 1) (1 - sigma / sqrt(alpha^2 + sigma^2))^power."""

    class Config(ldmkit.Config):
        """Attributes:
        power: 0 is ordinary guidance; the larger, the later it sets in.
        """

        power: float = Field(1.0, ge=0)

    def __init__(self, config: Rising.Config) -> None:
        self.config = config

    def __call__(self, model: Model, condition: Condition, negative: Condition | None, scale: float) -> Denoise:
        """D, guided; the conditional one where there is no negative condition."""
        given = model.denoiser.prepare(condition)
        refused = None if negative is None else model.denoiser.prepare(negative)

        def denoise(x: Tensor, level: Level) -> Tensor:
            with_ = model(x, level, given)
            if refused is None:
                return with_
            now = 1 + (scale - 1) * (1 - level.sigma / level.scale) ** self.config.power
            without = model(x, level, refused)
            return without + now * (with_ - without)

        return denoise
