"""Images too large for memory, in overlapping tiles whose borders fade into each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start along one side. Each reaches beyond the one before; the last may be short."""
    return list(range(0, max(size - overlap, 1), tile - overlap))


def tiled(
    function: Callable[[Tensor], Tensor], x_BCHW: Tensor, *, tile: int, overlap: int, in_unit: int = 1, out_unit: int = 1
) -> Tensor:
    """Apply `function` tile by tile and blend linearly across the overlaps, as diffusers does.

    Args:
        function: maps tiles of h x w units to tiles of as many units.
        tile, overlap: in units (latent pixels); at most half a tile overlaps.
        in_unit, out_unit: pixels per unit of input and output.

    Returns:
        (B, C', H out_unit / in_unit, W out_unit / in_unit).
    """
    height, width = x_BCHW.shape[2] // in_unit, x_BCHW.shape[3] // in_unit
    out: Tensor | None = None
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            bottom, right = min(top + tile, height), min(left + tile, width)
            part = function(x_BCHW[:, :, top * in_unit : bottom * in_unit, left * in_unit : right * in_unit])
            if out is None:
                out = part.new_zeros(*part.shape[:2], height * out_unit, width * out_unit)
            rows = _ramp(top, bottom, height, overlap, out_unit, part)
            columns = _ramp(left, right, width, overlap, out_unit, part)
            weighted = part * rows[:, None] * columns
            out[:, :, top * out_unit : bottom * out_unit, left * out_unit : right * out_unit] += weighted
    assert out is not None
    return out


def _ramp(start: int, stop: int, size: int, overlap: int, unit: int, like: Tensor) -> Tensor:
    """One side's blending weights, ((stop - start) unit,): rising over the overlap before, falling over the overlap after."""
    weights = torch.ones((stop - start) * unit, dtype=like.dtype, device=like.device)
    if overlap == 0:
        return weights
    rise = torch.arange(overlap * unit, dtype=like.dtype, device=like.device) / (overlap * unit)
    if start > 0:
        weights[: overlap * unit] = rise
    if stop < size:
        weights[-overlap * unit :] = 1 - rise
    return weights
