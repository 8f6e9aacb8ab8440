"""What conditioners may ask of their training pictures: sizes and crops (Podell et al. 2023, arXiv:2307.01952, sec. 2.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ldmkit.arguments import takes
from ldmkit.interfaces import Conditioner
from ldmkit.training.data import Pictures


def told(conditioner: Conditioner, pictures: Pictures, indices: np.ndarray, height_width: tuple[int, int]) -> dict[str, Any]:
    """Those of a conditioner's options that the data answer, for some pictures; what its `forward` does not take is left out.

    Args:
        height_width: of all pictures as they are read.

    Returns:
        image_size, as in a pipeline; and int64 tensors (B, 2), a row for each picture: original_size and target_size (height,
        width), crops_coords_top_left (top, left).
    """
    target = np.broadcast_to(np.array(height_width, np.int64), (len(indices), 2))
    original = target if pictures.original_sizes is None else pictures.original_sizes[indices]
    corners = np.zeros_like(target) if pictures.crops is None else pictures.crops[indices]
    known = {"original_size": original, "crops_coords_top_left": corners, "target_size": target}
    found: dict[str, Any] = {
        name: torch.from_numpy(value.astype(np.int64)) for name, value in known.items() if takes(conditioner, name)
    }
    return {**({"image_size": height_width} if takes(conditioner, "image_size") else {}), **found}
