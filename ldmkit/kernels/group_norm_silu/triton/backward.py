"""The backward kernels. With n = (h - mean) rstd, z = n weight + bias and d = grad silu'(z), the gradient of h is
rstd (weight d - sum(weight d) / M - n sum(weight d n) / M), with sums over the M elements of a group. Sums of d n, d and n over
each channel of each image give those, and the gradients of weight, bias and shift.
"""
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
from ldmkit.kernels.triton_casts import narrow, widen


@triton.jit
def _differentiate(x, residual, shift_c, grad, at, inside, mean_c, rstd_c, weight_c, bias_c, SILU: tl.constexpr):
    """(n, d) of a tile, both 0 outside."""
    n = (load_h(x, residual, shift_c, at, inside) - mean_c[:, None]) * rstd_c[:, None]
    d = widen(tl.load(grad + at, inside, other=0.0))
    if SILU:
        z = n * weight_c[:, None] + bias_c[:, None]
        s = sigmoid(z)
        d = d * (s + z * s * (1.0 - s))
    return tl.where(inside, n, 0.0), tl.where(inside, d, 0.0)


@triton.jit
def _grad_x(n, d, rstd_c, weight_c, first_c, second_c):
    return rstd_c[:, None] * (weight_c[:, None] * d - (first_c[:, None] + n * second_c[:, None]))


@triton.jit(do_not_specialize=["grad_units", "x_units", "residual_units", "channel_units", "pixel_units", "groups", "parts"])
def backward_kernel(
    grad,
    x,
    residual,
    weight,
    bias,
    shift,
    mean,
    rstd,
    grad_x,
    partial,
    channel_sums,
    grad_units,
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
    MODE: tl.constexpr,
    SINGLE: tl.constexpr,
    SILU: tl.constexpr,
):
    """Modes as in the forward. Sums go to `channel_sums`, (image, part, 3, channel), and `partial`, (image, group, part, 2)."""
    UNIT: tl.constexpr = UNIT_C if LAST else UNIT_S
    channels, pixels = channel_units * UNIT_C, pixel_units * UNIT_S
    image, first_group, part = place(groups, parts, D, SLICE)
    first_channel = first_group * D
    grad += image * grad_units * UNIT
    x += image * x_units * UNIT
    if residual is not None:
        residual += image * residual_units * UNIT
    grad_x += image * channels * pixels
    dtype: tl.constexpr = mean.dtype.element_ty
    shift_c = None
    if shift is not None:
        shift_c = load_channels(shift + image * channels, first_channel, 0, dtype, SLICE, CHANNELS)
    member = members(D, SLICE, CHANNELS, GROUPS)
    channel, group = tl.arange(0, CHANNELS), tl.arange(0, GROUPS)
    group_ok = group < SLICE // D
    row = image * groups + first_group
    mean_c = to_channels(tl.load(mean + row + group, group_ok, other=0.0), member)
    rstd_c = to_channels(tl.load(rstd + row + group, group_ok, other=0.0), member)
    weight_c = load_channels(weight, first_channel, 1, dtype, SLICE, CHANNELS)
    bias_c = load_channels(bias, first_channel, 0, dtype, SLICE, CHANNELS)
    first, last = blocks_of(part, parts, pixels, PIXELS)

    if SINGLE:
        at, inside = offsets(first_channel, first, channels, pixels, LAST, SLICE, CHANNELS, PIXELS)
        n, d = _differentiate(x, residual, shift_c, grad, at, inside, mean_c, rstd_c, weight_c, bias_c, SILU)
        dn_c, d_c, n_c = tl.sum(d * n, axis=1), tl.sum(d, axis=1), tl.sum(n, axis=1)
    elif MODE != "apply":
        dn_c, d_c, n_c = tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype)
        for block in range(first, last):
            at, inside = offsets(first_channel, block, channels, pixels, LAST, SLICE, CHANNELS, PIXELS)
            n, d = _differentiate(x, residual, shift_c, grad, at, inside, mean_c, rstd_c, weight_c, bias_c, SILU)
            dn_c += tl.sum(d * n, axis=1)
            d_c += tl.sum(d, axis=1)
            n_c += tl.sum(n, axis=1)

    if MODE == "apply":
        some = tl.arange(0, PARTS)[:, None]
        there = (some < parts) & group_ok[None, :]
        at_g = partial + 2 * ((row + group[None, :]) * parts + some)
        first_g = tl.sum(tl.load(at_g, there, other=0.0), axis=0)
        second_g = tl.sum(tl.load(at_g + 1, there, other=0.0), axis=0)
    else:
        at_c = channel_sums + (image * parts + part) * 3 * channels + first_channel + channel
        tl.store(at_c, dn_c, channel < SLICE)
        tl.store(at_c + channels, d_c, channel < SLICE)
        tl.store(at_c + 2 * channels, n_c, channel < SLICE)
        first_g, second_g = over_channels(weight_c * d_c, member), over_channels(weight_c * dn_c, member)
        at_g = partial + 2 * ((row + group) * parts + part)
        tl.store(at_g, first_g, group_ok)
        tl.store(at_g + 1, second_g, group_ok)
    if MODE != "reduce":
        share = 1.0 / (pixels.to(dtype) * D)
        first_c, second_c = to_channels(first_g * share, member), to_channels(second_g * share, member)
        if SINGLE:
            tl.store(grad_x + at, narrow(_grad_x(n, d, rstd_c, weight_c, first_c, second_c), grad_x.dtype.element_ty), inside)
        else:
            for block in range(first, last):
                at, inside = offsets(first_channel, block, channels, pixels, LAST, SLICE, CHANNELS, PIXELS)
                n, d = _differentiate(x, residual, shift_c, grad, at, inside, mean_c, rstd_c, weight_c, bias_c, SILU)
                tl.store(
                    grad_x + at, narrow(_grad_x(n, d, rstd_c, weight_c, first_c, second_c), grad_x.dtype.element_ty), inside
                )


