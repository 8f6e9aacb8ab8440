"""What the attention kernels share: products, tiles, masks, exponentials. No kernel here is launched by itself.

Triton's tiles are powers of two, so head dimensions and small numbers of keys are taken in two pieces (40 <= 32 + 16,
80 = 64 + 16, 77 <= 64 + 16). A name ending in 1 is the first piece, in 2 the second, which is absent (a copy of the first that
nothing reads) where its width is 0.
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ldmkit.kernels.triton_casts import INTERPRETED, narrow, widen

STRIDES = ["q_b", "q_h", "q_l", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s", "m_b", "m_h", "m_l", "m_s", "n_b", "n_h"]
"""Arguments of which no variants of a kernel are compiled."""
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b."""
    if INTERPRETED:  # its products in half precision are wrong
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)


@triton.jit
def load_rows(
    base, rows, inside, row_stride, column_stride,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH) from column FIRST on; 0 for columns from D on and, if CHECK, for rows that are not inside.

    The stride of rows counts ALIGN elements, so that Triton knows a divisor of it and loads vectors, at D = 40 too.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None].to(tl.int64) * row_stride * ALIGN + columns[None, :].to(tl.int64) * column_stride
    if FIRST + WIDTH > D:
        allowed = columns[None, :] < D
        if CHECK:
            allowed = allowed & inside[:, None]
        tile = tl.load(pointers, mask=allowed, other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_pieces(
    base, rows, inside, row_stride, column_stride,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ALIGN: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows in two pieces, (rows, D1) and (rows, D2)."""
    tile1 = load_rows(base, rows, inside, row_stride, column_stride, 0, D1, D, ALIGN, CHECK)
    tile2 = tile1
    if D2 > 0:
        tile2 = load_rows(base, rows, inside, row_stride, column_stride, D1, D2, D, ALIGN, CHECK)
    return tile1, tile2


@triton.jit
def readable_keys(shown, keys, S, MASK: tl.constexpr):
    """Which keys are read: a key that every query of a head has masked may hold NaN, and counts as zeros."""
    inside = keys < S
    if MASK > 0:
        inside = tl.load(shown + keys, mask=inside, other=0) != 0
    return inside


@triton.jit
def store_rows(base, rows, end, row_stride, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Stores (rows, WIDTH) from column FIRST on; columns are neighbours."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    inside = rows[:, None] < end
    if FIRST + WIDTH > D:
        inside = inside & (columns[None, :] < D)
    tl.store(pointers, narrow(tile, base.dtype.element_ty), mask=inside)


@triton.jit
def load_bias(mask, rows, keys, L, S, row_stride, key_stride, MASK: tl.constexpr, BY_ROW: tl.constexpr, ACC: tl.constexpr):
    """What a mask adds to the scores, (rows, keys), or (1, keys) where queries share it: -inf hides a key, as past the end."""
    pointers = mask + keys[None, :].to(tl.int64) * key_stride
    inside = keys[None, :] < S
    if BY_ROW:
        pointers += rows[:, None].to(tl.int64) * row_stride
        inside = inside & (rows[:, None] < L)
    if MASK == 1:
        shown = tl.load(pointers, mask=inside, other=0) != 0
        bias = tl.where(shown, 0.0, float("-inf")).to(ACC)
    else:
        bias = widen(tl.load(pointers, mask=inside, other=float("-inf")))
    return bias


@triton.jit
def mask_scores(scores, bias, keys, S, scale, MASK: tl.constexpr, SCALED: tl.constexpr, CHECK: tl.constexpr):
    """Scores as `exponential` takes them: scaled where SCALED (always with a mask), -inf for hidden keys."""
    if SCALED:
        scores = scores * scale
    if MASK > 0:
        scores = tl.where(bias == float("-inf"), float("-inf"), scores + bias)
    elif CHECK:
        scores = tl.where(keys[None, :] < S, scores, float("-inf"))
    return scores


@triton.jit
def exponent_of(scale, SCALED: tl.constexpr):
    """What turns a difference of scores into the exponent of 2."""
    factor = scale * _LOG2_E
    if SCALED:
        factor = tl.full([], _LOG2_E, tl.float32)
    return factor


@triton.jit
def exponential(x, factor, ACC: tl.constexpr):
    """exp of a difference of scores. fp64, whose scores are scaled before they come here, needs the exact function."""
    return tl.exp(x) if tl.float64 == ACC else tl.exp2(x * factor)


@triton.jit
def factor_of_probabilities(scale, SCALED: tl.constexpr, ACC: tl.constexpr, HALF: tl.constexpr):
    """By what `probabilities` multiplies scores; HALF is for numbers of 16 bits.

    Those have log2(e) multiplied in here and into the log-sum-exp, once for all. Wider numbers would show that rounding, which
    is the same along a row: they multiply the difference, which is small where it counts.
    """
    factor = scale
    if SCALED:
        factor = tl.full([], 1.0, ACC)
    if HALF:
        factor = factor * _LOG2_E
    return factor


@triton.jit
def exponents_of_lse(lse, HALF: tl.constexpr):
    """The log-sum-exp of rows as `probabilities` takes it. A row without keys has -inf, and gets probability 0 from +inf."""
    if HALF:
        lse = lse * _LOG2_E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities(scores, lse, factor, HALF: tl.constexpr):
    """exp(scores - log-sum-exp); at most 1, also where scores are so large that rounding would say otherwise."""
    x = tl.minimum(tl.fma(scores, factor, -lse), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(x) if HALF else tl.exp(x)
