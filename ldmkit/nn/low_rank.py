"""Low-rank adapters beside plain layers: y = W x + scale up(down(x)) (Hu et al. 2021, LoRA, arXiv:2106.09685, eq. 3).

A layer with adapters is the same object, of another class: its parameters, its name and its state dict stay as they were, and
what looks for plain layers (fused kernels) sees that it is none. The adapters' tensors move and cast with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


class LowRank(nn.Module):
    """One adapter of one layer.

    Args:
        down: (r, in), or (r, in, k, k) for a convolution.
        up: (out, r), or (out, r, 1, 1).
        scale: usually alpha / r.
        weight: how much of it is wanted; 0 is none.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, *, scale: float, weight: float) -> None:
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.scale, self.weight = scale, weight


class AdaptedLinear(nn.Linear):
    """A linear layer and its adapters."""

    adapters: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) => (..., out)."""
        out = super().forward(input)
        for adapter in _active(self.adapters):
            out = out + linear(adapter.weight * adapter.scale * linear(input, adapter.down), adapter.up)
        return out


class AdaptedConv2d(nn.Conv2d):
    """A convolution and its adapters; `down` has its kernel, stride and padding."""

    adapters: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        """(B, in, H, W) => (B, out, H', W')."""
        out = super().forward(input)
        for adapter in _active(self.adapters):
            h_BCHW = adapter.weight * adapter.scale * self._conv_forward(input, adapter.down, None)
            out = out + conv2d(h_BCHW, adapter.up)
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