@triton.jit(do_not_specialize=["images", "channels", "pixels", "groups", "parts"])
def parameters_kernel(
    partial,
    channel_sums,
    weight,
    rstd,
    grad_weight,
    grad_bias,
    grad_shift,
    images,
    channels,
    pixels,
    groups,
    parts,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The backward kernel's sums => the gradient of shift for one image, or, in the last programs, of weight and bias."""
    programs = tl.cdiv(channels, CHANNELS)
    image, channel = (
        (tl.program_id(0) // programs).to(tl.int64),
        (tl.program_id(0) % programs) * CHANNELS + tl.arange(0, CHANNELS),
    )
    ok = channel < channels
    dtype: tl.constexpr = rstd.dtype.element_ty
    dn_c, d_c, n_c = tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype)
    out: tl.constexpr = grad_weight.dtype.element_ty
    if image == images:
        for start in range(0, images * parts, ROWS):
            row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
            there = (row < images * parts) & ok[None, :]
            at = channel_sums + row * 3 * channels + channel[None, :]
            dn_c += tl.sum(tl.load(at, there, other=0.0), axis=0)
            d_c += tl.sum(tl.load(at + channels, there, other=0.0), axis=0)
        tl.store(grad_weight + channel, narrow(dn_c, out), ok)
        tl.store(grad_bias + channel, narrow(d_c, out), ok)
    else:
        first_c, second_c = tl.zeros((CHANNELS,), dtype), tl.zeros((CHANNELS,), dtype)
        n_g = tl.zeros((CHANNELS,), dtype)
        group = image * groups + channel // D
        for start in range(0, parts, ROWS):
            part = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
            there = (part < parts) & ok[None, :]
            at = channel_sums + (image * parts + part) * 3 * channels + channel[None, :]
            d_c += tl.sum(tl.load(at + channels, there, other=0.0), axis=0)
            n_c += tl.sum(tl.load(at + 2 * channels, there, other=0.0), axis=0)
            for i in range(D):
                n_g += tl.sum(tl.load(at + 2 * channels + (channel // D * D - channel + i)[None, :], there, other=0.0), axis=0)
            at_g = partial + 2 * (group[None, :] * parts + part)
            first_c += tl.sum(tl.load(at_g, there, other=0.0), axis=0)
            second_c += tl.sum(tl.load(at_g + 1, there, other=0.0), axis=0)
        weight_c = tl.full((CHANNELS,), 1, dtype)
        if weight is not None:
            weight_c = widen(tl.load(weight + channel, ok, other=0.0)).to(dtype)
        # n sums to 0 over a group but for the rounding of its mean, taken out here: grad_shift is small beside its parts.
        others_c = first_c / D + (n_c - n_g / D) * (second_c / (pixels.to(dtype) * D))  # M = pixels D
        grad_c = tl.load(rstd + group, ok, other=0.0) * (weight_c * d_c - others_c)
        tl.store(grad_shift + image * channels + channel, narrow(grad_c, out), ok)
