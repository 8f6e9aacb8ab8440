"""Low-rank adapters beside plain layers: y = W x + scale up(down(x)) (Hu et al. 2021, LoRA, arXiv:2106.09685, eq. 3), and with
a magnitude m of its own, y = m (W + scale up down) / |W + scale up down| x (Liu et al. 2024, DoRA, arXiv:2402.09353, eq. 5).

A layer with adapters is the same object, of another class: its parameters, its name and its state dict stay as they were, and
what looks for plain layers (fused kernels) sees that it is none. The adapters' tensors move and cast with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


class LowRank(nn.Module):
    """One adapter of one layer.

    Args:
        down: (r, in), or (r, in, k, k) for a convolution.
        up: (out, r), or (out, r, 1, 1).
        scale: usually alpha / r.
        weight: how much of it is wanted; 0 is none, 1 all of it, and the way between is straight.
        gain: DoRA's m / |W + scale up down| - 1 (without the 1, which 16 bits would round it to), a number for each output,
            (out, 1) or (out, 1, 1, 1), or for each input, (1, in) or (1, in, 1, 1); None for LoRA.
    """

    down: Tensor
    up: Tensor
    gain: Tensor | None

    def __init__(self, down: Tensor, up: Tensor, *, scale: float, weight: float, gain: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("gain", gain, persistent=False)
        self.scale, self.weight = scale, weight

    def change(self, input: Tensor, apply: Callable[[Tensor, Tensor], Tensor], weight: Tensor) -> Tensor:
        """What it adds to the output of a layer of this weight; `apply` is the layer's operation by a weight, without bias."""
        raise_up = linear if weight.ndim == 2 else conv2d
        if self.gain is None:
            return raise_up(self.weight * self.scale * apply(input, self.down), self.up)
        per_channel = self.gain.flatten().view(-1, *(1,) * (weight.ndim - 2))
        if self.gain.shape[1] == 1:
            low_rank = raise_up(self.scale * apply(input, self.down), self.up)
            return self.weight * (low_rank + per_channel * (apply(input, weight) + low_rank))
        gained = per_channel * input
        return self.weight * (apply(gained, weight) + raise_up(self.scale * apply(input + gained, self.down), self.up))


def directions(weight: Tensor, down: Tensor, up: Tensor, *, scale: float, magnitude: Tensor) -> Tensor:
    """m / |W + scale up down|, of `magnitude`'s shape, which has one entry for each output or each input.

    The norm is that of an output's weights (the paper's columns), or of an input's, as other trainers have it. Where it is 0
    there is no direction, and the result is 0. Computed in `weight`'s dtype.
    """
    moved = weight + scale * (up.to(weight).flatten(1) @ down.to(weight).flatten(1)).view_as(weight)
    over = [dim for dim, size in enumerate(magnitude.shape) if size == 1]
    norm = torch.linalg.vector_norm(moved, dim=over, keepdim=True)
    return torch.where(norm > 0, magnitude.to(weight) / norm, 0.0)


class AdaptedLinear(nn.Linear):
    """A linear layer and its adapters."""

    adapters: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) => (..., out)."""
        out = super().forward(input)
        for adapter in _active(self.adapters):
            out = out + adapter.change(input, linear, self.weight)
        return out


class AdaptedConv2d(nn.Conv2d):
    """A convolution and its adapters; `down` has its kernel, stride and padding."""

    adapters: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) => (B, out, H', W')."""
        out = super().forward(input)
        for adapter in _active(self.adapters):
            out = out + adapter.change(input, self._without_bias, self.weight)
        return out

    def _without_bias(self, input: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, weight, None)
        return out


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}


def adaptable(layer: nn.Module) -> bool:
    """Whether it is a plain linear layer or an ungrouped convolution, or one that has adapters already."""
    return type(layer) in (*_ADAPTED, *_ADAPTED.values()) and getattr(layer, "groups", 1) == 1


def attach(layer: nn.Module, name: str, adapter: LowRank) -> None:
    """Put an adapter beside an `adaptable` layer, whose device and dtype it has."""
    if type(layer) in _ADAPTED:
        layer.adapters = nn.ModuleDict()
        layer.__class__ = _ADAPTED[type(layer)]
    cast(nn.ModuleDict, layer.adapters)[name] = adapter


def detach(layer: nn.Module, name: str) -> None:
    """Take an adapter away; without any, the layer is a plain one again."""
    adapters = cast(nn.ModuleDict, layer.adapters)
    del adapters[name]
    if not adapters:
        del layer.adapters
        layer.__class__ = next(plain for plain, adapted in _ADAPTED.items() if adapted is type(layer))


def _active(adapters: nn.ModuleDict) -> Iterator[LowRank]:
    return (cast(LowRank, adapter) for adapter in adapters.values() if cast(LowRank, adapter).weight)
