"""AdamW, its learning rate as a function of the step, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmkit.training.recipes import EMAConfig, OptimizerConfig


def make_optimizer(parts: Sequence[tuple[nn.Module, float]], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and convolutions only: not on biases, gains and other vectors.

    Args:
        parts: modules, and the learning rate of each as a multiple of the recipe's; kept in the group as "lr_scale".
    """
    groups: list[dict[str, Any]] = []
    for module, scale in parts:
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": config.weight_decay, "lr_scale": scale})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_scale": scale})
    fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """What the learning rate is multiplied by at step 0, 1, ..., steps - 1: a linear rise, then the decay."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    first = config.warmup_steps if config.decay_steps is None else max(config.warmup_steps, steps - config.decay_steps)
    progress = min(1.0, max(0, step - first) / max(1, steps - 1 - first))
    if config.decay == "cosine":
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.decay == "linear":
        return 1 - (1 - config.final) * progress
    return 1.0


class EMA:
    """Moving averages of the parameters of some modules, in float32.

    Attributes:
        averages: by "module.parameter" name.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: EMAConfig) -> None:
        self.config = config
        self._parameters = {f"{m}.{name}": p for m, module in modules.items() for name, p in module.named_parameters()}
        self.averages: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    def decay(self, updates: int) -> float:
        """The decay of the update that follows `updates` earlier ones."""
        if self.config.profile == "power":
            return math.pow(1 - 1 / (updates + 1), self.config.gamma + 1)
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """average <- decay x average + (1 - decay) x weights."""
        weights = [p.detach() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - self.decay(updates))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages: once to sample with the averages, once more to go on training."""
        for name, parameter in self._parameters.items():
            weights = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weights)
