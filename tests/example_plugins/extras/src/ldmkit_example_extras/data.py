"""Pictures out of nothing: bright discs on black, told by the size of the disc."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

import ldmkit
from ldmkit.training.data import Pictures
from ldmkit.training.recipes import DataConfig


class DiscPictures(Pictures):
    """Picture i has a disc of radius (i mod 4 + 1) / 10 of its width."""

    SIZES = ("tiny", "small", "middling", "large")

    def __init__(self, count: int, size: tuple[int, int], channels: int, conditioned: bool) -> None:
        self._count, self._size, self._channels = count, size, channels
        self.conditions = [self.SIZES[i % 4] for i in range(count)] if conditioned else None

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C)."""
        height, width = self._size
        y, x = np.mgrid[:height, :width]
        distance = np.hypot(y - height / 2, x - width / 2) / width
        discs = [np.where(distance < (int(i) % 4 + 1) / 10, 255, 0).astype(np.uint8) for i in indices]
        return np.repeat(np.stack(discs)[..., None], self._channels, axis=-1)


class Discs:
    """What `ldmkit_data_sources` asks of a target."""

    class Config(ldmkit.Config):
        """Attributes:
        count: how many pictures there are.
        """

        count: int = Field(64, ge=1)

    def __init__(self, config: Discs.Config) -> None:
        self.config = config

    def open(self, data: DataConfig, base: Path, *, channels: int, conditioned: bool) -> Pictures:
        """Made when they are read."""
        return DiscPictures(self.config.count, data.height_width, channels, conditioned)
