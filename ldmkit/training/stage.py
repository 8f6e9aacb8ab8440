"""What the loop asks of a stage of training, and how it hands over what it needs."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldmkit.errors import ConfigError
from ldmkit.plugin.registry import registry
from ldmkit.training.data import Pictures
from ldmkit.training.draws import Draw, uniform
from ldmkit.training.recipes import DataConfig, Recipe


@dataclasses.dataclass(frozen=True)
class Share:
    """Which samples of each step this process takes: slice number `rank` of `processes` equal ones."""

    rank: int
    processes: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """This process's slice of the step's samples."""
        size = len(values) // self.processes
        return values[self.rank * size : (self.rank + 1) * size]


class Stage(ABC):
    """A stage of training: its networks, their inputs at each step, their losses. The loop owns optimizers and everything else.

    Attributes:
        networks: what is saved in checkpoints, by name.
        averaged: names of the networks that have a moving average.
        objectives: modules whose forward computes losses, by name; the loop wraps them for mixed precision and many processes,
            and gives each an optimizer.
    """

    networks: dict[str, nn.Module]
    averaged: tuple[str, ...]
    objectives: dict[str, nn.Module]

    def learning_rates(self, name: str) -> list[tuple[nn.Module, float]]:
        """The parts of an objective, and each one's learning rate after warm-up as a multiple of the recipe's."""
        return [(self.objectives[name], 1.0)]

    @abstractmethod
    def batch(self, step: int, share: Share) -> Any:
        """This process's inputs of a step, on the CPU: a pure function of the recipe, the step and the share."""

    @abstractmethod
    def losses(self, step: int, batch: Any, device: torch.device) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """For each objective to be stepped: its name, its loss (a scalar) and scalars to log.

        The loop steps the objective's optimizer before it asks for the next.
        """

    @abstractmethod
    def preview(self, path: Path, device: torch.device) -> None:
        """Write a picture of how well it does; the averages are in the networks meanwhile."""

    @abstractmethod
    def export(self, folder: Path, device: torch.device) -> Path:
        """Write what this stage is for, and say where; the averages are in the networks meanwhile."""


def build_part(kind: str, spec: Mapping[str, Any], base: Path) -> Any:
    """Build a part from a recipe; files that its config names are found relative to the recipe.

    Raises:
        ConfigError, UnknownPartError: for a config or a name that nobody knows.
    """
    values = dict(spec)
    part_class = registry().load(kind, values.pop("name"))
    for field in part_class.Config.asset_fields():
        if isinstance(values.get(field), str):
            values[field] = str(base / values[field])
            if not Path(values[field]).is_file():
                raise ConfigError(f"{kind}.{field}: {values[field]} is not a file")
    return part_class(part_class.Config.parse(values, owner=f"{kind} {spec['name']!r}"))


def check_size(data: DataConfig, downscale: int) -> None:
    """Raise ConfigError where the pictures' size does not fit the autoencoder."""
    for side, pixels in zip(("height", "width"), data.height_width, strict=True):
        if pixels % downscale:
            raise ConfigError(f"data.size: {side} {pixels} is not a multiple of the autoencoder's {downscale}")


def read_pixels(pictures: Pictures, indices: np.ndarray, recipe: Recipe, step: int, share: Share) -> Tensor:
    """Raw pixels in [-1, 1] of some samples, (B, C, H, W), mirrored at random where the recipe says so."""
    x_BCHW = to_pixels(pictures.read(indices))
    if recipe.data.flip:
        mirrored_B = torch.from_numpy(share(uniform(recipe.seed, Draw.FLIP, step, recipe.batch_size)) < 0.5)
        x_BCHW[mirrored_B] = x_BCHW[mirrored_B].flip(3)
    return x_BCHW


def to_pixels(x_BHWC: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) => raw pixels in [-1, 1], (B, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(x_BHWC)).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
