"""What the kernels share: where a program stands, tiles of channels x pixels in either memory format, sums over groups.

A slice is some whole neighbouring groups of one image; its pixels are cut into blocks of PIXELS, and the blocks into parts. A
program has one part of one slice. A tile is (CHANNELS, PIXELS), of which SLICE channels are real.
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ldmkit.kernels.triton_casts import widen


@triton.jit
def place(groups, parts, D: tl.constexpr, SLICE: tl.constexpr):
    """(image, the slice's first group, part) of this program."""
    slices = groups // (SLICE // D)
    program = tl.program_id(0)
    row = program // parts
    return (row // slices).to(tl.int64), (row % slices) * (SLICE // D), program % parts


@triton.jit
def blocks_of(part, parts, pixels, PIXELS: tl.constexpr):
    """(first, one past the last) of a part's blocks."""
    blocks = tl.cdiv(pixels, PIXELS).to(tl.int64)
    return part * blocks // parts, (part + 1) * blocks // parts


@triton.jit
def members(D: tl.constexpr, SLICE: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr):
    """(CHANNELS, GROUPS): whether a channel is in a group."""
    channel, group = tl.arange(0, CHANNELS)[:, None], tl.arange(0, GROUPS)[None, :]
    return (channel // D == group) & (channel < SLICE)


@triton.jit
def over_channels(values, member):
    """(CHANNELS,) => (GROUPS,): sums over each group's channels."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def to_channels(values, member):
    """(GROUPS,) => (CHANNELS,): each channel's group's value."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def offsets(
    first_channel,
    block,
    channels,
    pixels,
    LAST: tl.constexpr,
    SLICE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """(offsets in an image, inside) of a tile, both (CHANNELS, PIXELS). LAST: channels are neighbours in memory."""
    channel, pixel = tl.arange(0, CHANNELS), block * PIXELS + tl.arange(0, PIXELS)
    inside = (channel < SLICE)[:, None] & (pixel < pixels)[None, :]
    if LAST:
        at = (pixel * channels)[None, :] + (first_channel + channel)[:, None]
    else:
        at = ((first_channel + channel).to(tl.int64) * pixels)[:, None] + pixel[None, :]
    return at, inside


@triton.jit
def load_h(x, residual, shift_c, at, inside):
    """x + shift + residual of a tile; x and residual point to the image, and either of the latter may be None."""
    h = widen(tl.load(x + at, inside, other=0.0))
    if shift_c is not None:
        h += shift_c[:, None]
    if residual is not None:
        h += widen(tl.load(residual + at, inside, other=0.0))
    return h


@triton.jit
def load_channels(
    values, first_channel, otherwise: tl.constexpr, dtype: tl.constexpr, SLICE: tl.constexpr, CHANNELS: tl.constexpr
):
    """A slice's values of a (C,) tensor, or `otherwise` where it is None."""
    channel = tl.arange(0, CHANNELS)
    if values is None:
        return tl.full((CHANNELS,), otherwise, dtype)
    else:
        return widen(tl.load(values + first_channel + channel, channel < SLICE, other=0.0)).to(dtype)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))
