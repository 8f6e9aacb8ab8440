"""GroupNorm then SiLU in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    """The op as torch spells it; arguments as in `ldmkit.kernels.group_norm_silu`, all given and already checked."""
    if x.numel() == 0:  # torch gives NaN gradients to weight and bias where the spatial size is 0
        return _affine(x, weight, bias)
    # torch.group_norm rather than F.group_norm: the latter refuses a group of one value.
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    if not x.is_cpu and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)  # CUDA's group_norm returns NCHW
    if not silu:
        return y
    return F.silu(y, inplace=not y.requires_grad)  # y is ours, and nobody needs it again unless backward does


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape_1C1 = (1, -1) + (1,) * (x.dim() - 2)
    y = x if weight is None else x * weight.view(shape_1C1)
    return y.clone() if bias is None else y + bias.view(shape_1C1)
