"""GEGLU (Shazeer 2020, arXiv:2002.05202, eq. 6) with the exact GELU, in float64, rounded once at the end."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Wide:
    """What `ldmkit.plugin.spec.Kernel` asks of a target: forward and backward as the raw ops have them."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """(..., 2N) => dense (..., N): value * GELU(gate)."""
        value, gate = x.double().chunk(2, dim=-1)
        return (value * gate * _normal_cdf(gate)).to(x.dtype).contiguous()

    @staticmethod
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        """(..., N), (..., 2N) => dense (..., 2N). GELU'(g) = Phi(g) + g phi(g)."""
        value, gate = x.double().chunk(2, dim=-1)
        cdf, density = _normal_cdf(gate), torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        wide = grad.double()
        return torch.cat([wide * gate * cdf, wide * value * (cdf + gate * density)], dim=-1).to(x.dtype)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x / math.sqrt(2))
