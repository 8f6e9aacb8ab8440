"""Group normalisation, fused with the additions before it and the SiLU after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldmkit.kernels import group_norm_silu


class GroupNorm(nn.Module):
    """GroupNorm (Wu and He 2018, arXiv:1803.08494), then SiLU if asked. State dict: weight (C,), bias (C,)."""

    def __init__(self, num_groups: int, channels: int, *, eps: float, silu: bool = False) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.eps = eps
        self.silu = silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor, *, shift_BC: Tensor | None = None, residual_BCHW: Tensor | None = None) -> Tensor:
        """(B, C, H, W) => the same shape, of x + shift + residual; either may be left out."""
        normed: Tensor = group_norm_silu(
            x_BCHW,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            silu=self.silu,
            shift=shift_BC,
            residual=residual_BCHW,
        )
        return normed
