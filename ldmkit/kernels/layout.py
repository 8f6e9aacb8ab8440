"""Memory: what a kernel's output keeps of its input's format, and rows that a kernel can walk."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format_of(x: Tensor) -> torch.memory_format:
    """channels_last (4-D) or channels_last_3d (5-D) where channels are adjacent in memory and x is not plainly contiguous, as
    in a sliced or chunked channels_last tensor too; contiguous for everything else.
    """
    if x.dim() in (4, 5) and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def as_rows(x: Tensor) -> Tensor:
    """(..., C) => (R, C) whose rows are dense, any distance apart: a view where the strides allow it, else a copy."""
    if x.shape[-1] == 0:
        return x.new_empty((0, 0))
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.shape[1] == 1 or rows.stride(1) == 1 else rows.contiguous()
