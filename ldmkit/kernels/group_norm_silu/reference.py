"""GroupNorm then SiLU in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmkit.kernels.layout import memory_format_of


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The op as torch spells it; arguments as in `ldmkit.kernels.group_norm_silu`, all given and already checked."""
    memory_format = memory_format_of(x)
    if shift is not None:
        x = x + shift.view(*shift.shape, *(1,) * (x.dim() - 2))
    if residual is not None:
        x = x + residual
    if x.numel() == 0:  # torch gives NaN gradients to weight and bias where the spatial size is 0
        return _affine(x, weight, bias)
    # torch.group_norm rather than F.group_norm: the latter refuses a group of one value.
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    # Torch's kernels do not all keep the memory format. Moving dimensions works under vmap, which knows no memory formats.
    y = y.contiguous() if memory_format == torch.contiguous_format else y.movedim(1, -1).contiguous().movedim(-1, 1)
    if not silu:
        return y
    return F.silu(y, inplace=not y.requires_grad)  # y is ours, and nobody needs it again unless backward does


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape_1C1 = (1, -1) + (1,) * (x.dim() - 2)
    y = x if weight is None else x * weight.view(shape_1C1)
    return y.clone() if bias is None else y + bias.view(shape_1C1)
