"""Memory formats: what a kernel's output keeps of its input's."""

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
