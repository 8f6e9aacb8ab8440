"""The forward kernel: h = x + shift + residual, moments of its groups, y = silu((h - mean) rstd weight + bias)."""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ldmkit.kernels.group_norm_silu.triton.tiles import (
    blocks_of,
    load_channels,
    load_h,
    members,
    offsets,
    over_channels,
    place,
    sigmoid,
    to_channels,
)
from ldmkit.kernels.triton_casts import narrow


@triton.jit
def _tile_moments(h, inside, n):
    """(mean, variance) of each channel of a tile that has n pixels, in two passes over registers."""
    mean = tl.sum(tl.where(inside, h, 0.0), axis=1) / n
    distance = tl.where(inside, h - mean[:, None], 0.0)
    return mean, tl.sum(distance * distance, axis=1) / n


@triton.jit
def _normalise(h, mean_c, scale_c, bias_c, SILU: tl.constexpr):
    z = (h - mean_c[:, None]) * scale_c[:, None] + bias_c[:, None]
    if SILU:
        z = z * sigmoid(z)
    return z


@triton.jit
def _statistics(
    partial, parts, pixels, group_ok, EPS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr, PIXELS: tl.constexpr
):
    """(mean, rstd) of the slice's groups from the moments of their parts, as in Chan, Golub and LeVeque 1983, eq. 2.1, for any
    number of parts: distances from the first mean are summed, and variances averaged, so that a large mean loses nothing.
    """
    part, group = tl.arange(0, PARTS)[:, None], tl.arange(0, GROUPS)[None, :]
    there = (part < parts) & group_ok[None, :]
    first, last = blocks_of(part, parts, pixels, PIXELS)
    dtype: tl.constexpr = partial.dtype.element_ty
    share = tl.where(there, (tl.minimum(last * PIXELS, pixels) - first * PIXELS).to(dtype) / pixels.to(dtype), 0.0)
    at = partial + 2 * (group.to(tl.int64) * parts + part)
    means, variances = tl.load(at, there, other=0.0), tl.load(at + 1, there, other=0.0)
    pivot = tl.load(partial + 2 * tl.arange(0, GROUPS).to(tl.int64) * parts, group_ok, other=0.0)
    mean = pivot + tl.sum(tl.where(there, share * (means - pivot[None, :]), 0.0), axis=0)
    distance = means - mean[None, :]
    variance = tl.sum(tl.where(there, share * (variances + distance * distance), 0.0), axis=0)
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit(do_not_specialize=["x_units", "residual_units", "channel_units", "pixel_units", "groups", "parts"])
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    shift,
    y,
    mean,
    rstd,
    partial,
    x_units,
    residual_units,
    channel_units,
    pixel_units,
    groups,
    parts,
    UNIT_C: tl.constexpr,
    UNIT_S: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    SLICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,
    SILU: tl.constexpr,
):
    """MODE "once": all of a slice in one program; its one tile stays in registers where SINGLE. "reduce": a part's moments to
    `partial`, (image, group, part, 2). "apply": the parts' moments joined, and y of a part. Images of x are x_units * UNIT
    elements apart.
    """
    UNIT: tl.constexpr = UNIT_C if LAST else UNIT_S
    channels, pixels = channel_units * UNIT_C, pixel_units * UNIT_S
    image, first_group, part = place(groups, parts, D, SLICE)
    first_channel = first_group * D
    x += image * x_units * UNIT
    if residual is not None:
        residual += image * residual_units * UNIT
    y += image * channels * pixels
    dtype: tl.constexpr = mean.dtype.element_ty
    shift_c = None
    if shift is not None:
        shift_c = load_channels(shift + image * channels, first_channel, 0, dtype, SLICE, CHANNELS)
    member = members(D, SLICE, CHANNELS, GROUPS)
    group = tl.arange(0, GROUPS)
    group_ok = group < SLICE // D
    row = image * groups + first_group
    first, last = blocks_of(part, parts, pixels, PIXELS)

    if SINGLE:
        at, inside = offsets(first_channel, first, channels, pixels, LAST, SLICE, CHANNELS, PIXELS)
        h = load_h(x, residual, shift_c, at, inside)
        mean_c, variance_c = _tile_moments(h, inside, pixels.to(dtype))
    elif MODE != "apply":
        mean_c, variance_c = tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype)
        for block in range(first, last):
            at, inside = offsets(first_channel, block, channels, pixels, LAST, SLICE, CHANNELS, PIXELS)
            h = load_h(x, residual, shift_c, at, inside)
            n = tl.minimum(pixels - block * PIXELS, PIXELS).to(dtype)
            tile_mean, tile_variance = _tile_moments(h, inside, n)
            share = n / ((block - first) * PIXELS + n)
            distance = tile_mean - mean_c
            mean_c += share * distance
            variance_c += share * (tile_variance - variance_c + (1.0 - share) * distance * distance)

    if MODE == "apply":
        mean_g, rstd_g = _statistics(partial + 2 * row * parts, parts, pixels, group_ok, EPS, GROUPS, PARTS, PIXELS)
    else:
        mean_g = over_channels(mean_c, member) / D
        distance = mean_c - to_channels(mean_g, member)
        variance_g = over_channels(variance_c + distance * distance, member) / D
        rstd_g = 1.0 / tl.sqrt(variance_g + EPS)
    if MODE == "reduce":
        tl.store(partial + 2 * ((row + group) * parts + part), mean_g, group_ok)
        tl.store(partial + 2 * ((row + group) * parts + part) + 1, variance_g, group_ok)
    else:
        told = group < tl.where(part == 0, SLICE // D, 0)
        tl.store(mean + row + group, mean_g, told)
        tl.store(rstd + row + group, rstd_g, told)
        mean_c = to_channels(mean_g, member)
        scale_c = to_channels(rstd_g, member) * load_channels(weight, first_channel, 1, dtype, SLICE, CHANNELS)
        bias_c = load_channels(bias, first_channel, 0, dtype, SLICE, CHANNELS)
        if SINGLE:
            tl.store(y + at, narrow(_normalise(h, mean_c, scale_c, bias_c, SILU), y.dtype.element_ty), inside)
        else:
            for block in range(first, last):
                at, inside = offsets(first_channel, block, channels, pixels, LAST, SLICE, CHANNELS, PIXELS)
                h = load_h(x, residual, shift_c, at, inside)
                tl.store(y + at, narrow(_normalise(h, mean_c, scale_c, bias_c, SILU), y.dtype.element_ty), inside)
