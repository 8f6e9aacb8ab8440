"""Whole runs on a smooth network in float64: by one of our samplers, and by a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmkit import Prediction, Sampler
from ldmkit.interfaces import Level
from ldmkit.schedule import Schedule

SHAPE = (2, 3, 4, 4)
Network = Callable[[Tensor, Any], Tensor]


def smooth(x: Tensor, t: Any) -> Tensor:
    """An analytic network."""
    return 0.8 * torch.tanh(x + 0.3 * torch.sin(torch.as_tensor(t, dtype=torch.float64) / 150)) + 0.1 * torch.roll(x, 1, -1)


class Draws:
    """Endless noise, the same for both sides; increments of the motion are new draws too, as the peers have it."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)

    def between(self, high: float, low: float) -> Tensor:
        assert high > low >= 0
        return self()


def run_ours(
    sampler: Sampler, schedule: Schedule, prediction: Prediction, n: int, noise: Draws, network: Network = smooth
) -> Tensor:
    """The final latents."""
    levels = sampler.levels(schedule, n)

    def denoise(x: Tensor, level: Level) -> Tensor:
        return prediction.to_x0(network(x / prediction.input_scale(level), level.t), x, level)

    state = sampler.init(noise(), levels)
    while not state.done:
        state = sampler.step(denoise, state, noise)
    return state.x


def run_peer(
    peer: Any, n: int, noise: Draws, network: Network = smooth, *, scale: float | None = None, **options: Any
) -> Tensor:
    """The final latents; inside `in_float64`.

    Args:
        scale: what the first noise is multiplied by, if not by what the scheduler says.
        options: of each step.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(type(peer).step.__globals__, "randn_tensor", lambda *_, **__: noise())
        torch.set_default_dtype(torch.float64)  # which products of whole numbers, and ranges, are made in
        try:
            peer.set_timesteps(n)
            x = noise() * (getattr(peer, "init_noise_sigma", 1.0) if scale is None else scale)
            for t in peer.timesteps:
                scaled = peer.scale_model_input(x, t) if hasattr(peer, "scale_model_input") else x
                x = peer.step(network(scaled, t), t, x, **options).prev_sample
        finally:
            torch.set_default_dtype(torch.float32)
    return x
